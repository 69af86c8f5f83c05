"""The output directory of a run: may it be used, where does the run go on from, and how the result gets there."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from paddlemix.checkpoints.adapter import ADAPTER_WEIGHTS
from paddlemix.checkpoints.directories import remove_directory, writing
from paddlemix.checkpoints.files import INDEX_FILE, SINGLE_FILE
from paddlemix.checkpoints.layouts import ADAPTER_FILE, CONFIG_FILE
from paddlemix.config.schema import RunConfig
from paddlemix.errors import MissingFileError, UserError
from paddlemix.log import logger
from paddlemix.processors.llava import PROCESSOR_FILE
from paddlemix.processors.tokenizer import TOKENIZER_FILES
from paddlemix.trainer.callbacks import CURVE_FILE, METRICS_FILE
from paddlemix.trainer.model_card import CARD_FILE, is_own_card
from paddlemix.trainer.sampling_callback import SAMPLES_FILE
from paddlemix.trainer.saving import STATE_FILE, list_checkpoints
from paddlemix.trainer.skipping import SKIPPED_FILE

RUN_CONFIG_FILE = "run_config.json"
# what a directory is recognised by comes last, so that half a result is never taken for a model
_LAST = (CONFIG_FILE, ADAPTER_FILE)
_WEIGHTS = (SINGLE_FILE, INDEX_FILE, "model-*-of-*.safetensors")
_OWN_FILES = (
    *(*_LAST, *_WEIGHTS, ADAPTER_WEIGHTS, PROCESSOR_FILE, *TOKENIZER_FILES),
    *(RUN_CONFIG_FILE, METRICS_FILE, CURVE_FILE, SAMPLES_FILE, SKIPPED_FILE, "skipped-rank*.jsonl", CARD_FILE),
    "checkpoint-[0-9]*",
)
_RESULT = ".result."
# temporary names that only a killed run leaves behind
_LEFTOVERS = (
    *(".checkpoint-[0-9]*", f"{_RESULT}*", f".{RUN_CONFIG_FILE}.*.tmp"),
    *(Path(name).stem + ".tmp" for name in (METRICS_FILE, SAMPLES_FILE)),
    f".{CURVE_FILE}.tmp",
)


def find_resume_point(config: RunConfig) -> Path | None:
    """Decides whether a run starts anew or goes on.

    Returns:
        The checkpoint to go on from, None to start at step 0.

    Raises:
        MissingFileError: `resume_from_checkpoint` is no complete checkpoint.
        UserError: `output_dir` has content that is neither to be overwritten nor gone on from, or cannot be written.
    """
    assert config.output_dir is not None
    output_dir = Path(config.output_dir)
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"output_dir '{output_dir}' is a file; name a folder")
    _check_writable(output_dir)
    if config.resume_from_checkpoint:
        checkpoint = Path(config.resume_from_checkpoint)
        if not (checkpoint / STATE_FILE).is_file():
            raise MissingFileError(f"resume_from_checkpoint '{checkpoint}' is no complete checkpoint (no {STATE_FILE})")
        return checkpoint
    _check_inputs_are_elsewhere(config, output_dir)
    if not config.do_train or config.overwrite_output_dir or not _content(output_dir):
        return None
    checkpoints = list_checkpoints(output_dir)
    if not checkpoints and _ended_early(output_dir):
        logger.info("the run in %s ended before its first checkpoint: starting anew", output_dir)
        return None
    if not checkpoints:
        raise UserError(
            f"output_dir '{output_dir}' is not empty and holds no checkpoint to go on from; set overwrite_output_dir "
            "to true or choose another folder"
        )
    logger.info("going on from %s (set overwrite_output_dir to start anew)", checkpoints[-1])
    return checkpoints[-1]


def _check_writable(output_dir: Path) -> None:
    existing = output_dir
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        raise UserError(f"output_dir '{output_dir}' cannot be made: {existing} is a file; choose another folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"output_dir '{output_dir}' cannot be written: no permission in {existing}")


def _check_inputs_are_elsewhere(config: RunConfig, output_dir: Path) -> None:
    """What a run starts from must not be what it replaces: an adapter would then stand on nothing."""
    if not config.do_train:
        return
    replaced = [output_dir.resolve()]
    if config.overwrite_output_dir:
        replaced += [path.resolve() for path in _earlier_run(output_dir)]
    for key in ("model_name_or_path", "mm_vision_tower", "lora_path", "pretrain_mm_mlp_adapter"):
        value = getattr(config, key)
        given = Path(value).resolve() if value else None
        inside = given is not None and any(path in given.parents for path in replaced[1:])
        if given in replaced or inside:
            raise UserError(
                f"output_dir '{output_dir}': the run would replace its own {key} '{value}'; choose another folder"
            )


def _content(output_dir: Path) -> set[Path]:
    """What is in the directory besides what a killed run left under temporary names."""
    return set(output_dir.iterdir()) - set(_found(output_dir, _LEFTOVERS)) if output_dir.is_dir() else set()


def _ended_early(output_dir: Path) -> bool:
    """Whether all that is there of a run is its beginning: its settings and no result."""
    return (output_dir / RUN_CONFIG_FILE).is_file() and not any((output_dir / name).exists() for name in _LAST)


def _earlier_run(output_dir: Path) -> list[Path]:
    found = _found(output_dir, _OWN_FILES)
    return [path for path in found if path.name != CARD_FILE or is_own_card(path)]


def _found(output_dir: Path, patterns: Iterable[str]) -> list[Path]:
    return [path for pattern in patterns for path in sorted(output_dir.glob(pattern))]


def remove_leftovers(output_dir: Path) -> None:
    """Removes what a killed run left under temporary names."""
    with writing(output_dir):
        for path in _found(output_dir, _LEFTOVERS):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def clear_earlier_run(output_dir: Path) -> None:
    """Removes what an earlier run left, and only that, so that nothing of it is taken for this run's."""
    remove_leftovers(output_dir)
    with writing(output_dir):
        for path in _earlier_run(output_dir):
            remove_directory(path) if path.is_dir() else path.unlink()


def publish(output_dir: Path, write: Callable[[Path], None]) -> None:
    """Writes a result into a hidden folder of `output_dir` and moves its files up when all are complete.

    Weights and settings of an earlier model or adapter there go; other files stay.

    Args:
        write: writes the files into the directory it is given.

    Raises:
        UserError: they cannot be written; `output_dir` is as it was.
    """
    output_dir = Path(os.path.abspath(output_dir))
    with writing(output_dir):
        output_dir.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=_RESULT, dir=output_dir))  # never on another disk
        try:
            write(temporary)
            for name in _LAST:
                (output_dir / name).unlink(missing_ok=True)
            for path in [path for pattern in _WEIGHTS for path in output_dir.glob(pattern)]:
                path.unlink()  # an index that stays behind would win over the new file
            for path in sorted(temporary.iterdir(), key=lambda path: path.name in _LAST):
                os.replace(path, output_dir / path.name)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
