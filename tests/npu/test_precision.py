"""bfloat16 and float16 on the stand-in NPU: near float32, scaled, and without a step whose gradients overflow.

The CPU has no such kernels, so that only here these paths run.  The stand-in rounds after every operator that it
computes in float32: a real board differs in the last bits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.npu.conftest import Bench
from tests.npu.precision_probes import LEVELS
from tests.npu.test_numbers import probe
from tests.tiny_world import LORA, changed, reports, weights

# Largest relative difference of a loss from float32's within four steps. About twice what was seen.
BOUNDS = {"bf16 O1": 0.01, "bf16 O2": 0.02, "fp16 O1": 0.002, "fp16 O2": 0.005}
# Of a token's loss, in nats, with logits that spread over some 30. About twice what was seen.
APART = {"float16 O1": 0.05, "float16 O2": 0.05, "bfloat16 O1": 0.3, "bfloat16 O2": 0.3}
HALF_A_PLACE = {"float16": 2.0**-11, "bfloat16": 2.0**-8}  # what rounding to the type costs
TOKENS = [f"{dtype} {level}" for dtype, level in LEVELS]
CASES = [*(("bare", name) for name in BOUNDS), ("block", "bf16 O2"), ("block", "fp16 O2")]
# A tower that trains has biases, which autocast leaves in float32 and adds to products in low precision.
START: dict[str, Any] = {"adam_epsilon": 1e-4, "vision_tower": "full"}


def precision(name: str) -> dict[str, Any]:
    """The keys that ask for it; a small scale, so that nothing overflows."""
    kind, level = name.split()
    return {**START, kind: True, "fp16_opt_level": level, "scale_loss": 128.0}


@pytest.fixture(scope="module")
def tokens(plugin: Path) -> dict[str, dict[str, list[float]]]:
    """See `precision_probes.token_losses`."""
    return dict(probe(plugin, "token_losses")["token_losses"])


@pytest.mark.parametrize("name", TOKENS)
def test_each_tokens_loss_is_that_of_its_logits_in_float32(
    tokens: dict[str, dict[str, list[float]]], name: str
) -> None:
    """Also of a token that is sure, whose loss a sum in half precision rounds to 0; its gradient is rounded once."""
    found = tokens[name]
    assert min(found["loss"]) < 0.004 and max(found["loss"]) > 3
    assert all(error < 1e-5 for error in found["error"]), found["error"]
    assert all(error < 1.01 * HALF_A_PLACE[name.split()[0]] for error in found["slope"]), found["slope"]


@pytest.mark.parametrize("name", TOKENS)
def test_each_tokens_loss_is_near_float32s(tokens: dict[str, dict[str, list[float]]], name: str) -> None:
    """Behind a first token with an activation of 2,000, whose square float16 does not hold."""
    assert all(gap < APART[name] for gap in tokens[name]["apart"]), tokens[name]["apart"]


@pytest.mark.parametrize(("where", "name"), CASES)
def test_losses_are_near_those_of_float32(bench: Bench, where: str, name: str) -> None:
    exact = reports(bench.train("cpu", "float32", START))
    found = reports(bench.train(where, name, precision(name)))
    assert found == pytest.approx(exact, rel=BOUNDS[name])
    assert found != exact
    report = bench.outcome(where, name).report
    assert {"matmul*", "matmul_grad*"} <= set(report["step_kernels"])  # * in low precision
    assert ("adamw*" in report["kernels"]) == name.endswith("O2")  # with float32 master weights


@pytest.mark.parametrize(("where", "name"), CASES)
def test_a_step_waits_for_the_device_once(bench: Bench, where: str, name: str) -> None:
    bench.train(where, name, precision(name))
    report = bench.outcome(where, name).report
    assert [step["d2h_calls"] for step in report["steps"]] == [1, 1, 1]
    assert [step["d2h_calls"] for step in report["micro_steps"]] == [0] * 4


@pytest.mark.parametrize("level", ["O1", "O2"])
def test_float32_gradients_are_freed_of_the_scale(bench: Bench, level: str) -> None:
    bench.train("cpu", "float32", START)
    bench.train("bare", f"master {level}", {**precision(f"fp16 {level}"), "amp_master_grad": True})
    exact, found = (
        reports(bench.root / where / name / "out", "grad_norm")
        for where, name in (("cpu", "float32"), ("bare", f"master {level}"))
    )
    assert found == pytest.approx(exact, rel=0.05)


def test_a_step_that_overflows_changes_nothing(bench: Bench, where: str) -> None:
    run = {**LORA, "fp16": True, "fp16_opt_level": "O2", "scale_loss": 2.0**100, "max_steps": 2}
    out = bench.train(where, "overflow", run)
    assert sorted(reports(out)) == [1, 2]  # losses are told
    assert not reports(out, "grad_norm")
    start = weights(bench.world.model)
    found = weights(out)  # loads in float32 what was trained on a base in float16
    lora_b = [value for name, value in found.items() if name.endswith("lora_B")]
    assert lora_b and not any(value.any() for value in lora_b)
    projector = [name for name in start if name.startswith("projector.")]
    assert all(np.array_equal(found[name], start[name].astype("float16")) for name in projector)


@pytest.mark.parametrize("master", [False, True])
def test_the_scale_falls_until_steps_are_made(bench: Bench, master: bool) -> None:
    run = {"fp16": True, "fp16_opt_level": "O2", "scale_loss": 2.0**18, "max_steps": 6, "amp_master_grad": master}
    out = bench.train("bare", f"falling {master}", run)
    losses, norms = reports(out), reports(out, "grad_norm")
    assert sorted(losses) == [1, 2, 3, 4, 5, 6]
    assert 1 not in norms and 0 < len(norms) < 6
    assert changed(weights(bench.world.model), weights(out))
