"""What a configuration could change so that a run takes less memory, the cheapest first."""

from __future__ import annotations

from paddlemix.config.schema import RunConfig


def less_memory(config: RunConfig) -> list[str]:
    """The keys with the values they have, and which would take less; `--dry-run` says how much."""
    size, low = config.per_device_train_batch_size, config.bf16 or config.fp16
    found = []
    if config.do_train and size > 1:
        found.append(
            f"per_device_train_batch_size {size} -> 1, with gradient_accumulation_steps "
            f"{config.gradient_accumulation_steps} -> {config.gradient_accumulation_steps * size} for the same result"
        )
    if config.do_train and not config.recompute:
        found.append("recompute false -> true")
    if not low:
        found.append('bf16 false -> true with fp16_opt_level "O2" (GPU and NPU)')
    elif config.fp16_opt_level != "O2":
        found.append(f'fp16_opt_level "{config.fp16_opt_level}" -> "O2"')
    if config.resolved_evaluation_strategy != "no" and config.per_device_eval_batch_size > 1:
        found.append(f"per_device_eval_batch_size {config.per_device_eval_batch_size} -> 1")
    found.append(f"max_length {config.max_length} -> a smaller one")
    if config.do_train and not config.lora:
        found.append("lora false -> true")
    if config.lora and config.quantize_base is None:
        found.append('quantize_base null -> "nf4"')
    return [*found, "several devices with sharding", "--dry-run says what takes how much"]
