"""Small things that tests are made of: a tokenizer, pictures and samples.  Knows no paddle and no model.

The tokenizer is trained once per session (fixtures `tokenizer_directory` and `tokenizer` in conftest.py).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from paddlemix.datasets.forms.parse import parse_record
from paddlemix.demo.vocabulary import train_tokenizer
from paddlemix.processors.images.image_spec import ImageSpec
from paddlemix.processors.llava import LlavaProcessor
from paddlemix.processors.text.known_templates import get_template
from paddlemix.processors.text.tokenizer import Tokenizer
from paddlemix.sample import Sample

TILE, PATCH = 28, 14  # pixels: 2 x 2 patches, 4 tokens for a tile
PINPOINTS = ((28, 56), (56, 28), (56, 56), (84, 28), (28, 84))  # LLaVA-1.6's grids, a twelfth of their size
PAD_SPEC = ImageSpec(tile_size=TILE, patch_size=PATCH)
ANYRES_SPEC = ImageSpec(
    tile_size=TILE, patch_size=PATCH, aspect_mode="anyres", grid_pinpoints=PINPOINTS, merge_type="spatial_unpad"
)

TEXTS = (
    get_template("vicuna_v1").system,
    "USER: What is the colour of the big bus? ASSISTANT: It is red.",
    "USER: Where is the small cat? ASSISTANT: On the mat, 0.25, 0.33.",
    "USER: How many? ASSISTANT: 1, 2, 3 or 45",
    "USER: 这是什么颜色? ASSISTANT: 红色的公交车。",
    "a>=b c>=d <= -> << >> </ <s> :- ?! (a) [b] {c}",
    "x>=1 y>=2 z>=3 a>>b c>>d",  # the guard `<unk>` of the tokenizer would grow into these
)


def write_tokenizer(directory: Path) -> Path:
    """Trains a tokenizer of the Llama kind and writes its files into `directory`, which comes back."""
    train_tokenizer([text for text in TEXTS for _ in range(4)], directory, vocab_size=480)
    return directory


def make_processor(tokenizer: Tokenizer, spec: ImageSpec = PAD_SPEC, template: str = "vicuna_v1") -> LlavaProcessor:
    """A processor of 28-pixel tiles."""
    return LlavaProcessor(tokenizer=tokenizer, template=get_template(template), image_spec=spec)


def make_sample(*turns: str, images: int | None = None, source: str = "test.json record 0") -> Sample:
    """A sample of questions and answers in turn; `<image>` in a question stands for the next image.

    Args:
        images: number of images; None for as many as `<image>` stand in the questions.
    """
    count = sum(turn.count("<image>") for turn in turns[::2]) if images is None else images
    pairs = [list(pair) for pair in zip(turns[::2], turns[1::2], strict=True)]
    return parse_record({"conversations": pairs, "image": [f"{index}.png" for index in range(count)]}, source)


def draw_picture(width: int, height: int, seed: int) -> Image.Image:
    """The picture that `golden/images.json` names by size and seed: gradients under 12 boxes and ellipses, RGB."""
    rows, columns = np.mgrid[0:height, 0:width]
    across, down = columns * 255 // max(width - 1, 1), rows * 255 // max(height - 1, 1)
    both = (columns + rows) * 255 // max(width + height - 2, 1)
    image = Image.fromarray(np.stack([across, down, both], axis=-1).astype(np.uint8))
    draw, numbers = ImageDraw.Draw(image), np.random.RandomState(seed)
    for index in range(12):
        (left, right), (top, bottom) = sorted(numbers.randint(0, width, 2)), sorted(numbers.randint(0, height, 2))
        red, green, blue = (int(value) for value in numbers.randint(0, 256, 3))
        shape = draw.rectangle if index % 2 else draw.ellipse
        shape([int(left), int(top), int(right), int(bottom)], fill=(red, green, blue))
    return image


def noise_picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture whose every pixel is random, RGB."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))
