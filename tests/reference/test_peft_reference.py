"""Every kind of adapter against PEFT from the same weights: start, outputs, gradients, steps of AdamW, merged weights.

Run by `make reference`.  Two linear layers are enough: what a model does around them is compared elsewhere.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import paddle
import pytest
from paddle import nn

from paddlemix.config.load import load_config
from paddlemix.config.schema import RunConfig
from paddlemix.peft.lora import LoRAConfig, add_lora, merge_lora
from paddlemix.trainer.optim import build_optimizer, build_schedule, set_learning_rates
from tests.tiny_models import draw

torch = pytest.importorskip("torch", reason="needs the reference environment: make reference")
peft = pytest.importorskip("peft")
loraplus = pytest.importorskip("peft.optimizers.loraplus")
pytestmark = pytest.mark.reference

SIZES = (64, 48, 40)
RANK, ALPHA, RATIO, RATE, DECAY = 4, 6, 4.0, 0.01, 0.1
GAP = 1e-5
FEW, MANY = 3, 60  # rows: for the larger number the update is added to the weight first
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # ours, PEFT's
    "lora": ({}, {}),
    "rslora": ({"rslora": True}, {"use_rslora": True}),
    "dora": ({"use_dora": True}, {"use_dora": True}),
    "dora, rslora": ({"use_dora": True, "rslora": True}, {"use_dora": True, "use_rslora": True}),
    "pissa": ({"pissa": True}, {"init_lora_weights": "pissa"}),
    "pissa, rslora": ({"pissa": True, "rslora": True}, {"init_lora_weights": "pissa", "use_rslora": True}),
    "rank": ({"rank_pattern": {"second": 2}}, {"rank_pattern": {"second": 2}}),
    "scale": ({"alpha_pattern": {"second": 3.0}}, {"alpha_pattern": {"second": 3.0}}),
}


class Ours(nn.Layer):
    """Two linear layers of paddle."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(*SIZES[:2]), nn.Linear(*SIZES[1:], bias_attr=False)

    def forward(self, inputs: paddle.Tensor) -> paddle.Tensor:
        """[N, 64] -> [N, 40]."""
        return self.second(paddle.tanh(self.first(inputs)))


def theirs_plain() -> Any:
    """The same of torch."""

    class Theirs(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = torch.nn.Linear(*SIZES[:2]), torch.nn.Linear(*SIZES[1:], bias=False)

        def forward(self, inputs: Any) -> Any:
            return self.second(torch.tanh(self.first(inputs)))

    return Theirs()


@dataclass
class Twins:
    """One adapted model in both programs, the same in all weights.

    Args:
        ours, theirs: the models.
        is_dora: whether magnitudes train too.
    """

    ours: Ours
    theirs: Any
    is_dora: bool

    def weights(self) -> dict[str, tuple[paddle.Tensor, Any]]:
        """Name -> an adapter's weight in ours and in theirs, whose matrices are turned."""
        parts = ("lora_A", "lora_B", "lora_magnitude_vector") if self.is_dora else ("lora_A", "lora_B")
        return {
            f"{layer}.{part}": (
                getattr(getattr(self.ours, layer), part),
                getattr(getattr(self.theirs.base_model.model, layer), part)["default"].weight,
            )
            for layer in ("first", "second")
            for part in parts
        }


def build(kind: str) -> Twins:
    """The twins as they begin, but for the adapters' random numbers: ours are PEFT's."""
    ours, theirs = Ours(), theirs_plain()
    for number, layer in enumerate(("first", "second")):
        for name, parameter in getattr(ours, layer).named_parameters():
            values = 0.2 * draw(*parameter.shape, seed=10 * number + parameter.ndim)
            parameter.set_value(values)
            parameter.stop_gradient = True
            getattr(getattr(theirs, layer), name).data = torch.tensor(values.T.copy())
    own, other = KINDS[kind]
    add_lora(ours, LoRAConfig(r=RANK, lora_alpha=ALPHA, modules=("first", "second"), **own))
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["first", "second"], **other)
    twins = Twins(ours, peft.get_peft_model(theirs, config), "use_dora" in own)
    check_start(twins, "pissa" in own)
    for mine, their in twins.weights().values():
        mine.set_value(np.ascontiguousarray(their.detach().numpy().T))
    if "pissa" in own:  # the signs of principal components are free: begin from PEFT's
        for layer in (ours.first, ours.second):
            layer.lora_A_start.set_value(layer.lora_A.numpy())
            layer.lora_B_start.set_value(layer.lora_B.numpy())
    else:
        draw_weights(twins)
    return twins


def check_start(twins: Twins, is_pissa: bool) -> None:
    """What both programs compute for the start."""
    for name, (mine, their) in twins.weights().items():
        layer, _, part = name.partition(".")
        if part == "lora_magnitude_vector":
            np.testing.assert_allclose(mine.numpy(), their.detach().numpy(), rtol=GAP)
        if part == "lora_A" and is_pissa:
            b_mine, b_their = twins.weights()[f"{layer}.lora_B"]
            product = (b_their @ their).detach().numpy().T
            np.testing.assert_allclose(mine.numpy() @ b_mine.numpy(), product, atol=GAP)


def draw_weights(twins: Twins) -> None:
    """Gives the adapters' weights drawn values, so that nothing is zero any more."""
    for number, (mine, their) in enumerate(twins.weights().values()):
        values = mine.numpy() + 0.1 * draw(*mine.shape, seed=30 + number)
        mine.set_value(values)
        their.data = torch.tensor(values.T.copy())


def compare(twins: Twins, rows: int) -> None:
    """Outputs, and the gradients of a loss."""
    inputs, wanted = draw(rows, SIZES[0], seed=50), draw(rows, SIZES[2], seed=51)
    mine = twins.ours(paddle.to_tensor(inputs))
    their = twins.theirs(torch.tensor(inputs))
    np.testing.assert_allclose(mine.numpy(), their.detach().numpy(), atol=GAP)
    ((mine - paddle.to_tensor(wanted)) ** 2).mean().backward()
    ((their - torch.tensor(wanted)) ** 2).mean().backward()
    for name, (ours, theirs) in twins.weights().items():
        np.testing.assert_allclose(ours.grad.numpy(), theirs.grad.numpy().T, atol=GAP, err_msg=name)


@pytest.mark.parametrize("rows", [FEW, MANY])
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients(kind: str, rows: int) -> None:
    twins = build(kind)
    compare(twins, rows)


def settings(**values: Any) -> RunConfig:
    given = {"model_name_or_path": "m", "output_dir": "o", "lora": True, "learning_rate": RATE, "max_grad_norm": 0}
    given |= {"lr_scheduler_type": "constant", "weight_decay": DECAY, **values}
    return load_config(None, [f"{key}={json.dumps(value)}" for key, value in given.items()])


def reference_optimizer(twins: Twins) -> Any:
    """LoRA+ of PEFT; for DoRA plain AdamW, because PEFT's raises the rate of the magnitudes too and we do not."""
    if not twins.is_dora:
        create = loraplus.create_loraplus_optimizer
        return create(twins.theirs, torch.optim.AdamW, lr=RATE, loraplus_lr_ratio=RATIO, loraplus_weight_decay=DECAY)
    matrices = [parameter for _, parameter in twins.weights().values() if parameter.ndim == 2]
    vectors = [parameter for _, parameter in twins.weights().values() if parameter.ndim == 1]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=RATE)


@pytest.mark.parametrize("kind", KINDS)
def test_steps_of_adamw_and_merged_weights(kind: str) -> None:
    twins = build(kind)
    config = settings() if twins.is_dora else settings(lora_plus_scale=RATIO)
    set_learning_rates(twins.ours, config)
    optimizer, reference = build_optimizer(twins.ours, config, build_schedule(config, 10)), reference_optimizer(twins)
    for _ in range(3):
        compare(twins, MANY)
        optimizer.step()
        optimizer.clear_grad()
        reference.step()
        reference.zero_grad()
        for name, (mine, their) in twins.weights().items():
            np.testing.assert_allclose(mine.numpy(), their.detach().numpy().T, atol=GAP, err_msg=name)
    merge_lora(twins.ours)
    merged = twins.theirs.merge_and_unload()
    for layer in ("first", "second"):
        wanted = getattr(merged, layer).weight.detach().numpy().T
        np.testing.assert_allclose(getattr(twins.ours, layer).weight.numpy(), wanted, atol=GAP)
