"""One record as `paddlemix show-data` shows it: encoded, as images and stretches of text, in words.

Ids and labels are the processor's own; nothing is encoded a second way.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from paddlemix.cache import replacing
from paddlemix.datasets.forms.parse import parse_record
from paddlemix.datasets.images.decode import image_size, load_image
from paddlemix.datasets.images.sources import ImageSettings
from paddlemix.datasets.records.record_file import RecordFile
from paddlemix.errors import UserError
from paddlemix.outputs import Needed, Output, check_not_in_model, check_output
from paddlemix.paths import is_address
from paddlemix.processors.images.boxes import write_boxes
from paddlemix.processors.images.drawing import draw_tiles
from paddlemix.processors.images.tiles import preprocess_image
from paddlemix.processors.images.visual_tokens import count_tiles, count_visual_tokens, grid_shape
from paddlemix.processors.llava import LlavaProcessor
from paddlemix.processors.text.conversation import prompt_text, render
from paddlemix.processors.text.example_text import Style, escape_control, marked_text, one_token_an_image
from paddlemix.processors.text.template import with_image_markers
from paddlemix.sample import Example, Message, Sample


@dataclass(frozen=True, kw_only=True)
class ImageView:
    """An image of a record, in reading order.

    Args:
        path: of the image.
        size: (width, height), pixels.
        tiles, tokens: how many it becomes.
    """

    path: str
    size: tuple[int, int]
    tiles: int
    tokens: int


@dataclass(frozen=True, kw_only=True)
class View:
    """A record and its encoding.

    Args:
        index: its number in the file.
        sample: as it was read.
        example: without tiles; what did not fit is dropped.
        prompt: the text, with `<image>` in place of an image.
        images: those that were kept.
        dropped: turns that did not fit.
    """

    index: int
    sample: Sample
    example: Example
    prompt: str
    images: tuple[ImageView, ...]
    dropped: int


def read_view(
    records: RecordFile,
    index: int,
    image_root: str | None,
    processor: LlavaProcessor,
    settings: ImageSettings,
    max_length: int | None,
) -> View:
    """Reads and encodes a record; of images the headers.

    Raises:
        UserError: the record, an image or the conversation cannot be used, or it is too long; names the record.
    """
    source = f"{records.path} record {index}"
    sample = parse_record(records[index], source, image_root)
    try:
        sizes = [image_size(path, settings) for path in sample.images]
    except UserError as error:
        raise type(error)(f"{source}: {error}") from error
    messages, example = _fitting(sample, sizes, processor, max_length)
    spec = processor.image_spec
    template = with_image_markers(processor.template) if processor.image_markers else processor.template
    images = [
        ImageView(
            path=sample.images[number],
            size=sizes[number],
            tiles=count_tiles(*sizes[number], spec),
            tokens=count_visual_tokens(*sizes[number], spec),
        )
        for message in messages
        for number in message.image_indices
    ]
    return View(
        index=index,
        sample=sample,
        example=example,
        prompt=prompt_text(render(template, write_boxes(messages, sizes, spec))),
        images=tuple(images),
        dropped=len(sample.messages) - len(messages),
    )


def _fitting(
    sample: Sample, sizes: Sequence[tuple[int, int]], processor: LlavaProcessor, max_length: int | None
) -> tuple[Sequence[Message], Example]:
    """The messages that training keeps, and their encoding: `measure` knows how long it is."""
    tokens, _ = processor.measure(sample, sizes, max_length)
    messages: Sequence[Message] = sample.messages
    example = processor.encode_text(messages, sizes)
    # `measure` counts without encoding; here the messages themselves are needed.
    while len(example.input_ids) > tokens:
        messages = messages[:-2]
        example = processor.encode_text(messages, sizes)
    return messages, example


def to_json(view: View) -> dict[str, Any]:
    """What `--json` prints: ids and labels with one -200 and -100 for each image, as in the reference."""
    ids, labels = one_token_an_image(view.example, [image.tokens for image in view.images])
    return {
        "index": view.index,
        "prompt": view.prompt,
        "input_ids": ids,
        "labels": labels,
        "num_image_tokens": sum(image.tokens for image in view.images),
        "num_tiles": sum(image.tiles for image in view.images),
    }


def describe(view: View, processor: LlavaProcessor, style: Style, files: Sequence[Path]) -> str:
    """A record for people to read: name, lengths, images, text."""
    example, visual = view.example, sum(image.tokens for image in view.images)
    lines = [
        view.sample.source,
        f"  {len(example.input_ids)} tokens: {len(example.input_ids) - visual} of text, {visual} visual; "
        f"{example.num_supervised} trained",
    ]
    if view.dropped:
        lines.append(f"  the last {view.dropped} turns do not fit and are dropped")
    for image, file in itertools.zip_longest(view.images, files):
        written = f"; tiles in {file}" if file is not None else ""
        tiles = f"{image.tiles} tile{'s' * (image.tiles > 1)}"
        name = image.path if len(image.path) <= 200 else f"{image.path[:40]}..."
        lines.append(f"  {name}: {image.size[0]}x{image.size[1]}, {tiles}, {image.tokens} tokens{written}")
    text = marked_text(example, [image.tokens for image in view.images], processor.tokenizer, style)
    return "\n".join([*map(escape_control, lines), *(f"  | {line}" for line in text.split("\n"))])


def write_pictures(
    view: View, processor: LlavaProcessor, settings: ImageSettings, target: tuple[Path, bool]
) -> list[Path]:
    """Writes a PNG of the tiles of each image into a folder, which is made if missing.

    Args:
        target: the folder, and whether another file of a picture's name there is replaced.

    Raises:
        UserError: an image cannot be read, the folder cannot be written, or another file has a picture's name.
    """
    (folder, overwrite), spec, files = target, processor.image_spec, []
    needed = [Needed("the image", Path(image.path), "file") for image in view.images if not is_address(image.path)]
    for number, image in enumerate(view.images):
        path = folder / f"{view.index:06d}_{number}.png"
        try:
            pixels = preprocess_image(load_image(image.path, settings), spec)
        except UserError as error:
            raise type(error)(f"{view.sample.source}: {error}") from error
        picture = draw_tiles(np.asarray(pixels), grid_shape(*image.size, spec), spec)
        check_output(Output("--output", path, "file"), needed)
        _save(picture, path, overwrite)
        files.append(path)
    return files


def _save(picture: Image.Image, path: Path, overwrite: bool) -> None:
    encoded = io.BytesIO()
    picture.save(encoded, "PNG")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # The same picture again is not a conflict, so the command can be repeated.
        if path.exists() and not overwrite and path.read_bytes() != encoded.getvalue():
            raise UserError(
                f"--output: {path} exists and is a different picture; choose another folder, or give --overwrite"
            )
        if path.exists():
            check_not_in_model(Output("--output", path, "file"))
        with replacing(path) as temporary:
            temporary.write_bytes(encoded.getvalue())
    except OSError as error:
        raise UserError(f"--output: {path} cannot be written: {error.strerror or error}") from error
