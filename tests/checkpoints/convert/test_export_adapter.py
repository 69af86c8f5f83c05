"""Every kind of adapter written for PEFT and read back: the same weights, whatever the kind is called there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paddlemix.checkpoints.adapters.adapter import AdapterSettings, fingerprint
from paddlemix.checkpoints.convert.export_adapter import export_adapter
from paddlemix.checkpoints.convert.export_peft import export_peft_adapter
from paddlemix.checkpoints.files.weight_files import write_json
from paddlemix.checkpoints.load import load_pretrained
from paddlemix.errors import UserError
from paddlemix.peft.lora import LoRAConfig, add_lora
from tests.tiny_models import GOLDEN, save_adapter

BASE = GOLDEN / "llava_v15_llama" / "original"
MODULES = ("language_model.layers.0.self_attn.q_proj", "language_model.layers.2.mlp.down_proj")
TOWER = "vision_tower.layers.0.self_attn.q_proj"
KINDS: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True, "rslora": True},
    "pissa": {"pissa": True},
    "pissa, rslora, tower": {"pissa": True, "rslora": True, "rank_pattern": {"vision_tower": 2}},
    "tower": {"rank_pattern": {"vision_tower": 2}, "alpha_pattern": {"vision_tower": 5}},
    "bias": {"bias": "lora_only"},
}


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_adapter_as_one_of_peft(tmp_path: Path, kind: str, dtype: str | None) -> None:
    loaded = load_pretrained(BASE)
    mark = fingerprint(loaded.model)
    config = LoRAConfig(r=3, lora_alpha=4, modules=(*MODULES, TOWER), **KINDS[kind])
    add_lora(loaded.model, config)
    for number, (name, parameter) in enumerate(loaded.model.named_parameters()):
        biased = config.bias != "none" and name == f"{TOWER}.bias"
        parameter.stop_gradient = not (name.endswith(("lora_A", "lora_B", "magnitude_vector")) or biased)
        if not parameter.stop_gradient:
            change = np.random.RandomState(number).randn(*parameter.shape).astype("float32")
            parameter.set_value(parameter.numpy() + 0.1 * change)
    save_adapter(loaded.model, None, AdapterSettings(config, {"model": str(BASE)}, mark), tmp_path / "ours")
    (tmp_path / "ours" / "processor_config.json").write_text(json.dumps({"chat_template": "llava_v1"}))
    export_adapter(tmp_path / "ours", tmp_path / "peft", dtype)
    found = load_pretrained(tmp_path / "peft")
    assert found.adapter is not None and set(found.adapter.modules) == set(config.modules)
    assert found.adapter.bias == config.bias and not found.adapter.pissa
    for name in config.modules:
        ours, theirs = (dict(model.named_sublayers())[name] for model in (loaded.model, found.model))
        gap = 1e-5 if dtype is None else 0.05
        np.testing.assert_allclose(theirs.merged_weight().numpy(), ours.merged_weight().numpy(), atol=gap)
        if ours.bias is not None:
            np.testing.assert_allclose(theirs.bias.numpy(), ours.bias.numpy(), atol=gap)


@pytest.mark.parametrize("export", [export_adapter, export_peft_adapter])
def test_an_adapter_of_another_image_size_is_refused(tmp_path: Path, export: Callable[[Path, Path], int]) -> None:
    """Its base would read smaller pictures in the other program, and answer otherwise."""
    loaded = load_pretrained(BASE)
    config = LoRAConfig(r=2, lora_alpha=4, modules=MODULES)
    add_lora(loaded.model, config)
    base = {"model": str(BASE), "vision_image_size": 56}
    save_adapter(loaded.model, None, AdapterSettings(config, base, ""), tmp_path / "ours")
    write_json(tmp_path / "ours" / "processor_config.json", {"chat_template": "llava_v1"})
    with pytest.raises(UserError, match="trained with vision_image_size 56, its base's tower reads 28 pixels"):
        export(tmp_path / "ours", tmp_path / "theirs")
    assert not (tmp_path / "theirs").exists()
