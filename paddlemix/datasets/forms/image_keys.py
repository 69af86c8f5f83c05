"""The images that a record names: keys `image` and `images`, content parts, and where relative paths begin.

Opens none of them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paddlemix.datasets.images.sources import is_data_uri, is_url
from paddlemix.errors import UserError

_ADDRESS_KEYS = ("url", "path")
_KEYS = ("image", "images")


@dataclass(frozen=True)
class PlacedImage:
    """An image in a turn.

    Args:
        address: its path, URL or `data:` URI; None for the next one of the record's own list.
    """

    address: str | None = None


PLACE = PlacedImage()


def image_addresses(record: Mapping[str, Any]) -> list[str]:
    """The images of a record's `image` or `images`, in order; none where both are absent or null.

    Raises:
        UserError: a value is neither an address nor a list of them, or both keys name images and differ.
    """
    found = [(key, _list_of(record[key], key)) for key in _KEYS if record.get(key) is not None]
    # the same images under both keys are harmless, and common where one program reads one key each
    if len(found) == 2 and found[0][1] != found[1][1]:
        raise UserError("'image' and 'images' name different images; keep one of them")
    return found[0][1] if found else []


def _list_of(value: Any, key: str) -> list[str]:
    return [image_address(item, key) for item in (value if isinstance(value, list) else [value])]


def image_address(value: Any, where: str) -> str:
    """One image: an address, or an object with `url` or `path`.

    Args:
        value: as the record has it.
        where: what holds it, for messages.

    Raises:
        UserError: it is neither.
    """
    if isinstance(value, dict):
        # what Parquet exports of Hugging Face's `Image` feature have
        if value.get("bytes") is not None:
            raise UserError(f"{where} has its image as 'bytes', which JSON cannot hold; use a path or a data: URI")
        value = next((value[key] for key in _ADDRESS_KEYS if value.get(key) is not None), value)
    if not isinstance(value, str) or not value:
        raise UserError(f"{where} is {json.dumps(value)[:80]}, expected a path or URL, or a list of them")
    # `open` would raise a ValueError that names no record
    if "\0" in value:
        raise UserError(f"{where} is {json.dumps(value)[:80]}; a path has no NUL character")
    return value


def folders_of(addresses: Iterable[str]) -> set[str]:
    """The folders that files among these addresses are in, as they are spelled; "" for a name alone."""
    return {os.path.dirname(address) for address in addresses if not (is_url(address) or is_data_uri(address))}


def locate(address: str, image_root: str | Path | None) -> str:
    """The address as it can be opened: a relative path follows `image_root`, where there is one."""
    # not resolved: links and `..` stay as the user wrote them, so that messages repeat that
    if image_root is None or is_url(address) or is_data_uri(address) or os.path.isabs(address):
        return address
    return os.path.join(image_root, address)
