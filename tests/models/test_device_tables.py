"""Angles and masks as a card makes them equal those that the CPU's decoding makes in numpy."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from paddlemix.models.cached_decoder import CachedDecoder, _hidden, _spread
from paddlemix.models.configuration import DecoderConfig
from paddlemix.models.decoder import Decoder
from paddlemix.models.device_tables import DeviceTables

GROUPS, HEAD = 2, 8
ROPES = {"plain": None, "dynamic": {"rope_type": "dynamic", "factor": 2.0}}
PADDINGS = ([0], [0, 0], [3, 0, 5])


def _both(scaling: dict[str, object] | None, window: int | None) -> tuple[CachedDecoder, DeviceTables]:
    config = DecoderConfig(
        hidden_size=2 * GROUPS * HEAD,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2 * GROUPS,
        num_key_value_heads=2,
        vocab_size=5,
        max_position_embeddings=48,
        rope_scaling=scaling,
        sliding_window=window,
    )
    return CachedDecoder(Decoder(config)), DeviceTables(config.rope, HEAD**-0.5, window)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("length", [1, 4])
@pytest.mark.parametrize("window", [None, 6])
def test_a_mask_hides_what_the_cpu_hides(padding: list[int], length: int, window: int | None) -> None:
    _, tables = _both(None, window)
    held, room, hidden = 20, 32, np.array(padding)
    first = held - hidden
    positions = first[:, None] + np.arange(length)
    expected = _hidden(positions, held, room, GROUPS, window)
    found = tables.bias(hidden, held, length, room, GROUPS).numpy()
    scores = np.zeros([len(padding), 2, GROUPS * length, room], dtype=np.float32)
    np.testing.assert_array_equal(found + scores, expected + scores)


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize(("held", "length"), [(20, 1), (20, 4), (46, 4), (700, 1)])
def test_angles_are_those_of_the_cpu(rope: str, padding: list[int], held: int, length: int) -> None:
    decoder, tables = _both(ROPES[rope], None)
    first = held - np.array(padding)
    expected, half_turn = decoder._tables(first[:, None] + np.arange(length), paddle.float32)
    queries, keys, turn = tables.angles(first, length, paddle.float32)
    for found, scale in ((queries, HEAD**-0.5), (keys, 1.0)):
        for part, wanted in zip(found, _spread(expected, 1, scale, paddle.float32), strict=True):
            np.testing.assert_allclose(part.numpy(), wanted.numpy(), rtol=0, atol=1e-6)
    np.testing.assert_array_equal(turn.numpy(), half_turn.numpy())


def test_rows_that_begin_elsewhere_later_get_their_own() -> None:
    _, tables = _both(None, None)
    for first in ([17, 20], [18, 21], [20, 20], [9, 20, 3]):
        found = tables.angles(np.array(first), 1, paddle.float32)[1][0].numpy()[:, 0, 0]
        single = [tables.angles(np.array([place]), 1, paddle.float32)[1][0].numpy()[0, 0, 0] for place in first]
        np.testing.assert_array_equal(np.broadcast_to(found, [len(first), HEAD]), single)
