"""What a run would do and need, without doing it: `--dry-run`.

Reads the configuration, the model's declared sizes and the data's lengths; loads no weight, trains nothing and writes
nothing but the caches of lengths and image sizes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from paddlemix.checkpoints.sizes import ModelSizes, read_sizes
from paddlemix.config.schema import RunConfig
from paddlemix.datasets.batches import LoadingSettings, RowDataset, make_batch
from paddlemix.datasets.length_statistics import DataStatistics, describe_lengths
from paddlemix.datasets.mixture import SampleDataset
from paddlemix.datasets.packing import PackedDataset, pack_rows
from paddlemix.datasets.sample_lengths import measure_lengths
from paddlemix.device import available_kinds, missing_card
from paddlemix.dry_run.activations import estimate_activations
from paddlemix.dry_run.computation import computation_of, tensor_degree, training_of
from paddlemix.dry_run.device import program_bytes
from paddlemix.dry_run.memory import MemoryEstimate, estimate_memory
from paddlemix.dry_run.model import ModelFacts, describe_model
from paddlemix.dry_run.step_sizes import BatchShape
from paddlemix.errors import UserError
from paddlemix.launch.process_rules import check_devices
from paddlemix.log import logger
from paddlemix.models.configuration import LlavaConfig
from paddlemix.peft.wide_weights import bytes_besides
from paddlemix.sample import Batch
from paddlemix.trainer.checks import check_steps, started_processes
from paddlemix.trainer.output import continues_in, find_resume_point
from paddlemix.trainer.output_guard import check_run_pictures
from paddlemix.trainer.resuming.checkpoint_folders import saved_recipe
from paddlemix.trainer.resuming.same_recipe import check_same_recipe
from paddlemix.trainer.run_data import (
    check_data_files,
    data_settings,
    grouping_of,
    loading_settings,
    read_samples,
    steps_per_epoch,
)
from paddlemix.trainer.run_model import base_spec, compute_dtype, processor_of_run

_ANYRES_TILES = 5  # Source: LLaVA-1.6's grids of at most four tiles, and the whole image


@dataclass(frozen=True, kw_only=True)
class DryRun:
    """The findings of a dry run.

    Args:
        config: of the run.
        sizes, model: the model.
        statistics: None where lengths are not known.
        shape: of the batch that takes most memory.
        rows: that an epoch has; None where not known.
        steps: optimiser steps; None where not known.
        devices: of the run.
        device: kind of device that is assumed.
        memory: on each device.
        notes: what was assumed, and what a run would refuse.
    """

    config: RunConfig
    sizes: ModelSizes
    model: ModelFacts
    statistics: DataStatistics | None
    shape: BatchShape
    rows: int | None
    steps: int | None
    devices: int
    device: str
    memory: MemoryEstimate
    notes: tuple[str, ...]

    @property
    def replicas(self) -> int:
        """Devices, or groups of them that compute one model together, that read different samples of a step."""
        return self.devices // tensor_degree(self.config)

    @property
    def steps_per_epoch(self) -> int | None:
        """Optimiser steps of one pass over the data; None where not known."""
        return None if self.rows is None else steps_per_epoch(self.config, self.rows, self.replicas)

    @property
    def samples_per_step(self) -> int:
        """Rows of an optimiser step over all devices."""
        return self.config.per_device_train_batch_size * self.config.gradient_accumulation_steps * self.replicas


@dataclass(frozen=True)
class _Data:
    """Of the training data: number of rows, their statistics, and the batches that may take most memory."""

    rows: int | None
    statistics: DataStatistics | None
    shapes: tuple[BatchShape, ...]
    samples: SampleDataset | None = None


def plan_run(config: RunConfig, devices: int | None = None) -> DryRun:
    """Plans a run without making it.

    Args:
        config: checked, see `paddlemix.config.load.load_config`.
        devices: of the run; None for the number that a launcher has started.

    Raises:
        UserError: the run trains nothing, or its model or data cannot be used, or not by so many devices.
    """
    if not config.do_train:
        raise UserError("a dry run plans a training, but do_train is false; set do_train to true")
    for warning in config.warnings:
        logger.warning(warning)
    devices = devices or started_processes()
    # A plan for cards is often made where there are none.
    check_devices(config, devices, config.device or "")
    replicas = devices // tensor_degree(config)
    check_data_files(config)
    # The same steps as in recipe.run_recipe, as far as they need no weights.
    sizes = read_sizes(base_spec(config))
    model = describe_model(config, sizes.config, sizes.quantization)
    device, notes = _choose_device(config)
    data = _read_data(config, sizes)
    notes += _refusals(config, data.samples, replicas)
    if data.rows is not None:
        check_steps(config, data.rows, replicas)
    if data.statistics is None:
        notes.append(
            "no tokenizer files: lengths are not known; the estimate assumes rows of max_length with an image in each"
        )
    # The longest rows and those with most tiles are both candidates for the largest batch; the estimate decides.
    estimates = [_estimate(config, sizes.config, model, shape, (device, devices)) for shape in data.shapes]
    most = int(np.argmax([estimate.total for estimate in estimates]))
    steps = config.max_steps if config.max_steps > 0 else None
    if steps is None and data.rows is not None:
        steps = int(steps_per_epoch(config, data.rows, replicas) * config.num_train_epochs)
    return DryRun(
        config=config,
        sizes=sizes,
        model=model,
        statistics=data.statistics,
        shape=data.shapes[most],
        rows=data.rows,
        steps=steps,
        devices=devices,
        device=device,
        memory=estimates[most],
        notes=tuple(notes),
    )


def _refusals(config: RunConfig, samples: SampleDataset | None, replicas: int) -> Iterator[str]:
    """Why the run could not use its `output_dir` or resume the checkpoint there, if so."""
    try:
        resume = find_resume_point(config)
        if resume is not None:
            check_same_recipe(resume, saved_recipe(resume), config, replicas)
        if samples is not None:
            check_run_pictures(config, samples, resume is not None and continues_in(config, resume))
    except UserError as error:
        yield f"the run would stop: {error}"


def _choose_device(config: RunConfig) -> tuple[str, list[str]]:
    """The kind of device to assume, and notes about it."""
    here, problem = available_kinds(), missing_card()
    noted = [str(problem)] if problem is not None else []
    kind = (config.device or here[0]).partition(":")[0]
    narrow = compute_dtype(config)
    # A plan for a card is often made on a machine without one:
    #   device   precision    here        assumed
    #   null     bf16, fp16   CPU alone   gpu, with a note
    #   cpu      bf16, fp16   any         cpu, with a note that the run would stop
    #   named    any          not here    the named one, with a note
    if config.device is None and kind == "cpu" and narrow != "float32":
        return "gpu", [*noted, f"{narrow} needs an accelerator, and this machine has none; the estimate assumes one"]
    if kind == "cpu" and narrow != "float32":
        return kind, [*noted, f"the run would stop: {narrow} cannot be computed on CPU"]
    return kind, noted if kind in here else [
        *noted,
        f"device '{kind}' is not available here (available: {', '.join(here)})",
    ]


# ---- data ----


def _read_data(config: RunConfig, sizes: ModelSizes) -> _Data:
    has_tower = sizes.config.vision is not None
    processor = processor_of_run(config, sizes.processor, sizes.config)
    if processor is None:
        return _Data(_count_samples(config), None, (_assumed_shape(config, sizes.config),))
    samples = read_samples(config, "train", processor, has_tower)
    # All lengths, where a run may be content with a part of them: the largest batch has to be found.
    lengths = measure_lengths(samples, config.dataloader_num_workers)
    capacity = config.max_length if config.mixtoken else None
    size = config.per_device_train_batch_size
    statistics = describe_lengths(lengths, size, capacity, grouping_of(config), total=len(samples))
    rows: RowDataset = samples
    row_lengths = lengths.astype(np.int64)
    if config.mixtoken:
        packs = pack_rows(lengths[:, 0], config.max_length, config.seed)
        rows = PackedDataset(samples, packs)
        row_lengths = np.array([lengths[pack].sum(axis=0) for pack in packs])
    loading = loading_settings(config, processor)
    return _Data(len(rows), statistics, tuple(_largest_shapes(rows, row_lengths, size, loading)), samples)


def _count_samples(config: RunConfig) -> int | None:
    """Number of training samples, for which no tokenizer is needed; None where they are packed."""
    if config.mixtoken:
        return None

    def no_processor(chat_template: str | None) -> Any:
        return None

    return len(SampleDataset((config.dataset or {})["train"], no_processor, data_settings(config)))


def _assumed_shape(config: RunConfig, sizes: LlavaConfig) -> BatchShape:
    rows, length = config.per_device_train_batch_size, config.max_length
    tiles = visual = 0
    if sizes.vision is not None:
        is_anyres = sizes.image_newline or config.image_aspect_ratio == "anyres"
        tiles = rows * (_ANYRES_TILES if is_anyres else 1)
        # At least one token of each row is text.
        visual = min(tiles * sizes.tokens_per_tile, rows * length - rows)
    return BatchShape(rows=rows, length=length, tiles=tiles, supervised=rows * length - visual)


def _largest_shapes(rows: RowDataset, lengths: np.ndarray, size: int, loading: LoadingSettings) -> Iterator[BatchShape]:
    """The batch of the longest rows, and that of the rows with most visual tokens."""
    seen = set()
    for column in (0, 1):
        order = np.argsort(-lengths[:, column], kind="stable")
        # Fewer rows than a batch has are repeated, as the sampler repeats them.
        chosen = tuple(int(row) for row in np.resize(order[:size], size))
        if chosen not in seen:
            seen.add(chosen)
            yield _shape_of(make_batch(rows, chosen, loading))


def _shape_of(batch: Batch) -> BatchShape:
    segments = batch.segment_ids
    runs: tuple[int, ...] = ()
    if segments.max(initial=0) > 1:
        first = np.ones(segments.shape, dtype=bool)
        # A sample's tokens carry its number; where the number changes, another sample or padding begins.
        first[:, 1:] = segments[:, 1:] != segments[:, :-1]
        runs = tuple(np.diff(np.flatnonzero(first), append=segments.size).tolist())
    return BatchShape(
        rows=segments.shape[0],
        length=segments.shape[1],
        runs=runs,
        tiles=0 if batch.pixel_values is None else len(batch.pixel_values),
        supervised=len(batch.loss_index),
    )


# ---- memory ----


def _estimate(
    config: RunConfig, sizes: LlavaConfig, model: ModelFacts, shape: BatchShape, place: tuple[str, int]
) -> MemoryEstimate:
    device, devices = place
    on_cpu = device == "cpu"
    trained = {weight.name for weight in model.weights if weight.trained}
    computation = computation_of(config, on_cpu)
    activations = estimate_activations(sizes, model.linears, trained, shape, computation)
    training = training_of(config, devices)
    wide = 0 if on_cpu else bytes_besides(model.coded_at_once, model.coded, computation.size)
    return estimate_memory(model.weights, activations, training, on_cpu, program_bytes(on_cpu), wide)
