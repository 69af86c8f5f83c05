"""Plain torch loops over transformers' LLaVA classes and PEFT: the runs of `tests/training_cases.py` once more.

Runs with steps of text alone take LLaVA's own classes, which alone show a blank image for a text (`llava_batch`).
Optimiser, schedule, decay rule, loss and clipping are torch's and transformers' own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers
from PIL import Image
from transformers.trainer_pt_utils import get_parameter_names

from paddlemix.checkpoints.adapters.adapter import read_adapter
from paddlemix.checkpoints.load import load_pretrained
from paddlemix.config.schema import RunConfig
from paddlemix.sample import IGNORE_INDEX, IMAGE_TOKEN_INDEX, Example
from tests.reference.llava_package import add_llava
from tests.tiny import TILE
from tests.training_cases import ALPHA, IMAGE_TOKEN, RANK, STEPS, Case, case_config, steps_of

# what transformers.Trainer 4.55 leaves without decay, beside LayerNorms
_NO_DECAY = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
_PARTS = {"vision_tower": "vision_tower", "multi_modal_projector": "projector", "mm_projector": "projector"}


def run_reference(case: Case, start: Path, output_dir: Path) -> tuple[list[float], dict[str, np.ndarray]]:
    """The reference's run.

    Returns:
        The loss of every step, and every weight at the end by our name for it.
    """
    config = case_config(case, start, output_dir)
    model = load_reference(case, start)
    optimizer = build_optimizer(model, config)
    warmup = int(np.ceil(STEPS * config.warmup_ratio))
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, warmup, STEPS)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    losses = []
    for step in steps_of(case, start):
        make = llava_batch if case.modality else torch_batch
        batches = [make(batch, case.any_resolution) for batch in step]
        total = sum(int((batch["labels"] != IGNORE_INDEX).sum()) for batch in batches)
        parts = []
        for batch in batches:
            if case.loss_reduction == "tokens" and not case.modality:
                loss = model(**batch, num_items_in_batch=total).loss
            else:
                loss = model(**batch).loss / len(batches)
            loss.backward()
            parts.append(loss.item())
        torch.nn.utils.clip_grad_norm_(trained, config.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(sum(parts))
    return losses, final_weights(case, model, output_dir)


def load_reference(case: Case, start: Path) -> Any:
    """The model in training mode, with the adapter where there is one; marked what trains."""
    if case.modality:
        return load_llava(start)
    kind = transformers.LlavaNextForConditionalGeneration if case.any_resolution else None
    kind = kind or transformers.LlavaForConditionalGeneration
    model = kind.from_pretrained(start / "hf", attn_implementation="eager").train()
    if case.lora:
        model = _with_adapter(model, start / "adapter")
    for name, parameter in model.named_parameters():
        if "multi_modal_projector" in name:
            parameter.requires_grad = True
        elif case.lora:
            parameter.requires_grad = ".lora_" in name
        elif "vision_tower" in name:
            parameter.requires_grad = case.trains_tower
    return model


def load_llava(start: Path) -> Any:
    """LLaVA's own model in training mode; its tower does not train."""
    add_llava()
    from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM

    config = LlavaConfig.from_pretrained(start / "llava")
    config.mm_vision_tower = str(start / "llava" / config.mm_vision_tower)
    model = LlavaLlamaForCausalLM.from_pretrained(start / "llava", config=config, attn_implementation="eager").train()
    model.get_vision_tower().load_model()
    # a layer that LLaVA never calls, and the checkpoint therefore lacks; it would be saved as whatever memory held
    model.get_vision_tower().vision_tower.vision_model.post_layernorm.reset_parameters()
    return model


def _with_adapter(model: Any, adapter: Path) -> Any:
    targets = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets))
    filled = 0
    for name, entry in read_adapter(adapter).tensors().items():
        module, _, part = name.rpartition(".")
        if part in ("lora_A", "lora_B"):
            weight = getattr(wrapped.get_submodule(f"base_model.model.model.{module}"), part)["default"].weight
            weight.data = torch.tensor(np.ascontiguousarray(entry.read().T))
            filled += 1
    assert filled == sum(".lora_" in name for name, _ in wrapped.named_parameters())
    return wrapped


def build_optimizer(model: Any, config: RunConfig) -> Any:
    """AdamW with the groups of LLaVA's trainer: decay or not, by part."""
    decayed = set(get_parameter_names(model, [torch.nn.LayerNorm], _NO_DECAY))
    rates = {"projector": config.mm_projector_lr, "vision_tower": config.mm_vision_tower_lr}
    groups = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = next((ours for theirs, ours in _PARTS.items() if theirs in name), "language_model")
            rate = rates.get(part) or config.learning_rate
            decay = config.weight_decay if name in decayed else 0.0
            groups.append({"params": [parameter], "lr": rate, "weight_decay": decay})
    betas = (config.adam_beta1, config.adam_beta2)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, eps=config.adam_epsilon)


def torch_batch(samples: list[tuple[Example, list[Path]]], any_resolution: bool) -> dict[str, Any]:
    """Padded inputs with labels, as transformers' models take them."""
    length = max(len(example.input_ids) for example, _ in samples)
    ids = torch.zeros(len(samples), length, dtype=torch.int64)
    labels, mask = torch.full_like(ids, IGNORE_INDEX), torch.zeros_like(ids)
    for row, (example, _) in enumerate(samples):
        count = len(example.input_ids)
        tokens = np.where(example.input_ids == IMAGE_TOKEN_INDEX, IMAGE_TOKEN, example.input_ids)
        ids[row, :count], labels[row, :count] = torch.tensor(tokens), torch.tensor(example.labels)
        mask[row, :count] = 1
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    tiles = [torch.tensor(example.pixel_values) for example, _ in samples if len(example.pixel_values)]
    if tiles:
        inputs["pixel_values"] = torch.cat(tiles)
        if any_resolution:
            pictures = [path for _, paths in samples for path in paths]
            inputs["image_sizes"] = torch.tensor([Image.open(path).size[::-1] for path in pictures])
    return inputs


def llava_batch(samples: list[tuple[Example, list[Path]]], any_resolution: bool) -> dict[str, Any]:
    """Padded inputs with labels, as LLaVA's own model takes them, a blank image for each text.

    The model takes its images one by one, a text's like any other, and appends no row of it: the projector has a
    gradient of zero, with which AdamW goes on.

    Source: LLaVA llava/train/train.py, `LazySupervisedDataset.__getitem__`, and llava/model/llava_arch.py,
    `prepare_inputs_labels_for_multimodal` (llava-torch 1.2.2.post1); images of any resolution come as a list, as in
    LLaVA-NeXT's llava/train/train.py.
    """
    pad = torch.nn.utils.rnn.pad_sequence
    spans = [_placeholders(example) for example, _ in samples]
    ids = pad([torch.tensor(ids) for ids, _ in spans], batch_first=True)
    labels = pad([torch.tensor(labels) for _, labels in spans], batch_first=True, padding_value=IGNORE_INDEX)
    mask = pad([torch.ones(len(ids), dtype=torch.bool) for ids, _ in spans], batch_first=True)
    tiles = [torch.tensor(example.pixel_values) for example, _ in samples]
    images = [item if len(item) else torch.zeros(1, 3, TILE, TILE) for item in tiles]
    sizes = [Image.open(paths[0]).size if paths else (TILE, TILE) for _, paths in samples]
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels, "image_sizes": sizes}
    return {**inputs, "images": images if any_resolution else torch.cat(images)}


def _placeholders(example: Example) -> tuple[np.ndarray, np.ndarray]:
    """Ids and labels with one position for the image, which the model replaces by its features."""
    visual = example.input_ids == IMAGE_TOKEN_INDEX
    first = np.flatnonzero(visual)[:1]
    kept = ~visual
    kept[first] = True
    return example.input_ids[kept], example.labels[kept]


def final_weights(case: Case, model: Any, output_dir: Path) -> dict[str, np.ndarray]:
    """Every weight by our name for it; matrices as ours stand."""
    adapters = {}
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            ours = name.removeprefix("base_model.model.model.").replace(".default.weight", "")
            adapters[ours] = parameter.detach().numpy().T
    plain = model.unload() if case.lora else model
    plain.save_pretrained(output_dir)
    found = load_pretrained(output_dir).model
    return {name: parameter.numpy() for name, parameter in found.named_parameters()} | adapters
