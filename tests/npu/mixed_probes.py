"""What `tests.npu.probes` prints of mixed precision: attention over states of several types, gradients that are NaN."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import paddle
from paddle import nn

from paddlemix.errors import UserError
from paddlemix.models.attention import attend, attention_mask
from paddlemix.trainer.steps.clipping import MeasuredNorm
from paddlemix.trainer.steps.loss_scale import StepScaler
from paddlemix.trainer.steps.step_losses import StepLosses

LEVELS: tuple[tuple[str, str, list[str] | None], ...] = (
    *(("bfloat16", level, None) for level in ("O1", "O2")),
    *(("float16", level, None) for level in ("O1", "O2")),
    ("float16", "O1", ["matmul_v2"]),  # a run's amp_custom_black_list
)


def attended() -> dict[str, Any]:
    """Largest relative error of attention's outputs and gradients under autocast, which gives queries, keys and values
    in float32 or in low precision."""
    random = np.random.default_rng(0)
    states = [random.standard_normal([2, 6, heads, 8]).astype(np.float32) for heads in (4, 2, 2)]
    wanted = _attended(states, ("float32",) * 3)
    found: dict[str, Any] = {}
    for dtype, level, black in LEVELS:
        worst = 0.0
        for types in itertools.product(("float32", dtype), repeat=3):
            with paddle.amp.auto_cast(True, level=level, dtype=dtype, custom_black_list=black):
                result = _attended(states, types)
            pairs = zip(result, wanted, strict=True)
            worst = max(worst, *(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs))
        found[f"{dtype} {level} {black}"] = worst
    return found


def _attended(states: list[np.ndarray], types: tuple[str, ...]) -> list[np.ndarray]:
    inputs = [paddle.to_tensor(part).astype(kind) for part, kind in zip(states, types, strict=True)]
    for tensor in inputs:
        tensor.stop_gradient = False
    output = attend(*inputs, attention_mask(6, 6, None, None))
    with paddle.amp.auto_cast(enable=False):  # as a training step's backward pass
        grads = paddle.grad([output], inputs, grad_outputs=[paddle.ones_like(output)])
    assert [grad.dtype for grad in grads] == [tensor.dtype for tensor in inputs]
    return [part.astype("float32").numpy() for part in (output, *grads)]


def attention_slopes() -> dict[str, Any]:
    """Relative error of attention's gradients of queries, keys and values in half precision, beside those in float32 of
    the same rounded states, where rows have much in common: values around 20, and an outlier of 2,000 at one token."""
    random = np.random.default_rng(0)
    normal = [random.standard_normal([1, 48, 4, 64]).astype(np.float32) for _ in range(4)]
    around, outlier = normal[2] + 20, normal[2].copy()
    outlier[:, 0, :, 7] = 2000
    found: dict[str, Any] = {}
    for dtype in ("bfloat16", "float16"):
        for name, values in (("around 20", around), ("outlier", outlier)):
            inputs = [paddle.to_tensor(part).astype(dtype) for part in (*normal[:2], values, normal[3])]
            grads, wanted = (_slopes([part.astype(kind) for part in inputs]) for kind in (dtype, "float32"))
            errors = [float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in zip(grads, wanted, strict=True)]
            found[f"{dtype}, {name}"] = errors
    return found


def _slopes(states: list[paddle.Tensor]) -> list[np.ndarray]:
    *inputs, slope = states
    for tensor in inputs:
        tensor.stop_gradient = False
    output = attend(*inputs, attention_mask(48, 48, None, None))
    return [part.astype("float32").numpy() for part in paddle.grad([output], inputs, grad_outputs=[slope])]


def unfit_steps() -> dict[str, Any]:
    """Loss scales of steps whose gradient is NaN at each, and what ends them."""
    layer, scales = nn.Linear(2, 2), list[float]()
    losses = StepLosses()
    scaler = StepScaler(4.0, losses)
    scaler.clip = MeasuredNorm(None, losses=losses)
    optimizer = paddle.optimizer.AdamW(parameters=layer.parameters(), grad_clip=scaler.clip)
    for step in range(10):
        scales.append(float(scaler._scale))
        losses.add(paddle.ones([]), 1.0, ["train.json record 3"])
        losses.end_step(step)
        scaler.scale(layer(paddle.full([1, 2], float("nan"))).sum()).backward()
        try:
            scaler.step(optimizer)
        except UserError as error:
            return {"scales": scales, "said": str(error)}
        scaler.update()
        optimizer.clear_grad()
    return {"scales": scales, "said": ""}
