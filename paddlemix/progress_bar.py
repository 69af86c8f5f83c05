"""Progress of long work: a bar on a terminal, elsewhere a line of the log once a minute; one rule for all commands.

    with ProgressBar("answers", total=90) as bar:
        bar.update(8)

A training run's bar shows more and is the run's own (`trainer/callbacks/progress.py`).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import TypeVar

from tqdm import tqdm

from paddlemix.log import logger, process_rank

Item = TypeVar("Item")

_LINE_SECONDS = 60.0  # between two lines of a log
_now = time.monotonic


class ProgressBar:
    """The progress of a piece of work; a context manager that closes it.

    Args:
        title: what is done, e.g. "answers".
        total: amount of work; None while unknown.
        initial: amount done before.
        unit: what is counted, "B" for bytes; "" to name none.
        silent: whether to show nothing; processes other than the first never show anything.
        delay: seconds before a bar appears.

    Attributes:
        total: may be set later.
    """

    def __init__(
        self,
        title: str,
        total: int | None = None,
        initial: int = 0,
        unit: str = "",
        silent: bool = False,
        delay: float = 0.0,
    ) -> None:
        self._title, self._silent = title, silent or process_rank() != 0
        self._first, self._unit = initial, unit
        scaled = {"unit": unit, "unit_scale": unit == "B", "unit_divisor": 1024 if unit == "B" else 1000}
        self._bar = tqdm(
            desc=title, total=total, initial=initial, delay=delay, disable=self._silent or not _is_terminal(), **scaled
        )
        self._started = self._last_line = _now()
        self.total, self._done = total, initial

    @property
    def done(self) -> int:
        """Amount done so far."""
        return self._done

    def update(self, count: int = 1) -> None:
        """Adds to the amount done."""
        self._done += count
        # Hubs report the size of a download only with its first bytes, so the total may come after the bar.
        self._bar.total = self.total
        self._bar.update(count)
        # A log file gets a line now and then: a bar would leave thousands of carriage returns in it.
        if self._bar.disable and not self._silent and _now() - self._last_line >= _LINE_SECONDS:
            self._last_line = _now()
            logger.info("%s: %s", self._title, self._line())

    def _line(self) -> str:
        """E.g. "450 of 9,000 (5.0%), 2.1 per second, about 68 min left"."""
        seconds = max(self._last_line - self._started, 1e-9)
        # What an earlier start did took none of these seconds.
        rate = (self._done - self._first) / seconds
        parts = [self._amount(self._done)]
        if self.total:
            parts[0] += f" of {self._amount(self.total)} ({self._done / self.total:.1%})"
        parts.append(f"{self._amount(rate)} per second")
        if self.total and rate > 0:
            parts.append(f"about {(self.total - self._done) / rate / 60:.0f} min left")
        return ", ".join(parts)

    def _amount(self, number: float) -> str:
        if self._unit == "B":
            return f"{tqdm.format_sizeof(number, 'B', 1024)}"
        return f"{number:,.1f}" if isinstance(number, float) else f"{number:,}{self._unit}"

    def over(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items one by one, each counted when the next one is asked for."""
        for item in items:
            yield item
            self.update(1)  # after the caller is done with it, so that the rate is that of the work

    def close(self) -> None:
        """Closes it; a bar stays on the screen."""
        self._bar.close()

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _is_terminal() -> bool:
    # Without a console (pythonw, some services) there is no stderr at all.
    return sys.stderr is not None and sys.stderr.isatty()
