"""Sets the variables that paddle reads while it loads, and remembers what was set, by whom and when.

`prepare_environment` must run before `import paddle`; the packages that need paddle call it when they are imported.
Knows the table of settings; of paddle only that it is the library to load.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import io
import os
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from paddlemix.device.setting_row import Setting
from paddlemix.device.settings import SETTINGS, settings_of, value_of
from paddlemix.device.started import how_started
from paddlemix.errors import UserError

Source = Literal["user", "ours", "default"]
_PLUGIN_ROOT = "CUSTOM_DEVICE_ROOT"
# Not in any Python module.  Source: glibc malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -2, -3, -4  # glibc mallopt parameters
_MIB = 1024 * 1024


@dataclass(frozen=True)
class Prepared:
    """What the environment was when paddle was loaded.

    Args:
        kind: device that was expected.
        ours: settings that we made, by name.
        environment: every variable as paddle found it; if paddle was loaded before us, as the process started.
        in_time: whether we ran before paddle was loaded.
    """

    kind: str
    ours: dict[str, str]
    environment: dict[str, str]
    in_time: bool


@dataclass(frozen=True)
class InForce:
    """A setting as it is now.

    Args:
        source: who set it.
    """

    setting: Setting
    value: str
    source: Source


_prepared: Prepared | None = None


def prepare_environment() -> None:
    """Sets what paddle reads while it loads.  Values that the user exported win; a second call changes nothing.

    Raises:
        UserError: a switch of our own is neither 0 nor 1, a time-out between several processes is not a number
            within its limits, or a variable names a card that does not exist.
    """
    global _prepared
    kind, started = expected_kind(), how_started(os.environ)
    for setting in SETTINGS:
        # Before anything is set, so that a wrong value changes nothing.
        if setting.form == "switch":
            is_on(setting.name, os.environ)
        if setting.form == "duration" and started.several and {kind} & set(setting.kinds):
            check_duration(setting, os.environ.get(setting.name, setting.several or ""))
    # Too late to set anything; what was set by others is still recorded for the report.
    if "paddle" in sys.modules:
        if _prepared is None:
            _prepared = Prepared(kind, {}, _environment_at_start(), in_time=False)
        return
    ours: dict[str, str] = {}
    for setting in settings_of(kind):
        value = value_of(setting, _is_amd(), started)
        # An exported value always wins, an empty one too.
        if value is None or setting.name in os.environ:
            continue
        if setting.form == "call":
            if not _keep_freed_memory():
                continue
        else:
            os.environ[setting.name] = value
        ours[setting.name] = value
    # the copy is taken before the import, in which paddle itself writes CUSTOM_DEVICE_ROOT
    _prepared = Prepared(kind, ours, dict(os.environ), in_time=True)
    # Here and not at first use, so that paddle's notices cannot appear in the middle of output.
    _import_quietly()


def is_on(switch: str, environment: Mapping[str, str]) -> bool:
    """Whether a switch of our own is on, which it is by default.

    Args:
        switch: name of a setting of form "switch".
        environment: variables by name.

    Raises:
        UserError: its value is neither 0 nor 1.
    """
    value = environment.get(switch, "1")
    if value not in ("0", "1"):
        raise UserError(f"{switch}={value} is neither 0 nor 1; export {switch}=0 or =1, or unset it")
    return value == "1"


def check_duration(setting: Setting, value: str) -> None:
    """Checks a time-out before a library reads it.

    Raises:
        UserError: it is not a whole number within the setting's limits.
    """
    assert setting.limits is not None
    first, last = setting.limits
    if not (value.isascii() and value.isdigit() and first <= int(value) <= last):
        raise UserError(
            f"{setting.name}={value} is not a whole number from {first} to {last}; export {setting.name}="
            f"{setting.several}, or unset it"
        )


def prepared() -> Prepared:
    """What the last `prepare_environment` did; calls it if nobody has."""
    if _prepared is None:
        prepare_environment()
    assert _prepared is not None
    return _prepared


def in_force(kind: str, state: Prepared, environment: Mapping[str, str]) -> list[InForce]:
    """The settings of a device kind with the values that they have now.

    Args:
        state: see `prepared`.
        environment: of this process, now.
    """
    found = []
    for setting in settings_of(kind):
        # a value that was changed after we had set it is the user's
        ours, value = state.ours.get(setting.name), environment.get(setting.name)
        if setting.form == "call":
            value = ours
        source: Source = "default" if value is None else "ours" if value == ours else "user"
        found.append(InForce(setting, setting.default if value is None else value, source))
    return found


def current_environment() -> dict[str, str]:
    """This process's variables, without the one that paddle itself writes while it loads."""
    own = dict(os.environ)
    folder = plugin_folder()
    # paddle writes its folder or an empty text; a value that was there before the import is the user's and stays
    if own.get(_PLUGIN_ROOT) in ("", str(folder)) and _PLUGIN_ROOT not in prepared().environment:
        del own[_PLUGIN_ROOT]
    return own


def expected_kind() -> str:
    """Device kind that paddle will find here, determined without loading it: "npu" or "xpu" if a plugin is installed,
    "gpu" if paddle's GPU build finds a card, else "cpu"."""
    # A plugin wins over a GPU build: paddle loads every plugin it finds.
    libraries = plugin_libraries()
    if libraries:
        return "npu" if any("npu" in library.name.lower() for library in libraries) else "xpu"
    # the build alone is not enough: without a driver paddle finds no card
    if Path("/dev/nvidiactl").exists() and _is_installed("paddlepaddle-gpu"):
        return "gpu"
    return "xpu" if _is_installed("paddlepaddle-xpu") else "cpu"


def plugin_folder() -> Path | None:
    """The folder in which paddle looks for plugins; None where paddle is not installed."""
    if os.environ.get(_PLUGIN_ROOT):
        return Path(os.environ[_PLUGIN_ROOT])
    # `find_spec` raises for a loaded module without a spec, so a loaded one is asked directly
    loaded = sys.modules.get("paddle")
    # Finds the package without importing it.
    found = importlib.util.find_spec("paddle") if loaded is None else getattr(loaded, "__spec__", None)
    if found is None or not found.submodule_search_locations:
        return None
    return Path(found.submodule_search_locations[0]).parent / "paddle_custom_device"


def plugin_libraries() -> list[Path]:
    """The plugins that paddle loads."""
    folder = plugin_folder()
    return sorted(folder.glob("*.so")) if folder is not None and folder.is_dir() else []


def _is_installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


def _environment_at_start() -> dict[str, str]:
    """The variables that this process was started with; {} where the system does not say."""
    try:
        # the kernel's copy from the start of the process; os.environ has later changes too
        entries = Path("/proc/self/environ").read_bytes().split(b"\0")
    except OSError:
        return {}
    pairs = (os.fsdecode(entry).partition("=") for entry in entries if b"=" in entry)
    return {name: value for name, _, value in pairs}


def _import_quietly() -> None:
    """Loads paddle without its notices about a compiler cache and threads, which a user cannot act on.

    Raises:
        UserError: a variable names a card that does not exist, which makes paddle fail while it loads, or its folder in
            the home directory cannot be made.
    """
    # paddle warns of a tool that only its own developers need.
    warnings.filterwarnings("ignore", message="No ccache found")
    notices = io.StringIO()
    try:
        with contextlib.redirect_stderr(notices):
            import paddle  # noqa: F401
    except ValueError as error:
        chosen = [f"{name}={value}" for name, value in os.environ.items() if name.startswith("FLAGS_selected_")]
        # Only this combination is known; anything else is not ours to explain.
        if not chosen or not any(words in str(error) for words in ("wrong place", "invalid literal for int")):
            raise
        raise UserError(
            f"paddle finds no card of the number in {', '.join(chosen)}; unset it, or name an existing card (the "
            "launcher sets it for each process, npu-smi and nvidia-smi list the cards)"
        ) from error
    except OSError as error:
        home = os.path.expanduser("~")
        # paddle makes ~/.cache/paddle while it loads.
        if error.filename is None or not str(error.filename).startswith(home):
            raise
        raise UserError(
            f"paddle cannot make {error.filename} ({error.strerror}), a folder that it needs while it loads; export "
            f"HOME as a writable folder (it is {home})"
        ) from error
    # what else was said on standard error is shown after all, in one piece
    rest = [line for line in notices.getvalue().splitlines() if "OMP_NUM_THREADS" not in line]
    if rest:
        sys.stderr.write("\n".join(rest) + "\n")


def _is_amd() -> bool:
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def _keep_freed_memory() -> bool:
    """Lets glibc keep freed blocks; False if the C library is not glibc."""
    # MMAP_MAX 0         large blocks come from the heap, whose pages stay mapped
    # TRIM_THRESHOLD -1  the top of the heap is never returned
    # TOP_PAD            the heap grows by 64 MiB at once
    # The gain is in the table of settings, row mallopt.
    return _set_malloc({_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: -1, _M_TOP_PAD: 64 * _MIB})


def return_freed_memory() -> None:
    """From now on blocks of 1 MiB or more go back to the system when they are freed.

    For when the host's memory matters more than time: the opposite of what `prepare_environment` asks for, and slower
    by the cost of mapping new pages.
    """
    # only if we asked for the opposite: other settings of malloc are the user's
    if _prepared is not None and "mallopt" in _prepared.ours:
        _set_malloc({_M_MMAP_MAX: 1 << 20, _M_MMAP_THRESHOLD: _MIB, _M_TRIM_THRESHOLD: 128 * _MIB})


def _set_malloc(values: Mapping[int, int]) -> bool:
    """Sets parameters of glibc's malloc; False if the C library is not glibc."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # not glibc
        return False
    for parameter, value in values.items():
        mallopt(parameter, value)
    return True
