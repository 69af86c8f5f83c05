"""Weights that exist only while their layer runs, as with sharding stage 3, are used at no other time.

Hooks stand for what several processes do: a weight is NaN except between its layer's forward hooks.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle
import pytest
from paddle import nn

from paddlemix.datasets.collate import collate
from paddlemix.models.llava import LlavaModel
from paddlemix.peft.lora import LoRAConfig, add_lora, linear_names
from paddlemix.peft.quantize import QuantizationConfig, quantize_model
from paddlemix.processors.text.tokenizer import Tokenizer
from paddlemix.trainer import loss as loss_module
from paddlemix.trainer.batches.dataloader import batch_inputs, model_inputs
from paddlemix.trainer.loss import LossModel
from tests.tiny import draw_picture, make_processor, make_sample
from tests.tiny_models import tiny_llava, tiny_model, tiny_text, tiny_vision

pytestmark = pytest.mark.usefixtures("form")  # in C and in paddle's operators

MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "biases": {"attention_bias": True},
    "tied": {"tie_word_embeddings": True},
}


def make_model(tokenizer: Tokenizer, **text: Any) -> LlavaModel:
    vision = tiny_vision(image_size=28, patch_size=14)
    return tiny_model(tiny_llava(text=tiny_text(vocab_size=len(tokenizer), **text), vision=vision))


def make_inputs(tokenizer: Tokenizer, *turns: str) -> dict[str, Any]:
    sample = make_sample(*(turns or ("<image>What is this?", "A red bus, 0.25")))
    processor = make_processor(tokenizer)
    example = processor.encode(sample, [draw_picture(40, 30, 1) for _ in sample.images])
    return model_inputs(batch_inputs(collate([example], 4)))


class Shared:
    """Makes the weights of a model NaN outside of their layers' calls; `calls` are the layers that ran, in order."""

    def __init__(self, model: nn.Layer) -> None:
        self.calls: list[str] = []
        self._whole = {}
        for name, layer in model.named_sublayers(include_self=True):
            own = [weight for weight in layer.parameters(include_sublayers=False) if weight.ndim > 1]
            if own:
                self._whole[name] = [(weight, weight.numpy()) for weight in own]
                layer.register_forward_pre_hook(lambda _, inputs, name=name: self._open(name))
                layer.register_forward_post_hook(lambda _, inputs, outputs, name=name: self._close(name))
                self._close(name)

    def _open(self, name: str) -> None:
        self.calls.append(name)
        for weight, whole in self._whole[name]:
            with paddle.no_grad():
                weight.set_value(whole)

    def _close(self, name: str) -> None:
        for weight, whole in self._whole[name]:
            with paddle.no_grad():
                weight.set_value(np.full_like(whole, np.nan))


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("adapted", ["", "lora", "dora", "quantised lora"])
def test_no_weight_is_used_outside_of_its_layer(tokenizer: Tokenizer, kind: str, adapted: str) -> None:
    model, inputs = make_model(tokenizer, **MODELS[kind]), make_inputs(tokenizer)
    if "quantised" in adapted:
        quantize_model(model, QuantizationConfig(kind="int8"))
    if adapted:
        names = tuple(linear_names(model))
        add_lora(model, LoRAConfig(r=2, lora_alpha=4, modules=names, use_dora=adapted == "dora"))
    model.train()
    expected = LossModel(model)(**inputs)
    Shared(model)
    for mode in (paddle.enable_grad, paddle.no_grad):
        with mode():
            loss_sum, right = LossModel(model)(**inputs)
        np.testing.assert_allclose(loss_sum.item(), expected[0].item(), rtol=1e-5)
        assert right.item() == expected[1].item()


@pytest.mark.parametrize("kind", MODELS)
def test_the_number_of_positions_decides_no_call(
    tokenizer: Tokenizer, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processes that gather weights together have to make the same calls, whatever each one's samples are."""
    model = make_model(tokenizer, **MODELS[kind])
    shared = Shared(model)
    monkeypatch.setattr(loss_module, "head_rows_at_once", lambda *sizes: 2)
    calls = []
    for turns in (("<image>What is this?", "A red bus, 0.25"), ("<image>How many?", "1")):
        shared.calls.clear()
        LossModel(model)(**make_inputs(tokenizer, *turns))
        calls.append(list(shared.calls))
    shared.calls.clear()
    nothing = paddle.zeros([0], dtype="int64")
    loss_sum, right = LossModel(model)(**{**make_inputs(tokenizer), "loss_index": nothing, "loss_targets": nothing})
    assert (loss_sum.item(), right.item()) == (0.0, 0)
    assert calls[0] == calls[1] == shared.calls
