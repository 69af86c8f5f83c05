"""How much memory a device has, and how much a run takes of it before it has a model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import paddle

_CONTEXT_BYTES = 600 * 1024**2  # of an accelerator's runtime with its kernels: a usual size, not measured
_PROGRAM_BYTES = 600 * 1024**2  # of the libraries, where the system does not tell
LATER_BYTES = 56 * 1024**2  # of the same, loaded later in a run.  Measured with a model of almost nothing
_NO_LIMIT = 2**60  # control groups report a number this large, or "max", where they set no limit
_CGROUPS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


@dataclass(frozen=True, kw_only=True)
class DeviceMemory:
    """Memory of a device in bytes.

    Args:
        total: what it has.
        free: what is not in use; on CPU what this process holds counts as free.
    """

    total: int
    free: int


def device_memory(kind: str) -> DeviceMemory | None:
    """Memory of the current device of a kind; None where it is not known.

    Args:
        kind: "cpu", "gpu", ...
    """
    if kind == "cpu":
        return _host_memory()
    # A custom device has no call that paddle offers for it everywhere, so an NPU's memory is not known here.
    if kind == "gpu" and paddle.device.is_compiled_with_cuda() and paddle.device.cuda.device_count() > 0:
        total = int(paddle.device.cuda.get_device_properties().total_memory)
        return DeviceMemory(total=total, free=total)
    return None


def program_bytes(on_cpu: bool) -> int:
    """What a run takes before its model: on CPU its libraries, all of which this loads; elsewhere the runtime."""
    if not on_cpu:
        return _CONTEXT_BYTES
    # Measured instead of assumed: after this import the process holds what a run's process does before its model.
    import paddlemix.trainer.recipe  # noqa: F401

    return (_read_kilobytes("/proc/self/status", "VmRSS") or _PROGRAM_BYTES) + LATER_BYTES


def _host_memory() -> DeviceMemory | None:
    total, free = (_read_kilobytes("/proc/meminfo", key) for key in ("MemTotal", "MemAvailable"))
    if total is None or free is None:
        return None
    # In a container the control group decides, and it may allow more than the machine has.
    limit = min([total, *(number for number in map(_read_limit, _CGROUPS) if number is not None)])
    own = _read_kilobytes("/proc/self/status", "VmRSS") or 0
    return DeviceMemory(total=limit, free=min(free + own, limit))


def _read_kilobytes(path: str, key: str) -> int | None:
    """Bytes after `key:` in a file of the kernel's; None where there is none."""
    try:
        lines = Path(path).read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    values = [line.split()[1] for line in lines if line.startswith(f"{key}:")]
    return int(values[0]) * 1024 if values else None


def _read_limit(path: str) -> int | None:
    """Bytes that a control group allows; None where it sets no limit."""
    try:
        text = Path(path).read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() and int(text) < _NO_LIMIT else None
