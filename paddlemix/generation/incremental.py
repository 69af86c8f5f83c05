"""A model that reads prompts once and then continues token by token, from ids to scores.

Knows no sampling and no text.  Where only the likeliest token is asked for, a card chooses it: the ids come to the host
instead of all scores, and those that are fed next are on the device already.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import paddle

from paddlemix.datasets.collate import collate
from paddlemix.errors import UserError
from paddlemix.models.cached_decoder import CachedDecoder
from paddlemix.models.kernels.operators import on_cpu
from paddlemix.models.kv_cache import KVCache
from paddlemix.models.llava import LlavaModel
from paddlemix.sample import Example

_FEW = 64  # tokens that are read in few operators; with more, products dominate and causal blocks save some


class IncrementalModel:
    """Rows of tokens over one cache.

    Where `greedy` was asked of `prefill` or `extend` and the model is not on CPU, each "scores" here and there is the
    likeliest token instead, int64 [B].

    Args:
        model: in evaluation mode.
    """

    def __init__(self, model: LlavaModel) -> None:
        self._greedy = False
        self._chosen: paddle.Tensor | None = None  # int64 [B], on the device
        self._model = model
        self._decoder = CachedDecoder(model.language_model)
        self._next = np.zeros((0, 1), dtype=np.int64)  # [B, 1], the position of each row's next token
        self.cache = KVCache(model.config.text.max_position_embeddings)

    @paddle.no_grad()
    def prefill(self, prompts: Sequence[Example], greedy: bool = False) -> np.ndarray:
        """Reads prompts, padded on the left to the longest.

        Args:
            prompts: at least one; text-only and image prompts may be mixed.
            greedy: the likeliest tokens are all that is asked for, now and in `step`.

        Returns:
            Scores of each row's next token, float32 [B, V].

        Raises:
            UserError: a prompt has an image and the model no tower.
        """
        model, self._greedy = self._model, greedy
        has_tower = model.config.vision is not None
        batch = collate(prompts, model.config.tokens_per_tile if has_tower else 1, padding="left")
        if batch.pixel_values is not None and not has_tower:
            raise UserError("the prompt has an image, but the model has no vision tower")
        # without padding there is nothing to mask, and attention without a mask is faster
        padded = bool((batch.segment_ids == 0).any())
        embeds = model.embed(*map(_tensor, (batch.input_ids, batch.pixel_values, batch.merge_index)))
        self._next = batch.position_ids[:, -1:] + 1
        return self._read_all(embeds, batch.position_ids, _tensor(batch.segment_ids) if padded else None)

    @paddle.no_grad()
    def extend(self, embeds: paddle.Tensor, greedy: bool = False) -> np.ndarray:
        """Reads what follows the cache in its only row.

        Args:
            embeds: [1, L, D].
            greedy: see `prefill`.

        Returns:
            Scores of the next token, float32 [1, V].
        """
        self._greedy = greedy
        seen, count = self.cache.length, embeds.shape[1]
        positions = np.arange(seen, seen + count)[None]
        self._next = positions[:, -1:] + 1
        # few tokens after a cache -> few operators, whose number is what costs there
        # else                     -> the decoder itself, with a causal mask
        if seen and count <= _FEW:
            return self._scores(self._decoder(embeds, positions, self.cache))
        return self._read_all(embeds, positions, None)

    @paddle.no_grad()
    def step(self, tokens: np.ndarray) -> np.ndarray:
        """One token further in every row.

        Args:
            tokens: int64 [B]; where the device has chosen, its choice is used instead.

        Returns:
            Scores of the next tokens, float32 [B, V].
        """
        ids = paddle.to_tensor(tokens[:, None]) if self._chosen is None else self._chosen.unsqueeze(1)
        embeds = self._model.language_model.embed_tokens(ids)
        hidden = self._decoder(embeds, self._next, self.cache)
        self._next = self._next + 1
        return self._scores(hidden)

    @paddle.no_grad()
    def select(self, rows: np.ndarray) -> None:
        """Continues with these rows, int64 [B'], in this order; a row may be repeated."""
        self.cache.select(rows)
        self._next = self._next[rows]
        self._chosen = None  # of the rows as they were; `step` is given the tokens

    def _read_all(
        self, embeds: paddle.Tensor, position_ids: np.ndarray, segment_ids: paddle.Tensor | None
    ) -> np.ndarray:
        batch, length = position_ids.shape
        # Only the last position of each row is asked for: the output layer on a whole prompt would need gigabytes.
        last = paddle.to_tensor(np.arange(1, batch + 1) * length - 1)
        decoder = self._model.language_model
        hidden = decoder(embeds, paddle.to_tensor(position_ids), segment_ids, self.cache, last)
        return self._scores(hidden)

    def _scores(self, hidden: paddle.Tensor) -> np.ndarray:
        logits = self._model.logits(hidden)
        # on CPU the scores are in memory already; from a card a row of 32,000 of them would cross the bus for one token
        if not self._greedy or on_cpu(logits):
            self._chosen = None
            return logits.astype("float32").numpy()
        self._chosen = logits.argmax(axis=-1)
        return self._chosen.numpy()


def _tensor(array: np.ndarray | None) -> paddle.Tensor | None:
    return None if array is None else paddle.to_tensor(array)
