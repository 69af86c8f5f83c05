"""The vision tower against a plain numpy CLIP, and which of its layers exist."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import paddle
import pytest

from paddlemix.models.configuration import VisionConfig
from paddlemix.models.vision import VisionTower
from tests.tiny_models import draw, randomise, tiny_intern_vit, tiny_llava, tiny_model, tiny_vision, weights_of

pytestmark = pytest.mark.usefixtures("form")  # in C and in paddle's operators

Weights = dict[str, np.ndarray]
ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "quick_gelu": lambda x: x / (1 + np.exp(-1.702 * x)),
    "gelu": lambda x: x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2))),
}


def linear(states: np.ndarray, weights: Weights, name: str) -> np.ndarray:
    return states @ weights[f"{name}.weight"] + weights[f"{name}.bias"]


def normed(states: np.ndarray, weights: Weights, name: str, epsilon: float) -> np.ndarray:
    centred = states - states.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + epsilon)
    return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def plain_embedding(tile: np.ndarray, weights: Weights, config: VisionConfig) -> np.ndarray:
    """[3, H, W] -> [P+1, C]: the class token, then one product per patch, row by row."""
    size, rows = config.patch_size, [weights["class_embedding"]]
    for y in range(config.image_size // size):
        for x in range(config.image_size // size):
            patch = tile[:, y * size : (y + 1) * size, x * size : (x + 1) * size]
            rows.append((weights["patch_embedding"] * patch).sum((1, 2, 3)))
    return np.stack(rows) + weights["position_embedding"]


def plain_tower(tile: np.ndarray, weights: Weights, config: VisionConfig, layers: int) -> np.ndarray:
    """Hidden state number `layers` of one tile, [P+1, C]."""
    states = normed(plain_embedding(tile, weights, config), weights, "pre_layernorm", config.layer_norm_eps)
    size = config.hidden_size // config.num_attention_heads
    for layer in range(layers):
        name = f"layers.{layer}"
        inputs = normed(states, weights, f"{name}.layer_norm1", config.layer_norm_eps)
        q, k, v = (linear(inputs, weights, f"{name}.self_attn.{part}_proj") for part in "qkv")
        heads = []
        for head in range(config.num_attention_heads):
            own = slice(head * size, (head + 1) * size)
            scores = np.exp(q[:, own] @ k[:, own].T / math.sqrt(size))
            heads.append(scores / scores.sum(-1, keepdims=True) @ v[:, own])
        states = states + linear(np.concatenate(heads, axis=1), weights, f"{name}.self_attn.out_proj")
        inputs = normed(states, weights, f"{name}.layer_norm2", config.layer_norm_eps)
        inner = ACTIVATIONS[config.hidden_act](linear(inputs, weights, f"{name}.mlp.fc1"))
        states = states + linear(inner, weights, f"{name}.mlp.fc2")
    return states


@pytest.mark.parametrize(
    ("config", "layers"),
    [
        (tiny_vision(), 3),
        (tiny_vision(), 0),
        (tiny_vision(hidden_act="gelu", layer_norm_eps=1e-3), 2),
        (tiny_vision(image_size=11, patch_size=3), 1),  # two pixels at the right and at the bottom belong to no patch
    ],
)
def test_features_equal_the_plain_ones(config: VisionConfig, layers: int) -> None:
    tower = randomise(VisionTower(config, layers, keep_class_token=True))
    tiles = draw(2, 3, config.image_size, config.image_size)
    with paddle.no_grad():
        found = tower(paddle.to_tensor(tiles)).numpy()
    wanted = [plain_tower(tile, weights_of(tower), config, layers) for tile in tiles]
    np.testing.assert_allclose(found, np.stack(wanted), atol=1e-4)


def root_mean_square_one(states: np.ndarray, weight: np.ndarray, epsilon: float) -> np.ndarray:
    return states / np.sqrt((states**2).mean(-1, keepdims=True) + epsilon) * weight


def plain_intern_vit(tile: np.ndarray, weights: Weights, config: VisionConfig, layers: int) -> np.ndarray:
    """Hidden state number `layers` of one tile, [P+1, C]: InternViT-6B's arithmetic, or 300M's by its switches."""
    states = plain_embedding(tile, weights, config)
    states[1:] += weights["patch_bias"]
    size, epsilon = config.hidden_size // config.num_attention_heads, config.layer_norm_eps
    for layer in range(layers):
        name = f"layers.{layer}"
        own = {key.removeprefix(f"{name}."): weight for key, weight in weights.items() if key.startswith(f"{name}.")}

        def norm(states: np.ndarray, part: str, own: Weights = own) -> np.ndarray:
            if config.norm_type == "layer_norm":
                return normed(states, own, part, epsilon)
            return root_mean_square_one(states, own[f"{part}.weight"], epsilon)

        inputs = norm(states, "layer_norm1")
        q, k, v = (inputs @ own[f"self_attn.{part}_proj.weight"] for part in "qkv")
        if config.qkv_bias:
            q, k, v = (part + own[f"self_attn.{name}_proj.bias"] for part, name in zip((q, k, v), "qkv", strict=True))
        if config.qk_normalization:
            q = root_mean_square_one(q, own["self_attn.q_norm.weight"], epsilon)
            k = root_mean_square_one(k, own["self_attn.k_norm.weight"], epsilon)
        heads = []
        for head in range(config.num_attention_heads):
            part = slice(head * size, (head + 1) * size)
            scores = np.exp(q[:, part] @ k[:, part].T / math.sqrt(size))
            heads.append(scores / scores.sum(-1, keepdims=True) @ v[:, part])
        attended = linear(np.concatenate(heads, axis=1), own, "self_attn.out_proj")
        states = states + own["layer_scale1.weight"] * attended
        inner = ACTIVATIONS["gelu"](linear(norm(states, "layer_norm2"), own, "mlp.fc1"))
        states = states + own["layer_scale2.weight"] * linear(inner, own, "mlp.fc2")
    return states


@pytest.mark.parametrize(
    ("config", "layers"),
    [
        (tiny_intern_vit(), 3),
        (tiny_intern_vit(layer_norm_eps=1e-2, image_size=9), 2),
        (tiny_intern_vit(norm_type="layer_norm", qkv_bias=True, qk_normalization=False), 2),  # InternViT-300M
    ],
)
def test_intern_vit_features_equal_the_plain_ones(config: VisionConfig, layers: int) -> None:
    tower = randomise(VisionTower(config, layers, keep_class_token=True))
    assert {name.rpartition(".")[0] or name for name, _ in tower.named_parameters()} >= {"patch_bias"}
    tiles = draw(2, 3, config.image_size, config.image_size)
    with paddle.no_grad():
        found = tower(paddle.to_tensor(tiles)).numpy()
    wanted = [plain_intern_vit(tile, weights_of(tower), config, layers) for tile in tiles]
    np.testing.assert_allclose(found, np.stack(wanted), atol=1e-4)


def test_a_layer_scale_begins_at_its_start_value_and_trains() -> None:
    tower = VisionTower(tiny_intern_vit(layer_scale=0.25), 1, keep_class_token=False)
    scale = tower.layers[0].layer_scale1.weight
    assert scale.tolist() == [0.25] * 10
    tower(paddle.to_tensor(draw(1, 3, 6, 6))).sum().backward()
    for name, parameter in tower.named_parameters():
        assert parameter.grad is not None, name
    assert np.abs(scale.grad.numpy()).max() > 0


@pytest.mark.parametrize(("selected", "built"), [(-1, 3), (-2, 2), (-4, 0), (0, 0), (1, 1), (3, 3)])
def test_layers_behind_the_selected_one_are_not_built(selected: int, built: int) -> None:
    """The features are those of the whole tower's hidden state of that number."""
    model = tiny_model(tiny_llava(mm_vision_select_layer=selected))
    assert len(model.vision_tower.layers) == built
    names = [name for name, _ in model.vision_tower.named_parameters()]
    assert not any(name.startswith((f"layers.{built}.", "post_layernorm")) for name in names)

    whole = randomise(VisionTower(tiny_vision(), 3, keep_class_token=False), seed=5)
    for name, parameter in model.vision_tower.named_parameters():
        parameter.set_value(dict(whole.named_parameters())[name])
    tile = draw(1, 3, 6, 6)
    with paddle.no_grad():
        found = model.vision_tower(paddle.to_tensor(tile)).numpy()[0]
    np.testing.assert_allclose(found, plain_tower(tile[0], weights_of(whole), tiny_vision(), built)[1:], atol=1e-4)


def test_cls_patch_keeps_the_class_token_in_front() -> None:
    tiles = paddle.to_tensor(draw(2, 3, 6, 6))
    with paddle.no_grad():
        patches = tiny_model(tiny_llava()).vision_tower(tiles)
        whole = tiny_model(tiny_llava(mm_vision_select_feature="cls_patch")).vision_tower(tiles)
    assert patches.shape == [2, 4, 10]
    assert whole.shape == [2, 5, 10]
    np.testing.assert_array_equal(whole.numpy()[:, 1:], patches.numpy())
