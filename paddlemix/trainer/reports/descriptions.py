"""Names for people: of an adapter's kind, of the machine and of the software that a run used."""

from __future__ import annotations

import contextlib
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import paddle

from paddlemix import __version__
from paddlemix.peft.settings import LoRAConfig

_PACKAGES = ("paddlepaddle-gpu", "paddlepaddle", "paddlenlp")


def describe_adapter(adapter: LoRAConfig) -> str:
    """The kind of an adapter: "LoRA adapter (rank 8, alpha 16)"."""
    kinds = [name for name, used in (("DoRA", adapter.use_dora), ("PiSSA", adapter.pissa)) if used]
    # The scale is then alpha / sqrt(rank) instead of alpha / rank.
    scale = ", rank-stabilised" if adapter.rslora else ""
    return f"{' '.join(kinds) or 'LoRA'} adapter (rank {adapter.r}, alpha {adapter.lora_alpha}{scale})"


def describe_environment(device: str, processes: int) -> list[tuple[str, str]]:
    """Machine and software of this process, as (what, version or name).

    Args:
        device: as paddle names it.
        processes: of the run.
    """
    found = [("device", f"{device} ({_device_name(device)}), {processes} process{'es' if processes > 1 else ''}")]
    found.append(("paddlemix", __version__))
    for package in _PACKAGES:
        # One of the two builds of paddle is installed.
        with contextlib.suppress(PackageNotFoundError):
            found.append((package, version(package)))
    return [*found, ("python", platform.python_version()), ("system", f"{platform.system()} {platform.machine()}")]


def _device_name(device: str) -> str:
    if device.startswith("gpu"):
        return str(paddle.device.cuda.get_device_name())
    # Paddle has no name for a card of a plugin.
    if not device.startswith("cpu"):
        return device.partition(":")[0]
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        lines = []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"{model or platform.machine()}, {os.cpu_count()} threads"
