"""PEFT's side of `tests/peft_cases.py`: a llava-hf model with an adapter, its files and its logits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paddlemix.checkpoints.files.tensors import array_entry
from paddlemix.checkpoints.files.weight_files import read_safetensors, write_safetensors
from tests.peft_cases import BASE, NAMES, PeftCase, golden_inputs, respelt

torch = pytest.importorskip("torch", reason="needs the reference environment: make reference")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

SEED = 7
IS_5 = int(transformers.__version__.partition(".")[0]) >= 5


def plain_model(directory: Path = BASE) -> Any:
    """A llava-hf model of transformers, in evaluation mode."""
    is_next = json.loads((directory / "config.json").read_text(encoding="utf-8"))["model_type"] == "llava_next"
    name = f"Llava{'Next' if is_next else ''}ForConditionalGeneration"
    return getattr(transformers, name).from_pretrained(directory, torch_dtype=torch.float32).eval()


def adapted_model(case: PeftCase, base: Path = BASE) -> Any:
    """A golden base with a case's adapter, all of whose weights are moved away from their start."""
    torch.manual_seed(SEED)
    model = peft.get_peft_model(plain_model(base), peft.LoraConfig(**{"r": 2, "lora_alpha": 4, **case.settings}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter += 0.05 * parameter.abs().mean().clamp(min=0.1) * torch.randn_like(parameter)
            if "lora_B" in name:
                parameter += 0.3 * torch.randn_like(parameter)
    return model.eval()


def save(model: Any, case: PeftCase, directory: Path) -> Path:
    """What PEFT writes, in the spelling of the case."""
    model.save_pretrained(directory, **case.saving)
    (directory / "README.md").unlink(missing_ok=True)
    if case.spelling != "4.52" and not IS_5:
        path = directory / "adapter_model.safetensors"
        arrays = {key: array_entry(np.array(entry.read())) for key, entry in read_safetensors(path).items()}
        write_safetensors(path, {respelt(key, case.spelling): e for key, e in arrays.items()}, {"format": "pt"})
    return directory


def their_logits(model: Any, name: str = NAMES[0]) -> np.ndarray:
    """Logits of every position of a golden prompt, [L, V]."""
    pixels, case = golden_inputs(name)
    image_token = model.config.image_token_id  # its embedding is replaced
    ids = [*case["prompt_before"], *[image_token] * case["num_image_tokens"], *case["prompt_after"]]
    sizes = {"image_sizes": torch.tensor([case["image_size_hw"]])} if name == NAMES[1] else {}
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), pixel_values=torch.tensor(pixels), **sizes).logits[0].numpy()


def loaded(adapter: Path, base: Path = BASE) -> Any:
    """A llava-hf model with an adapter directory, as PEFT loads it."""
    return peft.PeftModel.from_pretrained(plain_model(base), adapter).eval()


def merged_directory(model: Any, directory: Path) -> Path:
    """`merge_and_unload`, saved as llava-hf, with the base's other files."""
    model.merge_and_unload().save_pretrained(directory)
    for path in BASE.iterdir():
        if not (directory / path.name).exists():
            shutil.copy(path, directory)
    return directory
