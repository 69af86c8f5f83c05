"""Single steps of the self-test's tiny model, as the checks of a card need them.

Import it only after the environment is prepared, since it loads paddle.
"""

from __future__ import annotations

import contextlib
import time
from typing import Any

import numpy as np
import paddle

from paddlemix.datasets.collate import collate
from paddlemix.device import set_seed
from paddlemix.doctor.self_test import CONFIG, build, examples, prompts
from paddlemix.generation.incremental import IncrementalModel
from paddlemix.peft.lora import LoRAConfig, add_lora, linear_names
from paddlemix.peft.quantize import QuantizationConfig, quantize_model
from paddlemix.trainer.batches.dataloader import batch_inputs
from paddlemix.trainer.loss import LossModel

Weights = dict[str, np.ndarray]
_STEPS = 4
# 1,500 squared is 2.25 million, and float16 ends at 65,504
_SHARPER, _OUTLIER = 5.0, 1500.0


def sharpened(weights: Weights) -> Weights:
    """Weights with which precisions can be told apart: scores far from even, and at the first token an activation as
    large as every Llama's, whose square float16 cannot hold."""
    wider = {name: value * _SHARPER if value.ndim > 1 else value for name, value in weights.items()}
    embedding = wider["language_model.embed_tokens.weight"].copy()
    embedding[1, 0] = _OUTLIER
    return {**wider, "language_model.embed_tokens.weight": embedding}


def loss_and_gradient(weights: Weights, dtype: str) -> tuple[float, float]:
    """(mean loss, length of the gradient of all weights) on the current device; autocast O2 in half precision."""
    model = build(weights)
    # in float32 this changes nothing, and autocast is off
    model.to(dtype=dtype)
    loss = _loss(LossModel(model), _inputs(), dtype)
    loss.backward()
    grads = [weight.grad.astype("float32") for weight in model.parameters() if weight.grad is not None]
    return float(loss), float(sum(float((grad * grad).sum()) for grad in grads)) ** 0.5


def adapter_step(weights: Weights, kind: str | None) -> tuple[float, float]:
    """(seconds, last loss) of a step in bfloat16 with LoRA, dropout and recomputation.

    Args:
        kind: of quantisation of the language model; None for none.
    """
    model = build(weights)
    if kind is not None:
        quantize_model(model, QuantizationConfig(kind=kind))
    # As in a run with LoRA: the base is frozen before adapters are added.
    for weight in model.parameters():
        weight.stop_gradient = True
    names = tuple(name for name in linear_names(model) if name.startswith("language_model."))
    add_lora(model, LoRAConfig(modules=names, r=4, lora_alpha=8, lora_dropout=0.1))
    model.to(dtype="bfloat16")  # after the start values, which NPU draws in float32
    trained = [weight for name, weight in model.named_parameters() if "lora_" in name]
    for weight in trained:
        weight.stop_gradient = False
    model.language_model.enable_recompute = True
    optimizer = paddle.optimizer.AdamW(0.01, parameters=trained, multi_precision=True)
    wrapped, inputs, start, loss = LossModel(model), _inputs(), 0.0, paddle.zeros([])
    wrapped.train()
    # The same dropout on every device.
    set_seed(0)
    for number in range(_STEPS + 1):
        if number == 1:  # the first prepares operators
            paddle.device.synchronize()
            start = time.perf_counter()
        loss = _loss(wrapped, inputs, "bfloat16")
        loss.backward()
        optimizer.step()
        optimizer.clear_grad()
    # reads the loss, so the clock stops after the device has finished
    last = float(loss)
    return (time.perf_counter() - start) / _STEPS, last


def decoding_seconds(weights: Weights, tokens: int) -> float:
    """Of one token of the tiny model in bfloat16, four rows at once, greedily."""
    model = build(weights)
    model.to(dtype="bfloat16")
    model.eval()
    incremental = IncrementalModel(model)
    chosen = _tokens(incremental.prefill(prompts(), greedy=True))
    chosen = _tokens(incremental.step(chosen))
    start = time.perf_counter()
    for _ in range(tokens):
        chosen = _tokens(incremental.step(chosen))
    return (time.perf_counter() - start) / tokens


def _tokens(scores: np.ndarray) -> np.ndarray:
    """The most likely token of each row; on a card it is already chosen."""
    return scores if scores.ndim == 1 else scores.argmax(axis=-1)


def _inputs() -> dict[str, Any]:
    inputs = batch_inputs(collate(examples(), CONFIG.tokens_per_tile))
    return {name: value for name, value in inputs.items() if isinstance(value, paddle.Tensor)}


def _loss(model: LossModel, inputs: dict[str, Any], dtype: str) -> paddle.Tensor:
    half = dtype != "float32"
    with paddle.amp.auto_cast(True, level="O2", dtype=dtype) if half else contextlib.nullcontext():
        return model(**inputs)[0] * (1 / len(inputs["loss_index"]))
