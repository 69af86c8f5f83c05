"""The one place that knows devices: environment before paddle loads, choice of device, what a dtype needs, seeds.

`prepare_environment()` must run before `import paddle`; the packages that need paddle call it when they are imported.
Sources: Paddle's flag documentation; measurements of the CPU settings in `benchmarks/`.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import random
import sys
import warnings
from pathlib import Path

from paddlemix.errors import UserError, did_you_mean
from paddlemix.log import logger

DEVICE_KINDS = ("gpu", "npu", "xpu", "cpu")
_LOW_PRECISION = ("bfloat16", "float16")
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # glibc mallopt parameters


def prepare_environment() -> None:
    """Sets what paddle reads while it loads.  Values that the user exported win; a second call changes nothing."""
    if "paddle" in sys.modules:
        return
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count() or 1))  # paddle's CPU kernels use one thread otherwise
    os.environ.setdefault("GLOG_minloglevel", "1")
    if _is_amd():
        os.environ.setdefault("MKL_DEBUG_CPU_TYPE", "5")  # the math library's AVX2 path, about 3 times faster on AMD
    if not _accelerator_expected():
        # Transposed views cost more than copies on CPU (7.3 against 0.14 ms for one attention transpose).
        os.environ.setdefault("FLAGS_use_stride_kernel", "0")
        # Milliseconds that an idle thread spins: by default 200, in which it takes a core from those that work.
        os.environ.setdefault("KMP_BLOCKTIME", "1")
        _keep_freed_memory()
    _import_quietly()


def _import_quietly() -> None:
    """Loads paddle without its notices on a compiler cache and on threads: nothing that a user could act on."""
    warnings.filterwarnings("ignore", message="No ccache found")
    notices = io.StringIO()
    with contextlib.redirect_stderr(notices):
        import paddle  # noqa: F401
    rest = [line for line in notices.getvalue().splitlines() if "OMP_NUM_THREADS" not in line]
    if rest:
        sys.stderr.write("\n".join(rest) + "\n")


def _is_amd() -> bool:
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def _accelerator_expected() -> bool:
    plugin_root = os.environ.get("CUSTOM_DEVICE_ROOT")
    return bool(plugin_root) or Path("/dev/nvidiactl").exists() or Path("/dev/davinci_manager").exists()


def _keep_freed_memory() -> None:
    """Lets glibc keep freed blocks, so that a large activation is not mapped and zeroed anew for each operator."""
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # not glibc
        return
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, -1)
    mallopt(_M_TOP_PAD, 64 * 1024 * 1024)


def select_device(name: str | None = None) -> str:
    """Makes a device current.

    Args:
        name: "gpu", "npu", "xpu" or "cpu", with or without ":N"; None takes an accelerator where there is one.

    Returns:
        The name paddle gives it, e.g. "gpu:0" or "cpu".

    Raises:
        UserError: the name is not a device kind, or this machine or this paddle has none of the kind.
    """
    import paddle

    if name is None:
        name = _default_kind()
    kind = name.partition(":")[0]
    if kind not in DEVICE_KINDS:
        raise UserError(f"device='{name}' is not one of {', '.join(DEVICE_KINDS)}{did_you_mean(kind, DEVICE_KINDS)}")
    try:
        paddle.set_device(name)
    except (ValueError, RuntimeError, OSError) as error:
        reason = str(error).strip().rpartition("\n")[2]  # paddle puts a stack above it
        raise UserError(
            f"device='{name}' cannot be used here ({reason}); available: "
            f'{", ".join(available_kinds())}. Set "device" to one of these or install the paddle build for it.'
        ) from error
    return paddle.get_device()


def available_kinds() -> list[str]:
    """Device kinds that paddle can use here, best first; always ends with "cpu"."""
    import paddle

    kinds = list(paddle.device.get_all_custom_device_type() or [])
    if paddle.device.is_compiled_with_cuda() and paddle.device.cuda.device_count() > 0:
        kinds.insert(0, "gpu")
    return [*kinds, "cpu"]


def _default_kind() -> str:
    return available_kinds()[0]


def check_dtype(dtype: str, device: str) -> None:
    """Refuses a dtype that the device cannot compute in.

    Raises:
        UserError: bfloat16 or float16 on CPU, for which paddle has no matrix kernels.
    """
    if dtype in _LOW_PRECISION and device.startswith("cpu"):
        raise UserError(
            f"{dtype} cannot be computed on CPU (paddle has float32 matrix kernels only); remove bf16/fp16/--fp16 "
            'or choose an accelerator with "device": "gpu" or "npu"'
        )


def set_seed(seed: int) -> None:
    """Seeds Python, numpy and paddle (host and device generators)."""
    import numpy as np
    import paddle

    random.seed(seed)
    np.random.seed(seed % 2**32)
    paddle.seed(seed)


def peak_memory_bytes(device: str) -> int:
    """Largest memory use so far: of the device where paddle counts it, else of this process. 0 when unknown."""
    import paddle

    if not device.startswith("cpu"):
        try:
            return int(paddle.device.max_memory_allocated())
        except (AttributeError, ValueError, RuntimeError):
            logger.debug("no memory figures on %s", device)
            return 0
    try:
        import resource
    except ImportError:  # not a POSIX system
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
