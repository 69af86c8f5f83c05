"""An adapter on its base: any other base is refused by the names of its weights, the same one in any form is taken."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from paddlemix.checkpoints.adapters.adapter import AdapterFiles, read_adapter
from paddlemix.checkpoints.adapters.base_check import check_base, describe_weights
from paddlemix.checkpoints.adapters.base_places import base_of
from paddlemix.checkpoints.convert.export_model import convert_checkpoint
from paddlemix.checkpoints.convert.verify import Conversion
from paddlemix.checkpoints.files.weight_files import (
    read_json,
    read_metadata,
    read_safetensors,
    write_json,
    write_safetensors,
)
from paddlemix.checkpoints.layouts.file_names import ADAPTER_WEIGHTS
from paddlemix.checkpoints.load import load_base
from paddlemix.checkpoints.pretrained import Pretrained
from paddlemix.errors import UserError
from paddlemix.examples.llava import run_predict_multiround
from paddlemix.tools import merge_lora_params, quantize
from paddlemix.tools.common.command import run_command
from paddlemix.trainer.recipe import run_recipe
from tests.tiny_models import flip_bit
from tests.tiny_world import CLIP_TOWER, LORA, World


@pytest.fixture
def base(world: World, tmp_path: Path) -> Path:
    return Path(shutil.copytree(world.model, tmp_path / "base"))


def load(adapter: AdapterFiles, base: Path, **changes: str) -> Pretrained:
    return load_base(replace(base_of(adapter, str(base)), **changes))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("language_model.layers.1.self_attn.q_proj.weight", "language_model: layers.1.self_attn.q_proj.weight differ"),
        ("language_model.layers.0.mlp.down_proj.weight", "language_model: layers.0.mlp.down_proj.weight differ"),
        ("language_model.embed_tokens.weight", "language_model: embed_tokens.weight differ"),
        ("lm_head.weight", "lm_head: weight differ"),
        ("vision_tower.layers.0.self_attn.k_proj.bias", "vision_tower: layers.0.self_attn.k_proj.bias differ"),
    ],
)
def test_one_bit_of_the_base(adapter: Path, base: Path, name: str, said: str) -> None:
    files = read_adapter(adapter)
    check_base(load(files, base), files)
    flip_bit(base, name)
    with pytest.raises(UserError, match="was trained on another base than") as caught:
        check_base(load(files, base), files)
    assert said in str(caught.value) and "use the model that it was trained on" in str(caught.value)
    assert "merged into" not in str(caught.value)


def test_every_command_that_puts_an_adapter_on_a_base(
    world: World, adapter: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flip_bit(base, "language_model.layers.0.self_attn.o_proj.weight")
    said = "language_model: layers.0.self_attn.o_proj.weight differ"
    with pytest.raises(UserError, match=said):
        run_recipe(world.config(tmp_path / "run", model_name_or_path=str(base), lora_path=str(adapter)))
    merge = ["--model_name_or_path", str(base), "--lora_path", str(adapter), "--merge_model_path"]
    assert run_command(merge_lora_params.main, [*merge, str(tmp_path / "merged")]) == 2
    assert said in capsys.readouterr().err
    chat = ["--model-path", str(adapter), "--model-base", str(base), "--device", "cpu"]
    assert run_command(run_predict_multiround.main, chat) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists() and not (tmp_path / "merged").exists()


def test_the_adapters_own_weights_may_differ(adapter: Path, base: Path) -> None:
    files = read_adapter(adapter)
    assert "projector.0.weight" in files.tensors()  # trained whole
    flip_bit(base, "projector.0.weight")
    check_base(load(files, base), files)


def test_a_merged_model_is_not_folded_into_twice(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    merge = ["--lora_path", str(adapter), "--merge_model_path"]
    assert run_command(merge_lora_params.main, [*merge, str(tmp_path / "merged")]) == 0
    again = [*merge, str(tmp_path / "twice"), "--model_name_or_path", str(tmp_path / "merged")]
    assert run_command(merge_lora_params.main, again) == 2
    error = capsys.readouterr().err
    assert (
        "down_proj.weight" in error and "may be a model that this or another adapter was merged into already" in error
    )
    assert not (tmp_path / "twice").exists()


@pytest.mark.parametrize("form", ["copied", "touched", "hf", "llava", "bfloat16", "int8 directory", "nf4", "float16"])
def test_the_same_base_in_another_form(adapter: Path, base: Path, tmp_path: Path, form: str) -> None:
    files, changes = read_adapter(adapter), {}
    if form == "touched":
        os.utime(base / "model.safetensors", ns=(1, 1))
    elif form in ("hf", "llava"):
        convert_checkpoint(base, tmp_path / form, Conversion(to=form))
        base = tmp_path / form
    elif form == "bfloat16":
        convert_checkpoint(base, tmp_path / form, Conversion(to="paddlemix", dtype="bfloat16"))
        base = tmp_path / form
    elif form == "int8 directory":
        arguments = ["--model-path", str(base), "--output", str(tmp_path / "int8"), "--kind", "int8"]
        assert run_command(quantize.main, arguments) == 0
        base = tmp_path / "int8"
    elif form != "copied":
        changes = {"quantize": form}
    check_base(load(files, base, **changes), files)


def test_an_adapter_of_an_earlier_version(adapter: Path, base: Path, tmp_path: Path) -> None:
    """It has the fingerprint of norms and embeddings alone."""
    old = Path(shutil.copytree(adapter, tmp_path / "old"))
    tensors = dict(read_safetensors(adapter / ADAPTER_WEIGHTS))
    write_safetensors(old / ADAPTER_WEIGHTS, tensors, {"format": "paddlemix"})
    files = read_adapter(old)
    assert files.base_digests() == {} != read_adapter(adapter).base_digests()
    flip_bit(base, "lm_head.weight")
    check_base(load(files, base), files)
    changed = load(files, base)
    changed.model.language_model.norm.weight.set_value(changed.model.language_model.norm.weight * 2)
    with pytest.raises(UserError, match="its norms or its token embeddings differ"):
        check_base(changed, files)


def test_damaged_digests(adapter: Path, base: Path, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(adapter, tmp_path / "damaged"))
    tensors = dict(read_safetensors(adapter / ADAPTER_WEIGHTS))
    write_safetensors(damaged / ADAPTER_WEIGHTS, tensors, {"base_digests": "["})
    with pytest.raises(UserError, match="has a damaged header .* copy it again"):
        read_adapter(damaged).base_digests()


def test_a_tower_beside_the_base(world: World, tmp_path: Path) -> None:
    tower = Path(shutil.copytree(CLIP_TOWER, tmp_path / "tower"))
    run_recipe(world.config(tmp_path / "run", model_name_or_path=str(world.llama), mm_vision_tower=str(tower), **LORA))
    files = read_adapter(tmp_path / "run")
    check_base(load_base(base_of(files)), files)
    flip_bit(tower, "vision_model.encoder.layers.0.mlp.fc1.weight", 0)
    with pytest.raises(UserError, match=r"another base than .*: vision_tower: layers\.0\.mlp\.fc1\.weight differ"):
        check_base(load_base(base_of(files)), files)


def test_describe_weights() -> None:
    names = [f"vision_tower.layers.{number}.weight" for number in range(5)] + ["lm_head.weight", "image_newline"]
    assert describe_weights(names) == (
        "vision_tower: layers.0.weight, layers.1.weight, layers.2.weight and 2 more; lm_head: weight; "
        "image_newline: image_newline differ"
    )


@pytest.mark.parametrize(
    ("part", "key", "value", "said"),
    [
        ("text_config", "rope_theta", 50000.0, "rope_theta 10000.0 -> 50000.0 in {base}/config.json"),
        ("text_config", "rms_norm_eps", 1e-5, "rms_norm_eps 1e-06 -> 1e-05 in {base}/config.json"),
        (
            "vision_config",
            "hidden_act",
            "gelu",
            'vision_config.hidden_act "quick_gelu" -> "gelu" in {base}/config.json',
        ),
    ],
)
def test_what_the_base_computes_with(
    adapter: Path,
    base: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    part: str,
    key: str,
    value: object,
    said: str,
) -> None:
    values = read_json(base / "config.json")
    write_json(base / "config.json", {**values, part: {**values[part], key: value}})
    merge = ["--model_name_or_path", str(base), "--lora_path", str(adapter), "--merge_model_path"]
    assert run_command(merge_lora_params.main, [*merge, str(tmp_path / "merged")]) == 2
    error = capsys.readouterr().err
    assert f"was trained on another base than {base}: {said.format(base=base)}; use the model" in error
    assert not (tmp_path / "merged").exists()


def test_of_two_bases_the_one_that_computes_alike(world: World, tmp_path: Path) -> None:
    """Beside the adapter is a copy with the same weights, but another config.json."""
    model = Path(shutil.copytree(world.model, tmp_path / "then" / "base"))
    run_recipe(world.config(tmp_path / "then" / "run", model_name_or_path=str(model), max_steps=1, **LORA))
    shutil.copytree(tmp_path / "then", tmp_path / "copy")
    assert base_of(read_adapter(tmp_path / "copy" / "run")).model.endswith("copy/base")
    values = read_json(model / "config.json")
    other = {**values, "text_config": {**values["text_config"], "rope_theta": 50000.0}}
    write_json(tmp_path / "copy" / "base" / "config.json", other)
    assert base_of(read_adapter(tmp_path / "copy" / "run")).model == str(model)


def test_an_adapter_without_the_values_of_its_base(adapter: Path, base: Path, tmp_path: Path) -> None:
    old = Path(shutil.copytree(adapter, tmp_path / "old"))
    header = read_metadata(adapter / ADAPTER_WEIGHTS)
    assert json.loads(header.pop("base_config"))["rope_theta"] == 10000.0
    write_safetensors(old / ADAPTER_WEIGHTS, dict(read_safetensors(adapter / ADAPTER_WEIGHTS)), header)
    values = read_json(base / "config.json")
    write_json(base / "config.json", {**values, "text_config": {**values["text_config"], "rope_theta": 50000.0}})
    check_base(load(read_adapter(old), base), read_adapter(old))
    flip_bit(base, "lm_head.weight")
    with pytest.raises(UserError, match="lm_head: weight differ"):
        check_base(load(read_adapter(old), base), read_adapter(old))
