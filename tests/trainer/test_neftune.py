"""Noise on the embeddings: how much, where, when, and the same again after a stop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
from paddle import nn

from paddlemix.config.load import load_config
from paddlemix.errors import UserError
from paddlemix.models.attention import SegmentLengths
from paddlemix.trainer.callbacks.progress import Progress
from paddlemix.trainer.neftune import add_neftune, sample_lengths
from paddlemix.trainer.recipe import run_recipe
from tests.tiny_world import LORA, World, changed, reports, weights

WIDTH, ALPHA = 40, 5.0
NOISE = {"neftune": True, "neftune_noise_alpha": ALPHA}
# Two rows of six: samples of 4 tokens and padding, of 6 tokens
POSITIONS = np.array([[0, 1, 2, 3, 0, 0], [0, 1, 2, 3, 4, 5]])
# the same two rows packed: samples of 1 and 3 tokens and padding, of 2 and 4
PACKED_POSITIONS = np.array([[0, 0, 1, 2, 0, 0], [0, 1, 0, 1, 2, 3]])
SEGMENTS, RUNS = np.array([[1, 2, 2, 2, 0, 0], [1, 1, 2, 2, 2, 2]]), (1, 3, 2, 2, 4)


class Given(nn.Layer):
    """Gives back the embeddings that it is called with."""

    def forward(self, embeds: paddle.Tensor, position_ids: paddle.Tensor, *rest: Any, **named: Any) -> paddle.Tensor:
        return embeds


def noise(positions: np.ndarray, *segments: Any, train: bool = True, alpha: float = ALPHA) -> np.ndarray:
    """What is added to embeddings of zeros, [2, 6, WIDTH]."""
    layer = Given()
    add_neftune(layer, alpha)
    layer.train() if train else layer.eval()
    paddle.seed(1)
    return layer(paddle.zeros([2, 6, WIDTH]), paddle.to_tensor(positions), *segments, output_index=None).numpy()


def assert_uniform(values: np.ndarray, length: int) -> None:
    """Source of the bound: Jain et al. 2023, algorithm 1."""
    bound = ALPHA / np.sqrt(length * WIDTH)
    assert 0.9 * bound < np.abs(values).max() <= bound
    assert np.abs(values).mean() == pytest.approx(bound / 2, rel=0.25)
    assert abs(values.mean()) < 0.3 * bound


def test_the_amount_depends_on_the_tokens_of_the_sample_without_padding() -> None:
    values = noise(POSITIONS)
    assert_uniform(values[0, :4], 4)
    assert_uniform(values[1], 6)


@pytest.mark.parametrize("segments", [SegmentLengths(RUNS), paddle.to_tensor(SEGMENTS)], ids=["runs", "ids"])
def test_a_packed_sample_gets_as_much_as_alone(segments: Any) -> None:
    values = noise(PACKED_POSITIONS, segments)
    for row, first, length in ((0, 0, 1), (0, 1, 3), (1, 0, 2), (1, 2, 4)):
        assert_uniform(values[row, first : first + length], length)
    lengths = sample_lengths(paddle.to_tensor(PACKED_POSITIONS), segments).numpy()
    assert lengths[SEGMENTS > 0].tolist() == [1, 3, 3, 3, 2, 2, 4, 4, 4, 4]


def test_nothing_is_added_outside_training_or_without_strength() -> None:
    assert not noise(POSITIONS, train=False).any()
    assert not noise(POSITIONS, alpha=0.0).any()


def test_the_gradient_passes_and_the_dtype_stays() -> None:
    layer = Given()
    add_neftune(layer, ALPHA)
    embeds = paddle.zeros([2, 6, WIDTH], dtype="float64")
    embeds.stop_gradient = False
    found = layer(embeds, paddle.to_tensor(POSITIONS))
    assert found.dtype == paddle.float64
    found.sum().backward()
    np.testing.assert_array_equal(embeds.grad.numpy(), 1.0)


def test_a_run_with_noise_ends_elsewhere_and_evaluates_without(world: World, tmp_path: Path) -> None:
    evaluated = {"evaluation_strategy": "steps", "eval_steps": 1, "learning_rate": 0.0, "max_steps": 1}
    for name, values in (("plain", {}), ("noisy", NOISE), ("nothing", {**NOISE, "neftune_noise_alpha": 0.0})):
        run_recipe(world.config(tmp_path / name, **values))
        run_recipe(world.config(tmp_path / f"{name}_loss", **evaluated, **values))
    assert changed(weights(tmp_path / "plain"), weights(tmp_path / "noisy"))
    assert not changed(weights(tmp_path / "plain"), weights(tmp_path / "nothing"))
    plain, noisy = (tmp_path / f"{name}_loss" for name in ("plain", "noisy"))
    assert reports(plain) != reports(noisy)
    assert reports(plain, "eval_loss") == reports(noisy, "eval_loss")


@pytest.mark.parametrize("more", [{}, {"recompute": True}, {"mixtoken": True}], ids=["plain", "recompute", "packed"])
def test_a_stopped_run_goes_on_with_the_same_noise(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: dict[str, Any]
) -> None:
    run = {"max_steps": 4, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 1, **NOISE, **LORA, **more}
    run_recipe(world.config(tmp_path / "whole", **run))
    parts = world.config(tmp_path / "parts", save_strategy="steps", save_steps=2, **run)
    report = Progress.on_log

    def stop(self: Progress, args: Any, state: Any, control: Any, **named: Any) -> None:
        report(self, args, state, control, **named)
        if state.global_step == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Progress, "on_log", stop)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(parts)
    monkeypatch.undo()
    run_recipe(parts)
    assert not changed(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    assert reports(tmp_path / "whole") == reports(tmp_path / "parts")


def test_a_strength_without_noise_is_an_error() -> None:
    given = ["model_name_or_path=m", "output_dir=o", "neftune_noise_alpha=10"]
    with pytest.raises(UserError, match="neftune_noise_alpha 10 needs neftune true"):
        load_config(None, given)
    assert load_config(None, [*given, "neftune=true"]).neftune_noise_alpha == 10
