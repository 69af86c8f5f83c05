"""A gradient that is no number is seen before it is summed over processes."""

from __future__ import annotations

import paddle
from paddle import nn

from paddlemix.trainer.steps.gradient_watch import GradientWatch


def test_it_sees_one_bad_micro_batch_of_a_step_once() -> None:
    layer, watch = nn.Linear(3, 2), GradientWatch()
    watch.look_at(layer)
    assert float(watch.take()) == 0
    for factor in (1.0, float("nan"), 1.0):
        (layer(paddle.ones([1, 3])).sum() * factor).backward()
    assert float(watch.take()) == 1
    layer(paddle.ones([1, 3])).sum().backward()
    assert float(watch.take()) == 0


def test_it_looks_at_the_smallest_trained_weight_of_the_first_decoder_layer() -> None:
    model = nn.Layer()
    model.projector = nn.Linear(1, 1)
    model.language_model = nn.Layer()
    model.language_model.layers = nn.LayerList([nn.Linear(4, 4), nn.Linear(2, 2)])
    watch = GradientWatch()
    watch.look_at(model)
    first = model.language_model.layers[0]
    for layer, seen in ((model.projector, 0), (model.language_model.layers[1], 0), (first, 1)):
        (layer(paddle.ones([1, layer.weight.shape[0]])).sum() * float("inf")).backward()
        assert float(watch.take()) == seen
    first.weight.sum().backward()
    assert float(watch.take()) == 0
