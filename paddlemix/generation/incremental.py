"""A model that reads prompts once and then continues token by token, from ids to scores.

Knows no sampling and no text.  Where only the likeliest token is asked for, a card chooses it: the ids come to the host
instead of all scores, and those that are fed next are on the device already.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import paddle

from paddlemix.datasets.collate import collate
from paddlemix.errors import UserError
from paddlemix.generation.leading import BEGIN, leader_of
from paddlemix.models.cached_decoder import CachedDecoder
from paddlemix.models.kernels.operators import on_cpu
from paddlemix.models.kv_cache import KVCache
from paddlemix.models.llava import LlavaModel
from paddlemix.sample import Example

_FEW = 64  # tokens that are read in few operators; with more, products dominate and causal blocks save some


@dataclass(frozen=True)
class NewTokens:
    """What follows a cache of one row.

    Args:
        input_ids: int64 [L]; 0 in the place of a visual token.
        features: of pictures, [R, D]; None without one.
        merge_index: int64 [L], see `LlavaModel.merge`; None without a picture.
    """

    input_ids: np.ndarray
    features: paddle.Tensor | np.ndarray | None = None
    merge_index: np.ndarray | None = None

    def on_host(self) -> NewTokens:
        """For another process; float32 holds features of every precision exactly."""
        if not isinstance(self.features, paddle.Tensor):
            return self
        return NewTokens(self.input_ids, self.features.astype("float32").numpy(), self.merge_index)


class IncrementalModel:
    """Rows of tokens over one cache.

    Where `greedy` was asked of `prefill` or `extend` and the model is not on CPU, each "scores" here and there is the
    likeliest token instead, int64 [B].

    Args:
        model: in evaluation mode.  If its process leads others, see `leading.py`, they are told of every call.
    """

    def __init__(self, model: LlavaModel) -> None:
        self._leader = leader_of(model)
        self._greedy = False
        # int64 [B], on the device.  A row that has ended goes on with these here, and with what the caller gives in the
        # other processes of a tensor group: nobody reads it.
        self._chosen: paddle.Tensor | None = None
        self._model = model
        self._decoder = CachedDecoder(model.language_model)
        self._next = np.zeros((0, 1), dtype=np.int64)  # [B, 1], the position of each row's next token
        self.cache = KVCache(model.config.text.max_position_embeddings)
        with self._told(BEGIN):
            pass

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
        with self._told("prefill", prompts):
            embeds = model.embed(*map(_tensor, (batch.input_ids, batch.pixel_values, batch.merge_index)))
            self._next = batch.position_ids[:, -1:] + 1
            return self._read_all(embeds, batch.position_ids, _tensor(batch.segment_ids) if padded else None)

    @paddle.no_grad()
    def extend(self, tokens: NewTokens, greedy: bool = False) -> np.ndarray:
        """Reads what follows the cache in its only row.

        Args:
            tokens: at least one.
            greedy: see `prefill`.

        Returns:
            Scores of the next token, float32 [1, V].
        """
        self._greedy = greedy
        with self._told("extend", tokens.on_host() if self._leader else None):
            ids, features, index = (_tensor(part) for part in (tokens.input_ids, tokens.features, tokens.merge_index))
            embeds = self._model.merge(ids.unsqueeze(0), features, index)
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
        with self._told("step", tokens):
            ids = paddle.to_tensor(tokens[:, None]) if self._chosen is None else self._chosen.unsqueeze(1)
            embeds = self._model.language_model.embed_tokens(ids)
            hidden = self._decoder(embeds, self._next, self.cache)
            self._next = self._next + 1
            return self._scores(hidden)

    @paddle.no_grad()
    def select(self, rows: np.ndarray) -> None:
        """Continues with these rows, int64 [B'], in this order; a row may be repeated."""
        with self._told("select", rows):
            self.cache.select(rows)
            self._next = self._next[rows]
            self._chosen = None  # of the rows as they were; `step` is given the tokens

    def truncate(self, length: int) -> None:
        """Forgets the positions from `length` on."""
        with self._told("truncate", length):
            self.cache.truncate(length)

    @property
    def is_over(self) -> bool:
        """Whether an error has left other processes in the middle of a computation: nothing more can be asked."""
        return self._leader is not None and self._leader.is_over

    def _told(self, name: str, *values: Any) -> AbstractContextManager[None]:
        """The others are told that this one does what the block does, and compute their part."""
        return contextlib.nullcontext() if self._leader is None else self._leader.told(self, name, *values)

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


def _tensor(array: Any) -> Any:
    return array if array is None or isinstance(array, paddle.Tensor) else paddle.to_tensor(array)
