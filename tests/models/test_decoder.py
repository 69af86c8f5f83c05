"""The decoder against a plain numpy one, and its three ways of running against each other."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import paddle
import pytest

from paddlemix.models.configuration import DecoderConfig, LlavaConfig
from paddlemix.models.decoder import Decoder
from paddlemix.models.kv_cache import KVCache
from paddlemix.peft.lora import LoRAConfig, add_lora, lora_parameters
from tests.tiny_models import draw, randomise, tiny_model, tiny_text, weights_of

pytestmark = pytest.mark.usefixtures("form")  # in C and in paddle's operators

LLAMA_3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
SHAPES: dict[str, dict[str, Any]] = {
    "plain": {"num_key_value_heads": None, "rms_norm_eps": 1e-5},
    "grouped": {"hidden_size": 24, "num_attention_heads": 6, "num_key_value_heads": 2},
    "odd widths": {"hidden_size": 13, "head_dim": 6, "num_attention_heads": 3, "intermediate_size": 7},
    "head_dim": {"head_dim": 10, "num_key_value_heads": 2},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True},
    "biases but for the output": {"attention_bias": True, "attention_output_bias": False},
    "theta": {"rope_theta": 500.0},
    "window": {"sliding_window": 3},
    "window of one": {"sliding_window": 1, "hidden_size": 24, "num_attention_heads": 6, "num_key_value_heads": 2},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "dynamic": {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 5},
    "dynamic within its context": {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    "llama3": {"rope_scaling": LLAMA_3, "head_dim": 16, "rope_theta": 100.0},
}


def normed(states: np.ndarray, weight: np.ndarray, epsilon: float) -> np.ndarray:
    return states / np.sqrt((states**2).mean(-1, keepdims=True) + epsilon) * weight


def frequency(i: int, length: int, config: DecoderConfig) -> float:
    """Radians per position of the i-th pair where `length` positions are read, as transformers has it."""
    scaling, size, theta = config.rope_scaling or {"rope_type": None}, config.head_size, config.rope_theta
    if scaling["rope_type"] == "dynamic":
        length = max(length, config.max_position_embeddings)
        ratio = scaling["factor"] * length / config.max_position_embeddings - (scaling["factor"] - 1)
        theta *= ratio ** (size / (size - 2))
    plain = theta ** (-2 * i / size)
    if scaling["rope_type"] == "linear":
        return plain / scaling["factor"]
    if scaling["rope_type"] != "llama3":
        return plain
    wavelength, old = 2 * math.pi / plain, scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    if wavelength < old / high:
        return plain
    if wavelength > old / low:
        return plain / scaling["factor"]
    smooth = (old / wavelength - low) / (high - low)
    return (1 - smooth) * plain / scaling["factor"] + smooth * plain


def turned(head: np.ndarray, config: DecoderConfig) -> np.ndarray:
    """Rotary positions 0, 1, ... on one head, [L, E], pair by pair."""
    result, half = np.empty_like(head), head.shape[1] // 2
    for position in range(head.shape[0]):
        for i in range(half):
            angle = position * frequency(i, head.shape[0], config)
            x, y = head[position, i], head[position, i + half]
            result[position, i] = x * np.cos(angle) - y * np.sin(angle)
            result[position, i + half] = x * np.sin(angle) + y * np.cos(angle)
    return result


def plain_attention(states: np.ndarray, weights: dict[str, np.ndarray], config: DecoderConfig) -> np.ndarray:
    """[L, D] -> [L, D], head by head and query by query; `weights` without the layer's prefix."""

    def project(name: str, inputs: np.ndarray) -> np.ndarray:
        return inputs @ weights[f"{name}.weight"] + weights.get(f"{name}.bias", 0.0)

    size, group = config.head_size, config.num_attention_heads // config.key_value_heads
    queries, keys, values = (project(name, states) for name in ("q_proj", "k_proj", "v_proj"))
    heads = []
    for head in range(config.num_attention_heads):
        own, shared = slice(head * size, (head + 1) * size), slice(head // group * size, (head // group + 1) * size)
        q, k, v = (
            turned(queries[:, own], config),
            turned(keys[:, shared], config),
            values[:, shared],
        )
        rows = []
        for i in range(len(q)):
            seen = slice(max(0, i + 1 - (config.sliding_window or len(q))), i + 1)
            scores = np.exp(k[seen] @ q[i] / np.sqrt(size))
            rows.append(scores @ v[seen] / scores.sum())
        heads.append(np.stack(rows))
    return project("o_proj", np.concatenate(heads, axis=1))


def plain_decoder(embeds: np.ndarray, weights: dict[str, np.ndarray], config: DecoderConfig) -> np.ndarray:
    """Hidden states [L, D] after the final norm, from embeddings [L, D]; `weights` under the decoder's names."""
    states = embeds
    for layer in range(config.num_hidden_layers):
        prefix = f"layers.{layer}."
        own = {name[len(prefix) :]: value for name, value in weights.items() if name.startswith(prefix)}
        attention = {name.removeprefix("self_attn."): value for name, value in own.items()}
        states = states + plain_attention(
            normed(states, own["input_layernorm.weight"], config.rms_norm_eps), attention, config
        )
        inputs = normed(states, own["post_attention_layernorm.weight"], config.rms_norm_eps)
        gate = inputs @ own["mlp.gate_proj.weight"]
        states = (
            states + (gate / (1 + np.exp(-gate)) * (inputs @ own["mlp.up_proj.weight"])) @ own["mlp.down_proj.weight"]
        )
    return normed(states, weights["norm.weight"], config.rms_norm_eps)


@pytest.fixture(
    scope="module", params=[{}, {"sliding_window": 2}, {"sliding_window": 4}, {"rope_scaling": LLAMA_3}], ids=str
)
def decoder(request: pytest.FixtureRequest) -> Decoder:
    sizes = {"hidden_size": 24, "num_attention_heads": 6, "num_key_value_heads": 2}
    return randomise(Decoder(tiny_text(**sizes, **request.param)))


def run(decoder: Decoder, embeds: np.ndarray, positions: list[list[int]], **more: Any) -> np.ndarray:
    with paddle.no_grad():
        return decoder(paddle.to_tensor(embeds), paddle.to_tensor(positions), **more).numpy()


def counted(start: int, stop: int) -> list[list[int]]:
    return [list(range(start, stop))]


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_equal_the_plain_ones(shape: str) -> None:
    config = tiny_text(**SHAPES[shape])
    model = tiny_model(LlavaConfig(text=config))
    ids = np.array([[3, 1, 4, 1, 5, 36, 0]])
    with paddle.no_grad():
        hidden = model(paddle.to_tensor(ids), paddle.arange(7).unsqueeze(0))
        found = model.logits(hidden).numpy()[0]

    weights = weights_of(model)
    inner = {name.removeprefix("language_model."): value for name, value in weights.items()}
    table = inner["embed_tokens.weight"]
    head = table.T if config.tie_word_embeddings else weights["lm_head.weight"]
    assert ("lm_head.weight" in weights) is not config.tie_word_embeddings
    np.testing.assert_allclose(found, plain_decoder(table[ids[0]], inner, config) @ head, atol=1e-4)


def test_the_scaling_that_is_tested_has_fast_slow_and_middle_pairs() -> None:
    config = tiny_text(**SHAPES["llama3"])
    shares = [frequency(i, 7, config) / 100.0 ** (-2 * i / 16) for i in range(8)]
    assert max(shares) == 1.0 and min(shares) == 1 / 8 and any(1 / 8 < share < 1 for share in shares)


@pytest.mark.parametrize("cuts", [[7], [1] * 7, [3, 1, 3]])
def test_cached_decoding_equals_the_full_forward(decoder: Decoder, cuts: list[int]) -> None:
    embeds, cache, parts, start = draw(2, 7, 24), KVCache(), [], 0
    for size in cuts:
        positions = [list(range(start, start + size))] * 2
        parts.append(run(decoder, embeds[:, start : start + size], positions, cache=cache))
        start += size
    assert cache.length == 7
    np.testing.assert_allclose(np.concatenate(parts, axis=1), run(decoder, embeds, [list(range(7))] * 2), atol=1e-5)


@pytest.mark.parametrize("length", [0, 1, 4])
def test_a_truncated_cache_goes_on_as_if_the_rest_had_never_been(decoder: Decoder, length: int) -> None:
    embeds, other, cache = draw(1, 6, 24), draw(1, 6, 24, seed=2), KVCache()
    embeds[:, :length] = other[:, :length]
    run(decoder, other, counted(0, 6), cache=cache)
    cache.truncate(length)
    found = run(decoder, embeds[:, length:], counted(length, 6), cache=cache)
    np.testing.assert_allclose(found, run(decoder, embeds, counted(0, 6))[:, length:], atol=1e-5)


@pytest.mark.parametrize("named", [True, False])
def test_a_left_padded_batch_equals_single_rows(decoder: Decoder, named: bool) -> None:
    """Also for tokens decoded behind it, whether or not their segment is given again."""
    lengths, width = [6, 3, 1], 6
    rows = [draw(1, length + 2, 24, seed=length) for length in lengths]
    padded, segments, positions = (
        draw(3, width, 24, seed=99),
        np.zeros((3, width), "int64"),
        np.zeros((3, width), "int64"),
    )
    for row, length in enumerate(lengths):
        padded[row, width - length :] = rows[row][0, :length]
        segments[row, width - length :] = 1
        positions[row, width - length :] = np.arange(length)
    cache = KVCache()
    found = run(decoder, padded, positions.tolist(), segment_ids=paddle.to_tensor(segments), cache=cache)
    later = np.concatenate([row[:, -2:] for row in rows])
    again = {"segment_ids": paddle.ones([3, 2], dtype="int64")} if named else {}
    behind = run(decoder, later, [[length, length + 1] for length in lengths], cache=cache, **again)
    for row, length in enumerate(lengths):
        alone = run(decoder, rows[row], counted(0, length + 2))[0]
        np.testing.assert_allclose(found[row, width - length :], alone[:length], atol=1e-5)
        np.testing.assert_allclose(behind[row], alone[length:], atol=1e-5)


def test_packed_rows_equal_separate_rows(decoder: Decoder) -> None:
    lengths = [3, 1, 4]
    rows = [draw(1, length, 24, seed=length) for length in lengths]
    packed = np.concatenate([*rows, draw(1, 2, 24, seed=9)], axis=1)  # two positions of padding at the end
    segments = paddle.to_tensor([[1, 1, 1, 2, 3, 3, 3, 3, 0, 0]])
    found = run(decoder, packed, [[0, 1, 2, 0, 0, 1, 2, 3, 0, 0]], segment_ids=segments)
    alone = np.concatenate([run(decoder, row, counted(0, row.shape[1])) for row in rows], axis=1)
    np.testing.assert_allclose(found[:, :8], alone, atol=1e-5)


def test_segments_may_begin_behind_a_cache_without_them(decoder: Decoder) -> None:
    embeds, cache = draw(1, 5, 24), KVCache()
    run(decoder, embeds[:, :3], counted(0, 3), cache=cache)
    found = run(decoder, embeds[:, 3:], counted(3, 5), segment_ids=paddle.ones([1, 2], dtype="int64"), cache=cache)
    np.testing.assert_allclose(found, run(decoder, embeds, counted(0, 5))[:, 3:], atol=1e-5)


def test_recompute_gives_adapters_the_same_gradients_above_frozen_embeddings() -> None:
    decoder = randomise(Decoder(tiny_text()))
    add_lora(decoder, LoRAConfig(r=2, modules=("layers.0.self_attn.q_proj", "layers.1.mlp.up_proj")))
    for name, parameter in decoder.named_parameters():
        parameter.stop_gradient = "lora_" not in name
    for name, parameter in lora_parameters(decoder):
        parameter.set_value(draw(*parameter.shape, seed=len(name)))
    decoder.train()
    gradients = []
    for decoder.enable_recompute in (False, True):
        states = decoder(decoder.embed_tokens(paddle.to_tensor([[1, 2, 3]])), paddle.arange(3).unsqueeze(0))
        (states * states).sum().backward()
        gradients.append([parameter.grad.numpy() for _, parameter in lora_parameters(decoder)])
        decoder.clear_gradients(set_to_zero=False)
    for without, with_it in zip(*gradients, strict=True):
        assert np.abs(without).max() > 0
        np.testing.assert_allclose(with_it, without, atol=1e-6)


def test_a_cache_is_filled_in_training_mode_with_recompute_too() -> None:
    decoder, cache = randomise(Decoder(tiny_text())), KVCache()
    decoder.train()
    decoder.enable_recompute = True
    run(decoder, draw(1, 3, 12), counted(0, 3), cache=cache)
    assert cache.length == 3
