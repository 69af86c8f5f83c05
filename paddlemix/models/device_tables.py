"""Angles and masks of the tokens after a cache, made on the card that computes them.

Nothing is copied from the host for a token: tables of angles are kept on the device and read by slices, masks come
from comparisons.  The CPU's own are in cached_decoder.py.
Shapes: B rows, L new tokens, R room of the cache, E head width.
"""

from __future__ import annotations

import numpy as np
import paddle
from paddle.nn import functional

from paddlemix.models.attention import MASKED
from paddlemix.models.kernels.cached_constants import cached_range
from paddlemix.models.rotary import Rope, rotary_tables

Table = tuple[paddle.Tensor, paddle.Tensor]  # cosines and sines, [B, L, 1, E]
FIRST_POSITIONS = 512  # angles made at first; each further table has twice as many


class DeviceTables:
    """Angles and masks on the current device.

    Args:
        rope: of the model.
        scale: what the angles of queries are multiplied by.
        window: positions that a token sees, its own included; None for all.
    """

    def __init__(self, rope: Rope, scale: float, window: int | None) -> None:
        self._rope, self._scale, self._window = rope, scale, window
        self._made: tuple[paddle.dtype, int, list[paddle.Tensor], paddle.Tensor] | None = None
        self._sent: dict[str, tuple[bytes, paddle.Tensor]] = {}

    def angles(self, first: np.ndarray, length: int, dtype: paddle.dtype) -> tuple[Table, Table, paddle.Tensor]:
        """Tables of queries and of keys, and the half turn.

        Args:
            first: int64 [B], position of each row's first token.
            length: L.
        """
        batch, count = len(first), int(first.max()) + length
        if self._rope.dynamic and count > self._rope.context:  # frequencies depend on the length here
            *parts, half_turn = rotary_tables(self._positions(first, length), 1, self._rope, paddle.float32)
            parts, half_turn = self._scaled(parts, dtype), half_turn.astype(dtype)
        else:
            tables, half_turn = self._tables(count, dtype)
            if (first == first[0]).all():  # a slice, which copies nothing; rows padded differently need a look-up
                start = int(first[0])
                rows = [table[start : start + length].unsqueeze(1).unsqueeze(0) for table in tables]
                parts = rows if batch == 1 else [part.expand([batch, *part.shape[1:]]) for part in rows]
            else:
                positions = self._positions(first, length)
                parts = [functional.embedding(positions, table).unsqueeze(2) for table in tables]
        return (parts[0], parts[1]), (parts[2], parts[3]), half_turn

    def bias(self, padding: np.ndarray, held: int, length: int, room: int, groups: int) -> paddle.Tensor:
        """`MASKED` at what a token does not see: float32 [1 or groups * L, R], or [B, 1, 1 or groups * L, R].

        Args:
            padding: int64 [B], positions at the beginning of the cache that do not belong to the row.
            held: positions of the cache before these tokens.
            groups: query heads of a key head; their tokens are the rows of one matrix.
        """
        places = cached_range(room).unsqueeze(0)
        last = cached_range(held, held + length).unsqueeze(1)
        hidden = places > last
        if self._window is not None and self._window < held + length:
            passed = cached_range(self._window, self._window + room).unsqueeze(0) <= last
            hidden = paddle.logical_or(hidden, passed)
        if padding.any():
            outside = places.unsqueeze(0) < self._send("padding", padding).reshape([-1, 1, 1])
            hidden = paddle.logical_or(hidden.unsqueeze(0), outside).unsqueeze(1)
        bias = hidden.astype("float32") * MASKED
        return bias if groups == 1 or length == 1 else paddle.concat([bias] * groups, axis=-2)

    def _positions(self, first: np.ndarray, length: int) -> paddle.Tensor:
        """int64 [B, L]."""
        # The differences between rows stay the same from token to token; only their common start moves.
        start = int(first.min())
        return self._send("first", first - start).unsqueeze(1) + cached_range(start, start + length).unsqueeze(0)

    def _send(self, name: str, numbers: np.ndarray) -> paddle.Tensor:
        """int64 [B] on the device: a number of each row that stays the same from token to token."""
        # Compared on the host: asking the device would wait for all that it has been given.
        key = numbers.tobytes()
        if name not in self._sent or self._sent[name][0] != key:
            self._sent[name] = key, paddle.to_tensor(numbers)
        return self._sent[name][1]

    def _tables(self, count: int, dtype: paddle.dtype) -> tuple[list[paddle.Tensor], paddle.Tensor]:
        """Cosines and sines of queries and of keys, [P, E] each, for `count` positions or more, and the half turn."""
        if self._made is None or self._made[0] != dtype or self._made[1] < count:
            size = FIRST_POSITIONS
            while size < count:
                size *= 2
            size = min(size, self._rope.context) if self._rope.dynamic else size
            *parts, half_turn = rotary_tables(cached_range(size).unsqueeze(0), 1, self._rope, paddle.float32)
            flat = [part.reshape([size, -1]) for part in parts]
            self._made = dtype, size, self._scaled(flat, dtype), half_turn.astype(dtype)
        return self._made[2], self._made[3]

    def _scaled(self, angles: list[paddle.Tensor], dtype: paddle.dtype) -> list[paddle.Tensor]:
        """Those of queries, then those of keys, in the type that is computed in."""
        return [part.astype(dtype) for part in (*(part * self._scale for part in angles), *angles)]
