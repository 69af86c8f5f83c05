"""What a command does to the stand-in NPU: kernels, copies and places, as a whole and step by step.

Counts around the trainer's own methods, in the process of the command; changes nothing that it computes.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

from tests.npu_double.build import LIBRARY

_COUNTERS = ("h2d", "d2h", "d2d", "h2d_calls", "d2h_calls", "peak")


class Watch:
    """Begins to count when it is made; one per process."""

    def __init__(self) -> None:
        root = os.environ.get("CUSTOM_DEVICE_ROOT")
        self._library = ctypes.CDLL(str(Path(root) / LIBRARY)) if root else None
        if self._library is not None:
            self._library.npu_double_kernels_ran.restype = ctypes.c_char_p
            self._library.npu_double_stat.restype = ctypes.c_size_t
        self._kernels: set[str] = set()
        self._models: list[Any] = []
        self._step_kernels: set[str] = set()
        self._micro_steps: list[dict[str, int]] = []
        self._starts: list[dict[str, int]] = []
        self._watch_models()
        self._watch_training()

    def report(self) -> dict[str, Any]:
        """What was seen.

        Returns:
            `places` of all weights and codes of every model with memory; `kernels` that ran, `*` after those that
            ran in low precision; `total` bytes and numbers of copies; `micro_steps` and `steps`, the same of each
            forward and backward pass and of each optimiser step with its report, the last one left out;
            `step_kernels`, which ran in the passes.
        """
        self._take_kernels()
        steps = [_difference(*pair) for pair in zip(self._starts, self._starts[1:], strict=False)]
        tensors = [tensor for model in self._models for tensor in (*model.parameters(), *model.buffers())]
        # a model built only for the shapes of its weights, see `parameter_shapes`, has no memory anywhere
        placed = {str(tensor.place) for tensor in tensors if tensor._is_initialized()}
        return {
            "places": sorted(placed),
            "kernels": sorted(self._kernels),
            "total": self._counters(),
            "micro_steps": self._micro_steps,
            "steps": steps,
            "step_kernels": sorted(self._step_kernels),
        }

    def _take_kernels(self) -> set[str]:
        """Those that ran since the last call."""
        text = self._library.npu_double_kernels_ran().decode() if self._library is not None else ""
        names = set(filter(None, text.split(",")))
        self._kernels |= names
        return names

    def _counters(self) -> dict[str, int]:
        if self._library is None:
            return dict.fromkeys(_COUNTERS, 0)
        return {name: self._library.npu_double_stat(0, name.encode()) for name in _COUNTERS}

    def _watch_models(self) -> None:
        from paddlemix.models.llava import LlavaModel

        build, models = LlavaModel.__init__, self._models

        def remembered(model: Any, *arguments: Any) -> None:
            build(model, *arguments)
            models.append(model)

        LlavaModel.__init__ = remembered

    def _watch_training(self) -> None:
        from paddlemix.trainer.callbacks.seeding import SeedEachStep
        from paddlemix.trainer.trainer import LlavaTrainer

        step, begin = LlavaTrainer.training_step, SeedEachStep.on_step_begin

        def counted(trainer: Any, *arguments: Any, **named: Any) -> Any:
            self._take_kernels()
            before = self._counters()
            loss = step(trainer, *arguments, **named)
            self._micro_steps.append(_difference(before, self._counters()))
            self._step_kernels |= self._take_kernels()
            return loss

        def marked(callback: Any, *arguments: Any, **named: Any) -> None:
            self._starts.append(self._counters())
            begin(callback, *arguments, **named)

        LlavaTrainer.training_step, SeedEachStep.on_step_begin = counted, marked


def _difference(before: dict[str, int], after: dict[str, int]) -> dict[str, int]:
    return {name: after[name] - before[name] for name in before}
