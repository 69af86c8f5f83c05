"""Tokens behind a cache, in few operators: equal to the whole decoder over everything."""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle
import pytest

from paddlemix.models.cached_decoder import CachedDecoder
from paddlemix.models.decoder import Decoder
from paddlemix.models.kv_cache import KVCache
from paddlemix.peft.lora import LoRAConfig, add_lora, lora_parameters
from paddlemix.peft.quantize import QuantizationConfig, quantize_model
from tests.models.test_decoder import LLAMA_3
from tests.tiny_models import draw, randomise, tiny_text

pytestmark = pytest.mark.usefixtures("form")  # in C and in paddle's operators

DYNAMIC = {"rope_type": "dynamic", "factor": 2.0}
WIDE = {"hidden_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}


def whole(decoder: Decoder, embeds: np.ndarray) -> np.ndarray:
    """Last hidden state [B, D] of everything at once."""
    positions = paddle.arange(embeds.shape[1]).unsqueeze(0).expand([embeds.shape[0], -1])
    with paddle.no_grad():
        return decoder(paddle.to_tensor(embeds), positions)[:, -1].numpy()


def begun(decoder: Decoder, embeds: np.ndarray, limit: int | None = None) -> KVCache:
    cache = KVCache(limit)
    positions = paddle.arange(embeds.shape[1]).unsqueeze(0).expand([embeds.shape[0], -1])
    with paddle.no_grad():
        decoder(paddle.to_tensor(embeds), positions, cache=cache)
    return cache


@pytest.mark.parametrize(
    "changes",
    [
        WIDE,
        {**WIDE, "num_key_value_heads": 4},
        {**WIDE, "num_key_value_heads": 1, "attention_bias": True},
        {**WIDE, "rope_theta": 5e5, "rms_norm_eps": 1e-6},
        {**WIDE, "head_dim": 10},
        {**WIDE, "attention_bias": True, "attention_output_bias": False},
        {**WIDE, "sliding_window": 3},  # shorter than the prompt
        {**WIDE, "sliding_window": 1, "num_key_value_heads": 4},
        {**WIDE, "sliding_window": 6},
        {**WIDE, "rope_scaling": {"rope_type": "linear", "factor": 3.0}},
        {**WIDE, "rope_scaling": LLAMA_3},
        {**WIDE, "rope_scaling": DYNAMIC},
    ],
)
@pytest.mark.parametrize("cuts", [[1] * 9, [3, 1, 5], [9]])
def test_it_equals_the_whole_decoder(changes: dict[str, Any], cuts: list[int]) -> None:
    decoder = randomise(Decoder(tiny_text(**changes)))
    embeds = draw(2, 4 + sum(cuts), 24)
    cache, cached, start = begun(decoder, embeds[:, :4]), CachedDecoder(decoder), 4
    for size in cuts:
        positions = np.tile(np.arange(start, start + size), (2, 1))
        found = cached(paddle.to_tensor(embeds[:, start : start + size]), positions, cache).numpy()
        start += size
        np.testing.assert_allclose(found, whole(decoder, embeds[:, :start]), atol=1e-5)
    assert cache.length == start


def test_it_goes_on_over_enlargements_up_to_the_context() -> None:
    decoder, embeds = randomise(Decoder(tiny_text())), draw(1, 700, 12)
    cache, cached = begun(decoder, embeds[:, :60], limit=700), CachedDecoder(decoder)
    for place in range(60, 700):
        found = cached(paddle.to_tensor(embeds[:, place : place + 1]), np.array([[place]]), cache)
    assert cache.room == 700
    np.testing.assert_allclose(found.numpy(), whole(decoder, embeds), atol=1e-5)


@pytest.mark.parametrize("start", [5, 9])
def test_positions_behind_a_dynamic_context_turn_as_in_the_decoder(start: int) -> None:
    """Each token turns as the length that it is read at says; what is in the cache stays as it was."""
    sizes: dict[str, Any] = {**WIDE, "rope_scaling": DYNAMIC, "max_position_embeddings": 7}
    decoder, embeds = randomise(Decoder(tiny_text(**sizes))), draw(2, 13, 24)
    cache, other = (begun(decoder, embeds[:, :start]) for _ in range(2))
    cached = CachedDecoder(decoder)
    for place in range(start, 13):
        part, positions = paddle.to_tensor(embeds[:, place : place + 1]), np.full((2, 1), place)
        with paddle.no_grad():
            expected = decoder(part, paddle.to_tensor(positions), cache=other)[:, -1].numpy()
        np.testing.assert_allclose(cached(part, positions, cache).numpy(), expected, atol=1e-5)
    plain = randomise(Decoder(tiny_text(**{**sizes, "max_position_embeddings": 64})))
    assert np.abs(whole(plain, embeds) - whole(decoder, embeds)).max() > 1e-3


@pytest.mark.parametrize("window", [None, 1, 2, 4])
def test_padding_on_the_left_stays_hidden(window: int | None) -> None:
    decoder = randomise(Decoder(tiny_text(**WIDE, sliding_window=window)))
    lengths, width = [6, 3, 1], 6
    rows = [draw(1, length + 3, 24, seed=length) for length in lengths]
    padded, segments, positions = draw(3, width, 24, seed=9), np.zeros((3, width), int), np.zeros((3, width), int)
    for row, length in enumerate(lengths):
        padded[row, width - length :] = rows[row][0, :length]
        segments[row, width - length :], positions[row, width - length :] = 1, np.arange(length)
    cache, cached = KVCache(), CachedDecoder(decoder)
    with paddle.no_grad():
        decoder(*map(paddle.to_tensor, (padded, positions, segments)), cache=cache)
    for step, size in ((0, 1), (1, 2)):
        embeds = np.concatenate(
            [row[:, length + step : length + step + size] for row, length in zip(rows, lengths, strict=True)]
        )
        found = cached(
            paddle.to_tensor(embeds), np.array([range(n + step, n + step + size) for n in lengths]), cache
        ).numpy()
        for row, length in enumerate(lengths):
            alone = whole(decoder, rows[row][:, : length + step + size])
            np.testing.assert_allclose(found[row], alone[0], atol=1e-5)


@pytest.mark.parametrize("kind", ["lora", "int8", "nf4"])
def test_adapted_and_quantised_layers_are_used_as_they_are(kind: str) -> None:
    model = paddle.nn.Layer()
    model.language_model = decoder = randomise(Decoder(tiny_text(**WIDE)))
    if kind == "lora":
        add_lora(decoder, LoRAConfig(r=2, modules=("layers.0.self_attn.q_proj", "layers.1.mlp.up_proj")))
        for name, parameter in lora_parameters(decoder):
            parameter.set_value(draw(*parameter.shape, seed=len(name)))
    else:
        quantize_model(model, QuantizationConfig(kind=kind))
    decoder.eval()
    embeds = draw(1, 6, 24)
    cache = begun(decoder, embeds[:, :4])
    found = CachedDecoder(decoder)(paddle.to_tensor(embeds[:, 4:]), np.array([[4, 5]]), cache)
    np.testing.assert_allclose(found.numpy(), whole(decoder, embeds), atol=1e-5)


def test_weights_that_change_in_place_are_seen() -> None:
    decoder, embeds = randomise(Decoder(tiny_text(**WIDE))), draw(1, 5, 24)
    cached = CachedDecoder(decoder)
    for _ in range(2):
        cache = begun(decoder, embeds[:, :4])
        found = cached(paddle.to_tensor(embeds[:, 4:]), np.array([[4]]), cache).numpy()
        np.testing.assert_allclose(found, whole(decoder, embeds), atol=1e-5)
        randomise(decoder, seed=7)
