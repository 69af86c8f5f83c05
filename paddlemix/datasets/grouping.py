"""An order of samples in which every optimiser step holds one modality and its batches are of like total length.

Source: haotian-liu/LLaVA llava/train/llava_trainer.py, `get_modality_length_grouped_indices` (commit c121f04); one
modality alone is grouped by length as there.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from paddlemix.sample import Sample


def modality_lengths(samples: Sequence[Sample]) -> np.ndarray:
    """int64 [samples]: words of each conversation, `<image>` counted as one; negative where there is no image."""
    lengths = [
        max(sum(len(message.text.split()) + len(message.image_indices) for message in sample.messages), 1)
        * (1 if sample.images else -1)
        for sample in samples
    ]
    return np.array(lengths, dtype=np.int64)


def group_by_modality(lengths: np.ndarray, batch_size: int, batches: int, random: np.random.Generator) -> np.ndarray:
    """Orders samples for steps of `batches` batches of `batch_size`.

    Args:
        lengths: as `modality_lengths` gives them.
        batch_size: samples of one batch on one device.
        batches: batches of a whole optimiser step, over devices and accumulation.
        random: draws the order.

    Returns:
        Every index once.  Each full step has one modality; the samples left over from both come last.
    """
    full: list[np.ndarray] = []
    rest: list[np.ndarray] = []
    for members in (np.flatnonzero(lengths > 0), np.flatnonzero(lengths < 0)):
        shuffled = random.permutation(members)
        whole = len(shuffled) - len(shuffled) % (batch_size * batches)
        rest.append(shuffled[whole:])
        full += [_balanced(step, lengths, batches) for step in shuffled[:whole].reshape(-1, batch_size * batches)]
    return np.concatenate([*(full[index] for index in random.permutation(len(full))), np.sort(np.concatenate(rest))])


def _balanced(step: np.ndarray, lengths: np.ndarray, batches: int) -> np.ndarray:
    """Deals the samples of a step, longest first, each to the batch that is shortest so far and not full."""
    room = len(step) // batches
    chunks: list[list[int]] = [[] for _ in range(batches)]
    totals = np.zeros(batches)
    for index in step[np.argsort(-np.abs(lengths[step]), kind="stable")]:
        chunk = int(totals.argmin())
        chunks[chunk].append(int(index))
        totals[chunk] = totals[chunk] + abs(lengths[index]) if len(chunks[chunk]) < room else np.inf
    return np.array([index for chunk in chunks for index in chunk], dtype=np.int64)
