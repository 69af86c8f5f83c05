"""A projector's weights in a file of their own, as pretraining writes them."""

from __future__ import annotations

from pathlib import Path

from paddlemix.checkpoints.files.tensors import TensorEntry
from paddlemix.checkpoints.files.weight_files import read_weight_file, read_weights
from paddlemix.checkpoints.layouts.weight_names import (
    HF_NEW,
    HF_OLD,
    ORIGINAL,
    OURS,
    PADDLEMIX,
    PEFT_PROJECTOR,
    XTUNER_PROJECTOR,
)
from paddlemix.checkpoints.layouts.xtuner_layout import conversion_hint
from paddlemix.checkpoints.source import rename
from paddlemix.errors import UserError

NEW_PARTS = ("projector.", "image_newline")  # what a text-only model gets in addition to the tower


def read_projector_file(path: Path) -> dict[str, TensorEntry]:
    """The projector's weights and the newline vector under our names, unread.

    Args:
        path: original LLaVA's mm_projector.bin or non_lora_trainables.bin, llava-hf's names, PaddleMIX's, XTuner's (the
            file or its folder), or safetensors under any of their names or ours.

    Raises:
        MissingFileError, UserError: it cannot be read, or holds weights that none of these programs has.
    """
    hint = conversion_hint(path)
    if hint:
        raise UserError(f"pretrain_mm_mlp_adapter '{path}' is not a projector's file{hint}")
    weights = read_weights(path) if path.is_dir() else read_weight_file(path)
    # non_lora_trainables.bin may hold more than the projector, e.g. norms, which are dropped
    entries = rename(weights, (OURS, XTUNER_PROJECTOR, HF_NEW, HF_OLD, ORIGINAL, PADDLEMIX, PEFT_PROJECTOR), path)
    return {name: entry for name, entry in entries.items() if name.startswith(NEW_PARTS)}
