"""Sample -> Example: renders the conversation, tokenises it piece by piece and places every visual token.

Ids and labels come out of one pass; the length is exact before the model runs.  Knows no file format and no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from paddlemix.errors import UserError
from paddlemix.log import logger
from paddlemix.processors.conversation import Piece, render
from paddlemix.processors.image import ImageSpec, count_tiles, preprocess_image, visual_token_index
from paddlemix.processors.templates import Template, get_template
from paddlemix.processors.tokenizer import Neighbour, Tokenizer, load_tokenizer
from paddlemix.sample import IGNORE_INDEX, IMAGE_TOKEN_INDEX, NEWLINE_INDEX, Example, Message, Sample

PROCESSOR_FILE = "processor_config.json"


@dataclass(frozen=True, kw_only=True)
class LlavaProcessor:
    """Everything a checkpoint declares about text and images.

    Args:
        tokenizer: of the language model.
        template: how conversations are written; stored with the checkpoint.
        image_spec: how images become tiles and tokens.
    """

    tokenizer: Tokenizer
    template: Template
    image_spec: ImageSpec

    def encode(self, sample: Sample, images: Sequence[Image.Image], max_length: int | None = None) -> Example:
        """Encodes a training sample.

        Args:
            sample: its messages end with an answer.
            images: RGB, one for each of `sample.images`.
            max_length: most tokens, visual ones included; None for no limit.

        Returns:
            The example; where the whole is too long, without its last question-answer pairs.  An image is never cut.

        Raises:
            UserError: the first question and answer alone are too long, nothing is supervised, or the template cannot
                write this conversation; begins with the sample's source.
        """
        try:
            messages, text = self._fit(sample.messages, [image.size for image in images], max_length)
        except UserError as error:
            raise UserError(f"{sample.source}: {error}") from error
        dropped = len(sample.messages) - len(messages)
        if dropped:
            logger.warning("%s: the last %d turns do not fit max_length %s", sample.source, dropped, max_length)
        return replace(text, pixel_values=self._pixels(messages, images), source=sample.source)

    def _fit(
        self, messages: Sequence[Message], sizes: Sequence[tuple[int, int]], max_length: int | None
    ) -> tuple[Sequence[Message], Example]:
        """The messages without the last question-answer pairs that are too much, and their encoding."""
        text = self.encode_text(messages, sizes)
        while max_length is not None and len(text.input_ids) > max_length:
            if sum(message.role == "assistant" for message in messages) == 1:
                raise UserError(
                    f"the first question and answer take {len(text.input_ids)} tokens "
                    f"({len(text.image_index)} of them visual), max_length is {max_length}; "
                    "raise max_length or remove the record"
                )
            messages = messages[:-2]
            text = self.encode_text(messages, sizes)
        if not text.num_supervised:
            raise UserError("nothing to learn, every answer is empty")
        return messages, text

    def encode_prompt(self, messages: Sequence[Message], images: Sequence[Image.Image]) -> Example:
        """Encodes a conversation that ends with a question, ready for its answer; labels mark the answers before."""
        text = self.encode_text(messages, [image.size for image in images], add_generation_prompt=True)
        return replace(text, pixel_values=self._pixels(messages, images))

    def encode_text(
        self, messages: Sequence[Message], sizes: Sequence[tuple[int, int]], add_generation_prompt: bool = False
    ) -> Example:
        """Ids, labels and visual order from image sizes alone: no pixel is read.

        Args:
            sizes: (width, height) of each image that `messages` name, pixels.

        Returns:
            An example without tiles (`pixel_values` [0, 3, H, W]).
        """
        pieces = render(self.template, messages, add_generation_prompt)
        indices = self._visual_indices(pieces, sizes)
        ids, labels = self._encode_pieces(pieces, [len(index) for index in indices])
        size = self.image_spec.tile_size
        return Example(
            input_ids=np.array(ids, dtype=np.int64),
            labels=np.array(labels, dtype=np.int64),
            pixel_values=np.zeros((0, 3, size, size), dtype=np.float32),
            image_index=np.concatenate(indices) if indices else np.zeros(0, dtype=np.int64),
        )

    def _visual_indices(self, pieces: Sequence[Piece], sizes: Sequence[tuple[int, int]]) -> list[np.ndarray]:
        """For each image of the text, in reading order, the feature rows of its tokens; tiles count in that order."""
        indices, first_row = [], 0
        for piece in pieces:
            if piece.image is None:
                continue
            width, height = sizes[piece.image]
            index = visual_token_index(width, height, self.image_spec)
            indices.append(np.where(index == NEWLINE_INDEX, NEWLINE_INDEX, index + first_row))
            first_row += count_tiles(width, height, self.image_spec) * self.image_spec.tokens_per_tile
        return indices

    def _encode_pieces(self, pieces: Sequence[Piece], visual_counts: Sequence[int]) -> tuple[list[int], list[int]]:
        bos = self.tokenizer.bos_token_id
        ids: list[int] = [] if bos is None else [bos]
        labels = [IGNORE_INDEX] * len(ids)
        counts = iter(visual_counts)
        after: Neighbour = "start"
        for piece in pieces:
            piece_ids, after = self._encode_piece(piece, after, counts)
            ids += piece_ids
            labels += piece_ids if piece.supervised else [IGNORE_INDEX] * len(piece_ids)
        return ids, labels

    def _encode_piece(self, piece: Piece, after: Neighbour, counts: Any) -> tuple[list[int], Neighbour]:
        if piece.kind == "image":
            return [IMAGE_TOKEN_INDEX] * next(counts), "start"  # the text behind an image is tokenised on its own
        if piece.kind == "special":
            special = self.tokenizer.special_id(piece.text)
            if special is not None:
                return [special], "special"
        return self.tokenizer.encode(piece.text, after), "text"

    def _pixels(self, messages: Sequence[Message], images: Sequence[Image.Image]) -> np.ndarray:
        """Tiles of the images that `messages` name, in reading order: float32 [N, 3, H, W]."""
        size = self.image_spec.tile_size
        order = [index for message in messages for index in message.image_indices]
        tiles = [preprocess_image(images[index], self.image_spec) for index in order]
        return np.concatenate(tiles) if tiles else np.zeros((0, 3, size, size), dtype=np.float32)

    def to_dict(self) -> dict[str, Any]:
        """The content of `processor_config.json`."""
        spec = self.image_spec
        return {
            "chat_template": self.template.name,
            "image_aspect_ratio": spec.aspect_mode,
            "image_grid_pinpoints": [list(pinpoint) for pinpoint in spec.grid_pinpoints] or None,
            "mm_patch_merge_type": spec.merge_type,
            "mm_vision_select_feature": "cls_patch" if spec.cls_token else "patch",
            "image_size": spec.tile_size,
            "patch_size": spec.patch_size,
            "image_mean": list(spec.mean),
            "image_std": list(spec.std),
        }


def image_spec_from_dict(values: dict[str, Any]) -> ImageSpec:
    """The image part of a `processor_config.json`; keys as `LlavaProcessor.to_dict` writes them.

    Raises:
        KeyError: a key is missing.
        UserError: a value is not allowed.
    """
    pinpoints = values.get("image_grid_pinpoints") or ()
    try:
        return ImageSpec(
            tile_size=int(values["image_size"]),
            patch_size=int(values["patch_size"]),
            aspect_mode=values["image_aspect_ratio"],
            grid_pinpoints=tuple((int(width), int(height)) for width, height in pinpoints),
            merge_type=values.get("mm_patch_merge_type") or "flat",
            mean=tuple(values["image_mean"]),
            std=tuple(values["image_std"]),
            cls_token=values.get("mm_vision_select_feature") == "cls_patch",
        )
    except UserError:
        raise
    except (TypeError, ValueError) as error:
        raise UserError(f"the image settings {values} cannot be read: {error}") from error


def processor_from_dict(values: dict[str, Any], directory: str | Path) -> LlavaProcessor:
    """Builds the processor from a `processor_config.json`'s content and the tokenizer files in `directory`.

    Raises:
        UserError: a key is missing or a value is not allowed.
        MissingFileError: no tokenizer files.
    """
    try:
        spec = image_spec_from_dict(values)
        template = get_template(values["chat_template"])
    except KeyError as error:
        raise UserError(f"{Path(directory) / PROCESSOR_FILE} has no key {error}") from error
    return LlavaProcessor(tokenizer=load_tokenizer(directory), template=template, image_spec=spec)
