"""What takes less memory, the cheapest first: the one place for runs and for commands that answer questions.

A run's error, its dry run and the commands that answer questions all show these texts.  Knows keys and flags, and no
device.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from paddlemix.config.schema import RunConfig


def less_memory_in_run(config: RunConfig, is_quantized: bool = False, devices: int = 1) -> list[str]:
    """The keys of a run with their values, and the values that would take less memory.

    Args:
        config: the run.
        is_quantized: the base's linear layers are held in few bits, whoever asked for it.
        devices: processes of the run.

    Returns:
        One text per key, "recompute false -> true" for example; those that change the result least come first.
    """
    # what changes             what it costs
    #   batch size, recompute    time; the result stays the same
    #   precision                rounding
    #   evaluation's batch size  time, in evaluations only
    #   length, LoRA, codes      another training run
    #   sharding                 more cards
    return [*_passes(config), *_precision(config), *_evaluation(config), *_model(config, is_quantized, devices)]


def _passes(config: RunConfig) -> Iterator[str]:
    size, passes = config.per_device_train_batch_size, config.gradient_accumulation_steps
    if config.do_train and size > 1:
        yield (
            f"per_device_train_batch_size {size} -> 1, with gradient_accumulation_steps {passes} -> {passes * size} "
            "for the same result"
        )
    if config.do_train and not config.recompute:
        yield "recompute false -> true"


def _precision(config: RunConfig) -> Iterator[str]:
    # three states: float32, autocast over float32 weights (O1), weights in half precision too (O2)
    if not (config.bf16 or config.fp16):
        yield 'bf16 false -> true with fp16_opt_level "O2" (GPU and NPU)'
    elif config.fp16_opt_level != "O2":
        yield f'fp16_opt_level "{config.fp16_opt_level}" -> "O2"'


def _evaluation(config: RunConfig) -> Iterator[str]:
    if config.resolved_evaluation_strategy != "no" and config.per_device_eval_batch_size > 1:
        yield f"per_device_eval_batch_size {config.per_device_eval_batch_size} -> 1"


def _model(config: RunConfig, is_quantized: bool, devices: int) -> Iterator[str]:
    yield f"max_length {config.max_length} -> a smaller one"
    # as training resolves it: the key `language_model` decides, otherwise whether adapters train
    adapts = config.lora or config.lora_path is not None
    trains_all = (config.language_model or ("lora" if adapts else "full")) == "full"
    if config.do_train and not adapts and trains_all:
        yield "lora false -> true"
    # Codes do not train, PiSSA changes its base: neither can use a quantised one.
    if not is_quantized and config.quantize_base is None and not config.pissa and not (config.do_train and trains_all):
        yield 'quantize_base null -> "nf4"'
    yield from _more_devices(config, is_quantized or config.quantize_base is not None, devices)


def _more_devices(config: RunConfig, is_quantized: bool, devices: int) -> Iterator[str]:
    #   tensor parallel   sharding     codes   what helps
    #   no                not stage3   no      the next stage: splitting single weights costs more
    #   no                not stage3   yes     the next stage, or splitting single weights: no stage splits codes
    #   no                stage3       any     nothing here: large weights are in slices already
    #   yes               any          any     more parts of each weight, and stage 2 over what several groups hold
    degree = max(config.tensor_parallel_degree, 1)
    if devices == 1:
        yield "several devices with sharding or tensor_parallel_degree"
        return
    can_share = "stage3" not in config.sharding if degree == 1 else degree < devices and "stage2" not in config.sharding
    if can_share:
        stage = "stage3" if "stage2" in config.sharding else "stage2"
        yield f'sharding "{config.sharding}" -> "{stage}"'
    if degree < devices and (degree > 1 or (is_quantized and can_share)):
        yield (
            f"tensor_parallel_degree {config.tensor_parallel_degree} -> {2 * degree} or more (divisors of the model's "
            "key/value heads)"
        )


def less_memory_in_answers(arguments: argparse.Namespace, dtype: str) -> list[str]:
    """Flags of a command that answers questions, the cheapest first.

    Args:
        arguments: with `load_8bit`, `load_4bit`, `tensor_parallel`, `max_new_tokens` and, where questions are answered
            together, `batch_size`.
        dtype: that the model is computed in.
    """
    found = []
    # The chat has no batch.
    size = getattr(arguments, "batch_size", 1)
    if size > 1:
        found.append(f"--batch-size {size} -> a smaller one")
    if dtype == "float32":
        found.append("--dtype bfloat16 (GPU and NPU)")
    # from 8 bits there is one step left, from none there are two
    if not arguments.load_4bit:
        found.append("--load-4bit" if arguments.load_8bit else "--load-8bit or --load-4bit")
    found.append(
        f"--tensor-parallel {arguments.tensor_parallel} -> more cards (a divisor of the model's key/value heads)"
    )
    return [*found, f"--max-new-tokens {arguments.max_new_tokens} -> a smaller one"]
