"""The processor of a model with an adapter: its own, or its base's with what another program's adapter declares."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from paddlemix.checkpoints.adapters.adapter import AdapterFiles
from paddlemix.checkpoints.adapters.image_padding import with_adapter
from paddlemix.checkpoints.layouts.added_rows import IMAGE_TOKEN, PAD_TOKEN, read_added_tokens
from paddlemix.log import logger
from paddlemix.processors.images.image_config import image_spec_from_dict
from paddlemix.processors.llava import LlavaProcessor, processor_from_dict
from paddlemix.processors.text.chat_template import read_template
from paddlemix.processors.text.declared_template import find_chat_template, template_by_markers
from paddlemix.processors.text.known_templates import TEMPLATES
from paddlemix.processors.text.tokenizer import Tokenizer, has_tokenizer, load_tokenizer


def adapter_processor(base: LlavaProcessor | None, adapter: AdapterFiles) -> LlavaProcessor | None:
    """The processor of an adapter.

    Args:
        base: the base's; None if it has no tokenizer.

    Returns:
        | adapter            | processor                                                                           |
        |--------------------|-------------------------------------------------------------------------------------|
        | ours               | its own                                                                             |
        | another program's  | the base's, with the template and pixels that the adapter's files declare, and with |
        |                    | their tokenizer if tokens were added; None if the base has none                     |

    Raises:
        UserError: a value or a file cannot be used.
    """
    if adapter.foreign is None:
        return processor_from_dict(adapter.processor, adapter.directory)
    if base is None:
        return None
    # Pixels first: the template's name in `values` is the base's until the adapter's files declare another.
    values = with_adapter(base.to_dict(), adapter)
    if "chat_template" not in adapter.processor:
        values["chat_template"] = _template(values["chat_template"], adapter.directory)
    return replace(
        base,
        tokenizer=_tokenizer(base.tokenizer, adapter.directory),
        template=read_template(values["chat_template"]),
        image_spec=image_spec_from_dict(values),
        image_markers=bool(values["mm_use_im_start_end"]),
    )


def _template(of_base: object, directory: Path) -> object:
    """The base's template, or another that the markers of a chat template beside the adapter name."""
    # a template that is data, not a name, was declared on purpose: no resemblance overrides it
    is_known = isinstance(of_base, str) and of_base in TEMPLATES
    return template_by_markers(directory, str(of_base)) if is_known and find_chat_template(directory) else of_base


def _tokenizer(base: Tokenizer, directory: Path) -> Tokenizer:
    """The base's tokenizer, or the adapter's if that has tokens which the base's lacks."""
    if not has_tokenizer(directory):
        return base
    # `<image>` and `<pad>` are llava-hf's, which our templates write as a picture and never as text
    own = {
        token: index for token, index in read_added_tokens(directory).items() if token not in (IMAGE_TOKEN, PAD_TOKEN)
    }
    added = sorted(token for token, index in own.items() if base.special_id(token) != index)
    if not added:
        return base
    logger.info("%s: its tokenizer is used, which has added tokens: %s", directory, ", ".join(added[:8]))
    return load_tokenizer(directory)
