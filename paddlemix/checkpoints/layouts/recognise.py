"""What a directory holds: its layout, recognised by content, and what its files declare, in our terms.

No name or path of a directory decides anything.  Reads `config.json` and the processor files, no weights; how
each kind of `config.json` is read is in `config_readers.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from paddlemix.checkpoints.files.weight_files import read_json
from paddlemix.checkpoints.layouts.config_keys import FORMAT_KEY, FORMAT_VERSION
from paddlemix.checkpoints.layouts.config_readers import (
    Layout,
    read_hf,
    read_language,
    read_original,
    read_ours,
    read_tower,
)
from paddlemix.checkpoints.layouts.families import FAMILIES, LLAVA_ARCHITECTURES
from paddlemix.checkpoints.layouts.file_names import ADAPTER_FILE, CONFIG_FILE, PEFT_ADAPTER_FILE
from paddlemix.checkpoints.layouts.towers import TOWER_FORMS
from paddlemix.checkpoints.layouts.xtuner_layout import conversion_hint, has_adapters
from paddlemix.declared import Keys, items, take
from paddlemix.declared import text as text_rule
from paddlemix.errors import MissingFileError, UserError
from paddlemix.models.configuration import LlavaConfig


def recognise(directory: Path) -> Layout:
    """Reads what a model directory is.

    Args:
        directory: holds `config.json`.

    Raises:
        MissingFileError: no directory or no `config.json`.
        UserError: its content is of no known layout, or names something that is not supported.
    """
    if not directory.is_dir():
        raise MissingFileError(f"model directory '{directory}' does not exist (looked from {Path.cwd()})")
    config_path = directory / CONFIG_FILE
    if not config_path.is_file():
        found = ", ".join(sorted(path.name for path in directory.iterdir())[:8]) or "nothing"
        raise MissingFileError(
            f"no {CONFIG_FILE} in {directory}, so it is not a model directory (it holds {found})"
            f"{conversion_hint(directory) or _inner_hint(directory)}"
        )
    where, config = str(config_path), read_json(config_path)
    try:
        kind = take(config, _KIND_KEYS, tell=False)
        # before anything is checked, only the two keys that name a kind: each reader has its own table of allowed keys
        for matches, read in _READERS:
            if matches(config.keys(), kind):
                return read(config, directory, where)
    except UserError as error:  # named by the reader of another file, or by none yet
        raise error if str(error).startswith(str(directory)) else UserError(f"{where}: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise UserError(f"{where} cannot be understood: {error!r}") from error
    raise UserError(
        f"{where}: model_type '{config.get('model_type')}' with architectures {config.get('architectures')} is "
        "not supported; allowed: LLaVA (original, llava-hf, PaddleMIX, InternVL-Chat), a language model "
        f"({', '.join(FAMILIES)}), CLIP, InternViT"
    )


def _inner_hint(directory: Path) -> str:
    """For the folder of a run: a hint at the models or adapters inside; "" without any."""
    names = (CONFIG_FILE, ADAPTER_FILE, PEFT_ADAPTER_FILE)
    inner = [path for path in directory.iterdir() if any((path / name).is_file() for name in names)]
    latest = sorted(inner, key=lambda path: path.stat().st_mtime)[-3:]
    return f"; give one of the models inside, for example {', '.join(map(str, latest))}" if latest else ""


def is_adapter(directory: Path) -> bool:
    """Whether a directory holds an adapter: ours, PaddleMIX's, original LLaVA's (PEFT) or XTuner's."""
    return any((directory / name).is_file() for name in (ADAPTER_FILE, PEFT_ADAPTER_FILE)) or has_adapters(directory)


def config_values(config: LlavaConfig) -> dict[str, Any]:
    """The content of our own `config.json`."""
    return {FORMAT_KEY: FORMAT_VERSION, "model_type": "paddlemix_llava", **config.to_dict()}


_KIND_KEYS = Keys({"model_type": text_rule, "architectures": items(text_rule)})
# what a config.json has, as its keys and its kind -> how it is read; the first match wins.  Ours and llava-hf's come
# first, because original LLaVA's is recognised by a key that others may copy.
_READERS = (
    (lambda keys, kind: FORMAT_KEY in keys, read_ours),
    (lambda keys, kind: kind.get("model_type") in ("llava", "llava_next") and "text_config" in keys, read_hf),
    (
        lambda keys, kind: (
            "mm_vision_tower" in keys or not LLAVA_ARCHITECTURES.isdisjoint(kind.get("architectures", ()))
        ),
        read_original,
    ),
    (lambda keys, kind: kind.get("model_type") in FAMILIES, read_language),
    (lambda keys, kind: any(kind.get("model_type") in form.model_types for form in TOWER_FORMS), read_tower),
)
