"""Parts of quantised weights decode to exactly the numbers of the whole, and go together to its arrays again."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import numpy as np
import paddle
import pytest
from paddle import nn

from paddlemix.errors import UserError
from paddlemix.models.configuration import DecoderConfig
from paddlemix.models.kernels import cpu_library
from paddlemix.models.language_presets import LANGUAGE_MODELS
from paddlemix.parallel.tensor.parts import Part, mark_linear
from paddlemix.parallel.tensor.split_plan import allowed_degrees, linear_parts
from paddlemix.peft.quantize import QuantizationConfig, prepare_quantized
from paddlemix.peft.quantized_base import QuantizedBase
from paddlemix.peft.quantized_linear import QuantizedLinear
from paddlemix.peft.quantized_weight import KINDS, QuantizedWeight, quantize_weight
from paddlemix.peft.weight_parts import falls_on_blocks, split_arrays
from paddlemix.peft.wide_weights import WideGroup
from tests.tiny_models import draw

# in, out and the ends of parts.  Groups of 256 nf4 blocks: of 4 outputs, of 85.3 outputs, longer than the weight.
COLUMNS = [((4096, 12), (4, 12)), ((192, 300), (101, 200, 300)), ((70, 5), (2, 5)), ((512, 33), (17, 33))]
ROWS = [((4096, 12), (2048, 4096)), ((704, 50), (320, 704)), ((192, 300), (64, 128, 192)), ((150, 7), (64, 150))]
CASES = [*((1, *case) for case in COLUMNS), *((0, *case) for case in ROWS)]


def parts_of(axis: int, shape: tuple[int, int], ends: tuple[int, ...]) -> list[Part]:
    starts = (0, *ends[:-1])
    return [Part(axis=axis, start=start, stop=stop, size=shape[axis]) for start, stop in zip(starts, ends, strict=True)]


def layer_of(weight: QuantizedWeight, part: Part | None = None) -> QuantizedLinear:
    shape = list(weight.shape)
    if part is not None:
        shape[part.axis] = part.stop - part.start
    layer = QuantizedLinear(weight.kind, (shape[0], shape[1]), part=part)
    layer.fill(weight)
    return layer


@pytest.mark.parametrize("kernels_in_c", [True, False], ids=["in C", "plain"])
@pytest.mark.parametrize("kind", KINDS)
def test_parts_decode_to_the_numbers_of_the_whole(kind: str, kernels_in_c: bool) -> None:
    """At once, in pieces, in a group as off the CPU, and multiplied."""
    with contextlib.nullcontext() if kernels_in_c else cpu_library.switched_off():
        for axis, shape, ends in CASES:
            weight = quantize_weight(draw(*shape), kind)
            whole = layer_of(weight).dequantized().numpy()
            for part in parts_of(axis, shape, ends):
                layer, expected = layer_of(weight, part), part.cut(whole)
                assert layer.dequantized().numpy().tobytes() == np.ascontiguousarray(expected).tobytes()
                if kind in ("int8", "nf4"):
                    (made,) = WideGroup([layer]).made(paddle.float32)
                    assert made.numpy().T.tolist() == expected.tolist()
                inputs = draw(3, expected.shape[0])
                product = layer(paddle.to_tensor(inputs)).numpy()
                np.testing.assert_allclose(product, inputs @ expected, rtol=0, atol=1e-4 * np.abs(product).max())


def test_pieces_of_a_part_have_their_own_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paddlemix.peft.quantized_linear._WIDE_BYTES", 4 * 192 * 7)  # 7 outputs at once
    monkeypatch.setattr("paddlemix.peft.wide_weights.WIDE_BYTES", 4 * 192 * 7)
    weight = quantize_weight(draw(192, 300), "nf4")
    part = Part(axis=1, start=101, stop=200, size=300)
    layer, expected = layer_of(weight, part), layer_of(weight).dequantized().numpy().T[101:200]
    for switch in (contextlib.nullcontext, cpu_library.switched_off):
        with switch():
            rows = [rows.numpy() for _, rows in layer.wide_rows(paddle.float32, scaled=True)]
        assert len(rows) == 15
        assert np.concatenate(rows).tobytes() == np.ascontiguousarray(expected).tobytes()
    assert WideGroup([layer]).made(paddle.float32)[0].numpy().tolist() == expected.tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_parts_go_together_to_the_whole_arrays(kind: str) -> None:
    for axis, shape, ends in CASES:
        weight, parts = quantize_weight(draw(*shape), kind), parts_of(axis, shape, ends)
        held = [layer_of(weight, part) for part in parts]
        for name, array in split_arrays(kind, shape).items():
            pieces = [layer.stored(name) for layer in held]
            assert [piece.shape for piece in pieces] == [array.shape(part) for part in parts]
            if array.part(parts[0]) is None:
                assert all(piece.tobytes() == weight.arrays[name].tobytes() for piece in pieces)
            else:
                assert array.joined(pieces, axis=1 - axis).tobytes() == weight.arrays[name].tobytes()


@pytest.mark.parametrize("kind", KINDS)
def test_a_part_can_be_quantised_without_the_other_codes(kind: str) -> None:
    for axis, shape, ends in CASES:
        array = draw(*shape)
        whole = quantize_weight(array, kind)
        for part in parts_of(axis, shape, ends):
            alone = quantize_weight(array, kind, part)
            for name, split in split_arrays(kind, shape).items():
                cut = [split.cut(weight.arrays[name], part).tobytes() for weight in (whole, alone)]
                assert cut[0] == cut[1], (name, part)


def test_a_part_is_a_base_for_adapters() -> None:
    layer = layer_of(quantize_weight(draw(192, 30), "int8"), Part(axis=0, start=64, stop=192, size=192))
    assert isinstance(layer, QuantizedBase) and not isinstance(nn.Linear(2, 2), QuantizedBase)
    assert (layer.weight_shape, layer.whole_shape) == ((128, 30), (192, 30))


def test_memory_of_a_part() -> None:
    shape = (4096, 512)
    whole = QuantizedLinear("nf4", shape).num_bytes
    for axis in (0, 1):
        part = parts_of(axis, shape, (shape[axis] // 2, shape[axis]))[1]
        half = QuantizedLinear("nf4", (2048, 512) if axis == 0 else (4096, 256), part=part)
        assert half.num_bytes < 0.501 * whole  # all steps, half of the rest


def test_which_parts_have_whole_blocks() -> None:
    assert [falls_on_blocks(part) for part in parts_of(0, (192, 1), (64, 128, 192))] == [True] * 3
    assert [falls_on_blocks(part) for part in parts_of(0, (150, 1), (64, 150))] == [True] * 2
    assert [falls_on_blocks(part) for part in parts_of(0, (150, 1), (75, 150))] == [False] * 2
    assert [falls_on_blocks(part) for part in parts_of(1, (1, 150), (75, 150))] == [True] * 2


def test_parts_of_published_models_have_whole_blocks() -> None:
    for sizes in LANGUAGE_MODELS.values():
        for degree in allowed_degrees(sizes):
            for rank in range(degree):
                assert all(falls_on_blocks(part) for part in linear_parts(sizes, degree, rank).values())


def split_decoder(degree: int, rank: int) -> nn.Layer:
    """The linear layers of one decoder layer; 4 heads of 32, and 192 inner numbers."""
    sizes = DecoderConfig(
        vocab_size=8, hidden_size=128, intermediate_size=192, num_hidden_layers=1, num_attention_heads=4
    )
    model = nn.Layer()
    model.config, model.layout = SimpleNamespace(text=sizes), SimpleNamespace(tensor_degree=degree)
    model.language_model = nn.Layer()
    for name, inputs, outputs in (("q_proj", 128, 128), ("o_proj", 128, 128), ("down_proj", 192, 128)):
        part = linear_parts(sizes, degree, rank)[name]
        held = part.stop - part.start
        layer = nn.Linear(held if part.axis == 0 else inputs, held if part.axis == 1 else outputs)
        mark_linear(layer, part)
        model.language_model.add_sublayer(name, layer)
    return model


@pytest.mark.parametrize("rank", range(4))
def test_blocks_cut_by_parts_are_refused(rank: int) -> None:
    """By every process, before anything is replaced; other kinds and smaller degrees work."""
    message = (
        r"nf4 has blocks of 64 inputs, and tensor parallelism of degree 4 cuts those of "
        r"'language_model.o_proj' \(128 inputs; 2 layers in all\); use int8 .*, or a tensor_parallel_degree .* of 1, 2$"
    )
    model = split_decoder(4, rank)
    with pytest.raises(UserError, match=message):
        prepare_quantized(model, QuantizationConfig(kind="nf4"))
    assert isinstance(model.language_model.q_proj, nn.Linear)
    assert prepare_quantized(model, QuantizationConfig(kind="int8")) == 3
    assert prepare_quantized(split_decoder(2, rank % 2), QuantizationConfig(kind="nf4")) == 3
    spared = QuantizationConfig(kind="nf4", skip=("*.o_proj", "*.down_proj"))
    assert prepare_quantized(split_decoder(4, rank), spared) == 1
