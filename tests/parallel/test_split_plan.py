"""Which part of each weight a process has: parts cover the whole, and degrees that do not fit are named."""

from __future__ import annotations

from typing import Any

import pytest

from paddlemix.errors import UserError
from paddlemix.models.configuration import DecoderConfig
from paddlemix.parallel.tensor.split_plan import (
    AXES,
    all_parts,
    allowed_degrees,
    check_degree,
    extent,
    linear_parts,
    local_sizes,
    vocabulary_part,
)


@pytest.mark.parametrize(
    ("size", "degree", "expected"),
    [
        (10, 3, [(0, 4), (4, 7), (7, 10)]),
        (32000, 2, [(0, 16000), (16000, 32000)]),
        (32064, 2, [(0, 16064), (16064, 32064)]),  # 501 blocks of 64
        (
            11008,
            8,
            [
                (0, 1408),
                (1408, 2816),
                (2816, 4224),
                (4224, 5632),
                *((5632 + 1344 * n, 6976 + 1344 * n) for n in range(4)),
            ],
        ),
        (64, 2, [(0, 32), (32, 64)]),  # fewer blocks than processes
    ],
)
def test_extents(size: int, degree: int, expected: list[tuple[int, int]]) -> None:
    assert [extent(size, degree, rank) for rank in range(degree)] == expected


@pytest.mark.parametrize("degree", [1, 2, 4])
def test_parts_cover_the_whole(degree: int) -> None:
    config = DecoderConfig(
        vocab_size=51, hidden_size=48, intermediate_size=27, num_attention_heads=8, num_key_value_heads=4
    )
    parts = [linear_parts(config, degree, rank) for rank in range(degree)]
    for name in AXES:
        ends = [0, *(part[name].stop for part in parts)]
        assert [part[name].start for part in parts] == ends[:-1] and ends[-1] == parts[0][name].size
    rows = [vocabulary_part(config, degree, rank) for rank in range(degree)]
    assert sum(part.stop - part.start for part in rows) == 51
    for rank in range(degree):
        own = local_sizes(config, degree, rank)
        assert own.head_size == config.head_size and own.key_value_heads == 4 // degree
        assert own.intermediate_size == parts[rank]["down_proj"].stop - parts[rank]["down_proj"].start
        assert own.num_attention_heads * own.head_size == parts[rank]["o_proj"].stop - parts[rank]["o_proj"].start


@pytest.mark.parametrize("heads", [6, 12, 24])
@pytest.mark.parametrize("head_dim", [16, 32, 64, 80])
@pytest.mark.parametrize("width", [11008, 13696, 18944, 27, 384])
def test_every_process_knows_the_parts_of_the_others(heads: int, head_dim: int, width: int) -> None:
    """Parts by heads are even, those of widths in units of 64, also where both have the same size."""
    for degree in (1, 2, 3, 6):
        config = DecoderConfig(
            hidden_size=heads * head_dim, intermediate_size=width, num_attention_heads=heads, num_key_value_heads=6
        )
        parts = [linear_parts(config, degree, rank) for rank in range(degree)]
        for name in AXES:
            every = tuple(part[name] for part in parts)
            assert [all_parts(own, degree) for own in every] == [every] * degree


def test_the_error_lists_the_degrees_that_divide() -> None:
    sizes: dict[str, Any] = {"hidden_size": 7168, "num_attention_heads": 56, "num_key_value_heads": 8}
    config = DecoderConfig(**sizes)
    assert allowed_degrees(config) == [1, 2, 4, 8]
    with pytest.raises(
        UserError,
        match=r"tensor_parallel_degree .* 3 does not .* 56 attention heads and 8 key/value heads; allowed: 1, 2, 4, 8",
    ):
        check_degree(config, 3)
