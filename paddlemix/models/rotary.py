"""How fast rotary positions turn: plain, or slowed down for contexts longer than the one that was trained on.

Numbers alone; `attention.py` makes cosines and sines of them.  The three ways to scale are those of Llama's successors;
every other is an error, because a model that is computed without its scaling gives plausible nonsense.
Source: transformers' modeling_rope_utils; Llama 3.1's own code for "llama3"; bloc97 and emozilla for "dynamic".
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from paddlemix.errors import UserError

# type -> keys that it needs besides its type
SCALING_KEYS: dict[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary positions of one model.

    Args:
        head_size: width E of a head, even.
        theta: base of the frequencies.
        scaling: checked by `check_rope_scaling`; None for none.
        context: positions trained on; "dynamic" begins behind them.
    """

    head_size: int
    theta: float = 10000.0
    scaling: Mapping[str, Any] | None = None
    context: int = 2048

    @property
    def dynamic(self) -> bool:
        """Whether frequencies depend on the length of what is read."""
        return self.scaling is not None and self.scaling["rope_type"] == "dynamic"

    def slowdown(self) -> np.ndarray | None:
        """What each frequency is multiplied by whatever the length, float32 [E / 2]; None for 1."""
        if self.scaling is None or self.dynamic:
            return None
        slowed = np.full(self.head_size // 2, 1.0 / self.scaling["factor"])
        if self.scaling["rope_type"] == "llama3":
            slowed = self._between(slowed)
        return slowed.astype(np.float32)

    def _between(self, slowed: np.ndarray) -> np.ndarray:
        """Llama 3.1: fast frequencies stay, slow ones are slowed, those between are in between."""
        assert self.scaling is not None
        low, high = self.scaling["low_freq_factor"], self.scaling["high_freq_factor"]
        frequencies = self.theta ** -(np.arange(0, self.head_size, 2) / self.head_size)
        turns = self.scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)  # in the old context
        share = np.clip((turns - low) / (high - low), 0.0, 1.0)
        return share + (1.0 - share) * slowed


def check_rope_scaling(scaling: Mapping[str, Any], head_size: int) -> None:
    """Whether positions can be scaled as a `rope_scaling` says.

    Args:
        scaling: with "rope_type", a key of `SCALING_KEYS`, and that type's keys.
        head_size: width of a head.

    Raises:
        UserError: another type, a missing or unknown key, or a value that is out of range.
    """
    kind = scaling.get("rope_type")
    if kind not in SCALING_KEYS:
        types = ", ".join(SCALING_KEYS)
        raise UserError(f"rope_scaling {dict(scaling)} is not supported; allowed: null, or one of type {types}")
    needed = {"rope_type", *SCALING_KEYS[kind]}
    if scaling.keys() != needed:
        raise UserError(f"rope_scaling {dict(scaling)} does not fit; type '{kind}' has {', '.join(SCALING_KEYS[kind])}")
    for key in SCALING_KEYS[kind]:
        value = scaling[key]
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise UserError(f"rope_scaling's {key} {value!r} is not a number above 0")
    if scaling["factor"] < 1:
        raise UserError(f"rope_scaling's factor {scaling['factor']} is below 1: it would shorten the context")
    if kind == "llama3" and scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        raise UserError(
            f"rope_scaling's low_freq_factor {scaling['low_freq_factor']} must be below its high_freq_factor "
            f"{scaling['high_freq_factor']}"
        )
    if kind == "dynamic" and head_size <= 2:
        raise UserError(f"rope_scaling of type 'dynamic' needs heads wider than 2, these have {head_size}")
