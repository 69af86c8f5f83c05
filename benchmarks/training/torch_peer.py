"""Worker of `benchmarks/train.py`: the same step with torch, transformers and PEFT, each at its defaults.

Runs in the environment of `make reference`.  AdamW is the fused one, which transformers' Trainer takes for this torch.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

from turns import claim_output, take_turns  # noqa: E402
from workload import (  # noqa: E402
    LEARNING_RATE,
    MAX_GRAD_NORM,
    Workload,
    draw_batch,
    draw_weight,
    parse_worker,
)

LINEAR_LAYERS = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"


def build_model(work: Workload) -> Any:
    """LlavaForConditionalGeneration with the workload's start weights."""
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    text = LlamaConfig(
        vocab_size=work.vocab_size,
        hidden_size=work.hidden_size,
        intermediate_size=work.intermediate_size,
        num_hidden_layers=work.num_hidden_layers,
        num_attention_heads=work.num_attention_heads,
        rms_norm_eps=work.rms_norm_eps,
        use_cache=False,
    )
    vision = CLIPVisionConfig(
        hidden_size=work.tower_hidden_size,
        intermediate_size=work.tower_intermediate_size,
        num_hidden_layers=work.tower_layers,
        num_attention_heads=work.tower_heads,
        image_size=work.image_size,
        patch_size=work.patch_size,
    )
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=work.image_token)
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(draw_weight(name, tuple(parameter.shape))))
    return model


def prepare(model: Any, method: str, work: Workload) -> Any:
    """Freezes the tower; with LoRA, everything but the adapters and the projector."""
    import torch

    if method == "full":
        model.model.vision_tower.requires_grad_(False)
        return model
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(
        r=work.lora_rank,
        lora_alpha=2 * work.lora_rank,
        target_modules=LINEAR_LAYERS,
        modules_to_save=["multi_modal_projector"],
    )
    adapted = get_peft_model(model, settings)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_A" in name:
                ours = name.removeprefix("base_model.model.model.").replace(".lora_A.default.weight", ".lora_A")
                parameter.copy_(torch.from_numpy(draw_weight(ours, tuple(parameter.shape))))
    return adapted


def main() -> int:
    """Builds everything and waits for the driver."""
    output = claim_output()
    method, work = parse_worker(__doc__ or "")
    import torch
    from transformers import Trainer  # noqa: F401  a run loads it: its memory counts

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    model = prepare(build_model(work), method, work).train()
    raw = draw_batch(work)
    input_ids = torch.from_numpy(raw.input_ids)
    inputs = {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "pixel_values": torch.from_numpy(raw.pixel_values),
        "labels": torch.where(torch.from_numpy(raw.supervised), input_ids, -100),
    }
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    square = torch.rand(2048, 2048)

    def step() -> float:
        loss = model(**inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    def product() -> int:
        torch.matmul(square, square)
        return 2 * 2048**3

    take_turns(output, {"step": step, "product": product})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
