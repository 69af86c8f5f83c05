"""Tiny random configurations and models, and their weights as plain arrays.

Every weight is drawn, those of norms and biases too, so that none can be forgotten without changing an output.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

import paddlemix.models  # noqa: F401  sets the environment before paddle is imported
from paddlemix.checkpoints.adapters.adapter import AdapterSettings, adapter_files
from paddlemix.checkpoints.files.joint_writing import write_files
from paddlemix.checkpoints.files.weight_files import read_safetensors
from paddlemix.models.configuration import DecoderConfig, LlavaConfig, VisionConfig
from paddlemix.models.llava import LlavaModel
from paddlemix.peft.quantize import quantized_linears
from paddlemix.processors.llava import LlavaProcessor

GOLDEN = Path(__file__).resolve().parent / "golden" / "models"
GOLDEN_MODELS = ("llava_v15_llama", "llava_v16_llama")


def tiny_text(**changes: Any) -> DecoderConfig:
    """Two layers, grouped heads and widths that are no power of two."""
    values = {
        "vocab_size": 37,
        "hidden_size": 12,
        "intermediate_size": 19,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    return DecoderConfig(**{**values, **changes})


def tiny_vision(**changes: Any) -> VisionConfig:
    """Three layers; 2 x 2 patches of 3 pixels."""
    values = {
        "hidden_size": 10,
        "intermediate_size": 17,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 6,
        "patch_size": 3,
    }
    return VisionConfig(**{**values, **changes})


def tiny_intern_vit(**changes: Any) -> VisionConfig:
    """The same sizes with InternViT's structure."""
    structure = {
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "norm_type": "rms_norm",
        "qkv_bias": False,
        "qk_normalization": True,
        "layer_scale": 0.1,
        "outer_norms": False,
        "patch_bias": True,
    }
    return tiny_vision(**{**structure, **changes})


def tiny_llava(**changes: Any) -> LlavaConfig:
    """The tiny tower and the tiny decoder, with a newline vector."""
    values: dict[str, Any] = {"text": tiny_text(), "vision": tiny_vision(), "image_newline": True}
    return LlavaConfig(**{**values, **changes})


def randomise(layer: Any, seed: int = 0) -> Any:
    """Draws every weight of a layer and gives the layer, in evaluation mode."""
    random = np.random.RandomState(seed)
    for name, parameter in sorted(layer.named_parameters()):
        centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        parameter.set_value((centre + 0.3 * random.randn(*parameter.shape)).astype("float32"))
    layer.eval()
    return layer


def tiny_model(config: LlavaConfig | None = None, seed: int = 0) -> LlavaModel:
    """A model with drawn weights, in evaluation mode."""
    return randomise(LlavaModel(config or tiny_llava()), seed)


def weights_of(layer: Any) -> dict[str, np.ndarray]:
    """Name -> weight, float64."""
    return {name: parameter.numpy().astype("float64") for name, parameter in layer.named_parameters()}


def draw(*shape: int, seed: int = 1) -> np.ndarray:
    """Normal float32 numbers."""
    return np.random.RandomState(seed).randn(*shape).astype("float32")


def save_adapter(model: Any, processor: LlavaProcessor | None, settings: AdapterSettings, directory: Path) -> None:
    """Writes an adapter into a new directory."""
    directory.mkdir()
    write_files(directory, adapter_files(model, processor, settings))


def dequantize_model(model: Any, dtype: str = "float32") -> int:
    """Replaces quantised layers by plain ones with the weights that the codes mean; returns how many."""
    import paddle

    found = quantized_linears(model)
    for name, layer in found.items():
        plain = paddle.nn.Linear(1, 1, bias_attr=False)
        plain.weight = plain.create_parameter(layer.weight_shape, dtype=dtype)
        with paddle.no_grad():
            plain.weight.set_value(layer.dequantized().astype(dtype))
        plain.bias, plain.training = layer.bias, layer.training
        parent, _, child = name.rpartition(".")
        setattr(dict(model.named_sublayers(include_self=True))[parent], child, plain)
    return len(found)


def flip_bit(directory: Path, name: str, place: int = -1) -> None:
    """Flips the lowest bit of one number of a tensor in `directory`/model.safetensors and puts the file's time back."""
    path = directory / "model.safetensors"
    status, array = path.stat(), read_safetensors(path)[name].read()
    assert isinstance(array, np.memmap)
    writable = np.memmap(path, array.dtype, "r+", array.offset, array.shape)
    writable.reshape(-1).view(np.uint8)[place * array.itemsize] ^= 1  # of little-endian numbers
    writable.flush()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
