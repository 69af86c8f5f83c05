"""Beam search over one prompt, with the choices, scores and endings of transformers.

Source: transformers 4.55 `GenerationMixin._beam_search`, whose tokens a reference test compares.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import numpy as np

from paddlemix.generation.incremental import IncrementalModel
from paddlemix.generation.sampling import GenerationSettings, penalised

_NEVER = np.float32(-1e9)  # added to the score of what must not be chosen


@dataclass
class _Beams:
    """The search's state; scores are float32.

    Args:
        width: beams.
        running, scores: sequences that continue, the best first, and their summed log probabilities [width].
        finished, final: sequences that ended, the best first, and their scores by length [width].
        filled: which of `finished` are really sequences, bool [width].
        open: whether a better end may still be found.
    """

    width: int
    running: list[list[int]] = field(init=False)
    finished: list[list[int]] = field(init=False)
    open: bool = True

    def __post_init__(self) -> None:
        self.running = [[] for _ in range(self.width)]
        self.finished = [[] for _ in range(self.width)]
        self.scores = np.where(
            np.arange(self.width) > 0, _NEVER, np.float32(0)
        )  # all begin alike: only one may continue
        self.final = np.full(self.width, _NEVER)
        self.filled = np.zeros(self.width, dtype=bool)


def search_beams(
    incremental: IncrementalModel,
    logits: np.ndarray,
    prompt_ids: np.ndarray,
    settings: GenerationSettings,
    ends: Collection[int],
    is_last: Callable[[list[int]], bool],
) -> list[int]:
    """The answer of best score.

    Args:
        incremental: has read the prompt in its only row; has one row for each beam afterwards.
        logits: scores of the answer's first token, float32 [1, V].
        prompt_ids: int64 [L], for the penalty; negative ones count for nothing.
        settings: `num_beams` and what belongs to it; temperature 0.
        ends: tokens that end an answer.
        is_last: whether an answer must end with these tokens.

    Returns:
        Token ids without the token that ended it.
    """
    # Twice the beams, or more with several end tokens: even if all the best candidates end, enough continue.
    width, count = settings.num_beams, max(2, 1 + len(ends)) * settings.num_beams
    seen = {int(token) for token in prompt_ids}
    beams = _Beams(width)
    # the prompt was read once: its row becomes the row of every beam
    incremental.select(np.zeros(width, dtype=np.int64))
    logits = np.repeat(logits, width, axis=0)
    while True:
        totals = _log_probabilities(logits, beams, settings, seen) + beams.scores[:, None]
        order = _best(totals, count)
        # a flat index is beam * vocabulary + token
        parents, scores = order // totals.shape[1], totals.reshape(-1)[order]
        sequences = [
            [*beams.running[parent], int(token)] for parent, token in zip(parents, order % totals.shape[1], strict=True)
        ]
        hits = np.array([sequence[-1] in ends or is_last(sequence) for sequence in sequences])
        # continue first, then collect: the parents of what continues are needed for the cache
        kept = _go_on(beams, sequences, scores, hits)
        _collect(beams, sequences, scores, hits, settings)
        if _is_over(beams, settings, bool(hits.all())):
            break
        incremental.select(parents[kept])
        logits = incremental.step(np.array([sequence[-1] for sequence in beams.running], dtype=np.int64))
    # nothing has ended within the budget: the best unfinished sequence
    best = beams.finished[0] if beams.filled.any() else beams.running[0]
    return best[:-1] if best and best[-1] in ends else best


def _log_probabilities(logits: np.ndarray, beams: _Beams, settings: GenerationSettings, seen: set[int]) -> np.ndarray:
    """float32 [width, V], with the penalty on what each beam has seen."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    found = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    if settings.repetition_penalty == 1:
        return found
    rows = zip(found, beams.running, strict=True)
    return np.stack([penalised(row, seen.union(tokens), settings.repetition_penalty) for row, tokens in rows])


def _best(totals: np.ndarray, count: int) -> np.ndarray:
    """Flat indices of the highest numbers, in order."""
    flat = totals.reshape(-1)
    count = min(count, len(flat))
    # sorted by place before by score: equal scores keep the order of torch's topk on CPU
    index = np.sort(np.argpartition(-flat, count - 1)[:count])
    return index[np.argsort(-flat[index], kind="stable")]


def _go_on(beams: _Beams, sequences: list[list[int]], scores: np.ndarray, hits: np.ndarray) -> np.ndarray:
    """Keeps the best that have not ended; returns their numbers among the candidates."""
    # pushed to the end rather than removed: as the reference does, one may continue where all have ended
    running = scores + hits * _NEVER
    kept = np.argsort(-running, kind="stable")[: beams.width]
    beams.running, beams.scores = [sequences[number] for number in kept], running[kept]
    return kept


def _collect(
    beams: _Beams, sequences: list[list[int]], scores: np.ndarray, hits: np.ndarray, settings: GenerationSettings
) -> None:
    """Takes those among the first `width` candidates that have just ended, where they are better than earlier ones."""
    # an end counts only among the best `width` candidates, else a poor one could end the search
    ended = hits & (np.arange(len(sequences)) < beams.width)
    final = scores / np.float32(len(sequences[0]) ** settings.length_penalty)
    full = bool(beams.filled.all()) and settings.early_stopping is True
    final = final + (int(full) + int(not beams.open)) * _NEVER + ~ended * _NEVER
    merged = np.concatenate([beams.final, final])
    kept = np.argsort(-merged, kind="stable")[: beams.width]
    every = [*beams.finished, *sequences]
    beams.finished, beams.final = [every[number] for number in kept], merged[kept]
    beams.filled = np.concatenate([beams.filled, ended])[kept]


def _is_over(beams: _Beams, settings: GenerationSettings, all_ended: bool) -> bool:
    """Whether nothing better can come, or enough has ended."""
    # early_stopping, length_penalty -> length that the best running score is divided by
    # "never", above 0               -> the longest possible, where its score could be best
    # else                           -> the present one
    length = len(beams.running[0])
    if settings.early_stopping == "never" and settings.length_penalty > 0:
        length = settings.max_new_tokens
    possible = beams.scores[0] / np.float32(length**settings.length_penalty)
    worst = np.where(beams.filled, beams.final.min(), _NEVER)
    beams.open = beams.open and bool((possible > worst).any())
    return not beams.open or all_ended or (bool(beams.filled.all()) and settings.early_stopping is True)
