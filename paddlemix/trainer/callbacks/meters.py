"""The numbers of a report that PaddleNLP's lacks: speed, shares of image tokens and padding, gradient norm, memory.

It knows neither bar nor file: `callbacks.Progress` shows and writes them, trackers get the same.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from paddlemix.device import peak_memory_bytes
from paddlemix.trainer.batches.dataloader import PositionCounts


@dataclass(frozen=True, kw_only=True)
class Meters:
    """Where the numbers come from.

    Args:
        tokens_seen: tokens trained on so far by all processes, padding not counted.
        positions: what the positions of all processes held so far.
        take_norm: norm of the last step's gradient, None where it is not known.
    """

    tokens_seen: Callable[[], float]
    positions: Callable[[], PositionCounts]
    take_norm: Callable[[], float | None]


class StepReport:
    """Measures from one report to the next.

    Args:
        meters: see there.
        device: whose memory is reported.
    """

    KEYS = ("grad_norm", "tokens_per_second", "image_token_share", "padding_share", "memory_gib", "eta_seconds")

    def __init__(self, meters: Meters, device: str) -> None:
        self._meters, self._device = meters, device
        self._tokens, self._positions = 0.0, PositionCounts()
        self._last = self._begun = time.monotonic()
        self._paused = 0.0
        self._first_step = self._last_step = 0

    def start(self, step: int, last_step: int) -> None:
        """Begins to measure.

        Args:
            step: optimiser steps done already, above 0 in a resumed run.
            last_step: those of the whole run.
        """
        self._first_step, self._last_step = step, last_step
        self._begun = time.monotonic()
        self._mark()

    def _mark(self) -> None:
        self._tokens, self._positions = float(self._meters.tokens_seen()), replace(self._meters.positions())
        self._last, self._paused = time.monotonic(), 0.0

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """What is done inside, evaluation or saving, does not lower the speed of training."""
        begun = time.monotonic()
        try:
            yield
        finally:
            self._paused += time.monotonic() - begun

    def values(self, step: int) -> dict[str, float]:
        """The numbers since the report before.

        Args:
            step: optimiser steps done.

        Returns:
            `grad_norm` (before clipping, of the last step; left out where it is not known), `tokens_per_second` (of all
            processes, without padding and pauses), `image_token_share` and `padding_share` (0..1, of all processes),
            `memory_gib` (peak of this process), `eta_seconds`.
        """
        now = time.monotonic()
        # Pauses are left out of the speed but not of the time left: evaluations and checkpoints will come again.
        seconds = max(now - self._last - self._paused, 1e-9)
        tokens, positions = float(self._meters.tokens_seen()), self._meters.positions().since(self._positions)
        # Taken even where it is not shown, so that the next report does not get an old one.
        norm = self._meters.take_norm()
        pace = (now - self._begun) / max(step - self._first_step, 1)
        # Six digits are what float32 holds; more would be noise in a JSON file.
        values = {} if norm is None else {"grad_norm": float(f"{norm:.6g}")}
        values |= {
            "tokens_per_second": round((tokens - self._tokens) / seconds, 1),
            "image_token_share": round(positions.visual_share, 4),
            "padding_share": round(positions.padding_share, 4),
            "memory_gib": round(peak_memory_bytes(self._device) / 2**30, 3),
            "eta_seconds": round(pace * max(self._last_step - step, 0), 1),
        }
        self._mark()
        return values
