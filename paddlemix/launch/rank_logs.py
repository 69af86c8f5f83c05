"""One log per process, to which every start of the run adds."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

from paddlemix.errors import UserError, fit_to_show

FOLDER = Path("logs", "ranks")  # in a run's output_dir
_NAME = "workerlog.{rank}"  # as Paddle's launcher names them
_BEGIN = "===== "  # of the line that begins each start
_TAIL = 1 << 16  # bytes


def holds_rank_logs_alone(path: Path) -> bool:
    """Whether something in a run's output_dir is the folder of these logs, with nothing else in it."""
    return path.name == FOLDER.parts[0] and path.is_dir() and [one.name for one in path.iterdir()] == [FOLDER.name]


class RankLogs:
    """The logs of a run.

    Args:
        folder: is made.

    Raises:
        UserError: it cannot be made.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        # What there was not before, outermost first.
        self._made = [path for path in reversed((self.folder, *self.folder.parents)) if not path.exists()]
        self._new: list[Path] = []
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"the folder of logs '{folder}' cannot be made ({error.strerror}); name another with --log-dir"
            ) from error

    def begin(self, rank: int, title: str) -> Path:
        """The log of a process, with a first line about this start.

        Raises:
            UserError: it cannot be written.
        """
        path = self.folder / _NAME.format(rank=rank)
        try:
            # Again: another launcher that gave up, perhaps on another machine, may have taken it for its own.
            self.folder.mkdir(parents=True, exist_ok=True)
            # The system says who has made the file: another launcher may be started for the same folder at this moment.
            with contextlib.suppress(FileExistsError), open(path, "xb"):
                self._new.append(path)
            with open(path, "a", encoding="utf-8") as file:
                file.write(f"{_BEGIN}{time.strftime('%Y-%m-%d %H:%M:%S')} rank {rank}: {title}\n")
        except OSError as error:
            raise UserError(f"log '{path}' cannot be written ({error.strerror}); name another --log-dir") from error
        return path

    def remove_new(self) -> None:
        """Removes what this run alone has made, for a run that never began: bad input leaves nothing behind."""
        for path in self._new:
            with contextlib.suppress(OSError):
                # Another launcher may have added its start meanwhile, and its processes go on.
                if path.read_bytes().count(b"\n" + _BEGIN.encode()) == 0:
                    path.unlink()
        self.remove_empty()

    def remove_empty(self) -> None:
        """Removes those folders that this run has made and that hold nothing: no process was started, for example."""
        for path in reversed(self._made):
            # Whatever else is in a folder keeps it.
            with contextlib.suppress(OSError):
                path.rmdir()


def end_of_log(path: str, lines: int = 15) -> list[str]:
    """The last lines that a process of the last start wrote; none if the log cannot be read."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return []
    written = text.rpartition("\n" + _BEGIN)[2] if "\n" + _BEGIN in text else text
    found = [line for line in fit_to_show(written).splitlines() if line.strip()]
    return found[1:][-lines:] if text != written or text.startswith(_BEGIN) else found[-lines:]
