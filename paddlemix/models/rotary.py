"""Rotary positions: how fast they turn, and the turning of queries and keys.

Plain, or slowed down for contexts longer than the one that was trained on.  The three ways to scale are those of
Llama's successors; any other is an error, because a model computed without its scaling answers with plausible nonsense.
Shapes: B batch, L positions, E head width.
Source: transformers' modeling_rope_utils and its Llama (halves, not pairs); Llama 3.1's own code for "llama3"; bloc97
and emozilla for "dynamic".
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import paddle

from paddlemix.errors import UserError
from paddlemix.models.kernels import formulas
from paddlemix.models.kernels.cached_constants import cached_constant

RotaryTables = tuple[paddle.Tensor, paddle.Tensor, paddle.Tensor]
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
        context: positions trained on; "dynamic" scaling begins after them.
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
        """Factor of each frequency, if it does not depend on the length, float32 [E / 2]; None for 1."""
        if self.scaling is None or self.dynamic:
            return None
        # "linear" divides every frequency; "llama3" only the slow ones.
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
    if not isinstance(kind, str) or kind not in SCALING_KEYS:
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


@dataclass(frozen=True)
class RotaryPositions:
    """What turns the queries and keys of a batch's positions; all layers share it.

    Args:
        queries, keys: tables of `rotate`; the same where both have as many heads.
    """

    queries: RotaryTables
    keys: RotaryTables

    @classmethod
    def of(
        cls, position_ids: paddle.Tensor, heads: int, key_value_heads: int, rope: Rope, dtype: paddle.dtype
    ) -> RotaryPositions:
        """Those of `position_ids`, int64 [B, L]."""
        queries = rotary_tables(position_ids, heads, rope, dtype)
        same = key_value_heads == heads
        return cls(queries, queries if same else rotary_tables(position_ids, key_value_heads, rope, dtype))

    def turn(self, queries: paddle.Tensor, keys: paddle.Tensor) -> tuple[paddle.Tensor, paddle.Tensor]:
        """[B, L, H, E] and [B, L, K, E], turned."""
        return rotate(queries, self.queries), rotate(keys, self.keys)

    def after(self, position: int) -> RotaryPositions:
        """For queries from a position of every row on, with all keys."""
        cosines, sines, half_turn = self.queries
        queries = cosines[:, position:].contiguous(), sines[:, position:].contiguous(), half_turn
        return RotaryPositions(queries, self.keys)


def rotary_tables(position_ids: paddle.Tensor, heads: int, rope: Rope, dtype: paddle.dtype) -> RotaryTables:
    """What `rotate` needs: cosines, sines and the half turn.

    Args:
        position_ids: int64 [B, L].

    Returns:
        [B, L, heads or 1, E] twice and [E, E], of `dtype`; angles are computed in float32.
    """
    # In bfloat16 positions above 256 would be rounded, and their angles be wrong by whole turns.
    angles = position_ids.astype("float32").unsqueeze(-1) * _frequencies(position_ids, rope)  # [B, L, E/2]
    angles = paddle.concat([angles, angles], axis=-1).unsqueeze(2)  # [B, L, 1, E]
    repeats = 1 if formulas.angles_serve_all_heads(angles) else heads
    cosines, sines = (part.astype(dtype).tile([1, 1, repeats, 1]) for part in (paddle.cos(angles), paddle.sin(angles)))
    return cosines, sines, cached_constant(_half_turn, rope.head_size).astype(dtype)


def _frequencies(position_ids: paddle.Tensor, rope: Rope) -> paddle.Tensor:
    """Radians per position, float32 [E/2], or [B, 1, E/2] where they depend on the highest position of each row."""
    # when                            frequencies
    # "dynamic" scaling               of each row, by its highest position
    # "linear" or "llama3" scaling    of the model, multiplied by its slowdown
    # none                            of the model
    exponents = cached_constant(_exponents, rope.head_size)
    if rope.scaling is not None and rope.dynamic:
        length = (position_ids.max(axis=-1) + 1).astype("float32").reshape([-1, 1, 1])
        # The base grows with the length, so that the slowest frequency still fits: "NTK-aware" scaling.
        beyond = paddle.clip(length / rope.context - 1.0, min=0.0)
        grown = (1.0 + rope.scaling["factor"] * beyond) ** (rope.head_size / (rope.head_size - 2))
        return 1.0 / (rope.theta * grown) ** exponents
    frequencies, slowdown = 1.0 / rope.theta**exponents, rope.slowdown()
    return frequencies if slowdown is None else frequencies * cached_constant(_row, *slowdown.tolist())


def _exponents(size: int) -> np.ndarray:
    """float32 [size / 2]: 0, 2 / size, 4 / size ... below 1."""
    return np.arange(0, size, 2, dtype=np.float32) / np.float32(size)


def _row(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float32)


def _half_turn(size: int) -> np.ndarray:
    """float32 [size, size]: x @ it = concat(-second half of x, first half of x)."""
    identity = np.eye(size // 2, dtype=np.float32)
    zero = np.zeros_like(identity)
    return np.block([[zero, identity], [-identity, zero]])


def rotate(states: paddle.Tensor, tables: RotaryTables) -> paddle.Tensor:
    """[B, L, heads, E] turned by their positions: x * cosines + half_turn(x) * sines, as [B, L, heads, E]."""
    return formulas.rotate(states, *tables)
