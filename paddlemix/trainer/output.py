"""The output directory of a run: may it be used, where does the run go on from, and how the result gets there."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from paddlemix.checkpoints.files import writing
from paddlemix.checkpoints.layouts import ADAPTER_FILE, CONFIG_FILE
from paddlemix.config.schema import RunConfig
from paddlemix.errors import MissingFileError, UserError
from paddlemix.log import logger
from paddlemix.trainer.saving import STATE_FILE, list_checkpoints

RUN_CONFIG_FILE = "run_config.json"
# what a directory is recognised by comes last, so that half a result is never taken for a model
_LAST = (CONFIG_FILE, ADAPTER_FILE)
_OWN_FILES = ("*.safetensors", "*.json", "*.jsonl", "loss.png", "tokenizer.model", "checkpoint-*")


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
    if not config.do_train or config.overwrite_output_dir or not output_dir.is_dir() or not any(output_dir.iterdir()):
        return None
    checkpoints = list_checkpoints(output_dir)
    if not checkpoints:
        raise UserError(
            f"output_dir '{output_dir}' is not empty and holds no checkpoint to go on from; set overwrite_output_dir to "
            "true or choose another folder"
        )
    logger.info("going on from %s (set overwrite_output_dir to start anew)", checkpoints[-1])
    return checkpoints[-1]


def _check_writable(output_dir: Path) -> None:
    existing = output_dir
    while not existing.exists():
        existing = existing.parent
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"output_dir '{output_dir}' cannot be written: no permission in {existing}")


def clear_earlier_run(output_dir: Path) -> None:
    """Removes what an earlier run left, and only that, so that nothing of it is taken for this run's."""
    for pattern in _OWN_FILES:
        for path in output_dir.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def publish(output_dir: Path, write: Callable[[Path], None]) -> None:
    """Writes a result beside `output_dir` and moves its files in when all are complete.

    Args:
        write: writes the files into the directory it is given.

    Raises:
        UserError: they cannot be written; `output_dir` is as it was.
    """
    output_dir = Path(os.path.abspath(output_dir))
    with writing(output_dir):
        output_dir.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{output_dir.name}.", dir=output_dir.parent))
        try:
            write(temporary)
            for name in _LAST:
                (output_dir / name).unlink(missing_ok=True)
            for path in sorted(temporary.iterdir(), key=lambda path: path.name in _LAST):
                os.replace(path, output_dir / path.name)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
