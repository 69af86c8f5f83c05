"""Worker of `benchmarks/train.py`: the same text-only step with PaddleNLP's own Llama and LoRA."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

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


def build_model(work: Workload) -> Any:
    """LlamaForCausalLM with the workload's start weights."""
    from paddlenlp.transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=work.vocab_size,
            hidden_size=work.hidden_size,
            intermediate_size=work.intermediate_size,
            num_hidden_layers=work.num_hidden_layers,
            num_attention_heads=work.num_attention_heads,
            rms_norm_eps=work.rms_norm_eps,
            use_cache=False,
        )
    )
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        turned = len(shape) == 2 and "embed_tokens" not in name
        values = draw_weight(_transformers_name(name), shape[::-1] if turned else shape)
        parameter.set_value(values.T if turned else values)
    return model


def _transformers_name(name: str) -> str:
    """The name that LLaVA of transformers gives to one of Llama's weights."""
    return name.replace("llama.", "model.language_model.", 1)


def prepare(model: Any, method: str, work: Workload) -> Any:
    """With LoRA, freezes everything but the adapters."""
    if method == "full":
        return model
    from paddlenlp.peft import LoRAConfig, LoRAModel

    layers = [f".*{name}_proj.*" for name in ("q", "k", "v", "o", "gate", "up", "down")]
    rank = work.lora_rank
    adapted = LoRAModel(model, LoRAConfig(target_modules=layers, r=rank, lora_alpha=2 * rank, dtype="float32"))
    adapted.mark_only_lora_as_trainable()
    for name, parameter in adapted.named_parameters():
        if name.endswith("lora_A"):
            ours = name[name.index("llama.") :].replace("llama.", "language_model.", 1)
            parameter.set_value(draw_weight(ours, tuple(parameter.shape)[::-1]).T)
    return adapted


def main() -> int:
    """Builds everything and waits for the driver."""
    output = claim_output()
    method, work = parse_worker(__doc__ or "")
    import paddle
    from paddlenlp.trainer import Trainer  # noqa: F401  a run loads it: its memory counts

    model = prepare(build_model(work), method, work)
    model.train()
    raw = draw_batch(work)
    labels = np.where(raw.supervised, raw.input_ids, -100)
    labels = np.concatenate([labels[:, 1:], np.full_like(labels[:, :1], -100)], axis=1)  # it shifts nothing itself
    inputs = {"input_ids": paddle.to_tensor(raw.input_ids), "labels": paddle.to_tensor(labels)}
    optimizer = paddle.optimizer.AdamW(
        learning_rate=LEARNING_RATE,
        parameters=[parameter for parameter in model.parameters() if not parameter.stop_gradient],
        weight_decay=0.0,
        grad_clip=paddle.nn.ClipGradByGlobalNorm(MAX_GRAD_NORM),
    )
    square = paddle.rand([2048, 2048])

    def step() -> float:
        result = model(**inputs)
        loss = result[0] if isinstance(result, (tuple, list)) else result
        loss.backward()
        optimizer.step()
        optimizer.clear_grad()
        return float(loss)

    def product() -> int:
        paddle.matmul(square, square)
        return 2 * 2048**3

    take_turns(output, {"step": step, "product": product})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
