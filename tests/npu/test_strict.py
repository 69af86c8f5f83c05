"""With the operators of the real plugin alone: no step and no decoded token sends anything to the host."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.npu.cases import FINETUNE, trainings
from tests.npu.conftest import Bench
from tests.npu.server import Outcome
from tests.npu.test_answers import predict
from tests.tiny_world import LORA

CHAT = "examples.llava.run_predict_multiround"
BF16 = {"bf16": True, "fp16_opt_level": "O2"}
RUNS: dict[str, dict[str, Any]] = {
    "full": {"vision_tower": "full", "gradient_accumulation_steps": 2},
    "lora": {**LORA, "lora_dropout": 0.1, "recompute": True},
    "nf4": {**LORA, "lora_dropout": 0.1, "quantize_base": "nf4"},
    "int8": {**LORA, "quantize_base": "int8"},
    "pissa": {**LORA, "pissa": True},
    "packed": {**LORA, "mixtoken": True, "recompute": True},
    "any_resolution": {
        "image_aspect_ratio": "anyres",
        "mm_patch_merge_type": "spatial",
        "image_grid_pinpoints": [[56, 28], [28, 56]],
    },
}
# Flags of a prediction, its batches, and copies to the card for each token of a batch: what the card chooses itself is
# there; of beams, which are of one question each, tokens, the beams they go on from and their places are sent.
ASKED: dict[str, tuple[list[Any], int, int]] = {
    "greedy": ([], 3, 0),
    "drawn": (["--temperature", 0.7, "--seed", 1], 3, 1),
    "beams": (["--num-beams", 3], 12, 3),
}
AT_START = {("uniform", "bfloat16")}  # draws what an adapter begins with
MISSING = re.compile(r"missing npu kernel: (\w+), expected_kernel_key:\(npu, \S+, (\w+)\), fallbacking")


@pytest.mark.parametrize(
    ("where", "name"),
    [*(("strict", name) for name in RUNS), ("newer", "full"), *(("fused", name) for name in ("lora", "packed"))],
)
def test_no_micro_batch_goes_to_the_host(bench: Bench, where: str, name: str) -> None:
    plain = {"use_flash_attention": False} if where == "strict" else {}  # leaves out paddle's SwiGLU too
    bench.train(where, f"{name} bf16", {**BF16, **plain, **RUNS[name]}, FINETUNE)
    _holds_micro_batches(bench.outcome(where, f"{name} bf16"))


def _holds_micro_batches(outcome: Outcome) -> None:
    missing, steps = set(MISSING.findall(outcome.err)), outcome.report["micro_steps"]
    assert [step["d2h_calls"] for step in steps] == [0] * len(steps) and steps, missing
    assert [step["h2d_calls"] for step in steps[1:]] == [0] * (len(steps) - 1), missing  # constants are there by then
    assert missing <= AT_START


def test_no_micro_batch_of_pretraining_goes_to_the_host(bench: Bench) -> None:
    """Only the projector trains."""
    command, changes = trainings(bench.world)["pretrain"]
    bench.train("strict", "pretrain bf16", {**changes, **BF16, "use_flash_attention": False}, command)
    _holds_micro_batches(bench.outcome("strict", "pretrain bf16"))


@pytest.mark.parametrize("name", ASKED)
def test_prediction_sends_nothing_to_the_host(bench: Bench, tmp_path: Path, name: str) -> None:
    """Questions of several lengths, with pictures and without: each further token of a batch is read once, and what the
    host chooses is sent once."""
    (flags, batches, sent), totals = ASKED[name], []
    for tokens in (2, 6):
        more = ["--dtype", "bfloat16", "--max-new-tokens", tokens, *flags]
        answers, outcome = predict(bench, "strict", tmp_path / f"{tokens}.jsonl", *more)
        assert len(answers) == 12 and not MISSING.findall(outcome.err)
        totals.append(outcome.report["total"])
    copies = [totals[1][kind] - totals[0][kind] for kind in ("d2h_calls", "h2d_calls")]
    assert copies == [batches * (6 - 2), batches * (6 - 2) * sent]


@pytest.mark.parametrize(
    ("where", "flags"),
    [("strict", []), ("strict", ["--load-8bit"]), ("strict", ["--load-4bit"]), ("fused", [])],
    ids=["plain", "int8", "nf4", "fused"],
)
def test_a_decoded_token_is_read_once_and_nothing_else_is_copied(bench: Bench, where: str, flags: list[str]) -> None:
    few, many = (_chat(bench, where, tokens, *flags) for tokens in (2, 6))
    totals = [outcome.report["total"] for outcome in (few, many)]
    copies = [totals[1][name] - totals[0][name] for name in ("d2h_calls", "h2d_calls")]
    assert copies == [2 * (6 - 2), 0], sorted(set(MISSING.findall(many.err)))  # of two answers


def _chat(bench: Bench, where: str, tokens: int, *more: str) -> Outcome:
    asked = ["--model-path", bench.world.model, "--image-file", bench.world.picture, "--device", "npu"]
    length = ["--max-new-tokens", tokens, "--temperature", 0]
    outcome = bench.run(where, CHAT, *asked, *length, "--dtype", "bfloat16", *more, stdin="What?\nHow many?\n")
    assert outcome.status == 0, outcome.err
    return outcome
