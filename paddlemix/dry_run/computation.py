"""How a run computes and what it spreads over its devices, from its configuration alone."""

from __future__ import annotations

from paddlemix.config.schema import RunConfig
from paddlemix.dry_run.sharing import Training
from paddlemix.dry_run.step_sizes import FLOAT32, Computation
from paddlemix.models.kernels import cpu_library
from paddlemix.trainer.optim import keeps_master_weights
from paddlemix.trainer.run_model import compute_dtype, weight_dtype


def computation_of(config: RunConfig, on_cpu: bool) -> Computation:
    """How a run computes its numbers."""
    wide = FLOAT32 if weight_dtype(config) == "float32" else 2
    # Products run in what weights are held in, unless mixed precision is on.
    is_off = config.fp16_opt_level == "O0" or compute_dtype(config) == "float32"
    size = wide if is_off else 2
    has_kernels = on_cpu and size == FLOAT32 and cpu_library.missing() is None
    return Computation(
        size=size,
        wide=wide,
        on_cpu=on_cpu,
        recompute=config.recompute,
        compiled=has_kernels,
        tensor_degree=tensor_degree(config),
    )


def tensor_degree(config: RunConfig) -> int:
    """Devices that compute one model together; 1 where each computes alone."""
    return max(config.tensor_parallel_degree, 1)


def training_of(config: RunConfig, devices: int) -> Training:
    """How a run's weights are trained and spread over devices.

    Args:
        devices: of the run; those that compute one model together count as one of `Training`.
    """
    devices //= tensor_degree(config)
    has_masters = keeps_master_weights(config)
    # "stage2 offload" is one text of several words.
    stage = next((number for number in (1, 2, 3) if f"stage{number}" in config.sharding), 0)
    degree = max(config.sharding_parallel_degree, config.sharding_degree)
    return Training(
        master_weights=has_masters,
        float32_gradients=has_masters and config.amp_master_grad,
        devices=devices,
        sharding_stage=stage,
        sharding_degree=devices if degree < 1 else min(degree, devices),
        accumulates=config.gradient_accumulation_steps > 1,
        recompute=config.recompute,
        tensor_degree=tensor_degree(config),
    )
