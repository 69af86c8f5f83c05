"""The loss against a cross entropy written in numpy, position by position."""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle
import pytest
from paddle.nn import functional

from paddlemix.datasets.collate import collate
from paddlemix.models.llava import LlavaModel
from paddlemix.peft.lora import LoRAConfig, add_lora, lora_parameters
from paddlemix.processors.text.tokenizer import Tokenizer
from paddlemix.sample import IGNORE_INDEX, Example
from paddlemix.trainer import loss as loss_module
from paddlemix.trainer.batches.dataloader import batch_inputs, model_inputs
from paddlemix.trainer.loss import LossModel
from tests.tiny import draw_picture, make_processor, make_sample
from tests.tiny_models import draw, randomise, tiny_llava, tiny_model, tiny_text, tiny_vision

pytestmark = pytest.mark.usefixtures("form")  # in C and in paddle's operators

CONVERSATIONS = (
    ("<image>What is this?", "A red bus, 0.25"),
    ("How many?", "1"),
    ("<image>Where?", "On the mat.", "And now?", "It is still there."),
)
TOLERANCE = 4e-6  # of the largest gradient of a weight


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


def gradients_of(model: LlavaModel, loss: paddle.Tensor) -> dict[str, np.ndarray]:
    model.clear_gradients(set_to_zero=False)
    loss.backward()
    return {name: part.grad.numpy() for name, part in model.named_parameters() if part.grad is not None}


def freeze_the_head(model: LlavaModel) -> None:
    model.lm_head.weight.stop_gradient = True


def adapt_the_head(model: LlavaModel) -> None:
    add_lora(model, LoRAConfig(r=2, modules=("lm_head", "language_model.layers.1.self_attn.q_proj")))
    for name, parameter in model.named_parameters():
        parameter.stop_gradient = not name.endswith(("lora_A", "lora_B", "layers.0.input_layernorm.weight"))
    for name, parameter in lora_parameters(model):
        parameter.set_value(0.3 * draw(*parameter.shape, seed=len(name)))


def leave_the_head_alone(model: LlavaModel) -> None:
    """Everything trains."""


@pytest.mark.parametrize("rows_at_once", [1, 3, 1000])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("prepare", [leave_the_head_alone, freeze_the_head, adapt_the_head])
def test_parts_of_the_positions_give_the_gradients_of_the_whole(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, rows_at_once: int, tied: bool, prepare: Any
) -> None:
    """Against paddle's own cross entropy, which is right up to 64 nats, on the logits of every position."""
    if tied and prepare is not leave_the_head_alone:
        tied = False  # it has no layer of its own then
    _, examples = build(tokenizer)
    text = tiny_text(vocab_size=len(tokenizer), tie_word_embeddings=tied)
    model = randomise(LlavaModel(tiny_llava(text=text, vision=tiny_vision(image_size=28, patch_size=14))))
    prepare(model)
    inputs = model_inputs(batch_inputs(collate(examples, 4)))
    places, targets = inputs["loss_index"], inputs["loss_targets"]
    hidden = model(**{key: value for key, value in inputs.items() if not key.startswith("loss_")})
    logits = paddle.gather(model.logits(hidden).reshape([-1, len(tokenizer)]), places)
    plain = functional.cross_entropy(logits, targets, reduction="sum")
    expected = gradients_of(model, plain * 0.25)
    for name in ("_LOGITS_AT_ONCE", "_LOGITS_WITHOUT_GRADIENT"):
        monkeypatch.setattr(loss_module, name, rows_at_once * len(tokenizer))
    loss, right = LossModel(model)(**inputs)
    assert right.item() == int((logits.argmax(axis=-1) == targets).sum())
    np.testing.assert_allclose(loss.item(), plain.item(), rtol=1e-6)
    found = gradients_of(model, loss * 0.25)
    assert set(found) == set(expected)
    largest = max(np.abs(values).max() for values in expected.values())
    for name, values in expected.items():  # a key's bias has no gradient but rounding
        assert np.abs(found[name] - values).max() <= TOLERANCE * max(np.abs(values).max(), 0.01 * largest), name


def test_without_gradients_the_sum_is_the_same(tokenizer: Tokenizer) -> None:
    model, examples = build(tokenizer)
    inputs = model_inputs(batch_inputs(collate(examples, 4)))
    with_gradients, _ = LossModel(model)(**inputs)
    with paddle.no_grad():
        without, _ = LossModel(model)(**inputs)
    assert without.stop_gradient and without.item() == with_gradients.item()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_show_in_the_sum(tokenizer: Tokenizer, value: float) -> None:
    model, examples = build(tokenizer)
    weight = model.lm_head.weight.numpy()
    weight[0, 3] = value
    model.lm_head.weight.set_value(weight)
    loss, _ = LossModel(model)(**model_inputs(batch_inputs(collate(examples, 4))))
    assert not np.isfinite(loss.item())


def test_how_many_logits_exist_together() -> None:
    """2**26 numbers off the CPU; there 2**24 where gradients of parts are added up, else 2**22; never no row."""
    ways = ((False, False), (True, False), (True, True), (False, True))  # whether parts are added up, on CPU
    found = [loss_module.head_rows_at_once(2**15, adds_parts, on_cpu) for adds_parts, on_cpu in ways]
    assert found == [2**11, 2**11, 2**9, 2**7] and loss_module.head_rows_at_once(2**30, True, False) == 1
