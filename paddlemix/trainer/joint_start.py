"""What the processes of a run make sure of before its first step: they see one `output_dir` and read the same.

Several nodes may have different disks under the same names.  Whatever differs is found here, on every process, and not
by a curve that is wrong or a save that fails hours later.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path

from paddlemix.checkpoints.files.directories import is_seen
from paddlemix.checkpoints.identity.weight_identity import weight_files
from paddlemix.config.schema import SPECS, RunConfig
from paddlemix.errors import OtherProcessError, UserError
from paddlemix.log import logger
from paddlemix.parallel.collectives import decided_by_first, gathered_objects, own_rank, process_count, together
from paddlemix.parallel.layout import local_rank
from paddlemix.temporary import temporary_file
from paddlemix.trainer.output import find_resume_point
from paddlemix.trainer.resuming.checkpoint_check import check_checkpoint
from paddlemix.trainer.resuming.checkpoint_folders import STATE_FILE, list_checkpoints, saved_recipe
from paddlemix.trainer.resuming.job import Job, read_job
from paddlemix.trainer.resuming.same_recipe import check_same_recipe
from paddlemix.trainer.run import Run

# Keys that a node may set for itself: they change no number and no step at which processes wait for each other.
_OWN_KEYS = (
    *("device", "dataset", "dataloader_num_workers", "disable_tqdm", "report_to"),
    *("image_timeout", "image_retries", "allow_local_network", "vision_cache_gb"),
)
_OWN_PLACES = ("data_files", "image_root")  # of an entry of `dataset`
_SAMPLES, _SAMPLE_BYTES = 64, 4096  # of a file that is too long to be read whole by every process


def agreed_resume_point(config: RunConfig, processes: int) -> Path | None:
    """The checkpoint that the run resumes from, checked; None to start at step 0.  The first process decides it.

    Args:
        processes: that read different samples of a step.

    Raises:
        MissingFileError, UserError: see `find_resume_point`, `check_checkpoint` and `check_same_recipe`; or a process
            does not see the first one's `output_dir` or that checkpoint.
    """

    job = Job.of_all(gathered_objects(Job.of_process()))

    def decide() -> Path | None:
        resume = find_resume_point(_without_overwriting(config) if _is_restart(config, job) else config)
        if resume is not None:
            check_checkpoint(resume, with_optimizer=not config.ignore_load_lr_and_optim)
            check_same_recipe(resume, saved_recipe(resume), config, processes)
        return resume

    resume = decided_by_first(decide)
    if config.do_train:
        _check_shared(Path(str(config.output_dir)), resume)
    return resume


def note_job(output_dir: Path) -> None:
    """Remembers what has started this run; called by every process when the run has its folder."""
    job = Job.of_all(gathered_objects(Job.of_process()))
    with together():
        if own_rank() == 0:
            job.write(output_dir)


def _is_restart(config: RunConfig, job: Job) -> bool:
    return config.do_train and job.restarts_that_of(read_job(Path(str(config.output_dir))))


def _without_overwriting(config: RunConfig) -> RunConfig:
    """The same run for a start that no user has made: it resumes from what the last start has saved, and removes none.

    A user who starts a run may want it from scratch; a launcher that starts it again after a crash never does.
    """
    saved = list_checkpoints(Path(str(config.output_dir)))
    # `resume_from_checkpoint` was where the first start resumed.
    named = None if saved else config.resume_from_checkpoint
    if config.overwrite_output_dir or named != config.resume_from_checkpoint:
        logger.info("the same job has started this run before: it resumes, and overwrites nothing")
    return replace(config, overwrite_output_dir=False, resume_from_checkpoint=named)


def _check_shared(output_dir: Path, resume: Path | None) -> None:
    """Checks that every process sees the first one's `output_dir` and the checkpoint to resume from."""
    if process_count() == 1:
        return
    host = socket.gethostname()
    with contextlib.ExitStack() as held:
        # On the first process a new file, which is gone when this block ends.
        token = decided_by_first(lambda: _from(output_dir, held.enter_context(_token_near(output_dir))))
        with together():
            if not is_seen(Path(os.path.abspath(output_dir / token))):
                raise UserError(
                    f"output_dir '{output_dir}' is another folder on {host} than for process 0: a run on several nodes "
                    "needs an output_dir that all nodes share, or one node"
                )
            if resume is not None and not is_seen(resume / STATE_FILE):
                raise UserError(
                    f"checkpoint '{resume}', which process 0 resumes from, does not exist on {host}: a run on several "
                    "nodes needs a place that all nodes share, or one node"
                )


def _token_near(output_dir: Path) -> contextlib.AbstractContextManager[Path]:
    """A new file in the folder, or in the nearest one above it that exists."""
    folder = Path(os.path.abspath(output_dir))
    while not folder.is_dir():
        folder = folder.parent
    return temporary_file(folder / "seen-by-all")


def _from(folder: Path, path: Path) -> str:
    # As a process with another working directory, or another disk of that name, has to look for it.
    return os.path.relpath(path, os.path.abspath(folder))


def check_same_keys(config: RunConfig) -> None:
    """Checks that every process has the settings of the first.

    Called before anything else that waits for all: by other settings the processes would wait in different places.

    Raises:
        UserError: one of them has others; names its rank and what differs, with both values.
    """
    if process_count() > 1:
        _compare(dict(_keys(config)))


def check_same_run(run: Run) -> None:
    """Checks that every process has the data and the base model of the first.

    Raises:
        UserError: one of them has others; names its rank and what differs, with both values.
    """
    if process_count() == 1:
        return
    # On each machine one process hashes the files; the others find the digests in the cache.
    for is_turn in (local_rank() == 0, local_rank() != 0):
        with together():
            if is_turn:
                own = dict(_facts(run))
    _compare(own)


def _compare(own: dict[str, str]) -> None:
    every = gathered_objects(own)
    for rank, facts in enumerate(every):
        different = [name for name in {**every[0], **facts} if every[0].get(name) != facts.get(name)]
        if not different:
            continue
        listed = "; ".join(
            f"{name} {facts.get(name, 'missing')}, in process 0 {every[0].get(name, 'missing')}" for name in different
        )
        text = f"process {rank} does not train what process 0 trains: {listed}"
        raise (UserError if own_rank() in (0, rank) else OtherProcessError)(
            f"{text}. Start all with the same file and arguments, and give all nodes the same data and model"
        )


def _keys(config: RunConfig) -> Iterator[tuple[str, str]]:
    """Name and value of every key that has to be the same, both in words."""
    for name, spec in SPECS.items():
        if spec.status == "used" and spec.path is None and name not in _OWN_KEYS and not spec.secret:
            yield name, repr(getattr(config, name))
    for split, entries in (config.dataset or {}).items():
        for number, entry in enumerate(entries):
            same = {key: value for key, value in entry.items() if key not in _OWN_PLACES}
            if same.get("chat_template"):  # of a path only the file's name
                same["chat_template"] = Path(str(same["chat_template"])).name
            yield f"entry {number + 1} of dataset.{split}", repr(dict(sorted(same.items())))


def _facts(run: Run) -> Iterator[tuple[str, str]]:
    """Name and value of all data and weights that have to be the same, both in words."""
    data = {"train": None if run.train is None else run.train.samples, "eval": run.evaluation}
    for split, samples in data.items():
        if samples is None:
            continue
        # A file may be the same, and another number of its records used.
        yield f"samples of dataset.{split}", f"{len(samples):,}"
        for number, records in enumerate(samples.record_files):
            # A file of another content may have as many records; it is hashed once, and then in the cache.
            yield (
                f"file {number + 1} of dataset.{split}",
                f"'{records.path}' with {len(records)} records (digest {records.content_digest[:12]})",
            )
    yield "the model's config.json", f"(digest {_digest(repr(run.loaded.model.config).encode())})"
    yield "the processor", f"(digest {_digest(repr(run.processor.to_dict()).encode())})"
    for path in _base_files(run):
        yield f"file {path.name} of the model", _sampled(path)


def _base_files(run: Run) -> list[Path]:
    files = run.loaded.files
    places = [] if files is None else [files.source.directory, files.projector_file]
    places += [] if files is None or files.tower is None else [files.tower.directory]
    places += [Path(run.config.lora_path)] if run.config.lora_path else []
    return [path for place in places if place is not None for path in weight_files(place) if path.suffix != ".json"]


def _sampled(path: Path) -> str:
    """The size of a file and a digest of pieces all over it."""
    size, hashed = path.stat().st_size, blake2b(digest_size=6)
    with open(path, "rb") as file:
        for number in range(_SAMPLES):
            file.seek(max(size - _SAMPLE_BYTES, 0) * number // (_SAMPLES - 1))
            hashed.update(file.read(_SAMPLE_BYTES))
    return f"of {size:,} bytes (digest {hashed.hexdigest()})"


def _digest(data: bytes) -> str:
    return blake2b(data, digest_size=6).hexdigest()
