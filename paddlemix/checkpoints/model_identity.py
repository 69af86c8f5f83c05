"""What a model's answers depend on, by name: digests of its weights by part, what its declared files decide, and for an
adapter the same of its base.  Builds no model."""

from __future__ import annotations

import re
from pathlib import Path

from paddlemix.checkpoints.adapters.adapter import AdapterFiles, read_adapter
from paddlemix.checkpoints.adapters.adapter_processor import adapter_processor
from paddlemix.checkpoints.adapters.base_places import base_of
from paddlemix.checkpoints.base_model import BaseSpec, attach_tower, open_weights
from paddlemix.checkpoints.files.weight_files import read_json
from paddlemix.checkpoints.hub.resolve import resolve_model
from paddlemix.checkpoints.identity.declared_identity import declared_digests
from paddlemix.checkpoints.identity.weight_identity import WeightFiles, cached_digests, weight_files
from paddlemix.checkpoints.layouts.file_names import CONFIG_FILE
from paddlemix.checkpoints.layouts.recognise import is_adapter
from paddlemix.checkpoints.pretrained import load_processor
from paddlemix.checkpoints.quantized import QUANTIZATION_KEY
from paddlemix.checkpoints.source import Source, with_image_size
from paddlemix.identity import file_digests, text_digest

# Files that decide what is computed or how text becomes ids, as `file_identity` compares them; not a run's records
# (run_config.json, trainer_state.json, ...), origin.json and the indices of weight files.
_DECLARED = re.compile(
    r"((lora_|adapter_|generation_|preprocessor_|processor_|tokenizer_|xtuner_)?config\.json|.*token.*\.(json|model|txt)"
    r"|vocab\..*|merges\.txt|chat_template.*|.*\.tiktoken|hf_vocabulary\.safetensors)"
)


def model_identity(path: str | Path, base: str | None = None) -> dict[str, str]:
    """Name -> digest of everything that a model's or adapter's computation uses.

    Args:
        path: directory or name of a model of any layout, or of an adapter.
        base: an adapter's base model; None for the one that it names.

    Returns:
        Names as a message shows them: "weights of vision_tower", "tokenizer.model", "base: config.json: rope_theta".
        A model that was copied, touched or moved, or whose declared files were only formatted differently, has the same
        digests; one changed bit of a weight changes them.

    Raises:
        MissingFileError, UserError: a file is missing or cannot be understood.
    """
    directory = resolve_model(path)
    if not is_adapter(directory):
        files = open_weights(BaseSpec(model=str(path)))
        source = files.source
        return _weights(files) | _stored(files) | declared_digests(source.config, load_processor(source, False))
    adapter = read_adapter(directory)
    spec = base_of(adapter, base)
    files = open_weights(spec)
    source = _whole(files, spec)
    processor = adapter_processor(load_processor(source, False), adapter)
    found = _weights(files) | _stored(files) | declared_digests(source.config, None)
    # dropout acts while training only
    settings = adapter.config.to_dict() | {"image_newline": spec.image_newline, "quantize": spec.quantize}
    values = text_digest(*(f"{key} {value!r}" for key, value in sorted(settings.items()) if key != "lora_dropout"))
    declared = declared_digests(source.config, processor)
    # what the adapter's own files decide, then its base under "base: ": a value that both have is named once
    return (
        {"weights of the adapter": _adapter_weights(adapter), "settings of the adapter": values}
        | {name: value for name, value in declared.items() if name not in found}
        | {f"base: {name}": value for name, value in found.items()}
    )


def _whole(files: WeightFiles, spec: BaseSpec) -> Source:
    """A base with the tower that its adapter names, as its files declare it."""
    if files.tower is None:
        return with_image_size(files.source, spec.vision_image_size)
    return attach_tower(files.source, with_image_size(files.tower, spec.vision_image_size), spec)


def _stored(files: WeightFiles) -> dict[str, str]:
    """How the weights are stored: a rounded or quantised copy has the digests of its origin, but other answers."""
    sources = [files.source, *([] if files.tower is None else [files.tower])]
    kinds = sorted({entry.dtype for source in sources for entry in source.tensors().values()})
    config = files.source.directory / CONFIG_FILE
    quantization = read_json(config).get(QUANTIZATION_KEY) if config.is_file() else None
    return {"types of the weights": " ".join(kinds)} | ({} if not quantization else {"quantization": str(quantization)})


def file_identity(path: str | Path, base: str | None = None) -> dict[str, str]:
    """`model_identity` of earlier versions, which compared declared files byte by byte: name of a file -> digest."""
    # kept for answer files that an earlier version began: they can be continued
    directory = resolve_model(path)
    if not is_adapter(directory):
        return _of_model(open_weights(BaseSpec(model=str(path))))
    adapter = read_adapter(directory)
    found = _of_model(open_weights(base_of(adapter, base)))
    own = {"weights of the adapter": _adapter_weights(adapter)} | _of_files(directory)
    return own | {f"base: {name}": digest for name, digest in found.items()}


def _of_model(files: WeightFiles) -> dict[str, str]:
    found = _weights(files) | _of_files(files.source.directory)
    beside = files.tower.directory if files.tower is not None else files.source.tower_directory
    return found | ({} if beside is None else {f"vision tower: {k}": v for k, v in _of_files(beside).items()})


def _weights(files: WeightFiles) -> dict[str, str]:
    parts: dict[str, list[str]] = {}
    for name, digest in sorted(files.digests().items()):
        parts.setdefault(name.partition(".")[0], []).append(f"{name} {digest}")
    return {f"weights of {part}": text_digest(*digests) for part, digests in sorted(parts.items())}


def _adapter_weights(adapter: AdapterFiles) -> str:
    directory = adapter.directory
    parts = [directory, *sorted(item for item in directory.iterdir() if item.is_dir() and "adapter" in item.name)]
    files = [path for part in parts for path in weight_files(part)]
    digests = cached_digests(["adapter", str(directory)], files, adapter.tensors)
    return text_digest(*(f"{name} {digest}" for name, digest in sorted(digests.items())))


def _of_files(directory: Path) -> dict[str, str]:
    files = sorted(path for path in directory.iterdir() if _DECLARED.fullmatch(path.name))
    found = zip((path.name for path in files), file_digests(files), strict=True)
    return {name: digest for name, digest in found if digest is not None}
