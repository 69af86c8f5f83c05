"""The logits of one fixed example, by which two forms of a model are compared."""

from __future__ import annotations

import numpy as np
import paddle
from PIL import Image

from paddlemix.checkpoints.pretrained import Pretrained
from paddlemix.datasets.collate import collate
from paddlemix.processors.llava import LlavaProcessor
from paddlemix.sample import Example, Message, Sample


def sample_logits(loaded: Pretrained) -> np.ndarray:
    """Scores of every position of one example with an image; without one for a model that cannot see.

    Args:
        loaded: has a processor.

    Returns:
        float32 [L, V].
    """
    assert loaded.processor is not None
    has_tower = loaded.model.config.vision is not None
    batch = collate([_example(loaded.processor, has_tower)], loaded.model.config.tokens_per_tile)
    arrays = {"pixel_values": batch.pixel_values, "merge_index": batch.merge_index}
    with paddle.no_grad():
        hidden = loaded.model(
            paddle.to_tensor(batch.input_ids),
            paddle.to_tensor(batch.position_ids),
            **{name: paddle.to_tensor(array) for name, array in arrays.items() if array is not None},
        )
        return loaded.model.logits(hidden)[0].astype("float32").numpy()


def _example(processor: LlavaProcessor, with_image: bool) -> Example:
    # An image alone is a question too: the answer then depends on the tower.
    question = (0,) if with_image else ("What is 2 and 3?",)
    messages = (Message(role="user", content=question), Message(role="assistant", content=("Five red circles.",)))
    size = processor.image_spec.tile_size
    # Noise, because a plain picture makes all patches alike.
    noise = np.random.RandomState(0).randint(0, 256, (size, size, 3)).astype(np.uint8)
    images = [Image.fromarray(noise)] if with_image else []
    sample = Sample(messages=messages, images=("noise",) * len(images), source="the example of the comparison")
    return processor.encode(sample, images)
