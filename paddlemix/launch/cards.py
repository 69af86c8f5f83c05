"""Which cards the processes of this machine get, known without loading paddle here.

The numbers follow Paddle's launcher: they are those that CUDA_VISIBLE_DEVICES (for other kinds NPU_VISIBLE_DEVICES,
XPU_VISIBLE_DEVICES) lists; under ASCEND_RT_VISIBLE_DEVICES CANN counts from 0.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from paddlemix.device.environment import expected_kind
from paddlemix.errors import UserError
from paddlemix.launch.options import LaunchOptions
from paddlemix.log import logger

VISIBLE = {
    "gpu": ("CUDA_VISIBLE_DEVICES",),
    "npu": ("NPU_VISIBLE_DEVICES",),
    "xpu": ("XPULINK_VISIBLE_DEVICES", "XPU_VISIBLE_DEVICES"),
}
_ASKING_SECONDS = 120  # loading paddle takes 2 to 10, with a cold disk longer
# The vendors' tools would answer faster, but do not know what a container, a plugin or a build of paddle leaves out.
_QUESTION = (
    "import json; from paddlemix.device import available_kinds, device_count; "
    "print(json.dumps({kind: device_count(kind) for kind in available_kinds()}))"
)


@dataclass(frozen=True)
class Cards:
    """What the processes of this machine compute on.

    Args:
        kind: "gpu", "npu", "xpu" or "cpu".
        names: of the cards, as the user numbers them; empty on CPU.
        numbers: the same as paddle numbers them in a process, as text.
        processes: how many there are.
    """

    kind: str
    names: tuple[str, ...]
    numbers: tuple[str, ...]
    processes: int


def choose_cards(
    options: LaunchOptions,
    device: str | None,
    environment: Mapping[str, str],
    count_devices: Callable[[], dict[str, int]] | None = None,
) -> Cards:
    """The cards, one process each.

    Args:
        device: what the run asks for, "npu" or "gpu:1"; None for the best that there is.
        environment: variables by name.
        count_devices: devices of each kind, best kind first; None asks paddle, in a process of its own.

    Raises:
        UserError: no card of this kind, not this many, or none of this number; `device` names a single card.
    """
    kind, colon, number = (device or "").partition(":")
    if colon:
        raise UserError(
            f"device '{device}' names one card, but each process needs its own; write device={kind} and --devices "
            f"{number}"
        )
    counts: dict[str, int] | None = None
    expected = kind or expected_kind()
    # Only what is not known yet costs the seconds that paddle takes to load.
    if expected != "cpu" and options.devices is None:
        counts = (count_devices or ask_paddle)()
        expected = kind or next(iter(counts))
    kind = expected
    if kind == "cpu":
        if options.devices is not None:
            raise UserError(
                f"--devices {','.join(options.devices)} names cards, but this run computes on CPU; write --nproc for "
                "the number of its processes"
            )
        return Cards("cpu", (), (), options.processes or 1)
    if counts is not None and not counts.get(kind):
        hint = "; write --nproc N for an estimate of N cards" if options.is_dry else ""
        raise UserError(f"device='{kind}' cannot be used here; available: {', '.join(counts)}{hint}")
    return _chosen(kind, options, _listed(kind, environment), None if counts is None else counts[kind])


def planned_cards(options: LaunchOptions, device: str | None, environment: Mapping[str, str]) -> Cards:
    """The cards of a dry run: as many as the options name, whether this machine has them or not.

    Without any named, those that a run would get here.

    Args:
        device, environment: see `choose_cards`.

    Raises:
        UserError: a single card is named by a number that may be meant as how many there are; see `choose_cards` too.
    """
    kind, colon, _ = (device or "").partition(":")
    if options.devices is not None and options.processes is None and len(options.devices) == 1:
        # The training commands' own --dry-run takes a number here, and one device in place of 8 is a wrong estimate.
        name = options.devices[0]
        if name.isdecimal() and int(name) > 1:
            raise UserError(
                f"--devices {name} names one card, number {name}, not {name} cards; for an estimate of {name} write "
                f"--nproc {name} in its place, for one of a single card --nproc 1"
            )
    if options.devices is None and options.processes is None:
        found = choose_cards(options, device, environment)
        if found.kind == "cpu" and kind != "cpu":
            logger.info("this machine has no cards: an estimate for one device; write --nproc N for one of N devices")
        return found
    if colon or kind == "cpu":
        return choose_cards(options, device, environment)
    if options.devices is not None:
        return _chosen(kind or expected_kind(), options, None, None)
    assert options.processes is not None
    return Cards(kind or expected_kind(), (), (), options.processes)


def _listed(kind: str, environment: Mapping[str, str]) -> tuple[str, ...] | None:
    """The cards that a variable makes visible, None if there is none."""
    for name in VISIBLE.get(kind, ()):
        if environment.get(name, "all") not in ("", "all"):
            return tuple(part.strip() for part in environment[name].split(","))
    return None


def _chosen(kind: str, options: LaunchOptions, listed: tuple[str, ...] | None, count: int | None) -> Cards:
    """Picks from the cards that a variable lists, or those that paddle counted."""
    known = listed if listed is not None else None if count is None else tuple(map(str, range(count)))
    names = options.devices
    if names is None:
        assert known is not None
        if options.processes is not None and options.processes > len(known):
            raise UserError(
                f"--nproc {options.processes} needs a card for each process, and there are {len(known)}: "
                f"{', '.join(known)}"
            )
        names = known[: options.processes]
    wrong = [name for name in names if (name not in known if known is not None else not name.isdecimal())]
    if wrong:
        allowed = f"visible are {', '.join(known)}" if known is not None else "write their numbers, e.g. 0,1"
        raise UserError(f"--devices {','.join(names)}: there is no {kind} {wrong[0]}; {allowed}")
    numbers = names if listed is None else tuple(str(listed.index(name)) for name in names)
    return Cards(kind, names, numbers, len(names))


def ask_paddle() -> dict[str, int]:
    """Devices of each kind that paddle sees on this machine, best kind first; "cpu" is always among them.

    Raises:
        UserError: paddle cannot be loaded.
    """
    command = [sys.executable, "-c", _QUESTION]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=_ASKING_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise UserError(
            f"paddle did not say in {_ASKING_SECONDS} seconds which devices there are; name them with --devices"
        ) from None
    try:
        counts = json.loads(answer.stdout.strip().rpartition("\n")[2])
    except ValueError:
        reason = (answer.stderr.strip() or f"status {answer.returncode}").rpartition("\n")[2]
        raise UserError(f"paddle cannot say which devices there are ({reason}); `paddlemix doctor` says why") from None
    return {str(kind): int(count) for kind, count in counts.items()}
