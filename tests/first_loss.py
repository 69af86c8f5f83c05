"""Which files of the package a run needs up to its first loss: `python -m tests.first_loss RECIPE.json OUTPUT.json`.

OUTPUT is a list: every file of which a function ran, relative to the package, in the order of their first calls.  Code
at the top of a module, such as its tables, does not count.
"""

from __future__ import annotations

import inspect
import json
import os
import sys
import threading
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

from tests.conftest import ROOT

PACKAGE = f"{ROOT / 'paddlemix'}{os.sep}"


def main(recipe: str, output: Path) -> None:
    """Runs `paddlemix finetune RECIPE` and ends the process after the first loss."""
    called: dict[CodeType, None] = {}  # a set that keeps the order

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            called.setdefault(frame.f_code)

    threading.setprofile(note)  # batches come from a thread
    sys.setprofile(note)
    from paddlemix.tools.common.command import run_command
    from paddlemix.tools.supervised_finetune import main as finetune
    from paddlemix.trainer.loss import LossModel

    forward = LossModel.forward

    def forward_and_end(self: LossModel, *arguments: Any, **named: Any) -> None:
        forward(self, *arguments, **named)
        sys.setprofile(None)
        output.write_text(json.dumps(files(list(called))), encoding="utf-8")
        os._exit(0)

    LossModel.forward = forward_and_end
    raise SystemExit(f"the run ended without a loss, status {run_command(finetune, [recipe])}")


def files(called: list[CodeType]) -> list[str]:
    """The files of the package that hold some of these functions, in order."""
    functions = [code for code in called if code.co_flags & inspect.CO_NEWLOCALS and not code.co_name.startswith("<")]
    paths = [code.co_filename for code in functions if code.co_filename.startswith(PACKAGE)]
    return list(dict.fromkeys(path.removeprefix(PACKAGE).replace(os.sep, "/") for path in paths))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
