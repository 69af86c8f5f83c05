"""`paddlemix doctor` as a command, healthy and with each mistake, and the self-test that it makes."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import paddle
import pytest

from paddlemix.doctor import examination
from paddlemix.doctor.examination import examine
from paddlemix.doctor.self_test import STEPS, SelfTest, compare, computes_in, run_self_test
from paddlemix.models.kernels import cpu_library
from paddlemix.tools.doctor import format_examination, main
from tests.conftest import HANG

ROOT = Path(__file__).resolve().parent.parent.parent


def doctor(script: str = "", *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own; `script` runs before it there."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("FLAGS_", "CUSTOM_DEVICE_"))}
    call = f"{script}\nfrom paddlemix.__main__ import main\nraise SystemExit(main(['doctor', *{arguments!r}]))"
    return subprocess.run(
        [sys.executable, "-c", call], cwd=ROOT, env={**clean, **variables}, capture_output=True, text=True, timeout=HANG
    )


@pytest.fixture(scope="module")
def reference() -> SelfTest:
    return run_self_test("cpu")


def test_this_machine_is_named() -> None:
    result = doctor(OMP_NUM_THREADS="1")
    assert result.returncode == 0, result.stdout + result.stderr
    for text in (
        f"paddlepaddle {paddle.__version__}",
        f"Python {sys.version.split()[0]}",
        "OMP_NUM_THREADS = 1 (yours)",
        "FLAGS_use_stride_kernel = 0 (set by paddlemix)",
        "cpu: right, ",
        "cpu: computes in float32",
        "pip install",
        "nothing is wrong",
    ):
        assert text in result.stdout, text


@pytest.mark.parametrize(
    ("script", "variables", "what", "fix"),
    [
        (
            "import os, paddle; os.environ['FLAGS_use_stride_kernel'] = '0'",
            {},
            "FLAGS_use_stride_kernel=0 was set after paddle had been loaded",
            "export FLAGS_use_stride_kernel=0 before python starts",
        ),
        (
            "import os, paddlemix.models; os.environ['KMP_BLOCKTIME'] = '5'",
            {},
            "KMP_BLOCKTIME=5 was set after paddle had been loaded",
            "export KMP_BLOCKTIME=5 before python starts",
        ),
        ("", {"FLAGS_npu_scale_aclnn": ""}, "reads an empty text as true", "export FLAGS_npu_scale_aclnn=0 or =1"),
        (
            "",
            {"PADDLEMIX_CPU_KERNELS": "off"},
            "1. PADDLEMIX_CPU_KERNELS=off is neither 0 nor 1\n",
            "export PADDLEMIX_CPU_KERNELS=0 or =1",
        ),
        ("", {"CUSTOM_DEVICE_ROOT": "/nowhere"}, "/nowhere is not a folder", "unset CUSTOM_DEVICE_ROOT"),
    ],
)
def test_each_mistake_says_what_to_do(script: str, variables: dict[str, str], what: str, fix: str) -> None:
    result = doctor(script, "--no-self-test", **variables)
    assert result.returncode == 1, result.stdout + result.stderr
    problems = result.stdout.partition("what is wrong")[2]
    assert what in problems and fix in problems.partition(what)[2]
    assert problems.count(what) == 1


def test_compiled_kernels_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_library, "missing", lambda: None)
    monkeypatch.setattr(cpu_library, "kind", lambda: "avx2")
    found = examine("cpu", self_test=False)
    assert "kernels for cpu\n  compiled kernels: avx2\n" in format_examination(found)
    assert not [problem for problem in found.problems if "kernels" in problem.what]


def test_missing_kernels_are_no_serious_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_library, "missing", lambda: "they were not built; install a C compiler (gcc)")
    found = examine("cpu", self_test=False)
    text = format_examination(found)
    assert "  no compiled kernels, paddle's operators alone: they were not built; install a C compiler (gcc)\n" in text
    (problem,) = (problem for problem in found.problems if "kernels" in problem.what)
    assert problem.what.endswith("about 1.25 times as long: they were not built") and not problem.serious
    assert problem.fix == "install a C compiler (gcc)" and found.healthy


def test_kernels_of_the_cpu_are_no_problem_where_a_card_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_library, "missing", lambda: "they were not built; install a C compiler (gcc)")
    monkeypatch.setattr(examination, "available_kinds", lambda: ["npu", "cpu"])
    found = examine(self_test=False)
    assert "kernels for cpu" in found.sections and "kernels" not in str(found.problems)


def test_the_switch_is_shown() -> None:
    result = doctor("", "--no-self-test", PADDLEMIX_CPU_KERNELS="0")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "PADDLEMIX_CPU_KERNELS = 0 (yours): 0 computes everything with paddle's own operators" in result.stdout
    assert "PADDLEMIX_CPU_KERNELS=0 switches them off (still works)\n     to do: unset it" in result.stdout


def test_a_card_that_is_not_there() -> None:
    found = examine("npu:7", self_test=False)
    text = format_examination(found)
    assert not found.healthy
    assert "device='npu:7' cannot be used here" in text and "to do: choose one of cpu" in text


def test_two_builds_of_paddle_are_a_mistake() -> None:
    found = examine("cpu", self_test=False, packages={"paddlepaddle": "3.3.1", "paddlepaddle-gpu": "3.3.1"})
    assert "are both installed" in format_examination(found) and not found.healthy


def test_a_plugin_for_another_paddle_is_a_mistake() -> None:
    found = examine("cpu", self_test=False, packages={"paddlepaddle": "3.3.1", "paddle-custom-npu": "3.0.0"})
    assert "was built for another paddle than 3.3.1" in format_examination(found) and not found.healthy


def test_the_status_is_that_of_the_problems(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--device", "tpu", "--no-self-test"]) == 1
    assert "device='tpu' is not one of gpu, npu, xpu, cpu" in capsys.readouterr().out


def test_the_self_test_learns_and_disturbs_nothing(reference: SelfTest) -> None:
    assert len(reference.losses) == STEPS and compare(reference, reference) is None
    paddle.seed(3)
    expected = paddle.rand([3]).tolist()
    paddle.seed(3)
    again = run_self_test("cpu")
    assert paddle.rand([3]).tolist() == expected
    assert again.losses == reference.losses and np.array_equal(again.answers, reference.answers)


def test_the_self_test_can_fail(reference: SelfTest) -> None:
    losses = reference.losses
    bent = [losses[0], losses[1] * 1.02, *losses[2:]]
    cases = {
        "the loss is not a number from step 2 on": replace(reference, losses=[*losses[:2], float("nan"), *losses[3:]]),
        "losses differ from the CPU's by up to 2.0%": replace(reference, losses=bent),
        "the loss fell from": replace(reference, losses=[*losses[:10], losses[0]]),
        "does not answer as it was trained to": replace(reference, answers=reference.answers + 1),
    }
    for message, test in cases.items():
        assert message in str(compare(test, reference))


def test_a_device_that_computes_wrongly_is_a_problem(monkeypatch: pytest.MonkeyPatch, reference: SelfTest) -> None:
    wrong = replace(reference, answers=reference.answers + 1)
    monkeypatch.setattr("paddlemix.doctor.self_test.run_self_test", lambda name: wrong)
    found = examine("cpu")
    assert not found.healthy and "the self-test on cpu fails: the trained model does not answer" in str(found.problems)


def test_a_device_that_stops_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise OSError("stack\n(External) CustomDevice error, the error code is : 2.")

    monkeypatch.setattr("paddlemix.doctor.self_test.run_self_test", fail)
    found = examine("cpu")
    assert "stops (OSError: (External) CustomDevice error, the error code is : 2.)" in str(found.problems)


def test_precisions_of_a_cpu() -> None:
    assert computes_in("cpu", "float32") is None
    assert computes_in("cpu", "bfloat16") is not None
