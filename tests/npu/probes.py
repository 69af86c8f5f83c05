"""Numbers that single pieces give on the stand-in NPU in half precision, as JSON on standard output.

`python -m tests.npu.probes NAME ...` runs where the plugin is; nothing here is a test.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import paddle

from paddlemix.models.cached_decoder import _normalise
from paddlemix.models.configuration import DecoderConfig, LlavaConfig
from paddlemix.models.kernels.functions import RMSNormFunction
from paddlemix.models.kernels.operators import take_rows
from paddlemix.models.llava import LlavaModel
from paddlemix.peft.lora import LoRAConfig, add_lora, linear_names
from paddlemix.trainer.loss import LossModel, _cross_entropy
from tests.npu.answer_probes import answers
from tests.npu.copying_probes import copied_batches, made_ahead, turned_weights
from tests.npu.mixed_probes import attended, attention_slopes, unfit_steps
from tests.npu.precision_probes import LEVELS, token_losses
from tests.npu.quantized_probes import quantized_operators, quantized_steps, wide_weights

WIDTH, EPSILON = 4096, 1e-5
OUTLIERS, OUTLIER_AT = (300.0, 2000.0), 7


def norms() -> dict[str, Any]:
    """Length of each normalised row, found over expected; rows of normal numbers beside one outlier, whose own rounding
    to half precision is left out."""
    random = np.random.default_rng(0)
    rows = random.standard_normal([len(OUTLIERS), WIDTH]).astype(np.float32)
    rows[:, OUTLIER_AT] = OUTLIERS
    found: dict[str, Any] = {}
    for dtype, level in LEVELS:
        states = paddle.to_tensor(rows).astype(dtype)
        exact = states.astype("float32").numpy().astype(np.float64)
        scales = 1 / np.sqrt((exact**2).mean(-1) + EPSILON)
        weight = paddle.ones([WIDTH], dtype=dtype)
        with paddle.amp.auto_cast(True, level=level, dtype=dtype):
            outputs = RMSNormFunction.apply(states, weight, EPSILON)
            decoded = _normalise(weight, EPSILON, {}, states)
        lengths = [_length_of_the_rest(part.astype("float32").numpy()) for part in (outputs, decoded)]
        wanted = _length_of_the_rest(exact * scales[:, None])
        found[f"{dtype} {level}"] = [(length / wanted).tolist() for length in lengths]
    return found


def _length_of_the_rest(rows: np.ndarray) -> np.ndarray:
    return np.linalg.norm(np.delete(rows, OUTLIER_AT, axis=-1), axis=-1)


def scales() -> dict[str, Any]:
    """Largest relative error of the scale of a row, in training and in decoding, read off numbers that half precision
    holds exactly."""
    random = np.random.default_rng(1)
    rows = random.integers(-8, 9, [64, 512]).astype(np.float32)
    wanted = 1 / np.sqrt((rows.astype(np.float64) ** 2).mean(-1) + EPSILON)
    found: dict[str, Any] = {}
    for dtype, level in LEVELS:
        states, weight = paddle.to_tensor(rows).astype(dtype), paddle.ones([512], dtype=dtype)
        forms = (
            functools.partial(RMSNormFunction.apply, states, weight, EPSILON),
            functools.partial(_normalise, weight, EPSILON, {}, states),
        )
        worst = []
        for form in forms:
            with (
                paddle.amp.auto_cast(True, level=level, dtype=dtype),
                mock.patch.object(paddle, "rsqrt", side_effect=paddle.rsqrt) as made,
            ):
                form()
            means = made.call_args.args[0].astype("float32").numpy()[:, 0]
            worst.append(float((np.abs(1 / np.sqrt(means.astype(np.float64)) - wanted) / wanted).max()))
        found[f"{dtype} {level}"] = worst
    return found


def plain_losses() -> dict[str, Any]:
    """As `losses`, of float32 logits outside autocast; and what a product makes of a number of 12 bits of fraction."""
    random, worst = np.random.default_rng(2), 0.0
    for target in range(16):
        logits = (random.standard_normal([1, 997]) * 4).astype(np.float32)
        exact = logits[0].astype(np.float64)
        wanted = np.log(np.exp(exact - exact.max()).sum()) + exact.max() - exact[target]
        worst = max(worst, abs(float(_cross_entropy(paddle.to_tensor(logits), paddle.to_tensor([target]))[0]) - wanted))
    product = paddle.matmul(paddle.full([1, 1], 1 + 2.0**-12), paddle.ones([1, 1]))
    return {"worst": worst, "product": float(product)}


def losses() -> dict[str, Any]:
    """Largest error of a token's loss beside that of the same logits in float64."""
    random = np.random.default_rng(2)
    found: dict[str, Any] = {}
    for dtype, level in LEVELS:
        worst = 0.0
        for seed in range(16):
            logits = paddle.to_tensor((random.standard_normal([1, 997]) * 4).astype(np.float32)).astype(dtype)
            exact = logits.astype("float32").numpy()[0].astype(np.float64)
            target = seed * 61
            wanted = np.log(np.exp(exact - exact.max()).sum()) + exact.max() - exact[target]
            with paddle.amp.auto_cast(True, level=level, dtype=dtype):
                loss, _, _ = _cross_entropy(logits, paddle.to_tensor([target]))
            worst = max(worst, abs(float(loss) - wanted))
        found[f"{dtype} {level}"] = worst
    return found


def tiny(image_newline: bool = False) -> LlavaModel:
    """A language model of two layers with grouped heads, drawn from one seed."""
    paddle.seed(1)
    text = DecoderConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=97,
        max_position_embeddings=64,
    )
    return LlavaModel(LlavaConfig(text=text, image_newline=image_newline))


def recomputed() -> dict[str, Any]:
    """How far gradients of a LoRA step with dropout are from those without recomputation, and which kernels ran."""
    found: dict[str, Any] = {}
    for rate in (0.0, 0.3):
        grads = [_lora_gradients(rate, recompute) for recompute in (False, True)]
        pairs = [(first, second) for first, second in zip(*grads, strict=True)]
        found[str(rate)] = max(float(np.linalg.norm(first - second) / np.linalg.norm(first)) for first, second in pairs)
    return found


def _lora_gradients(rate: float, recompute: bool) -> list[np.ndarray]:
    model, random = tiny(), np.random.default_rng(0)
    model.to(dtype="bfloat16")
    for parameter in model.parameters():
        parameter.stop_gradient = True
    names = tuple(name for name in linear_names(model) if name.startswith("language_model."))
    add_lora(model, LoRAConfig(r=4, lora_alpha=8, lora_dropout=rate, modules=names))
    trained = [(name, item) for name, item in model.named_parameters() if "lora_" in name]
    for _, parameter in trained:
        parameter.stop_gradient = False
        values = random.standard_normal(parameter.shape).astype(np.float32) * 0.2
        parameter.set_value(paddle.to_tensor(values).astype(parameter.dtype))
    model.language_model.enable_recompute = recompute
    wrapped = LossModel(model)
    wrapped.train()
    ids = paddle.to_tensor(random.integers(3, 97, [1, 32]))
    places = {"loss_index": paddle.arange(20, 31), "loss_targets": ids[0, 21:32], "input_ids": ids}
    paddle.seed(7)
    with paddle.amp.auto_cast(True, level="O2", dtype="bfloat16"):
        loss, _ = wrapped(position_ids=paddle.arange(32).unsqueeze(0), **places)
    loss.backward()
    return [parameter.grad.astype("float32").numpy() for _, parameter in trained]


def newline() -> dict[str, Any]:
    """The gradient of a row that is taken three times, by the model's merge and by `gather`; each counts 1 a time."""
    index = paddle.to_tensor([0, 4, 1, 4, 2, 4])
    found = {}
    for name, take in (("merge", take_rows), ("gather", paddle.gather)):
        table = paddle.ones([5, 4])
        table.stop_gradient = False
        take(table, index).sum().backward()
        found[name] = table.grad[4].numpy().tolist()
    model = tiny(image_newline=True)
    features = paddle.zeros([2, 32])  # rows 7 and 8 behind the seven tokens, then the newline
    merged = model.merge(paddle.zeros([1, 7], dtype="int64"), features, paddle.to_tensor([0, 9, 7, 9, 8, 9, 1]))
    merged.sum().backward()
    found["image_newline"] = model.image_newline.grad.numpy().tolist()
    return found


PROBES: dict[str, Callable[[], dict[str, Any]]] = {
    "norms": norms,
    "scales": scales,
    "losses": losses,
    "plain_losses": plain_losses,
    "token_losses": token_losses,
    "recomputed": recomputed,
    "newline": newline,
    "answers": answers,
    "attended": attended,
    "attention_slopes": attention_slopes,
    "unfit_steps": unfit_steps,
    "copied_batches": copied_batches,
    "made_ahead": made_ahead,
    "turned_weights": turned_weights,
    "wide_weights": wide_weights,
    "quantized_steps": quantized_steps,
    "quantized_operators": quantized_operators,
}


def main() -> None:
    paddle.set_device("npu")
    sys.stdout.write(json.dumps({name: PROBES[name]() for name in sys.argv[1:]}))


if __name__ == "__main__":
    main()
