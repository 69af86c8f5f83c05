"""Our adapter as one that original LLaVA loads: PEFT's two files, `non_lora_trainables.bin` and LLaVA's config.json.

Knows the file format of torch.save, so that torch is not needed to write one.
Sources: peft's save_pretrained; haotian-liu/LLaVA llava/train/train.py (commit c121f04); torch/serialization.py.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from paddlemix.checkpoints.adapters.adapter import AdapterFiles, read_adapter
from paddlemix.checkpoints.adapters.base_places import base_of
from paddlemix.checkpoints.adapters.image_padding import with_adapter
from paddlemix.checkpoints.base_model import BaseSpec
from paddlemix.checkpoints.convert.complete_checkpoint import Checkpoint, read_checkpoint
from paddlemix.checkpoints.convert.declared_files import original_config
from paddlemix.checkpoints.convert.export_model import check_target
from paddlemix.checkpoints.files.directories import atomic_directory
from paddlemix.checkpoints.files.finite import all_finite, finite
from paddlemix.checkpoints.files.tensors import FLOAT_TYPES, TensorEntry, converted, joined, transposed
from paddlemix.checkpoints.files.weight_files import write_json, write_safetensors
from paddlemix.checkpoints.layouts.added_rows import without_added_rows
from paddlemix.checkpoints.layouts.file_names import CONFIG_FILE, PEFT_ADAPTER_FILE, PEFT_OTHER_WEIGHTS, PEFT_WEIGHTS
from paddlemix.checkpoints.layouts.recognise import recognise
from paddlemix.checkpoints.layouts.weight_names import ORIGINAL, KeyMap, is_linear_weight
from paddlemix.checkpoints.load import apply_adapter, load_base
from paddlemix.checkpoints.pretrained import tensor_entry
from paddlemix.errors import UserError
from paddlemix.log import logger
from paddlemix.models.configuration import LlavaConfig
from paddlemix.peft.lora import lora_parameters
from paddlemix.peft.settings import MAGNITUDE, LoRAConfig, is_adapter_weight, is_start_value

PEFT_WRAPPER = "base_model.model."
_STORAGES = {"F32": "FloatStorage", "F16": "HalfStorage", "BF16": "BFloat16Storage"}


def export_adapter(source: str | Path, target: str | Path, dtype: str | None = None) -> int:
    """Writes an adapter directory for original LLaVA.

    Args:
        source: an adapter directory of ours or PaddleMIX's; its base must be in place, for the config.json.
        target: must not exist, or be empty; appears whole or not at all.
        dtype: of the written weights; None keeps them.

    Returns:
        The number of weights.

    Raises:
        MissingFileError, UserError: the adapter or its base cannot be used, or the target cannot be written.
    """
    source, target = Path(source), Path(target)
    check_target(target, source)
    adapter = read_adapter(source)
    base = _base(adapter)
    lora, other = split_adapter(adapter, dtype)
    # an embedding that trained on a llava-hf base has rows that original LLaVA has no tokens for
    if base.added is not None:
        other = without_added_rows(other, base.added)
    with atomic_directory(target) as temporary:
        write_json(temporary / PEFT_ADAPTER_FILE, peft_settings(adapter, adapted_modules(lora)))
        write_json(temporary / CONFIG_FILE, _config(base, adapter))
        write_safetensors(temporary / PEFT_WEIGHTS[0], all_finite(dict(peft_lora(lora))), {"format": "pt"})
        write_torch(temporary / PEFT_OTHER_WEIGHTS, dict(_peft_whole(other)))
    log_base(base.directory, "original", "original LLaVA", "llava")
    return len(lora) + len(other)


def split_adapter(adapter: AdapterFiles, dtype: str | None) -> tuple[dict[str, TensorEntry], dict[str, TensorEntry]]:
    """An adapter's weights for PEFT: those of a plain LoRA or DoRA, and the others, which trained whole.

    Args:
        dtype: "float32", "float16" or "bfloat16"; None keeps them.
    """
    tensors = adapter.tensors()
    lora = {name: entry for name, entry in tensors.items() if is_adapter_weight(name)}
    other = {name: entry for name, entry in tensors.items() if name not in lora}
    # PEFT would compute PiSSA's start from the base anew, to other last bits: it gets a plain LoRA of twice the rank.
    if adapter.config.pissa:
        if not any(is_start_value(name) for name in lora):  # another program's, which computes them from the base
            model = apply_adapter(load_base(base_of(adapter)), adapter).model
            lora = {name: tensor_entry(parameter) for name, parameter in lora_parameters(model)}
        lora = dict(plain_of_pissa(lora))
    if dtype is None:
        return lora, other
    kind = FLOAT_TYPES[dtype]
    lora = {name: converted(entry, kind) for name, entry in lora.items()}
    return lora, {name: converted(entry, kind) for name, entry in other.items()}


def adapted_modules(lora: Mapping[str, TensorEntry]) -> tuple[str, ...]:
    """Names of the layers that an adapter's matrices belong to."""
    return tuple(name.removesuffix(".lora_A") for name in lora if name.endswith(".lora_A"))


def peft_lora(lora: Mapping[str, TensorEntry], keymap: KeyMap = ORIGINAL) -> Iterator[tuple[str, TensorEntry]]:
    """An adapter's matrices under PEFT's names and in its orientation, of the layers as `keymap` names them."""
    for name, entry in lora.items():
        module, _, part = name.rpartition(".")
        theirs = f"{PEFT_WRAPPER}{_module(module, keymap)}.{part}"
        yield (theirs, entry) if part == MAGNITUDE else (f"{theirs}.weight", transposed(entry))


def plain_of_pissa(lora: Mapping[str, TensorEntry]) -> Iterator[tuple[str, TensorEntry]]:
    """The same update with twice the rank, [A A0] [B; -B0]: the start is subtracted."""
    for name, entry in lora.items():
        start = lora.get(f"{name}_start")
        if name.endswith(".lora_A") and start is not None:
            yield name, joined(entry, start, axis=1)
        elif name.endswith(".lora_B") and start is not None:
            yield name, joined(entry, _negated(start), axis=0)


def _negated(entry: TensorEntry) -> TensorEntry:
    def read() -> np.ndarray:
        values = entry.read()
        # bfloat16 is uint16 here, so the sign is flipped as a bit
        return values ^ np.uint16(0x8000) if entry.dtype == "BF16" else -values

    return TensorEntry(entry.dtype, entry.shape, read)


def _peft_whole(tensors: Mapping[str, TensorEntry]) -> Iterator[tuple[str, TensorEntry]]:
    for name, entry in tensors.items():
        # torch's orientation, [out, in]; LoRA's matrices were turned in `peft_lora`
        turned = transposed(entry) if is_linear_weight(name, entry.shape) else entry
        yield PEFT_WRAPPER + ORIGINAL.to_theirs(name), turned


def _module(name: str, keymap: KeyMap) -> str:
    """A layer's name in another layout."""
    return keymap.to_theirs(f"{name}.weight").removesuffix(".weight")


def peft_settings(adapter: AdapterFiles, modules: Sequence[str], keymap: KeyMap = ORIGINAL) -> dict[str, Any]:
    """adapter_config.json of an adapter, or of those of its layers that `modules` names."""
    config = adapter.config
    # one rank for most layers, patterns for the rest; a part of the layers begins from the first of them
    rank, alpha = _rank_and_alpha(config, "" if len(modules) == len(config.modules) else modules[0])
    others = {module: _rank_and_alpha(config, module) for module in modules}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": place_of(base_of(adapter).model),
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {_module(module, keymap): r for module, (r, _) in others.items() if r != rank},
        "alpha_pattern": {_module(module, keymap): a for module, (_, a) in others.items() if a != alpha},
        "use_rslora": config.rslora and not config.pissa,
        "use_dora": config.use_dora,
        "lora_dropout": config.lora_dropout,
        "target_modules": [_module(name, keymap) for name in modules],
        "bias": config.bias,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
    }


def place_of(base: str) -> str:
    """A base as a file in another directory names it: an absolute path, or a model's name unchanged."""
    return str(Path(base).resolve()) if Path(base).exists() else base


def _rank_and_alpha(config: LoRAConfig, module: str) -> tuple[int, float]:
    """Of a layer, "" for the adapter; for PiSSA those of the plain adapter that it is written as, scaled alike."""
    rank = config.rank_of(module)
    return (2 * rank, 2 * rank * config.scaling_of(module)) if config.pissa else (rank, config.alpha_of(module))


def _base(adapter: AdapterFiles) -> Checkpoint:
    """The adapter's base, a whole model.

    Raises:
        UserError: it is just a language model, or reads pictures of another size.
    """
    spec = base_of(adapter)
    model, base = spec.model, read_checkpoint(Path(spec.model))
    if base.facts.config.vision is None:
        raise UserError(
            f"the adapter's base {model} is a language model alone; merge the adapter first "
            "(paddlemix merge-lora) and convert the result"
        )
    check_image_size(spec, base.facts.config)
    return base


def check_image_size(spec: BaseSpec, config: LlavaConfig) -> None:
    """Checks that an adapter's base reads pictures of the size that the adapter was trained on, by default.

    Args:
        spec: the adapter's base as it was trained on.
        config: sizes of the base as its directory has them, with a tower.

    Raises:
        UserError: it does not; no other program's adapter can declare that its base's positions are interpolated.
    """
    assert config.vision is not None
    wanted, found = spec.vision_image_size, config.vision.image_size
    if wanted is not None and wanted != found:
        raise UserError(
            f"the adapter was trained with vision_image_size {wanted}, its base's tower reads {found} pixels, and no "
            "other program's adapter has a place for that; merge it first (paddlemix merge-lora) and convert the result"
        )


def _config(base: Checkpoint, adapter: AdapterFiles) -> dict[str, Any]:
    """The base's config.json as original LLaVA's, with what the adapter's processor says."""
    # template and pixels are the adapter's where it declares them: it was trained with those
    facts = replace(base.facts, processor=with_adapter(base.facts.processor, adapter))
    values = original_config(facts)
    # the base has its own tower; the folder beside a converted model is not beside an adapter
    return {**values, "mm_vision_tower": str(base.directory.resolve() / values["mm_vision_tower"])}


def log_base(directory: Path, kind: str, program: str, layout: str) -> None:
    """Warns if the base is not in the layout that the program an adapter was written for needs.

    Args:
        kind: of that layout, see `config_readers.Layout`.
        layout: the same as `convert --to` names it.
    """
    if recognise(directory).kind != kind:
        logger.warning(
            "%s needs the base %s in its own layout: convert it (paddlemix convert --to %s) and set "
            "base_model_name_or_path in adapter_config.json to the result",
            program,
            directory,
            layout,
        )


def write_torch(path: Path, tensors: Mapping[str, TensorEntry]) -> None:
    """Writes a file that `torch.load` reads, weights_only too: a dict of tensors in torch's zip format."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        root = path.stem  # torch names the folder inside the archive after the file
        archive.writestr(f"{root}/data.pkl", _pickled(tensors))
        archive.writestr(f"{root}/byteorder", "little")
        for number, (name, entry) in enumerate(tensors.items()):
            array = finite(entry, f"'{name}'").read()
            archive.writestr(f"{root}/data/{number}", np.ascontiguousarray(array).tobytes())
        archive.writestr(f"{root}/version", "3\n")


def _pickled(tensors: Mapping[str, TensorEntry]) -> bytes:
    """The pickle, written by hand (protocol 2): its functions belong to torch, which pickle would want to import."""
    # PROTO 2, an empty dict and a mark for its items; per tensor: its name, the function, (storage, offset 0, shape,
    # strides, requires_grad False, an OrderedDict of hooks), REDUCE; in the end SETITEMS and STOP
    code = bytearray(b"\x80\x02}(")
    for number, (name, entry) in enumerate(tensors.items()):
        strides = [int(np.prod(entry.shape[axis + 1 :], dtype=np.int64)) for axis in range(len(entry.shape))]
        code += _text(name) + b"ctorch._utils\n_rebuild_tensor_v2\n(("
        code += _text("storage") + f"ctorch\n{_STORAGES[entry.dtype]}\n".encode() + _text(str(number)) + _text("cpu")
        code += _number(int(np.prod(entry.shape, dtype=np.int64))) + b"tQ" + _number(0)
        code += b"(" + b"".join(map(_number, entry.shape)) + b"t(" + b"".join(map(_number, strides)) + b"t"
        code += b"\x89ccollections\nOrderedDict\n)RtR"
    return bytes(code + b"u.")


# BINUNICODE and LONG1: texts with 4 bytes of length, numbers of 8 bytes
def _text(text: str) -> bytes:
    encoded = text.encode()
    return b"X" + len(encoded).to_bytes(4, "little") + encoded


def _number(value: int) -> bytes:
    return b"\x8a\x08" + value.to_bytes(8, "little", signed=True)
