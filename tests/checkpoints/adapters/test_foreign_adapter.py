"""What other programs wrote: PaddleMIX's directories, torch's shards, projector files and adapters."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest

from paddlemix.checkpoints.adapters.adapter import AdapterSettings, fingerprint, read_adapter
from paddlemix.checkpoints.base_model import BaseSpec
from paddlemix.checkpoints.convert.export_adapter import export_adapter, write_torch
from paddlemix.checkpoints.convert.export_model import to_layout
from paddlemix.checkpoints.files.pickles import read_torch
from paddlemix.checkpoints.files.tensors import TensorEntry, array_entry
from paddlemix.checkpoints.files.weight_files import (
    read_json,
    read_weights,
    write_json,
    write_safetensors,
    write_weights,
)
from paddlemix.checkpoints.layouts.weight_names import CLIP, CLIP_PADDLEMIX, LLAMA, ORIGINAL, PADDLEMIX
from paddlemix.checkpoints.load import load_base, load_pretrained
from paddlemix.checkpoints.source import Source
from paddlemix.errors import MissingFileError, UserError
from paddlemix.peft.lora import LoRAConfig, add_lora
from tests.tiny_models import GOLDEN, save_adapter

BASE = GOLDEN / "llava_v15_llama" / "original"
V16 = GOLDEN / "llava_v16_llama" / "original"


def arrays(tensors: dict[str, TensorEntry]) -> dict[str, np.ndarray]:
    return {name: np.array(entry.read()) for name, entry in tensors.items()}


def assert_same(found: dict[str, TensorEntry], wanted: dict[str, TensorEntry]) -> None:
    assert found.keys() == wanted.keys()
    for name, entry in wanted.items():
        np.testing.assert_array_equal(found[name].read(), entry.read())


def write_paddle(directory: Path, tensors: dict[str, np.ndarray], shards: int) -> None:
    """Writes what PaddleMIX and PaddleNLP write."""
    names = list(tensors)
    if shards == 1:
        paddle.save({name: paddle.to_tensor(tensors[name]) for name in names}, str(directory / "model_state.pdparams"))
        return
    weight_map = {}
    for number in range(shards):
        shard = f"model_state-{number + 1:05d}-of-{shards:05d}.pdparams"
        part = names[number::shards]
        paddle.save({name: paddle.to_tensor(tensors[name]) for name in part}, str(directory / shard))
        weight_map |= dict.fromkeys(part, shard)
    write_json(directory / "model_state.pdparams.index.json", {"weight_map": weight_map})


def fuse(tensors: dict[str, np.ndarray], heads: int) -> dict[str, np.ndarray]:
    """PaddleNLP's joined weights: for each key/value head its queries, its key, its value; gate beside up."""
    fused = dict(tensors)
    for layer in {
        name.rsplit(".self_attn.q_proj", 1)[0] for name in tensors if "llama.layers" in name and "q_proj" in name
    }:
        parts = [fused.pop(f"{layer}.self_attn.{part}_proj.weight") for part in "qkv"]
        cut = [part.reshape(part.shape[0], heads, -1) for part in parts]
        joined = np.concatenate(cut, axis=-1).reshape(parts[0].shape[0], -1)
        fused[f"{layer}.self_attn.qkv_proj.weight"] = joined
        gate, up = (fused.pop(f"{layer}.mlp.{part}_proj.weight") for part in ("gate", "up"))
        fused[f"{layer}.mlp.gate_up_fused_proj.weight"] = np.concatenate([gate, up], axis=1)
    return fused


@pytest.fixture
def paddlemix_model(tmp_path: Path) -> Path:
    """PaddleMIX's directory without weights: config.json, the tower beside it, processor/{train,eval}."""
    directory = tmp_path / "paddlemix"
    for kind in ("train", "eval"):
        (directory / "processor" / kind).mkdir(parents=True)
        values = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "crop_size": {"height": 28, "width": 28}}
        write_json(directory / "processor" / kind / "preprocessor_config.json", values)
    shutil.copy(V16 / "config.json", directory)
    tower = directory / "vision_tower"
    tower.mkdir()
    shutil.copy(V16 / "vision_tower" / "config.json", tower)
    vision = arrays(to_layout(Source.open(V16 / "vision_tower").tensors(), CLIP_PADDLEMIX))
    write_paddle(tower, vision, 1)
    return directory


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("fused", [False, True])
def test_a_directory_of_paddlemix(paddlemix_model: Path, shards: int, fused: bool) -> None:
    wanted = Source.open(V16).tensors()
    tensors = arrays(to_layout(wanted, PADDLEMIX))
    if fused:
        tensors = fuse(tensors, heads=4)
        config = read_json(paddlemix_model / "config.json")
        options = {"fuse_attention_qkv": True, "fuse_attention_ffn": True}
        write_json(paddlemix_model / "config.json", {**config, **options})
    write_paddle(paddlemix_model, tensors, shards)
    source = Source.open(paddlemix_model)
    assert_same(source.tensors(), wanted)
    assert source.processor["image_mean"] == [0.1, 0.2, 0.3]
    assert load_pretrained(paddlemix_model).model.config.image_newline


def test_safetensors_in_paddles_layout_and_the_newline_that_v15_has_too(paddlemix_model: Path) -> None:
    config = read_json(paddlemix_model / "config.json")
    write_json(paddlemix_model / "config.json", {**config, "mm_patch_merge_type": "flat", "image_aspect_ratio": "pad"})
    wanted = Source.open(V16).tensors()
    write_weights(paddlemix_model, to_layout(wanted, PADDLEMIX), 10**9)
    del wanted["image_newline"]
    assert_same(Source.open(paddlemix_model).tensors(), wanted)


def test_a_tower_of_paddlemix_is_a_tower(paddlemix_model: Path) -> None:
    assert_same(Source.open(paddlemix_model / "vision_tower").tensors(), Source.open(V16 / "vision_tower").tensors())


def test_shards_of_torch(tmp_path: Path) -> None:
    directory = Path(shutil.copytree(BASE, tmp_path / "llava"))
    wanted = Source.open(BASE).tensors()
    tensors = {name: array_entry(np.array(entry.read())) for name, entry in read_weights(directory).items()}
    (directory / "model.safetensors").unlink()
    names = list(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        shard = f"pytorch_model-{number:05d}-of-00002.bin"
        write_torch(directory / shard, {name: tensors[name] for name in part})
        weight_map |= dict.fromkeys(part, shard)
    write_json(directory / "pytorch_model.bin.index.json", {"metadata": {}, "weight_map": weight_map})
    assert_same(Source.open(directory).tensors(), wanted)


def test_a_whole_clip_model_of_torch_is_a_tower(tmp_path: Path) -> None:
    tower = BASE / "vision_tower"
    config = {"model_type": "clip", "vision_config": read_json(tower / "config.json"), "text_config": {}}
    write_json(tmp_path / "config.json", config)
    text = {"text_model.embeddings.token_embedding.weight": array_entry(np.ones((2, 3), dtype="float32"))}
    write_torch(tmp_path / "pytorch_model.bin", {**to_layout(Source.open(tower).tensors(), CLIP), **text})
    assert_same(Source.open(tmp_path).tensors(), Source.open(tower).tensors())


def test_two_sets_of_weights_in_one_folder(tmp_path: Path) -> None:
    directory = Path(shutil.copytree(BASE, tmp_path / "llava"))
    tensors = {name: array_entry(np.array(entry.read())) for name, entry in read_weights(directory).items()}
    write_torch(directory / "pytorch_model.bin", tensors)
    assert read_weights(directory).keys() == tensors.keys()  # the same twice is harmless
    norm = np.array(tensors["model.norm.weight"].read())
    norm[-1] += 1
    write_torch(directory / "pytorch_model.bin", {**tensors, "model.norm.weight": array_entry(norm)})
    with pytest.raises(
        UserError, match=r"model.safetensors and pytorch_model.bin \('model.norm.weight' has other numbers\); remove"
    ):
        load_pretrained(directory)
    (directory / "pytorch_model.bin").unlink()
    write_paddle(directory, {"llama.norm.weight": norm}, 1)
    with pytest.raises(UserError, match=r"model.safetensors and model_state.pdparams \(only one of them has"):
        load_pretrained(directory)


@pytest.fixture
def vicuna(tmp_path: Path) -> Path:
    """The language model of the golden LLaVA alone."""
    directory = tmp_path / "vicuna"
    directory.mkdir()
    tensors = {n: e for n, e in Source.open(BASE).tensors().items() if n.startswith(("language_model.", "lm_head."))}
    config = {key: value for key, value in read_json(BASE / "config.json").items() if not key.startswith("mm_")}
    write_json(directory / "config.json", {**config, "model_type": "llama", "architectures": ["LlamaForCausalLM"]})
    write_weights(directory, to_layout(tensors, LLAMA), 10**9)
    return directory


@pytest.mark.parametrize("name", ["mm_projector.bin", "non_lora_trainables.bin", "p.pdparams", "p.safetensors"])
def test_projector_files(tmp_path: Path, vicuna: Path, name: str) -> None:
    ours = {n: e for n, e in Source.open(BASE).tensors().items() if n.startswith("projector.")}
    path = tmp_path / name
    if name.endswith(".bin"):
        wrapper = "base_model.model." if name.startswith("non") else ""
        write_torch(path, {wrapper + key: entry for key, entry in to_layout(ours, ORIGINAL).items()})
    elif name.endswith(".pdparams"):
        paddle.save({k: paddle.to_tensor(a) for k, a in arrays(to_layout(ours, PADDLEMIX)).items()}, str(path))
    else:
        write_safetensors(path, ours)
    spec = BaseSpec(model=str(vicuna), tower=str(BASE / "vision_tower"), projector_file=str(path))
    loaded = load_base(spec)
    for key, entry in ours.items():
        np.testing.assert_array_equal(dict(loaded.model.named_parameters())[key].numpy(), entry.read())


def test_a_projector_file_of_another_model_is_refused(tmp_path: Path, vicuna: Path) -> None:
    write_torch(tmp_path / "mm_projector.bin", {"model.mm_projector.0.weight": array_entry(np.ones((3, 2), "float32"))})
    spec = BaseSpec(
        model=str(vicuna), tower=str(BASE / "vision_tower"), projector_file=str(tmp_path / "mm_projector.bin")
    )
    with pytest.raises(
        UserError,
        match="projector: projector.0.bias is missing there, 64 in the model; projector.0.weight is 2 x 3 there, 48 x",
    ):
        load_base(spec)


MODULES = ("language_model.layers.0.self_attn.q_proj", "language_model.layers.2.mlp.down_proj")


def lora_weights(rank: int = 3) -> dict[str, np.ndarray]:
    """lora_A and lora_B of `MODULES` under our names."""
    tensors, random = Source.open(BASE).tensors(), np.random.RandomState(1)
    result = {}
    for module in MODULES:
        inner, outer = tensors[f"{module}.weight"].shape
        result[f"{module}.lora_A"] = random.randn(inner, rank).astype("float32")
        result[f"{module}.lora_B"] = random.randn(rank, outer).astype("float32")
    return result


def projector(offset: float = 1.0) -> dict[str, np.ndarray]:
    """A trained projector under our names."""
    tensors = Source.open(BASE).tensors()
    return {
        name: np.array(e.read()) + np.float32(offset) for name, e in tensors.items() if name.startswith("projector.")
    }


def write_peft(directory: Path, base: str, **changes: Any) -> Path:
    """What original LLaVA's LoRA training writes."""
    directory.mkdir()
    settings = {"base_model_name_or_path": base, "r": 3, "lora_alpha": 12, "lora_dropout": 0.05, "bias": "none"}
    write_json(directory / "adapter_config.json", {**settings, "peft_type": "LORA", **changes})
    shutil.copy(BASE / "config.json", directory)
    keys = {}
    for name, array in lora_weights().items():
        module, _, part = name.rpartition(".")
        key = ORIGINAL.to_theirs(f"{module}.weight").removesuffix(".weight")
        keys[f"base_model.model.{key}.{part}.weight"] = array_entry(np.ascontiguousarray(array.T))
    write_torch(directory / "adapter_model.bin", keys)
    whole = to_layout({name: array_entry(array) for name, array in projector().items()}, ORIGINAL)
    write_torch(
        directory / "non_lora_trainables.bin", {f"base_model.model.{key}": entry for key, entry in whole.items()}
    )
    return directory


def assert_adapted(model: paddle.nn.Layer, scaling: float) -> None:
    parameters = dict(model.named_parameters())
    for name, array in {**lora_weights(), **projector()}.items():
        np.testing.assert_array_equal(parameters[name].numpy(), array)
    assert model.language_model.layers[0].self_attn.q_proj.scaling == pytest.approx(scaling)


def test_an_adapter_of_original_llava(tmp_path: Path) -> None:
    directory = write_peft(tmp_path / "llava-lora", str(BASE))
    loaded = load_pretrained(directory)
    assert loaded.adapter is not None
    assert loaded.adapter.lora_dropout == 0.05
    assert_adapted(loaded.model, 4)


def test_an_adapter_finds_its_base_beside_it_or_is_told(tmp_path: Path) -> None:
    directory = write_peft(tmp_path / "llava-lora", "somewhere/tuned-base")
    with pytest.raises(MissingFileError, match="tuned-base"):
        load_pretrained(directory, base=str(tmp_path / "tuned-base"))
    shutil.copytree(BASE, tmp_path / "tuned-base")
    assert_adapted(load_pretrained(directory).model, 4)
    assert_adapted(load_pretrained(directory, base=str(BASE)).model, 4)


def test_an_adapter_on_a_text_model_brings_projector_and_tower(tmp_path: Path, vicuna: Path) -> None:
    directory = write_peft(tmp_path / "lora", str(vicuna))
    shutil.copytree(BASE / "vision_tower", directory / "vision_tower")
    change = read_json(directory / "config.json")
    write_json(directory / "config.json", {**change, "mm_vision_tower": str(directory / "vision_tower")})
    assert_adapted(load_pretrained(directory).model, 4)
    (directory / "non_lora_trainables.bin").unlink()
    with pytest.raises(MissingFileError, match="neither the adapter .* has projector weights; .*copy that file too"):
        load_pretrained(directory)


@pytest.mark.parametrize(
    "changes",
    [{"lora_bias": True}, {"init_lora_weights": "olora"}, {"init_lora_weights": "pissa_niter_4"}, {"use_qalora": True}],
)
def test_settings_that_would_change_the_numbers_are_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    directory = write_peft(tmp_path / "lora", str(BASE), **changes)
    with pytest.raises(
        UserError, match=f"adapter_config.json: {next(iter(changes))} is .*; (supported|allowed): .*merge_and_unload"
    ):
        load_pretrained(directory)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rank_pattern": {"q_proj": 4}},
            "lora_A of 'model.layers.0.self_attn.q_proj' is of rank 3, .* has 4; the two",
        ),
        ({"r": 4}, "is of rank 3, .* has 4"),
        ({"bias": "some"}, "adapter_config.json: lora_bias 'some' is not one of none, lora_only, all"),
        ({"alpha_pattern": 3}, "adapter_config.json: alpha_pattern is 3; allowed: an object"),
        ({"use_dora": True, "init_lora_weights": "pissa"}, "adapter_config.json: use_dora and pissa are both true"),
    ],
)
def test_settings_that_do_not_fit(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    directory = write_peft(tmp_path / "lora", str(BASE), **changes)
    with pytest.raises(UserError, match=message):
        load_pretrained(directory)


def test_patterns_of_peft(tmp_path: Path) -> None:
    patterns = {"rank_pattern": {"q_proj": 3, r"layers\.2\..*": 3}, "alpha_pattern": {"down_proj": 6}, "r": 8}
    layers = load_pretrained(write_peft(tmp_path / "lora", str(BASE), **patterns)).model.language_model.layers
    assert (layers[0].self_attn.q_proj.scaling, layers[2].mlp.down_proj.scaling) == (4, 2)


def add_weights(directory: Path, added: dict[str, np.ndarray]) -> None:
    """More weights, under their own names, into the adapter file that `write_peft` wrote."""
    path = directory / "adapter_model.bin"
    tensors = {name: array_entry(np.array(entry.read())) for name, entry in read_torch(path).items()}
    write_torch(path, {**tensors, **{name: array_entry(array) for name, array in added.items()}})


@pytest.mark.parametrize("suffix", ["", ".weight", ".default.weight"])
def test_dora_of_peft(tmp_path: Path, suffix: str) -> None:
    directory = write_peft(tmp_path / "lora", str(BASE), use_dora=True)
    with pytest.raises(UserError, match="2 missing: .*q_proj.lora_magnitude_vector"):
        load_pretrained(directory)
    shapes = {module: Source.open(BASE).tensors()[f"{module}.weight"].shape for module in MODULES}
    added = {module: np.abs(np.random.RandomState(2).randn(shapes[module][1])).astype("float32") for module in MODULES}
    names = {module: ORIGINAL.to_theirs(f"{module}.weight").removesuffix(".weight") for module in MODULES}
    wrapped = {f"base_model.model.{names[m]}.lora_magnitude_vector{suffix}": array for m, array in added.items()}
    add_weights(directory, wrapped)
    loaded = load_pretrained(directory)
    assert loaded.adapter is not None and loaded.adapter.use_dora
    assert_adapted(loaded.model, 4)
    for module, array in added.items():
        np.testing.assert_array_equal(dict(loaded.model.named_parameters())[f"{module}.lora_magnitude_vector"], array)


def test_biases_that_peft_trained(tmp_path: Path) -> None:
    directory = write_peft(tmp_path / "lora", str(BASE), bias="lora_only")
    name = "vision_tower.layers.0.self_attn.q_proj"
    bias = np.arange(Source.open(BASE).tensors()[f"{name}.bias"].shape[0], dtype="float32")
    theirs = ORIGINAL.to_theirs(f"{name}.bias").replace(".bias", ".base_layer.bias")
    add_weights(directory, {f"base_model.model.{theirs}": bias})
    loaded = load_pretrained(directory)
    assert loaded.adapter is not None and loaded.adapter.bias == "lora_only"
    np.testing.assert_array_equal(dict(loaded.model.named_parameters())[f"{name}.bias"].numpy(), bias)


def test_pissa_of_peft_begins_from_the_base(tmp_path: Path) -> None:
    """Peft saves what it trained; the principal components that it took out of the base have to be computed again."""
    loaded = load_pretrained(write_peft(tmp_path / "lora", str(BASE), init_lora_weights="pissa"))
    assert_adapted(loaded.model, 4)
    weight = Source.open(BASE).tensors()[f"{MODULES[0]}.weight"].read()
    u, s, v = np.linalg.svd(weight, full_matrices=False)
    arrays = lora_weights()
    wanted = weight - (u[:, :3] * s[:3]) @ v[:3] + 4 * arrays[f"{MODULES[0]}.lora_A"] @ arrays[f"{MODULES[0]}.lora_B"]
    merged = loaded.model.language_model.layers[0].self_attn.q_proj.merged_weight().numpy()
    np.testing.assert_allclose(merged, wanted, atol=1e-5)


def test_rank_stabilised_scaling(tmp_path: Path) -> None:
    directory = write_peft(tmp_path / "lora", str(BASE), use_rslora=True)
    assert load_pretrained(directory).model.language_model.layers[0].self_attn.q_proj.scaling == pytest.approx(
        12 / 3**0.5
    )


def test_an_adapter_of_paddlemix(tmp_path: Path) -> None:
    directory = tmp_path / "paddlemix-lora"
    directory.mkdir()
    settings = {"r": 3, "lora_alpha": 12, "lora_dropout": 0.0, "target_modules": [".*q_proj.*"], "trainable_bias": None}
    write_json(directory / "lora_config.json", {**settings, "base_model_name_or_path": str(BASE), "scaling": 4.0})
    tensors = {}
    for name, array in {**lora_weights(), **projector()}.items():
        module, _, part = name.rpartition(".")
        tensors[PADDLEMIX.to_theirs(f"{module}.{part}")] = paddle.to_tensor(array)
    paddle.save(tensors, str(directory / "lora_model_state.pdparams"))
    assert_adapted(load_pretrained(directory).model, 4)
    write_json(
        directory / "lora_config.json",
        {**settings, "pissa": True, "rslora": True, "base_model_name_or_path": str(BASE)},
    )
    loaded = load_pretrained(directory)
    assert loaded.adapter is not None and loaded.adapter.pissa
    assert_adapted(loaded.model, 1)  # PaddleNLP's scaling of PiSSA
    write_json(directory / "lora_config.json", settings)
    with pytest.raises(UserError, match="names no base model; set base_model_name_or_path"):
        load_pretrained(directory)


def test_our_adapter_as_one_of_original_llava(tmp_path: Path) -> None:
    loaded = load_pretrained(BASE)
    mark = fingerprint(loaded.model)
    config = LoRAConfig(r=3, lora_alpha=12, modules=MODULES)
    add_lora(loaded.model, config)
    for name, parameter in loaded.model.named_parameters():
        values = {**lora_weights(), **projector()}.get(name)
        parameter.stop_gradient = values is None
        if values is not None:
            parameter.set_value(values)
    save_adapter(loaded.model, None, AdapterSettings(config, {"model": str(BASE)}, mark), tmp_path / "ours")
    (tmp_path / "ours" / "processor_config.json").write_text(json.dumps({"chat_template": "llava_v1"}))
    assert export_adapter(tmp_path / "ours", tmp_path / "peft") == 8
    assert not read_adapter(tmp_path / "peft").fingerprint
    assert_adapted(load_pretrained(tmp_path / "peft").model, 4)
    settings = read_json(tmp_path / "peft" / "adapter_config.json")
    assert settings["target_modules"] == ["model.layers.0.self_attn.q_proj", "model.layers.2.mlp.down_proj"]
    assert read_json(tmp_path / "peft" / "config.json")["chat_template_name"] == "llava_v1"
