"""Data sets of a run: entries of the JSON's `dataset` key -> rows, read and encoded on demand.

Nothing but numbers is held for each record, so a million of them cost no memory.  Knows no model and no trainer.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from paddlemix.cache import cache_key
from paddlemix.datasets.forms.parse import parse_record
from paddlemix.datasets.images.decode import ImageSettings, files_of, is_data_uri, is_url, load_image
from paddlemix.datasets.images.sizes import ImageSizes
from paddlemix.datasets.images.tower_features import FeatureStore, encode_with_features
from paddlemix.datasets.record_selection import select_rows, split_count
from paddlemix.datasets.records.record_file import DOWNLOADS, RecordFile, open_records
from paddlemix.errors import UserError
from paddlemix.log import logger
from paddlemix.outputs import Pictures
from paddlemix.processors.llava import LlavaProcessor, TooLongError
from paddlemix.sample import Example, Row, Sample, Skip

ProcessorFor = Callable[[str | None], LlavaProcessor]
_CHECKED_SAMPLES = 10_000  # about a second
_DECODED_BYTES = 128 * 1024**2  # a few seconds of decoding, before anything of the run is written


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """How samples are read.

    Args:
        max_length: most tokens of an example, visual ones included; None for no limit.
        on_too_long: "truncate_turns" drops the last question-answer pairs, "skip" the sample, "error" stops.
        on_bad_sample: "error" stops, "skip" leaves out what cannot be read.
        max_bad_fraction: most bad samples, 0..1 of all, that "skip" accepts.
        image_root: folder of images for entries that name none.
        images: limits on files and downloads.
        seed: of the draws that `#N` and `weight` make.
    """

    max_length: int | None = None
    on_too_long: str = "truncate_turns"
    on_bad_sample: str = "error"
    max_bad_fraction: float = 0.01
    image_root: str | None = None
    images: ImageSettings = field(default_factory=ImageSettings)
    seed: int = 0


@dataclass(frozen=True)
class _Part:
    """The chosen records of one file."""

    records: RecordFile
    rows: np.ndarray
    form: str | None
    image_root: str | None
    processor: LlavaProcessor


class SampleDataset:
    """The samples of all entries, one after the other.

    Args:
        entries: items of `dataset["train"]` or `dataset["eval"]`: `data_files` (path, path#N or a list of them),
            optional `name`, `image_root`, `chat_template`, `split` and `weight`.
        processor_for: gives the processor for an entry's `chat_template` (None: the run's own).
        settings: see `DataSettings`.

    Attributes:
        features: where the vision tower's outputs are kept between epochs; None decodes every image each time.
        unreadable: (source, reason) of every record that was left out at once, because it is no sample in itself.

    Raises:
        MissingFileError, UserError: a file cannot be used; or a record, where bad samples are errors or too many.  The
            message names file and record.
    """

    def __init__(
        self, entries: Sequence[Mapping[str, Any]], processor_for: ProcessorFor, settings: DataSettings | None = None
    ) -> None:
        self.settings = settings or DataSettings()
        self.unreadable: list[tuple[str, str]] = []
        self.features: FeatureStore | None = None
        self._sizes = ImageSizes(self.settings.images)
        self._parts = [part for entry in entries for part in self._open(entry, processor_for)]
        self._ends = np.cumsum([len(part.rows) for part in self._parts], dtype=np.int64)
        if self.unreadable:
            self._report_unreadable()

    def _open(self, entry: Mapping[str, Any], processor_for: ProcessorFor) -> Iterator[_Part]:
        processor = processor_for(entry.get("chat_template"))
        files, form, images = entry["data_files"], entry.get("name"), self.settings.images
        remote = replace(
            DOWNLOADS,
            retries=images.retries,
            allow_local_network=images.allow_local_network,
            offline=images.offline,
        )
        for name in [files] if isinstance(files, str) else files:
            path, count = split_count(name)
            records = open_records(path, form, remote)
            problems = records.problems()
            if problems and self.settings.on_bad_sample == "error":
                others = f" (and {len(problems) - 1} more bad records in this file)" if len(problems) > 1 else ""
                raise UserError(f"{problems[0][1]}{others}; `paddlemix check-data` lists and removes bad records")
            rows = select_rows(len(records), entry, count, self.settings.seed)
            chosen = set(rows.tolist()) if problems else set()
            self.unreadable += [(f"{records.path} record {row}", reason) for row, reason in problems if row in chosen]
            _warn_of_doubts(records, rows)
            root = entry.get("image_root") or self.settings.image_root
            yield _Part(records, rows[records.words[rows] != 0], form, root, processor)

    def _report_unreadable(self) -> None:
        total = len(self) + len(self.unreadable)
        check_bad_share(len(self.unreadable), total, self.settings.max_bad_fraction, self.unreadable[0][1])
        logger.warning(
            "%d of %d records are left out, they cannot be read; the first: %s",
            len(self.unreadable),
            total,
            self.unreadable[0][1],
        )

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def _place(self, index: int) -> tuple[_Part, int]:
        """The part that holds a sample, and the record's number in its file."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = int(np.searchsorted(self._ends, index, side="right"))
        part = self._parts[number]
        return part, int(part.rows[index - (self._ends[number] - len(part.rows))])

    def sample(self, index: int) -> Sample:
        """The parsed record of a sample; no image is opened."""
        part, row = self._place(index)
        return parse_record(part.records[row], f"{part.records.path} record {row}", part.image_root, part.form)

    def image_files(self, index: int) -> list[str]:
        """The files of a sample's images, see `images.files_of`; none where it cannot be read."""
        try:
            return files_of(self.sample(index).images)
        except UserError:
            return []

    def pictures(self) -> Iterator[Pictures]:
        """The pictures that each data file names; those of records that are not taken too."""
        return (part.records.pictures(part.image_root) for part in self._parts)

    @property
    def record_files(self) -> list[RecordFile]:
        """The data files in order, one for each time that a file is named."""
        return [part.records for part in self._parts]

    def processor_of(self, index: int) -> LlavaProcessor:
        """What encodes a sample: its entry's template may be another than the run's."""
        return self._place(index)[0].processor

    @property
    def files(self) -> list[tuple[str, int]]:
        """The data files in order, each with the samples that are taken of it."""
        return [(part.records.path, len(part.rows)) for part in self._parts]

    def __getitem__(self, index: int) -> Row:
        """Opens the images of a sample and encodes it.

        Returns:
            A row of one example, or of none where the sample is left out, with the reason.

        Raises:
            MissingFileError, UserError: the sample cannot be used; names file, record and image.
        """
        try:
            sample = self.sample(index)
            example = self._encode(sample, self._place(index)[0].processor)
        except UserError as error:
            return Row((), (self._skip(index, error),))
        return Row((example,))

    def _encode(self, sample: Sample, processor: LlavaProcessor) -> Example:
        if self.features is not None:
            with _errors_of(sample.source):
                return encode_with_features(sample, processor, self.features, self._sizes, self.settings)
        with _errors_of(sample.source):
            images = [load_image(path, self.settings.images) for path in sample.images]
        return processor.encode(sample, images, self.settings.max_length, self.settings.on_too_long)

    def measure(self, index: int) -> tuple[int, int]:
        """Length of a sample from its text and its images' headers.

        Returns:
            Tokens of the example, and how many of them are visual; (0, 0) where the sample is left out.

        Raises:
            MissingFileError, UserError: as `__getitem__`.
        """
        try:
            sample = self.sample(index)
            with _errors_of(sample.source):
                sizes = [self._sizes.get(path) for path in sample.images]
            processor = self._place(index)[0].processor
            return processor.measure(sample, sizes, self.settings.max_length, self.settings.on_too_long)
        except UserError as error:
            self._skip(index, error)
            return 0, 0

    def _skip(self, index: int, error: UserError) -> Skip:
        too_long = isinstance(error, TooLongError)
        allowed = self.settings.on_bad_sample == "skip" or (too_long and self.settings.on_too_long == "skip")
        if not allowed:
            raise error
        return Skip(index, str(error), too_long)

    @property
    def words(self) -> np.ndarray:
        """int32 [n]: words of each sample, see `order.count_words`; negative where there is no image."""
        return np.concatenate([part.records.words[part.rows] for part in self._parts])

    @property
    def fingerprint(self) -> str:
        """Differs where a file, the selection, the processing or a limit differs."""
        parts = [
            (
                *(part.records.fingerprint, cache_key(part.rows.tobytes()), part.form, part.image_root),
                *(part.processor.to_dict(), part.processor.tokenizer.fingerprint),
            )
            for part in self._parts
        ]
        limits = (self.settings.max_length, self.settings.on_too_long, self.settings.on_bad_sample)
        return cache_key(parts, limits, self.settings.images)

    def check(self) -> None:
        """Looks for what would stop a run later: a conversation that its template cannot write, an image that is
        missing, no image or cut short.

        Up to 10,000 samples, evenly spread, are looked at; local images among them are decoded up to 128 MiB of files,
        of the others the header is read.  `paddlemix check-data` looks at everything.

        Raises:
            MissingFileError, UserError: names file, record and image; or too many of the samples are bad.
        """
        chosen = np.unique(np.linspace(0, len(self) - 1, min(len(self), _CHECKED_SAMPLES)).astype(np.int64))
        budget, bad = _DecodeBudget(self._sizes, self.settings.images), []
        for index in map(int, chosen):
            try:
                self._check_sample(index, budget)
            except UserError as error:
                bad.append(self._skip(index, error).reason)
        budget.finish()
        if bad:
            check_bad_share(len(bad), len(chosen), self.settings.max_bad_fraction, bad[0])

    def _check_sample(self, index: int, budget: _DecodeBudget) -> None:
        sample = self.sample(index)
        processor = self._place(index)[0].processor
        with _errors_of(sample.source):
            processor.check(sample)
            for path in sample.images:
                budget.check(path)


class _DecodeBudget:
    """Checks images: each once, whole while the budget lasts, by its header afterwards."""

    def __init__(self, sizes: ImageSizes, settings: ImageSettings) -> None:
        self._sizes, self._settings = sizes, settings
        self._known: set[str] = set()
        self._decoded: list[str] = []
        self._bytes = 0

    def check(self, path: str) -> None:
        if path in self._known or is_url(path):
            return
        self._sizes.get(path)
        self._known.add(path)
        if is_data_uri(path):
            return
        if self._bytes < _DECODED_BYTES and not self._sizes.is_decoded(path):
            self._bytes += os.path.getsize(path)
            load_image(path, self._settings)
            self._decoded.append(path)

    def finish(self) -> None:
        self._sizes.mark_decoded(self._decoded)


def _warn_of_doubts(records: RecordFile, rows: np.ndarray) -> None:
    """Says once how many chosen records may not mean what they are taken for."""
    doubts = records.doubts()
    chosen = set(rows.tolist()) if doubts else set()
    found = [doubt for row, doubt in doubts if row in chosen]
    if found:
        advice = "`paddlemix check-data` lists them"
        logger.warning("%d of %d records are doubtful, %s; the first: %s", len(found), len(chosen), advice, found[0])


@contextmanager
def _errors_of(source: str) -> Iterator[None]:
    """Puts a sample's source before the errors of a block."""
    try:
        yield
    except UserError as error:
        if str(error).startswith(f"{source}: "):
            raise
        raise type(error)(f"{source}: {error}") from error


def check_bad_share(bad: int, total: int, most: float, first: str) -> None:
    """Stops a run that would leave out too much.

    Args:
        bad: samples that cannot be used, of `total`.
        most: `max_bad_fraction`, 0..1.
        first: what is wrong with the first of them.

    Raises:
        UserError: there are more.
    """
    if bad > most * total:
        raise UserError(
            f"{bad} of {total} samples cannot be used, max_bad_fraction {most:g} allows {int(most * total)}; "
            f"the first: {first}; `paddlemix check-data` lists them all"
        )
