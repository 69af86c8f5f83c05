"""Which part of a weight, and of its optimiser's states, this process holds.

    stage     weight                  states                       kept by paddle's AdamW under
    none      whole                   whole                        the weight's name
    stage1    whole                   whole, in one process        the weight's name
    stage2    whole                   whole, in one process        the weight's name
    stage3    a flat slice            a flat slice                 "slice@" + the weight's name
    stage3    whole, where small      whole                        the weight's name

Where a tensor group splits a weight, "whole" here is this process's part of it (`tensor/parts.py`), and so for its
moments and master weight.

Source: Paddle 3.3.1, dygraph_sharding_optimizer.py, group_sharded_optimizer_stage2.py, group_sharded_stage3.py.  The
states of a float32 copy (master weight) are kept under that copy's name, which differs from stage to stage.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import paddle

MASTER = "master_weight"  # kind of the float32 copy of a weight in half precision
FACTORS = ("beta1_pow_acc", "beta2_pow_acc")  # kinds that are one number of a weight
SLICE = "slice@"  # begins the name of a slice among the optimiser's parameters


@dataclass(frozen=True, kw_only=True)
class Slice:
    """The part of a weight that a process of stage3 holds: some of its numbers in their flat order.

    Args:
        tensor: [length], with padding after the weight's end.
        start, stop: which numbers of the weight they are; none where start is stop.
    """

    tensor: paddle.Tensor
    start: int
    stop: int


def slice_of(weight: paddle.Tensor, rank: int) -> Slice | None:
    """The slice of a weight that this process holds; None where it holds the weight whole.

    Args:
        rank: of this process in its sharding group.
    """
    held = getattr(weight, "fw_storage", None)
    if held is None:
        return None
    # All slices of a weight are of one length, the last ones padded.  A sliced weight keeps its shape without numbers.
    length, size = int(held.shape[0]), math.prod(weight.shape)
    start = min(rank * length, size)
    return Slice(tensor=held, start=start, stop=min(start + length, size))


def adamw_of(optimizer: Any) -> Any:
    """Paddle's AdamW inside the optimisers that Fleet and mixed precision put around it."""
    while True:
        # `vars`: the wrappers pass any other name on to what they wrap.  Stage3 names the optimiser in itself.
        inner = vars(optimizer).get("_inner_opt") or vars(optimizer).get("_optim")
        if inner is None or inner is optimizer:
            return optimizer
        optimizer = inner


def state_holders(optimizer: Any) -> Mapping[str, int]:
    """Paddle's name of a weight -> rank in the sharding group of the only process that holds its states.

    Returns:
        Nothing for weights whose states, or a slice of them, every process holds.
    """
    while optimizer is not None:
        own = vars(optimizer)
        if "_param2rank" in own:
            # Of stage2 a property makes the table when it is first asked for.
            return getattr(optimizer, "param2rank", None) or own["_param2rank"]
        inner = own.get("_inner_opt") or own.get("_optim")
        optimizer = None if inner is optimizer else inner
    return {}


def make_states(adamw: Any, weight: paddle.Tensor) -> None:
    """Makes the optimiser's states of a weight, at their start values, if they do not exist yet."""
    owner, held = weight, getattr(weight, "fw_storage", None)
    if held is not None:
        # As stage3 does in each step: a parameter over the slice's numbers, under its name.
        owner = paddle.base.framework.EagerParamBase(shape=held.shape, dtype=held.dtype, name=SLICE + weight.name)
        held._share_buffer_to(owner)
    block = paddle.static.default_main_program().global_block()
    adamw._create_accumulators(block, [owner])


def has_master(adamw: Any, weight: paddle.Tensor) -> bool:
    """Whether AdamW changes a float32 copy of a weight.

    Paddle's stages 2 and 3 make copies of all trained weights in half precision, also where AdamW does not use them.
    """
    return bool(adamw._multi_precision) and weight.dtype in (paddle.float16, paddle.bfloat16)


def states_of(adamw: Any, weight: paddle.Tensor) -> dict[str, paddle.Tensor]:
    """Kind (moment1, moment2, beta1_pow_acc, beta2_pow_acc, master_weight) -> the state that this process has.

    Returns:
        Tensors of the weight's shape, or [length] where it is sliced, and [1]; nothing where there are none yet.
    """
    # Also while stage3 has gathered the weight, when there is no slice of it: the states stay slices.
    sliced = hasattr(weight, "fw_storage")
    key = SLICE + weight.name if sliced else weight.name
    master = adamw._master_weights.get(key) if adamw._multi_precision else None
    kept = key if master is None else master.name
    states = {kind: by_name[kept] for kind, by_name in adamw._accumulators.items() if kept in by_name}
    return states if master is None else {**states, MASTER: master}
