"""Constants on the device: the numbers of paddle, made once."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from paddlemix.models.kernels import cached_constants
from paddlemix.models.kernels.cached_constants import cached_constant, cached_range


@pytest.mark.parametrize("bounds", [(5,), (0,), (3, 9), (4000, 5000), (0, 9000)])
def test_counted_is_arange(monkeypatch: pytest.MonkeyPatch, bounds: tuple[int, ...]) -> None:
    wanted = paddle.arange(*bounds)
    monkeypatch.setattr(cached_constants.paddle, "get_device", lambda: "npu:0")  # takes the way of other devices
    found = cached_range(*bounds)
    assert found.dtype == wanted.dtype and np.array_equal(found.numpy(), wanted.numpy())


def test_a_constant_is_made_once() -> None:
    made = []

    def make(size: int) -> np.ndarray:
        made.append(size)
        return np.ones(size, dtype=np.float32)

    assert cached_constant(make, 3) is cached_constant(make, 3)
    assert cached_constant(make, 4).shape == [4] and made == [3, 4]
