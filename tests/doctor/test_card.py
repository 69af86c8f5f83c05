"""The checks of a card: on the stand-in NPU as strict as the real one, and what is made of what they print."""

from __future__ import annotations

import pytest

from paddlemix.doctor import card
from paddlemix.doctor.card import check_card
from paddlemix.doctor.card_checks import MARK
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
    assert found["float32 products"].startswith("float32, ")
    assert report.lines()[-1] == "on the host: no operator"


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
    assert wrong == "the checks take longer than 0 s"
    assert card._report("", "", "the checks end with status 1: no card").wrong
