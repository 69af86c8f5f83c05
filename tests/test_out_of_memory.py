"""Memory that runs out: how it is told from other errors, and what the user reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paddlemix.checkpoints.files.weight_files import read_json, write_json
from paddlemix.dry_run import report
from paddlemix.dry_run.device import DeviceMemory
from paddlemix.errors import MissingFileError, UserError
from paddlemix.out_of_memory import is_out_of_memory, out_of_memory_explained
from paddlemix.trainer.run_model import remedies
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
    full = list(remedies(world.config(tmp_path, gradient_accumulation_steps=3)))
    assert full[0] == (
        "per_device_train_batch_size 2 -> 1, with gradient_accumulation_steps 3 -> 6 for the same result"
    )
    assert "lora false -> true" in full and "max_length 256 -> a smaller one" in full
    saving = {"recompute": True, "per_device_train_batch_size": 1, "bf16": True, "fp16_opt_level": "O2"}
    rest = list(remedies(world.config(tmp_path, **LORA, quantize_base="nf4", **saving)))
    assert rest == [
        "max_length 256 -> a smaller one",
        "several devices with sharding or tensor_parallel_degree",
        "--dry-run shows what takes how much",
    ]


@pytest.mark.parametrize(
    ("changes", "codes", "whole"),
    [
        ({}, False, True),
        (LORA, True, False),
        ({"lora_path": "an-adapter"}, True, False),  # its base can be held in few bits, and it trains no more by lora
        ({"language_model": "frozen"}, True, False),
        ({**LORA, "pissa": True}, False, False),  # changes the base's weights
        ({**LORA, "language_model": "full", "vision_tower": "lora"}, False, False),
        ({"do_train": False, "evaluation_strategy": "steps"}, True, False),
    ],
)
def test_advice_fits_what_trains(
    world: World, tmp_path: Path, changes: dict[str, Any], codes: bool, whole: bool
) -> None:
    advice = list(remedies(world.config(tmp_path, **changes)))
    assert ('quantize_base null -> "nf4"' in advice) is codes
    assert ("lora false -> true" in advice) is whole


def test_a_base_in_few_bits_is_not_to_be_coded_again(world: World, tmp_path: Path) -> None:
    coded = tmp_path / "coded"
    coded.mkdir()
    declared = {**read_json(world.model / "config.json"), "quantization_config": {"quant_method": "paddlemix"}}
    declared["quantization_config"]["kind"] = "int8"
    write_json(coded / "config.json", declared)
    advice = list(remedies(world.config(tmp_path / "out", **LORA, model_name_or_path=str(coded))))
    assert not [text for text in advice if "quantize_base" in text]


@pytest.mark.parametrize("changes", [{}, LORA, {**LORA, "recompute": True}, {"sharding": "stage1"}])
@pytest.mark.parametrize("processes", [1, 2])
def test_error_and_dry_run_give_the_same_advice(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], processes: int
) -> None:
    monkeypatch.setenv("PADDLE_TRAINERS_NUM", str(processes))
    monkeypatch.setattr(report, "device_memory", lambda kind: DeviceMemory(total=2**20, free=2**19))
    monkeypatch.setattr("paddlemix.dry_run.plan.program_bytes", lambda on_cpu: 2**20)
    config = world.config(tmp_path, **changes)
    [warning] = [line for line in report.dry_run(config) if line.startswith("warning: it does not fit")]
    *advice, last = remedies(config)
    assert last == "--dry-run shows what takes how much"
    assert warning.endswith(f"To need less, the cheapest first: {'; '.join(advice)}")
