"""The loss against a cross entropy written in numpy, position by position."""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle

from paddlemix.datasets.collate import collate
from paddlemix.models.llava import LlavaModel
from paddlemix.processors.tokenizer import Tokenizer
from paddlemix.sample import IGNORE_INDEX, Example
from paddlemix.trainer.loader import batch_inputs
from paddlemix.trainer.loss import LossModel
from paddlemix.trainer.trainer import model_inputs
from tests.tiny import draw_picture, make_processor, make_sample
from tests.tiny_models import tiny_llava, tiny_model, tiny_text, tiny_vision

CONVERSATIONS = (
    ("<image>What is this?", "A red bus, 0.25"),
    ("How many?", "1"),
    ("<image>Where?", "On the mat.", "And now?", "It is still there."),
)


def build(tokenizer: Tokenizer) -> tuple[LlavaModel, list[Example]]:
    vision = tiny_vision(image_size=28, patch_size=14)
    model = tiny_model(tiny_llava(text=tiny_text(vocab_size=len(tokenizer)), vision=vision))
    processor = make_processor(tokenizer)
    examples = []
    for number, turns in enumerate(CONVERSATIONS):
        sample = make_sample(*turns)
        examples.append(processor.encode(sample, [draw_picture(40, 30, number) for _ in sample.images]))
    return model, examples


def losses_one_by_one(model: LlavaModel, example: Example) -> tuple[np.ndarray, int]:
    """Loss of every supervised token of one example, and how many are the likeliest; from full logits."""
    inputs: dict[str, Any] = model_inputs(batch_inputs(collate([example], 4)))
    inputs = {key: value for key, value in inputs.items() if not key.startswith("loss_")}
    with paddle.no_grad():
        scores = model.logits(model(**inputs)).numpy()[0].astype(np.float64)  # [L, V]
    found, right = [], 0
    for position, label in enumerate(example.labels):
        if label != IGNORE_INDEX:
            row = scores[position - 1]
            found.append(np.log(np.exp(row - row.max()).sum()) + row.max() - row[label])
            right += int(row.argmax() == label)
    return np.array(found), right


def test_the_sum_is_that_of_the_supervised_tokens(tokenizer: Tokenizer) -> None:
    model, examples = build(tokenizer)
    expected = [losses_one_by_one(model, example) for example in examples]
    assert len({len(losses) for losses, _ in expected}) == 3  # unequal counts
    loss_sum, right = LossModel(model)(**model_inputs(batch_inputs(collate(examples, 4))))
    np.testing.assert_allclose(loss_sum.item(), sum(losses.sum() for losses, _ in expected), rtol=1e-5)
    assert right.item() == sum(count for _, count in expected)
    assert loss_sum.dtype == paddle.float32 and right.dtype == paddle.int64


def test_right_guesses_are_counted(tokenizer: Tokenizer) -> None:
    model, examples = build(tokenizer)
    batch = collate(examples, 4)
    inputs = model_inputs(batch_inputs(batch))
    with paddle.no_grad():
        hidden = model(**{key: value for key, value in inputs.items() if not key.startswith("loss_")})
        best = model.logits(hidden).numpy().reshape(-1, len(tokenizer))[batch.loss_index].argmax(axis=-1)
    half = len(best) // 2
    targets = np.where(np.arange(len(best)) < half, best, (best + 1) % len(tokenizer))
    _, right = LossModel(model)(**{**inputs, "loss_targets": paddle.to_tensor(targets)})
    assert right.item() == half


def test_the_gradient_reaches_every_part_that_takes_part(tokenizer: Tokenizer) -> None:
    model, examples = build(tokenizer)
    LossModel(model)(**model_inputs(batch_inputs(collate(examples, 4))))[0].backward()
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert without <= {"image_newline", "vision_tower.class_embedding"}  # neither stands in these sequences
