"""Every weight accounted for: the names and shapes that a model needs against those that a checkpoint holds.

Knows names and shapes only; needs no model and no paddle.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from paddlemix.checkpoints.files.tensors import Tensors
from paddlemix.errors import UserError
from paddlemix.identity import listed

Shape = tuple[int, ...]
_MAX_LISTED = 8
_TOWER_LAYERS = "vision_tower.layers."


def check_weights(
    expected: Mapping[str, Shape], tensors: Tensors, source: str, may_miss: Callable[[str], bool] = lambda name: False
) -> set[str]:
    """Compares a checkpoint's weights with those that are needed.

    Args:
        expected: name -> shape.
        tensors: under our names.
        source: for messages.
        may_miss: whether a weight may be absent, e.g. that of a new projector.

    Returns:
        Names of the tower weights that belong to layers after the selected one: kept, but not built.

    Raises:
        UserError: lists every missing, extra and misshapen weight.
    """
    # | in the checkpoint, not needed       | verdict                                              |
    # |-------------------------------------|------------------------------------------------------|
    # | tower layers after the selected one | unused: nothing reads them, saving keeps them        |
    # | an output layer of a tied model     | a copy of the embedding, which some programs save    |
    # | anything else                       | extra: config.json and weights are of two models     |
    unused = {name for name in tensors if _is_unbuilt(name, expected)}
    tied = {"lm_head.weight"} - expected.keys()
    kinds = {
        "missing": sorted(name for name in expected.keys() - tensors.keys() if not may_miss(name)),
        "extra": sorted(tensors.keys() - expected.keys() - unused - tied),
        "misshapen": [
            f"{name} is {list(tensors[name].shape)}, expected {list(expected[name])}"
            for name in sorted(expected.keys() & tensors.keys())
            if tuple(tensors[name].shape) != tuple(expected[name])
        ],
    }
    faults = [f"{len(names)} {kind}: {listed(names, _MAX_LISTED)}" for kind, names in kinds.items() if names]
    if faults:
        raise UserError(f"the weights of {source} do not fit its config.json: {'; '.join(faults)}")
    return unused


def _is_unbuilt(name: str, expected: Mapping[str, Shape]) -> bool:
    """Whether a weight belongs to a tower layer that is not built, or to the norm after the last."""
    if name.startswith(_TOWER_LAYERS):
        layer = name[len(_TOWER_LAYERS) :].partition(".")[0]
        # every layer has this norm; a made-up number like "x" is an extra weight instead
        return layer.isdecimal() and f"{_TOWER_LAYERS}{layer}.layer_norm1.weight" not in expected
    return name in ("vision_tower.post_layernorm.weight", "vision_tower.post_layernorm.bias")


def check_vocabulary(num_tokens: int, vocab_size: int, source: str) -> None:
    """Checks that a tokenizer has no more ids than the embedding has rows; it may have fewer.

    Raises:
        UserError: it has more.
    """
    if num_tokens > vocab_size:
        raise UserError(
            f"the tokenizer of {source} has {num_tokens} tokens, but the embedding only {vocab_size} rows: they do not "
            "belong together; copy the tokenizer files that came with the weights"
        )
