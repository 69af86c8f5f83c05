"""What `tests.npu.probes` prints of quantised layers."""

from __future__ import annotations

from typing import Any
from unittest import mock

import numpy as np
import paddle

from paddlemix.models.configuration import DecoderConfig, LlavaConfig
from paddlemix.models.llava import LlavaModel
from paddlemix.peft import wide_weights as module
from paddlemix.peft.lora import LoRAConfig, add_lora, linear_names
from paddlemix.peft.quantize import QuantizationConfig, quantize_model
from paddlemix.peft.quantized_linear import QuantizedLinear
from paddlemix.peft.quantized_weight import KINDS, QuantizedWeight, quantize_weight
from paddlemix.peft.wide_weights import WideGroup
from paddlemix.trainer.loss import LossModel
from tests.npu.budgets import Device
from tests.tiny_models import dequantize_model

SHAPES = ((128, 64), (192, 96), (128, 40), (100, 33))  # in, out
PIECES = {"whole": 2**30, "joined": 4 * 128 * 64 + 4 * 192 * 96, "cut": 4 * 192 * 7}


def wide_weights() -> dict[str, Any]:
    """How many numbers differ from those of the CPU, and which groups hold wide weights after each use."""
    random = np.random.default_rng(0)
    found: dict[str, Any] = {}
    for kind in ("int8", "nf4"):
        coded = [quantize_weight(random.standard_normal(shape).astype(np.float32), kind) for shape in SHAPES]
        expected = [_on_cpu(weight) for weight in coded]
        found[kind] = {}
        for name, size in PIECES.items():
            with mock.patch.object(module, "WIDE_BYTES", size):
                group = _group(coded)
                found[kind][name] = {
                    dtype: sum(
                        int((made.astype("float32").numpy() != rows.astype(dtype).astype("float32").numpy()).sum())
                        for made, rows in zip(group.made(getattr(paddle, dtype)), expected, strict=True)
                    )
                    for dtype in ("float32", "bfloat16")
                }
    first, second = _group(coded), _group(coded)
    held = []
    for group in (first, second):
        group.weight(group._members[0], paddle.bfloat16)
        held.append([bool(each._wide) for each in (first, second)])
    second._members[0].to(dtype="bfloat16")
    held.append([bool(each._wide) for each in (first, second)])
    return {**found, "held": held}


def _on_cpu(weight: QuantizedWeight) -> paddle.Tensor:
    """float32 [out, in] of the layer as it is on the CPU."""
    paddle.set_device("cpu")
    layer = QuantizedLinear(weight.kind, weight.shape)
    layer.fill(weight)
    rows = layer.dequantized().transpose([1, 0]).contiguous()
    paddle.set_device("npu")
    return rows


def _group(weights: list[QuantizedWeight]) -> WideGroup:
    layers = [QuantizedLinear(weight.kind, weight.shape) for weight in weights]
    group = WideGroup(layers)
    for layer, weight in zip(layers, weights, strict=True):
        layer.group = group
        layer.fill(weight)
    return group


def quantized_steps() -> dict[str, Any]:
    """Of each kind: how far loss and gradients of a LoRA step are from those on the weights that codes stand for."""
    found: dict[str, Any] = {}
    for kind in KINDS:
        found[kind] = {}
        for name, recompute in (("plain", False), ("recomputed", True)):
            (loss, grads), (wide_loss, wide) = (_Step(kind, 2, recompute, held).run() for held in (True, False))
            error = max(float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in zip(grads, wide, strict=True))
            found[kind][name] = [abs(loss - wide_loss) / wide_loss, error]
    return found


def quantized_operators() -> dict[str, Any]:
    """Of each kind, and of weights as they are: operators per decoder layer and step under recomputation."""
    return {kind or "plain": _operators(kind) for kind in (*KINDS, None)}


def _operators(kind: str | None) -> int:
    counts, device = [], Device()
    for layers in (2, 3):
        step = _Step(kind, layers, recompute=True)
        step.run()  # scales are decoded once
        found = device.during(step.run)
        counts.append(sum(number for name, number in found.items() if not name.endswith("_calls")))
    return counts[1] - counts[0]


class _Step:
    """A language model in bf16 with an adapter, and one batch.

    Args:
        kind: how its weights are held; None for as they are.
        layers: of the decoder.
        recompute: of those.
        held: False puts the weights that the codes stand for in their place.
    """

    def __init__(self, kind: str | None, layers: int, recompute: bool, held: bool = True) -> None:
        paddle.seed(1)
        random = np.random.default_rng(0)
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
        text = DecoderConfig(num_hidden_layers=layers, vocab_size=97, max_position_embeddings=64, **sizes)
        model = LlavaModel(LlavaConfig(text=text))
        model.to(dtype="bfloat16")
        if kind is not None:
            quantize_model(model, QuantizationConfig(kind=kind))
        if not held:
            dequantize_model(model, "bfloat16")
        for parameter in model.parameters():
            parameter.stop_gradient = True
        names = tuple(name for name in linear_names(model) if name.startswith("language_model."))
        add_lora(model, LoRAConfig(r=4, lora_alpha=8, lora_dropout=0.1, modules=names))
        self.trained = [item for name, item in model.named_parameters() if "lora_" in name]
        for parameter in self.trained:
            parameter.stop_gradient = False
            values = random.standard_normal(parameter.shape).astype(np.float32) * 0.1
            parameter.set_value(paddle.to_tensor(values).astype(parameter.dtype))
        model.language_model.enable_recompute = recompute
        self.model = LossModel(model)
        self.model.train()
        ids = paddle.to_tensor(random.integers(3, 97, [1, 32]))
        places = {"loss_index": paddle.arange(20, 31), "loss_targets": ids[0, 21:32], "input_ids": ids}
        self.inputs = {**places, "position_ids": paddle.arange(32).unsqueeze(0)}

    def run(self) -> tuple[float, list[np.ndarray]]:
        """Loss and gradients, in float32."""
        for parameter in self.trained:
            parameter.clear_gradient(False)
        paddle.seed(7)
        with paddle.amp.auto_cast(True, level="O2", dtype="bfloat16"):
            loss, _ = self.model(**self.inputs)
        loss.backward()
        assert all(parameter.dtype == paddle.bfloat16 for parameter in self.trained)
        return float(loss), [parameter.grad.astype("float32").numpy() for parameter in self.trained]
