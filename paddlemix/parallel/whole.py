"""Every weight and optimiser state of a run as one whole array, gathered one at a time.

| what                                                     | held by                        | gathered by            |
|----------------------------------------------------------|--------------------------------|------------------------|
| anything in data parallel; weights in stage1 and stage2; | every process, whole           | nothing: it is there   |
| what stage3 does not slice; factors of the moments there |                                |                        |
| moments, factors and master weights in stage1 and stage2 | one process, whole             | a broadcast            |
| weights of stage3, their moments and master weights      | every process, a flat slice    | an all_gather, and cut |
| what a tensor group splits, and the states of that       | as above, but of a part        | as above, and then an  |
|                                                          |                                | all_gather of parts    |

Nobody has to say who reads: every process of these groups makes the same calls in the same order, and any of them
may take the result.  So a process holds one whole array at a time beyond its own share; of what a tensor group splits
its device holds a piece of it, and the host of the one that reads the whole.

Sources: paddle's DygraphShardingOptimizer (stage1), GroupShardedOptimizerStage2 and GroupShardedStage3.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import paddle
import paddle.distributed as dist

from paddlemix.parallel.layout import Layout
from paddlemix.parallel.shares import FACTORS, MASTER, adamw_of, has_master, state_holders, states_of
from paddlemix.parallel.tensor.parts import Part, part_of
from paddlemix.parallel.tensor.split_plan import all_parts

_MOMENTS = ("moment1", "moment2")
_AT_ONCE = 2**27  # numbers of a tensor in parts that are gathered at once: 512 MiB in float32


@dataclass(frozen=True)
class WholeTensor:
    """A tensor of the run that is whole when it has been gathered.

    Args:
        dtype: "float32", "float16" or "bfloat16".
        shape: of the whole.
        gather: returns its numbers, flat or in its shape, and perhaps with padding at the end.
        is_shared: whether `gather` needs the other processes of the sharding group, which call it too.
    """

    dtype: str
    shape: tuple[int, ...]
    gather: Callable[[], paddle.Tensor]
    is_shared: bool = False

    def read(self) -> np.ndarray:
        """The whole on the host; bfloat16 as uint16."""
        numbers = self.gather().numpy().reshape(-1)
        return numbers[: math.prod(self.shape)].reshape(self.shape)

    def take_part(self) -> None:
        """What a process calls while another one reads, if the tensor is shared."""
        self.gather()


@dataclass(frozen=True)
class WholeOfParts(WholeTensor):
    """A tensor of which each process of the tensor group has a part.

    It is gathered piece by piece, so that a device needs no memory for the whole, e.g. for an embedding in float32.

    Args:
        gather: returns the own part.
        parts: of all processes, by rank.
        group: paddle's group of them.
    """

    parts: tuple[Part, ...] = ()
    group: Any = None

    def read(self) -> np.ndarray:
        # Into one array, because that of an output layer may be larger than anything else on the host.
        whole, first = np.empty(self.shape, np.uint16 if self.dtype == "bfloat16" else self.dtype), 0
        for piece in map(_on_host, self._pieces()):
            rows = piece.reshape([len(self.parts), -1, *self._padded_shape[1:]])
            for held, part in zip(rows, self.parts, strict=True):
                if part.axis == 0:  # the rest is padding
                    count = max(min(len(held), part.stop - part.start - first), 0)
                    whole[part.start + first : part.start + first + count] = held[:count]
                else:
                    whole[first : first + len(held), part.places] = held[:, : part.stop - part.start]
            first += rows.shape[1]
        return whole

    def take_part(self) -> None:
        collections.deque(self._pieces(), maxlen=0)  # drops each piece before the next is gathered

    @property
    def _padded_shape(self) -> list[int]:
        """Of a part; collectives need equal shapes."""
        shape, axis = list(self.shape), self.parts[0].axis
        shape[axis] = max(part.stop - part.start for part in self.parts)
        return shape

    def _pieces(self) -> Iterator[paddle.Tensor]:
        """Some rows of every part at a time, [processes * rows * ...]."""
        own, axis, shape = self.gather().detach(), self.parts[0].axis, self._padded_shape
        missing = shape[axis] - own.shape[axis]
        if missing:
            padding = [*shape[:axis], missing, *shape[axis + 1 :]]
            own = paddle.concat([own, paddle.zeros(padding, dtype=own.dtype)], axis=axis)
        rows = max(_AT_ONCE // (len(self.parts) * math.prod(shape[1:])), 1)
        for start in range(0, shape[0], rows):
            yield _one_after_the_other(own[start : start + rows], self.group)


def _on_host(tensor: paddle.Tensor) -> np.ndarray:
    return np.asarray(tensor.numpy())


def whole_weight(parameter: paddle.Tensor, layout: Layout) -> WholeTensor:
    """A weight, trained or frozen."""

    def gather() -> paddle.Tensor:
        # Stage3 has some weights whole for the layer that is next; it gathers by the same test, so that a weight is
        # whole on all processes or on none.
        part = getattr(parameter, "fw_storage", None)
        return parameter if part is None else _joined(part, layout)

    own = WholeTensor(_dtype(parameter), tuple(parameter.shape), gather, _is_sliced(parameter))
    return _of_all_parts(own, part_of(parameter), layout)


def whole_states(
    parameters: Mapping[str, paddle.Tensor], optimizer: Any, layout: Layout
) -> Iterator[tuple[str, WholeTensor]]:
    """Key -> tensor of everything that the optimiser keeps for the weights that train.

    A weight that had no gradient yet has the state that its first gradient would begin with.

    Args:
        parameters: of the model, by our names; those that do not train are left out.
        optimizer: as Fleet or PaddleNLP has wrapped it.

    Returns:
        Pairs of `<our name>|<kind>` and tensor: the same on every process, in the order of the weights.
    """
    adamw, holders = adamw_of(optimizer), state_holders(optimizer)
    for name, parameter in parameters.items():
        if parameter.stop_gradient:
            continue
        for kind in (*_MOMENTS, *FACTORS, *((MASTER,) if has_master(adamw, parameter) else ())):
            yield f"{name}|{kind}", _whole_state(adamw, holders.get(parameter.name), parameter, kind, layout)


def _whole_state(adamw: Any, holder: int | None, parameter: paddle.Tensor, kind: str, layout: Layout) -> WholeTensor:
    """One state of a weight.

    Args:
        holder: rank in the sharding group of the only process that has it whole; None where all have it or a slice.
    """
    shape = (1,) if kind in FACTORS else tuple(parameter.shape)
    is_sliced = _is_sliced(parameter) and kind not in FACTORS

    def gather() -> paddle.Tensor:
        if holder is not None and holder != layout.sharding_rank:
            return _from_holder(paddle.empty(shape, dtype="float32"), holder, layout)
        own = states_of(adamw, parameter).get(kind)
        # Before the first gradient there are no slices yet either.
        own, is_part = (_start(adamw, parameter, kind), False) if own is None else (own, is_sliced)
        if holder is not None:
            return _from_holder(_on_device(own), holder, layout)
        return _joined(own, layout) if is_part else own

    own = WholeTensor("float32", shape, gather, is_sliced or holder is not None)
    return own if kind in FACTORS else _of_all_parts(own, part_of(parameter), layout)


def _of_all_parts(own: WholeTensor, part: Part | None, layout: Layout) -> WholeTensor:
    """The whole tensor of which the processes of the tensor group have parts.

    Args:
        own: this process's part, whole when it has been gathered from its sharding group.
        part: which one it is; None where the tensor is whole on every process.
    """
    if part is None:
        return own
    shape = (*own.shape[: part.axis], part.size, *own.shape[part.axis + 1 :])
    parts = all_parts(part, layout.tensor_degree)
    return WholeOfParts(own.dtype, shape, own.gather, is_shared=True, parts=parts, group=layout.tensor_group)


def _start(adamw: Any, parameter: paddle.Tensor, kind: str) -> paddle.Tensor:
    """The whole state that paddle begins with at a weight's first gradient."""
    if kind == MASTER:
        return parameter.detach().astype("float32")
    if kind in _MOMENTS:
        return paddle.zeros(parameter.shape, dtype="float32")
    return paddle.full([1], {"beta1_pow_acc": adamw._beta1, "beta2_pow_acc": adamw._beta2}[kind], dtype="float32")


def _from_holder(tensor: paddle.Tensor, holder: int, layout: Layout) -> paddle.Tensor:
    """The holder's tensor on every process of the sharding group; elsewhere its numbers are overwritten."""
    group = layout.sharding_group
    with paddle.no_grad():
        dist.broadcast(tensor, src=group.ranks[holder], group=group)
    return tensor


def _joined(part: paddle.Tensor, layout: Layout) -> paddle.Tensor:
    """The slices of all processes of the sharding group one after the other, with stage3's padding at the end."""
    return _one_after_the_other(part.detach(), layout.sharding_group)


def _one_after_the_other(own: paddle.Tensor, group: Any) -> paddle.Tensor:
    """The numbers of tensors of one shape, flat, by the rank of their processes in a group."""
    # Into one tensor, as stage3 does it: a list of parts would have to be joined, in twice the memory.
    whole = paddle.empty([math.prod(own.shape) * group.nranks], dtype=own.dtype)
    group.process_group.all_gather(_on_device(own).contiguous().reshape([-1]), whole).wait()
    return whole


def _on_device(tensor: paddle.Tensor) -> paddle.Tensor:
    # Factors of the moments are on the host, where an accelerator's collectives do not reach.
    if tensor.place.is_cpu_place() and paddle.get_device() != "cpu":
        return paddle.to_tensor(tensor.numpy())
    return tensor


def _is_sliced(parameter: paddle.Tensor) -> bool:
    return hasattr(parameter, "fw_storage")


def _dtype(tensor: paddle.Tensor) -> str:
    return str(tensor.dtype).rsplit(".", 1)[-1]  # "paddle.float32"
