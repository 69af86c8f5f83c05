"""What is installed together, what is missing, and the command that each finding names."""

from __future__ import annotations

import pytest

from paddlemix.doctor.packages import (
    INSTALL,
    PADDLE,
    check_packages,
    installed_packages,
    normalise,
    requirements,
    series,
)

GOOD = {"paddlepaddle": PADDLE, "paddlenlp": "3.0.0b4", "tqdm": "4.0"}


@pytest.mark.parametrize(
    ("packages", "what", "fix"),
    [
        ({}, "paddle is not installed", INSTALL["cpu"]),
        (
            {"paddlepaddle": "3.3.1", "paddlepaddle-gpu": "3.3.0"},
            "paddlepaddle 3.3.1 and paddlepaddle-gpu 3.3.0 are both installed",
            "pip uninstall -y paddlepaddle paddlepaddle-gpu, then install the one that you need: pip install paddle",
        ),
        ({"paddlepaddle-gpu": "2.6.2"}, "paddlepaddle-gpu 2.6.2 is older than 3.0", INSTALL["gpu"]),
        (
            {"paddlepaddle": "3.3.1", "paddle-custom-npu": "3.0.0"},
            "paddle-custom-npu 3.0.0 was built for another paddle than 3.3.1",
            "pip install paddle-custom-npu==3.3.1",
        ),
        (
            {"paddlepaddle": "3.3.1", "paddle-custom-npu": "3.3.0.dev20250430"},
            "was built for another paddle",
            "or paddlepaddle==3.3.0.dev20250430",
        ),
        (
            {"paddlepaddle-gpu": "3.3.1", "paddle-custom-npu": "3.3.1"},
            "paddle-custom-npu 3.3.1 needs paddle's CPU build",
            "pip uninstall -y paddlepaddle-gpu, then pip install paddlepaddle==3.3.*",
        ),
    ],
)
def test_what_does_not_fit(packages: dict[str, str], what: str, fix: str) -> None:
    (problem,) = check_packages(packages, [])
    assert what in problem.what and fix in problem.fix and problem.serious


def test_a_card_without_its_plugin() -> None:
    (problem,) = check_packages(GOOD, [], npu=True)
    assert "has an Ascend card" in problem.what and problem.fix == INSTALL["npu"]
    assert check_packages({**GOOD, "paddle-custom-npu": PADDLE}, [], npu=True) == []


def test_another_version_of_paddle_is_said_and_no_more() -> None:
    (problem,) = check_packages({"paddlepaddle": "3.0.0"}, [])
    assert "tested with 3.3.1" in problem.what and not problem.serious


def test_what_setup_asks_for() -> None:
    assert check_packages(GOOD, ["paddlenlp==3.0.0b4", "tqdm", "Paddle.NLP==3.0.0b4"][:2]) == []
    missing, other = check_packages(GOOD, ["pillow>=9.1", "paddlenlp==3.0.0b5"])
    assert (missing.what, missing.fix) == ("not installed: pillow>=9.1", "pip install 'pillow>=9.1'")
    assert "paddlenlp 3.0.0b4 instead of 3.0.0b5" in other.what and not other.serious


def test_names_and_versions() -> None:
    assert normalise("Paddle_Custom.NPU") == "paddle-custom-npu"
    assert series("3.3.0.dev20250430") == series("3.3.1") == (3, 3)


def test_this_environment_has_what_setup_asks_for() -> None:
    found = installed_packages()
    assert "numpy" in found
    assert [problem for problem in check_packages(found, requirements()) if problem.serious] == []
