"""The output directory of a run: whether it may be used, where the run continues, and how the result gets there."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from paddlemix import temporary
from paddlemix.checkpoints.files.directories import remove_directory, writing
from paddlemix.checkpoints.files.weight_files import INDEX_FILE, SINGLE_FILE, read_json
from paddlemix.checkpoints.layouts.file_names import ADAPTER_FILE, ADAPTER_WEIGHTS, CONFIG_FILE
from paddlemix.config.load import save_config
from paddlemix.config.schema import RunConfig
from paddlemix.errors import MissingFileError, UserError
from paddlemix.launch.rank_logs import holds_rank_logs_alone
from paddlemix.locks import locked_output
from paddlemix.log import logger, process_rank
from paddlemix.outputs import Output, check_output
from paddlemix.parallel.collectives import together
from paddlemix.processors.llava import PROCESSOR_FILE
from paddlemix.processors.text.tokenizer import TOKENIZER_FILES
from paddlemix.temporary import is_temporary
from paddlemix.trainer.callbacks.progress import CURVE_FILE, METRICS_FILE
from paddlemix.trainer.callbacks.samples import SAMPLES_FILE
from paddlemix.trainer.output_guard import check_outputs
from paddlemix.trainer.reports.model_card import CARD_FILE, is_own_card
from paddlemix.trainer.reports.skipped import SKIPPED_FILE
from paddlemix.trainer.resuming.checkpoint_check import damaged
from paddlemix.trainer.resuming.checkpoint_folders import STATE_FILE, checkpoint_folders, is_in
from paddlemix.trainer.resuming.job import JOB_FILE

RUN_CONFIG_FILE = "run_config.json"
# what a directory is recognised by comes last, so that half a result is never taken for a model
_LAST = (CONFIG_FILE, ADAPTER_FILE)
_WEIGHTS = (SINGLE_FILE, INDEX_FILE, "model-*-of-*.safetensors")
_FILES = (
    *(*_LAST, *_WEIGHTS, ADAPTER_WEIGHTS, PROCESSOR_FILE, *TOKENIZER_FILES),
    *(RUN_CONFIG_FILE, JOB_FILE, METRICS_FILE, CURVE_FILE, SAMPLES_FILE),
    *(SKIPPED_FILE, "skipped-rank*.jsonl", CARD_FILE),
)
_OWN_FILES = (*_FILES, "checkpoint-[0-9]*")
# temporary names that only killed runs of earlier versions left; those of today tell whether anybody holds them
_LEFTOVERS = (
    *(".checkpoint-[0-9]*", ".result.*", f".{RUN_CONFIG_FILE}.*.tmp"),
    *(Path(name).stem + ".tmp" for name in (METRICS_FILE, SAMPLES_FILE)),
    f".{CURVE_FILE}.tmp",
)


def find_resume_point(config: RunConfig) -> Path | None:
    """Decides whether a run starts at step 0 or resumes.

    Returns:
        The checkpoint to resume from, None to start at step 0.

    Raises:
        MissingFileError: `resume_from_checkpoint` is not a complete checkpoint.
        UserError: `output_dir` has content that is neither to be overwritten nor resumed, or a newest checkpoint
            that has lost its state; it cannot be written, or something that the run reads is there.
    """
    assert config.output_dir is not None
    output_dir = Path(config.output_dir)
    check_output(Output("output_dir", output_dir), ())
    _check_no_folder_in_the_way(output_dir)
    resume = _named_checkpoint(config)
    if not config.do_train:
        return resume
    # resume_from_checkpoint  overwrite_output_dir  output_dir           -> what happens
    #   set                     any                   holds it             -> resumes in its own folder
    #   set                     true                  another run          -> resumes, that run is removed
    #   not set                 true                  an earlier run       -> starts over, that run is removed
    #   not set                 false                 has checkpoints      -> resumes the newest
    #   not set                 false                 only a beginning     -> starts over
    #   any                     false                 anything else        -> error
    if resume is None and not config.overwrite_output_dir:
        resume = _newest_checkpoint(output_dir)
    goes_on = resume is not None and continues_in(config, resume)
    check_outputs(config, resume, goes_on)
    if not (goes_on or config.overwrite_output_dir):
        _check_nothing_is_there(output_dir, resume)
    if goes_on and resume is not None and not config.overwrite_output_dir:
        _check_no_other_result(output_dir, resume)
    return resume


def _check_no_folder_in_the_way(output_dir: Path) -> None:
    """Refuses a folder with the name of a file of the result, which could only be reported when training is over."""
    folders = [path for path in _found(output_dir, _FILES) if path.is_dir()] if output_dir.is_dir() else []
    if folders:
        raise UserError(
            f"output_dir '{output_dir}' holds a folder named {folders[0].name}, where a file of the result goes; move "
            "it away, or choose another output_dir"
        )


def continues_in(config: RunConfig, resume: Path) -> bool:
    """Whether a run that resumes a checkpoint does so in its own folder: that which holds the checkpoint, or in
    which it was begun from the same one."""
    output_dir = Path(str(config.output_dir)).resolve()
    if is_in(resume, output_dir):
        return True
    try:
        # A run that was begun from another run's checkpoint and killed before its own first one.
        earlier = read_json(output_dir / RUN_CONFIG_FILE).get("resume_from_checkpoint")
    except UserError:
        return False
    return isinstance(earlier, str) and Path(earlier).resolve() == resume.resolve()


@contextlib.contextmanager
def sole_writer(config: RunConfig) -> Iterator[Callable[[Path | None], None]]:
    """Keeps a second run out of `output_dir` while the block runs, from the start where the folder exists.

    Yields:
        A function to call with the resume point before anything is written.  It locks the folder, which exists
        afterwards, if it did not exist at the start.

    Raises:
        UserError: a run that trains has the folder (names its process), or has written it since this one's start, or a
            model that this run needs is there.
    """
    output_dir = Path(str(config.output_dir))
    writes = config.do_train and process_rank() == 0  # the other processes go where the first goes
    # A folder that does not exist cannot be locked, and is not made before the run's inputs are known to be right.
    held_from_start = writes and output_dir.is_dir()
    with contextlib.ExitStack() as stack:

        def take(resume: Path | None) -> None:
            if held_from_start or not writes:
                return
            stack.enter_context(locked_output(output_dir, "output_dir"))
            # Between the start and now another run may have made the folder and written into it.
            if find_resume_point(config) != resume:
                raise UserError(f"output_dir '{output_dir}' was written by another run meanwhile; start this one again")

        with together():
            if writes:
                check_output(Output("output_dir", output_dir), ())
                check_outputs(config, None, own_folder=True)
            if held_from_start:
                stack.enter_context(locked_output(output_dir, "output_dir"))
        yield take


def _newest_checkpoint(output_dir: Path) -> Path | None:
    """The checkpoint to resume from; one that has lost its state is not passed over for an older one or a new start.

    A killed save leaves none: a checkpoint gets its name when it is whole.
    """
    folders = checkpoint_folders(output_dir)
    if not folders:
        return None
    newest = folders[-1]
    if not newest.exists():
        raise damaged(newest, f"it is a link to '{os.readlink(newest)}', which does not exist")
    if not (newest / STATE_FILE).is_file():
        raise damaged(newest, f"its {STATE_FILE} is missing")
    logger.info("resuming from %s (set overwrite_output_dir to start over)", newest)
    return newest


def _named_checkpoint(config: RunConfig) -> Path | None:
    if not config.resume_from_checkpoint:
        return None
    checkpoint = Path(config.resume_from_checkpoint)
    if not (checkpoint / STATE_FILE).is_file():
        raise MissingFileError(
            f"resume_from_checkpoint '{checkpoint}' is not a complete checkpoint (it has no {STATE_FILE})"
        )
    return checkpoint


def _check_nothing_is_there(output_dir: Path, resume: Path | None) -> None:
    if not _content(output_dir):
        return
    advice = "set overwrite_output_dir to true or choose another folder"
    if resume is not None:
        raise UserError(
            f"output_dir '{output_dir}' is not empty and is not the folder of the run that saved "
            f"resume_from_checkpoint '{resume}'; {advice}"
        )
    if not _ended_early(output_dir):
        raise UserError(f"output_dir '{output_dir}' is not empty and holds no checkpoint to resume from; {advice}")
    logger.info("the run in %s ended before its first checkpoint: starting over", output_dir)


def _check_no_other_result(output_dir: Path, resume: Path) -> None:
    """Refuses a folder with a whole model where the run writes an adapter: its end would remove that merged model."""
    if (resume / ADAPTER_FILE).is_file() and (output_dir / CONFIG_FILE).exists():
        raise UserError(
            f"output_dir '{output_dir}' holds a whole model ({CONFIG_FILE}), which the adapter of this run would "
            "replace, perhaps one that the adapter was merged into; move the model's files to a folder of their own"
        )


def _content(output_dir: Path) -> set[Path]:
    """What is in the directory besides the launcher's logs, and what a killed run left under temporary names."""
    if not output_dir.is_dir():
        return set()
    # A file that another process is writing at the moment does not make the folder used.
    found = {path for path in output_dir.iterdir() if not (is_temporary(path) or holds_rank_logs_alone(path))}
    return found - set(_found(output_dir, _LEFTOVERS))


def _ended_early(output_dir: Path) -> bool:
    """Whether a run has left nothing but its beginning: its settings and no result."""
    return (output_dir / RUN_CONFIG_FILE).is_file() and not any((output_dir / name).exists() for name in _LAST)


def _earlier_run(output_dir: Path) -> list[Path]:
    found = [path for path in _found(output_dir, _OWN_FILES) if path.name != CARD_FILE or is_own_card(path)]
    has_metrics = (output_dir / METRICS_FILE).exists()  # a picture of that name alone may be anybody's
    return [path for path in found if path.name != CURVE_FILE or has_metrics]


def _found(output_dir: Path, patterns: Iterable[str]) -> list[Path]:
    return [path for pattern in patterns for path in sorted(output_dir.glob(pattern))]


def remove_leftovers(output_dir: Path) -> None:
    """Removes what a killed run left under temporary names."""
    with writing(output_dir):
        temporary.remove_leftovers(output_dir)
        for path in _found(output_dir, _LEFTOVERS):
            if not is_temporary(path):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def clear_earlier_run(output_dir: Path) -> None:
    """Removes what an earlier run left, and only that, so that none of it is mistaken for this run's."""
    remove_leftovers(output_dir)
    with writing(output_dir):
        for path in _earlier_run(output_dir):
            remove_directory(path) if path.is_dir() else path.unlink()


def begin_output(config: RunConfig, resume: Path | None) -> None:
    """Makes the folder of a training ready for its first step: free of an earlier run, with the run's settings.

    Args:
        resume: the checkpoint that the run continues, if any; `find_resume_point` has made sure that only what
            may go is removed here.
    """
    output_dir = Path(str(config.output_dir))
    remove_leftovers(output_dir)
    if resume is None or not continues_in(config, resume):
        clear_earlier_run(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    save_config(config, output_dir / RUN_CONFIG_FILE)


def holds_result(directory: Path) -> bool:
    """Whether `publishing` would replace something there: a model's or adapter's files."""
    names = (*_LAST, *_WEIGHTS, ADAPTER_WEIGHTS, PROCESSOR_FILE, *TOKENIZER_FILES)
    return bool(_found(directory, names))


@contextlib.contextmanager
def publishing(output_dir: Path) -> Iterator[Path]:
    """Yields a hidden folder of `output_dir` for a result, whose files move up when the block succeeds.

    Weights and settings of an earlier model or adapter are removed; other files stay.

    Raises:
        UserError: they cannot be written; `output_dir` is as it was.
    """
    output_dir = Path(os.path.abspath(output_dir))
    with writing(output_dir):
        output_dir.mkdir(parents=True, exist_ok=True)
        temporary.remove_leftovers(output_dir)
        with temporary.temporary_directory(output_dir, "result") as directory:  # never on another disk
            yield directory
            # From here to the last rename the folder holds no model: a kill leaves files that nothing takes for a
            # model.
            for name in _LAST:
                (output_dir / name).unlink(missing_ok=True)
            for path in [path for pattern in _WEIGHTS for path in output_dir.glob(pattern)]:
                path.unlink()  # an index that is left would win over the new file
            for path in sorted(directory.iterdir(), key=lambda path: path.name in _LAST):
                os.replace(path, output_dir / path.name)
