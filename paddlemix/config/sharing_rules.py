"""Keys of runs over several processes: what is refused whatever their number, and what to use in its place.

What depends on the number of processes or the device is in `trainer/checks.py`.
"""

from __future__ import annotations

from collections.abc import Iterator

from paddlemix.config.schema import RunConfig

# Other programs' names of `sharding`'s values: DeepSpeed's, FSDP's and Paddle's own.
SPELLINGS = {
    "stage1": ("1", "zero1", "zero-1", "zero_1", "os"),
    "stage2": ("2", "zero2", "zero-2", "zero_2", "zero2_offload", "os_g", "shard_grad_op"),
    "stage3": ("3", "zero3", "zero-3", "zero_3", "zero3_offload", "p_g_os", "full_shard", "fsdp"),
}
_SPLITS = 'tensor_parallel_degree splits every large weight, sharding "stage3" also gradients and states'
_SEQUENCE = "for long rows set recompute true, or max_length lower"
# Degree -> what is not split here, and what to use instead.
_DEGREES = {
    "pipeline_parallel_degree": ("layers are not spread over processes", _SPLITS),
    "sep_parallel_degree": ("a sequence is not split", _SEQUENCE),
    "context_parallel_degree": ("a sequence is not split", _SEQUENCE),
    "expert_parallel_degree": ("no model here has experts", "leave it out"),
    "expert_tensor_parallel_degree": ("no model here has experts", "leave it out"),
}
# Option of sharding_parallel_config -> why it is refused.  Source: PaddleNLP 3.0.0b4, training_args.py.
_OPTIONS = {
    "enable_stage1_tensor_fusion": "it joins weights under other names, so that biases and norms decay and no part "
    "has a rate of its own",
    "split_param": "on NPU its numbers are wrong, and a checkpoint cannot be written from its states",
    "enable_fuse_optimizer_states": "a checkpoint cannot be written from joined states",
    "enable_release_grads": "gradients are released already",
    "disable_stage1_reduce_avg": "gradients are averaged by a sum and a factor already",
    "enable_stage1_overlap": "it is not tested here",
    "enable_stage1_broadcast_overlap": "it is not tested here",
    "enable_stage1_allgather_overlap": "it is not tested here",
    "enable_stage2_overlap": "it is not tested here, and weights could be saved before they have arrived",
}


def spelling_of(text: str) -> str | None:
    """The value of `sharding` that another program's word for it means; None for an unknown word."""
    return next((stage for stage, words in SPELLINGS.items() if text.lower() in words), None)


def sharing_faults(config: RunConfig) -> Iterator[tuple[tuple[str, ...], str]]:
    """(keys, message) of everything that no number of processes makes right; the first key is the one to change."""
    yield from _offload(config)
    yield from _degrees(config)
    yield from _tensor_parallel(config)
    for option in config.sharding_parallel_config.replace(",", " ").split():
        reason = _OPTIONS.get(option, "it is unknown")
        message = f"sharding_parallel_config '{option}' is not available: {reason}; leave it out"
        yield ("sharding_parallel_config",), message
    if config.data_parallel_config:
        message = f"data_parallel_config '{config.data_parallel_config}' is not available; leave it out"
        yield ("data_parallel_config",), message


def _offload(config: RunConfig) -> Iterator[tuple[tuple[str, ...], str]]:
    stage, *more = config.sharding.split() or [""]
    if "offload" in more:
        # Measured with Paddle 3.3.1: stage 2 asserts float16, stage 3 learns other numbers.
        yield (
            ("sharding",),
            f'sharding "{config.sharding}": Paddle\'s offload to the host fails or changes the numbers; write '
            f'"{stage}", and for less memory "stage3" on more cards, recompute true, or lora with quantize_base "nf4"',
        )


def _degrees(config: RunConfig) -> Iterator[tuple[tuple[str, ...], str]]:
    for key, (why, instead) in _DEGREES.items():
        degree = getattr(config, key)
        if degree > 1:
            yield (key,), f"{key} {degree}: {why} here; set it to 1; {instead}"


def sharding_degree_key(config: RunConfig) -> str:
    """The key that says how many processes share one copy: PaddleNLP takes the larger of two."""
    return "sharding_degree" if config.sharding_degree > config.sharding_parallel_degree else "sharding_parallel_degree"


def _tensor_parallel(config: RunConfig) -> Iterator[tuple[tuple[str, ...], str]]:
    degree = config.tensor_parallel_degree
    if config.tensor_parallel_config:
        # They concern PaddleNLP's own layers, and some change how gradients are added up.
        message = f"tensor_parallel_config '{config.tensor_parallel_config}' is not available; leave it out"
        yield ("tensor_parallel_config",), message
    if degree <= 1:
        return
    # PaddleNLP drops a sharding of degree 1: so a file of PaddleMIX means tensor parallelism alone.
    if config.sharding.startswith("stage3") and getattr(config, sharding_degree_key(config)) != 1:
        yield (
            ("sharding", "tensor_parallel_degree"),
            f'sharding "{config.sharding}" cannot be used with tensor_parallel_degree {degree}, which splits the '
            'weights already; write "stage2" or "stage1", or set sharding_parallel_degree to 1 for tensor parallelism '
            "alone",
        )
    if config.hybrid_parallel_topo_order == "sharding_first":
        yield (
            ("hybrid_parallel_topo_order",),
            'hybrid_parallel_topo_order "sharding_first" is not available with tensor_parallel_degree '
            f"{degree}: neighbouring processes compute one model; leave it out",
        )
