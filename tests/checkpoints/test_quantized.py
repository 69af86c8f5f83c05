"""Quantised checkpoints: coded while they are read, saved and loaded bit for bit, by path alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import paddle
import pytest
from paddle.base import core

from paddlemix.checkpoints.adapters.adapter import AdapterSettings
from paddlemix.checkpoints.adapters.base_check import base_mark
from paddlemix.checkpoints.adapters.base_places import base_reference
from paddlemix.checkpoints.base_model import BaseSpec
from paddlemix.checkpoints.files.tensors import TensorEntry, array_entry
from paddlemix.checkpoints.files.weight_files import (
    read_json,
    read_weights,
    write_json,
    write_safetensors,
    write_weights,
)
from paddlemix.checkpoints.load import load_base, load_pretrained
from paddlemix.checkpoints.pretrained import Pretrained, build_model, save_model
from paddlemix.checkpoints.quantized import QUANTIZATION_KEY
from paddlemix.errors import UserError
from paddlemix.generation.generate import generate
from paddlemix.generation.sampling import GenerationSettings
from paddlemix.models.configuration import DecoderConfig, LlavaConfig
from paddlemix.peft.lora import LoRAConfig, add_lora, lora_parameters, merge_lora
from paddlemix.peft.quantize import QuantizationConfig, quantize_model, quantized_linears
from paddlemix.peft.quantized_weight import KINDS
from paddlemix.sample import Message
from paddlemix.tools import quantize
from paddlemix.tools.common.command import run_command
from tests.tiny_models import GOLDEN, GOLDEN_MODELS, dequantize_model, draw, randomise, save_adapter
from tests.tiny_world import World

NAME = "language_model.layers.0.self_attn.q_proj"
MEBIBYTE = 2**20


def codes(model: paddle.nn.Layer) -> dict[str, bytes]:
    """Every array of every quantised layer."""
    return {
        f"{name}.{part}": layer.stored(part).tobytes()
        for name, layer in quantized_linears(model).items()
        for part in layer.arrays
    }


def bits(directory: Path) -> dict[str, tuple[str, bytes]]:
    return {name: (entry.dtype, entry.read().tobytes()) for name, entry in read_weights(directory).items()}


def own(directory: Path) -> dict[str, TensorEntry]:
    """A directory's weights, in memory."""
    return {name: array_entry(np.array(entry.read()), entry.dtype) for name, entry in read_weights(directory).items()}


@pytest.fixture
def saved(world: World, tmp_path: Path) -> Path:
    """The world's model in int8."""
    directory = tmp_path / "int8"
    assert (
        run_command(quantize.main, ["--model-path", str(world.model), "--output", str(directory), "--kind", "int8"])
        == 0
    )
    return directory


@pytest.mark.parametrize("layout", ["hf", "original"])
@pytest.mark.parametrize("kind", KINDS)
def test_coded_while_read_equals_coded_in_memory(kind: str, layout: str) -> None:
    """From output-major files too, whose matrices are not turned."""
    path = str(GOLDEN / GOLDEN_MODELS[1] / layout)
    plain, read = load_pretrained(path), load_pretrained(path, quantize=kind)
    quantize_model(plain.model, QuantizationConfig(kind=kind))
    assert codes(read.model) == codes(plain.model)
    for (name, expected), (_, found) in zip(plain.model.named_parameters(), read.model.named_parameters(), strict=True):
        assert found.numpy().tobytes() == expected.numpy().tobytes(), name


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_by_path_alone(world: World, tmp_path: Path, kind: str) -> None:
    loaded = load_pretrained(world.model, quantize=kind)
    save_model(loaded, tmp_path / "first", max_shard_bytes=20_000)
    declared = read_json(tmp_path / "first" / "config.json")[QUANTIZATION_KEY]
    assert declared == {"quant_method": "paddlemix", "kind": kind, "skip": []}
    assert f"{NAME}.weight" not in read_weights(tmp_path / "first")
    for again in (load_pretrained(tmp_path / "first"), load_base(BaseSpec(model=str(tmp_path / "first")))):
        assert codes(again.model) == codes(loaded.model)
    save_model(again, tmp_path / "second", max_shard_bytes=20_000)
    assert bits(tmp_path / "second") == bits(tmp_path / "first")


def test_layers_left_out_are_declared(world: World, tmp_path: Path) -> None:
    loaded = load_pretrained(world.model)
    quantize_model(loaded.model, QuantizationConfig(kind="nf4", skip=("*.down_proj",)))
    save_model(loaded, tmp_path / "some")
    again = load_pretrained(tmp_path / "some")
    assert codes(again.model) == codes(loaded.model)
    assert isinstance(again.model.language_model.layers[0].mlp.down_proj, paddle.nn.Linear)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_quantised_model_answers(world: World, kind: str) -> None:
    """As the float model with the same weights does, token for token."""
    loaded = load_pretrained(world.model, quantize=kind)
    assert loaded.processor is not None
    prompt = loaded.processor.encode_prompt([Message(role="user", content=("How many?",))], [])
    settings = GenerationSettings(max_new_tokens=8)
    answer = generate(loaded.model, [prompt], settings, end_ids=())
    dequantize_model(loaded.model)
    assert generate(loaded.model, [prompt], settings, end_ids=()) == answer
    assert len(answer[0]) == 8


def test_a_float_weight_is_never_there_in_full(tmp_path: Path) -> None:
    """8 MiB of weights: loading takes the codes, the rest and little more."""
    text = DecoderConfig(
        vocab_size=32, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4
    )
    directory = tmp_path / "model"
    save_model(Pretrained(randomise(build_model(LlavaConfig(text=text))), None, directory), directory)
    size = sum(entry.num_bytes for entry in read_weights(directory).values())
    assert size > 10 * MEBIBYTE
    read = core.host_memory_stat_current_value
    before = read("Allocated", 0)
    core.host_memory_stat_reset_peak_value("Allocated", 0)
    loaded = load_pretrained(directory, quantize="nf4")
    assert core.host_memory_stat_peak_value("Allocated", 0) - before < 0.2 * size
    assert len(quantized_linears(loaded.model)) == 28


def test_an_adapter_of_a_float_base_stands_on_a_quantised_one(adapter: Path) -> None:
    held = load_pretrained(adapter, quantize="nf4")
    assert f"{NAME}.base" in quantized_linears(held.model)
    count = len(quantized_linears(held.model))
    assert merge_lora(held.model) == count
    assert not quantized_linears(held.model)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_an_adapter_remembers_how_its_base_was_held(world: World, tmp_path: Path, kind: str) -> None:
    """Trained on a quantised base, loaded by its path alone on the same one: the same logits, bit for bit."""
    spec = BaseSpec(model=str(world.model), quantize=kind)
    loaded = load_base(spec)
    config = LoRAConfig(r=2, modules=tuple(quantized_linears(loaded.model)))
    mark = base_mark(loaded)
    add_lora(loaded.model, config)
    for number, (_, parameter) in enumerate(lora_parameters(loaded.model)):
        parameter.set_value(0.1 * draw(*parameter.shape, seed=number))
    directory = tmp_path / "adapter"
    settings = AdapterSettings(config, base_reference(spec, directory), mark)
    for parameter in loaded.model.parameters():
        parameter.stop_gradient = True
    save_adapter(loaded.model, loaded.processor, settings, directory)
    again = load_pretrained(directory)
    assert {layer.kind for layer in quantized_linears(again.model).values()} == {kind}
    assert logits(again).tobytes() == logits(loaded).tobytes()
    assert np.abs(logits(again) - logits(load_base(spec))).max() > 1e-3


def logits(loaded: Pretrained) -> np.ndarray:
    with paddle.no_grad():
        hidden = loaded.model(paddle.to_tensor([[1, 5, 7]]), paddle.arange(3).unsqueeze(0))
        return loaded.model.logits(hidden).numpy()


def test_the_command_writes_what_loading_gives(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model-path", str(world.model), "--output", str(tmp_path / "out"), "--kind", "nf4"]
    assert run_command(quantize.main, arguments) == 0
    assert "wrote 14 layers" in capsys.readouterr().out
    assert codes(load_pretrained(tmp_path / "out").model) == codes(load_pretrained(world.model, quantize="nf4").model)
    assert run_command(quantize.main, arguments) == 2
    assert "exists and is not empty" in capsys.readouterr().err


def test_the_command_refuses_a_quantised_model(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for kind in ("int8", "nf4"):
        arguments = ["--model-path", str(saved), "--output", str(tmp_path / "out"), "--kind", kind]
        assert run_command(quantize.main, arguments) == 2
        assert f"{saved} is already quantised (int8)" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_quantised_model_does_not_become_another_kind(saved: Path) -> None:
    assert quantized_linears(load_pretrained(saved, quantize="int8").model)
    with pytest.raises(UserError, match=r"quantised already \(int8\), so it cannot become nf4"):
        load_pretrained(saved, quantize="nf4")
    with pytest.raises(UserError, match="'int9' is not one of"):
        load_pretrained(saved, quantize="int9")


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ({"quant_method": "bitsandbytes"}, "was quantised by 'bitsandbytes', which cannot be read"),
        ({"quant_method": "paddlemix", "kind": "nf5"}, "'nf5' is not one of"),
        ({"quant_method": "paddlemix"}, "cannot be understood: KeyError"),
        ({"quant_method": "paddlemix", "kind": "nf4"}, "is I8, but its config.json declares nf4, which has U8 there"),
    ],
)
def test_a_declaration_that_does_not_fit(saved: Path, declared: dict[str, str], message: str) -> None:
    write_json(saved / "config.json", {**read_json(saved / "config.json"), QUANTIZATION_KEY: declared})
    with pytest.raises(UserError, match=message):
        load_pretrained(saved)


def test_damaged_codes_are_named(saved: Path) -> None:
    tensors = own(saved)
    name = f"{NAME}.weight_codes"
    write_weights(saved, {**tensors, name: array_entry(tensors[name].read().view(np.uint8))}, 10**9)
    with pytest.raises(
        UserError, match=rf"'{name}' of .* is U8, but its config.json declares int8, which has I8 there"
    ):
        load_pretrained(saved)
    write_weights(saved, {key: entry for key, entry in tensors.items() if key != name}, 10**9)
    with pytest.raises(UserError, match=f"1 missing: {name}"):
        load_pretrained(saved)


def test_a_misshapen_or_infinite_float_weight_is_named(world: World, tmp_path: Path) -> None:
    directory = tmp_path / "model"
    save_model(load_pretrained(world.model), directory)
    tensors = own(directory)
    name = f"{NAME}.weight"
    write_weights(directory, {**tensors, name: array_entry(np.zeros((3, 4), np.float32))}, 10**9)
    with pytest.raises(UserError, match=rf"misshapen: {name} is \[3, 4\], expected \[32, 32\]"):
        load_pretrained(directory, quantize="int8")
    infinite = array_entry(np.full((32, 32), np.inf, np.float32))
    write_safetensors(directory / "model.safetensors", {**tensors, name: infinite})
    with pytest.raises(UserError, match=rf"'{name}' of \S+ holds infinity \(first at element 0\)"):
        load_pretrained(directory, quantize="int8")
