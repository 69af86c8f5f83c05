"""Answers to a batch of encoded prompts, token by token over a key/value cache.

Prompts of different lengths are padded on the left and masked, so a row gives what it gives alone.  Knows no template.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import numpy as np
import paddle

from paddlemix.datasets.collate import collate
from paddlemix.errors import UserError
from paddlemix.generation.sampling import GenerationSettings, Sampler
from paddlemix.models.attention import KVCache
from paddlemix.models.llava import LlavaModel
from paddlemix.sample import Batch, Example


@paddle.no_grad()
def generate(
    model: LlavaModel, prompts: Sequence[Example], settings: GenerationSettings, end_ids: Collection[int]
) -> list[list[int]]:
    """Answers every prompt.

    Args:
        model: in evaluation mode.
        prompts: encoded with `LlavaProcessor.encode_prompt`; text-only and image prompts may be mixed.
        settings: length and sampling.
        end_ids: tokens that end an answer.

    Returns:
        New token ids per prompt, without the token that ended it; an answer also ends with the model's context.

    Raises:
        UserError: a prompt has an image and the model no tower, or it fills the model's context.
    """
    if not prompts:
        return []
    tokens_per_tile = model.config.tokens_per_tile if model.config.vision is not None else 1
    budgets = np.array([answer_budget(model, len(prompt.input_ids), settings.max_new_tokens) for prompt in prompts])
    batch = collate(prompts, tokens_per_tile, padding="left")
    if batch.pixel_values is not None and model.config.vision is None:
        raise UserError("the prompt has an image, but the model has no vision tower")
    answers: list[list[int]] = [[] for _ in prompts]
    running = np.ones(len(prompts), dtype=bool)
    for tokens in _steps(model, batch, Sampler(settings)):
        running &= ~np.isin(tokens, list(end_ids))
        for row in np.flatnonzero(running):
            answers[row].append(int(tokens[row]))
        running &= np.array([len(answer) for answer in answers]) < budgets
        if not running.any():
            break
    return answers


def answer_budget(model: LlavaModel, prompt_length: int, max_new_tokens: int) -> int:
    """Most tokens of an answer: `max_new_tokens`, or what the positions that the model was trained on leave.

    Raises:
        UserError: they leave nothing; says by how much the prompt is too long.
    """
    limit = model.config.text.max_position_embeddings
    if prompt_length >= limit:
        raise UserError(
            f"the conversation takes {prompt_length} tokens, {prompt_length - limit + 1} more than the model's context "
            f"of {limit} leaves room for; shorten it"
        )
    return min(max_new_tokens, limit - prompt_length)


def _steps(model: LlavaModel, batch: Batch, sampler: Sampler) -> Iterator[np.ndarray]:
    """The next tokens of all rows, one int64 [B] after the other, without end."""
    cache = KVCache()
    padded = bool((batch.segment_ids == 0).any())
    segments = paddle.to_tensor(batch.segment_ids) if padded else None
    optional = {"pixel_values": batch.pixel_values, "merge_index": batch.merge_index}
    hidden = model(
        paddle.to_tensor(batch.input_ids),
        paddle.to_tensor(batch.position_ids),
        segments,
        cache=cache,
        **{name: paddle.to_tensor(value) for name, value in optional.items() if value is not None},
    )
    positions = batch.position_ids[:, -1:]
    ones = paddle.ones([len(positions), 1], dtype="int64") if padded else None
    while True:
        tokens = sampler.next_tokens(model.logits(hidden[:, -1]).astype("float32").numpy())
        yield tokens
        positions = positions + 1
        hidden = model(paddle.to_tensor(tokens[:, None]), paddle.to_tensor(positions), ones, cache=cache)
