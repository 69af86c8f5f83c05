"""Vision towers as checkpoints hold them: what each family declares in its `config.json`, and how its weights differ.

    tower_form(preset.vision).kind  # "clip" or "intern_vit"

InternViT joins query, key and value in one matrix, one after the other, and has a leading axis on class and position
embeddings.  Knows no directory.
Sources: transformers' CLIPVisionConfig; InternVisionConfig and InternVisionModel of OpenGVLab/InternVL.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from paddlemix.checkpoints.files.tensors import TensorEntry, Tensors, joined, selected_outputs
from paddlemix.checkpoints.layouts.config_keys import VISION_KEYS
from paddlemix.checkpoints.layouts.tower_positions import resized_positions, table_side
from paddlemix.checkpoints.layouts.weight_names import (
    CLIP,
    CLIP_5,
    CLIP_PADDLEMIX,
    INTERN_VIT,
    ORIGINAL,
    ORIGINAL_INTERN_VIT,
    KeyMap,
)
from paddlemix.declared import take
from paddlemix.errors import UserError
from paddlemix.models.configuration import VisionConfig, pick_fields
from paddlemix.models.presets import TOWERS
from paddlemix.processors.images.image_spec import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD

POSITIONS = "vision_tower.position_embedding"
_CLASS, _TOWER, _LAYERS = "vision_tower.class_embedding", "vision_tower.", "vision_tower.layers."
_LEADING_AXES = {_CLASS: 2, POSITIONS: 1}  # of length 1, in InternViT's files
_JOINED, _PARTS = ".self_attn.qkv.", (".self_attn.q_proj.", ".self_attn.k_proj.", ".self_attn.v_proj.")


@dataclass(frozen=True, kw_only=True)
class TowerForm:
    """One family of towers.

    Args:
        kind: of a directory that holds only such a tower, see `config_readers.Layout`.
        model_types: what its `config.json` may say as `model_type`; the first is written.
        architecture: what it says as `architectures`.
        defaults: values that a `config.json` of the family may leave out.
        structure: fields of `VisionConfig` that the family fixes.
        mean, std: of the family's own image processor, if a directory declares none.
        keymaps: names of a tower's weights on its own; the first is written.
        original: names in a checkpoint of original LLaVA's form.
        layer_scale_key: key of `config.json` for the start value of the layer scale.
        smallest_input: pixels; LLaVA's form of a checkpoint enlarges the tower's image size to it.
    """

    kind: str
    model_types: tuple[str, ...]
    architecture: str
    defaults: Mapping[str, Any]
    structure: Mapping[str, Any]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    keymaps: tuple[KeyMap, ...]
    original: KeyMap
    layer_scale_key: str | None = None
    smallest_input: int = 0

    def read(self, declared: Mapping[str, Any], where: str = "") -> VisionConfig:
        """Sizes from the family's `config.json`.

        Args:
            where: the file, for errors and for a warning about unknown keys.

        Raises:
            UserError: a value is not allowed.
        """
        # `initializer_factor` is both the deviation of new weights and, for InternViT, where the layer scale starts
        values = {**self.defaults, **take(declared, VISION_KEYS, where, tell=bool(where))}
        if self.layer_scale_key is not None:
            values["layer_scale"] = float(values[self.layer_scale_key])
        return pick_fields(VisionConfig, {**values, **self.structure})

    def write(self, vision: VisionConfig, dtype: str) -> dict[str, Any]:
        """The family's `config.json`."""
        ours = asdict(vision)
        values = {key: value for key, value in ours.items() if key not in self.structure and key != "layer_scale"}
        if self.layer_scale_key is not None:
            values[self.layer_scale_key] = vision.layer_scale
        named = {"architectures": [self.architecture], "model_type": self.model_types[0], "torch_dtype": dtype}
        return {**named, **values}

    def pixels(self) -> dict[str, Any]:
        """Mean and deviation in our `processor_config.json`."""
        return {"image_mean": list(self.mean), "image_std": list(self.std)}


CLIP_FORM = TowerForm(
    kind="clip",
    model_types=("clip_vision_model", "clip"),
    architecture="CLIPVisionModel",
    # transformers' CLIPVisionConfig, ViT-B/32
    defaults={
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": 224,
        "patch_size": 32,
    },
    structure={
        "norm_type": "layer_norm",
        "qkv_bias": True,
        "qk_normalization": False,
        "outer_norms": True,
        "patch_bias": False,
    },
    mean=CLIP_MEAN,
    std=CLIP_STD,
    keymaps=(CLIP, CLIP_PADDLEMIX, CLIP_5),
    original=ORIGINAL,
)
INTERN_VIT_FORM = TowerForm(
    kind="intern_vit",
    model_types=("intern_vit_6b",),
    architecture="InternVisionModel",
    # InternVisionConfig, InternViT-6B-224px
    defaults={
        "hidden_size": 3200,
        "intermediate_size": 12800,
        "num_hidden_layers": 48,
        "num_attention_heads": 25,
        "image_size": 224,
        "patch_size": 14,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "norm_type": "rms_norm",
        "qkv_bias": False,
        "qk_normalization": True,
        "initializer_factor": 0.1,
    },
    structure={"outer_norms": False, "patch_bias": True},
    mean=IMAGENET_MEAN,
    std=IMAGENET_STD,
    keymaps=(INTERN_VIT,),
    original=ORIGINAL_INTERN_VIT,
    layer_scale_key="initializer_factor",
    # Source: InternVL internvl_chat_llava clip_encoder.py, which reads 336 pixels with the 224-pixel tower
    smallest_input=336,
)
TOWER_FORMS = (CLIP_FORM, INTERN_VIT_FORM)
TOWER_KINDS = tuple(form.kind for form in TOWER_FORMS)


def tower_form(vision: VisionConfig) -> TowerForm:
    """The family of a tower.

    Raises:
        UserError: no family has its structure.
    """
    values = asdict(vision)
    for form in TOWER_FORMS:
        scaled = form.layer_scale_key is not None
        # a family is told by its structure; the layer scale's start value may be anything, but is there or is not
        fits = all(values[key] == value for key, value in form.structure.items())
        if fits and scaled == (vision.layer_scale is not None):
            return form
    structure = {item.name: values[item.name] for item in fields(VisionConfig) if item.name in CLIP_FORM.structure}
    raise UserError(
        f"a vision tower of structure {structure} with layer_scale {vision.layer_scale} is neither CLIP's nor "
        "InternViT's, and no other layout can hold it"
    )


def split_tower(tensors: Tensors) -> dict[str, TensorEntry]:
    """Weights of a tower as our model has them, unread: without leading axes, with query, key and value apart.

    Args:
        tensors: under our names, linear ones [in, out]; those of CLIP and of other parts pass through.

    Raises:
        UserError: a joined weight's width is not a multiple of 3.
    """
    # shapes decide, not the family: CLIP's weights have none of these and pass
    result: dict[str, TensorEntry] = {}
    for name, entry in tensors.items():
        if len(entry.shape) == 3 and name in _LEADING_AXES and entry.shape[0] == 1:
            result[name] = _reshaped(entry, entry.shape[_LEADING_AXES[name] :])
        elif name.startswith(_LAYERS) and _JOINED in name:
            result |= _split(name, entry)
        else:
            result[name] = entry
    return result


def _split(name: str, entry: TensorEntry) -> dict[str, TensorEntry]:
    width = entry.shape[-1] // 3
    if entry.shape[-1] % 3:
        raise UserError(f"the joined weight '{name}' is {entry.shape[-1]} wide, expected three parts of one width")
    slices = (slice(part * width, (part + 1) * width) for part in range(3))
    return {
        name.replace(_JOINED, part): selected_outputs(entry, where) for part, where in zip(_PARTS, slices, strict=True)
    }


def join_tower(tensors: Tensors, vision: VisionConfig | None) -> dict[str, TensorEntry]:
    """The reverse of `split_tower`, for a tower of InternViT's form; any other weight passes through."""
    if vision is None or tower_form(vision) is not INTERN_VIT_FORM:
        return dict(tensors)
    result: dict[str, TensorEntry] = {}
    for name, entry in tensors.items():
        part = next((part for part in _PARTS if name.startswith(_TOWER) and part in name), None)
        if name in _LEADING_AXES:
            result[name] = _reshaped(entry, (1,) * _LEADING_AXES[name] + entry.shape)
        elif part is None:
            result[name] = entry
        elif part == _PARTS[0]:
            queries, keys, values = (tensors[name.replace(part, other)] for other in _PARTS)
            axis = len(entry.shape) - 1
            result[name.replace(part, _JOINED)] = joined(joined(queries, keys, axis), values, axis)
    return result


def _reshaped(entry: TensorEntry, shape: tuple[int, ...]) -> TensorEntry:
    return TensorEntry(entry.dtype, shape, lambda: entry.read().reshape(shape))


def fit_positions(tensors: Tensors, vision: VisionConfig) -> dict[str, TensorEntry]:
    """Weights with the position embeddings interpolated to the tower's image size, if they are for another.

    Their number determines the grid that they are for, not a configuration.
    """
    entry = tensors.get(POSITIONS)
    if entry is None or len(entry.shape) != 2 or entry.shape[0] == vision.num_patches + 1:
        return dict(tensors)
    return {**tensors, POSITIONS: resized_positions(entry, vision.image_size // vision.patch_size)}


def stored_image_size(tensors: Tensors, vision: VisionConfig) -> int | None:
    """Pixels that the position embeddings among `tensors` are for; None without any."""
    entry = tensors.get(POSITIONS)
    return None if entry is None else table_side(entry.shape[0]) * vision.patch_size


def input_size(vision: VisionConfig, declared: int | None, stored: int | None = None) -> int:
    """Pixels that a tower reads inside a checkpoint of original LLaVA's form.

    Args:
        vision: the tower as it is on its own.
        declared: pixels in the checkpoint's own preprocessor file, if it has one.
        stored: pixels that the position embeddings inside the checkpoint are for.
    """
    # CLIP reads what it was trained on; InternViT what is declared, else what is stored, but at least LLaVA's size
    smallest = tower_form(vision).smallest_input
    return declared or max(smallest, stored or vision.image_size) if smallest else vision.image_size


def published_tower(tensors: Tensors) -> VisionConfig | None:
    """The published InternViT whose weights these are, by their names and shapes; None if it is none of them.

    CLIP cannot be identified so: towers of the same shapes differ in their activation.
    """
    shapes = {name: entry.shape for name, entry in tensors.items() if name.startswith(_TOWER) and name != POSITIONS}
    # a few names and shapes are enough: the published ones differ in depth, and in the grid of their positions
    for vision in TOWERS.values():
        if tower_form(vision) is INTERN_VIT_FORM and _layer_count(shapes) == vision.num_hidden_layers:
            wanted = {
                _CLASS: (vision.hidden_size,),
                f"{_LAYERS}0.self_attn.q_norm.weight": (vision.hidden_size,),
                f"{_LAYERS}0.mlp.fc1.weight": (vision.hidden_size, vision.intermediate_size),
            }
            if all(tuple(shapes.get(name, ())) == shape for name, shape in wanted.items()):
                stored = stored_image_size(tensors, vision)
                return vision if stored is None else replace(vision, image_size=stored)
    return None


def _layer_count(shapes: Mapping[str, tuple[int, ...]]) -> int:
    numbers = [int(name[len(_LAYERS) :].partition(".")[0]) for name in shapes if name.startswith(_LAYERS)]
    return max(numbers, default=-1) + 1
