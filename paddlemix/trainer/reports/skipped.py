"""The record of what training left out: counted and named in `skipped.jsonl`; too much of it ends the run."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from paddlemix.datasets.data_parts import check_bad_share
from paddlemix.errors import UserError
from paddlemix.log import logger, read_metrics
from paddlemix.parallel.collectives import from_first, gathered_objects, together
from paddlemix.parallel.layout import ALONE, Layout
from paddlemix.sample import Skip
from paddlemix.trainer.run_data import TrainingRows

SKIPPED_FILE = "skipped.jsonl"


class SkipLog:
    """Collects skipped samples, each once however many epochs and processes meet it.

    With several processes all know the same: what one has met waits until all share it.

    Args:
        output_dir: the first process writes `skipped.jsonl` here, one object per sample: `index` (its number in the
            data set, null for a record that is not a sample), `reason`, `too_long`.
        data: what is trained on; what was left out from the start is written first.
        layout: which process this is.

    Attributes:
        waiting: index -> a sample that this process has met and not shared.
    """

    def __init__(self, output_dir: Path, data: TrainingRows, layout: Layout = ALONE) -> None:
        samples = data.samples
        self.path, self._left_out, self._unreadable = output_dir / SKIPPED_FILE, data.left_out, samples.unreadable
        self._layout = layout
        # Unreadable records count as bad, so they count in the total too.
        self._total = len(samples) + len(samples.unreadable)
        self._most = samples.settings.max_bad_fraction
        self._bad, self._worst = len(samples.unreadable), ""
        self._known: set[int] = set()
        self.waiting: dict[int, Skip] = {}

    @property
    def count(self) -> int:
        """Samples left out so far by all processes, unreadable records among them."""
        return len(self._known) + len(self._unreadable)

    def start(self, resumed: bool) -> None:
        """Begins the file with what was left out from the start, or continues that of an earlier call.

        Raises:
            UserError: the file cannot be written; or see `check`.
        """
        goes_on = from_first(resumed and self.path.is_file())
        with together():
            lines = self._begin_file(goes_on) if self._layout.rank == 0 else []
        for line in from_first(lines):
            if line["index"] is not None:
                # Without this a resumed run would count the samples of its first epoch twice.
                self._known.add(line["index"])
                self._bad += not line["too_long"]
        if not goes_on:
            with together():  # the first process alone writes
                self._record(self._left_out)
            self.check()

    def _begin_file(self, goes_on: bool) -> list[dict[str, Any]]:
        """Makes the file ready; returns its lines where it goes on."""
        if goes_on:
            if not self.path.read_bytes().endswith(b"\n"):
                self._append("\n")  # a killed run left half a line, which must not spoil the next one
            return list(read_metrics(self.path))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.unlink(missing_ok=True)
        self._write({"index": None, "reason": reason, "too_long": False} for _, reason in self._unreadable)
        return []

    def add(self, skipped: Iterable[Skip]) -> None:
        """Records the skipped samples of a batch; with several processes they wait.

        Raises:
            UserError: see `check`; or the file cannot be written.
        """
        new = {skip.index: skip for skip in skipped if skip.index not in self._known}
        if self._layout.several:
            self.waiting |= new
        else:
            self._record(new.values())
            self.check()

    def share(self) -> None:
        """Records what waits on any process; all of them call this together.

        Raises:
            UserError: the file cannot be written; on the first process alone.
        """
        met = {skip.index: skip for own in gathered_objects(list(self.waiting.values())) for skip in own}
        self.waiting.clear()
        self._record(met.values())

    def check(self) -> None:
        """Ends a run that leaves out too much, on all processes alike.

        Raises:
            UserError: more samples than `max_bad_fraction` allows are bad.
        """
        if self._worst:
            check_bad_share(self._bad, self._total, self._most, self._worst)

    def _record(self, skipped: Iterable[Skip]) -> None:
        lines = []
        for skip in skipped:
            if skip.index in self._known:
                continue
            self._known.add(skip.index)
            lines.append({"index": skip.index, "reason": skip.reason, "too_long": skip.too_long})
            # A few in the log to notice, all of them in the file.
            if len(self._known) <= 3:
                logger.warning("left out: %s (all are named in %s)", skip.reason, self.path)
            # A sample above max_length is not damaged and does not count towards `max_bad_fraction`.
            if not skip.too_long:
                self._bad, self._worst = self._bad + 1, skip.reason
        if self._layout.rank == 0:
            self._write(lines)

    def _write(self, lines: Iterable[dict[str, object]]) -> None:
        self._append("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))

    def _append(self, text: str) -> None:
        if not text:
            return
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise UserError(f"{self.path} cannot be written: {error.strerror}; free some space") from error
