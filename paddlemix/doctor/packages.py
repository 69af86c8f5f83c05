"""The installed packages: what is missing, what does not fit, and the command that fixes it.

Pure functions over names and versions; knows no device and loads nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, distributions, requires

from paddlemix.device.checks import Problem

PADDLE = "3.3.1"  # the version that everything here was measured with; setup.py pins it for the CPU
PADDLE_BUILDS = ("paddlepaddle", "paddlepaddle-gpu", "paddlepaddle-xpu")
PLUGIN = "paddle-custom-npu"
_PIN = re.compile(r"^([A-Za-z0-9._-]+)==([^;\s,]+)$")
_NAME = re.compile(r"^([A-Za-z0-9._-]+)")

# $PADDLE_INDEX stands for the address of Paddle's own package index, which its installation page shows.
INSTALL = {
    "cpu": 'pip install -e ".[cpu]"',
    "gpu": f'pip install paddlepaddle-gpu=={PADDLE} -i "$PADDLE_INDEX/stable/cu126/" && pip install -e ".[gpu]"',
    "npu": f'pip install paddle-custom-npu=={PADDLE} -i "$PADDLE_INDEX/stable/npu/" && pip install -e ".[npu]"',
}


def installed_packages() -> dict[str, str]:
    """Name, as pip normalises it, to version of every installed package."""
    found: dict[str, str] = {}
    for distribution in distributions():
        name = distribution.metadata["Name"]
        if name:
            # the first on the path is the one that is imported
            found.setdefault(normalise(name), distribution.version)
    return found


def normalise(name: str) -> str:
    """ "Paddle_Custom.NPU" -> "paddle-custom-npu"."""
    return re.sub(r"[-_.]+", "-", name).lower()


def requirements() -> list[str]:
    """What setup.py requires on every device; [] in a checkout that was never installed."""
    try:
        return [text for text in requires("paddlemix") or [] if "extra ==" not in text]
    except PackageNotFoundError:
        return []


def check_packages(packages: Mapping[str, str], required: Sequence[str], npu: bool = False) -> list[Problem]:
    """Everything that is wrong with what is installed.

    Args:
        packages: see `installed_packages`.
        required: see `requirements`.
        npu: whether the machine has an Ascend card.
    """
    return [*_check_paddle(packages), *_check_plugin(packages, npu), *_check_required(packages, required)]


def _check_paddle(packages: Mapping[str, str]) -> list[Problem]:
    builds = [name for name in PADDLE_BUILDS if name in packages]
    if not builds:
        return [Problem("paddle is not installed", f"for a CPU: {INSTALL['cpu']}")]
    # Both builds install into the same folder, so the second one overwrites half of the first.
    if len(builds) > 1:
        what = f"{' and '.join(f'{name} {packages[name]}' for name in builds)} are both installed, in one folder"
        again = INSTALL["gpu"] if "paddlepaddle-gpu" in builds else INSTALL["cpu"]
        return [Problem(what, f"pip uninstall -y {' '.join(builds)}, then install the one that you need: {again}")]
    version = packages[builds[0]]
    if series(version) < (3, 0):
        what = f"{builds[0]} {version} is older than 3.0"
        return [Problem(what, f"install {PADDLE}: {INSTALL['gpu' if 'gpu' in builds[0] else 'cpu']}")]
    if series(version) != series(PADDLE):
        what = f"{builds[0]} {version}: this was tested with {PADDLE}"
        return [Problem(what, "install that version if numbers differ", False)]
    return []


def _check_plugin(packages: Mapping[str, str], npu: bool) -> list[Problem]:
    plugin = packages.get(PLUGIN)
    if plugin is None:
        if not npu:
            return []
        return [Problem("this machine has an Ascend card, but paddle's plugin for it is not installed", INSTALL["npu"])]
    host = packages.get("paddlepaddle")
    if host is None:
        what = f"{PLUGIN} {plugin} needs paddle's CPU build, which is not installed"
        others = " ".join(name for name in PADDLE_BUILDS if name in packages)
        remove = f"pip uninstall -y {others}, then " if others else ""
        return [Problem(what, f"{remove}pip install paddlepaddle=={'.'.join(map(str, series(plugin)))}.*")]
    # A plugin is built against the C interface of one minor version.
    if series(host) != series(plugin) or ("dev" in host) != ("dev" in plugin):
        what = f"{PLUGIN} {plugin} was built for another paddle than {host}, which loads it nevertheless"
        fix = f'take both from one place: pip install {PLUGIN}=={host} -i "$PADDLE_INDEX/stable/npu/"'
        return [Problem(what, f"{fix}, or paddlepaddle=={plugin} if that is not available")]
    return []


def _check_required(packages: Mapping[str, str], required: Sequence[str]) -> list[Problem]:
    # missing is serious; another version of a pinned package is only worth knowing
    missing, other = [], []
    for text in required:
        name = _NAME.match(text)
        found = packages.get(normalise(name[1])) if name else None
        pin = _PIN.match(text)
        if name and found is None:
            missing.append(text)
        elif pin and found != pin[2]:
            other.append(f"{pin[1]} {found} instead of {pin[2]}")
    problems = []
    if missing:
        what = f"not installed: {', '.join(missing)}"
        problems.append(Problem(what, f"pip install {' '.join(repr(text) for text in missing)}"))
    if other:
        what = f"other versions than those that were tested: {', '.join(other)}"
        problems.append(Problem(what, "install paddlemix again in an environment of its own", False))
    return problems


def series(version: str) -> tuple[int, ...]:
    """(3, 3) of "3.3.1" and of "3.3.0.dev20250430"."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])
