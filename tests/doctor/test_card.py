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
    assert not [what for what in report.slow if "plain form" in what or "to the host" in what]
    measured = [f"products, {dtype}" for dtype in ("float32", "bfloat16", "float16")]
    measured += ["a small operator", "quantised, nf4", "LoRA step, int8", "a decoded token"]
    assert report.numbers.keys() >= set(measured)


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
        "slow: start: 1 operator goes to the host, and each waits for the card twice",
        "slow: training: 1 operator goes to the host, and each waits for the card twice",
        "on the host in start: log float32",
        "on the host in training: dropout bfloat16",
    ]


_QUICK = {
    "products, float32": 100.0,
    "products, bfloat16": 200.0,
    "a small operator": 1e-5,
    "quantised, nf4": 5e-4,
    "LoRA step, plain": 0.01,
    "LoRA step, nf4": 0.015,
    "a decoded token": 2e-3,
}


@pytest.mark.parametrize(
    ("numbers", "fused", "verdict"),
    [
        ({}, "attention: fused", "nothing that these checks see"),
        (
            {},
            "attention: plain, it differs",
            "fused, bfloat16: attention is computed in its plain form, though a fused kernel exists for this card",
        ),
        (
            {"products, bfloat16": 50.0},
            "",
            "products, bfloat16: 0.50 of float32's rate, at least 1 is expected; no matrix units compute bfloat16",
        ),
        ({"quantised, nf4": 2e-3}, "", "quantised, nf4: 200.0 times a small operator, at most 100 is expected"),
        ({"LoRA step, nf4": 0.03}, "", "LoRA step, nf4: 3.0 times the step on plain weights, at most 2 is expected"),
        ({"a decoded token": 1e-2}, "", "a decoded token: 1000.0 times a small operator, at most 500 is expected"),
    ],
    ids=["nothing", "plain form", "products", "wide weights", "quantised step", "token"],
)
def test_what_is_slow_is_named_with_its_measure(numbers: dict[str, float], fused: str, verdict: str) -> None:
    rows = [{"check": "fused, bfloat16", "result": fused, "wrong": None}]
    rows += [{"check": name, "result": "", "wrong": None, "number": n} for name, n in {**_QUICK, **numbers}.items()]
    report = card._report("\n".join(map(json.dumps, rows)), "", "")
    assert [line for line in report.lines() if line.startswith("slow: ")] == [f"slow: {verdict}"]


def test_checks_that_stop_or_take_too_long_are_a_problem() -> None:
    (wrong,) = check_card("npu:0", limit=0.01).wrong
    assert wrong == "the checks took longer than 0 s"
    stopped = card._report("", "", "the checks ended with status 1: no card")
    assert stopped.wrong and stopped.lines() == ["on the host: unknown for the checks that did not finish"]
