"""PaddleMIX's block for NPU with its first line, on a host that has no ninth card: everything names the cause."""

from __future__ import annotations

import pytest

from tests.npu.conftest import Bench
from tests.tiny_world import reports

HIDDEN = "whole block"
CAUSE = (
    "but no card: ASCEND_RT_VISIBLE_DEVICES=8 leaves none of this machine's visible; unset ASCEND_RT_VISIBLE_DEVICES"
)


def test_a_training_says_that_it_computes_on_cpu_and_why(bench: Bench) -> None:
    folder = bench.root / HIDDEN / "silent"
    recipe = bench.world.recipe(folder, device=None, max_steps=1)
    outcome = bench.run(HIDDEN, "tools.supervised_finetune", recipe)
    assert outcome.status == 0, outcome.err
    assert "computing on CPU: paddle loaded libpaddle-npu-double.so, " + CAUSE in outcome.err
    assert reports(folder / "out").keys() == {1}


@pytest.mark.parametrize("changes", [{"device": "npu"}, {"device": None, "bf16": True}], ids=["device=npu", "bf16"])
def test_a_training_that_wants_the_card_stops(bench: Bench, changes: dict[str, object]) -> None:
    recipe = bench.world.recipe(bench.root / HIDDEN / f"stops-{len(changes)}", **changes)
    outcome = bench.run(HIDDEN, "tools.supervised_finetune", recipe)
    assert outcome.status == 2 and CAUSE in outcome.err, outcome.err


def test_fp16_of_a_chat(bench: Bench) -> None:
    arguments = ("--model-path", bench.world.model, "--image-file", bench.world.picture, "--fp16")
    outcome = bench.run(HIDDEN, "examples.llava.run_predict_multiround", *arguments, stdin="How many?\n")
    assert outcome.status == 2 and "float16 cannot be computed on CPU" in outcome.err and CAUSE in outcome.err


def test_a_dry_run_notes_it(bench: Bench) -> None:
    recipe = bench.world.recipe(bench.root / HIDDEN / "dry", device=None)
    outcome = bench.run(HIDDEN, "tools.supervised_finetune", recipe, "--dry-run")
    assert outcome.status == 0 and f"note: paddle loaded libpaddle-npu-double.so, {CAUSE}" in outcome.out


def test_the_doctor(bench: Bench) -> None:
    for arguments in ((), ("--device", "npu")):
        outcome = bench.run(HIDDEN, "tools.doctor", "--no-self-test", *arguments)
        problems = outcome.out.partition("what is wrong")[2]
        assert outcome.status == 1 and problems.count("ASCEND_RT_VISIBLE_DEVICES=8 leaves none") == 1, outcome.out


def test_a_card_that_is_there_is_seen(bench: Bench) -> None:
    assert bench.run("bare", "tools.doctor", "--no-self-test").status == 0
