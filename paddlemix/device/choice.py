"""Which device computes, in what precision, and how many of its kind there are."""

from __future__ import annotations

import os

from paddlemix.device.checks import Problem, card_advice, check_cards, no_card_left
from paddlemix.device.environment import expected_kind, plugin_libraries
from paddlemix.device.settings import DEVICE_KINDS
from paddlemix.errors import UserError, did_you_mean
from paddlemix.log import logger

LOW_PRECISION = ("bfloat16", "float16")


def select_device(name: str | None = None) -> str:
    """Makes a device current.

    Args:
        name: "gpu", "npu", "xpu" or "cpu", with or without ":N"; None for an available accelerator, otherwise the CPU.

    Returns:
        The name that paddle uses for it, e.g. "gpu:0" or "cpu".

    Raises:
        UserError: the name is not a device kind, this machine or this paddle has none of the kind, or no card of that
            number.
    """
    import paddle

    if name is None:
        name = available_kinds()[0]
        # Silently computing on the CPU of a machine with cards would cost days.
        problem = missing_card() if name == "cpu" else None
        if problem is not None:
            logger.warning("computing on CPU: %s", problem)
    kind = kind_of(name)
    if kind not in DEVICE_KINDS:
        raise UserError(f"device='{name}' is not one of {', '.join(DEVICE_KINDS)}{did_you_mean(kind, DEVICE_KINDS)}")
    # From the most exact message to the least: not a kind at all; no card of this number; no card of the kind; whatever
    # paddle raises.
    _check_card(name)
    if not device_count(kind):  # paddle's own error would quote a regular expression's match
        raise _unusable(name, f"paddle finds no {kind}")
    try:
        paddle.set_device(name)
    except (ValueError, RuntimeError, OSError) as error:
        # paddle puts a stack trace above the reason
        raise _unusable(name, str(error).strip().rpartition("\n")[2]) from error
    return paddle.get_device()


def _unusable(name: str, reason: str) -> UserError:
    return UserError(
        f"device='{name}' cannot be used here ({reason}); available: {', '.join(available_kinds())}. Set \"device\" to "
        "one of these or install the paddle build for it (`paddlemix doctor` says how)."
    )


def missing_card() -> Problem | None:
    """Why paddle sees no card although it was built for one; None if it sees one, or was built for the CPU only."""
    kind = expected_kind()
    if kind == "cpu" or device_count(kind):
        return None
    # a plugin that was found is named: the driver or the visible cards are at fault then, not the installation
    libraries = plugin_libraries()
    return no_card_left(kind, libraries[0].name if libraries else "", os.environ)


def kind_of(device: str) -> str:
    """ "npu" of "npu:3"."""
    return device.partition(":")[0]


def _check_card(name: str) -> None:
    kind, _, number = name.partition(":")
    count = device_count(kind)
    problem = missing_card()
    # only of the kind that paddle was built for: the others are missing by design
    if problem is not None and kind == expected_kind():
        raise UserError(f"device='{name}' cannot be used here: {problem}")
    # No card at all is reported by select_device, with what is available.
    if kind == "cpu" or not count:
        return
    # Numbers count the cards that this process sees, which the message has to explain.
    if number.isdigit() and int(number) >= count:
        raise UserError(f"device='{name}' is not available: {card_advice(kind, count)}")
    if not number:  # paddle then uses the first card that the launcher names
        for problem in check_cards(kind, count, os.environ):
            raise UserError(f"device='{name}': {problem}")


def device_count(kind: str) -> int:
    """Number of devices of a kind that this process sees; 1 for "cpu"."""
    import paddle

    if kind == "cpu":
        return 1
    # paddle's own builds answer by their modules, a plugin's devices are listed by name: "npu:0", "npu:1"
    if kind == "gpu":
        return int(paddle.device.cuda.device_count()) if paddle.device.is_compiled_with_cuda() else 0
    if kind == "xpu" and paddle.device.is_compiled_with_xpu():
        return int(paddle.device.xpu.device_count())
    # Plugin devices are named "npu:0", "npu:1".
    names = paddle.device.get_available_custom_device() or []
    return sum(kind_of(name) == kind for name in names)


def available_kinds() -> list[str]:
    """Device kinds that paddle can use here, best first; always ends with "cpu"."""
    import paddle

    kinds = [kind for kind in paddle.device.get_all_custom_device_type() or [] if device_count(kind)]
    # Kinds that are built into paddle come before those of a plugin.
    found = [kind for kind in ("gpu", "xpu") if kind not in kinds and device_count(kind)]
    return [*found, *kinds, "cpu"]


def supported_dtypes(device: str) -> tuple[str, ...]:
    """Precisions that the device computes in, of "float32", "bfloat16" and "float16".

    Paddle has matrix kernels for float32 alone on CPU.  It does not answer for a plugin's device; the Ascend 910B that
    paddle's plugin is made for has all three.
    """
    import paddle

    kind = kind_of(device)
    if kind == "cpu":
        return ("float32",)
    # asked of GPUs only: of an NPU `is_bfloat16_supported` raises
    if kind == "gpu" and not paddle.amp.is_bfloat16_supported(device):
        return ("float32", "float16")
    return ("float32", *LOW_PRECISION)


def default_dtype(device: str) -> str:
    """The precision in which a model is best used: bfloat16, float16 on a GPU that lacks it, float32 on CPU."""
    supported = supported_dtypes(device)
    # bfloat16 first: it needs no loss scaling.
    return next(dtype for dtype in (*LOW_PRECISION, "float32") if dtype in supported)


def check_dtype(dtype: str, device: str) -> None:
    """Refuses a dtype that the device cannot compute in.

    Raises:
        UserError: bfloat16 or float16 on CPU, for which paddle has no matrix kernels; bfloat16 on an older GPU.
    """
    if dtype not in LOW_PRECISION:
        return
    if kind_of(device) == "cpu":
        problem = missing_card()
        raise UserError(
            f"{dtype} cannot be computed on CPU (paddle has float32 matrix kernels only); remove bf16/fp16/--fp16 "
            'or choose an accelerator with "device": "gpu" or "npu"' + (f". {problem}" if problem is not None else "")
        )
    if dtype not in supported_dtypes(device):
        raise UserError(
            f"{dtype} cannot be computed on {device}, whose generation lacks it; use float16 (fp16 true, --fp16)"
        )
