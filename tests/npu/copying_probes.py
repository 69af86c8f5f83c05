"""What `tests.npu.probes` prints of batches that go to the device."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import paddle

from paddlemix.checkpoints.files import tensors
from paddlemix.checkpoints.files.copying import copy_into
from paddlemix.checkpoints.files.finite import NotFiniteError, finite
from paddlemix.checkpoints.files.tensors import array_entry, transposed
from paddlemix.sample import Batch
from paddlemix.trainer.batches.dataloader import batch_inputs
from paddlemix.trainer.batches.device_copies import one_ahead
from tests.npu_double.build import LIBRARY


def _batch(packed: bool, image: bool, supervised: int = 3) -> Batch:
    random = np.random.default_rng(0)

    def whole(*shape: int) -> np.ndarray:
        return random.integers(0, 2**40, shape)

    segments = np.array([[1, 1, 2, 0], [1, 1, 1, 1]]) if packed else np.array([[1, 1, 1, 0], [1, 1, 1, 1]])
    floats = (random.standard_normal((2, 3, 6, 6)).astype(np.float32) if image else None, whole(8) if image else None)
    return Batch(
        input_ids=whole(2, 4),
        position_ids=whole(2, 4),
        segment_ids=segments,
        pixel_values=floats[0],
        merge_index=floats[1],
        loss_index=whole(supervised),
        loss_targets=whole(supervised),
    )


def copied_batches() -> dict[str, Any]:
    """Of each kind of batch: copies to the device, and the names of tensors that are not the arrays."""
    found: dict[str, Any] = {}
    kinds = {"text": (False, False), "image": (False, True), "packed": (True, True), "unsupervised": (False, True, 0)}
    for name, shape in kinds.items():
        batch = _batch(*shape)
        before = _copies()
        inputs = batch_inputs(batch)
        copies = _copies() - before
        held = {key: value for key, value in inputs.items() if isinstance(value, paddle.Tensor)}
        wrong = [key for key, value in held.items() if not _equal(value, getattr(batch, key))]
        found[name] = {"copies": copies, "wrong": wrong, "names": sorted(held)}
    return found


def _equal(tensor: paddle.Tensor, array: np.ndarray) -> bool:
    value = tensor.numpy()
    same = value.dtype == array.dtype and value.shape == array.shape and value.tobytes() == array.tobytes()
    return same and not tensor.place.is_cpu_place()


def _copies() -> int:
    library = ctypes.CDLL(str(Path(os.environ["CUSTOM_DEVICE_ROOT"]) / LIBRARY))
    library.npu_double_stat.restype = ctypes.c_size_t
    return int(library.npu_double_stat(0, b"h2d_calls"))


def turned_weights() -> dict[str, Any]:
    """Of each type: numbers of a parameter that differ from the file's, turned; whether it is whole in memory.  How
    often the host turned one; what is said of a number that is none."""
    values = np.random.default_rng(0).standard_normal((6, 10)).astype(np.float32)
    found: dict[str, Any] = {}
    with mock.patch.object(tensors, "_turned_strips", wraps=tensors._turned_strips) as turned:
        for dtype in ("float32", "bfloat16"):
            parameter = paddle.zeros([10, 6], dtype=dtype)
            copy_into(parameter, finite(transposed(array_entry(values)), "it"))
            wanted = paddle.to_tensor(values.T.copy()).astype(dtype)
            found[dtype] = [int((parameter != wanted).astype("int64").sum()), parameter.is_contiguous()]
        found["host transposes"] = turned.call_count
    values[3, 1] = np.inf
    try:
        copy_into(paddle.zeros([10, 6]), finite(transposed(array_entry(values)), "it"))
    except NotFiniteError as error:
        found["NaN"] = error.found
    return found


def made_ahead() -> dict[str, Any]:
    """What had been made when each item came out, and what came out before an error."""
    made: list[int] = []

    def items(fails: bool) -> Iterator[int]:
        for number in range(3):
            made.append(number)
            yield number
        if fails:
            raise ValueError("the fourth")

    order = [[number, len(made)] for number in one_ahead(items(fails=False))]
    came = []
    try:
        for number in one_ahead(items(fails=True)):
            came.append(number)
    except ValueError:
        came.append(-1)
    return {"order": order, "before an error": came}
