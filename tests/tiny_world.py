"""A world small enough to train in a second: pictures, conversations, a model and what pretraining starts from.

One is built per session (fixture `world` in conftest.py); tests write nothing into it.  Every run gets a folder of its
own.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from paddlemix.checkpoints.files.tensors import TensorEntry, array_entry, transposed
from paddlemix.checkpoints.files.weight_files import read_json, read_weights, write_json, write_weights
from paddlemix.checkpoints.layouts.weight_names import LLAMA, is_linear_weight
from paddlemix.checkpoints.load import load_pretrained
from paddlemix.checkpoints.pretrained import Pretrained, build_model, save_model
from paddlemix.config.load import load_config
from paddlemix.config.schema import RunConfig
from paddlemix.models.configuration import DecoderConfig, LlavaConfig, VisionConfig
from paddlemix.processors.text.tokenizer import Tokenizer
from tests.tiny import PATCH, TILE, draw_picture, make_processor
from tests.tiny_models import GOLDEN, randomise

CLIP_TOWER = GOLDEN / "llava_v15_llama" / "original" / "vision_tower"  # 28 px, patch 14, width 48
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
LORA = {"lora": True, "lora_rank": 4, "lora_alpha": 8, "lora_dropout": 0.1}
MAX_GAP = 1e-5  # of logits

_QUESTIONS = (
    ("What is the colour of the big bus?", "It is red."),
    ("Where is the small cat?", "On the mat, 0.25, 0.33."),
    ("How many?", "1, 2, 3 or 45"),
    ("这是什么颜色?", "红色的公交车。"),
)


@dataclass(frozen=True)
class World:
    """Where everything is.

    Args:
        root: holds all of it.
    """

    root: Path

    @property
    def model(self) -> Path:
        """A whole LLaVA model in our layout."""
        return self.root / "model"

    @property
    def llama(self) -> Path:
        """A text-only language model with a tokenizer, in the layout of Llama and Vicuna."""
        return self.root / "llama"

    @property
    def data(self) -> Path:
        """`train.json` (12 records), `eval.json` (5), `captions.json` (6) and the pictures they name."""
        return self.root / "data"

    @property
    def picture(self) -> Path:
        """One of the pictures."""
        return self.data / "images" / "0.png"

    def values(self, output_dir: Path, **changes: Any) -> dict[str, Any]:
        """The content of a recipe: four steps of full fine-tuning, unless `changes` say otherwise."""
        base = {
            "model_name_or_path": str(self.model),
            "dataset": {split: [{"data_files": str(self.data / f"{split}.json")}] for split in ("train", "eval")},
            "image_root": str(self.data),
            "output_dir": str(output_dir),
            "do_train": True,
            "max_steps": 4,
            "per_device_train_batch_size": 2,
            "per_device_eval_batch_size": 2,
            "learning_rate": 0.001,
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "save_strategy": "no",
            "disable_tqdm": True,
            "device": "cpu",
            "max_length": 256,
            "seed": 3,
        }
        return {**base, **changes}

    def recipe(self, folder: Path, **changes: Any) -> Path:
        """The same as a file, `folder`/recipe.json; the results go to `folder`/out unless `changes` say otherwise."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "recipe.json"
        write_json(path, {**self.values(folder / "out"), **changes})
        return path

    def config(self, output_dir: Path, **changes: Any) -> RunConfig:
        """The same, checked."""
        return load_config(
            None, [f"{key}={json.dumps(item)}" for key, item in self.values(output_dir, **changes).items()]
        )


def build_world(root: Path, tokenizer: Tokenizer, **text: int) -> World:
    """Writes a world into an empty folder.

    Args:
        text: other sizes of the language model than `TEXT`'s and the tokenizer's.
    """
    world, sizes = World(root), {"vocab_size": len(tokenizer), **TEXT, **text}
    _write_data(world.data)
    config = LlavaConfig(
        text=DecoderConfig(**sizes),  # type: ignore[arg-type]
        vision=VisionConfig(
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=TILE,
            patch_size=PATCH,
        ),
        mm_vision_select_layer=-1,
    )
    model = randomise(build_model(config), seed=5)
    save_model(Pretrained(model, make_processor(tokenizer), world.model), world.model)
    _write_llama(world, tokenizer, sizes)
    return world


def _write_data(directory: Path) -> None:
    (directory / "images").mkdir(parents=True)
    for number in range(6):
        draw_picture(30 + 5 * number, 40, number).save(directory / "images" / f"{number}.png")
    train = [_record(number) for number in range(12)]
    write_json(directory / "train.json", train)
    write_json(directory / "eval.json", [_record(number, 5) for number in range(5)])
    captions = [
        {"image": f"images/{number}.png", "conversations": [["<image>\n", _QUESTIONS[number % 4][1]]]}
        for number in range(6)
    ]
    write_json(directory / "captions.json", captions)


def _record(number: int, shift: int = 0) -> dict[str, Any]:
    """Every fourth is text only, every third has two rounds; answers are of different lengths."""
    question, answer = _QUESTIONS[(number + shift) % 4]
    second = [list(_QUESTIONS[(number + 1) % 4])] if number % 3 == 0 else []
    if number % 4 == 3:
        return {"conversations": [[question, answer], *second]}
    return {"image": f"images/{number % 6}.png", "conversations": [[f"<image>\n{question}", answer], *second]}


def _write_llama(world: World, tokenizer: Tokenizer, sizes: dict[str, int]) -> None:
    world.llama.mkdir()
    tensors: dict[str, TensorEntry] = {}
    for name, entry in read_weights(world.model).items():
        if name.startswith(("language_model.", "lm_head.")):
            tensors[LLAMA.to_theirs(name)] = transposed(entry) if is_linear_weight(name, entry.shape) else entry
    write_weights(world.llama, tensors, 10**9)
    write_json(world.llama / "config.json", {"model_type": "llama", **sizes})
    tokenizer.save(world.llama)


def weights(directory: Path) -> dict[str, np.ndarray]:
    """Name -> weight of a model or adapter directory, its base's included."""
    model = load_pretrained(directory).model
    return {name: parameter.numpy() for name, parameter in model.named_parameters()}


def changed(before: dict[str, np.ndarray], after: dict[str, np.ndarray]) -> set[str]:
    """Names whose bits differ."""
    assert before.keys() <= after.keys()
    return {name for name, value in after.items() if name not in before or value.tobytes() != before[name].tobytes()}


def reports(output_dir: Path, key: str = "loss") -> dict[int, float]:
    """Step -> value of those lines of a run's `metrics.jsonl` that have the key."""
    lines = (output_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    values = [json.loads(line) for line in lines]
    return {value["step"]: value[key] for value in values if key in value}


def without_weight(source: Path, target: Path, name: str) -> Path:
    """A copy of a model directory in which one weight is missing; `target` comes back."""
    target.mkdir()
    for path in source.iterdir():
        if path.suffix != ".safetensors":
            (target / path.name).write_bytes(path.read_bytes())
    kept = {
        key: array_entry(np.array(entry.read()), entry.dtype)
        for key, entry in read_weights(source).items()
        if key != name
    }
    write_weights(target, kept, 10**9)
    return target


def template_of(directory: Path) -> str:
    """The name of the template that is stored with a checkpoint."""
    return str(read_json(directory / "processor_config.json")["chat_template"])
