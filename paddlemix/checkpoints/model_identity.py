"""What a model's answers depend on, as named digests: its weights by part, its tokenizer, processor and settings files,
and for an adapter all of its base.  Builds no model."""

from __future__ import annotations

import re
from pathlib import Path

from paddlemix.checkpoints.adapter import AdapterFiles, read_adapter
from paddlemix.checkpoints.hub import resolve_model
from paddlemix.checkpoints.layouts import is_adapter
from paddlemix.checkpoints.load import BaseSpec, base_of, open_weights
from paddlemix.checkpoints.weight_identity import WeightFiles, kept_or_made, weight_files
from paddlemix.identity import file_digests, text_digest

# Files that say what is computed or how text becomes ids; a run's records (run_config.json, trainer_state.json, ...) do
# not, nor do origin.json and the indices of weight files.
_DECLARED = re.compile(
    r"((lora_|adapter_|generation_|preprocessor_|processor_|tokenizer_|xtuner_)?config\.json|.*token.*\.(json|model|txt)"
    r"|vocab\..*|merges\.txt|chat_template.*|.*\.tiktoken|hf_vocabulary\.safetensors)"
)


def model_identity(path: str | Path, base: str | None = None) -> dict[str, str]:
    """Name -> digest of everything that a model or adapter computes with.

    Args:
        path: directory or name of a model of any layout, or of an adapter.
        base: an adapter's base model; None for the one that it names.

    Returns:
        Names as a message shows them: "weights of vision_tower", "tokenizer.model", "base: config.json".  An equal
        model that was copied, touched or moved has the same; one changed byte gives another.

    Raises:
        MissingFileError, UserError: a file is missing or cannot be understood.
    """
    directory = resolve_model(path)
    if not is_adapter(directory):
        return _of_model(open_weights(BaseSpec(model=str(path))))
    adapter = read_adapter(directory)
    found = _of_model(open_weights(base_of(adapter, base)))
    return _of_adapter(adapter) | {f"base: {name}": digest for name, digest in found.items()}


def _of_model(files: WeightFiles) -> dict[str, str]:
    parts: dict[str, list[str]] = {}
    for name, digest in sorted(files.digests().items()):
        parts.setdefault(name.partition(".")[0], []).append(f"{name} {digest}")
    found = {f"weights of {part}": text_digest(*digests) for part, digests in sorted(parts.items())}
    found |= _of_files(files.source.directory)
    beside = files.tower.directory if files.tower is not None else files.source.tower_directory
    return found | ({} if beside is None else {f"vision tower: {k}": v for k, v in _of_files(beside).items()})


def _of_adapter(adapter: AdapterFiles) -> dict[str, str]:
    directory = adapter.directory
    parts = [directory, *sorted(item for item in directory.iterdir() if item.is_dir() and "adapter" in item.name)]
    files = [path for part in parts for path in weight_files(part)]
    digests = kept_or_made(["adapter", str(directory)], files, adapter.tensors)
    weights = text_digest(*(f"{name} {digest}" for name, digest in sorted(digests.items())))
    return {"weights of the adapter": weights} | _of_files(directory)


def _of_files(directory: Path) -> dict[str, str]:
    files = sorted(path for path in directory.iterdir() if _DECLARED.fullmatch(path.name))
    found = zip((path.name for path in files), file_digests(files), strict=True)
    return {name: digest for name, digest in found if digest is not None}
