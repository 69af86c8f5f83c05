"""Where the real programs are, llava-torch 1.2.2.post1 and lmms-eval 0.7.3: `make reference` puts them there.

LLAVA_PACKAGE and LMMS_PACKAGE name other places.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LLAVA = Path(os.environ.get("LLAVA_PACKAGE", ROOT / ".venv-reference" / "llava"))
LMMS = Path(os.environ.get("LMMS_PACKAGE", ROOT / ".venv-reference" / "lmms"))
# Files of LLaVA's repository that its package lacks: fetched from GitHub, which a machine may not reach.
_FETCHED = (LLAVA / "scripts", LLAVA / "llava" / "eval" / "table")


def real_file(path: Path) -> Path:
    """A file of the real programs.

    Without it a test is skipped; but `make reference` has just installed the packages, and there it fails.
    """
    if path.is_file():
        return path
    if "REFERENCE_ISA" in os.environ and path.parent not in _FETCHED:
        pytest.fail(f"{path} does not exist, though `make reference` installs its package")
    pytest.skip(f"{path} does not exist: `make reference` installs packages, and fetches it where GitHub is reached")


def add_llava() -> None:
    """Makes `import llava` find it."""
    if str(LLAVA) not in sys.path:
        sys.path.append(str(LLAVA))
