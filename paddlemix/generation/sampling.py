"""From scores to the next token: repetition penalty, greedy, temperature, top-k, top-p.

numpy only, so that a seed leads to the same on any device.  Order as in transformers: penalty, temperature, k, p.
Sources: Keskar et al. 2019, "CTRL" (penalty); Fan et al. 2018 (top-k); Holtzman et al. 2020 (top-p).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from paddlemix.errors import UserError

_LIKELIEST = 1024  # tokens that are sorted first; they nearly always reach top_p, and sorting all takes milliseconds


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """How answers are made.

    Args:
        max_new_tokens: most tokens of an answer, >= 1.
        temperature: 0 chooses the likeliest token; larger values flatten the distribution.
        top_k: only the k likeliest tokens; 0 for all.
        top_p: only the likeliest tokens that together reach this probability, in (0, 1].
        seed: of the draws, >= 0.
        repetition_penalty: > 0; scores of tokens that were there, the question's included, are divided by it where they
            are positive and multiplied where negative; 1 changes nothing.
        num_beams: sequences that are followed at once; 1 turns beam search off, more need temperature 0.
        length_penalty: power of the length that a beam's score is divided by; above 0 favours long answers.
        early_stopping: True ends a beam search with `num_beams` finished answers, False also asks whether another could
            be better, "never" continues until none can.
        stop: texts that end an answer, in addition to the template's own; they are not part of it.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    repetition_penalty: float = 1.0
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    stop: tuple[str, ...] = ()

    @property
    def is_greedy(self) -> bool:
        """Whether an answer's next token is the likeliest one, whatever was there before."""
        return self.temperature == 0 and self.repetition_penalty == 1 and self.num_beams == 1

    def __post_init__(self) -> None:
        for name, least in (("max_new_tokens", 1), ("temperature", 0), ("seed", 0), ("num_beams", 1)):
            if not getattr(self, name) >= least:
                raise UserError(f"{name} {getattr(self, name)} must be at least {least}")
        if self.top_k < 0:
            raise UserError(f"top_k {self.top_k} must be at least 0 (0 for all tokens)")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p {self.top_p} must be above 0 and at most 1")
        if not self.repetition_penalty > 0:
            raise UserError(f"repetition_penalty {self.repetition_penalty} must be above 0 (1 changes nothing)")
        if self.num_beams > 1 and self.temperature > 0:
            raise UserError(
                f"num_beams {self.num_beams} needs temperature 0, not {self.temperature}: beam search draws nothing"
            )
        if self.early_stopping not in (True, False, "never"):
            raise UserError(f"early_stopping {self.early_stopping!r} is not one of True, False, 'never'")
        if isinstance(self.stop, str) or not all(self.stop):
            raise UserError(f"stop {self.stop!r} must be a tuple of texts that are not empty")


class Sampler:
    """Chooses the tokens of one answer; two with equal arguments choose equal tokens from equal scores.

    Args:
        settings: how.
        prompt_ids: tokens before the answer, for the penalty; negative ones are ignored.
        number: which of several answers with one seed: each has draws of its own.
    """

    def __init__(
        self, settings: GenerationSettings, prompt_ids: Sequence[int] | np.ndarray = (), number: int = 0
    ) -> None:
        self.settings = settings
        self._random = np.random.default_rng([settings.seed, number])
        # kept only where the penalty needs it: prompts have thousands of tokens
        self._seen = {int(token) for token in prompt_ids} if settings.repetition_penalty != 1 else set()

    def next_token(self, scores: np.ndarray) -> int:
        """The next token, from scores float32 [V]; it counts for the penalty from now on.  Where the device has chosen,
        see `IncrementalModel`, `scores` is the token itself, int64 []."""
        # a card has chosen already
        if scores.ndim == 0:
            return int(scores)
        if self.settings.repetition_penalty != 1:
            scores = penalised(scores, self._seen, self.settings.repetition_penalty)
        token = int(scores.argmax()) if self.settings.temperature == 0 else self._draw(scores)
        self._seen.add(token)
        return token

    def _draw(self, scores: np.ndarray) -> int:
        row = scores.astype(np.float64) / self.settings.temperature
        tokens = self._candidates(row)
        # the largest score is subtracted, so that no exponential overflows
        weights = np.exp((row if tokens is None else row[tokens]) - row.max())
        sums = np.cumsum(weights)
        # rounding may put the draw beyond the last sum
        place = min(int(np.searchsorted(sums, self._random.random() * sums[-1], side="right")), len(sums) - 1)
        return place if tokens is None else int(tokens[place])

    def _candidates(self, row: np.ndarray) -> np.ndarray | None:
        """Tokens that k and p leave, the likeliest first; None for all."""
        k, p = self.settings.top_k, self.settings.top_p
        if not k and p == 1:
            return None
        if k:
            return _reach(row, _likeliest(row, k), p, None)
        total = np.exp(row - row.max()).sum()
        # top_p alone: a partial sort is tried first, all tokens only where it does not reach top_p
        tokens = _likeliest(row, _LIKELIEST)
        if np.exp(row[tokens] - row[tokens[0]]).sum() < p * total:
            tokens = _likeliest(row, len(row))
        return _reach(row, tokens, p, total)


def penalised(scores: np.ndarray, tokens: set[int], penalty: float) -> np.ndarray:
    """Scores float32 [V] with those of some tokens made worse; negative tokens are left out."""
    index = np.array([token for token in tokens if token >= 0], dtype=np.int64)
    scores, factor = scores.copy(), np.float32(penalty)
    found = scores[index]
    scores[index] = np.where(found < 0, found * factor, found / factor)
    return scores


def _likeliest(row: np.ndarray, count: int) -> np.ndarray:
    """The `count` tokens of highest score, in order."""
    if count >= len(row):
        return np.argsort(-row, kind="stable")
    tokens = np.sort(np.argpartition(-row, count - 1)[:count])
    return tokens[np.argsort(-row[tokens], kind="stable")]


def _reach(row: np.ndarray, tokens: np.ndarray, top_p: float, total: float | None) -> np.ndarray:
    """Those of sorted tokens before which the others have not reached `top_p` of `total` (None: of their own sum)."""
    weights = np.exp(row[tokens] - row[tokens[0]])
    # the token that crosses top_p belongs to the set, as in transformers
    before = np.cumsum(weights) - weights
    return tokens[: int((before < top_p * (weights.sum() if total is None else total)).sum())]
