"""Vision towers against transformers and torch: CLIP at three sizes, InternViT, interpolated positions.

Run by `make reference`.  InternViT is in no library that can be installed, so a plain torch form of it stands here; it
reads and writes the published names of weights, and knows nothing of ours.
Source: InternVisionModel of OpenGVLab/InternVL, its arithmetic written down anew.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest

from paddlemix.checkpoints.base_model import BaseSpec
from paddlemix.checkpoints.convert.export_model import convert_checkpoint
from paddlemix.checkpoints.convert.verify import Conversion
from paddlemix.checkpoints.files.tensors import array_entry
from paddlemix.checkpoints.files.weight_files import read_json, read_weights, write_json, write_weights
from paddlemix.checkpoints.layouts.tower_positions import interpolate
from paddlemix.checkpoints.load import load_base, load_pretrained
from paddlemix.checkpoints.pretrained import Pretrained, save_model
from paddlemix.checkpoints.source import Source
from paddlemix.models.configuration import LlavaConfig
from paddlemix.models.llava import LlavaModel
from tests.tiny_models import tiny_model, tiny_text

torch = pytest.importorskip("torch", reason="needs the reference environment: make reference")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.reference

Weights = dict[str, Any]
INSIDE = "model.vision_tower.vision_tower."
IDS, IMAGE_AT = [5, 9, 7, 21, 3], 2  # the visual tokens stand before this position


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny language model that a tower is attached to."""
    directory = tmp_path_factory.mktemp("text")
    save_model(Pretrained(tiny_model(LlavaConfig(text=tiny_text())), None, directory), directory)
    return directory


def draw_weights(shapes: dict[str, tuple[int, ...]], seed: int) -> Weights:
    """Every weight drawn, norms around 1, a patch's so that what comes of it is around 1 too."""
    torch.manual_seed(seed)
    weights = {}
    for name, shape in shapes.items():
        spread = np.prod(shape[1:]) ** -0.5 if "patch_embedding.weight" in name else 0.3
        weights[name] = float("norm" in name and name.endswith("weight")) + float(spread) * torch.randn(shape)
    return weights


def our_features(model: LlavaModel, pixels: Any) -> np.ndarray:
    with paddle.no_grad():
        return model.vision_tower(paddle.to_tensor(pixels.numpy())).numpy()


@pytest.mark.parametrize(("native", "read"), [(224, 224), (336, 336), (448, 448), (224, 336), (224, 448), (336, 224)])
def test_clip_at_three_sizes(tmp_path: Path, text: Path, native: int, read: int) -> None:
    """Each of its own size, and at others by interpolated positions."""
    sizes = {"hidden_size": 12, "intermediate_size": 19, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = transformers.CLIPVisionConfig(**sizes, image_size=native, patch_size=14, attn_implementation="eager")
    reference = transformers.CLIPVisionModel(config).eval()
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            parameter.copy_(float("norm" in name and name.endswith("weight")) + 0.3 * torch.randn_like(parameter))
    reference.save_pretrained(tmp_path / "clip")
    pixels = torch.randn(2, 3, read, read)
    with torch.no_grad():
        states = reference(pixels, output_hidden_states=True, interpolate_pos_encoding=native != read).hidden_states
    for layer in (-1, -2, -4):
        spec = BaseSpec(
            model=str(text), tower=str(tmp_path / "clip"), mm_vision_select_layer=layer, vision_image_size=read
        )
        found = our_features(load_base(spec).model, pixels)
        np.testing.assert_allclose(found, states[layer][:, 1:].numpy(), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("before", "after"), [(16, 24), (16, 32), (24, 16), (24, 32), (7, 5), (1, 3), (32, 32)])
def test_positions_are_interpolated_as_torch_does(before: int, after: int) -> None:
    table = torch.randn(1 + before * before, 40)
    grid = table[1:].reshape(1, before, before, -1).permute(0, 3, 1, 2)
    wanted = torch.nn.functional.interpolate(grid, size=(after, after), mode="bicubic", align_corners=False)
    wanted = wanted.permute(0, 2, 3, 1).reshape(after * after, -1)
    found = interpolate(table.numpy(), after)
    np.testing.assert_array_equal(found[0], table[0].numpy())
    np.testing.assert_allclose(found[1:], wanted.numpy(), atol=1e-5, rtol=0)


@dataclass(frozen=True)
class Tower:
    """A random InternViT: its config.json and what is read of it."""

    values: dict[str, Any]
    select_layer: int
    read: int

    @property
    def grid(self) -> int:
        return self.values["image_size"] // self.values["patch_size"]


def draw_tower(seed: int) -> Tower:
    random = np.random.RandomState(seed)
    heads, layers = int(random.choice([1, 2, 3, 5])), int(random.choice([3, 4, 5]))
    values = {
        "model_type": "intern_vit_6b",
        "architectures": ["InternVisionModel"],
        "hidden_size": heads * int(random.randint(4, 9)),
        "intermediate_size": int(random.randint(9, 40)),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "image_size": int(random.choice([224, 448])),
        "patch_size": int(random.choice([56, 112])),
        "layer_norm_eps": float(random.choice([1e-6, 1e-5])),
        "initializer_factor": 0.1,
        "hidden_act": "gelu",
        "qkv_bias": False,
        "qk_normalization": True,
    }
    return Tower(values, int(random.choice([-1, -2, -4])), int(random.choice([224, 336, 448])))


def published_shapes(tower: Tower) -> dict[str, tuple[int, ...]]:
    """Every weight of an InternVisionModel."""
    width, inner, patch = (tower.values[key] for key in ("hidden_size", "intermediate_size", "patch_size"))
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.class_embedding": (1, 1, width),
        "embeddings.patch_embedding.weight": (width, 3, patch, patch),
        "embeddings.patch_embedding.bias": (width,),
        "embeddings.position_embedding": (1, 1 + tower.grid**2, width),
    }
    for number in range(tower.values["num_hidden_layers"]):
        layer = f"encoder.layers.{number}."
        vectors = ("norm1.weight", "norm2.weight", "ls1", "ls2", "attn.q_norm.weight", "attn.k_norm.weight")
        shapes |= {layer + name: (width,) for name in vectors}
        shapes |= {f"{layer}attn.qkv.weight": (3 * width, width)}
        for name, outer, inside in (("attn.proj", width, width), ("mlp.fc1", inner, width), ("mlp.fc2", width, inner)):
            shapes |= {f"{layer}{name}.weight": (outer, inside), f"{layer}{name}.bias": (outer,)}
    return shapes


def rms_norm(states: Any, weight: Any, epsilon: float) -> Any:
    return states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + epsilon) * weight


def intern_vit_states(tower: Tower, weights: Weights, pixels: Any) -> list[Any]:
    """All hidden states [N, P+1, C] of the plain form; positions are interpolated in it, whatever is read."""
    patch, heads, epsilon = (tower.values[key] for key in ("patch_size", "num_attention_heads", "layer_norm_eps"))
    patches = torch.nn.functional.conv2d(
        pixels, weights["embeddings.patch_embedding.weight"], weights["embeddings.patch_embedding.bias"], stride=patch
    )
    count, width, down, across = patches.shape
    positions = weights["embeddings.position_embedding"]
    side = math.isqrt(positions.shape[1] - 1)
    grid = positions[:, 1:].reshape(1, side, side, width).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(grid, size=(down, across), mode="bicubic", align_corners=False)
    positions = torch.cat([positions[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)
    first = weights["embeddings.class_embedding"].expand(count, 1, width)
    states = torch.cat([first, patches.flatten(2).transpose(1, 2)], dim=1) + positions
    found = [states]
    for number in range(tower.values["num_hidden_layers"]):
        own = {
            name.removeprefix(f"encoder.layers.{number}."): weight
            for name, weight in weights.items()
            if name.startswith(f"encoder.layers.{number}.")
        }
        states = states + own["ls1"] * attention(rms_norm(states, own["norm1.weight"], epsilon), own, heads, epsilon)
        inner = rms_norm(states, own["norm2.weight"], epsilon) @ own["mlp.fc1.weight"].T + own["mlp.fc1.bias"]
        inner = torch.nn.functional.gelu(inner)
        states = states + own["ls2"] * (inner @ own["mlp.fc2.weight"].T + own["mlp.fc2.bias"])
        found.append(states)
    return found


def attention(states: Any, own: Weights, heads: int, epsilon: float) -> Any:
    count, length, width = states.shape
    queries, keys, values = (states @ own["attn.qkv.weight"].T).split(width, dim=-1)
    queries = rms_norm(queries, own["attn.q_norm.weight"], epsilon)
    keys = rms_norm(keys, own["attn.k_norm.weight"], epsilon)
    split = [part.reshape(count, length, heads, -1).transpose(1, 2) for part in (queries, keys, values)]
    scores = torch.softmax(split[0] @ split[1].transpose(-1, -2) / math.sqrt(width // heads), dim=-1)
    merged = (scores @ split[2]).transpose(1, 2).reshape(count, length, width)
    return merged @ own["attn.proj.weight"].T + own["attn.proj.bias"]


def write(directory: Path, weights: Weights, values: dict[str, Any]) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    write_weights(directory, {name: array_entry(weight.numpy()) for name, weight in weights.items()}, 10**9)
    write_json(directory / "config.json", values)
    return directory


@pytest.mark.parametrize("seed", range(10))
def test_intern_vit_at_every_size(tmp_path: Path, text: Path, seed: int) -> None:
    tower = draw_tower(seed)
    weights = draw_weights(published_shapes(tower), seed)
    directory = write(tmp_path / "tower", weights, tower.values)
    pixels = torch.randn(2, 3, tower.read, tower.read)
    wanted = intern_vit_states(tower, weights, pixels)[tower.select_layer][:, 1:]
    spec = BaseSpec(
        model=str(text),
        tower=str(directory),
        mm_vision_select_layer=tower.select_layer,
        vision_image_size=tower.read,
    )
    np.testing.assert_allclose(our_features(load_base(spec).model, pixels), wanted.numpy(), atol=1e-4, rtol=0)


def chat_model(seed: int, tower: Tower) -> tuple[Any, Weights, dict[str, Any]]:
    """InternVL-Chat-LLaVA: transformers' Llama, the weights of projector and tower, and config.json."""
    sizes = {"vocab_size": 37, "hidden_size": 16, "intermediate_size": 23, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(**sizes, attn_implementation="eager")
    language = transformers.LlamaForCausalLM(config).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in language.named_parameters():
            parameter.copy_(float("norm" in name) + 0.3 * torch.randn_like(parameter))
    width = tower.values["hidden_size"]
    shapes = {"0.weight": (16, width), "0.bias": (16,), "2.weight": (16, 16), "2.bias": (16,)}
    projector = draw_weights({f"model.mm_projector.{name}": shape for name, shape in shapes.items()}, seed + 1)
    values = {
        **config.to_dict(),
        "model_type": "llava",
        "architectures": ["LlavaLlamaForCausalLM"],
        "mm_vision_tower": "./pretrained/InternViT-Tiny",
        "mm_hidden_size": width,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": tower.select_layer,
        "image_aspect_ratio": "pad",
    }
    return language, projector, values


def reference_logits(language: Any, tower: Tower, weights: Weights, pixels: Any) -> np.ndarray:
    """From one state dict in InternVL's names, whoever wrote it."""
    inside = {name.removeprefix(INSIDE): weight for name, weight in weights.items() if name.startswith(INSIDE)}
    features = intern_vit_states(tower, inside, pixels)[tower.select_layer][0, 1:]
    first = features @ weights["model.mm_projector.0.weight"].T + weights["model.mm_projector.0.bias"]
    first = torch.nn.functional.gelu(first)
    visual = first @ weights["model.mm_projector.2.weight"].T + weights["model.mm_projector.2.bias"]
    own = {name: weight for name, weight in weights.items() if "mm_projector" not in name and INSIDE not in name}
    language.load_state_dict(own, strict=True)
    embeds = language.get_input_embeddings()(torch.tensor(IDS))
    embeds = torch.cat([embeds[:IMAGE_AT], visual, embeds[IMAGE_AT:]])[None]
    return language(inputs_embeds=embeds).logits[0].numpy()


def our_logits(model: LlavaModel, pixels: Any) -> np.ndarray:
    assert model.config.vision is not None
    count = model.config.tokens_per_tile
    ids = np.array([[*IDS[:IMAGE_AT], *[0] * count, *IDS[IMAGE_AT:]]])
    length = ids.shape[1]
    merge = np.arange(length)
    merge[IMAGE_AT : IMAGE_AT + count] = length + np.arange(count)
    with paddle.no_grad():
        hidden = model(
            paddle.to_tensor(ids),
            paddle.arange(length).unsqueeze(0),
            pixel_values=paddle.to_tensor(pixels.numpy()),
            merge_index=paddle.to_tensor(merge),
        )
        return model.logits(hidden)[0].numpy()


@pytest.mark.parametrize("seed", range(10))
@torch.no_grad()
def test_internvl_chat_both_ways(tmp_path: Path, seed: int) -> None:
    """The released form, with positions of 336 pixels inside and of the tower's own size beside; ours and back."""
    drawn = draw_tower(seed)
    tower = Tower({**drawn.values, "image_size": 224}, drawn.select_layer, 336)
    language, weights, values = chat_model(seed, tower)
    inside = draw_weights(published_shapes(Tower({**tower.values, "image_size": 336}, tower.select_layer, 336)), seed)
    weights |= language.state_dict() | {f"{INSIDE}{name}": weight for name, weight in inside.items()}
    write(tmp_path / "chat", weights, values)
    write(tmp_path / "intern_vit_tiny", draw_weights(published_shapes(tower), seed + 7), tower.values)
    pixels = torch.randn(1, 3, 336, 336)
    wanted = reference_logits(language, tower, weights, pixels)
    np.testing.assert_allclose(our_logits(load_pretrained(tmp_path / "chat").model, pixels), wanted, atol=1e-4, rtol=0)

    convert_checkpoint(tmp_path / "chat", tmp_path / "ours", Conversion(to="paddlemix"))
    convert_checkpoint(tmp_path / "ours", tmp_path / "back", Conversion(to="llava"))
    written = {name: torch.tensor(np.array(entry.read())) for name, entry in read_weights(tmp_path / "back").items()}
    assert written.keys() == weights.keys()
    for name, weight in weights.items():
        assert torch.equal(written[name], weight), name
    np.testing.assert_array_equal(reference_logits(language, tower, written, pixels), wanted)
    found = read_json(tmp_path / "back" / "vision_tower" / "config.json")
    same = {key: value for key, value in tower.values.items() if key != "image_size"}
    assert same.items() <= found.items()
    assert Source.open(tmp_path / "back").config == Source.open(tmp_path / "chat").config
