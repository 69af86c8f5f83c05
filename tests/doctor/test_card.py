"""The checks of a card: on the stand-in NPU as strict as the real one, and what is made of what they print."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from paddlemix.doctor import card
from paddlemix.doctor.card import check_card
from paddlemix.doctor.card_checks import MARK
from tests.conftest import ROOT
from tests.npu_double.build import STRICT, built_or_skipped, environment


def test_the_strict_stand_in_passes_every_check(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment(built_or_skipped(), **STRICT).items():
        monkeypatch.setenv(name, value)
    report = check_card("npu:0")
    assert report.wrong == [] and report.on_host == {}
    found = dict(report.rows)
    assert {f"loss, {dtype}" for dtype in ("float32", "bfloat16", "float16")} <= found.keys()
    assert {f"LoRA step, {kind}" for kind in ("plain", "nf4", "int8")} <= found.keys()
    assert {"quantised, nf4", "quantised, int8", "a decoded token", "memory", "fused, bfloat16"} <= found.keys()
    fused = "fused attention, rms_norm, rotary, swiglu"  # as users run, and so what is looked for on the host
    assert all(found[name].endswith(fused) for name in ("LoRA step, plain", "LoRA step, nf4", "a decoded token"))
    assert found["float32 products"].startswith("float32, ")
    assert report.lines()[-1] == "on the host: no operator"


_WRONG_NORM = """
import json, sys
from paddlemix.device import prepare_environment
prepare_environment()
import paddle
from paddlemix.doctor import card_checks
from paddlemix.models.kernels import functions
functions.row_sums = lambda numbers: paddle.matmul(numbers, paddle.ones([numbers.shape[-1], 1]))
card_checks.CHECKS = (card_checks.losses,)
card_checks.main("npu:0")
"""


def test_a_sum_that_leaves_in_float16_is_seen() -> None:
    """A norm's, of an activation that float16 holds and whose square it does not."""
    done = subprocess.run(
        [sys.executable, "-c", _WRONG_NORM],
        cwd=ROOT,
        env=environment(built_or_skipped(), **STRICT),
        capture_output=True,
        text=True,
    )
    wrong = {row["check"]: row["wrong"] for row in map(json.loads, done.stdout.splitlines())}
    assert wrong["loss, float16"] is not None and wrong["loss, float32"] is None, done.stderr[-2000:]


def test_what_is_printed_becomes_a_table() -> None:
    out = (
        'noise\n{"check": "a", "result": "1 ms", "wrong": null}\n{"check": "long one", "result": "2", "wrong": "no"}\n'
    )
    missing = (
        "W1 kernel_factory.cc:1] missing npu kernel: {}, expected_kernel_key:(npu, NCHW, {}), fallbacking to CPU\n"
    )
    told = missing.format("log", "float32") + MARK + "training\n" + 2 * missing.format("dropout", "bfloat16")
    report = card._report(out, told, "")
    assert report.wrong == ["long one: no"]
    assert report.lines() == [
        "a         1 ms",
        "long one  2",
        "on the host in start: log float32",
        "on the host in training: dropout bfloat16",
    ]


def test_checks_that_stop_or_take_too_long_are_a_problem() -> None:
    (wrong,) = check_card("npu:0", limit=0.01).wrong
    assert wrong == "the checks took longer than 0 s"
    stopped = card._report("", "", "the checks ended with status 1: no card")
    assert stopped.wrong and stopped.lines() == ["on the host: unknown for the checks that did not finish"]
