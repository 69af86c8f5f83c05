"""The record of what training left out: counted and named in `skipped.jsonl`; too much of it ends the run."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from paddlemix.datasets.data_parts import check_bad_share
from paddlemix.errors import UserError
from paddlemix.log import logger, process_rank, read_metrics
from paddlemix.sample import Skip
from paddlemix.trainer.run_data import TrainingRows

SKIPPED_FILE = "skipped.jsonl"


class SkipLog:
    """Collects skipped samples, each once however many epochs meet it.

    Args:
        output_dir: `skipped.jsonl` is written here, one object per sample: `index` (its number in the data set, null
            for a record that is not a sample), `reason`, `too_long`; by other processes `skipped-rank<N>.jsonl`.
        data: what is trained on; what was left out from the start is written first.
    """

    def __init__(self, output_dir: Path, data: TrainingRows) -> None:
        rank, samples = process_rank(), data.samples
        # Left out before training by all processes alike, so one of them counts it.
        self._left_out = data.left_out if rank == 0 else ()
        self.path = output_dir / (SKIPPED_FILE if rank == 0 else f"skipped-rank{rank}.jsonl")
        # Unreadable records count as bad, so they count in the total too.
        self._total = len(samples) + len(samples.unreadable)
        self._most = samples.settings.max_bad_fraction
        self._bad = len(samples.unreadable)
        self._known: set[int] = set()
        self._unreadable = samples.unreadable if rank == 0 else []

    @property
    def count(self) -> int:
        """Samples left out so far, unreadable records among them."""
        return len(self._known) + len(self._unreadable)

    def start(self, resumed: bool) -> None:
        """Begins the file with the records that could not be read at all, or continues that of an earlier call."""
        if resumed and self.path.is_file():
            if not self.path.read_bytes().endswith(b"\n"):
                self._append("\n")  # a killed run left half a line, which must not spoil the next one
            for line in read_metrics(self.path):
                if line["index"] is not None:
                    # Without this a resumed run would count the samples of its first epoch twice.
                    self._known.add(line["index"])
                    self._bad += not line["too_long"]
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.unlink(missing_ok=True)
        self._write({"index": None, "reason": reason, "too_long": False} for _, reason in self._unreadable)
        self.add(self._left_out)

    def add(self, skipped: Iterable[Skip]) -> None:
        """Records the skipped samples of a batch.

        Raises:
            UserError: more samples than `max_bad_fraction` allows are bad; or the file cannot be written.
        """
        for skip in skipped:
            if skip.index in self._known:
                continue
            self._known.add(skip.index)
            self._write([{"index": skip.index, "reason": skip.reason, "too_long": skip.too_long}])
            # A few in the log to notice, all of them in the file.
            if len(self._known) <= 3:
                logger.warning("left out: %s (all are named in %s)", skip.reason, self.path)
            # A sample above max_length is not damaged and does not count towards `max_bad_fraction`.
            if not skip.too_long:
                self._bad += 1
                check_bad_share(self._bad, self._total, self._most, skip.reason)

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
