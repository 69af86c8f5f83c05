"""The merge as one gather, every projector type, and whole models against the reference's golden logits."""

from __future__ import annotations

import json
import math
from functools import cache
from typing import Any

import numpy as np
import paddle
import pytest

from paddlemix.checkpoints.load import load_pretrained
from paddlemix.datasets.collate import collate
from paddlemix.errors import UserError
from paddlemix.models.configuration import LlavaConfig
from paddlemix.models.kv_cache import KVCache
from paddlemix.models.llava import LlavaModel, build_projector
from paddlemix.processors.images.image_spec import ImageSpec
from paddlemix.processors.images.visual_tokens import visual_token_index
from paddlemix.sample import IGNORE_INDEX, IMAGE_TOKEN_INDEX, Batch, Example
from tests.tiny_models import GOLDEN, GOLDEN_MODELS, draw, randomise, tiny_llava, tiny_model, tiny_text, weights_of

PINPOINTS = ((28, 56), (56, 28), (56, 56), (84, 28), (28, 84))
ASPECTS: dict[str, dict[str, Any]] = {
    "llava_v15_llama": {"aspect_mode": "pad"},
    "llava_v16_llama": {"aspect_mode": "anyres", "grid_pinpoints": PINPOINTS, "merge_type": "spatial_unpad"},
}


def golden_cases() -> list[Any]:
    """(model, layout, case) of every golden case; an empty list would make the collection below fail."""
    return [
        pytest.param(model, layout, case, id=f"{model}-{layout}-{case['arrays']}")
        for model in GOLDEN_MODELS
        for layout in ("hf", "original")
        for case in json.loads((GOLDEN / model / "cases.json").read_text(encoding="utf-8"))["cases"]
    ]


@cache
def golden_model(name: str, layout: str) -> LlavaModel:
    return load_pretrained(GOLDEN / name / layout).model


def golden_batch(name: str, case: dict[str, Any], pixels: np.ndarray) -> Batch:
    height, width = case["image_size_hw"]
    index = visual_token_index(width, height, ImageSpec(tile_size=28, patch_size=14, **ASPECTS[name]))
    assert len(index) == case["num_image_tokens"]
    ids = np.array([*case["prompt_before"], *[IMAGE_TOKEN_INDEX] * len(index), *case["prompt_after"]])
    labels = np.full_like(ids, IGNORE_INDEX)
    tiles = pixels.reshape(-1, *pixels.shape[-3:])
    return collate([Example(input_ids=ids, labels=labels, pixel_values=tiles, image_index=index)], tokens_per_tile=4)


def run(model: LlavaModel, batch: Batch, kv_cache: KVCache | None = None) -> paddle.Tensor:
    """Hidden states of a batch of one row."""
    return model(
        paddle.to_tensor(batch.input_ids),
        paddle.to_tensor(batch.position_ids),
        pixel_values=paddle.to_tensor(batch.pixel_values.astype("float32")),
        merge_index=paddle.to_tensor(batch.merge_index),
        cache=kv_cache,
    )


@pytest.mark.parametrize(("name", "layout", "case"), golden_cases())
def test_logits_and_greedy_ids_equal_the_references(name: str, layout: str, case: dict[str, Any]) -> None:
    arrays = np.load(GOLDEN / name / case["arrays"])
    model, kv_cache, greedy = golden_model(name, layout), KVCache(), []
    batch = golden_batch(name, case, arrays["pixel_values"])
    with paddle.no_grad():
        logits = model.logits(run(model, batch, kv_cache))[0]
        np.testing.assert_allclose(logits.numpy(), arrays["logits"], atol=1e-4, rtol=0)
        for _ in case["greedy_tokens"]:
            greedy.append(int(logits[-1].argmax()))
            hidden = model(paddle.to_tensor([greedy[-1:]]), paddle.to_tensor([[kv_cache.length]]), cache=kv_cache)
            logits = model.logits(hidden)[0]
    assert greedy == case["greedy_tokens"]


@pytest.fixture(scope="module")
def model() -> LlavaModel:
    return tiny_model()


def test_the_merge_gathers_tokens_features_and_the_newline(model: LlavaModel) -> None:
    ids, features = [[5, 0, 0], [0, 6, 7]], draw(4, 12)
    positions, newline = 6, 6 + 4
    index = [0, positions + 3, newline, positions + 1, 4, 5]
    with paddle.no_grad():
        found = model.merge(paddle.to_tensor(ids), paddle.to_tensor(features), paddle.to_tensor(index)).numpy()
    table = model.language_model.embed_tokens.weight.numpy()
    wanted = [[table[5], features[3], model.image_newline.numpy()], [features[1], table[6], table[7]]]
    np.testing.assert_array_equal(found, np.array(wanted))


def test_without_images_the_merge_is_the_embedding(model: LlavaModel) -> None:
    with paddle.no_grad():
        found = model.merge(paddle.to_tensor([[5, 6]]), None, None).numpy()
    np.testing.assert_array_equal(found[0], model.language_model.embed_tokens.weight.numpy()[5:7])


def test_features_are_never_dropped_silently(model: LlavaModel) -> None:
    with pytest.raises(ValueError, match="go together"):
        model.merge(paddle.to_tensor([[5, 6]]), paddle.to_tensor(draw(4, 12)), None)
    with pytest.raises(ValueError, match="go together"):
        model.merge(paddle.to_tensor([[5, 6]]), None, paddle.to_tensor([0, 1]))


def test_every_row_of_every_tile_is_projected_in_order(model: LlavaModel) -> None:
    tiles = paddle.to_tensor(draw(3, 3, 6, 6))
    with paddle.no_grad():
        together = model.encode_images(tiles).numpy()
        alone = [model.encode_images(tiles[number : number + 1]).numpy() for number in range(3)]
    assert together.shape == (12, 12)
    np.testing.assert_allclose(together, np.concatenate(alone), atol=1e-5)


def test_an_image_row_in_a_batch_equals_the_row_alone(model: LlavaModel) -> None:
    """One row with two tiles, one with one, one without: each is answered as if it were alone."""
    examples = []
    for number, index in enumerate(([0, 1, -1, 6], [3], [])):
        ids = np.array([1, *[IMAGE_TOKEN_INDEX] * len(index), 9, 8 + number])
        tiles = draw([2, 1, 0][number], 3, 6, 6, seed=number)
        examples.append(
            Example(input_ids=ids, labels=ids, pixel_values=tiles, image_index=np.array(index, dtype="int64"))
        )
    batch = collate(examples, tokens_per_tile=4, padding="right")
    with paddle.no_grad():
        together = run(model, batch).numpy()
        for row, example in enumerate(examples[:2]):
            alone = run(model, collate([example], tokens_per_tile=4)).numpy()[0]
            np.testing.assert_allclose(together[row, : len(alone)], alone, atol=1e-5)
        text = model(paddle.to_tensor([[1, 9, 10]]), paddle.arange(3).unsqueeze(0)).numpy()[0]
    np.testing.assert_allclose(together[2, :3], text, atol=1e-5)


def test_cached_images_are_not_needed_again(model: LlavaModel) -> None:
    ids = np.array([1, IMAGE_TOKEN_INDEX, IMAGE_TOKEN_INDEX, 9, 8])
    tile, index = draw(1, 3, 6, 6), np.array([2, 0])
    whole = collate([Example(input_ids=ids, labels=ids, pixel_values=tile, image_index=index)], 4)
    first = collate([Example(input_ids=ids[:3], labels=ids[:3], pixel_values=tile, image_index=index)], 4)
    kv_cache = KVCache()
    with paddle.no_grad():
        run(model, first, kv_cache)
        rest = model(paddle.to_tensor([[9, 8]]), paddle.to_tensor([[3, 4]]), cache=kv_cache).numpy()
        np.testing.assert_allclose(rest, run(model, whole).numpy()[:, 3:], atol=1e-5)


def test_a_model_without_a_tower_has_text_weights_only() -> None:
    names = {name.split(".")[0] for name, _ in tiny_model(LlavaConfig(text=tiny_text())).named_parameters()}
    assert names == {"language_model", "lm_head"}


def test_an_identity_projector_feeds_the_tower_straight_in() -> None:
    config = tiny_llava(text=tiny_text(hidden_size=10, head_dim=6), mm_projector_type="identity", image_newline=False)
    model, tiles = tiny_model(config), paddle.to_tensor(draw(2, 3, 6, 6))
    assert not any(name.startswith("projector") for name, _ in model.named_parameters())
    with paddle.no_grad():
        np.testing.assert_array_equal(
            model.encode_images(tiles).numpy(), model.vision_tower(tiles).numpy().reshape(8, 10)
        )


# ---- projectors ----


def gelu(states: np.ndarray) -> np.ndarray:
    return states * 0.5 * (1 + np.vectorize(math.erf)(states / math.sqrt(2)))


# names as in original LLaVA: a linear projector is the layer itself, the others a sequence with GELU between
@pytest.mark.parametrize(
    ("kind", "layers"),
    [("linear", [""]), ("mlp1x_gelu", ["0."]), ("mlp2x_gelu", ["0.", "2."]), ("mlp3x_gelu", ["0.", "2.", "4."])],
)
def test_projector_numbers_and_names(kind: str, layers: list[str]) -> None:
    projector = randomise(build_projector(kind, 5, 7))
    weights = weights_of(projector)
    assert sorted(weights) == sorted(f"{layer}{part}" for layer in layers for part in ("weight", "bias"))
    states = draw(2, 3, 5)
    wanted = states.astype("float64")
    for number, layer in enumerate(layers):
        wanted = (gelu(wanted) if number else wanted) @ weights[f"{layer}weight"] + weights[f"{layer}bias"]
    np.testing.assert_allclose(projector(paddle.to_tensor(states)).numpy(), wanted, atol=1e-5)


def test_an_identity_projector_has_no_weights_and_changes_nothing() -> None:
    projector, states = build_projector("identity", 5, 5), draw(2, 3, 5)
    assert weights_of(projector) == {}
    np.testing.assert_array_equal(projector(paddle.to_tensor(states)).numpy(), states)


@pytest.mark.parametrize("kind", ["mlp0x_gelu", "mlp2x_relu", "resampler", ""])
def test_an_unknown_projector_type_is_refused(kind: str) -> None:
    with pytest.raises(UserError, match=f"mm_projector_type '{kind}' is not one of linear, mlpNx_gelu"):
        build_projector(kind, 5, 7)
