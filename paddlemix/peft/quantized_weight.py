"""How a linear layer's weight is stored in few bits: the formats, as numpy arrays.

| kind              | stored                                                         | bytes per weight |
|-------------------|----------------------------------------------------------------|------------------|
| int8              | one step per output: absmax / 127                              | 1                |
| nf4               | 4 bits per weight, a scale per 64 inputs, the scales in int8   | 0.516            |
| bfloat16, float16 | the rounded weight                                             | 2                |

Everything is output-major, [out, in], as in torch: some outputs can be decoded without the others, and a torch
checkpoint is read without transposing a matrix.  Knows no layer and no file.

Source: Dettmers et al. 2023, "QLoRA" (section 3; levels from appendix E).  The order of codes is that of bitsandbytes:
blocks run along the inputs, the first weight of a pair is in the upper four bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import paddle

from paddlemix.errors import UserError, did_you_mean
from paddlemix.parallel.tensor.parts import Part

KINDS = ("int8", "nf4", "bfloat16", "float16")
NF4_BLOCK = 64  # weights per scale
SCALE_GROUP = 256  # nf4 scales per step of their own
_INT8_MAX = 127
_PIECE = 1 << 18  # weights that are quantised at once: they stay in the processor's cache
# Source: "QLoRA", appendix E
NF4_LEVELS = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    dtype=np.float32,
)

# name -> type and shape of an array
Stored = dict[str, tuple[np.dtype, tuple[int, ...]]]


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight in one of the formats.

    Args:
        kind: one of `KINDS`.
        shape: (in, out) of the original weight.
        arrays: what is stored, by name; names, types and shapes are those of `stored_arrays`.
    """

    kind: str
    shape: tuple[int, int]
    arrays: dict[str, np.ndarray]

    @property
    def num_bytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for array in self.arrays.values())


def check_kind(kind: str) -> None:
    """Checks that a format exists.

    Raises:
        UserError: it does not.
    """
    if kind not in KINDS:
        raise UserError(f"quantisation '{kind}' is not one of {', '.join(KINDS)}{did_you_mean(kind, KINDS)}")


def padded_size(in_features: int) -> int:
    """Inputs that nf4 codes cover: the last block is filled with zeros."""
    return -(-in_features // NF4_BLOCK) * NF4_BLOCK


def stored_arrays(kind: str, in_features: int, out_features: int) -> Stored:
    """Name -> numpy type and shape of the arrays of a weight [in, out]; bfloat16 is uint16.

    Raises:
        UserError: unknown kind.
    """
    check_kind(kind)
    if kind == "int8":
        codes = (np.dtype(np.int8), (out_features, in_features))
        return {"weight_codes": codes, "weight_scale": (np.dtype(np.float32), (out_features,))}
    if kind == "nf4":
        # two codes per byte; per block of 64 a scale in int8, per 256 scales a step, and one offset for all
        inputs = padded_size(in_features)
        groups = -(-out_features * (inputs // NF4_BLOCK) // SCALE_GROUP)
        return {
            "weight_codes": (np.dtype(np.uint8), (out_features, inputs // 2)),
            "weight_scale_codes": (np.dtype(np.int8), (groups, SCALE_GROUP)),
            "weight_scale_steps": (np.dtype(np.float32), (groups,)),
            "weight_scale_offset": (np.dtype(np.float32), (1,)),
        }
    dtype = np.dtype(np.uint16 if kind == "bfloat16" else np.float16)
    return {"weight_values": (dtype, (out_features, in_features))}


def quantize_weight(array: np.ndarray, kind: str, part: Part | None = None) -> QuantizedWeight:
    """A weight in one of the formats; needs little memory beyond the result.

    Args:
        array: [in, out], float32, float16 or bfloat16 as uint16; fastest as the transpose of a row-major [out, in].
        kind: one of `KINDS`.
        part: of the weight whose codes are wanted, in whole blocks; of nf4, whose codes take long, others may be
            zeros.  Scales are of the whole.

    Raises:
        UserError: unknown kind, a weight is not finite, or too large for float16.
    """
    in_features, out_features = array.shape
    arrays = {name: np.zeros(shape, dtype) for name, (dtype, shape) in stored_arrays(kind, *array.shape).items()}
    if kind == "nf4":
        _fill_nf4(arrays, array, part)
    else:
        fill = _fill_int8 if kind == "int8" else _fill_half
        for start, rows in _row_pieces(array):
            fill({name: held[start : start + len(rows)] for name, held in arrays.items()}, rows)
    return QuantizedWeight(kind, (in_features, out_features), arrays)


def _is_wanted(part: Part | None, start: int, count: int) -> bool:
    """Whether some of these outputs are in a part."""
    return part is None or part.axis == 0 or (start < part.stop and part.start < start + count)


def _row_pieces(array: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """(first output, float32 [some outputs, in]) of a weight [in, out]."""
    step = max(_PIECE // max(array.shape[0], 1), 1)
    for start in range(0, array.shape[1], step):
        piece = np.ascontiguousarray(array[:, start : start + step].T)
        if piece.dtype == np.uint16:
            piece = (piece.astype(np.uint32) << 16).view(np.float32)
        rows = piece.astype(np.float32, copy=False)
        # a NaN would become an ordinary code, and nobody could find it afterwards
        if not np.isfinite(rows).all():
            raise UserError("it holds a number that is not finite; the checkpoint is damaged or its training diverged")
        yield start, rows


def _fill_int8(held: dict[str, np.ndarray], rows: np.ndarray) -> None:
    scale = np.abs(rows).max(axis=1, initial=0.0) / np.float32(_INT8_MAX)
    held["weight_scale"][:] = scale
    held["weight_codes"][:] = _nearest_steps(rows, scale)


def _nearest_steps(rows: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """float32 [n, m] in whole steps, one step per row; halves round to even; a step of 0 yields 0."""
    codes = rows / np.where(steps > 0, steps, np.float32(np.inf))[:, None]
    return np.clip(np.rint(codes, out=codes), -_INT8_MAX, _INT8_MAX, out=codes)


def _fill_half(held: dict[str, np.ndarray], rows: np.ndarray) -> None:
    values = held["weight_values"]
    if values.dtype == np.float16:
        largest = float(np.abs(rows).max(initial=0.0))
        if largest > float(np.finfo(np.float16).max):
            raise UserError(f"its weight of size {largest:g} is too large for float16; use bfloat16")
        values[:] = rows
    else:
        # numpy has no bfloat16; paddle rounds to nearest even
        values[:] = paddle.to_tensor(rows, place=paddle.CPUPlace()).astype("bfloat16").numpy()


def _fill_nf4(arrays: dict[str, np.ndarray], array: np.ndarray, part: Part | None) -> None:
    in_features, out_features = array.shape
    inputs = padded_size(in_features)
    first, last = 0, inputs // NF4_BLOCK  # wanted blocks of an output
    if part is not None and part.axis == 0:
        first, last = part.start // NF4_BLOCK, padded_size(part.stop) // NF4_BLOCK
    scales = np.zeros((out_features, inputs // NF4_BLOCK), np.float32)
    for start, rows in _row_pieces(array):
        if inputs > in_features:
            rows = np.pad(rows, ((0, 0), (0, inputs - in_features)))
        blocks = rows.reshape(len(rows), -1, NF4_BLOCK)
        largest = np.abs(blocks).max(axis=2)
        scales[start : start + len(rows)] = largest
        if not _is_wanted(part, start, len(rows)):
            continue
        blocks, largest = blocks[:, first:last], largest[:, first:last]
        # a block of zeros has no largest number; its codes are those of 0
        codes = nearest_levels(blocks / np.where(largest > 0, largest, np.float32(1))[:, :, None])
        pairs = codes.reshape(len(rows), -1, 2)
        held = arrays["weight_codes"][start : start + len(rows), first * NF4_BLOCK // 2 : last * NF4_BLOCK // 2]
        held[:] = pairs[:, :, 0] << 4 | pairs[:, :, 1]
    _fill_scales(arrays, scales)


def nearest_levels(values: np.ndarray) -> np.ndarray:
    """Indices of the NF4 levels nearest to float32 values in -1..1; halfway between two, the lower one.

    Returns:
        uint8, 0..15, of the same shape.
    """
    codes = np.zeros(values.shape, np.uint8)
    above = np.empty(values.shape, np.bool_)
    for threshold in _thresholds():  # 15 passes over a piece in the cache take a tenth of a binary search's time
        np.greater(values, threshold, out=above)
        np.add(codes, above.view(np.uint8), out=codes)
    return codes


def _thresholds() -> np.ndarray:
    """float32 [15]: the largest numbers that are not above the middle of two neighbouring levels."""
    wide = NF4_LEVELS.astype(np.float64)
    middles = (wide[1:] + wide[:-1]) / 2
    rounded = middles.astype(np.float32)
    return np.where(rounded > middles, np.nextafter(rounded, np.float32(-np.inf)), rounded)


def _fill_scales(arrays: dict[str, np.ndarray], scales: np.ndarray) -> None:
    """Quantises the scales: their mean is subtracted, the rest is int8 with one step per group of 256."""
    offset = np.float32(scales.mean(dtype=np.float64) if scales.size else 0)
    codes = arrays["weight_scale_codes"]
    rest = np.zeros(codes.size, np.float32)
    rest[: scales.size] = scales.reshape(-1) - offset
    groups = rest.reshape(codes.shape)
    steps = np.abs(groups).max(axis=1, initial=0.0) / np.float32(_INT8_MAX)
    arrays["weight_scale_offset"][0] = offset
    arrays["weight_scale_steps"][:] = steps
    codes[:] = _nearest_steps(groups, steps)
