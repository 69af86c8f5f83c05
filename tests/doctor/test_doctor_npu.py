"""`paddlemix doctor` where there is an NPU, the stand-in: what it says of it, and of each mistake with its settings."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import HANG
from tests.npu_double.build import README_BLOCK, built_or_skipped, environment

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="module")
def folder() -> Path:
    """Of the compiled stand-in; skips where it cannot exist, unless the environment requires it."""
    return built_or_skipped()


def doctor(folder: Path, *arguments: str, script: str = "", **variables: str) -> tuple[int, str]:
    """Status and output of the command in a process that finds the plugin; `script` runs before it there."""
    call = f"{script}\nfrom paddlemix.__main__ import main\nraise SystemExit(main(['doctor', *{arguments!r}]))"
    found = environment(folder, NPU_DOUBLE_DEVICES="2", OMP_NUM_THREADS="1", **variables)
    result = subprocess.run(
        [sys.executable, "-c", call], cwd=ROOT, env=found, capture_output=True, text=True, timeout=HANG
    )
    return result.returncode, result.stdout + result.stderr


def test_the_self_test_on_an_npu_is_right(folder: Path) -> None:
    status, text = doctor(folder, **README_BLOCK)
    assert status == 0, text
    assert "  npu: 2\n" in text
    assert "npu:0: right, " in text and "npu:0: computes in float32, bfloat16, float16" in text
    for name, value in README_BLOCK.items():
        assert f"{name} = {value} (yours)" in text


def test_without_exports_the_settings_are_ours(folder: Path) -> None:
    status, text = doctor(folder, "--no-self-test", "--device", "npu:1")
    assert status == 0, text
    assert "FLAGS_npu_scale_aclnn = True (set by paddlemix)" in text
    assert "CUSTOM_DEVICE_BLACK_LIST = no operator (default)" in text


@pytest.mark.parametrize(
    ("arguments", "script", "variables", "what", "fix"),
    [
        ((), "", {"FLAGS_npu_scale_aclnn": ""}, "reads an empty text as true", "export FLAGS_npu_scale_aclnn=0 or =1"),
        (("--device", "npu:7"), "", {}, "device='npu:7' is not available", "this process sees 2 (npu:0 to npu:1)"),
        ((), "", {"FLAGS_selected_npus": "7"}, "no card of the number in FLAGS_selected_npus=7", "unset it"),
        (
            (),
            "import os, paddlemix.models; os.environ['FLAGS_npu_jit_compile'] = '1'",
            {},
            "FLAGS_npu_jit_compile=1 was set after paddle had been loaded",
            "export FLAGS_npu_jit_compile=1 before python starts",
        ),
    ],
)
def test_each_mistake_says_what_to_do(
    folder: Path, arguments: tuple[str, ...], script: str, variables: dict[str, str], what: str, fix: str
) -> None:
    status, text = doctor(folder, "--no-self-test", *arguments, script=script, **variables)
    assert status == 1, text
    problems = text.partition("what is wrong")[2]
    assert what in problems and f"to do: {fix}" in problems, text
