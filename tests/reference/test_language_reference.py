"""Tiny random language models of every family against transformers, both ways through our converter.

Run by `make reference`.  InternLM and InternLM2 are not in transformers: they are a Llama with biases, and one whose
weights are joined and renamed here, by functions that share nothing with the converter.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest

from paddlemix.checkpoints.convert.export_model import convert_checkpoint
from paddlemix.checkpoints.convert.verify import Conversion
from paddlemix.checkpoints.load import load_pretrained
from paddlemix.models.llava import LlavaModel
from tests.reference.exact import assert_as_exact, assert_largest_as_exact, in_float64

torch = pytest.importorskip("torch", reason="needs the reference environment: make reference")
transformers = pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")
pytestmark = pytest.mark.reference

SEEDS = range(10)
VOCABULARY = 83
LLAMA_3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
}


def draw_sizes(random: np.random.RandomState) -> dict[str, Any]:
    """Grouped heads, odd widths, tied and untied; sequences are longer than some of the contexts."""
    heads = int(random.choice([1, 2, 3, 4, 6]))
    groups = int(random.choice([size for size in (1, 2, 3) if heads % size == 0]))
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": heads * 2 * int(random.randint(2, 8)),
        "intermediate_size": int(random.randint(9, 40)),
        "num_hidden_layers": int(random.randint(1, 4)),
        "num_attention_heads": heads,
        "num_key_value_heads": heads // groups,
        "rms_norm_eps": float(random.choice([1e-5, 1e-6])),
        "rope_theta": float(random.choice([1e4, 5e5, 5e6])),
        "max_position_embeddings": int(random.choice([9, 16, 64])),
        "tie_word_embeddings": bool(random.rand() < 0.3),
    }


def llama(random: np.random.RandomState, scaling: dict[str, Any] | None, **more: Any) -> Any:
    sizes = draw_sizes(random)
    if scaling is not None:
        scaling = {**scaling, "factor": float(random.choice([1.0, 2.0, 3.5, 8.0]))}
    return transformers.LlamaConfig(**sizes, rope_scaling=scaling, **more)


def mistral(random: np.random.RandomState) -> Any:
    window = random.choice([1, 2, 3, 5, 8, 100, 0])
    extra = {"head_dim": int(2 * random.randint(2, 5))} if random.rand() < 0.4 else {}
    return transformers.MistralConfig(**draw_sizes(random), sliding_window=int(window) or None, **extra)


def qwen2(random: np.random.RandomState) -> Any:
    sizes = draw_sizes(random)
    window: dict[str, Any] = {"use_sliding_window": False, "sliding_window": 3, "max_window_layers": 0}
    if random.rand() < 0.5:
        window = {"use_sliding_window": True, "sliding_window": int(random.randint(1, 9)), "max_window_layers": 0}
    return transformers.Qwen2Config(**sizes, **window)


FAMILIES: dict[str, Callable[[np.random.RandomState], Any]] = {
    "llama": lambda random: llama(random, None),
    "llama3": lambda random: llama(random, LLAMA_3),
    "linear": lambda random: llama(random, {"rope_type": "linear"}),
    "dynamic": lambda random: llama(random, {"rope_type": "dynamic"}),
    "mistral": mistral,
    "qwen2": qwen2,
    "internlm": lambda random: llama(random, {"rope_type": "dynamic"}, attention_bias=True),
    "internlm2": lambda random: llama(random, {"rope_type": "dynamic"}, attention_bias=bool(random.rand() < 0.5)),
}


def reference_model(config: Any, seed: int) -> Any:
    """A model with drawn weights, biases too."""
    config._attn_implementation = "eager"
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if "norm" in name else 0.0
            parameter.copy_(centre + 0.2 * torch.randn_like(parameter))
    return model


def write_reference(model: Any, family: str, directory: Path) -> None:
    """The model's files as its family publishes them."""
    model.save_pretrained(directory)
    if not family.startswith("internlm"):
        return
    config = model.config
    values = json.loads((directory / "config.json").read_text())
    values |= {"model_type": family, "bias": values.pop("attention_bias")}
    scaling = values.pop("rope_scaling")
    if family == "internlm":
        values["architectures"] = ["InternLMForCausalLM"]
        rotary = {"base": values.pop("rope_theta"), "type": "dynamic", "scaling_factor": scaling["factor"]}
        values["rotary"] = rotary
        del values["num_key_value_heads"]
    else:
        values["architectures"] = ["InternLM2ForCausalLM"]
        values["rope_scaling"] = {"type": "dynamic", "factor": scaling["factor"]}
        path = directory / "model.safetensors"
        tensors = joined(safetensors_torch.load_file(path), config)
        safetensors_torch.save_file(tensors, path, metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(values))


INTERNLM2_NAMES = {
    "model.embed_tokens.": "model.tok_embeddings.",
    "lm_head.": "output.",
    "self_attn.o_proj.": "attention.wo.",
    "mlp.gate_proj.": "feed_forward.w1.",
    "mlp.down_proj.": "feed_forward.w2.",
    "mlp.up_proj.": "feed_forward.w3.",
    "post_attention_layernorm.": "ffn_norm.",
    "input_layernorm.": "attention_norm.",
}


def joined(tensors: dict[str, Any], config: Any) -> dict[str, Any]:
    """InternLM2's names, and head by head its queries, its key and its value in one matrix."""
    result = {}
    size, groups = config.hidden_size // config.num_attention_heads, config.num_attention_heads
    groups //= config.num_key_value_heads
    for name, tensor in tensors.items():
        if "self_attn.q_proj." in name:
            key, value = (tensors[name.replace("q_proj", part)] for part in ("k_proj", "v_proj"))
            rows = []
            for head in range(config.num_key_value_heads):
                rows.append(tensor[head * groups * size : (head + 1) * groups * size])
                rows.append(key[head * size : (head + 1) * size])
                rows.append(value[head * size : (head + 1) * size])
            result[name.replace("self_attn.q_proj", "attention.wqkv")] = torch.cat(rows)
        elif "self_attn.k_proj" not in name and "self_attn.v_proj" not in name:
            for old, new in INTERNLM2_NAMES.items():
                name = name.replace(old, new)
            result[name] = tensor.clone()
    return result


def reference_logits(model: Any, rows: list[np.ndarray]) -> list[np.ndarray]:
    with torch.no_grad():
        return [model(input_ids=torch.tensor(row[None])).logits[0].numpy() for row in rows]


def our_logits(model: LlavaModel, rows: list[np.ndarray]) -> list[np.ndarray]:
    """All rows in one batch, padded on the left."""
    width = max(map(len, rows))
    ids, positions, segments = (np.zeros((len(rows), width), dtype="int64") for _ in range(3))
    for number, row in enumerate(rows):
        ids[number, width - len(row) :] = row
        positions[number, width - len(row) :] = np.arange(len(row))
        segments[number, width - len(row) :] = 1
    with paddle.no_grad():
        logits = model.logits(model(*map(paddle.to_tensor, (ids, positions, segments)))).numpy()
    return [logits[number, width - len(row) :] for number, row in enumerate(rows)]


def exact_logits(model: Any, rows: list[np.ndarray]) -> list[np.ndarray]:
    """`reference_logits` in float64; the model comes back in float32."""
    with in_float64():
        found = reference_logits(model.double(), rows)
    model.float()
    return found


def assert_same_bits(first: Path, second: Path) -> None:
    before, behind = (safetensors_torch.load_file(path / "model.safetensors") for path in (first, second))
    assert before.keys() == behind.keys()
    for name, tensor in before.items():
        assert tensor.dtype == behind[name].dtype and torch.equal(tensor, behind[name]), name


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("family", list(FAMILIES))
def test_logits_agree_both_ways(tmp_path: Path, family: str, seed: int) -> None:
    random = np.random.RandomState(seed)
    config = FAMILIES[family](random)
    if family == "internlm":
        config.num_key_value_heads = config.num_attention_heads
    reference = reference_model(config, seed)
    rows = [random.randint(0, VOCABULARY, length) for length in (23, 4, 11)]
    wanted, exact = reference_logits(reference, rows), exact_logits(reference, rows)
    write_reference(reference, family, tmp_path / "theirs")
    assert_as_exact(our_logits(load_pretrained(tmp_path / "theirs").model, rows), wanted, exact)
    convert_checkpoint(tmp_path / "theirs", tmp_path / "ours", Conversion(to="paddlemix"))
    assert_as_exact(our_logits(load_pretrained(tmp_path / "ours").model, rows), wanted, exact)
    convert_checkpoint(tmp_path / "ours", tmp_path / "again", Conversion(to="hf"))
    assert_same_bits(tmp_path / "theirs", tmp_path / "again")
    if not family.startswith("internlm"):
        kind = transformers.AutoModelForCausalLM
        again, report = kind.from_pretrained(tmp_path / "again", output_loading_info=True, attn_implementation="eager")
        assert {key: list(value) for key, value in report.items() if value} == {}
        assert type(again) is type(reference)
        assert_largest_as_exact(reference_logits(again.eval(), rows), wanted, exact)
    else:
        assert_as_exact(our_logits(load_pretrained(tmp_path / "again").model, rows), wanted, exact)
        values = [json.loads((tmp_path / part / "config.json").read_text()) for part in ("theirs", "again")]
        for key in ("model_type", "architectures", "bias", "rotary", "rope_scaling", "intermediate_size"):
            assert values[1].get(key) == values[0].get(key), key


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("family", ["llama3", "mistral", "qwen2"])
def test_llava_on_it_goes_through_every_layout(tmp_path: Path, family: str, seed: int) -> None:
    random = np.random.RandomState(100 + seed)
    text = FAMILIES[family](random)
    text.tie_word_embeddings = False
    vision = transformers.CLIPVisionConfig(
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    next_generation = seed % 2 == 1
    name = f"Llava{'Next' if next_generation else ''}"
    grids = {"image_grid_pinpoints": [[28, 56], [56, 28]]} if next_generation else {}
    config = getattr(transformers, f"{name}Config")(
        text_config=text, vision_config=vision, image_token_index=VOCABULARY - 1, **grids
    )
    config._attn_implementation = "eager"
    torch.manual_seed(seed)
    kind = getattr(transformers, f"{name}ForConditionalGeneration")
    reference = kind(config).eval()
    reference.save_pretrained(tmp_path / "hf")
    rows = [random.randint(0, VOCABULARY - 1, length) for length in (17, 6)]
    wanted, exact = reference_logits(reference, rows), exact_logits(reference, rows)
    previous = "hf"
    for to in ("paddlemix", "llava", "paddlemix", "hf"):
        target = f"{previous}-{to}"
        convert_checkpoint(tmp_path / previous, tmp_path / target, Conversion(to=to))
        assert_largest_as_exact(our_logits(load_pretrained(tmp_path / target).model, rows), wanted, exact)
        previous = target
    assert_same_bits(tmp_path / "hf", tmp_path / previous)
    again, report = kind.from_pretrained(tmp_path / previous, output_loading_info=True, attn_implementation="eager")
    assert {key: list(value) for key, value in report.items() if value} == {}
    assert_largest_as_exact(reference_logits(again.eval(), rows), wanted, exact)
    original = json.loads((tmp_path / "hf-paddlemix-llava" / "config.json").read_text())
    expected = {"llama3": "LlavaLlama", "mistral": "LlavaMistral", "qwen2": "LlavaQwen"}[family]
    assert original["architectures"] == [f"{expected}ForCausalLM"]
