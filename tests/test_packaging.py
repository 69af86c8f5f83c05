"""What setup.py and the Makefile make of the kernels in C: in a source archive, in a build, without a compiler.

Everything happens in a copy of the checkout.  The compiler is a script: that the kernels compile and compute is seen
where they are tested.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from paddlemix.models.kernels.cpu_library import _KINDS
from tests.conftest import HANG

ROOT = Path(__file__).resolve().parent.parent
KINDS = set(_KINDS) if platform.machine() == "x86_64" else {"plain"}
SOURCE, STALE = "paddlemix/models/kernels/cpu_kernels.c", "paddlemix/models/kernels/_cpu_kernels_old.so"
COMPILER = """#!/bin/sh
echo "$@" >> "$CALLS"
while [ $# -gt 0 ]; do [ "$1" = -o ] && echo built > "$2"; shift; done
"""

pytest.importorskip("setuptools", reason="setup.py needs it, Python 3.12 no longer brings it")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what setup.py and make read, with a library of an earlier build in it."""
    copy = tmp_path / "checkout"
    ignored = shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(ROOT / "paddlemix", copy / "paddlemix", ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "LICENSE", "README.md", "Makefile"):
        shutil.copy(ROOT / name, copy)
    (copy / STALE).touch()
    return copy


def run(checkout: Path, *command: str, **variables: str) -> None:
    done = subprocess.run(
        command, cwd=checkout, env={**os.environ, **variables}, capture_output=True, text=True, timeout=HANG
    )
    assert done.returncode == 0, done.stdout + done.stderr


def build(checkout: Path, compiler: str, **variables: str) -> tuple[Path, set[str]]:
    """The built package's `models` folder, which is the one in a wheel, and the names of the libraries in it."""
    run(checkout, sys.executable, "setup.py", "-q", "build", "--build-lib", "built", CC=compiler, **variables)
    models = checkout / "built" / "paddlemix" / "models" / "kernels"
    assert (models / "cpu_library.py").is_file()
    return models, {path.name.partition(".")[0] for path in models.glob("*.so")}


def test_a_source_archive_holds_the_kernels_and_no_library(checkout: Path) -> None:
    run(checkout, sys.executable, "setup.py", "-q", "sdist", "--formats", "tar", "--dist-dir", "archive")
    (archive,) = (checkout / "archive").iterdir()
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / SOURCE).parent.glob("*.[ch]")}
    assert {SOURCE, *sources, "setup.py", "paddlemix/config/llava/pretrain.json"} <= names
    assert [name for name in names if name.endswith(".so")] == []


def test_a_build_holds_a_library_for_each_kind_of_processor(checkout: Path) -> None:
    compiler, calls = checkout / "compiler", checkout / "calls"
    compiler.write_text(COMPILER, encoding="utf-8")
    compiler.chmod(0o755)
    models, found = build(checkout, str(compiler), CALLS=str(calls))
    assert found == {f"_cpu_kernels_{kind}" for kind in KINDS}
    compiled = [line.split() for line in calls.read_text(encoding="utf-8").splitlines() if SOURCE in line]
    needed = [{flag[2:] for flag in line if flag.startswith(("-mavx", "-mfma"))} for line in compiled]
    # what a library is compiled for is what cpu_library.py asks a processor for; each with AVX-512 has FMA
    for needs in (_KINDS[kind] for kind in KINDS):
        assert any(features - needs <= {"fma"} and needs <= features for features in needed), (needs, needed)
    assert len(needed) == len(KINDS)


@pytest.mark.parametrize("compiler", ["false", "/nowhere/cc"])
def test_without_a_compiler_the_package_is_built_all_the_same(checkout: Path, compiler: str) -> None:
    _, found = build(checkout, shutil.which(compiler) or compiler)
    assert found == set()


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
def test_make_clean_keeps_the_libraries_as_long_as_the_environment(checkout: Path) -> None:
    for name in (".venv", "build", "tests", "benchmarks"):
        (checkout / name).mkdir()
    library = checkout / "paddlemix" / "models" / "kernels" / "_cpu_kernels_plain.cpython-311-x86_64-linux-gnu.so"
    library.touch()
    run(checkout, "make", "clean")
    assert library.exists() and (checkout / ".venv").exists() and not (checkout / "build").exists()
    run(checkout, "make", "distclean")
    assert not library.exists() and not (checkout / ".venv").exists() and (checkout / SOURCE).exists()
