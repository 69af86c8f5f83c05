"""Every kind of adapter: identity at the start, learns, is read again and merged with the same outputs."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
from paddle import nn
from paddle.nn import functional

from paddlemix.checkpoints.adapters.adapter import AdapterSettings, fingerprint, read_adapter
from paddlemix.checkpoints.adapters.base_places import base_reference
from paddlemix.checkpoints.base_model import BaseSpec
from paddlemix.checkpoints.load import apply_adapter, load_base, load_pretrained
from paddlemix.checkpoints.pretrained import Pretrained
from paddlemix.config.load import load_config
from paddlemix.config.schema import RunConfig
from paddlemix.errors import UserError
from paddlemix.models.llava import LlavaModel
from paddlemix.peft.lora import LoRAConfig, add_lora, linear_names, lora_parameters, merge_lora
from paddlemix.peft.quantize import QuantizationConfig, quantize_model
from paddlemix.peft.settings import is_adapter_weight, is_start_value
from paddlemix.trainer.optim import build_optimizer, build_schedule, set_learning_rates
from paddlemix.trainer.trainable import adapter_config, plan_training, set_trainable
from tests.tiny_models import draw, save_adapter, tiny_model
from tests.tiny_world import MAX_GAP, World


@dataclass(frozen=True)
class Kind:
    """One kind of adapter.

    Args:
        keys: of the run.
        suffixes: last parts of the names of its weights.
        base: what the base is quantised to, None for float32.
    """

    keys: dict[str, Any]
    suffixes: set[str] = field(default_factory=lambda: {"lora_A", "lora_B"})
    base: str | None = None


DORA, PISSA = (
    {"lora_A", "lora_B", "lora_magnitude_vector"},
    {"lora_A", "lora_B", "lora_A_start", "lora_B_start"},
)
KINDS = {
    "lora": Kind({}),
    "dropout": Kind({"lora_dropout": 0.2}),
    "all-linear": Kind({"lora_target_modules": "all-linear", "projector": "lora"}),
    "bias": Kind({"lora_bias": "lora_only", "vision_tower": "lora"}),
    "rslora": Kind({"rslora": True}),
    "lora_plus": Kind({"lora_plus_scale": 4.0}),
    "dora": Kind({"use_dora": True}, DORA),
    "dora, dropout": Kind({"use_dora": True, "lora_dropout": 0.2}, DORA),
    "pissa": Kind({"pissa": True}, PISSA),
    "pissa, rslora": Kind({"pissa": True, "rslora": True}, PISSA),
    "tower": Kind({"vision_tower": "lora", "vision_lora_rank": 6, "vision_lora_alpha": 3}),
    "int8": Kind({}, base="int8"),
    "nf4": Kind({"rslora": True}, base="nf4"),
    "nf4, dora": Kind({"use_dora": True}, DORA, base="nf4"),
    "int8, dora, dropout": Kind({"use_dora": True, "lora_dropout": 0.2}, DORA, base="int8"),
}
KEYS = {"lora": True, "lora_rank": 4, "lora_alpha": 6, "lora_dropout": 0.0, "learning_rate": 0.01}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


def settings(kind: Kind) -> RunConfig:
    given = {"model_name_or_path": "model", "output_dir": "out", **KEYS, "lr_scheduler_type": "constant", **kind.keys}
    return load_config(None, [f"{key}={json.dumps(value)}" for key, value in given.items()])


def load(world: World, kind: Kind) -> Pretrained:
    loaded = load_base(BaseSpec(model=str(world.model)))
    if kind.base is not None:
        quantize_model(loaded.model, QuantizationConfig(kind=kind.base))
    return loaded


def adapt(loaded: Pretrained, config: RunConfig) -> LoRAConfig:
    """Adds the adapter that a run asks for."""
    plan = plan_training(loaded.model, config)
    adapter = adapter_config(config, plan)
    add_lora(loaded.model, adapter)
    set_trainable(loaded.model, plan, config)
    return adapter


def scores(model: LlavaModel) -> paddle.Tensor:
    """Logits of two rows with an image's four patches in each."""
    ids = paddle.to_tensor(np.random.RandomState(4).randint(0, 60, [2, 9]))
    places = np.arange(18).reshape(2, 9)
    places[:, 2:6] = 18 + np.arange(8).reshape(2, 4)
    pixels = paddle.to_tensor(draw(2, 3, 28, 28))
    hidden = model(
        ids, paddle.tile(paddle.arange(9).unsqueeze(0), [2, 1]), None, pixels, paddle.to_tensor(places.ravel())
    )
    return model.logits(hidden)


def logits(model: LlavaModel) -> np.ndarray:
    with paddle.no_grad():
        return scores(model).numpy()


def train(model: LlavaModel, config: RunConfig, steps: int = 6) -> list[float]:
    """Some steps on one batch; ends in evaluation mode and gives the losses."""
    paddle.seed(5)
    set_learning_rates(model, config)
    optimizer = build_optimizer(model, config, build_schedule(config, 100))
    labels = paddle.to_tensor(np.random.RandomState(6).randint(0, 60, [18]))
    losses = []
    model.train()
    for _ in range(steps):
        loss = functional.cross_entropy(scores(model).reshape([18, -1]), labels)
        loss.backward()
        optimizer.step()
        optimizer.clear_grad()
        losses.append(float(loss))
    model.eval()
    return losses


def weights(model: LlavaModel) -> dict[str, np.ndarray]:
    return {name: parameter.numpy() for name, parameter in model.named_parameters()}


def test_the_start_changes_no_output(world: World, kind: Kind) -> None:
    loaded = load(world, kind)
    before = logits(loaded.model)
    adapt(loaded, settings(kind))
    exact = not kind.keys.get("use_dora")
    np.testing.assert_allclose(logits(loaded.model), before, rtol=0, atol=0 if exact else MAX_GAP)
    names = {name.rpartition(".")[2] for name, _ in lora_parameters(loaded.model)}
    assert names == kind.suffixes


def test_trains_its_own_weights_is_read_again_and_merges(world: World, kind: Kind, tmp_path: Path) -> None:
    loaded, config = load(world, kind), settings(kind)
    mark = fingerprint(loaded.model)
    adapter = adapt(loaded, config)
    before = weights(loaded.model)
    losses = train(loaded.model, config)
    assert losses[-1] < 0.97 * losses[0]
    moved = {name for name, value in weights(loaded.model).items() if value.tobytes() != before[name].tobytes()}
    assert {name for name in moved if is_adapter_weight(name)} == {
        name for name in before if is_adapter_weight(name) and not is_start_value(name)
    }
    trained = logits(loaded.model)

    reference = base_reference(BaseSpec(model=str(world.model)), tmp_path / "adapter")
    save_adapter(loaded.model, loaded.processor, AdapterSettings(adapter, reference, mark), tmp_path / "adapter")
    files = read_adapter(tmp_path / "adapter")
    assert files.config == adapter
    assert files.tensors().keys() == moved | {name for name in before if is_start_value(name)}
    again = apply_adapter(load(world, kind), files)
    assert logits(again.model).tobytes() == trained.tobytes()
    if kind.base is None:
        assert logits(load_pretrained(tmp_path / "adapter").model).tobytes() == trained.tobytes()

    assert merge_lora(again.model) == len(adapter.modules)
    np.testing.assert_allclose(logits(again.model), trained, atol=MAX_GAP)
    assert not list(lora_parameters(again.model))


def test_an_adapter_fits_the_float_and_the_quantised_model_alike(world: World) -> None:
    plain, coded = load(world, KINDS["lora"]), load(world, KINDS["int8"])
    assert fingerprint(plain.model) == fingerprint(coded.model)
    assert linear_names(plain.model) == linear_names(coded.model)
    for loaded in (plain, coded):
        mark = fingerprint(loaded.model)
        adapt(loaded, settings(KINDS["dora"]))
        assert fingerprint(loaded.model) == mark
    assert linear_names(plain.model) == linear_names(coded.model)


def test_merging_into_a_quantised_base_gives_plain_float32_layers(world: World) -> None:
    loaded = load(world, KINDS["nf4"])
    adapt(loaded, settings(KINDS["nf4"]))
    merge_lora(loaded.model)
    layer = loaded.model.language_model.layers[0].self_attn.q_proj
    assert type(layer) is nn.Linear
    assert layer.weight.dtype == paddle.float32
    assert not layer.training


def test_a_quantised_base_keeps_its_codes_and_the_adapter_is_float32(world: World) -> None:
    loaded = load(world, KINDS["int8"])
    config = settings(KINDS["int8"])
    adapt(loaded, config)
    codes = {name: value.numpy() for name, value in loaded.model.named_buffers()}
    train(loaded.model, config, steps=2)
    assert codes and all(
        value.numpy().tobytes() == codes[name].tobytes() for name, value in loaded.model.named_buffers()
    )
    assert {parameter.dtype for _, parameter in lora_parameters(loaded.model)} == {paddle.float32}


def test_the_towers_rank_and_scale(world: World) -> None:
    loaded = load(world, KINDS["tower"])
    adapter = adapt(loaded, settings(KINDS["tower"]))
    tower, text = (
        loaded.model.vision_tower.layers[0].self_attn.q_proj,
        loaded.model.language_model.layers[0].self_attn.q_proj,
    )
    assert (tower.lora_A.shape[1], tower.scaling) == (6, 0.5)
    assert (text.lora_A.shape[1], text.scaling) == (4, 1.5)
    assert adapter.to_dict()["rank_pattern"] == {"vision_tower": 6}


@pytest.mark.parametrize(
    ("config", "base", "message"),
    [
        ({"pissa": True, "r": 2}, "int8", "pissa needs the weight of '.*q_proj' in floating point"),
        ({"pissa": True, "r": 13}, None, r"pissa: rank 13 is above 12, the smaller side of '.*' \(12 x 12\)"),
    ],
)
def test_a_start_that_cannot_be_computed(config: dict[str, Any], base: str | None, message: str) -> None:
    model = tiny_model()
    if base is not None:
        quantize_model(model, QuantizationConfig(kind=base))
    names = ("language_model.layers.0.self_attn.q_proj", "language_model.layers.0.self_attn.o_proj")
    with pytest.raises(UserError, match=message):
        add_lora(model, LoRAConfig(modules=names, **config))
    assert not list(lora_parameters(model))


def test_no_start_value_is_computed_for_weights_that_are_set_afterwards() -> None:
    model = tiny_model()
    config = LoRAConfig(r=2, pissa=True, modules=("lm_head", "projector.0"))
    add_lora(model, config, [f"lm_head.{name}" for name in PISSA])
    found = {name: bool(parameter.numpy().any()) for name, parameter in lora_parameters(model)}
    assert found == {**{f"lm_head.{n}": False for n in PISSA}, **{f"projector.0.{n}": True for n in PISSA}}
