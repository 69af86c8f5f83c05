"""What a run reads and therefore must not overwrite: models with all their parts, data files, folders of pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from paddlemix.checkpoints.hub.needs import needed_by_model
from paddlemix.config.schema import RunConfig
from paddlemix.datasets.mixture import SampleDataset
from paddlemix.outputs import Needed, Output, check_output, check_pictures
from paddlemix.paths import is_address
from paddlemix.trainer.run_data import data_file_names

_MODELS = ("model_name_or_path", "mm_vision_tower", "lora_path", "pretrain_mm_mlp_adapter")


def needed_by_run(config: RunConfig, resume: Path | None = None) -> Iterator[Needed]:
    """All that a run reads, as far as it is on this machine.

    Args:
        resume: the checkpoint that the run continues, if any.
    """
    for key in _MODELS:
        value = getattr(config, key)
        if value:
            yield from needed_by_model(value, f"the run's own {key}")
    if resume is not None:
        yield Needed("the checkpoint that the run resumes from", resume, "model")
    yield from _files([config.chat_template], "the chat template")
    yield from _files([prompt.get("image") for prompt in config.sample_prompts or []], "the picture of sample_prompts")
    roots = [config.image_root]
    for split, entries in (config.dataset or {}).items():
        for entry in entries:
            yield from _files(data_file_names(entry), f"the data file of dataset.{split}")
            yield from _files([entry.get("chat_template")], "the chat template")
            roots.append(entry.get("image_root"))
    # In order, each once: entries mostly share one root.
    for root in dict.fromkeys(roots):
        if root and not is_address(root):
            yield Needed("the image_root", Path(root), "pictures")


def _files(names: Sequence[str | None], role: str) -> Iterator[Needed]:
    for name in names:
        if name and not is_address(name):
            yield Needed(role, Path(name), "file")


def check_outputs(config: RunConfig, resume: Path | None, own_folder: bool) -> None:
    """Refuses a run that would write where it reads.

    Args:
        resume: the checkpoint that the run continues, if any.
        own_folder: whether that is in the run's `output_dir`, which may then hold data files too.

    Raises:
        UserError: `output_dir` or another folder that the run writes is, contains or is inside something that it reads.
    """
    # A run that continues in its own folder may have data files there, as earlier versions allowed; models never.
    needed = list(needed_by_run(config, None if own_folder else resume))
    output = Output("output_dir", Path(str(config.output_dir)))
    check_output(output, [item for item in needed if item.kind == "model"] if own_folder else needed)
    for key in ("logging_dir", "metrics_output_path", "vision_cache_dir"):
        value = getattr(config, key)
        if value:
            # These folders are shared with other programs: files are added and none is removed.
            check_output(Output(key, Path(value), "additions"), needed)


def check_run_pictures(config: RunConfig, samples: SampleDataset, own_folder: bool) -> None:
    """Refuses a training whose loss curve could replace a picture that its records name.

    Args:
        own_folder: whether the run continues in its `output_dir`, below which an earlier version allowed pictures.

    Raises:
        UserError: `output_dir` holds such a picture, directly or, in a new run, in a folder below.
    """
    if config.do_train:
        output = Output("output_dir", Path(str(config.output_dir)))
        check_pictures(output, samples.pictures(), below=not own_folder)
