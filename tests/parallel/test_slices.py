"""The slices of a weight that has fewer numbers than its processes have room for (paddlemix.parallel.stage3)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import paddle

from paddlemix.parallel import stage3


def test_the_last_process_may_hold_padding_alone() -> None:
    """Three numbers in slices of two, for three processes; `concat` refuses a part without numbers."""
    slices = []
    for rank in range(3):
        weight: Any = paddle.base.framework.EagerParamBase(shape=[3], dtype="float32", name=f"weight_{rank}")
        weight.set_value(paddle.to_tensor([1.0, 2.0, 3.0]))
        where = {weight.name: [(0, 2), (2, 4), (4, 6)]}
        owner = SimpleNamespace(_param2buffer=where, _rank=rank, _optim=SimpleNamespace(_multi_precision=False))
        stage3.Stage3._param_storage(owner, weight, 6)  # type: ignore[arg-type]
        slices.append(weight.fw_storage.numpy())
    assert np.concatenate(slices).tolist() == [1, 2, 3, 0, 0, 0]
