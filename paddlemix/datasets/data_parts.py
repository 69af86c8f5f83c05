"""Entries of the JSON's `dataset` key -> the chosen records of each file, with what cannot be read left out or refused.

Knows no example and no image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from paddlemix.datasets.data_settings import DataSettings
from paddlemix.datasets.record_selection import select_rows, split_count
from paddlemix.datasets.records.record_file import DOWNLOADS, RecordFile, open_records
from paddlemix.errors import UserError
from paddlemix.log import logger
from paddlemix.processors.llava import LlavaProcessor

ProcessorFor = Callable[[str | None], LlavaProcessor]


@dataclass(frozen=True)
class DataPart:
    """The chosen records of one file.

    Args:
        records: of the whole file.
        rows: int64 [n], numbers of the chosen records that can be read; one that is used twice is listed twice.
        form: see `parse.parse_record`.
        image_root: folder that relative image paths start from.
        processor: encodes these samples; an entry's template may differ from the run's.
        unreadable: (source, reason) of every chosen record that cannot be read.
    """

    records: RecordFile
    rows: np.ndarray
    form: str | None
    image_root: str | None
    processor: LlavaProcessor
    unreadable: list[tuple[str, str]]


def open_parts(entry: Mapping[str, Any], processor_for: ProcessorFor, settings: DataSettings) -> Iterator[DataPart]:
    """Opens the files of one entry.

    Args:
        entry: see `mixture.SampleDataset`.
        processor_for: returns the processor for an entry's `chat_template` (None: the run's own).

    Raises:
        MissingFileError, UserError: a file cannot be used; or a record, where bad samples are errors.
    """
    processor = processor_for(entry.get("chat_template"))
    files, form, images = entry["data_files"], entry.get("name"), settings.images
    # Data files have limits of their own (`DOWNLOADS`); of those on images only what is about the network counts.
    remote = replace(
        DOWNLOADS, retries=images.retries, allow_local_network=images.allow_local_network, offline=images.offline
    )
    for name in [files] if isinstance(files, str) else files:
        path, count = split_count(name)
        records = open_records(path, form, remote)
        problems = records.problems()
        if problems and settings.on_bad_sample == "error":
            others = f" (and {len(problems) - 1} more bad records in this file)" if len(problems) > 1 else ""
            raise UserError(f"{problems[0][1]}{others}; `paddlemix check-data` lists and removes bad records")
        rows = select_rows(len(records), entry, count, settings.seed)
        # only of chosen records: a bad one outside of the split does not concern this run
        chosen = set(rows.tolist()) if problems else set()
        unreadable = [(f"{records.path} record {row}", reason) for row, reason in problems if row in chosen]
        _warn_of_doubts(records, rows)
        root = entry.get("image_root") or settings.image_root
        # The index has 0 words for what cannot be read: such a record never becomes a sample.
        yield DataPart(records, rows[records.words[rows] != 0], form, root, processor, unreadable)


def _warn_of_doubts(records: RecordFile, rows: np.ndarray) -> None:
    """Warns once about chosen records that may not mean what they are taken for."""
    doubts = records.doubts()
    chosen = set(rows.tolist()) if doubts else set()
    found = [doubt for row, doubt in doubts if row in chosen]
    if found:
        advice = "`paddlemix check-data` lists them"
        logger.warning("%d of %d records are doubtful, %s; the first: %s", len(found), len(chosen), advice, found[0])


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
