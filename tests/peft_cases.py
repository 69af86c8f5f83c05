"""Adapters that PEFT makes of a llava-hf model: their settings, names before and since transformers 4.52, our logits.

Used by the golden files in `golden/peft_llava_hf/`, by the test that reads them and by the live comparison.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import paddle

from paddlemix.datasets.collate import collate
from paddlemix.models.llava import LlavaModel
from paddlemix.processors.images.image_spec import ImageSpec
from paddlemix.processors.images.visual_tokens import visual_token_index
from paddlemix.sample import IGNORE_INDEX, IMAGE_TOKEN_INDEX, Example
from tests.tiny_models import GOLDEN

NAMES = ("llava_v15_llama", "llava_v16_llama")
PINPOINTS = ((28, 56), (56, 28), (56, 56), (84, 28), (28, 84))
ASPECTS: dict[str, dict[str, Any]] = {
    NAMES[0]: {"aspect_mode": "pad"},
    NAMES[1]: {"aspect_mode": "anyres", "grid_pinpoints": PINPOINTS, "merge_type": "spatial_unpad"},
}
BASE = GOLDEN / "llava_v15_llama" / "hf"
GOLDEN_ADAPTERS = GOLDEN.parent / "peft_llava_hf"
GAP = 2e-5  # largest difference of a logit
NUM_POSITIONS = 6  # at the end of the prompt, whose logits the golden files keep
_PREFIX = "base_model.model."
# what LlavaForConditionalGeneration is called inside: since transformers 4.52, before
_SPELLINGS = (
    ("model.language_model.", "language_model.model."),
    ("model.vision_tower.", "vision_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("model.image_newline", "image_newline"),
    ("lm_head.", "language_model.lm_head."),
)


@dataclass(frozen=True)
class PeftCase:
    """One adapter.

    Args:
        settings: of `peft.LoraConfig`.
        saving: of its `save_pretrained`.
        is_golden: whether its files are kept for the tests without torch.
        spelling: whose names its files have: "4.52" of transformers since that version, "old" before, "5" since 5.
    """

    settings: dict[str, Any]
    saving: dict[str, Any] = field(default_factory=dict)
    is_golden: bool = False
    spelling: str = "4.52"


ATTENTION = ["q_proj", "v_proj"]  # of the decoder and of the tower, as TRL's and LLaMA-Factory's lists have them
CASES = {
    "lora": PeftCase({"target_modules": ATTENTION}, is_golden=True),
    "lora_old_names": PeftCase({"target_modules": ATTENTION, "lora_alpha": 3}, is_golden=True, spelling="old"),
    "dora": PeftCase({"target_modules": ["o_proj"], "use_dora": True}, is_golden=True, spelling="old"),
    "rslora": PeftCase({"target_modules": ["k_proj", "gate_proj"], "use_rslora": True}, is_golden=True),
    "dora_rslora_tower": PeftCase({"target_modules": ["v_proj", "fc1"], "use_dora": True, "use_rslora": True}),
    "patterns": PeftCase(
        {
            "target_modules": ["q_proj", "down_proj"],
            "layers_to_transform": [0, 2],
            "rank_pattern": {"down_proj": 1, r"layers\.2\.self_attn\..*": 3},
            "alpha_pattern": {r"layers\.0\..*": 9, "model.language_model.layers.2.mlp.down_proj": 5},
        },
        is_golden=True,
    ),
    "regex": PeftCase(
        {"target_modules": r".*language_model.*\.(gate_proj|o_proj)", "exclude_modules": r".*layers\.1\..*"}
    ),
    "tower_of_5": PeftCase({"target_modules": ["fc2", "q_proj"], "r": 1}, is_golden=True, spelling="5"),
    "all_linear": PeftCase({"target_modules": "all-linear", "r": 1}, is_golden=True),
    "output_layer": PeftCase({"target_modules": ["lm_head", "k_proj", "linear_1"]}),
    "projector": PeftCase({"target_modules": ATTENTION, "modules_to_save": ["multi_modal_projector"]}, is_golden=True),
    "half_projector_old_names": PeftCase(
        {"target_modules": ATTENTION, "modules_to_save": ["linear_2"]}, spelling="old"
    ),
    "embeddings": PeftCase({"target_modules": ["o_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}),
    "embedding": PeftCase({"target_modules": ["o_proj"], "modules_to_save": ["embed_tokens"]}, is_golden=True),
    "embeddings_old_names": PeftCase(
        {"target_modules": ["o_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}, spelling="old"
    ),
    "saved_embeddings": PeftCase({"target_modules": ["o_proj"]}, {"save_embedding_layers": True}),
    "biases": PeftCase({"target_modules": ["fc1", "linear_1"], "bias": "lora_only"}, is_golden=True),
    "all_biases": PeftCase({"target_modules": ["q_proj"], "bias": "all"}),
    "pissa": PeftCase({"target_modules": ["q_proj", "up_proj"], "init_lora_weights": "pissa"}, is_golden=True),
    "gaussian": PeftCase({"target_modules": ["up_proj"], "init_lora_weights": "gaussian"}),
    "mica": PeftCase({"target_modules": ["up_proj"], "init_lora_weights": "mica"}),
}


def respelt(key: str, spelling: str) -> str:
    """An adapter weight's name as another version of transformers has it, from its name since 4.52."""
    if spelling == "5":
        return key.replace(".vision_model.", ".")
    plain = key.removeprefix(_PREFIX)
    new, old = next((new, old) for new, old in _SPELLINGS if plain.startswith(new))
    return _PREFIX + old + plain[len(new) :]


def golden_inputs(name: str = NAMES[0]) -> tuple[np.ndarray, dict[str, Any]]:
    """Pixels [1, 3, H, W] or [1, tiles, 3, H, W] and the case of a golden model's prompt."""
    case = json.loads((GOLDEN / name / "cases.json").read_text(encoding="utf-8"))["cases"][0]
    return np.load(GOLDEN / name / case["arrays"])["pixel_values"], case


def our_logits(model: LlavaModel, name: str = NAMES[0]) -> np.ndarray:
    """Logits of every position of a golden prompt, [L, V]."""
    pixels, case = golden_inputs(name)
    height, width = case["image_size_hw"]
    index = visual_token_index(width, height, ImageSpec(tile_size=28, patch_size=14, **ASPECTS[name]))
    ids = np.array([*case["prompt_before"], *[IMAGE_TOKEN_INDEX] * len(index), *case["prompt_after"]])
    labels, tiles = np.full_like(ids, IGNORE_INDEX), pixels.reshape(-1, *pixels.shape[-3:])
    example = Example(input_ids=ids, labels=labels, pixel_values=tiles, image_index=index)
    batch = collate([example], tokens_per_tile=4)
    with paddle.no_grad():
        hidden = model(
            paddle.to_tensor(batch.input_ids),
            paddle.to_tensor(batch.position_ids),
            pixel_values=paddle.to_tensor(batch.pixel_values.astype("float32")),
            merge_index=paddle.to_tensor(batch.merge_index),
        )
        return model.logits(hidden)[0].numpy()


def with_base(directory: Path, base: Path | str = BASE) -> Path:
    """An adapter directory whose settings name the base where it is, absolute or relative to the adapter."""
    path = directory / "adapter_config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(values["target_modules"], list):
        values["target_modules"].sort()  # PEFT keeps a set
    path.write_text(json.dumps({**values, "base_model_name_or_path": str(base)}, indent=1) + "\n", encoding="utf-8")
    return directory
