"""The list "The files to read" of docs/architecture.md against a traced LoRA run.

Every file of which a function ran before the first loss is on it, or left out for a reason.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import HANG, ROOT
from tests.test_structure import lines_of
from tests.tiny_world import LORA, World

MAX_FILES, MAX_LINES, MAX_LINES_OF_A_FILE = 24, 4500, 300


def section(heading: str) -> str:
    """The text below a heading of the architecture page, up to the next heading."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    found = re.search(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#|\Z)", page, re.MULTILINE | re.DOTALL)
    assert found is not None, heading
    return found[1]


def files_to_read() -> list[str]:
    """The numbered files of the page, relative to the package, in order."""
    return re.findall(r"^\d+\. `([\w/]+\.py)`: \S", section("The files to read"), re.MULTILINE)


def left_out() -> dict[str, str]:
    """File -> the reason why the page leaves it out."""
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", section("Left out"), re.MULTILINE)
    return {file: reason for reason, names in rows for file in re.findall(r"`([\w/]+\.py)`", names)}


@pytest.fixture(scope="module")
def traced(world: World, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The files of which a function runs before a LoRA run's first loss, in the order of their first calls."""
    folder = tmp_path_factory.mktemp("traced")
    output = folder / "files.json"
    command = [sys.executable, "-m", "tests.first_loss", str(world.recipe(folder, **LORA)), str(output)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HANG)
    assert done.returncode == 0, done.stdout + done.stderr
    return list(json.loads(output.read_text(encoding="utf-8")))


def test_the_page_is_short() -> None:
    counts = {file: lines_of(file) for file in files_to_read()}
    assert 10 < len(counts) == len(files_to_read()) <= MAX_FILES
    assert {file: count for file, count in counts.items() if count > MAX_LINES_OF_A_FILE} == {}
    assert sum(counts.values()) <= MAX_LINES, counts


def test_what_ran_is_on_the_page_or_left_out_for_a_reason(traced: list[str]) -> None:
    assert [file for file in traced if file not in files_to_read() and file not in left_out()] == []


def test_what_is_on_the_page_ran(traced: list[str]) -> None:
    assert [file for file in files_to_read() if file not in traced] == []


def test_no_file_is_both_read_and_left_out() -> None:
    assert files_to_read() != [] and left_out() != {}
    assert set(files_to_read()) & left_out().keys() == set()
    assert [file for file in left_out() if not Path(ROOT / "paddlemix" / file).is_file()] == []
