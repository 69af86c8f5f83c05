"""A dry run's findings as lines of text."""

from __future__ import annotations

from collections.abc import Iterator

from paddlemix.config.less_memory import less_memory_in_run
from paddlemix.config.schema import RunConfig
from paddlemix.dry_run.computation import tensor_degree, training_of
from paddlemix.dry_run.device import DeviceMemory, device_memory
from paddlemix.dry_run.memory import MemoryEstimate
from paddlemix.dry_run.plan import DryRun, plan_run
from paddlemix.trainer.run_model import compute_dtype, weight_dtype

_COLUMNS = ("weights", "gradients", "states", "master", "activations", "together")
_UNITS = ((1024**3, "GiB"), (1024**2, "MiB"), (1024, "KiB"))
_LARGE_CARD = 80 * 1024**3  # A100, H100 and the like


def dry_run(config: RunConfig, devices: int | None = None) -> list[str]:
    """What `--dry-run` prints, line by line; arguments and errors as `dry_run.plan_run` has them."""
    run = plan_run(config, devices)
    return list(report_lines(run, device_memory(run.device)))


def report_lines(run: DryRun, device: DeviceMemory | None) -> Iterator[str]:
    """The report of `--dry-run`.

    Args:
        run: what was found.
        device: memory of the assumed device; None where not known.
    """
    yield "dry run: nothing is trained, nothing is saved"
    yield f"model: {run.sizes.origin}; {_held(run)}"
    for part in run.memory.parts:
        share = f"{part.trained:,} trained" if part.trained else "frozen"
        yield f"  {part.part:15} {part.count:>15,} parameters, {share}"
    yield from _data_lines(run)
    yield from _memory_lines(run)
    for note in run.notes:
        yield f"note: {note}"
    yield from _fit_lines(run, device)


def _held(run: DryRun) -> str:
    config, quantization = run.config, run.sizes.quantization
    computed = compute_dtype(config) if config.fp16_opt_level != "O0" else weight_dtype(config)
    text = f"{weight_dtype(config)} weights"
    if quantization is not None:
        text += f", the language model's linear layers in {quantization.kind}"
    return text + f", computed in {computed}"


def _data_lines(run: DryRun) -> Iterator[str]:
    if run.statistics is not None:
        yield f"data: {run.statistics}"
    elif run.rows is not None:
        yield f"data: {run.rows:,} samples"
    shape = run.shape
    yield (
        f"largest batch: {shape.rows} x {shape.length:,} positions, {shape.tiles} image tiles, "
        f"{shape.supervised:,} trained tokens"
    )
    if run.steps is None:
        yield "steps: unknown without lengths, because samples are packed; set max_steps"
        return
    passes = "" if run.steps_per_epoch is None else f", {run.steps / run.steps_per_epoch:.2f} epochs"
    each = f" of {run.steps_per_epoch:,} steps" if run.steps_per_epoch is not None else ""
    group = tensor_degree(run.config)
    of = "" if group == 1 else f" of {group} devices"
    one, many = ("device", "devices") if group == 1 else ("group", "groups")
    devices = f"1 {one}{of}" if run.replicas == 1 else f"{run.replicas} {many}{of}"
    yield (
        f"steps: {run.steps:,}{passes}{each}; a step is {run.samples_per_step} rows "
        f"({run.config.per_device_train_batch_size} x {run.config.gradient_accumulation_steps} passes x {devices})"
    )


def _memory_lines(run: DryRun) -> Iterator[str]:
    memory, config = run.memory, run.config
    # One unit for the whole table, so that its columns add up by eye.
    scale, unit = next(((size, unit) for size, unit in _UNITS if memory.tensors >= size), _UNITS[-1])
    how = ["recompute"] if config.recompute else []
    how += [f"tensor parallel {tensor_degree(config)}"] if tensor_degree(config) > 1 else []
    # "stage3" with tensor parallelism and degree 1 is that of PaddleMIX's file, and shares nothing.
    how += [f"sharding {config.sharding}"] if config.sharding and training_of(config, run.devices).stage else []
    yield f"memory of each {run.device}, {unit}{''.join(f', {text}' for text in how)}:"
    yield f"  {'':15}" + "".join(f"{column:>13}" for column in _COLUMNS)
    for part in memory.parts:
        values = (part.weights, part.gradients, part.states, part.master, part.activations, part.total)
        yield f"  {part.part:15}" + "".join(f"{value / scale:13.2f}" for value in values)
    for name, value in _rest(memory, run.device):
        yield f"  {name:80}{value / scale:13.2f}"


def _rest(memory: MemoryEstimate, device: str) -> Iterator[tuple[str, int]]:
    yield "rotary tables and masks", memory.shared
    yield "working space: logits of the loss, or a layer's backward pass", memory.working
    if memory.wide:
        yield "quantised weights of the layer in use, and scales", memory.wide
    if memory.communication:
        yield "gradients and weights on their way between devices", memory.communication
    if memory.never_together:
        yield "minus: what never exists at the same time", -memory.never_together
    if memory.overhead:
        yield "the heap's overhead", memory.overhead
    yield ("the program itself" if device == "cpu" else "the device's runtime"), memory.program
    yield "total", memory.total


def _fit_lines(run: DryRun, device: DeviceMemory | None) -> Iterator[str]:
    total = run.memory.total
    # memory of the device   size              shown
    #   unknown              up to a card's    the size
    #   unknown              above any card    the size, and a warning with keys that need less
    #   known                fits              the size and what is free
    #   known                does not fit      a warning with keys that need less
    if device is None:
        yield f"about {_size(total)} are needed; how much memory the device has is not known"
        if run.device != "cpu" and total > _LARGE_CARD:
            yield (
                f"warning: that exceeds a card of {_size(_LARGE_CARD)}. To need less, the cheapest first: "
                f"{'; '.join(_less_memory(run))}"
            )
    elif total <= device.free:
        yield f"it fits: about {_size(total)} of {_size(device.free)} free"
    else:
        yield (
            f"warning: it does not fit: about {_size(total)} are needed, {_size(device.free)} are free "
            f"(of {_size(device.total)}). To need less, the cheapest first: {'; '.join(_less_memory(run))}"
        )


def _less_memory(run: DryRun) -> list[str]:
    return less_memory_in_run(run.config, run.sizes.quantization is not None, run.devices)


def _size(num_bytes: int) -> str:
    scale, unit = next(((size, unit) for size, unit in _UNITS if num_bytes >= size), _UNITS[-1])
    return f"{num_bytes / scale:.1f} {unit}"
