"""Whether we read a folder of `tests/reference/make_saved_folders.py` as the transformers that saved it does."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import paddle

from paddlemix.checkpoints.load import load_pretrained
from paddlemix.datasets.collate import collate
from paddlemix.generation.ending import ending_of
from paddlemix.processors.images.visual_tokens import visual_token_index
from paddlemix.sample import IGNORE_INDEX, IMAGE_TOKEN_INDEX, Example
from tests.tiny import draw_picture

CASES = ("llava", "llava_next")


def check_folder(folder: Path) -> None:
    """Ids of texts with added tokens, ends, and the last logits of a prompt with a picture are transformers'."""
    expected = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
    loaded = load_pretrained(folder)
    processor = loaded.processor
    assert processor is not None
    begin = processor.tokenizer.bos_token_id
    found = {text: [begin, *processor.tokenizer.encode(text)] for text in expected["texts"]}
    assert found == expected["texts"]
    assert {2, 7} <= ending_of(processor).ids

    width, height, seed = expected["picture"]
    ids = np.array(expected["input_ids"])
    visual = ids == expected["image_token"]
    index = visual_token_index(width, height, processor.image_spec)
    assert visual.sum() == len(index)
    ids = np.where(visual, IMAGE_TOKEN_INDEX, ids)
    tiles = processor.tiles([draw_picture(width, height, seed)])
    example = Example(input_ids=ids, labels=np.full_like(ids, IGNORE_INDEX), pixel_values=tiles, image_index=index)
    batch = collate([example], tokens_per_tile=processor.image_spec.tokens_per_tile)
    with paddle.no_grad():
        hidden = loaded.model(
            paddle.to_tensor(batch.input_ids),
            paddle.to_tensor(batch.position_ids),
            segment_ids=paddle.to_tensor(batch.segment_ids),
            pixel_values=paddle.to_tensor(batch.pixel_values.astype("float32")),
            merge_index=paddle.to_tensor(batch.merge_index),
        )
        logits = loaded.model.logits(hidden).numpy()[0, : len(ids)]
    wanted = np.load(folder / "expected.npz")["logits"]
    np.testing.assert_allclose(logits[-len(wanted) :], wanted, atol=2e-5, rtol=0)
