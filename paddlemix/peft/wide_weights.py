"""Weights of quantised layers decoded on an accelerator: those of one decoder layer together, in few operators.

An operator costs a card's host about the same time whatever its size, so layers that are used in quick succession form
a group: the first that is called decodes the weights of all of them ("wide" ones), the others find them.  The next
group replaces the last, so that one decoder layer is wide at a time, also in the backward pass and under recomputation,
where each is needed twice in a row.  Numbers are level times scale in float32, rounded once.

Every operator here exists on NPU for its type: codes in int8 are never sliced or joined, but cast first.  The CPU's way
is in `quantized_linear.py`, whose layers these are; formats are in `quantized_weight.py`.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import paddle

from paddlemix.models.kernels.functions import as_type
from paddlemix.peft.quantized_weight import NF4_BLOCK, NF4_LEVELS, padded_size

# Of float32 numbers that exist at once while a group is decoded; a decoder layer of 7B is two such pieces.
WIDE_BYTES = 512 * 1024**2
FLOAT32 = 4
_LEAST_BLOCK = 64  # numbers that share a factor: layers of int8 whose inputs have no larger divisor stay apart


@dataclass(frozen=True)
class _Span:
    """Outputs first..last of one member of a group; all of them where `last` is its size."""

    member: int
    first: int
    last: int


@dataclass(frozen=True)
class _Piece:
    """What is decoded at once.

    Args:
        spans: in this order.
        block: numbers that share a factor.
        factors: float32 [numbers / block, 1].
    """

    spans: tuple[_Span, ...]
    block: int
    factors: paddle.Tensor


class WideGroup:
    """Quantised layers that are used together, and their wide weights while they are in use.

    Args:
        members: `QuantizedLinear`s of one kind, which keep the group as their own.
    """

    _current: weakref.ref[WideGroup] | None = None  # the one group whose weights are wide

    def __init__(self, members: Sequence[Any]) -> None:
        self._members = list(members)
        self._pieces: list[_Piece] | None = None
        self._wide: list[paddle.Tensor] = []
        self._dtype: paddle.dtype | None = None

    def weight(self, layer: Any, dtype: paddle.dtype) -> paddle.Tensor:
        """[out, in] of a member in a dtype; the others' are decoded with it, and another group's are dropped."""
        if not self._wide or self._dtype != dtype:
            previous = WideGroup._current() if WideGroup._current is not None else None
            if previous is not None:
                previous._wide = []
            # a weak reference: the last group of a model that is gone must not keep its weights alive
            WideGroup._current = weakref.ref(self)
            self._wide, self._dtype = self.made(dtype), dtype
        return self._wide[self._members.index(layer)]

    def made(self, dtype: paddle.dtype) -> list[paddle.Tensor]:
        """[out, in] of every member, newly decoded."""
        with paddle.no_grad(), paddle.amp.auto_cast(enable=False):
            if self._pieces is None:
                self._pieces = [self._piece(spans) for spans in _spans([layer.weight_shape for layer in self._members])]
            parts: dict[int, list[paddle.Tensor]] = {}
            for piece in self._pieces:
                for span, rows in zip(piece.spans, self._widened(piece, dtype), strict=True):
                    parts.setdefault(span.member, []).append(rows)
        return [rows[0] if len(rows) == 1 else paddle.concat(rows) for _, rows in sorted(parts.items())]

    @property
    def numbers(self) -> int:
        """Of all weights; 0 if they are used as they are stored."""
        return sum(math.prod(layer.weight_shape) for layer in self._members if layer.kind in ("int8", "nf4"))

    def forget(self) -> None:
        """Codes were replaced or moved."""
        self._pieces, self._wide = None, []

    def _piece(self, spans: tuple[_Span, ...]) -> _Piece:
        # nf4 has a factor per 64 numbers; int8 one per output, repeated so that one product serves layers of all widths
        block = NF4_BLOCK
        if self._members[spans[0].member].kind == "int8":
            block = math.gcd(*(self._members[span.member].weight_shape[0] for span in spans))
        factors = [_factors(self._members[span.member], span, block) for span in spans]
        return _Piece(spans, block, factors[0] if len(factors) == 1 else paddle.concat(factors))

    def _widened(self, piece: _Piece, dtype: paddle.dtype) -> list[paddle.Tensor]:
        """[outputs, in] of each span."""
        layers = [self._members[span.member] for span in piece.spans]
        nf4 = layers[0].kind == "nf4"
        codes = [_codes(layer, span) for layer, span in zip(layers, piece.spans, strict=True)]
        cast = [part.astype("int32" if nf4 else "float32").reshape([-1]) for part in codes]
        numbers = cast[0] if len(cast) == 1 else paddle.concat(cast)
        del cast  # here and below: what is not needed is freed before the next large tensor
        if nf4:
            numbers = paddle.gather(four_levels(str(numbers.place)), numbers + 2**15)
        numbers = numbers.reshape([-1, piece.block]) * piece.factors
        flat = as_type(numbers, dtype).reshape([-1])
        del numbers
        widths = [padded_size(layer.weight_shape[0]) if nf4 else layer.weight_shape[0] for layer in layers]
        sizes = [(span.last - span.first) * width for span, width in zip(piece.spans, widths, strict=True)]
        parts = [flat] if len(sizes) == 1 else paddle.split(flat, sizes)
        rows = [part.reshape([-1, width]) for part, width in zip(parts, widths, strict=True)]
        return [
            part[:, : layer.weight_shape[0]] if _is_padded(layer) else part
            for part, layer in zip(rows, layers, strict=True)
        ]


def bytes_besides(largest: int, numbers: int, size: int) -> int:
    """Memory of weights off the CPU besides their codes, while a model is used, bytes.

    Args:
        largest: weights of the largest group.
        numbers: weights of all groups, each with its share of a decoded scale.
        size: bytes of a number that is computed with.
    """
    return size * largest + 2 * min(FLOAT32 * largest, WIDE_BYTES) + FLOAT32 * numbers // NF4_BLOCK


@functools.lru_cache(maxsize=8)
def four_levels(place: str) -> paddle.Tensor:
    """float32 [65536, 4] on the current device: the four weights of two bytes, by their value as int16 plus 2**15."""
    both = np.arange(-(2**15), 2**15, dtype=np.int16).view(np.uint8).reshape(-1, 2)
    return paddle.to_tensor(NF4_LEVELS[np.stack([both >> 4, both & 15], axis=-1).reshape(-1, 4)])


def _spans(shapes: list[tuple[int, int]]) -> list[tuple[_Span, ...]]:
    """What is decoded at once, of weights (in, out): as many as fit, or some outputs of one."""
    pieces: list[tuple[_Span, ...]] = []
    room, block = 0, 0
    for member, (width, outputs) in enumerate(shapes):
        size = FLOAT32 * padded_size(width) * outputs
        # joined weights are multiplied by their factors in rows of one length, which must divide all widths
        shared = math.gcd(block, width)
        if pieces and size <= room and (shared >= _LEAST_BLOCK or shared == width == block):
            pieces[-1] += (_Span(member, 0, outputs),)
            room, block = room - size, shared
            continue
        step = min(max(WIDE_BYTES // (FLOAT32 * padded_size(width)), 1), outputs)
        pieces += [(_Span(member, first, min(first + step, outputs)),) for first in range(0, outputs, step)]
        room, block = (WIDE_BYTES - size, width) if step == outputs else (0, 0)
    return pieces


def _is_padded(layer: Any) -> bool:
    return layer.kind == "nf4" and bool(layer.weight_shape[0] % NF4_BLOCK)


def _codes(layer: Any, span: _Span) -> paddle.Tensor:
    codes, outputs = layer.weight_codes, layer.weight_shape[1]
    if span.last - span.first == outputs:
        return codes
    if layer.kind == "nf4":
        return codes[span.first : span.last]  # int16, which NPU slices
    # int8 cannot be sliced on NPU, but split
    sizes = [size for size in (span.first, span.last - span.first, outputs - span.last) if size]
    return paddle.split(codes, sizes)[1 if span.first else 0]


def _factors(layer: Any, span: _Span, block: int) -> paddle.Tensor:
    """float32 [n, 1]: of every `block` numbers of some outputs, row by row."""
    if layer.kind == "int8":
        count = layer.weight_shape[0] // block
        rows = layer.weight_scale[span.first : span.last].unsqueeze(-1)
        return rows.expand([span.last - span.first, count]).reshape([-1, 1])
    return block_scales(layer, slice(span.first, span.last))


def block_scales(layer: Any, outputs: slice) -> paddle.Tensor:
    """float32 [n, 1]: the factor of each nf4 block of some outputs.

    Args:
        layer: a `QuantizedLinear`; where it has a part of a weight, its blocks have the steps of their places in it.
    """
    blocks = padded_size(layer.weight_shape[0]) // NF4_BLOCK
    # Cast first: int8 cannot be sliced on NPU.
    codes = layer.weight_scale_codes.astype("float32").reshape([-1])[outputs.start * blocks : outputs.stop * blocks]
    groups = paddle.to_tensor(layer.scale_places.groups(outputs, blocks))
    steps = paddle.gather(layer.weight_scale_steps, groups)
    return (codes * steps + layer.weight_scale_offset).unsqueeze(-1)
