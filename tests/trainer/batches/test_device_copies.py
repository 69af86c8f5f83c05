"""Copies of a batch through pinned memory, on stand-ins for a GPU's; a device's own are in tests/npu/test_copies.py."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
import paddle
import pytest

from paddlemix.trainer.batches import device_copies
from paddlemix.trainer.batches.device_copies import on_device, one_ahead


def test_pinned_memory_is_kept_until_its_copy_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two batches may be under way; before a third is, the first must be over."""
    copied: list[bool] = []
    log: list[tuple[str, int]] = []

    class Event:
        def __init__(self) -> None:
            self.number = sum(kind == "recorded" for kind, _ in log)

        def record(self) -> None:
            log.append(("recorded", self.number))

        def synchronize(self) -> None:
            assert len(held) == 2  # the memory of the others
            log.append(("over", self.number))

    def cuda(tensor: paddle.Tensor, blocking: bool = True) -> paddle.Tensor:
        copied.append(blocking)
        return tensor.clone()

    held: deque[Any] = deque()
    monkeypatch.setattr(device_copies, "_pinned", held)
    monkeypatch.setattr(paddle, "get_device", lambda: "gpu:0")
    monkeypatch.setattr(paddle, "CUDAPinnedPlace", paddle.CPUPlace)
    monkeypatch.setattr(paddle.Tensor, "cuda", cuda)
    monkeypatch.setattr(paddle.device, "Event", Event)
    random = np.random.default_rng(0)
    for _ in range(4):
        arrays = {
            "ids": random.integers(0, 2**40, (2, 3)),
            "pixels": random.standard_normal((1, 2, 2)).astype(np.float32),
            "order": random.integers(0, 9, 5),
            "none": np.zeros(0, np.int64),
        }
        found = on_device(arrays)
        assert list(found) == list(arrays)
        for name, array in arrays.items():
            value = found[name].numpy()
            assert (value.dtype, value.shape, value.tobytes()) == (array.dtype, array.shape, array.tobytes())
    assert copied == [False] * 12  # numbers, pixels and what is empty, of four
    recorded = [number for kind, number in log if kind == "recorded"]
    assert recorded == [0, 1, 2, 3]
    assert [number for kind, number in log if kind == "over"] == [0, 1]


def test_on_cpu_nothing_is_made_ahead() -> None:
    made: list[int] = []
    items = one_ahead(made.append(number) or number for number in range(3))  # type: ignore[func-returns-value]
    assert [(number, len(made)) for number in items] == [(0, 1), (1, 2), (2, 3)]
