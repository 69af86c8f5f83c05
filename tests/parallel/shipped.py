"""The shipped files that share something between cards, their sizes cut so that two processes run them in seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import paddlemix.config
from tests.families.families import ANSWER, FAMILIES, QUESTION, FamilyFiles, build_family
from tests.tiny import PINPOINTS, draw_picture

RECIPES = Path(paddlemix.config.__file__).parent / "llava"
# Folders that are not called as their family is.
_FAMILY_OF = {"v1_5": "vicuna", "v1_6": "vicuna", "internvl": "internvit"}


def sharded_files() -> list[str]:
    """Names below `config/llava` of the files with a sharding stage."""
    return [str(path.relative_to(RECIPES)) for path in sorted(RECIPES.rglob("*.json")) if _read(path).get("sharding")]


def _read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8")))


def build_start(name: str, root: Path) -> FamilyFiles:
    """Writes a tiny model of a file's family, and its data, into an empty folder."""
    values, folder = _read(RECIPES / name), name.split("/")[0]
    (case,) = [case for case in FAMILIES if case.name == _FAMILY_OF.get(folder, folder)]
    files = build_family(case, root, image_newline=values["image_aspect_ratio"] == "anyres")
    draw_picture(60, 30, 3).save(root / "cat.png")
    pictures, answers = ("bus.png", "cat.png"), (ANSWER, "It is blue.", "On the mat.")
    records: list[dict[str, Any]] = [
        {"image": pictures[number % 2], "conversations": [[f"<image>\n{QUESTION}", answers[number % 3]]]}
        for number in range(6)
    ]
    if values["chat_template"] != "plain":  # which is for captions of pictures alone
        records += [{"conversations": [["How many?", "1, 2, 3 or 45"]]}] * 2
    (root / "train.json").write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    return files


def cut(name: str, files: FamilyFiles, output_dir: Path) -> dict[str, Any]:
    """A shipped file's values: paths, sizes and the length of the run are changed, and nothing else."""
    values = _read(RECIPES / name)
    is_start = "mm_vision_tower" in values  # from a language model and a tower
    values |= {
        "model_name_or_path": str(files.language_model if is_start else files.root / "llava_ours"),
        "dataset": dict.fromkeys(values["dataset"], [{"data_files": str(files.root / "train.json")}]),
        "image_root": str(files.root),
        "output_dir": str(output_dir),
        "max_length": 384,
        "max_steps": 3,
        "gradient_accumulation_steps": 2,
        "device": "npu",
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 2,
        # Each process draws its own dropout; with Adam's epsilon the last bit of a small gradient decides an update.
        **({"lora_dropout": 0.0} if values.get("lora") else {}),
        "adam_epsilon": 1e-4,
    }
    small = {"sharding_parallel_degree": 2, "lora_rank": 8, "lora_alpha": 16, "vision_lora_rank": 8}
    values |= {key: size for key, size in small.items() if key in values}
    if is_start:
        values |= {"mm_vision_tower": str(files.tower)}
    if values["image_aspect_ratio"] == "anyres":
        values |= {"image_grid_pinpoints": [list(grid) for grid in PINPOINTS]}
    return values
