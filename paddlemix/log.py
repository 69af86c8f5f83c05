"""Log output: one logger that writes on rank 0 only, and the writer of `metrics.jsonl`.

Knows nothing of what is logged.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

from paddlemix.errors import MissingFileError, UserError, without_secrets


def process_rank() -> int:
    """Rank of this process as `paddle.distributed.launch` sets it, 0 when started alone."""
    return int(os.environ.get("PADDLE_TRAINER_ID", "0"))


class _RankZero(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        # Errors of any rank: the rank that fails is often the only one that knows why.
        return process_rank() == 0 or record.levelno >= logging.ERROR


class _Formatter(logging.Formatter):
    """Hides passwords and tokens of addresses."""

    def format(self, record: logging.LogRecord) -> str:
        return without_secrets(super().format(record))


class _CurrentStderr(logging.StreamHandler):
    """Writes to whatever `sys.stderr` is at the time, so that a redirected or replaced stream is honoured."""

    @property
    def stream(self) -> Any:
        return sys.stderr

    @stream.setter
    def stream(self, value: Any) -> None:
        pass  # StreamHandler assigns the stream of its start, which is not to be kept


def _build_logger() -> logging.Logger:
    built = logging.getLogger("paddlemix")
    # The logger outlives this module where it is loaded twice: a second handler would print every line twice.
    if not built.handlers:
        handler = _CurrentStderr()
        handler.setFormatter(_Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
        handler.addFilter(_RankZero())
        built.addHandler(handler)
        built.setLevel(logging.INFO)
        # PaddleNLP configures the root logger; without this every line would appear twice.
        built.propagate = False
    return built


logger = _build_logger()


class MetricsWriter:
    """Appends one JSON object per logged step to a file.

    Args:
        path: the file, usually `<output_dir>/metrics.jsonl`; its folder is made when the first line is written.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def write(self, values: dict[str, Any]) -> None:
        """Adds one line.  Each line is written in one call, so a killed run leaves whole lines.

        Raises:
            UserError: it cannot be written.
        """
        line = json.dumps(values, ensure_ascii=False) + "\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(line)
        except OSError as error:
            raise self._failed(error) from error

    def truncate_after(self, step: int) -> None:
        """Drops the lines of steps later than `step`: a resumed run will write them again.

        Raises:
            UserError: it cannot be written.
        """
        if not self.path.is_file():
            return
        # A line without a step belongs to the run as a whole and is not written again.
        kept = [line for line in _read_lines(self.path) if line.get("step", 0) <= step]
        # Written beside and renamed: a kill in between leaves the old lines, which the next resume cuts again.
        temporary = self.path.with_suffix(".tmp")
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept)
        try:
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, self.path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise self._failed(error) from error

    def _failed(self, error: OSError) -> UserError:
        return UserError(f"{self.path} cannot be written: {error.strerror}; free some space")


def _read_lines(path: Path) -> list[dict[str, Any]]:
    lines = []
    for line in path.read_bytes().split(b"\n"):
        try:
            values = json.loads(line.decode("utf-8"))
        except ValueError:  # the last line of a run that was killed while writing, perhaps within a character
            continue
        lines += [values] if isinstance(values, dict) else []
    return lines


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The objects of a `metrics.jsonl`, in order; a half-written last line is skipped.

    Raises:
        MissingFileError: there is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingFileError(f"metrics file '{path}' does not exist; a run writes it into its output_dir")
    return _read_lines(path)
