"""Operators that a layer costs on the stand-in NPU, as JSON: in a micro-batch and for a decoded token.

`python -m tests.npu.budgets fused` runs where the plugin is, or `plain` without fused kernels; nothing here is a test.
Models of two and of three layers are run alike, and what the third adds is counted: by name, without operators that
only give a tensor another shape.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import paddle

from paddlemix.generation.generate import generate
from paddlemix.generation.sampling import GenerationSettings
from paddlemix.models.configuration import DecoderConfig, LlavaConfig
from paddlemix.models.kernels.fused import KernelSizes, choose_kernels
from paddlemix.models.llava import LlavaModel
from paddlemix.peft.lora import LoRAConfig, add_lora, linear_names
from paddlemix.sample import Example
from paddlemix.trainer.loss import LossModel
from tests.npu_double.build import LIBRARY

Counts = Counter[str]
_SHAPES = ("reshape", "squeeze", "flatten", "view_")
_AS_THE_TRAINER = {"lookup_table", "lookup_table_v2"}  # of PaddleNLP, for O2
_FEW, _MANY = 3, 5  # tokens of an answer


class Device:
    """The stand-in's counters."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(str(Path(os.environ["CUSTOM_DEVICE_ROOT"]) / LIBRARY))
        self._library.npu_double_calls.restype = ctypes.c_char_p
        self._library.npu_double_stat.restype = ctypes.c_size_t

    def during(self, work: Callable[[], object]) -> Counts:
        """Operators by name, and copies "h2d_calls" and "d2h_calls"."""
        before = self._counts()
        work()
        return _less(self._counts(), before)

    def _counts(self) -> Counts:
        pairs = (part.split("=") for part in self._library.npu_double_calls().decode().split(",") if part)
        found = Counter({name: int(calls) for name, calls in pairs if not any(part in name for part in _SHAPES)})
        copies = {name: self._library.npu_double_stat(0, name.encode()) for name in ("h2d_calls", "d2h_calls")}
        return found + Counter(copies)


def _less(larger: Counts, smaller: Counts) -> Counts:
    """What the first has more; where it has less, a negative number."""
    return Counter({name: larger[name] - smaller[name] for name in larger | smaller if larger[name] != smaller[name]})


def _model(layers: int) -> LlavaModel:
    paddle.seed(1)
    text = DecoderConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=97,
        max_position_embeddings=64,
    )
    model = LlavaModel(LlavaConfig(text=text))
    model.to(dtype="bfloat16")
    choose_kernels(None if sys.argv[1] == "fused" else False, "npu", "bfloat16", KernelSizes.of(text))
    return model


def trained(device: Device, layers: int, dropout: float | None) -> Counts:
    """A micro-batch behind another one, with recomputation; `dropout` is LoRA's, None trains all weights."""
    model = _model(layers)
    if dropout is not None:
        names = tuple(name for name in linear_names(model) if name.startswith("language_model."))
        add_lora(model, LoRAConfig(r=4, lora_alpha=8, lora_dropout=dropout, modules=names))
    for name, parameter in model.named_parameters():
        parameter.stop_gradient = dropout is not None and "lora_" not in name
    model.language_model.enable_recompute = True
    wrapped, ids = LossModel(model), paddle.arange(3, 35).unsqueeze(0)
    wrapped.train()
    places = {"loss_index": paddle.arange(20, 31), "loss_targets": ids[0, 21:32], "input_ids": ids}

    def step() -> None:
        with paddle.amp.auto_cast(True, level="O2", dtype="bfloat16", custom_white_list=_AS_THE_TRAINER):
            loss, _ = wrapped(position_ids=paddle.arange(32).unsqueeze(0), **places)
        loss.backward()

    step()
    model.clear_gradients()
    return device.during(step)


def decoded(device: Device, layers: int) -> Counts:
    """What two more tokens of one answer cost."""
    model = _model(layers)
    model.eval()
    ids = np.arange(3, 13)
    nothing = np.zeros(0, dtype=np.int64)
    prompt = Example(
        input_ids=ids, labels=ids, pixel_values=np.zeros([0, 3, 28, 28], dtype=np.float32), image_index=nothing
    )

    def answer(count: int) -> Counts:
        settings = GenerationSettings(max_new_tokens=count)
        return device.during(lambda: generate(model, [prompt], settings, end_ids=()))

    answer(_MANY)
    few = answer(_FEW)
    return _less(answer(_MANY), few)


def main() -> None:
    paddle.set_device("npu")
    device = Device()
    runs: dict[str, Callable[[int], Counts]] = {
        "full": lambda layers: trained(device, layers, None),
        "lora": lambda layers: trained(device, layers, 0.0),
        "lora with dropout": lambda layers: trained(device, layers, 0.1),
        "token": lambda layers: decoded(device, layers),
    }
    found = {}
    for name, run in runs.items():
        two, three = run(2), run(3)
        found[name] = {"model": two, "layer": _less(three, two)}
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
