"""Tensors that depend on nothing but their size, made once and kept on the device.

A copy from the host in every forward pass costs little by itself, but it makes a device wait that is fed ahead:
`tests/npu` counts that a training step makes none.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable

import numpy as np
import paddle

_COUNTED = 4096  # numbers kept at first; then twice as many


def cached_constant(make: Callable[..., np.ndarray], *arguments: Hashable) -> paddle.Tensor:
    """`make(*arguments)` as a tensor on the current device; only to be read."""
    # the device is part of the key: a process may compute on several, as the doctor does
    return _kept(paddle.get_device(), make, arguments)


@functools.lru_cache(maxsize=64)
def _kept(device: str, make: Callable[..., np.ndarray], arguments: tuple[Hashable, ...]) -> paddle.Tensor:
    return paddle.to_tensor(make(*arguments))


def cached_range(start: int, stop: int | None = None) -> paddle.Tensor:
    """int64: the numbers below `start`, or from `start` up to `stop`, as `paddle.arange` returns them, which copies
    its bounds to the device."""
    start, stop = (0, start) if stop is None else (start, stop)
    if paddle.get_device() == "cpu":
        return paddle.arange(start, stop)
    # a slice of one tensor that grows by doubling, since lengths differ from batch to batch
    size = _COUNTED
    while size < stop:
        size *= 2
    return cached_constant(np.arange, size)[start:stop]
