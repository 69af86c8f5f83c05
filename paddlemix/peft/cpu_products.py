"""Codes multiplied and decoded in C (models/kernels/quantized_kernels.c), where paddle needs many passes.

Decoded numbers equal those of the plain form bit for bit, products up to rounding.  `can_decode` and `is_faster` are
false if the kernels are missing or a tensor is of another kind or device; the layer then computes the plain form.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import paddle

from paddlemix.models.kernels import cpu_library
from paddlemix.peft.quantized_weight import NF4_LEVELS
from paddlemix.peft.weight_parts import ScalePlaces

MOST_ROWS = 48  # for more, decoding the weights and a library's product are faster
_KINDS = ("int8", "nf4")

Arrays = Mapping[str, paddle.Tensor]  # of `quantized_weight.stored_arrays`, by name


def can_decode(kind: str, arrays: Arrays) -> bool:
    """Whether `decode_` supports a weight."""
    if kind not in _KINDS or not cpu_library.is_supported(*_scales(kind, arrays)):
        return False
    return all(array.place.is_cpu_place() and array.is_contiguous() for array in arrays.values())


def is_faster(kind: str, arrays: Arrays, inputs: paddle.Tensor) -> bool:
    """Whether `product` supports inputs [n, in] and is the faster way for them."""
    return 1 <= inputs.shape[0] <= MOST_ROWS and can_decode(kind, arrays) and cpu_library.is_supported(inputs)


def product(kind: str, arrays: Arrays, places: ScalePlaces, inputs: paddle.Tensor) -> paddle.Tensor:
    """float32 [n, in] -> [n, out], without a gradient; no weight is decoded to memory.

    The codes are read once for 16 rows.  A row's numbers do not depend on the others.

    Args:
        places: of nf4 blocks in the weight that the arrays are of, or of a part of.
    """
    # inner * columns numbers are decoded, by which the library chooses its number of threads
    (rows, inner), columns = inputs.shape, arrays["weight_codes"].shape[0]
    outputs = paddle.empty([rows, columns], dtype="float32")
    held = _held(kind, arrays, places)
    cpu_library.run(f"{kind}_product", inner * columns, rows, inner, columns, inputs, *held, outputs)
    return outputs


def decode_(
    rows: paddle.Tensor, kind: str, arrays: Arrays, places: ScalePlaces, first: int = 0, scaled: bool = True
) -> paddle.Tensor:
    """Fills float32 [n, in] with the weights of n outputs from `first` on.

    Args:
        places: see `product`.
        scaled: False leaves out the factors that int8 has per output.
    """
    count, inner = rows.shape
    held = _held(kind, arrays, places)
    if kind == "int8" and not scaled:
        held = (held[0], None)  # a null pointer, for which the kernel takes 1
    cpu_library.run(f"{kind}_widen", count * inner, first, count, inner, *held, rows)
    return rows


def _held(kind: str, arrays: Arrays, places: ScalePlaces) -> tuple[paddle.Tensor | int | None, ...]:
    """What a kernel reads of a weight, in its order."""
    codes, scales = arrays["weight_codes"], _scales(kind, arrays)
    return (codes, *scales) if kind == "int8" else (codes, arrays["weight_scale_codes"], *scales, _levels(), *places)


def _scales(kind: str, arrays: Arrays) -> tuple[paddle.Tensor, ...]:
    """float32."""
    if kind == "int8":
        return (arrays["weight_scale"],)
    return arrays["weight_scale_steps"], arrays["weight_scale_offset"]


@functools.cache
def _levels() -> paddle.Tensor:
    """float32 [16]."""
    return paddle.to_tensor(NF4_LEVELS, place=paddle.CPUPlace())
