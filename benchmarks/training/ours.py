"""Worker of `benchmarks/train.py`: a step of `paddlemix`, with the model, loss and optimiser of its Trainer."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent), str(ROOT / "benchmarks")]

from turns import claim_output, take_turns  # noqa: E402
from workload import (  # noqa: E402
    LEARNING_RATE,
    MAX_GRAD_NORM,
    Workload,
    draw_batch,
    draw_weight,
    parse_worker,
)


def build_model(work: Workload) -> Any:
    """The model with the workload's start weights."""
    from paddlemix.checkpoints.layouts.weight_names import HF_NEW, is_linear_weight
    from paddlemix.models.configuration import DecoderConfig, LlavaConfig, VisionConfig
    from paddlemix.models.layers import skip_initialisation
    from paddlemix.models.llava import LlavaModel

    text = DecoderConfig(
        vocab_size=work.vocab_size,
        hidden_size=work.hidden_size,
        intermediate_size=work.intermediate_size,
        num_hidden_layers=work.num_hidden_layers,
        num_attention_heads=work.num_attention_heads,
        rms_norm_eps=work.rms_norm_eps,
    )
    vision = VisionConfig(
        hidden_size=work.tower_hidden_size,
        intermediate_size=work.tower_intermediate_size,
        num_hidden_layers=work.tower_layers,
        num_attention_heads=work.tower_heads,
        image_size=work.image_size,
        patch_size=work.patch_size,
    )
    with skip_initialisation():
        model = LlavaModel(LlavaConfig(text=text, vision=None if work.text_only else vision))
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        turned = is_linear_weight(name, shape)
        values = draw_weight(HF_NEW.to_theirs(name), shape[::-1] if turned else shape)
        parameter.set_value(values.T if turned else values)
    return model


def prepare(model: Any, method: str, work: Workload) -> tuple[Any, Any]:
    """Marks what trains, as the recipe does; gives the run's configuration and its optimiser."""
    from paddlemix.config.schema import RunConfig
    from paddlemix.peft.lora import LoRAConfig, add_lora, lora_parameters
    from paddlemix.trainer.optim import build_optimizer, build_schedule, set_learning_rates
    from paddlemix.trainer.trainable import plan_training, set_trainable

    config = RunConfig(
        lora=method == "lora",
        lora_rank=work.lora_rank,
        lora_dropout=0.0,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        max_grad_norm=MAX_GRAD_NORM,
    )
    plan = plan_training(model, config)
    if plan.lora_modules:
        add_lora(model, LoRAConfig(r=work.lora_rank, lora_alpha=2 * work.lora_rank, modules=plan.lora_modules))
        for name, parameter in lora_parameters(model):
            if name.endswith("lora_A"):
                parameter.set_value(draw_weight(name, tuple(parameter.shape)[::-1]).T)
    set_trainable(model, plan, config)
    set_learning_rates(model, config)
    return config, build_optimizer(model, config, build_schedule(config, 1))


def make_inputs(work: Workload) -> dict[str, Any]:
    """The batch in the form that the collator gives it."""
    import paddle

    raw = draw_batch(work)
    rows, columns = np.nonzero(np.tile(raw.supervised, (work.batch_size, 1)))
    inputs = {
        "input_ids": np.where(raw.input_ids == work.image_token, 0, raw.input_ids),
        "position_ids": np.tile(np.arange(work.length), (work.batch_size, 1)),
        "loss_index": rows * work.length + columns - 1,
        "loss_targets": raw.input_ids[rows, columns],
    }
    if raw.pixel_values is not None:
        is_image = (raw.input_ids == work.image_token).reshape(-1)
        inputs["pixel_values"] = raw.pixel_values
        inputs["merge_index"] = np.arange(is_image.size)
        inputs["merge_index"][is_image] = is_image.size + np.arange(is_image.sum())
    return {name: paddle.to_tensor(values) for name, values in inputs.items()}


def main() -> int:
    """Builds everything and waits for the driver."""
    output = claim_output()
    method, work = parse_worker(__doc__ or "")
    from paddlemix.trainer import paddlenlp_trainer  # noqa: F401, I001  a run loads PaddleNLP's Trainer: its memory counts
    import paddle
    from paddlemix.trainer.loss import LossModel

    model = build_model(work)
    _, optimizer = prepare(model, method, work)
    inputs, trained = make_inputs(work), LossModel(model)
    count = len(inputs["loss_index"])
    square = paddle.rand([2048, 2048])
    trained.train()

    def step() -> float:
        loss = trained(**inputs)[0] * (1.0 / count)
        loss.backward()
        optimizer.step()
        optimizer.clear_grad(set_to_zero=False)  # as the recipe's Trainer does
        return float(loss)

    def product() -> int:
        paddle.matmul(square, square)
        return 2 * 2048**3

    take_turns(output, {"step": step, "product": product})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
