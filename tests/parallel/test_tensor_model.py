"""A model over a tensor group: the numbers and gradients of one process, part by part.

What is tested: paddlemix/parallel/tensor/model.py, paddlemix/parallel/tensor/block_edges.py and
paddlemix/parallel/tensor/split_vocabulary.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from paddlemix.models.configuration import DecoderConfig, LlavaConfig, VisionConfig
from tests.parallel.cluster import Cluster

# Sizes that do not divide by 2, nor by 64: 51 tokens, 27 inner numbers.
SIZES: dict[str, Any] = {
    "vocab_size": 51,
    "hidden_size": 24,
    "intermediate_size": 27,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "biases": {"attention_bias": True},
    "tied": {"tie_word_embeddings": True},
}


def compare(kind: str, lora: bool) -> dict[str, float]:
    """Largest differences between a split model and the whole one, on this rank."""
    import paddle
    import paddle.distributed as dist

    from paddlemix.checkpoints.pretrained import build_model, fill_model, tensor_entry
    from paddlemix.parallel.layout import Layout
    from paddlemix.parallel.tensor.parts import has_partial_gradient, part_of
    from paddlemix.peft.lora import add_lora, linear_names
    from paddlemix.peft.settings import LoRAConfig
    from paddlemix.trainer.loss import LossModel

    dist.init_parallel_env()
    rank, group = dist.get_rank(), dist.get_group(0)
    vision = VisionConfig(image_size=28, **VISION)
    config = LlavaConfig(text=DecoderConfig(**SIZES, **KINDS[kind]), vision=vision)
    layout = Layout(world_size=2, rank=rank, tensor_group=group)

    paddle.seed(1)
    whole = build_model(config, initialise=True)
    random = np.random.RandomState(3)
    for _, parameter in whole.named_parameters():
        parameter.set_value((parameter.numpy() + 0.1 * random.randn(*parameter.shape)).astype("float32"))
    split = build_model(config, layout=layout)
    entries = {name: tensor_entry(parameter) for name, parameter in whole.named_parameters()}
    assert not fill_model(split, entries, "a test")
    if lora:
        for model in (whole, split):
            names = tuple(name for name in linear_names(model) if name.startswith("language_model"))
            paddle.seed(5)
            add_lora(model, LoRAConfig(r=3, modules=names))
        weights = dict(whole.named_parameters())
        for name, parameter in split.named_parameters():
            if "lora_A" in name:  # drawn as one process draws it
                part = part_of(parameter)
                assert (parameter == (weights[name] if part is None else part.cut(weights[name]))).all(), name
            elif "lora_B" in name:
                weights[name].set_value((0.1 * random.randn(*weights[name].shape)).astype("float32"))
        fill_model(split, {name: tensor_entry(parameter) for name, parameter in weights.items()}, "a test")

    ids = paddle.to_tensor(random.randint(0, 51, [2, 9]))
    positions = paddle.arange(9).unsqueeze(0).expand([2, 9]).contiguous()
    pixels = paddle.to_tensor(random.randn(1, 3, 28, 28).astype("float32"))
    merge = np.arange(18)
    merge[1:5] = 18 + np.arange(4)
    index, targets = paddle.arange(2, 15), paddle.to_tensor(random.randint(0, 51, [13]))

    def passes(model: Any) -> tuple[Any, Any, Any]:
        loss, right = LossModel(model)(
            index, targets, positions, input_ids=ids, pixel_values=pixels, merge_index=paddle.to_tensor(merge)
        )
        loss.backward()
        with paddle.no_grad():
            scores = model.logits(model(ids, positions))
        return loss, right, scores

    expected, found = passes(whole), passes(split)
    result = {
        "loss": abs(float(expected[0]) - float(found[0])),
        "right": abs(int(expected[1]) - int(found[1])),
        "logits": float((expected[2] - found[2]).abs().max()),
    }
    gradients = dict(whole.named_parameters())
    for name, parameter in split.named_parameters():
        grad, wanted, part = parameter.grad, gradients[name].grad, part_of(parameter)
        assert (grad is None) == (wanted is None), name
        if grad is None:
            continue
        if has_partial_gradient(parameter):
            dist.all_reduce(grad)
        difference = float((grad - (wanted if part is None else part.cut(wanted))).abs().max())
        result[name] = difference / max(1.0, float(wanted.abs().max()))
    return result


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("kind", KINDS)
def test_equal_to_one_process(cluster: Cluster, kind: str, lora: bool) -> None:
    outcome = cluster.call(2, "tests.parallel.test_tensor_model:compare", kind=kind, lora=lora)
    assert outcome.ok, outcome.told()
    for differences in outcome.results:
        assert {name: value for name, value in differences.items() if value > 1e-5} == {}
        assert len(differences) > 20
