"""Chat, prediction, merging and quantised models on the stand-in NPU: the CPU's answers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import ROOT
from tests.npu.cases import trainings
from tests.npu.conftest import Bench, device_of
from tests.npu.server import Outcome
from tests.npu_double.build import README_BLOCK, environment
from tests.tiny_world import weights

CHAT, PREDICT, MERGE = "examples.llava.run_predict_multiround", "tools.predict", "tools.merge_lora_params"
QUESTIONS = "What is the colour of the big bus?\nHow many?\n"
ON_DEVICE = ["Place(npu:0)"]
MAX_GAP = 1e-6  # of a merged weight


def adapter(bench: Bench, where: str) -> Path:
    command, changes = trainings(bench.world)["lora"]
    return bench.train(where, "lora", changes, command)


def chat(bench: Bench, where: str, model: Path, *more: Any, tokens: int = 8) -> Outcome:
    arguments = ["--model-path", model, "--image-file", bench.world.picture, "--device", device_of(where)]
    outcome = bench.run(where, CHAT, *arguments, *more, "--max-new-tokens", tokens, "--temperature", 0, stdin=QUESTIONS)
    assert outcome.status == 0, outcome.err
    return outcome


def predict(bench: Bench, where: str, output: Path, *more: Any) -> tuple[list[str], Outcome]:
    """The answers to the world's twelve questions, some with an image and some without."""
    data = ["--input", bench.world.data / "train.json", "--image-root", bench.world.data, "--output", output]
    asked = ["--model-path", bench.world.model, "--device", device_of(where), "--batch-size", 4, "--max-new-tokens", 8]
    outcome = bench.run(where, PREDICT, *asked, *data, *more)
    assert outcome.status == 0, outcome.err
    lines = output.read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines], outcome


def test_chat_says_what_the_cpu_says(bench: Bench, where: str) -> None:
    """Two rounds over one cache, with an adapter that was trained there."""
    ours, theirs = (chat(bench, place, adapter(bench, place), "--dtype", "float32") for place in (where, "cpu"))
    assert ours.out == theirs.out
    assert ours.out.count("ASSISTANT: ") == 2
    assert ours.report["places"] == ON_DEVICE
    assert {"matmul", "softmax", "index_put"} <= set(ours.report["kernels"])


def test_a_token_waits_for_the_device_once(bench: Bench, where: str) -> None:
    few, many = (chat(bench, where, bench.world.model, "--dtype", "float32", tokens=count) for count in (2, 6))
    assert many.report["total"]["d2h_calls"] - few.report["total"]["d2h_calls"] == 2 * (6 - 2)  # of two answers


@pytest.mark.parametrize("flags", [[], ["--load-8bit"], ["--load-4bit"]], ids=["plain", "int8", "nf4"])
def test_prediction_says_what_the_cpu_says(bench: Bench, where: str, tmp_path: Path, flags: list[str]) -> None:
    ours, outcome = predict(bench, where, tmp_path / "npu.jsonl", "--dtype", "float32", *flags)
    theirs, _ = predict(bench, "cpu", tmp_path / "cpu.jsonl", "--dtype", "float32", *flags)
    assert ours == theirs and len(ours) == 12
    assert outcome.report["places"] == ON_DEVICE


@pytest.mark.parametrize(("where", "dtype"), [("bare", "float16"), ("block", "bfloat16")])
def test_prediction_in_low_precision(bench: Bench, where: str, tmp_path: Path, dtype: str) -> None:
    """Most first words are those of float32; of a model with drawn weights the two likeliest tokens are often near."""
    ours, outcome = predict(bench, where, tmp_path / "low.jsonl", "--dtype", dtype)
    theirs, _ = predict(bench, "cpu", tmp_path / "cpu.jsonl", "--dtype", "float32")
    assert "matmul*" in outcome.report["kernels"]
    same = sum(first == second for first, second in zip(ours, theirs, strict=True))
    assert same >= (11 if dtype == "float16" else 6)


def test_merging_gives_the_cpus_weights(bench: Bench, where: str, tmp_path: Path) -> None:
    trained, found = adapter(bench, "cpu"), {}
    for place in (where, "cpu"):
        merged = tmp_path / place
        paths = ["--lora_path", trained, "--merge_model_path", merged]
        outcome = bench.run(place, MERGE, *paths, "--device", device_of(place))
        assert outcome.status == 0, outcome.err
        found[place] = weights(merged)
        assert outcome.report["places"] == (["Place(cpu)"] if place == "cpu" else ON_DEVICE)
    assert found[where].keys() == found["cpu"].keys()
    for name, value in found[where].items():
        np.testing.assert_allclose(value, found["cpu"][name], rtol=0, atol=MAX_GAP, err_msg=name)


def test_chat_in_float16_on_an_adapter(bench: Bench, where: str) -> None:
    """Which was trained on a base in float32."""
    outcome = chat(bench, where, adapter(bench, where), "--fp16")
    assert outcome.out.count("ASSISTANT: ") == 2
    assert outcome.report["places"] == ON_DEVICE and "matmul*" in outcome.report["kernels"]
    exact = chat(bench, "cpu", adapter(bench, "cpu"), "--dtype", "float32")
    assert outcome.out == exact.out


def test_fp16_as_the_readme_writes_it(bench: Bench, plugin: Path) -> None:
    """The command file itself under the README's flags, without `--device`: the device that is there is taken."""
    command = [sys.executable, "paddlemix/examples/llava/run_predict_multiround.py"]
    arguments = ["--model-path", str(bench.world.model), "--image-file", str(bench.world.picture), "--fp16"]
    done = subprocess.run(
        [*command, *arguments],
        cwd=ROOT,
        env=environment(plugin, **README_BLOCK),
        input="How many?\n",
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "ASSISTANT: " in done.stdout and done.stdout.rstrip().endswith("exit...")
