"""The real scorers, loaded by file: llava-torch 1.2.2.post1, the scripts of its repository, lmms-eval 0.7.3.

Their packages import whole models, judges and data sets; only the files that score are run, with stand-ins for what
they import and do not use here.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib
import io
import json
import re
import runpy
import string
import sys
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy

from tests.reference.llava_package import LLAVA, LMMS, real_file


class _Silent:
    """A logger that says nothing."""

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments, **named: None


def _module(name: str, **attributes: Any) -> types.ModuleType:
    module = types.ModuleType(name)
    vars(module).update(attributes)
    return module


@contextlib.contextmanager
def stand_ins() -> Iterator[None]:
    """Packages without their `__init__`, and empty ones in place of what is not needed; gone afterwards."""
    packages = {
        "llava": LLAVA / "llava",
        "llava.eval": LLAVA / "llava" / "eval",
        "lmms_eval": LMMS / "lmms_eval",
        "lmms_eval.tasks": LMMS / "lmms_eval" / "tasks",
        "lmms_eval.tasks._task_utils": LMMS / "lmms_eval" / "tasks" / "_task_utils",
    }
    found = {name: _module(name, __path__=[str(path)]) for name, path in packages.items()}
    found["loguru"] = _module("loguru", logger=_Silent())
    found["lmms_eval.verifiers"] = _module("lmms_eval.verifiers", VerificationPipeline=object, __path__=[])
    found["lmms_eval.verifiers.openai"] = _module("lmms_eval.verifiers.openai", OpenAIVerifier=object)
    judge = {name: (lambda *arguments, **named: None) for name in ("Request", "ServerConfig", "get_server")}
    found["lmms_eval.llm_judge"] = _module("lmms_eval.llm_judge", **judge)
    found["Levenshtein"] = _module("Levenshtein", distance=lmms_function("levenshtein_distance"))
    found["editdistance"] = _module("editdistance", eval=lmms_function("levenshtein_distance"))
    hidden = {name: module for name, module in sys.modules.items() if name.split(".")[0] in ("llava", "lmms_eval")}
    hidden |= {name: sys.modules[name] for name in found if name in sys.modules}
    for name in hidden:
        del sys.modules[name]
    sys.modules.update(found)
    try:
        yield
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] in ("llava", "lmms_eval") or name in found]:
            del sys.modules[name]
        sys.modules.update(hidden)


@functools.cache
def lmms_function(name: str) -> Any:
    """A function of lmms_eval/api/metrics.py, which as a whole imports an evaluation framework."""
    path = real_file(LMMS / "lmms_eval" / "api" / "metrics.py")
    tree = ast.parse(path.read_text(encoding="utf-8"))
    (function,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
    function.decorator_list = []
    names: dict[str, Any] = {"np": numpy, "re": re, "string": string}
    exec(compile(ast.Module([function], []), str(path), "exec"), names)  # noqa: S102 - the real scorer
    return names[name]


def llava_module(name: str) -> dict[str, Any]:
    """The names of a module of llava/eval, e.g. "m4c_evaluator", or of a script beside it, which is not run."""
    with stand_ins():
        return runpy.run_path(str(real_file(LLAVA / "llava" / "eval" / f"{name}.py")), run_name=name)


def lmms_task(name: str) -> types.ModuleType:
    """A module of lmms_eval/tasks, e.g. "pope.utils"."""
    real_file(LMMS / "lmms_eval" / "tasks" / f"{name.replace('.', '/')}.py")
    with stand_ins():
        return importlib.import_module(f"lmms_eval.tasks.{name}")


def run(script: str, *arguments: object, failures: tuple[type[Exception], ...] = ()) -> str:
    """What a script of LLaVA's prints, "llava/eval/eval_pope.py" or "scripts/convert_seed_for_submission.py".

    Args:
        failures: what may end it before it is done.
    """
    path, said, before = str(real_file(LLAVA / script)), io.StringIO(), sys.argv
    with stand_ins(), contextlib.redirect_stdout(said), contextlib.redirect_stderr(io.StringIO()):
        sys.argv = [path, *map(str, arguments)]
        try:
            runpy.run_path(path, run_name="__main__")
        except failures:
            pass
        finally:
            sys.argv = before
    return said.getvalue()


def write_lines(path: Path, lines: Sequence[Any]) -> Path:
    """A JSONL file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def quietly(function: Any, *arguments: Any) -> Any:
    """A call whose output is dropped."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return function(*arguments)
