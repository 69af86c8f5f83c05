"""Formats of quantised weights against the plainest numpy that computes the same, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paddlemix.errors import UserError
from paddlemix.peft.quantized_weight import KINDS, NF4_LEVELS, nearest_levels, quantize_weight, stored_arrays
from tests.tiny_models import draw

# bitsandbytes' own numbers, typed here again so that nothing below rests on ours.
# Source: bitsandbytes functional.py, get_4bit_type("nf4"); csrc/kernels.cu, dQuantizeNF4
PUBLISHED_LEVELS = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
        *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
        *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
        *(0.7229568362236023, 1.0),
    ],
    np.float32,
)
PUBLISHED_THRESHOLDS = np.array(
    [
        *(-0.8480964004993439, -0.6106329262256622, -0.4599952697753906, -0.33967943489551544),
        *(-0.23460740596055984, -0.13791173323988914, -0.045525018125772476, 0.03979014977812767),
        *(0.1202552504837513, 0.2035212516784668, 0.2920137718319893, 0.3893125355243683, 0.5016634166240692),
        *(0.6427869200706482, 0.8614784181118011),
    ],
    np.float32,
)
SHAPES = [(64, 5), (128, 300), (100, 7), (12, 1), (1, 3), (63, 9)]


def plain_int8(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes [out, in] and scale [out], output by output."""
    codes, scales = np.zeros(weight.T.shape, np.int8), np.zeros(weight.shape[1], np.float32)
    for output, row in enumerate(weight.T):
        scales[output] = max(abs(row)) / np.float32(127)
        if scales[output]:
            codes[output] = [round(float(value / scales[output])) for value in row]
    return codes, scales


def plain_nf4(weight: np.ndarray) -> dict[str, np.ndarray]:
    """Every array, block by block; the nearest level is found by looking at all sixteen."""
    in_features, outputs = weight.shape
    padded = np.zeros((outputs, -(-in_features // 64) * 64), np.float32)
    padded[:, :in_features] = weight.T
    blocks = padded.reshape(-1, 64)
    absmax = np.array([max(abs(block)) for block in blocks], np.float32)
    numbers = []
    for block, scale in zip(blocks, absmax, strict=True):
        for value in block / scale if scale else block:
            numbers.append(int(np.argmin(np.abs(float(value) - PUBLISHED_LEVELS.astype(np.float64)))))
    codes = [16 * first + second for first, second in zip(numbers[::2], numbers[1::2], strict=True)]
    offset = np.float32(np.mean(absmax.astype(np.float64)))
    rest = np.zeros(-(-len(absmax) // 256) * 256, np.float32)
    rest[: len(absmax)] = absmax - offset
    groups = rest.reshape(-1, 256)
    steps = np.array([max(abs(group)) / np.float32(127) for group in groups], np.float32)
    scale_codes = [
        [round(float(value / step)) if step else 0 for value in group]
        for group, step in zip(groups, steps, strict=True)
    ]
    return {
        "weight_codes": np.array(codes, np.uint8).reshape(outputs, -1),
        "weight_scale_codes": np.array(scale_codes, np.int8),
        "weight_scale_steps": steps,
        "weight_scale_offset": np.array([offset], np.float32),
    }


@pytest.mark.parametrize("shape", SHAPES)
def test_int8_equals_the_plain_one(shape: tuple[int, int]) -> None:
    weight = draw(*shape)
    codes, scales = plain_int8(weight)
    arrays = quantize_weight(weight, "int8").arrays
    assert arrays["weight_codes"].tobytes() == codes.tobytes()
    assert arrays["weight_scale"].tobytes() == scales.tobytes()


@pytest.mark.parametrize("shape", SHAPES)
def test_nf4_equals_the_plain_one(shape: tuple[int, int]) -> None:
    """Sizes that are no multiple of 64 too: the last block ends in zeros."""
    weight = 0.02 * draw(*shape)
    expected = plain_nf4(weight)
    arrays = quantize_weight(weight, "nf4").arrays
    assert arrays.keys() == expected.keys()
    for name, array in expected.items():
        assert arrays[name].dtype == array.dtype, name
        assert arrays[name].tobytes() == array.tobytes(), name


@given(st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=50))
def test_the_nearest_level_of_any_number(values: list[float]) -> None:
    expected = [int(np.argmin([abs(value - float(level)) for level in NF4_LEVELS])) for value in values]
    assert nearest_levels(np.array(values, np.float32)).tolist() == expected


def test_numbers_beside_the_middle_of_two_levels() -> None:
    wide = NF4_LEVELS.astype(np.float64)
    middles = ((wide[1:] + wide[:-1]) / 2).astype(np.float32)
    near = np.concatenate([np.nextafter(middles, np.float32(-2)), middles, np.nextafter(middles, np.float32(2))])
    expected = np.abs(near.astype(np.float64)[:, None] - wide).argmin(axis=1)
    assert nearest_levels(near).tolist() == expected.tolist()


def test_the_levels_are_the_published_ones() -> None:
    assert NF4_LEVELS.tobytes() == PUBLISHED_LEVELS.tobytes()


def test_codes_are_those_of_the_published_decisions() -> None:
    """Their thresholds are the middles of levels but for 3e-7; a number in between may have another code."""
    middles = (PUBLISHED_LEVELS[1:].astype(np.float64) + PUBLISHED_LEVELS[:-1]) / 2
    assert np.abs(middles - PUBLISHED_THRESHOLDS).max() < 3e-7
    values = np.random.RandomState(0).uniform(-1, 1, 200_000).astype(np.float32)
    values = values[np.abs(values[:, None] - PUBLISHED_THRESHOLDS).min(axis=1) > 3e-7]
    expected = (values[:, None] > PUBLISHED_THRESHOLDS).sum(axis=1)
    assert len(values) > 199_000 and (nearest_levels(values) == expected).all()


def test_codes_of_a_matrix_are_bitsandbytes_bytes() -> None:
    """Blocks of 64 along a row of [out, in], divided by their largest size; the first of a pair in the upper bits."""
    weight = draw(192, 40)
    blocks = weight.T.reshape(-1, 64)
    numbers = (blocks / np.abs(blocks).max(axis=1, keepdims=True)).reshape(-1)
    codes = (numbers[:, None] > PUBLISHED_THRESHOLDS).sum(axis=1).astype(np.uint8)
    packed = codes[0::2] << 4 | codes[1::2]
    assert quantize_weight(weight, "nf4").arrays["weight_codes"].tobytes() == packed.tobytes()


def test_the_levels_are_quantiles_of_the_normal_distribution() -> None:
    """Source: "QLoRA", appendix E; bitsandbytes' create_normal_map with offset 0.9677083."""
    from statistics import NormalDist

    quantile = NormalDist().inv_cdf
    positive = [quantile(p) for p in np.linspace(0.9677083, 0.5, 9)[:-1]]
    negative = [-quantile(p) for p in np.linspace(0.9677083, 0.5, 8)[:-1]]
    levels = np.sort(np.array([*positive, 0.0, *negative]))
    np.testing.assert_allclose(NF4_LEVELS, levels / levels.max(), atol=2e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_low_precision_sources_are_coded_from_their_own_numbers(kind: str, dtype: str) -> None:
    rounded = draw(70, 6).astype(np.float16)
    bits = (draw(70, 6).view(np.uint32) >> 16).astype(np.uint16)
    source, wide = (
        (rounded, rounded.astype(np.float32))
        if dtype == "float16"
        else (bits, (bits.astype(np.uint32) << 16).view(np.float32))
    )
    assert {name: array.tobytes() for name, array in quantize_weight(source, kind).arrays.items()} == {
        name: array.tobytes() for name, array in quantize_weight(wide, kind).arrays.items()
    }


@pytest.mark.parametrize("kind", KINDS)
def test_orientation_in_memory_does_not_matter(kind: str) -> None:
    weight = draw(130, 40)
    turned = np.ascontiguousarray(weight.T).T
    first, second = quantize_weight(weight, kind), quantize_weight(turned, kind)
    for name, array in first.arrays.items():
        assert array.tobytes() == second.arrays[name].tobytes()


@pytest.mark.parametrize(("kind", "most"), [("int8", 1.02), ("nf4", 0.55), ("bfloat16", 2.0), ("float16", 2.0)])
def test_bytes_per_weight(kind: str, most: float) -> None:
    weight = quantize_weight(draw(512, 344), kind)
    assert weight.num_bytes / (512 * 344) <= most
    held = stored_arrays(kind, 512, 344)
    assert {name: (array.dtype, array.shape) for name, array in weight.arrays.items()} == held


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_are_coded_without_a_warning(kind: str) -> None:
    weight = draw(70, 4)
    weight[:, 2] = 0
    with np.errstate(all="raise"):
        arrays = quantize_weight(weight, kind).arrays
        quantize_weight(np.zeros((5, 3), np.float32), kind)
    if kind == "nf4":
        assert (arrays["weight_codes"][2] == 0x77).all()  # level 7 is 0


@pytest.mark.parametrize(
    ("value", "kind", "message"),
    [
        (np.nan, "int8", "not finite"),
        (np.inf, "nf4", "not finite"),
        (7e4, "float16", "70000 is too large for float16; use bfloat16"),
        (0.0, "int4", "quantisation 'int4' is not one of int8, nf4, bfloat16, float16; did you mean 'int8'"),
    ],
)
def test_what_cannot_be_coded(value: float, kind: str, message: str) -> None:
    weight = draw(3, 2)
    weight[1, 1] = value
    with pytest.raises(UserError, match=message):
        quantize_weight(weight, kind)
