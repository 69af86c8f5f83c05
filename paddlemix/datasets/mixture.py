"""The samples of a run: all entries of the JSON's `dataset` key one after the other, read and encoded on demand.

Only numbers are held for each record, so a million of them cost little memory.  Knows no model and no trainer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from paddlemix.cache import cache_key
from paddlemix.datasets.data_parts import DataPart, ProcessorFor, check_bad_share, open_parts
from paddlemix.datasets.data_settings import DataSettings
from paddlemix.datasets.forms.parse import parse_record
from paddlemix.datasets.image_check import ImageCheck
from paddlemix.datasets.images.decode import load_image
from paddlemix.datasets.images.sizes import ImageSizes
from paddlemix.datasets.images.sources import files_of
from paddlemix.datasets.images.tower_features import FeatureStore, encode_with_features
from paddlemix.datasets.records.record_file import RecordFile
from paddlemix.errors import UserError
from paddlemix.log import logger
from paddlemix.outputs import Pictures
from paddlemix.processors.llava import LlavaProcessor, TooLongError
from paddlemix.sample import Example, Row, Sample, Skip

_CHECKED_SAMPLES = 10_000  # about a second


class SampleDataset:
    """The samples of all entries, one after the other.

    Args:
        entries: items of `dataset["train"]` or `dataset["eval"]`: `data_files` (path, path#N or a list of them),
            optional `name`, `image_root`, `chat_template`, `split` and `weight`.
        processor_for: returns the processor for an entry's `chat_template` (None: the run's own).
        settings: see `DataSettings`.

    Attributes:
        features: where the vision tower's outputs are kept between epochs; None decodes every image each time.
        unreadable: (source, reason) of every record that was left out at once, because it is not a sample in itself.

    Raises:
        MissingFileError, UserError: a file cannot be used; or a record, where bad samples are errors or too many.  The
            message names file and record.
    """

    def __init__(
        self, entries: Sequence[Mapping[str, Any]], processor_for: ProcessorFor, settings: DataSettings | None = None
    ) -> None:
        self.settings = settings or DataSettings()
        self.features: FeatureStore | None = None
        # shared by measuring, checking and encoding: one header is read once
        self._sizes = ImageSizes(self.settings.images)
        self._parts = [part for entry in entries for part in open_parts(entry, processor_for, self.settings)]
        self.unreadable = [item for part in self._parts for item in part.unreadable]
        self._ends = np.cumsum([len(part.rows) for part in self._parts], dtype=np.int64)
        if self.unreadable:
            self._report_unreadable()

    def _report_unreadable(self) -> None:
        # counted against all chosen records, as `max_bad_fraction` says, not against those that are left
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

    def _place(self, index: int) -> tuple[DataPart, int]:
        """The part that holds a sample, and the record's number in its file."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        # "right": an index equal to a part's end is the first sample of the next one that is not empty
        number = int(np.searchsorted(self._ends, index, side="right"))
        part = self._parts[number]
        return part, int(part.rows[index - (self._ends[number] - len(part.rows))])

    def sample(self, index: int) -> Sample:
        """The parsed record of a sample; no image is opened."""
        part, row = self._place(index)
        return parse_record(part.records[row], f"{part.records.path} record {row}", part.image_root, part.form)

    def image_files(self, index: int) -> list[str]:
        """The files of a sample's images, see `sources.files_of`; empty where the sample cannot be read."""
        try:
            return files_of(self.sample(index).images)
        except UserError:
            return []

    def pictures(self) -> Iterator[Pictures]:
        """The pictures that each data file names, those of records that are not chosen included."""
        return (part.records.pictures(part.image_root) for part in self._parts)

    @property
    def record_files(self) -> list[RecordFile]:
        """The data files in order, one for each time that a file is named."""
        return [part.records for part in self._parts]

    def processor_of(self, index: int) -> LlavaProcessor:
        """The processor that encodes a sample: its entry's template may differ from the run's."""
        return self._place(index)[0].processor

    @property
    def files(self) -> list[tuple[str, int]]:
        """The data files in order, each with the number of samples chosen from it."""
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
        # stored features -> no image is decoded where the store has all of them
        # otherwise       -> decoded and cut into tiles
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
        """The sample as one that is left out.

        Raises:
            UserError: `error` itself, where the settings do not leave such samples out.
        """
        # too long, and on_too_long is "skip" -> left out, whatever on_bad_sample says
        # anything wrong, on_bad_sample "skip" -> left out
        # otherwise                            -> the error stops the run
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
        missing, not an image or cut short.

        Up to 10,000 samples, evenly spread, are checked; local images among them are decoded up to 128 MiB of files, of
        the others the header is read.  `paddlemix check-data` checks everything.

        Raises:
            MissingFileError, UserError: names file, record and image; or too many of the samples are bad.
        """
        chosen = np.unique(np.linspace(0, len(self) - 1, min(len(self), _CHECKED_SAMPLES)).astype(np.int64))
        images, bad = ImageCheck(self._sizes, self.settings.images), []
        for index in map(int, chosen):
            try:
                self._check_sample(index, images)
            except UserError as error:
                bad.append(self._skip(index, error).reason)
        images.finish()
        if bad:
            check_bad_share(len(bad), len(chosen), self.settings.max_bad_fraction, bad[0])

    def _check_sample(self, index: int, images: ImageCheck) -> None:
        sample = self.sample(index)
        with _errors_of(sample.source):
            self._place(index)[0].processor.check(sample)
            for path in sample.images:
                images.check(path)


@contextmanager
def _errors_of(source: str) -> Iterator[None]:
    """Puts a sample's source before the errors of a block."""
    try:
        yield
    except UserError as error:
        if str(error).startswith(f"{source}: "):
            raise
        raise type(error)(f"{source}: {error}") from error
