"""A vocabulary that a tensor group shares: each process has the embedding, and the output scores, of some tokens."""

from __future__ import annotations

import paddle
import paddle.distributed as dist
from paddle import nn

from paddlemix.models.kernels.cached_constants import cached_range
from paddlemix.parallel.layout import Layout
from paddlemix.parallel.tensor.block_edges import leave, summed
from paddlemix.parallel.tensor.parts import Part

Scored = tuple[paddle.Tensor, paddle.Tensor, paddle.Tensor]


class SplitEmbedding(nn.Layer):
    """Token ids to embeddings, of which this process has some rows.

    Args:
        weight: [own rows, D], a parameter.
        part: which rows they are.
        layout: of the run.
    """

    def __init__(self, weight: paddle.Tensor, part: Part, layout: Layout) -> None:
        super().__init__()
        self.weight, self._part, self._layout = weight, part, layout

    def forward(self, ids: paddle.Tensor) -> paddle.Tensor:
        """int64 [...] -> [..., D], the same on every process; zeros for an id that no process has, which loading a
        tokenizer refuses."""
        local, is_here = places_in(ids, self._part)
        found = nn.functional.embedding(local, self.weight)
        return leave(found * is_here.unsqueeze(-1).astype(found.dtype), self._layout)


def places_in(ids: paddle.Tensor, part: Part) -> tuple[paddle.Tensor, paddle.Tensor]:
    """Places of tokens among those of this process, int64, some place for others; and which are its own, bool."""
    local = ids - part.start
    is_here = paddle.logical_and(local >= 0, local < part.stop - part.start)
    return paddle.clip(local, 0, part.stop - part.start - 1), is_here


def cross_entropy(logits: paddle.Tensor, targets: paddle.Tensor, part: Part, layout: Layout) -> Scored:
    """Summed loss (float32 scalar), right guesses (int64 scalar) and the gradient of the local logits [rows, own].

    Args:
        logits: [rows, own part of the vocabulary].
        targets: int64 [rows], of the whole vocabulary.
    """
    rows, size = logits.shape
    scores = logits.astype("float32")
    # Of equal scores the first counts, as in greedy answers: so the place of the maximum travels with it.  It is below
    # 2**24, so exact in float32.
    own_top = paddle.stack([scores.max(axis=-1), (scores.argmax(axis=-1) + part.start).astype("float32")])
    gathered: list[paddle.Tensor] = []
    dist.all_gather(gathered, own_top, group=layout.tensor_group)
    tops = paddle.stack(gathered)  # [N, 2, rows]
    top = tops[:, 0].max(axis=0)  # [rows]
    chosen = paddle.where(tops[:, 0] == top, tops[:, 1], paddle.full_like(tops[:, 1], 2.0**24)).min(axis=0)
    right = (chosen.astype("int64") == targets).astype("int64").sum()

    scores = scores - top.unsqueeze(-1)
    local, is_here = places_in(targets, part)
    places, weights = cached_range(rows) * size + local, is_here.astype("float32")
    found = paddle.gather(scores.reshape([-1]), places) * weights
    scores = scores.exp()
    found, sums = summed(paddle.stack([found, scores.sum(axis=-1)]), layout)
    loss = (paddle.log(sums) - found).sum()
    scores = (scores / sums.unsqueeze(-1)).reshape([-1])
    hits = paddle.gather(scores, places) - weights
    grad = scores.scatter_(places, hits).reshape_([rows, size])  # no place is named twice
    return loss, right, grad.astype(logits.dtype)
