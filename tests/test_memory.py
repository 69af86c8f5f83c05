"""Memory that runs out: how it is told from other errors, and what the user reads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from paddlemix.trainer.less_memory import less_memory

from paddlemix.errors import MissingFileError, UserError
from paddlemix.memory import is_out_of_memory, out_of_memory_explained
from tests.tiny_world import LORA, World


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("(ResourceExhausted) Fail to alloc memory of 8 size, error code is 12."),
        MemoryError("std::bad_alloc"),
        RuntimeError("(ResourceExhausted) \n\nOut of memory error on GPU 0. Cannot allocate 2.0GB memory on GPU 0"),
        OSError("(External)  CustomDevice error, the error code is : 2.  (at custom_device.cc:387)"),
        OSError(12, "Cannot allocate memory"),
    ],
)
def test_what_full_memory_looks_like(error: Exception) -> None:
    assert is_out_of_memory(error)
    said = r"memory ran out while training \(.*\).* cheapest first: a -> b; c"
    with pytest.raises(UserError, match=said), out_of_memory_explained("training", ["a -> b", "c"]):
        raise error


@pytest.mark.parametrize(
    "error",
    [
        OSError("(External)  CustomDevice error, the error code is : 3."),
        OSError("(External)  CustomDevice error, the error code is : 207"),
        ValueError("out of memory"),
        MissingFileError("cannot allocate memory.json does not exist"),
    ],
)
def test_other_errors_go_through(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, out_of_memory_explained("training", []):
        raise error
    assert caught.value is error


def test_numpy_and_paddle_on_this_machine() -> None:
    import paddle

    for make in (lambda: np.ones(1 << 50), lambda: paddle.ones([1 << 46])):
        said = "memory ran out while making it"
        with pytest.raises(UserError, match=said), out_of_memory_explained(lambda: "making it", ["a smaller one"]):
            make()


def test_a_configuration_says_what_it_can_change(world: World, tmp_path: Path) -> None:
    full = less_memory(world.config(tmp_path, gradient_accumulation_steps=3))
    assert full[0] == (
        "per_device_train_batch_size 2 -> 1, with gradient_accumulation_steps 3 -> 6 for the same result"
    )
    assert "lora false -> true" in full and "max_length 256 -> a smaller one" in full
    saving = {"recompute": True, "per_device_train_batch_size": 1, "bf16": True, "fp16_opt_level": "O2"}
    rest = less_memory(world.config(tmp_path, **LORA, quantize_base="nf4", **saving))
    assert rest == [
        "max_length 256 -> a smaller one",
        "several devices with sharding",
        "--dry-run says what takes how much",
    ]
