"""Beam search over a table of next-token scores, against a search of all sequences."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from paddlemix.generation.beams import search_beams
from paddlemix.generation.sampling import GenerationSettings

TOKENS, END, LONGEST = 4, 3, 4


class Table:
    """A model whose next scores depend on the last token alone; the rows are those of a cache."""

    def __init__(self, seed: int) -> None:
        self.scores = np.random.default_rng(seed).normal(size=(TOKENS, TOKENS)).astype(np.float32)
        self.rows = np.zeros(1, dtype=np.int64)

    def select(self, rows: np.ndarray) -> None:
        self.rows = self.rows[rows]

    def step(self, tokens: np.ndarray) -> np.ndarray:
        assert len(tokens) == len(self.rows)
        self.rows = tokens
        return self.scores[tokens]

    def total(self, tokens: tuple[int, ...]) -> float:
        log = self.scores - np.log(np.exp(self.scores).sum(axis=1, keepdims=True))
        return float(sum(log[before, after] for before, after in itertools.pairwise((0, *tokens))))


@pytest.mark.parametrize("seed", range(8))
def test_with_a_beam_for_every_sequence_the_best_one_is_found(seed: int) -> None:
    table: Any = Table(seed)
    settings = GenerationSettings(num_beams=TOKENS**LONGEST, length_penalty=0.0, early_stopping="never")
    found = search_beams(table, table.scores[[0]], np.array([0]), settings, {END}, lambda ids: len(ids) >= LONGEST)
    inner = [tokens for tokens in range(TOKENS) if tokens != END]
    complete = [
        (*middle, last)
        for length in range(LONGEST)
        for middle in itertools.product(inner, repeat=length)
        for last in ((END,) if length + 1 < LONGEST else range(TOKENS))
    ]
    best = max(complete, key=table.total)
    assert found == [token for token in best if token != END]


def test_one_end_token_ends_every_beam() -> None:
    table: Any = Table(0)
    table.scores[:, END] = 100
    settings = GenerationSettings(num_beams=2)
    assert search_beams(table, table.scores[[0]], np.array([0]), settings, {END}, lambda ids: len(ids) >= 9) == []
