"""A command whose input or outputs are closed, as under some daemons, has empty ones in their place."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import HANG, ROOT

_COMMAND = """
import os, subprocess, sys
from paddlemix.tools.common.command import run_command

def main(argv):
    heard = sys.stdin.read(), sys.stdin.isatty()
    print("to nobody")
    child = subprocess.run([sys.executable, "-c", "import sys; sys.exit(None in (sys.stdin, sys.stdout, sys.stderr))"])
    new = os.open(argv[0], os.O_CREAT | os.O_WRONLY)
    os.write(new, f"{heard} {child.returncode} {new > 2}".encode())

raise SystemExit(run_command(main))
"""


@pytest.mark.parametrize("closed", ["<&-", "<&- >&-", "<&- >&- 2>&-"])
def test_closed_streams_are_empty_ones(tmp_path: Path, closed: str) -> None:
    """A child gets them too, and no file of ours gets their numbers."""
    words = ["sh", "-c", f'exec "$0" "$@" {closed}', sys.executable, "-c", _COMMAND, str(tmp_path / "told")]
    result = subprocess.run(words, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=HANG, check=False)
    assert result.returncode == 0
    assert (tmp_path / "told").read_text() == "('', False) 0 True"
