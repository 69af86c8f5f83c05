"""One record after the other, checked as a run would use it; what one process of `check.py` does.

Knows no other process and no report.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from paddlemix.datasets.forms.annotations import FORM_READERS
from paddlemix.datasets.forms.dialects import DIALECTS
from paddlemix.datasets.forms.image_markers import unread_picture
from paddlemix.datasets.forms.parse import parse_record
from paddlemix.datasets.images.decode import load_image
from paddlemix.datasets.images.sizes import ImageSizes
from paddlemix.datasets.images.sources import ImageSettings
from paddlemix.datasets.records.record_file import RecordFile
from paddlemix.errors import UserError, without_secrets
from paddlemix.processors.llava import LlavaProcessor, TooLongError
from paddlemix.sample import Box, Sample

_ANY_SIZE = (336, 336)  # where the size decides nothing


@dataclass(frozen=True, kw_only=True)
class DataFile:
    """A data file and how a run reads it.

    Args:
        path: of the file, or its address.
        form: name of its entry, see `parse.parse_record`; None to recognise each record.
        image_root: folder that relative image paths start from.
        processor: writes and measures the samples; None to check records and images alone.
    """

    path: str
    form: str | None = None
    image_root: str | None = None
    processor: LlavaProcessor | None = None

    def source(self, row: int) -> str:
        """How messages name a record of the file."""
        return f"{without_secrets(self.path)} record {row}"


@dataclass(frozen=True, kw_only=True)
class CheckSettings:
    """What is checked.

    Args:
        images: limits on files and downloads.
        open_images: False to leave images alone; lengths are then known where they do not depend on an image's size.
        max_length: most tokens of a sample; None for no limit.
        on_too_long: the run's policy, "truncate_turns", "skip" or "error".
        limit: first records of each file to check; None for all.
        workers: processes; below 2 all is done in this one.
    """

    images: ImageSettings = field(default_factory=ImageSettings)
    open_images: bool = True
    max_length: int | None = None
    on_too_long: str = "truncate_turns"
    limit: int | None = None
    workers: int = 1


@dataclass
class Findings:
    """About a stretch of records of one file.

    Args:
        hashes: uint64 [records], equal for records that are equal; 0 where a record could not be read.
        lengths: int32 [measured, 2], tokens and visual tokens of the good records, after the policy.
        faults: (row, message without its source) of the bad ones.
        doubts: the same of good ones that may not mean what they are taken for, see `unread_picture`.
        forms, too_long, skipped: see `check.CheckReport`.
    """

    hashes: np.ndarray
    lengths: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), dtype=np.int32))
    faults: list[tuple[int, str]] = field(default_factory=list)
    doubts: list[tuple[int, str]] = field(default_factory=list)
    forms: Counter[str] = field(default_factory=Counter)
    too_long: int = 0
    skipped: int = 0


class RecordChecker:
    """Checks stretches of records.

    Args:
        opened: each of `files`; None for one that cannot be read.
        settings: see `CheckSettings`.
    """

    def __init__(self, opened: Sequence[RecordFile | None], files: Sequence[DataFile], settings: CheckSettings) -> None:
        self._opened, self._files, self._settings = opened, files, settings
        self._sizes = ImageSizes(settings.images)
        self._broken: dict[str, str] = {}  # image -> its fault: it is not opened again
        self._decoded: set[str] = set()  # and not yet written to the index

    def check(self, number: int, start: int, stop: int) -> Findings:
        """Checks the records `start` to `stop` of the file `number`."""
        records, file = self._opened[number], self._files[number]
        assert records is not None
        found, lengths = Findings(np.zeros(stop - start, dtype=np.uint64)), []
        for row in range(start, stop):
            source = file.source(row)
            try:
                record = records[row]
                # before it is parsed: a bad record may be a duplicate, too
                found.hashes[row - start] = _hash(record, file.image_root)
                sample = parse_record(record, source, file.image_root, file.form)
                found.forms[form_of(record, file.form)] += 1
                measured = self._check_sample(sample, file.processor, found)
            except UserError as error:
                found.faults.append((row, _without_source(str(error), source)))
                continue
            doubt = unread_picture(sample.messages)
            if doubt is not None:
                found.doubts.append((row, doubt))
            if measured is not None:
                lengths.append(measured)
        found.lengths = np.array(lengths, dtype=np.int32).reshape(-1, 2)
        self._sizes.mark_decoded(self._decoded)
        self._decoded.clear()
        return found

    def _check_sample(
        self, sample: Sample, processor: LlavaProcessor | None, found: Findings
    ) -> tuple[int, int] | None:
        """Opens the images; returns tokens and visual tokens where they can be known and the sample is not skipped."""
        sizes = [self._size(path) for path in sample.images] if self._settings.open_images else None
        if processor is None:
            return None
        # "anyres" and boxes need the size; otherwise every image has the same number of tokens
        if sizes is None:
            if sample.images and (processor.image_spec.aspect_mode == "anyres" or _has_box(sample)):
                return None
            sizes = [_ANY_SIZE] * len(sample.images)
        # without a limit first: `too_long` counts what the policy has to act on
        whole, visual = processor.measure(sample, sizes)
        limit = self._settings.max_length
        if limit is None or whole <= limit:
            return whole, visual
        try:
            fitted = processor.measure(sample, sizes, limit, self._settings.on_too_long)
        except TooLongError:
            if self._settings.on_too_long != "skip":
                raise  # it is among the bad ones
            # counted apart from the bad ones: the run leaves it out by the user's own policy
            found.skipped += 1
            fitted = None
        found.too_long += 1
        return fitted

    def _size(self, path: str) -> tuple[int, int]:
        """Size of an image, pixels, after its pixels were read once."""
        # one broken image in a thousand records is decoded once, and named a thousand times
        if path in self._broken:
            raise UserError(self._broken[path])
        try:
            # nothing to remember it by: its name is its content
            if path.startswith("data:"):
                return load_image(path, self._settings.images).size
            size = self._sizes.get(path)
            if path not in self._decoded and not self._sizes.is_decoded(path):
                load_image(path, self._settings.images)
                self._decoded.add(path)
            return size
        except UserError as error:
            self._broken[path] = str(error)
            raise


def form_of(record: dict[str, Any], form: str | None = None) -> str:
    """How reports call the form of a record that can be read: "pairs", "from/value", "messages", "query"...

    Args:
        form: name of its data set, see `parse.parse_record`.
    """
    if form in FORM_READERS:
        return str(form)
    key = next((dialect.key for dialect in DIALECTS if record.get(dialect.key) is not None), "other")
    if key != "conversations":
        return key
    first = record[key][0]
    return "pairs" if isinstance(first, list) else "from/value" if "from" in first else "role/content"


def _has_box(sample: Sample) -> bool:
    return any(isinstance(piece, Box) for message in sample.messages for piece in message.content)


def _hash(record: dict[str, Any], image_root: str | None) -> int:
    """64 bits that are equal for equal records; never 0."""
    # equal records under two roots name different images
    text = json.dumps([record, image_root], sort_keys=True).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") or 1


def _without_source(message: str, source: str) -> str:
    """A message without the record's name, which the report has anyway; of a line that is not JSON the number stays."""
    if message.startswith(f"{source} (line "):
        return message.removeprefix(f"{source} (").replace("): ", ": ", 1)
    return message.removeprefix(f"{source}: ")
