"""The data of a run: from the configuration to rows, their order and their lengths."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from paddlemix.config.schema import RunConfig
from paddlemix.datasets.batches import LoadingSettings, RowDataset
from paddlemix.datasets.data_settings import DataSettings
from paddlemix.datasets.images.sources import ImageSettings
from paddlemix.datasets.length_statistics import describe_lengths
from paddlemix.datasets.mixture import SampleDataset
from paddlemix.datasets.order import EpochBatchSampler, Grouping
from paddlemix.datasets.packing import PackedDataset, pack_rows
from paddlemix.datasets.record_selection import split_count
from paddlemix.datasets.sample_lengths import measure_lengths
from paddlemix.errors import MissingFileError, UserError
from paddlemix.log import logger, process_rank
from paddlemix.parallel.layout import local_rank
from paddlemix.paths import is_address, user_path
from paddlemix.processors.llava import LlavaProcessor
from paddlemix.processors.text.chat_template import resolve_template
from paddlemix.sample import Skip

_MEASURED = 1000  # samples whose lengths are known at the start although nothing needs them


@dataclass(frozen=True, kw_only=True)
class TrainingRows:
    """The training data.

    Args:
        rows: one sample each, or several where the run packs.
        samples: what the rows are made of.
        grouping: how an epoch's order is made.
        lengths: int [rows], that rows are grouped by; None without grouping.
        left_out: samples that are in no row, because they could not be measured.
    """

    rows: RowDataset
    samples: SampleDataset
    grouping: Grouping = "none"
    lengths: np.ndarray | None = None
    left_out: tuple[Skip, ...] = ()


def data_file_names(entry: Mapping[str, Any]) -> list[str]:
    """The files and addresses of an entry of `dataset`, without the numbers of records that are taken of them."""
    names = entry["data_files"]
    return [split_count(name)[0] for name in ([names] if isinstance(names, str) else names)]


def check_data_files(config: RunConfig) -> None:
    """Refuses a run whose data files are missing, before its model is downloaded or read in vain.

    Raises:
        MissingFileError: lists those that are not, with what the configuration says about them.
    """
    # A split that is not used may name files that do not exist.
    wanted = {"train": config.do_train, "eval": config.resolved_evaluation_strategy != "no"}
    missing = []
    for split, entries in (config.dataset or {}).items():
        for entry in entries if wanted[split] else ():
            about = f"; dataset.{split} expects there {entry['about']}" if entry.get("about") else ""
            missing += [
                f"data file '{path}' does not exist (looked in {Path.cwd()}); check dataset.data_files{about}"
                for path in data_file_names(entry)
                if not is_address(path) and not user_path(path, "the data file").exists()
            ]
    if missing:
        raise MissingFileError("\n".join(missing))


def data_settings(config: RunConfig) -> DataSettings:
    """The keys of a run that say how samples are read."""
    return DataSettings(
        max_length=config.max_length,
        on_too_long=config.on_too_long,
        on_bad_sample=config.on_bad_sample,
        max_bad_fraction=config.max_bad_fraction,
        image_root=config.image_root,
        seed=config.seed,
        images=ImageSettings(
            max_bytes=config.max_image_bytes,
            max_pixels=config.max_image_pixels,
            timeout=config.image_timeout,
            retries=config.image_retries,
            allow_local_network=config.allow_local_network,
        ),
    )


def read_samples(config: RunConfig, split: str, processor: LlavaProcessor, has_tower: bool) -> SampleDataset:
    """Opens and checks the data of one split.

    Args:
        split: "train" or "eval".
        processor: of the model; an entry's own template replaces its template.
        has_tower: whether the model can see.

    Raises:
        MissingFileError, UserError: see `SampleDataset`; or there are images and the model cannot see.
    """

    def processor_for(chat_template: str | None) -> LlavaProcessor:
        if chat_template is None:
            return processor
        return replace(processor, template=resolve_template(chat_template, processor.template))

    dataset = SampleDataset((config.dataset or {})[split], processor_for, data_settings(config))
    # Signed words: positive for samples with an image. One of them is enough for the error, and no picture is opened.
    with_images = np.flatnonzero(dataset.words > 0)
    if len(with_images) and not has_tower:
        source = dataset.sample(int(with_images[0])).source
        raise UserError(
            f"{source} has an image, but {config.model_name_or_path} has no vision tower; set mm_vision_tower"
        )
    if local_rank() == 0:  # once on each machine, whose disks may hold other pictures
        dataset.check()
    return dataset


def grouping_of(config: RunConfig) -> Grouping:
    """How an epoch's order is made."""
    return "length" if config.group_by_length else "modality" if config.group_by_modality_length else "none"


def arrange(config: RunConfig, samples: SampleDataset) -> TrainingRows:
    """Packs or groups samples as the run asks, and logs their lengths.

    Raises:
        UserError: no sample is left to train on.
    """
    if not len(samples):
        raise UserError("the training data is empty: no record in dataset.train can be used")
    grouping = grouping_of(config)
    capacity = config.max_length if config.mixtoken else None
    # Packing and grouping need every length; a plain order needs none, and a sample of them for the log is cheap.
    needed = config.mixtoken or grouping == "length"
    lengths = measure_lengths(samples, config.dataloader_num_workers) if needed else np.zeros((0, 2), np.int32)
    if process_rank() == 0:  # which writes the log
        shown, size = lengths if needed else _measure_some(samples, config.seed), config.per_device_train_batch_size
        logger.info("training data: %s", describe_lengths(shown, size, capacity, grouping, total=len(samples)))
    if config.mixtoken:
        packs = pack_rows(lengths[:, 0], config.max_length, config.seed)
        logger.info("%d samples are packed into %d rows of at most %d tokens", len(samples), len(packs), capacity)
        # Length 0: the sample could not be measured and was packed nowhere, so no batch will report it.
        left_out = [skip for index in np.flatnonzero(lengths[:, 0] == 0) for skip in samples[int(index)].skipped]
        return TrainingRows(rows=PackedDataset(samples, packs), samples=samples, left_out=tuple(left_out))
    # Grouping by modality uses signed word counts, which need no tokenizer.
    by = {"length": lengths[:, 0], "modality": samples.words, "none": None}[grouping]
    return TrainingRows(rows=samples, samples=samples, grouping=grouping, lengths=by)


def loading_settings(config: RunConfig, processor: LlavaProcessor) -> LoadingSettings:
    """How batches are made of rows; one without an image is left alone."""
    return LoadingSettings(
        tokens_per_tile=processor.image_spec.tokens_per_tile,
        num_workers=config.dataloader_num_workers,
        pad_to_multiple_of=config.pad_to_multiple_of,
        pad_tiles_to_multiple_of=config.pad_tiles_to_multiple_of,
    )


def batch_sampler(config: RunConfig, data: TrainingRows, rank: int, world_size: int) -> EpochBatchSampler:
    """Which rows form which batch of a process.

    Args:
        rank, world_size: of the processes that share the data.
    """
    return EpochBatchSampler(
        len(data.rows),
        config.per_device_train_batch_size,
        config.gradient_accumulation_steps,
        config.seed,
        rank,
        world_size,
        grouping=data.grouping,
        lengths=data.lengths,
    )


def steps_per_epoch(config: RunConfig, num_rows: int, world_size: int) -> int:
    """Optimiser steps of one pass over the data; the same for every order."""
    size, passes = config.per_device_train_batch_size, config.gradient_accumulation_steps
    return EpochBatchSampler(num_rows, size, passes, world_size=world_size).steps_per_epoch


def _measure_some(samples: SampleDataset, seed: int) -> np.ndarray:
    """int32 [n, 2]: lengths of at most `_MEASURED` samples, drawn by the seed."""
    count = min(len(samples), _MEASURED)
    # In the file's order, so that the disk is read forwards.
    rows = np.random.default_rng(seed).choice(len(samples), count, replace=False)
    return np.array([samples.measure(int(row)) for row in np.sort(rows)], dtype=np.int32)
