"""Adapter files of every kind between ours and PEFT, both ways: merged weights are the same.

Run by `make reference`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paddlemix.checkpoints.adapters.adapter import AdapterSettings, fingerprint
from paddlemix.checkpoints.convert.export_adapter import export_adapter
from paddlemix.checkpoints.files.weight_files import read_weights
from paddlemix.checkpoints.load import load_pretrained
from paddlemix.peft.lora import LoRAConfig, add_lora, lora_parameters
from paddlemix.peft.settings import is_start_value
from tests.tiny_models import GOLDEN, save_adapter

torch = pytest.importorskip("torch", reason="needs the reference environment: make reference")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.reference

BASE = GOLDEN / "llava_v15_llama" / "original"
LAYERS = ("layers.0.self_attn.q_proj", "layers.1.mlp.down_proj")
GAP = 1e-5
OURS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"rslora": True},
    "dora": {"use_dora": True},
    "pissa": {"pissa": True, "rslora": True},
    "pattern": {"rank_pattern": {"language_model.layers.1": 2}, "alpha_pattern": {f"language_model.{LAYERS[0]}": 9}},
}
THEIRS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora, rslora": {"use_dora": True, "use_rslora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "pattern": {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {r"layers\.0\..*": 9}},
}


def llama() -> Any:
    """The base's language model in transformers."""
    values = json.loads((BASE / "config.json").read_text())
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{key: values[key] for key in keys}))
    state = {name: torch.tensor(np.array(entry.read())) for name, entry in read_weights(BASE).items()}
    missing = model.load_state_dict(state, strict=False).missing_keys
    assert not [name for name in missing if name.startswith("model.layers.")]
    return model


def weights_of(model: Any) -> list[np.ndarray]:
    """The adapted layers' weights of a merged transformers model, [in, out]."""
    return [model.get_submodule(f"model.{layer}").weight.detach().numpy().T for layer in LAYERS]


def merged_weights(directory: Path) -> list[np.ndarray]:
    """The same of an adapter directory, by our own reading."""
    sublayers = dict(load_pretrained(directory, base=str(BASE)).model.named_sublayers())
    return [sublayers[f"language_model.{layer}"].merged_weight().numpy() for layer in LAYERS]


@pytest.mark.parametrize("kind", OURS)
def test_ours_in_peft(kind: str, tmp_path: Path) -> None:
    loaded = load_pretrained(BASE)
    mark = fingerprint(loaded.model)
    config = LoRAConfig(r=3, lora_alpha=6, modules=tuple(f"language_model.{layer}" for layer in LAYERS), **OURS[kind])
    add_lora(loaded.model, config)
    for parameter in loaded.model.parameters():
        parameter.stop_gradient = True
    for number, (name, parameter) in enumerate(lora_parameters(loaded.model)):
        parameter.stop_gradient = is_start_value(name)
        if not is_start_value(name):
            change = 0.1 * np.random.RandomState(number).randn(*parameter.shape).astype("float32")
            parameter.set_value(parameter.numpy() + change)
    save_adapter(loaded.model, None, AdapterSettings(config, {"model": str(BASE)}, mark), tmp_path / "ours")
    (tmp_path / "ours" / "processor_config.json").write_text("{}")
    export_adapter(tmp_path / "ours", tmp_path / "peft")
    found = peft.PeftModel.from_pretrained(llama(), tmp_path / "peft").merge_and_unload()
    sublayers = dict(loaded.model.named_sublayers())
    before = weights_of(llama())
    for layer, theirs, plain in zip(LAYERS, weights_of(found), before, strict=True):
        ours = sublayers[f"language_model.{layer}"].merged_weight().numpy()
        assert np.abs(ours - plain).max() > 0.01
        np.testing.assert_allclose(theirs, ours, atol=GAP)


@pytest.mark.parametrize("kind", THEIRS)
def test_pefts_in_ours(kind: str, tmp_path: Path) -> None:
    config = peft.LoraConfig(
        r=3, lora_alpha=6, target_modules=[layer.rpartition(".")[2] for layer in LAYERS], **THEIRS[kind]
    )
    model = peft.get_peft_model(llama(), config)
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**values, "base_model_name_or_path": str(BASE)}))
    for ours, theirs in zip(merged_weights(tmp_path), weights_of(model.merge_and_unload()), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=GAP)
