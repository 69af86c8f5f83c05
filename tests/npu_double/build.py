"""The stand-in NPU for tests: whether it can exist here, its library, and the environment of who uses it.

A plugin of Paddle's CustomDevice interface that calls itself "npu", keeps its memory on the host and computes with the
kernels of the CPU.  It shows that a program runs on a device, where its tensors are, and when it copies or waits.  It
does not show how fast a real board is, how its low precision rounds, which kernels it lacks, or what its asynchronous
work does in another order.  Several processes of a machine act as several boards.

Paddle reads a plugin while it is imported: only child processes get one, and no test's own process does.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
SOURCES = ("npu_double.cc", "npu_double_kernels.cc", "npu_double_fused.cc", "npu_double_ccl.cc")
HEADERS = ("numbers.h", "mirror.h", "entry.h", "ccl_links.h")
LIBRARY = "libpaddle-npu-double.so"
CACHE = HERE.parent.parent / "build" / "npu_double"  # removed by `make clean`
REQUIRED = "REQUIRE_NPU_DOUBLE"  # with 1, a machine without the double fails its tests

# What PaddleMIX's README for NPU exports. Source: PaddleMIX paddlemix/examples/llava/README.md, chapter on NPU.
README_BLOCK = {
    "FLAGS_npu_storage_format": "0",
    "FLAGS_use_stride_kernel": "0",
    "FLAGS_npu_jit_compile": "0",
    "FLAGS_npu_scale_aclnn": "True",
    "FLAGS_npu_split_aclnn": "True",
    "FLAGS_allocator_strategy": "auto_growth",
    "CUSTOM_DEVICE_BLACK_LIST": "set_value,set_value_with_tensor",
}
# The same block's first line, for a ninth card: on a host whose cards are 0 to 7 it leaves none.
README_FIRST_LINE = {"ASCEND_RT_VISIBLE_DEVICES": "8"}
_OURS = ("FLAGS_", "ASCEND_", "NPU_DOUBLE_", "CUSTOM_DEVICE_", "KMP_", "MKL_", "GLOG_")


def why_not() -> str | None:
    """Why the double cannot exist here; None where it can."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return f"the stand-in NPU runs on x86-64 Linux only, not on {platform.system()} {platform.machine()}"
    if shutil.which("g++") is None:
        return "there is no g++ to build the stand-in NPU"
    try:
        importlib.metadata.version("paddlepaddle")
    except importlib.metadata.PackageNotFoundError:
        return "the stand-in NPU needs Paddle's wheel for CPU (paddlepaddle), which is not installed"
    return None


def built_or_skipped() -> Path:
    """The folder that `build` gives.  Where the double cannot exist the test is skipped with the reason, or fails where
    the environment requires it; a compile error always fails."""
    reason = why_not()
    if reason is not None and os.environ.get(REQUIRED) == "1":
        pytest.fail(f"{REQUIRED}=1, but {reason}")
    if reason is not None:
        pytest.skip(reason)
    return build()


def build(cache: Path = CACHE) -> Path:
    """The folder of the compiled plugin, for CUSTOM_DEVICE_ROOT; compiled once for these sources and this paddle.

    Raises:
        RuntimeError: it does not compile, with what the compiler says.
    """
    home, version = _paddle_home(), importlib.metadata.version("paddlepaddle")
    key = hashlib.sha256(f"{home} {version}".encode())
    for name in (*SOURCES, *HEADERS):
        key.update((HERE / name).read_bytes())
    folder = cache / key.hexdigest()[:16]
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of several test processes one compiles
        if not (folder / LIBRARY).exists():
            folder.mkdir(exist_ok=True)
            _compile(home, folder)
    return folder


def _paddle_home() -> Path:
    spec = importlib.util.find_spec("paddle")  # finds, does not import
    assert spec is not None and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])


def _compile(home: Path, folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:  # paddle loads whatever library lies in `folder`
        made = Path(scratch) / LIBRARY
        include, libs = home / "include", home / "libs"
        command = [
            *("g++", "-std=c++17", "-O1", "-g0", "-Wall", "-Werror", "-shared", "-fPIC", "-pthread"),
            *("-isystem", str(include), "-isystem", str(include / "third_party")),
            *(str(HERE / name) for name in SOURCES),
            *("-L", str(libs), "-l:libphi_core.so", "-l:libcommon.so", f"-Wl,-rpath,{libs}", "-o", str(made)),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"the stand-in NPU does not compile:\n{done.stderr[-4000:]}")
        os.replace(made, folder / LIBRARY)


STRICT = {"NPU_DOUBLE_STRICT": str(HERE / "plugin_kernels.txt")}  # what the real plugin of October 2024 has, no more
NEWER = {"NPU_DOUBLE_STRICT": f"{HERE / 'plugin_kernels.txt'}:{HERE / 'plugin_kernels_newer.txt'}"}

PLAIN = {"NPU_DOUBLE_FUSED": "0"}  # the fused operators give zeros, so that none is taken


def environment(folder: Path | None, **more: str) -> dict[str, str]:
    """The environment of a child process: this one's without what paddle reads, and the plugin.

    Args:
        folder: see `build`; None for a process without the double.
        more: variables that are added, e.g. `README_BLOCK`.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_OURS)}
    plugin = {} if folder is None else {"CUSTOM_DEVICE_ROOT": str(folder)}
    return {**kept, "GLOG_minloglevel": "1", **plugin, **more}
