"""The tiny model of the demo: LLaVA's real architecture at 1.5 million parameters, with random weights."""

from __future__ import annotations

from pathlib import Path

from paddlemix.checkpoints.pretrained import Pretrained, build_model, save_model
from paddlemix.device import set_seed
from paddlemix.models.configuration import DecoderConfig, LlavaConfig, VisionConfig
from paddlemix.processors.images.image_spec import ImageSpec
from paddlemix.processors.llava import LlavaProcessor
from paddlemix.processors.text.known_templates import get_template
from paddlemix.processors.text.tokenizer import load_tokenizer

IMAGE_SIZE, PATCH_SIZE, WIDTH = 32, 8, 128
TEMPLATE = "mistral_instruct"  # has no system text, which would be half of every row
_INITIALIZER_RANGE = (
    WIDTH**-0.5
)  # the usual 0.02 is meant for widths of thousands; with it images are learned much later here


def tiny_config(vocab_size: int) -> LlavaConfig:
    """Sizes of the demo's model: CLIP 4 x 128 at 32 px with patches of 8, decoder 3 x 128."""
    return LlavaConfig(
        text=DecoderConfig(
            vocab_size=vocab_size,
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            # Sizes that learn the scenes in minutes on two cores.
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=512,
            initializer_range=_INITIALIZER_RANGE,
        ),
        vision=VisionConfig(
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=4,
            num_attention_heads=4,
            image_size=IMAGE_SIZE,
            patch_size=PATCH_SIZE,
            initializer_range=_INITIALIZER_RANGE,
        ),
        # The last layer: a tower of four has none to spare.
        mm_vision_select_layer=-1,
    )


def write_start_model(tokenizer_directory: Path, directory: Path, seed: int = 0) -> None:
    """Writes the untrained model as a self-contained model directory.

    Args:
        tokenizer_directory: holds the tokenizer's files.
        directory: replaced if it exists.
    """
    # Weights are drawn from paddle's generator.
    set_seed(seed)
    tokenizer = load_tokenizer(tokenizer_directory)
    processor = LlavaProcessor(
        tokenizer=tokenizer,
        template=get_template(TEMPLATE),
        # every picture is square and of the tile's size, so nothing is padded or resized
        image_spec=ImageSpec(tile_size=IMAGE_SIZE, patch_size=PATCH_SIZE, aspect_mode="pad"),
    )
    model = build_model(tiny_config(len(tokenizer)), initialise=True)
    save_model(Pretrained(model, processor, directory), directory)
