"""A batch's arrays as tensors on the current device, in as few copies as possible.

On an accelerator every copy from ordinary memory is waited for, and on a GPU everything queued before it too.  So the
whole numbers of a batch go as one array and are split where they arrive, pixels as another; on a GPU both through
pinned memory, which the device reads while the host continues.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

import numpy as np
import paddle

Item = TypeVar("Item")
_MOST_PENDING = 2  # batches whose copies may not have ended yet; the host runs no further ahead
_pinned: deque[tuple[Any, list[paddle.Tensor]]] = deque()


def on_device(arrays: Mapping[str, np.ndarray]) -> dict[str, paddle.Tensor]:
    """Name -> tensor of the same type, shape and numbers on the current device."""
    if paddle.get_device() == "cpu":
        return {name: paddle.to_tensor(array) for name, array in arrays.items()}
    # Whole numbers are joined and copied once, then split on the device; pixels or features go by themselves.
    whole = {name: array for name, array in arrays.items() if array.dtype == np.int64 and array.size}
    parts = {name: np.ascontiguousarray(array) for name, array in arrays.items() if name not in whole}
    joined = {"": np.concatenate([array.reshape(-1) for array in whole.values()])} if whole else {}
    copies = _copied({**parts, **joined})
    if whole:
        flat = copies.pop("")
        pieces = paddle.split(flat, [array.size for array in whole.values()]) if len(whole) > 1 else [flat]
        shaped = zip(whole.items(), pieces, strict=True)
        copies |= {name: piece.reshape(list(array.shape)) for (name, array), piece in shaped}
    return {name: copies[name] for name in arrays}


def _copied(arrays: Mapping[str, np.ndarray]) -> dict[str, paddle.Tensor]:
    """One copy each."""
    if not paddle.get_device().startswith("gpu"):
        return {name: paddle.to_tensor(array) for name, array in arrays.items()}
    # A copy that does not block needs memory that the system cannot move.
    pinned = {name: paddle.to_tensor(array, place=paddle.CUDAPinnedPlace()) for name, array in arrays.items()}
    copies = {name: tensor.cuda(blocking=False) for name, tensor in pinned.items()}
    over = paddle.device.Event()
    over.record()
    _pinned.append((over, list(pinned.values())))  # the memory is read until then
    while len(_pinned) > _MOST_PENDING:
        _pinned.popleft()[0].synchronize()
    return copies


def one_ahead(items: Iterable[Item], always: bool = False) -> Iterator[Item]:
    """The same items, each made while the one before it is in use; off the CPU.

    What making one raises is raised in its place, not earlier.

    Args:
        always: on the CPU too, where it saves no time.
    """
    if paddle.get_device() == "cpu" and not always:
        yield from items
        return
    # One item is held back, so its copy is under way while the model works on the one before.
    waiting: deque[Item] = deque()
    try:
        for item in items:
            waiting.append(item)
            if len(waiting) > 1:
                yield waiting.popleft()
    # The item before the failing one is whole and belongs to an earlier step.
    except Exception:
        yield from waiting
        raise
    yield from waiting
