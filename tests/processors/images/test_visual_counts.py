"""From image sizes to positions of the language model: counted = indexed = encoded = what the model puts there."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from paddlemix.datasets.collate import collate
from paddlemix.processors.images.image_spec import LLAVA_16_PINPOINTS, ImageSpec
from paddlemix.processors.images.visual_tokens import count_tiles, count_visual_tokens, visual_token_index
from paddlemix.processors.text.tokenizer import Tokenizer
from paddlemix.sample import IMAGE_TOKEN_INDEX, NEWLINE_INDEX, Message, Row
from tests.tiny import make_processor

MESSAGES = (Message(role="user", content=(0, "\nQ")), Message(role="assistant", content=("A",)))
SIDES = (*range(1, 2000, 97), 335, 336, 337, 671, 672, 673, 1008, 1999, 2000)
SPECS = {
    "pad": ImageSpec(),
    "square": ImageSpec(aspect_mode="square"),
    **{
        merge: ImageSpec(aspect_mode="anyres", grid_pinpoints=LLAVA_16_PINPOINTS, merge_type=merge)
        for merge in ("flat", "spatial", "spatial_unpad")
    },
}


@pytest.mark.parametrize("name", SPECS)
def test_counted_indexed_encoded_and_inserted(name: str, tokenizer: Tokenizer) -> None:
    spec = SPECS[name]
    processor = replace(make_processor(tokenizer), image_spec=spec)
    for width in SIDES:
        for height in SIDES:
            counted = count_visual_tokens(width, height, spec)
            assert len(visual_token_index(width, height, spec)) == counted
            example = processor.encode_text(MESSAGES, [(width, height)])
            assert (example.input_ids == IMAGE_TOKEN_INDEX).sum() == len(example.image_index) == counted
            if width % 97 == 1 and height % 97 == 1 and (width + height) % 5:
                continue  # a batch is made of every fifth
            tiles = count_tiles(width, height, spec)
            example = replace(example, pixel_values=np.zeros((tiles, 0), dtype=np.float32))
            batch = collate([Row((example,))], spec.tokens_per_tile)
            assert batch.merge_index is not None
            positions = batch.input_ids.size
            inserted = batch.merge_index[batch.merge_index != np.arange(positions)]
            features = positions + tiles * spec.tokens_per_tile
            assert len(inserted) == batch.num_visual == counted
            assert inserted.min() >= positions and inserted.max() <= features
            assert (inserted == features).sum() == (example.image_index == NEWLINE_INDEX).sum()
