"""From scores to the next token: greedy, temperature, top-k, top-p.

numpy only, so that a seed gives the same on any device.  Source of the filters: Fan et al. 2018 (top-k), Holtzman
et al. 2020 (top-p); order as in transformers: temperature, k, p.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from paddlemix.errors import UserError


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """How answers are made.

    Args:
        max_new_tokens: most tokens of an answer, >= 1.
        temperature: 0 takes the likeliest token; larger values flatten the distribution.
        top_k: only the k likeliest tokens; 0 for all.
        top_p: only the likeliest tokens that together reach this probability, in (0, 1].
        seed: of the draws.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens {self.max_new_tokens} must be at least 1")
        if self.temperature < 0:
            raise UserError(f"temperature {self.temperature} must be at least 0")
        if self.top_k < 0:
            raise UserError(f"top_k {self.top_k} must be at least 0 (0 for all tokens)")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p {self.top_p} must be above 0 and at most 1")


class Sampler:
    """Draws tokens; two samplers with equal settings draw equal tokens from equal scores."""

    def __init__(self, settings: GenerationSettings) -> None:
        self.settings = settings
        self._random = np.random.default_rng(settings.seed)

    def next_tokens(self, scores: np.ndarray) -> np.ndarray:
        """The next token of each row.

        Args:
            scores: float32 [B, V].

        Returns:
            int64 [B].
        """
        if self.settings.temperature == 0:
            return scores.argmax(axis=-1)
        return np.array([self._draw(row) for row in scores.astype(np.float64)], dtype=np.int64)

    def _draw(self, row: np.ndarray) -> int:
        row = row / self.settings.temperature
        order = np.argsort(-row, kind="stable")
        if self.settings.top_k:
            order = order[: self.settings.top_k]
        weights = np.exp(row[order] - row[order[0]])
        weights /= weights.sum()
        # a token stays while those before it have not reached top_p
        kept = int((np.cumsum(weights) - weights < self.settings.top_p).sum())
        weights = weights[:kept] / weights[:kept].sum()
        return int(order[self._random.choice(kept, p=weights)])
