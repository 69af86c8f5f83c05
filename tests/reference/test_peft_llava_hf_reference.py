"""PEFT's adapters of llava-hf models in ours and back: logits, merged weights, the merged model in transformers.

Run by `make reference`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paddlemix.checkpoints.adapters.adapter import AdapterSettings, fingerprint
from paddlemix.checkpoints.adapters.merging import write_merged
from paddlemix.checkpoints.adapters.peft_settings import read_settings
from paddlemix.checkpoints.convert.declared_files import complete_processor
from paddlemix.checkpoints.convert.export_adapter import export_adapter
from paddlemix.checkpoints.convert.export_model import convert_checkpoint
from paddlemix.checkpoints.convert.export_peft import export_peft_adapter
from paddlemix.checkpoints.convert.verify import Conversion
from paddlemix.checkpoints.files.weight_files import write_json
from paddlemix.checkpoints.load import load_pretrained
from paddlemix.checkpoints.source import Source
from paddlemix.errors import UserError
from paddlemix.peft.lora import LoRAConfig, add_lora, lora_parameters
from paddlemix.peft.settings import is_start_value
from tests.peft_cases import BASE, CASES, GAP, NAMES, our_logits, with_base
from tests.reference.peft_llava_hf import adapted_model, loaded, merged_directory, peft, plain_model, save, their_logits
from tests.tiny_models import GOLDEN, save_adapter

pytestmark = pytest.mark.reference


@pytest.mark.parametrize("name", CASES)
def test_logits_and_merged_weights_are_pefts(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    model = adapted_model(case)
    wanted, plain = their_logits(model), their_logits(plain_model())
    assert np.abs(wanted - plain).max() > 50 * GAP
    adapter = with_base(save(model, case, tmp_path / "adapter"))
    found = load_pretrained(adapter)
    np.testing.assert_allclose(our_logits(found.model), wanted, atol=GAP, rtol=0)
    export_peft_adapter(adapter, tmp_path / "again")
    np.testing.assert_allclose(their_logits(loaded(tmp_path / "again")), wanted, atol=GAP, rtol=0)
    (tmp_path / "merged").mkdir()
    write_merged(found, tmp_path / "merged", "float32")
    ours = Source.open(tmp_path / "merged").tensors()
    theirs = Source.open(merged_directory(model, tmp_path / "theirs")).tensors()
    assert ours.keys() == theirs.keys()
    for key, entry in theirs.items():
        np.testing.assert_allclose(ours[key].read(), entry.read(), atol=5e-6, err_msg=key)
    write_processor(BASE, tmp_path / "merged")
    convert_checkpoint(tmp_path / "merged", tmp_path / "hf", Conversion(to="hf"))
    again = their_logits(plain_model(tmp_path / "hf"))[:, : wanted.shape[1]]  # with rows for llava-hf's own tokens
    np.testing.assert_allclose(again, wanted, atol=GAP, rtol=0)


@pytest.mark.parametrize("name", ["all_linear", "projector", "half_projector_old_names"])
def test_adapters_of_llava_next(name: str, tmp_path: Path) -> None:
    """LLaVA-1.6's class has the same names, and a newline vector that adapters leave alone."""
    base, case = GOLDEN / NAMES[1] / "hf", CASES[name]
    model = adapted_model(case, base)
    wanted = their_logits(model, NAMES[1])
    adapter = with_base(save(model, case, tmp_path / "adapter"), base)
    np.testing.assert_allclose(our_logits(load_pretrained(adapter).model, NAMES[1]), wanted, atol=GAP, rtol=0)
    export_peft_adapter(adapter, tmp_path / "again")
    np.testing.assert_allclose(their_logits(loaded(tmp_path / "again", base), NAMES[1]), wanted, atol=GAP, rtol=0)


def test_the_old_names_are_those_that_peft_reads(tmp_path: Path) -> None:
    """The spelling that `peft_cases.respelt` writes is the one that transformers maps to its present names."""
    case = CASES["lora_old_names"]
    model = adapted_model(case)
    adapter = save(model, case, tmp_path)
    np.testing.assert_allclose(their_logits(loaded(adapter)), their_logits(model), atol=1e-6, rtol=0)


LAYERS = (
    "language_model.layers.0.self_attn.q_proj",
    "language_model.layers.2.mlp.down_proj",
    "vision_tower.layers.1.self_attn.v_proj",
)
OURS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {  # settings; what trained whole begins with
    "lora": ({}, ()),
    "rslora": ({"rslora": True}, ("projector.",)),
    "dora": ({"use_dora": True}, ("projector.",)),
    "pissa": ({"pissa": True}, ("projector.",)),
    "ranks": ({"rank_pattern": {"vision_tower": 1}, "alpha_pattern": {"language_model.layers.2": 9}}, ()),
    "embeddings": ({}, ("language_model.embed_tokens", "lm_head")),
    "norms, tower": ({}, ("language_model.norm", "vision_tower.class", "vision_tower.layers.0.layer_norm1.bias")),
    "biases": ({"bias": "lora_only"}, (f"{LAYERS[2]}.bias", "projector.2")),
    "all biases": ({"bias": "all"}, (f"{LAYERS[2]}.bias", "vision_tower.layers.0.mlp.fc1.bias", "projector.")),
}


def write_processor(base: Path, directory: Path) -> None:
    """The processor's settings of a base without tokenizer, which is not written with a model or adapter."""
    source = Source.open(base)
    write_json(directory / "processor_config.json", complete_processor(source.config, source.processor))


def train_ours(base: Path, directory: Path, kind: str) -> np.ndarray:
    """Writes an adapter directory of ours all of whose weights were moved, and returns the model's logits."""
    settings, whole = OURS[kind]
    found = load_pretrained(base)
    mark = fingerprint(found.model)
    config = LoRAConfig(**{"r": 3, "lora_alpha": 6, "modules": LAYERS, **settings})
    add_lora(found.model, config)
    own = {name for name, _ in lora_parameters(found.model)}
    for number, (name, parameter) in enumerate(found.model.named_parameters()):
        trains = (name in own and not is_start_value(name)) or name.startswith(whole or ("nothing",))
        parameter.stop_gradient = not trains
        if trains:
            change = 0.1 * np.random.RandomState(number).randn(*parameter.shape).astype("float32")
            parameter.set_value(parameter.numpy() + change)
    save_adapter(found.model, None, AdapterSettings(config, {"model": str(base)}, mark), directory)
    write_processor(base, directory)
    return our_logits(found.model)


@pytest.mark.parametrize("layout", ["hf", "original"])
@pytest.mark.parametrize("kind", OURS)
def test_ours_as_pefts(kind: str, layout: str, tmp_path: Path) -> None:
    """The second base has no rows for llava-hf's tokens; its converted form has, and PEFT loads on that."""
    base = BASE.parent / layout
    wanted = train_ours(base, tmp_path / "ours", kind)
    export_peft_adapter(tmp_path / "ours", tmp_path / "peft")
    if layout == "original":
        convert_checkpoint(base, tmp_path / "hf", Conversion(to="hf"))
    found = their_logits(loaded(tmp_path / "peft", BASE if layout == "hf" else tmp_path / "hf"))
    np.testing.assert_allclose(found[:, : wanted.shape[1]], wanted, atol=GAP, rtol=0)
    assert np.abs(wanted - our_logits(load_pretrained(base).model)).max() > 50 * GAP
    back = load_pretrained(tmp_path / "peft", base=str(BASE) if layout == "hf" else str(tmp_path / "hf"))
    np.testing.assert_allclose(our_logits(back.model)[:, : wanted.shape[1]], wanted, atol=GAP, rtol=0)


def test_original_llavas_as_pefts(tmp_path: Path) -> None:
    original = BASE.parent / "original"
    wanted = train_ours(original, tmp_path / "ours", "rslora")
    export_adapter(tmp_path / "ours", tmp_path / "llava")
    export_peft_adapter(tmp_path / "llava", tmp_path / "peft")
    convert_checkpoint(original, tmp_path / "hf", Conversion(to="hf"))
    found = their_logits(loaded(tmp_path / "peft", tmp_path / "hf"))[:, : wanted.shape[1]]
    np.testing.assert_allclose(found, wanted, atol=GAP, rtol=0)


def test_every_key_of_pefts_settings_is_known(tmp_path: Path) -> None:
    """Also with values: what a key of this version of PEFT means was looked up, for none is it guessed."""
    values = peft.LoraConfig().to_dict()
    for key in values:
        try:
            read_settings({key: "a value"}, tmp_path)
        except UserError as error:
            assert "unknown here" not in str(error), key
    assert read_settings({**values, "peft_type": "LORA"}, tmp_path)["r"] == values["r"]
