"""Adapters of llava-hf models as TRL, LLaMA-Factory, ms-swift and plain PEFT write them: logits, files, faults."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paddlemix.checkpoints.adapters.adapter import read_adapter
from paddlemix.checkpoints.adapters.adapter_processor import adapter_processor
from paddlemix.checkpoints.convert.declared_files import complete_processor
from paddlemix.checkpoints.convert.export_adapter import export_adapter
from paddlemix.checkpoints.convert.export_model import convert_checkpoint
from paddlemix.checkpoints.convert.export_peft import export_peft_adapter
from paddlemix.checkpoints.convert.verify import Conversion
from paddlemix.checkpoints.files.pickles import read_torch
from paddlemix.checkpoints.files.tensors import array_entry
from paddlemix.checkpoints.files.weight_files import read_json, read_safetensors, write_json, write_safetensors
from paddlemix.checkpoints.load import load_pretrained
from paddlemix.checkpoints.source import Source
from paddlemix.errors import UserError
from paddlemix.processors.llava import processor_from_dict
from paddlemix.tools.convert_checkpoint import main
from tests.peft_cases import BASE, CASES, GAP, GOLDEN_ADAPTERS, NUM_POSITIONS, our_logits, with_base

GOLDEN_NAMES = [name for name, case in CASES.items() if case.is_golden]
TOKENIZER = BASE.parents[2] / "training" / "tokenizer"
WEIGHTS = "adapter_model.safetensors"


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_logits_are_pefts(name: str) -> None:
    directory = GOLDEN_ADAPTERS / name
    found = our_logits(load_pretrained(directory).model)[-NUM_POSITIONS:]
    np.testing.assert_allclose(found, np.load(directory / "logits.npz")["logits"], atol=GAP, rtol=0)


def copied(name: str, tmp_path: Path, **changes: Any) -> Path:
    """A golden adapter with other settings."""
    directory = with_base(Path(shutil.copytree(GOLDEN_ADAPTERS / name, tmp_path / "adapter")))
    path = directory / "adapter_config.json"
    write_json(path, {**read_json(path), **changes})
    return directory


def change_weights(directory: Path, changes: dict[str, np.ndarray | None], file: str = WEIGHTS) -> None:
    """Adds, replaces or, with None, removes weights of a file."""
    path = directory / file
    arrays = {key: np.array(entry.read()) for key, entry in read_safetensors(path).items()} if path.is_file() else {}
    arrays |= {key: array for key, array in changes.items() if array is not None}
    write_safetensors(path, {k: array_entry(v) for k, v in arrays.items() if changes.get(k, v) is not None}, {})


def test_both_spellings_and_whole_modules_have_our_names(tmp_path: Path) -> None:
    for name in ("lora", "lora_old_names"):
        modules = read_adapter(GOLDEN_ADAPTERS / name).config.modules
        assert {"language_model.layers.2.self_attn.v_proj", "vision_tower.layers.0.self_attn.q_proj"} <= set(modules)
        assert len(modules) == 12
    assert {"lm_head", "projector.0"}.isdisjoint(read_adapter(GOLDEN_ADAPTERS / "lora").config.modules)
    assert {"projector.0", "projector.2"} <= set(read_adapter(GOLDEN_ADAPTERS / "all_linear").config.modules)
    whole = {name for name in read_adapter(GOLDEN_ADAPTERS / "projector").tensors() if name.startswith("projector.")}
    assert whole == {f"projector.{number}.{part}" for number in (0, 2) for part in ("weight", "bias")}


def test_patterns_mean_the_files_own_names(tmp_path: Path) -> None:
    """Whole names and ends of names; the first that fits counts, as PEFT looks it up."""
    name = "language_model.model.layers.1.self_attn.q_proj"
    patterns = {name: 9, r"layers\.0\..*": 5, "q_proj": 7}
    config = read_adapter(copied("lora_old_names", tmp_path, alpha_pattern=patterns)).config
    alphas = [config.alpha_of(f"language_model.layers.{number}.self_attn.q_proj") for number in range(3)]
    assert alphas == [5, 9, 7] and config.alpha_of("language_model.layers.1.self_attn.v_proj") == 3


def test_files_that_ms_swift_puts_beside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What trained whole is in a file of its own, under PEFT's names, and the template in its arguments."""
    directory = copied("lora", tmp_path)
    write_json(directory / "additional_config.json", {"lora_dtype": None, "lorap_lr_ratio": None})
    write_json(directory / "args.json", {"template": "llava1_6_vicuna_hf", "model": "elsewhere"})
    bias = np.arange(64, dtype="float32")
    key = "base_model.model.model.multi_modal_projector.linear_2.bias"
    change_weights(directory, {key: bias}, "vit.safetensors")
    found = dict(load_pretrained(directory).model.named_parameters())
    np.testing.assert_array_equal(found["projector.2.bias"].numpy(), bias)
    assert read_adapter(directory).processor["chat_template"] == "llava_v1"
    write_json(directory / "args.json", {"template": "llava1_5_hf"})
    with caplog.at_level("WARNING", logger="paddlemix"):
        assert "chat_template" not in read_adapter(directory).processor
    assert "ms-swift's template 'llava1_5_hf', which is unknown here (the nearest is vicuna_v1)" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"peft_type": "IA3"},
            r"adapter_config.json: an adapter of kind 'IA3' \(peft_type\) is not supported, only LORA",
        ),
        ({"peft_type": "LOHA"}, "'LOHA'.*merge_and_unload"),
        ({"peft_type": "ADALORA"}, "'ADALORA'"),
        (
            {"init_lora_weights": "olora"},
            'init_lora_weights is "olora" .text.; allowed: .*others begin from a changed base',
        ),
        ({"init_lora_weights": "lora_ga"}, 'init_lora_weights is "lora_ga"'),
        ({"trainable_token_indices": [3]}, r"trainable_token_indices is \[3\] .* means single trained rows"),
        ({"lora_bias": True, "use_bdlora": {"nblocks": 2}}, "lora_bias is true; .*; use_bdlora is"),
        ({"layer_replication": [[0, 2]], "r": 2}, "layer_replication"),
        ({"target_parameters": ["experts.gate"]}, "target_parameters"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"scaling_of_tomorrow": 3}, "scaling_of_tomorrow is 3: unknown"),
        ({"modules_to_save": ["embed_tokens"]}, "modules_to_save names embed_tokens, but .* holds no weights of them"),
    ],
)
def test_what_changes_the_numbers_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_adapter(copied("lora", tmp_path, **changes))


HARMLESS: dict[str, Any] = {
    "fan_in_fan_out": True,
    "megatron_core": "megatron.core",
    "qalora_group_size": 16,
    "eva_config": {"rho": 2.0},
    "init_lora_weights": "eva",
    "exclude_modules": ["lm_head"],
    "velora_config": {"num_groups": 2},
    "lora_dtype": "float32",
    "scaling_of_tomorrow": None,
    "modules_to_save": None,
    "use_qalora": False,
}


def test_what_changes_nothing_is_read_over(tmp_path: Path) -> None:
    config = read_adapter(copied("lora", tmp_path, **HARMLESS)).config
    assert config == read_adapter(GOLDEN_ADAPTERS / "lora").config


PATCHES = "base_model.model.model.vision_tower.vision_model.embeddings.patch_embedding"
Q_PROJ = "base_model.model.model.language_model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {f"{Q_PROJ}.lora_A.weight": np.ones((2, 99), "float32")},
            rf"'{Q_PROJ}.lora_A.weight' is \[2, 99\], its layer needs \[2, 64\]. Is it the adapter of another",
        ),
        (
            {key.replace("layers.1", "layers.9"): np.ones((2, 2), "float32") for key in (
                f"{Q_PROJ}.lora_A.weight", f"{Q_PROJ}.lora_B.weight")},
            "1 of its weights are of layers that the base does not have: "
            "'base_model.model.model.language_model.layers.9.self_attn.q_proj.lora_A.weight'",
        ),
        (
            {"base_model.model.model.visual.blocks.0.attn.qkv.lora_A.weight": np.ones((2, 2), "float32")},
            "holds 1 weights of layers that neither llava-hf nor original LLaVA has: 'base_model.model.model.visual",
        ),
        (
            {"base_model.model.model.language_model.embed_tokens.lora_embedding_A": np.ones((2, 2), "float32")},
            "lora_embedding_A': LoRA of the token embedding is not supported",
        ),
        ({f"{Q_PROJ}.lora_A.weight": np.ones(0, "float32")}, "sharded model .DeepSpeed ZeRO-3, FSDP.; save it again"),
        (
            {f"{PATCHES}.lora_A.weight": np.ones((2, 3, 14, 14), "float32"),
             f"{PATCHES}.lora_B.weight": np.ones((64, 2, 1, 1), "float32")},
            "embeddings.patch_embedding' in .* 4 axes: LoRA of a convolution is not supported.* in target_modules",
        ),
        ({f"{Q_PROJ}.lora_B.weight": None}, "no lora_B for 'model.language_model.layers.1.self_attn.q_proj'"),
        (
            {"base_model.model.model.language_model.embed_tokens.weight": np.ones((321, 64), "float32")},
            r"embed_tokens.weight' is \[321, 64\], its layer needs \[320, 64\]; its vocabulary has more rows",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said_in_the_files_own_names(
    tmp_path: Path, changes: dict[str, np.ndarray | None], message: str
) -> None:
    directory = copied("lora", tmp_path)
    change_weights(directory, changes)
    with pytest.raises(UserError, match=message):
        load_pretrained(directory)


def test_a_magnitude_that_is_missing_has_the_files_name(tmp_path: Path) -> None:
    directory = copied("lora_old_names", tmp_path, use_dora=True)
    with pytest.raises(
        UserError, match=r"10 missing: 'base_model.model.language_model.model.layers.0.self_attn.q_proj"
    ):
        load_pretrained(directory)


def test_the_base_may_be_in_another_layout(tmp_path: Path) -> None:
    """The adapter of llava-hf's model on the same weights in original LLaVA's layout."""
    original = BASE.parent / "original"
    found = our_logits(load_pretrained(GOLDEN_ADAPTERS / "lora_old_names", base=str(original)).model)
    wanted = np.load(GOLDEN_ADAPTERS / "lora_old_names" / "logits.npz")["logits"]
    np.testing.assert_allclose(found[-NUM_POSITIONS:], wanted, atol=GAP, rtol=0)


def assert_same_weights(found: Path, wanted: Path) -> None:
    found_weights, wanted_weights = read_safetensors(found / WEIGHTS), read_safetensors(wanted / WEIGHTS)
    assert found_weights.keys() == wanted_weights.keys()
    for key, entry in wanted_weights.items():
        np.testing.assert_array_equal(found_weights[key].read(), entry.read(), err_msg=key)


def test_an_adapter_is_written_back_as_pefts(tmp_path: Path) -> None:
    """Bit for bit, with the names of today: the two golden cases have the same weights in both spellings."""
    for name, twin in (("lora_old_names", "lora"), ("projector", "projector"), ("patterns", "patterns")):
        export_peft_adapter(GOLDEN_ADAPTERS / name, tmp_path / name)
        assert_same_weights(tmp_path / name, GOLDEN_ADAPTERS / twin)
        assert read_adapter(tmp_path / name).config == read_adapter(GOLDEN_ADAPTERS / name).config
    settings = read_json(tmp_path / "projector" / "adapter_config.json")
    assert settings["modules_to_save"] == ["multi_modal_projector"]
    assert settings["base_model_name_or_path"] == str(BASE)
    # ends of names that are the same in transformers 5, whose tower has no `vision_model`
    assert {"language_model.layers.0.self_attn.q_proj", "encoder.layers.1.self_attn.v_proj"} <= set(
        settings["target_modules"]
    )
    assert read_json(tmp_path / "projector" / "paddlemix_processor.json")["image_aspect_ratio"] == "pad"


def test_pissa_is_written_as_a_plain_adapter(tmp_path: Path) -> None:
    """What another program's PiSSA began from is in no file: it is computed from the base."""
    export_peft_adapter(GOLDEN_ADAPTERS / "pissa", tmp_path / "peft")
    settings = read_json(tmp_path / "peft" / "adapter_config.json")
    assert (settings["r"], settings["lora_alpha"], settings["init_lora_weights"]) == (4, 8, True)
    wanted = np.load(GOLDEN_ADAPTERS / "pissa" / "logits.npz")["logits"]
    found = our_logits(load_pretrained(tmp_path / "peft").model)[-NUM_POSITIONS:]
    np.testing.assert_allclose(found, wanted, atol=GAP, rtol=0)
    export_adapter(GOLDEN_ADAPTERS / "pissa", tmp_path / "llava")
    found = our_logits(load_pretrained(tmp_path / "llava").model)[-NUM_POSITIONS:]
    np.testing.assert_allclose(found, wanted, atol=GAP, rtol=0)


def test_the_template_travels_with_pefts_files(tmp_path: Path) -> None:
    """In a file of our own, since PEFT's settings have no place for it."""
    base = Path(shutil.copytree(BASE, tmp_path / "base"))
    write_json(base / "config.json", {**read_json(base / "config.json"), "chat_template_name": "llava_v1"})
    export_peft_adapter(
        with_base(Path(shutil.copytree(GOLDEN_ADAPTERS / "lora", tmp_path / "lora")), base), tmp_path / "peft"
    )
    assert read_adapter(tmp_path / "peft").processor["chat_template"] == "llava_v1"


def test_a_base_of_another_layout_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    adapter = with_base(
        Path(shutil.copytree(GOLDEN_ADAPTERS / "embedding", tmp_path / "lora")), BASE.parent / "original"
    )
    with caplog.at_level("WARNING", logger="paddlemix"):
        assert main(["--input", str(adapter), "--output", str(tmp_path / "peft"), "--to", "peft"]) == 0
    assert "PEFT needs the base" in caplog.text
    assert "convert it (paddlemix convert --to hf) and set base_model_name_or_path" in caplog.text
    # the converted base has rows for <image> and <pad>, so the adapter's embedding has them too
    weights = read_safetensors(tmp_path / "peft" / WEIGHTS)
    assert weights["base_model.model.model.language_model.embed_tokens.weight"].shape == (384, 64)


@pytest.mark.parametrize(
    ("name", "message"), [("v16", "trained image_newline, which PEFT cannot hold"), ("model", "is not an adapter")]
)
def test_what_cannot_be_pefts_is_refused(tmp_path: Path, name: str, message: str) -> None:
    arguments = ["--output", str(tmp_path / "peft"), "--to", "peft", "--input"]
    directory = copied("lora", tmp_path)
    if name == "v16":
        with_base(directory, BASE.parent.parent / "llava_v16_llama" / "hf")
        change_weights(directory, {"base_model.model.model.image_newline": np.ones(64, "float32")})
    with pytest.raises(UserError, match=message):
        main([*arguments, str(directory if name == "v16" else BASE)])
    assert not (tmp_path / "peft").exists()


def test_a_template_and_tokens_beside_the_adapter_count(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """TRL and LLaMA-Factory save tokenizer and chat template with every adapter; the base may be without them."""
    directory = copied("lora", tmp_path)
    for path in TOKENIZER.iterdir():
        shutil.copy(path, directory)
    source = Source.open(BASE)
    base = processor_from_dict(complete_processor(source.config, source.processor), TOKENIZER)
    found = adapter_processor(base, read_adapter(directory))
    assert found is not None and found.tokenizer is base.tokenizer and found.template.name == "vicuna_v1"
    (directory / "chat_template.jinja").write_text("{{ '<|im_start|>' + message['role'] }}<|im_end|>")
    number = len(base.tokenizer)
    values = read_json(directory / "tokenizer_config.json")
    declared = {str(number + place): {"content": token} for place, token in enumerate(("[SEG]", "<image>"))}
    values["added_tokens_decoder"] = {**values.get("added_tokens_decoder", {}), **declared}
    write_json(directory / "tokenizer_config.json", values)
    with caplog.at_level("INFO", logger="paddlemix"):
        found = adapter_processor(base, read_adapter(directory))
    assert found is not None and found.template.name == "chatml_direct"
    assert found.tokenizer.encode("a [SEG]", "text")[-1] == number
    assert base.tokenizer.encode("a [SEG]", "text")[-1] != number
    assert "its tokenizer is used, which has added tokens: [SEG]" in caplog.text


def test_original_llavas_embedding_has_no_rows_of_llava_hf(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An adapter with a trained embedding, on a llava-hf base of 384 rows whose language model has 320."""
    convert_checkpoint(BASE.parent / "original", tmp_path / "hf", Conversion(to="hf"))
    adapter = with_base(Path(shutil.copytree(GOLDEN_ADAPTERS / "embedding", tmp_path / "adapter")), tmp_path / "hf")
    key, rows = "base_model.model.model.language_model.embed_tokens.weight", np.ones((384, 64), "float32")
    change_weights(adapter, {key: rows})
    with caplog.at_level("WARNING", logger="paddlemix"):
        export_adapter(adapter, tmp_path / "llava")
    assert "original LLaVA needs the base" in caplog.text and "convert --to llava" in caplog.text
    written = read_torch(tmp_path / "llava" / "non_lora_trainables.bin")
    assert written["base_model.model.model.embed_tokens.weight"].shape == (320, 64)
    assert read_json(tmp_path / "llava" / "config.json")["vocab_size"] == 320
    export_peft_adapter(adapter, tmp_path / "peft")
    assert read_safetensors(tmp_path / "peft" / WEIGHTS)[key].shape == (384, 64)
