"""Keys and values of the positions that a model has seen, in buffers that new ones are written into.

It knows no model.  Buffers are written with `index_put_`, which every device has for every type in place; assigning to
a slice runs on the host where Ascend's `set_value` is switched off.
Shapes: B rows, L new positions, S positions held, K key/value heads, E head width, R positions that there is room for.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import paddle
from paddle.nn import functional

from paddlemix.models.kernels.operators import take_rows

_UNIT = 64  # room is made for a multiple of this many positions


@dataclass
class _Layer:
    """Buffers of a layer and how much of them is written.

    Args:
        keys, values: [B * K * R, E]; the positions of a head are neighbours, so that a buffer needs no transpose.
        length: positions held.
    """

    keys: paddle.Tensor
    values: paddle.Tensor
    length: int


class KVCache:
    """Keys and values per layer.  Gradients do not pass through it.

    Args:
        limit: most positions that will ever be held, the model's context; None for no limit.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self.room = 0
        self.segment_ids: paddle.Tensor | None = None  # int64 [B, S], only where rows are padded or packed
        self._layers: list[_Layer] = []
        self._shape = (0, 0, 0)  # B, K, E
        self._rows: tuple[tuple[int, int, int], paddle.Tensor] | None = None
        self._first_rows: tuple[tuple[int, int], paddle.Tensor] | None = None

    @property
    def length(self) -> int:
        """Positions that every layer holds."""
        return min((layer.length for layer in self._layers), default=0)

    @property
    def dtype(self) -> paddle.dtype | None:
        """Of the buffers; None where there are none."""
        return self._layers[0].keys.dtype if self._layers else None

    @property
    def num_bytes(self) -> int:
        """Bytes of all buffers."""
        return sum(part.size * part.element_size() for layer in self._layers for part in (layer.keys, layer.values))

    def append(self, layer: int, keys: paddle.Tensor, values: paddle.Tensor) -> tuple[paddle.Tensor, paddle.Tensor]:
        """Adds [B, L, K, E] keys and values to a layer and returns all of them, [B, S, K, E]."""
        # The first call of a layer returns what it was given: nothing is copied back for a prompt.
        added = keys.shape[1]
        if layer == len(self._layers):
            self._begin(keys, values)
            return keys, values
        self.reserve(self._layers[layer].length + added)
        held = self.write(layer, *(part.transpose([0, 2, 1, 3]) for part in (keys, values)))
        length = self._layers[layer].length
        first, second = (part[:, :, :length].transpose([0, 2, 1, 3]) for part in held)
        return first, second

    def write(self, layer: int, keys: paddle.Tensor, values: paddle.Tensor) -> tuple[paddle.Tensor, paddle.Tensor]:
        """Adds [B, K, L, E] keys and values to a layer that holds some, where `reserve` made room.

        Returns:
            The buffers, twice [B, K, R, E]; what is after the positions held must be masked.
        """
        found, (batch, heads, width) = self._layers[layer], self._shape
        # Row r of a buffer is position r % R of head r // R: one scatter of whole rows writes every head.
        rows = self._row_numbers(found.length, keys.shape[2])
        whole = []
        for name, part in (("keys", keys), ("values", values)):
            buffer = getattr(found, name)
            buffer = paddle.index_put_(buffer, (rows,), _as(part.detach(), buffer.dtype).reshape([-1, width]))
            setattr(found, name, buffer)
            whole.append(buffer.reshape([batch, heads, self.room, width]))
        found.length += keys.shape[2]
        return whole[0], whole[1]

    def buffers(self, layer: int) -> tuple[paddle.Tensor, paddle.Tensor]:
        """A layer's keys and values, [B * K * R, E], for a kernel that writes into them before `advance`."""
        found = self._layers[layer]
        return found.keys, found.values

    def advance(self, layer: int, count: int) -> None:
        """Counts positions that were written into a layer's buffers after those it held."""
        self._layers[layer].length += count

    def reserve(self, length: int) -> None:
        """Makes room for `length` positions in every layer; the buffers grow by half or more, up to the limit.

        If it is interrupted, the cache is empty afterwards.
        """
        if length <= self.room:
            return
        batch, heads, width = self._shape
        before, self.room = self.room, self._room_for(length, self.room + self.room // 2)
        try:
            for layer in self._layers:
                for name in ("keys", "values"):
                    part = getattr(layer, name).reshape([batch, heads, before, width])
                    setattr(layer, name, _lengthened(part, self.room))
        except BaseException:  # an interrupt between two layers would leave buffers of two sizes
            self.truncate(0)
            raise

    def extend_segments(
        self, segment_ids: paddle.Tensor | None, shape: list[int]
    ) -> tuple[paddle.Tensor | None, paddle.Tensor | None]:
        """Remembers the segments of new positions.

        Args:
            segment_ids: int64 [B, L]; None where each row is one sample.
            shape: [B, L].

        Returns:
            Those of the new positions, int64 [B, L], and of all, [B, S]; None twice where neither have segments.
        """
        before = self.segment_ids
        if segment_ids is None and before is None:
            return None, None
        if segment_ids is None:
            segment_ids = paddle.ones(shape, dtype="int64")  # the number that a row's only sample has in a batch
        if before is None and self.length:
            before = paddle.ones([shape[0], self.length], dtype="int64")
        self.segment_ids = segment_ids if before is None else paddle.concat([before, segment_ids], axis=1)
        return segment_ids, self.segment_ids

    def truncate(self, length: int) -> None:
        """Forgets the positions from `length` on; nothing is moved."""
        if length == 0:
            self._layers, self.segment_ids, self.room = [], None, 0
        for layer in self._layers:
            layer.length = min(layer.length, length)
        if self.segment_ids is not None:
            self.segment_ids = self.segment_ids[:, :length]

    def select(self, rows: np.ndarray) -> None:
        """Keeps these rows, int64 [B'], in this order; a row may be taken several times."""
        _, heads, width = self._shape
        # A row of the batch is `heads * room` neighbouring rows of a buffer.
        index = paddle.to_tensor(rows)
        for layer in self._layers:
            for name in ("keys", "values"):
                part = getattr(layer, name).reshape([-1, heads * self.room * width])
                setattr(layer, name, take_rows(part, index).reshape([-1, width]))
        if self.segment_ids is not None:
            self.segment_ids = paddle.gather(self.segment_ids, index)
        self._shape, self._rows, self._first_rows = (len(rows), heads, width), None, None

    def _begin(self, keys: paddle.Tensor, values: paddle.Tensor) -> None:
        """A layer's first positions."""
        batch, length, heads, width = keys.shape
        if not self._layers:
            self._shape, self._rows, self._first_rows = (batch, heads, width), None, None
            self.room = self._room_for(length, length + 1)  # at least one more token will follow
        first, second = (_lengthened(part.detach().transpose([0, 2, 1, 3]), self.room) for part in (keys, values))
        self._layers.append(_Layer(first, second, length))

    def _room_for(self, length: int, wished: int) -> int:
        room = -(-max(length, wished) // _UNIT) * _UNIT
        return room if self.limit is None else max(min(room, self.limit), length)

    def _row_numbers(self, start: int, count: int) -> paddle.Tensor:
        """int64 [B * K * count]: the rows of the buffers that these positions have; equal for all layers."""
        key = (start, count, self.room)
        if self._rows is None or self._rows[0] != key:
            # On CPU a copy from the host is free; a card adds the start to row numbers that it holds already.
            if paddle.get_device() == "cpu":
                rows = paddle.to_tensor(self._rows_from(start, count))
            else:
                rows = self._rows_at_zero(count) + paddle.full([1], start, dtype="int64")
            self._rows = key, rows
        return self._rows[1]

    def _rows_from(self, start: int, count: int) -> np.ndarray:
        heads = np.arange(self._shape[0] * self._shape[1])[:, None] * self.room
        return (heads + np.arange(start, start + count)).reshape(-1)

    def _rows_at_zero(self, count: int) -> paddle.Tensor:
        """Kept on the device, so that a token sends nothing."""
        key = (count, self.room)
        if self._first_rows is None or self._first_rows[0] != key:
            self._first_rows = key, paddle.to_tensor(self._rows_from(0, count))
        return self._first_rows[1]


def _lengthened(part: paddle.Tensor, room: int) -> paddle.Tensor:
    """[B, K, S, E] -> [B * K * room, E], zeros at the end."""
    missing = room - part.shape[2]
    padded = functional.pad(part, [0, 0, 0, 0, 0, missing, 0, 0], pad_from_left_axis=True) if missing else part
    return padded.reshape([-1, part.shape[3]])


def _as(tensor: paddle.Tensor, dtype: paddle.dtype) -> paddle.Tensor:
    return tensor if tensor.dtype == dtype else tensor.astype(dtype)
