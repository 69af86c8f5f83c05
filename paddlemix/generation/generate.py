"""Answers to a batch of encoded prompts, token by token over a key/value cache.

Prompts of different lengths are padded on the left and masked, so a row's answer is the one it has alone.  Knows no
template.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence

import numpy as np

from paddlemix.errors import UserError
from paddlemix.generation.beams import search_beams
from paddlemix.generation.incremental import IncrementalModel
from paddlemix.generation.sampling import GenerationSettings, Sampler
from paddlemix.models.llava import LlavaModel
from paddlemix.sample import Example

IsEnded = Callable[[Sequence[int]], bool]


def generate(
    model: LlavaModel,
    prompts: Sequence[Example],
    settings: GenerationSettings,
    end_ids: Collection[int],
    is_ended: IsEnded | None = None,
) -> list[list[int]]:
    """Answers every prompt.

    Args:
        model: in evaluation mode.
        prompts: encoded with `LlavaProcessor.encode_prompt`; text-only and image prompts may be mixed.
        settings: length, sampling, beams.
        end_ids: tokens that end an answer.
        is_ended: whether an answer of these tokens is complete, e.g. `Ending.reached`; None asks for tokens alone.

    Returns:
        New token ids per prompt, without the token that ended it; an answer also ends with the model's context.

    Raises:
        UserError: a prompt has an image and the model no tower, or it fills the model's context.
    """
    if not prompts:
        return []
    ends = frozenset(end_ids)
    budgets = [answer_budget(model, len(prompt.input_ids), settings.max_new_tokens) for prompt in prompts]

    def is_last(row: int, tokens: list[int]) -> bool:
        return len(tokens) >= budgets[row] or (is_ended is not None and is_ended(tokens))

    # num_beams -> how
    # 1         -> all prompts side by side
    # more      -> one prompt after the other: its beams are the rows
    if settings.num_beams == 1:
        return _answer_together(IncrementalModel(model), prompts, settings, ends, is_last)
    found = []
    for row, prompt in enumerate(prompts):
        incremental = IncrementalModel(model)
        last = functools.partial(is_last, row)
        found.append(search_beams(incremental, incremental.prefill([prompt]), prompt.input_ids, settings, ends, last))
    return found


def answer_budget(model: LlavaModel, prompt_length: int, max_new_tokens: int) -> int:
    """Most tokens of an answer: `max_new_tokens`, or what the positions that the model was trained on leave.

    Raises:
        UserError: they leave nothing; says by how much the prompt is too long.
    """
    limit = model.config.text.max_position_embeddings
    if prompt_length >= limit:
        raise UserError(
            f"the conversation has {prompt_length} tokens, {prompt_length - limit + 1} more than the model's context "
            f"of {limit} leaves room for; shorten it"
        )
    return min(max_new_tokens, limit - prompt_length)


def _answer_together(
    incremental: IncrementalModel,
    prompts: Sequence[Example],
    settings: GenerationSettings,
    ends: frozenset[int],
    is_last: Callable[[int, list[int]], bool],
) -> list[list[int]]:
    """All prompts side by side; rows whose answers are complete leave when half of all are."""
    samplers = [Sampler(settings, prompt.input_ids, number) for number, prompt in enumerate(prompts)]
    answers: list[list[int]] = [[] for _ in prompts]
    complete = np.zeros(len(prompts), dtype=bool)
    rows = np.arange(len(prompts))  # the prompt of each row that is still computed
    scores = incremental.prefill(prompts, settings.is_greedy)
    while True:
        tokens = np.zeros(len(rows), dtype=np.int64)
        for place, row in enumerate(rows):
            # its row is still computed, until enough others have ended; its tokens are dropped
            if complete[row]:
                continue
            token = tokens[place] = samplers[row].next_token(scores[place])
            if token in ends:
                complete[row] = True
                continue
            answers[row].append(int(token))
            complete[row] = is_last(row, answers[row])
        going = np.flatnonzero(~complete[rows])
        if not len(going):
            return answers
        # Selecting rows copies the whole cache: it pays only where half of them have left.
        if 2 * len(going) <= len(rows):
            incremental.select(going)
            rows, tokens = rows[going], tokens[going]
        scores = incremental.step(tokens)
