"""What `tests.npu.probes` prints of answers to a batch: rows of several lengths that end one after the other."""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle

from paddlemix.generation.generate import generate
from paddlemix.generation.sampling import GenerationSettings
from paddlemix.models.configuration import DecoderConfig, LlavaConfig
from paddlemix.models.llava import LlavaModel
from paddlemix.sample import Example

LENGTHS, ENDS, VOCABULARY = (5, 12, 9, 7), {5, 17, 33, 40, 41, 42, 43}, 97
SETTINGS = {
    "greedy": GenerationSettings(max_new_tokens=30),
    "drawn": GenerationSettings(max_new_tokens=12, temperature=0.7, seed=1),
    "penalty": GenerationSettings(max_new_tokens=10, repetition_penalty=1.2),
    "beams": GenerationSettings(max_new_tokens=6, num_beams=3),
}


def answers() -> dict[str, Any]:
    """Ids by settings, without a window and with one; float32, on the current device."""
    found = {}
    for window in (None, 6):
        random = np.random.default_rng(3)
        model = _model(window, random)
        prompts = [_prompt(random.integers(3, VOCABULARY, length)) for length in LENGTHS]
        for name, settings in SETTINGS.items():
            found[f"{name} {window}"] = generate(model, prompts, settings, end_ids=ENDS)
    return found


def _model(window: int | None, random: np.random.Generator) -> LlavaModel:
    text = DecoderConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
        sliding_window=window,
    )
    model = LlavaModel(LlavaConfig(text=text))
    for parameter in model.parameters():
        parameter.set_value(paddle.to_tensor(random.standard_normal(parameter.shape).astype(np.float32) * 0.4))
    model.eval()
    return model


def _prompt(ids: np.ndarray) -> Example:
    nothing = np.zeros(0, dtype=np.int64)
    pixels = np.zeros([0, 3, 28, 28], dtype=np.float32)
    return Example(input_ids=ids, labels=ids, pixel_values=pixels, image_index=nothing)
