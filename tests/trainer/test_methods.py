"""Every method learns to read digits, gives the same answers when it is read again, and merges into a plain model.

Ten scans of handwritten digits, one of each, on a model of two layers with random weights: what is learned is learned
by heart, which shows that the trained weights reach the answer through the picture, not that they generalise; that
is what `paddlemix demo` shows.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from sklearn.datasets import load_digits

from paddlemix.generation.predict import predict
from paddlemix.generation.sampling import GenerationSettings
from paddlemix.tools import merge_lora_params
from paddlemix.trainer.recipe import run_recipe
from tests.tiny_world import World, weights

QUESTION = "What digit is this?"
ADAPTER = {"lora": True, "lora_rank": 8, "lora_alpha": 16, "lora_dropout": 0.0}
TOWER = {"vision_tower": "lora", "vision_lora_rank": 4, "vision_lora_alpha": 8}
METHODS: dict[str, dict[str, Any]] = {
    "full": {"learning_rate": 0.005},
    "lora": ADAPTER,
    "rslora": {**ADAPTER, "rslora": True},
    "lora_plus": {**ADAPTER, "lora_plus_scale": 4.0},
    "dora": {**ADAPTER, "use_dora": True},
    "pissa": {**ADAPTER, "pissa": True},
    "qlora_int8": {**ADAPTER, "quantize_base": "int8"},
    "qlora_nf4": {**ADAPTER, "quantize_base": "nf4"},
    "tower_lora": {**ADAPTER, **TOWER},
}


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `digits.json` and the scans 0 to 9."""
    folder = tmp_path_factory.mktemp("digits")
    scans = load_digits()
    records = []
    for digit in range(10):
        scan = scans.images[list(scans.target).index(digit)]
        Image.fromarray((scan * (255 / 16)).astype("uint8")).convert("RGB").resize((28, 28)).save(
            folder / f"{digit}.png"
        )
        turns = [{"from": "human", "value": f"<image>\n{QUESTION}"}, {"from": "gpt", "value": str(digit)}]
        records.append({"image": f"{digit}.png", "conversations": turns})
    (folder / "digits.json").write_text(json.dumps(records), encoding="utf-8")
    return folder


def answers(directory: Path, folder: Path) -> list[str]:
    """What the model of a directory reads on the ten scans."""
    questions = [{"image": f"{digit}.png", "text": QUESTION} for digit in range(10)]
    settings = GenerationSettings(max_new_tokens=4)
    return [answer.text for answer in predict(directory, questions, settings, image_root=str(folder))]


@pytest.mark.parametrize("method", METHODS)
def test_digits(world: World, digits: Path, tmp_path: Path, method: str) -> None:
    keys = {"learning_rate": 0.01, "projector": "full", **METHODS[method]}
    entry = {"train": [{"data_files": str(digits / "digits.json")}]}
    run = {"dataset": entry, "image_root": str(digits), "per_device_train_batch_size": 10, "max_steps": 80}
    run_recipe(world.config(tmp_path / "out", **run, **keys))
    read = answers(tmp_path / "out", digits)
    assert read == [str(digit) for digit in range(10)]
    if method == "full":
        return
    adapter, merged = str(tmp_path / "out"), str(tmp_path / "merged")
    assert merge_lora_params.main(["--lora_path", adapter, "--merge_model_path", merged]) in (0, None)
    assert not [name for name in weights(tmp_path / "merged") if "lora" in name]
    assert answers(tmp_path / "merged", digits) == read
