"""The whole examination: machine, packages, devices, settings and a test of each device, as sections of lines.

Paddle is loaded only here, and late, so that an installation without it, or with a broken plugin, still gets a report.
"""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass, field
from pathlib import Path

from paddlemix import __version__
from paddlemix.device.checks import Problem, check_values
from paddlemix.device.choice import (
    available_kinds,
    device_count,
    kind_of,
    missing_card,
    select_device,
    supported_dtypes,
)
from paddlemix.device.environment import (
    current_environment,
    expected_kind,
    in_force,
    plugin_folder,
    plugin_libraries,
    prepare_environment,
    prepared,
)
from paddlemix.device.settings import DEVICE_KINDS
from paddlemix.device.settings_text import environment_problems
from paddlemix.doctor.packages import INSTALL, PADDLE_BUILDS, PLUGIN, check_packages, installed_packages, requirements
from paddlemix.errors import UserError

# Device files of the drivers: they show cards even where paddle is missing.
_NVIDIA, _ASCEND = Path("/dev/nvidiactl"), Path("/dev/davinci_manager")
_SHOWN = (*PADDLE_BUILDS, PLUGIN, "paddlenlp", "numpy", "transformers", "safetensors")
_SOURCES = {"user": "yours", "ours": "set by paddlemix", "default": "default"}


@dataclass
class Examination:
    """What was found.

    Args:
        sections: title to lines, in the order in which they are shown.
        problems: what is wrong, each once.
    """

    sections: dict[str, list[str]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    @property
    def healthy(self) -> bool:
        """Whether nothing serious is wrong."""
        return not any(problem.serious for problem in self.problems)

    def add(self, problems: list[Problem]) -> None:
        """Notes problems that are not noted yet."""
        self.problems += [problem for problem in problems if problem not in self.problems]


def examine(device: str | None = None, self_test: bool = True, packages: dict[str, str] | None = None) -> Examination:
    """Examines this installation.

    Args:
        device: to examine; None for all that are available.
        self_test: also train and ask a tiny model on each, and check the card that `device` names.
        packages: name -> version instead of what is installed.
    """
    found = Examination()
    packages = installed_packages() if packages is None else packages
    found.sections["machine"] = _machine()
    found.sections["packages"] = [f"paddlemix {__version__}"]
    found.sections["packages"] += [f"{name} {packages[name]}" for name in _SHOWN if name in packages]
    found.add(check_packages(packages, requirements(), _ASCEND.exists()))
    # Before paddle is loaded, since a wrong value may be why it fails to load.
    for kind in DEVICE_KINDS:
        found.add(check_values(kind, os.environ))
    # all below needs paddle; what to install is shown in either case
    if _loads_paddle(found):
        names = _devices(found, device)
        for name in names:
            _settings(found, kind_of(name))
        if "cpu" in names:
            _cpu_kernels(found, noted=names == ["cpu"])
        if self_test and names:
            _test_all(found, names)
            # minutes long, so only for a card that was asked for by name
            if device is not None and kind_of(names[0]) != "cpu":
                _check_card(found, names[0])
    if _NVIDIA.exists() and "paddlepaddle-gpu" not in packages:
        found.add(
            [Problem("this machine has an NVIDIA card, but paddle's GPU build is not installed", INSTALL["gpu"], False)]
        )
    found.sections["to install for"] = [f"{kind}: {command}" for kind, command in INSTALL.items()]
    found.sections["to install for"].append("PADDLE_INDEX: the address of Paddle's package index, on its install page")
    return found


def _machine() -> list[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        lines = []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    cards = [kind for kind, path in (("NVIDIA", _NVIDIA), ("Ascend", _ASCEND)) if path.exists()]
    return [
        f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        f"{name or platform.processor() or 'processor unknown'}, {os.cpu_count()} threads",
        f"cards that the system shows: {', '.join(cards) or 'none'}",
    ]


def _loads_paddle(found: Examination) -> bool:
    try:
        prepare_environment()
        import paddle  # noqa: F401
    except UserError as error:
        what, _, fix = str(error).partition("; ")
        found.add([Problem(what, fix)])
        return False
    except Exception as error:  # a plugin or a library of paddle's may raise anything
        reason = f"{type(error).__name__}: {str(error).strip().rpartition(chr(10))[2]}"
        libraries = ", ".join(map(str, plugin_libraries()))
        fix = f"move {libraries} away and try again" if libraries else f"install it again: {INSTALL['cpu']}"
        found.add([Problem(f"paddle cannot be imported ({reason})", fix)])
        return False
    return True


def _devices(found: Examination, device: str | None) -> list[str]:
    """Fills the section on devices; returns the names of those to examine, the CPU first."""
    kinds, libraries = available_kinds(), plugin_libraries()
    lines = [f"{kind}: {device_count(kind)}" for kind in kinds if kind != "cpu"] + ["cpu"]
    lines.append(f"plugin: {', '.join(map(str, libraries)) or f'none in {plugin_folder()}'}")
    found.sections["devices"] = lines
    problem = missing_card()
    if problem is not None:
        found.add([problem])
        # nothing to examine: the missing card is the finding
        if device is not None and kind_of(device) == expected_kind():
            return []
    # The first card of each kind; the CPU first, whose numbers the others are compared with.
    if device is None:
        return [kind if kind == "cpu" else f"{kind}:0" for kind in reversed(kinds)]
    try:
        return [select_device(device)]
    except UserError as error:
        what, _, fix = str(error).partition(": ") if "is not available: " in str(error) else (str(error), "", "")
        found.add([Problem(what, fix or f"choose one of {', '.join(kinds)}")])
        return []


def _settings(found: Examination, kind: str) -> None:
    environment = current_environment()
    rows = in_force(kind, prepared(), environment)
    found.sections[f"environment for {kind}"] = [
        f"{row.setting.name} = {row.value} ({_SOURCES[row.source]}): {row.setting.reason}" for row in rows
    ]
    found.add(environment_problems(kind, prepared(), environment))


def _cpu_kernels(found: Examination, noted: bool) -> None:
    """Reports what the CPU computes with.

    Args:
        noted: missing compiled kernels are a problem, because the CPU is the only device.
    """
    from paddlemix.models.kernels import cpu_library
    from paddlemix.models.kernels.fused import cpu_kernels

    found.sections["kernels for cpu"] = [cpu_kernels()]
    reason = cpu_library.missing()
    if reason is not None and noted:
        why, _, fix = reason.partition("; ")
        what = f"no compiled kernels, so a training step takes about 1.25 times as long: {why}"
        found.add([Problem(what, fix, serious=False)])


def _check_card(found: Examination, name: str) -> None:
    """The checks that take minutes, of a card that was asked for by name."""
    from paddlemix.doctor.card import check_card

    report = check_card(name)
    found.sections[f"checks of {name}, to be sent with a report"] = report.lines()
    found.add([Problem(what, "do not train on it; see docs/devices.md") for what in report.wrong])
    if report.on_host:
        operators = ", ".join(sorted(set().union(*report.on_host.values())))
        what = f"{name} has no kernel for {operators}: the host computes these, and each waits for the device"
        found.add([Problem(what, "update driver and plugin, and report it", serious=False)])


def _test_all(found: Examination, names: list[str]) -> None:
    """Tests every device; the CPU's result is what the others are compared with."""
    from paddlemix.doctor.self_test import SelfTest, compare, computes_in, run_self_test
    from paddlemix.models.kernels.fused import choose_kernels, use_plain_kernels

    lines: list[str] = found.sections.setdefault("self-test: 40 steps of a tiny model, then its answers", [])
    reference: SelfTest | None = None
    # the CPU first, whether asked for or not: its result is the reference
    for name in ["cpu", *(name for name in names if name != "cpu")]:
        try:
            test = run_self_test(name)
        except Exception as error:  # a device's own errors are of any kind
            reason = f"{type(error).__name__}: {str(error).strip().rpartition(chr(10))[2]}"
            fix = "see docs/devices.md, errors by their text"
            found.add([Problem(f"the self-test on {name} stops ({reason})", fix)])
            continue
        # if the test on the CPU stops, the first card's result is compared with itself, and only its learning is judged
        reference = reference or test
        wrong = compare(test, reference)
        memory = f", at most {test.peak_bytes / 2**20:.0f} MiB" if test.peak_bytes else ""
        lines.append(f"{name}: {wrong or 'right'}, {test.seconds:.1f} s{memory}")
        if wrong:
            found.add([Problem(f"the self-test on {name} fails: {wrong}", "do not train on it; see docs/devices.md")])
        reasons = {dtype: computes_in(name, dtype) for dtype in ("float32", "bfloat16", "float16")}
        lines.append(f"{name}: computes in {', '.join(dtype for dtype, why in reasons.items() if why is None)}")
        for dtype in supported_dtypes(name):
            if reasons[dtype] is not None:
                what = f"{name} should compute in {dtype}, and does not: {reasons[dtype]}"
                found.add([Problem(what, "use another precision (bf16, fp16), or update driver and plugin")])
        if kind_of(name) != "cpu":
            lines += [f"{name}: {line}" for line in choose_kernels(None, name, "float16")]
            # only the report was wanted; the next device starts from the plain forms
            use_plain_kernels()
    select_device("cpu")
