"""PEFT's side of `tests/peft_cases.py`: a llava-hf model with an adapter, its files and its logits."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paddlemix.checkpoints.files import read_safetensors, write_safetensors
from paddlemix.checkpoints.tensors import array_entry
from tests.peft_cases import BASE, PeftCase, golden_inputs, respelt

torch = pytest.importorskip("torch", reason="needs the reference environment: make reference")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

SEED = 7


def plain_model(directory: Path = BASE) -> Any:
    """A llava-hf model of transformers, in evaluation mode."""
    return transformers.LlavaForConditionalGeneration.from_pretrained(directory, torch_dtype=torch.float32).eval()


def adapted_model(case: PeftCase) -> Any:
    """The golden base with a case's adapter, all of whose weights are moved away from their start."""
    torch.manual_seed(SEED)
    model = peft.get_peft_model(plain_model(), peft.LoraConfig(**{"r": 2, "lora_alpha": 4, **case.settings}))
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
    if case.is_old:
        path = directory / "adapter_model.safetensors"
        arrays = {respelt(key): array_entry(np.array(entry.read())) for key, entry in read_safetensors(path).items()}
        write_safetensors(path, arrays, {"format": "pt"})
    return directory


def their_logits(model: Any) -> np.ndarray:
    """Logits of every position of the golden prompt, [L, V]."""
    pixels, case = golden_inputs()
    image_token = model.config.image_token_id  # its embedding is replaced
    ids = [*case["prompt_before"], *[image_token] * case["num_image_tokens"], *case["prompt_after"]]
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), pixel_values=torch.tensor(pixels)).logits[0].numpy()


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
