"""Folders that transformers 4.57 and 5 save, live: a script writes them in an environment of each version."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.saved_folders import CASES, check_folder

pytestmark = pytest.mark.reference

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module", params=["457", "5"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders of one version."""
    python = ROOT / f".venv-reference{request.param}" / "bin" / "python"
    if not python.is_file():
        pytest.skip(f"needs the environment {python.parent.parent.name}: make reference")
    target = tmp_path_factory.mktemp(f"saved{request.param}")
    script = ROOT / "tests" / "reference" / "make_saved_folders.py"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([python, script, target], capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return target


@pytest.mark.parametrize("case", CASES)
def test_ids_and_logits_are_those_of_transformers(saved: Path, case: str) -> None:
    check_folder(saved / case)
