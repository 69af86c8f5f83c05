"""Where LLaVA's own package is; `make reference` puts llava-torch 1.2.2.post1 there, LLAVA_PACKAGE names another."""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LLAVA = Path(os.environ.get("LLAVA_PACKAGE", ROOT / ".venv-reference" / "llava"))


def add_llava() -> None:
    """Makes `import llava` find it."""
    if str(LLAVA) not in sys.path:
        sys.path.append(str(LLAVA))
