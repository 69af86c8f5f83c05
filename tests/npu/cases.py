"""The trainings that are compared with the CPU's: command and what they change of the world's recipe."""

from __future__ import annotations

from typing import Any

from tests.tiny_world import LORA, World

FINETUNE, PRETRAIN = "tools.supervised_finetune", "examples.llava.pretrain"
# Dropout draws from the device's own generator, so that no device gives another's losses.
LORA_WITHOUT_DROPOUT = {**LORA, "lora_dropout": 0.0}


def trainings(world: World) -> dict[str, tuple[str, dict[str, Any]]]:
    """Name -> command and changes."""
    captions = {"dataset": {"train": [{"data_files": str(world.data / "captions.json")}]}}
    cases: dict[str, tuple[str, dict[str, Any]]] = {
        "full": (FINETUNE, {"gradient_accumulation_steps": 2, "vision_tower": "full"}),
        "lora": (FINETUNE, LORA_WITHOUT_DROPOUT),
        "pretrain": (PRETRAIN, captions),
        "packed": (FINETUNE, {"mixtoken": True, "recompute": True}),
        "qlora": (FINETUNE, {**LORA_WITHOUT_DROPOUT, "quantize_base": "nf4"}),
    }
    # With Adam's own epsilon the last bit of a gradient near zero decides the sign of a whole update.
    return {name: (command, {**changes, "adam_epsilon": 1e-4}) for name, (command, changes) in cases.items()}


NAMES = ("full", "lora", "pretrain", "packed", "qlora")
