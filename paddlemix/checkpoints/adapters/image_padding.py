"""Padded or cropped: where a llava-hf model of LLaVA-1.5, or an adapter on one, declares what LLaVA did not train with.

LLaVA-1.5 was trained on pictures padded to squares, and they are padded here.  llava-hf's copy of its weights has the
`preprocessor_config.json` of a CLIPImageProcessor, which crops, and other programs' adapters were trained with that.
An adapter's own file is followed; a base's file causes a warning.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from paddlemix.checkpoints.adapters.adapter import AdapterFiles
from paddlemix.checkpoints.files.weight_files import read_json
from paddlemix.checkpoints.layouts.file_names import CONFIG_FILE
from paddlemix.checkpoints.layouts.image_settings import read_pixels, unpadded
from paddlemix.log import logger
from paddlemix.processors.llava import LlavaProcessor

_logged: set[str] = set()  # warnings of this process, each given once


def with_adapter(base: Mapping[str, Any], adapter: AdapterFiles) -> dict[str, Any]:
    """The processor values of a base with those of an adapter: what its files declare, and what it was trained with.

    Args:
        base: values of the base's `processor_config.json`.

    Returns:
        `image_aspect_ratio` "square" if another program's files beside the adapter do not pad, though the base does.

    Raises:
        UserError: such a file has a value that is not allowed.
    """
    values = {**base, **adapter.processor}
    # only if nobody has decided: neither the adapter's own key, nor a base that does not pad anyway
    is_open = values.get("image_aspect_ratio") == "pad" and "image_aspect_ratio" not in adapter.processor
    found = unpadded(adapter.directory) if is_open else None
    if found is None:
        return values
    _warn(f"{found[0]} {found[1]}: the adapter was trained so, and image_aspect_ratio is square, though its base pads")
    return {**values, **read_pixels(adapter.directory), "image_aspect_ratio": "square"}


def warn_of_padding(directory: Path, processor: LlavaProcessor) -> None:
    """Warns once that pictures are padded although the model's own files tell transformers not to.

    Args:
        directory: of the model, or of an adapter's base.
        processor: the one in use; no warning if it does not pad.
    """
    if processor.image_spec.aspect_mode != "pad" or not (directory / CONFIG_FILE).is_file():
        return
    config = read_json(directory / CONFIG_FILE)
    # a file that a conversion of ours wrote, or that a user edited, has the key: then it is meant
    is_hf = config.get("model_type") == "llava" and "text_config" in config
    found = unpadded(directory) if is_hf and not config.get("image_aspect_ratio") else None
    if found is not None:
        _warn(
            f"{directory}: pictures are padded to squares, as LLaVA-1.5 was trained; transformers {found[1]}, as "
            f"{found[0]} says, and adapters of TRL, LLaMA-Factory and ms-swift were trained so. To do the same: "
            '"image_aspect_ratio": "square" in a run\'s file, in this folder\'s config.json, or in a '
            "paddlemix_processor.json beside such an adapter"
        )


def _warn(message: str) -> None:
    if message not in _logged:
        _logged.add(message)
        logger.warning("%s", message)
