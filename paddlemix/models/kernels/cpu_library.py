"""The library of the kernels in C (*_kernels.c): which build fits this processor, what it supports, and calls to it.

It is built when the package is installed, if there is a C compiler.  `is_supported` is false if the library is missing
or switched off (PADDLEMIX_CPU_KERNELS=0), or if a tensor is of another kind; callers then compute the plain form in
paddle operators.  The shapes that each kernel expects are in cpu.py and peft/cpu_products.py.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import paddle

from paddlemix.device.environment import is_on
from paddlemix.models.kernels.threads import openmp, threads_here

_AGAIN = "install paddlemix once more (pip install -e .)"
_SWITCH = "PADDLEMIX_CPU_KERNELS"  # see the table in paddlemix/device/settings.py
_VERSION = 2  # KERNELS_VERSION in cpu_kernels.c
_LEAST_NUMBERS = 1 << 15  # below this many, waking another thread takes longer than computing them
# What processors must have for a kind, best first; setup.py builds the same
_KINDS = {
    "avx512": {"avx512f", "avx512vl", "avx512dq", "avx512bw", "avx512cd"},
    "avx2": {"avx2", "fma"},
    "plain": set(),
}

_LONG, _POINTER, _FLOAT = ctypes.c_long, ctypes.c_void_p, ctypes.c_float
_ARGUMENTS: dict[str, tuple[Any, ...]] = {  # after the number of threads
    "rms_norm": (_LONG, _LONG, _POINTER, _POINTER, _FLOAT, _POINTER, _POINTER),
    "rms_norm_backward": (_LONG, _LONG) + (_POINTER,) * 6,
    "add_bias": (_LONG, _LONG, _POINTER, _POINTER),
    "quick_gelu": (_LONG, _POINTER, _POINTER),
    "gated": (_LONG, _POINTER, _POINTER, _POINTER),
    "gated_backward": (_LONG,) + (_POINTER,) * 5,
    "rotate": (_LONG, _LONG, _LONG, _POINTER, _POINTER, _POINTER, _FLOAT, _POINTER),
    "attention": (_POINTER,) * 6 + (_FLOAT, _POINTER, _POINTER),
    "attention_backward": (_POINTER,) * 7 + (_FLOAT,) + (_POINTER,) * 4,
    "attend_cached": (_POINTER,) * 9 + (_FLOAT, _POINTER),
    "matmul_few": (_LONG, _LONG, _LONG, _POINTER, _POINTER, _POINTER),
    "add_outer": (_LONG, _LONG, _LONG) + (_POINTER,) * 4,
    "cross_entropy": (_LONG, _LONG, _POINTER, _POINTER, _POINTER, _POINTER),
    # of quantized_kernels.c
    "int8_product": (_LONG,) * 3 + (_POINTER,) * 4,
    "nf4_product": (_LONG,) * 3 + (_POINTER,) * 6 + (_LONG, _LONG, _POINTER),
    "int8_widen": (_LONG,) * 3 + (_POINTER,) * 3,
    "nf4_widen": (_LONG,) * 3 + (_POINTER,) * 5 + (_LONG, _LONG, _POINTER),
}

_switched_off = False


@contextmanager
def switched_off() -> Iterator[None]:
    """Within this block everything is computed in its plain form: to compare the two."""
    global _switched_off
    before, _switched_off = _switched_off, True
    try:
        yield
    finally:
        _switched_off = before


def missing() -> str | None:
    """Why there are no compiled kernels, then what to do, as "what; what to do"; None where there are.

    Raises:
        UserError: PADDLEMIX_CPU_KERNELS is neither 0 nor 1; so does every function here that needs the library.
    """
    return _load()[1]


def kind() -> str | None:
    """The kind in use, a key of `_KINDS`: "avx512", "avx2" or "plain"; None where `missing` says why."""
    best = _best_file()
    return None if best is None or missing() is not None else best[0]


def is_supported(*tensors: paddle.Tensor) -> bool:
    """Whether the kernels can compute with tensors: all float32, contiguous and on the CPU."""
    if _switched_off or _load()[0] is None:
        return False
    float32 = paddle.float32
    return all(tensor.dtype == float32 and tensor.place.is_cpu_place() and tensor.is_contiguous() for tensor in tensors)


def supports_products(*tensors: paddle.Tensor) -> bool:
    """`is_supported`, for kernels that call the library of paddle's own products."""
    return is_supported(*tensors) and gemm() is not None


def run(name: str, numbers: int, *arguments: Any) -> None:
    """Calls a kernel, for a wrapper that asked `is_supported` before.

    Args:
        name: of the function in C.
        numbers: that are computed with, for which threads are chosen.
        arguments: the function's, after the number of threads; of a tensor, its address is passed.
    """
    call(name, threads(numbers), *arguments)


def threads(numbers: int) -> int:
    """Threads that a kernel computes this many numbers with."""
    return threads_here() if numbers >= _LEAST_NUMBERS else 1


def call(name: str, count: int, *arguments: Any) -> None:
    """As `run`, on `count` threads: for a kernel that was given memory for each of them."""
    functions = _load()[0]
    assert functions is not None, "ask is_supported() first"
    functions[name](count, *(part.data_ptr() if isinstance(part, paddle.Tensor) else part for part in arguments))


@functools.cache
def gemm() -> int | None:
    """Address of cblas_sgemm in the library that paddle's own products use; None where it has another."""
    # the copy that paddle itself has loaded, so that the process has one library of products
    for path in sorted((Path(paddle.__file__).parent / "libs").glob("lib*.so*")):
        if path.name.startswith(("libmklml", "libopenblas")):
            try:
                return ctypes.cast(ctypes.CDLL(str(path)).cblas_sgemm, ctypes.c_void_p).value
            except (OSError, AttributeError):
                continue
    return None


@functools.cache
def _load() -> tuple[dict[str, Callable[..., None]] | None, str | None]:
    """The functions for this processor, or why there are none and what to do."""
    if not is_on(_SWITCH, os.environ):
        return None, f"{_SWITCH}=0 switches them off; unset it"
    best = _best_file()
    if best is None:
        return None, f"they were not built; install a C compiler (gcc), then {_AGAIN}"
    path = best[1]
    # The library is linked without an OpenMP runtime: loading paddle's first makes its names known to the loader.
    if openmp() is None:
        return None, "paddle's OpenMP runtime cannot be loaded; a build of paddle for x86 brings it (libs/libiomp5.so)"
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return None, f"{path.name} cannot be loaded ({error}); {_AGAIN}"
    # a build of another version would be called with wrong arguments
    has_all = all(hasattr(library, name) for name in ("kernels_version", *_ARGUMENTS))
    if not has_all or library.kernels_version() != _VERSION:
        return None, f"{path.name} is of another version of paddlemix; {_AGAIN}"
    # ctypes passes Python numbers as int unless it is told: a long or a pointer would be cut to 32 bits
    functions = {}
    for name, arguments in _ARGUMENTS.items():
        function = functions[name] = getattr(library, name)
        function.argtypes, function.restype = (_LONG, *arguments), None
    return functions, None


@functools.cache
def _best_file() -> tuple[str, Path] | None:
    """The best kind that was built and runs on this processor, and its library."""
    found = {path.name.partition(".")[0]: path for path in Path(__file__).parent.glob("_cpu_kernels_*.so")}
    has = _processor_features()
    for name, needs in _KINDS.items():
        path = found.get(f"_cpu_kernels_{name}")
        if path is not None and needs <= has:
            return name, path
    return None


def _processor_features() -> set[str]:
    """As Linux names them; empty elsewhere, which leaves the plain kind."""
    if platform.machine() != "x86_64":
        return set()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return set()
    return set(next((line for line in lines if line.startswith("flags")), "").split())
