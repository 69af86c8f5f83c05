"""Floating point operations of matrix products in our training step, by hand; everything else is left out."""

from __future__ import annotations

from workload import Workload


def count_operations(work: Workload, method: str) -> int:
    """Operations that a step needs: a product of [m, k] and [k, n] is 2 m k n.

    The output layer and what follows the last layer's keys and values run on supervised positions alone; nothing is
    propagated into the tower, and with LoRA no gradient of a frozen weight is computed.
    """
    tower = 0 if work.text_only else _tower(work)
    return tower + _decoder(work, method)


def _tower(work: Workload) -> int:
    """Forward pass of all layers but the last, patch embedding and the projector with its gradients."""
    tiles, patches, width = work.batch_size, work.image_tokens, work.tower_hidden_size
    rows = tiles * (patches + 1)
    layer = 2 * rows * (4 * width**2 + 2 * width * work.tower_intermediate_size) + 4 * rows * (patches + 1) * width
    embed = 2 * tiles * patches * width * 3 * work.patch_size**2
    first, second = width * work.hidden_size, work.hidden_size**2
    projector = 2 * tiles * patches * (2 * first + 3 * second)  # no gradient of the tower's features
    return (work.tower_layers - 1) * layer + embed + projector


def _decoder(work: Workload, method: str) -> int:
    """Forward and backward pass of decoder and output layer."""
    width, inner, rank = work.hidden_size, work.intermediate_size, work.lora_rank
    rows, chosen = work.batch_size * work.length, work.batch_size * work.supervised
    passes = 3 if method == "full" else 2
    sides = 2 * width, 3 * (width + inner)  # of the linear layers: keys and values, or the feed-forward part

    def linear(sizes: int, ends: int, count: int) -> int:
        narrow = 3 * rank * ends if method == "lora" else 0
        return 2 * count * (passes * sizes + narrow)

    key_value, half = linear(2 * width**2, 4 * width, rows), (2 * width**2, 4 * width)
    rest = linear(half[0] + 3 * width * inner, half[1] + sides[1], 1)
    attention = 3 * 4 * width * work.length
    layers = work.num_hidden_layers * key_value + ((work.num_hidden_layers - 1) * rows + chosen) * (rest + attention)
    return layers + 2 * chosen * passes * width * work.vocab_size
