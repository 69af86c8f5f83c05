"""Data sets of a run: entries of the JSON's `dataset` key -> one list of Samples, encoded on demand.

Order is a function of (seed, epoch, rank) alone, so a run can stop and go on at any step.  Knows no model and no
trainer.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from paddlemix.datasets.formats import parse_record, read_records
from paddlemix.datasets.grouping import group_by_modality
from paddlemix.datasets.images import check_image, is_url, load_image
from paddlemix.errors import UserError
from paddlemix.processors.conversation import render
from paddlemix.processors.llava import LlavaProcessor
from paddlemix.sample import Example, Sample

_DECODED_BYTES = 128 * 1024**2  # a few seconds of decoding, before anything of the run is written
ProcessorFor = Callable[[str | None], LlavaProcessor]


class SampleDataset:
    """The samples of all entries, one after the other.

    Args:
        entries: items of `dataset["train"]` or `dataset["eval"]`: `data_files` (path or list), optional `image_root`
            and `chat_template`.
        processor_for: gives the processor for an entry's `chat_template` (None: the run's own).
        max_length: most tokens of an example.
        image_root: folder of images for entries that name none.

    Raises:
        MissingFileError, UserError: a file or a record cannot be used; the message names the file and the record.
    """

    def __init__(
        self,
        entries: Sequence[Mapping[str, Any]],
        processor_for: ProcessorFor,
        max_length: int | None = None,
        image_root: str | None = None,
    ) -> None:
        self.samples: list[Sample] = []
        self._processors: list[LlavaProcessor] = []
        self._max_length = max_length
        for entry in entries:
            processor = processor_for(entry.get("chat_template"))
            for sample in _entry_samples(entry, entry.get("image_root") or image_root):
                self.samples.append(sample)
                self._processors.append(processor)

    def __len__(self) -> int:
        return len(self.samples)

    def check(self) -> None:
        """Looks for what would stop a run later: a conversation that its template cannot write, an image that is
        missing, no image or cut short.  Local images are decoded up to `_DECODED_BYTES`; of later ones the header is
        read.

        Raises:
            MissingFileError, UserError: names file, record and image.
        """
        known: set[str] = set()
        decoded = 0
        for sample, processor in zip(self.samples, self._processors, strict=True):
            try:
                render(processor.template, sample.messages)
                for path in sample.images:
                    if path in known:
                        continue
                    known.add(path)
                    check_image(path)
                    if not is_url(path) and decoded < _DECODED_BYTES:
                        decoded += os.path.getsize(path)
                        load_image(path)
            except UserError as error:
                raise type(error)(f"{sample.source}: {error}") from error

    def __getitem__(self, index: int) -> Example:
        """Opens the images of a sample and encodes it.

        Raises:
            MissingFileError: an image does not exist.
            UserError: an image or the conversation cannot be used.  Both name file, record and image.
        """
        sample = self.samples[index]
        try:
            images = [load_image(path) for path in sample.images]
        except UserError as error:
            raise type(error)(f"{sample.source}: {error}") from error
        return self._processors[index].encode(sample, images, self._max_length)


def _entry_samples(entry: Mapping[str, Any], image_root: str | None) -> Iterator[Sample]:
    files = entry["data_files"]
    for path in [files] if isinstance(files, str) else files:
        for number, record in enumerate(read_records(path)):
            yield parse_record(record, f"{path} record {number}", image_root)


@dataclass
class EpochBatchSampler:
    """Which samples form each micro-batch of a rank, for one epoch after the other.

    Args:
        size: number of samples, >= 1.
        batch_size: samples in a micro-batch of one rank.
        accumulation: micro-batches that make one optimiser step.
        seed: of the permutations.
        rank, world_size: this process among those that share the data.
        shuffle: new order each epoch; False keeps the file's order.
        lengths: see `grouping.modality_lengths`; then each step holds one modality. None mixes freely.

    Attributes:
        epoch: which pass over the data `__iter__` and `order` give; the caller sets it.

    The last step of an epoch takes samples from the epoch's beginning until it is full.

    Raises:
        UserError: `size` is 0.
    """

    size: int
    batch_size: int
    accumulation: int = 1
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    shuffle: bool = True
    lengths: np.ndarray | None = None
    epoch: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if self.size < 1:
            raise UserError("the data set is empty: no record in dataset.data_files")

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps that one pass over the data takes."""
        return -(-self.size // (self.batch_size * self.accumulation * self.world_size))

    def __len__(self) -> int:
        """Micro-batches of one epoch on one rank."""
        return self.steps_per_epoch * self.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        """Sample indices of each micro-batch of this rank in the current epoch."""
        order = self.order()
        per_round = self.batch_size * self.world_size
        for start in range(0, len(order), per_round):
            first = start + self.rank * self.batch_size
            yield order[first : first + self.batch_size].tolist()

    def order(self) -> np.ndarray:
        """int64 [len(self) * batch_size * world_size]: all ranks' samples of the current epoch, in order."""
        random = np.random.default_rng([self.seed, self.epoch])
        if self.lengths is not None:
            indices = group_by_modality(self.lengths, self.batch_size, self.accumulation * self.world_size, random)
        else:
            indices = random.permutation(self.size) if self.shuffle else np.arange(self.size)
        total = len(self) * self.batch_size * self.world_size
        return np.resize(indices, total)
