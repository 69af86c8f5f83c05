"""A run that is stopped and resumed in one layout after the other is the run that nobody disturbed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from paddlemix.checkpoints.files.weight_files import read_json
from paddlemix.trainer.resuming.checkpoint_folders import STATE_FILE, optimizer_files
from tests.parallel.cluster import Cluster, Where
from tests.parallel.curves import gaps, losses_and_weights
from tests.parallel.rank import Hook
from tests.tiny_world import World, changed, weights

EVERY = {
    "adam_epsilon": 1e-4,
    "per_device_train_batch_size": 1,
    "save_strategy": "steps",
    "save_steps": 2,
    "evaluation_strategy": "steps",
    "eval_steps": 2,
    # The largest loss is the first, so that each phase ends with weights that it has not trained.
    "load_best_model_at_end": True,
    "greater_is_better": True,
}


@dataclass(frozen=True)
class Phase:
    """Some steps of a run in one layout.

    Args:
        ranks: processes.
        sharding: "" or a stage.
        tensor: processes that compute one model together.
    """

    ranks: int
    sharding: str = ""
    where: Where = "cpu"
    tensor: int = 1


PHASES = (
    Phase(2, "stage1"),
    Phase(1),
    Phase(2, "stage2", "npu"),
    Phase(2, "stage3", "npu"),
    Phase(1),
)
HALF_PHASES = (Phase(2, "stage3", "npu"), Phase(2, "stage2", "npu"), Phase(1, "", "npu"))


def test_every_layout_goes_on_from_every_other(cluster: Cluster, world: World, tmp_path: Path) -> None:
    whole, parts = whole_and_parts(cluster, world, tmp_path, PHASES)
    apart = gaps(losses_and_weights(whole), losses_and_weights(parts))
    assert max(apart.loss, apart.weight) < 1e-5, apart
    for step in range(2, 2 * len(PHASES) + 1, 2):
        same_states(whole / f"checkpoint-{step}", parts / f"checkpoint-{step}", 1e-6)


def test_master_weights_and_loss_scale_go_on_too(cluster: Cluster, world: World, tmp_path: Path) -> None:
    half = {"fp16": True, "fp16_opt_level": "O2", "scale_loss": 1024}
    whole, parts = whole_and_parts(cluster, world, tmp_path, HALF_PHASES, **half)
    for step in range(2, 2 * len(HALF_PHASES) + 1, 2):
        one, other = whole / f"checkpoint-{step}", parts / f"checkpoint-{step}"
        scales = [read_json(path / STATE_FILE)["scaler"] for path in (one, other)]
        assert scales[0] == scales[1] and scales[0]["incr_count"] == step
        assert any(key.endswith("|master_weight") for key in same_states(one, other, 1e-3))
    learned = losses_and_weights(parts)
    apart = gaps(losses_and_weights(whole), learned)
    assert max(apart.loss, apart.weight) < 1e-2, apart
    # Nothing is left to train: another layout publishes the same once more.
    train(cluster, world, tmp_path / "parts", HALF_PHASES[0], 2 * len(HALF_PHASES), half)
    assert not changed(learned.weights, weights(parts))


def test_half_precision_without_master_weights_goes_on_too(cluster: Cluster, world: World, tmp_path: Path) -> None:
    """Paddle's stages 2 and 3 make float32 copies there, which AdamW does not use."""
    whole, parts = whole_and_parts(cluster, world, tmp_path, HALF_PHASES, dtype="bfloat16", fp16_opt_level="O1")
    for step in range(2, 2 * len(HALF_PHASES) + 1, 2):
        kinds = {key.split("|")[1] for key in optimizer_files(parts / f"checkpoint-{step}")}
        assert kinds == {"moment1", "moment2", "beta1_pow_acc", "beta2_pow_acc"}
        near_moments(whole / f"checkpoint-{step}", parts / f"checkpoint-{step}", 0.2)  # seen is 0.04
    apart = gaps(losses_and_weights(whole), losses_and_weights(parts))
    # Two parts in 256 of the loss; seen are 0.007, and one last bit of a weight.
    assert apart.loss < 2e-2 and apart.weight < 1e-2, apart


def whole_and_parts(
    cluster: Cluster, world: World, folder: Path, phases: Sequence[Phase], at_once: Phase | None = None, **changes: Any
) -> tuple[Path, Path]:
    """What a run left that was made at once, in the layout of the last phase unless another is given, and what one left
    of two steps in each phase."""
    train(cluster, world, folder / "whole", at_once or phases[-1], 2 * len(phases), changes)
    for number, phase in enumerate(phases, start=1):
        train(cluster, world, folder / "parts", phase, 2 * number, changes)
        out = folder / "parts" / "out"
        assert not changed(weights(out / "checkpoint-2"), weights(out)), f"{phase} did not end with the best weights"
    return folder / "whole" / "out", folder / "parts" / "out"


def train(cluster: Cluster, world: World, folder: Path, phase: Phase, steps: int, changes: Mapping[str, Any]) -> None:
    """Trains up to a step, with 4 samples in each."""
    changes = {**changes, "gradient_accumulation_steps": 4 * phase.tensor // phase.ranks, "device": phase.where}
    if phase.tensor > 1:
        changes["tensor_parallel_degree"] = phase.tensor
    if phase.sharding:
        changes["sharding"] = phase.sharding
    hooks = [Hook("tests.parallel.hooks:slice_weights", None, {"largest": 64})] if phase.sharding == "stage3" else []
    recipe = world.recipe(folder, max_steps=steps, **EVERY, **changes)
    outcome = cluster.run(phase.ranks, "tools.supervised_finetune", recipe, where=phase.where, hooks=hooks)
    assert outcome.ok, outcome.told()
    if phase.sharding == "stage3":  # weights were in slices, also where nothing was left to train
        assert any(name.startswith("all_gather:float") for name in outcome.collectives[1]), outcome.collectives


def near_moments(one: Path, other: Path, bound: float) -> None:
    """The moments of two checkpoints are no further apart than a part of their size: 0 for equal ones, 1 for zeros."""
    first, second = optimizer_files(one), optimizer_files(other)
    assert list(first) == list(second)
    for kind in ("moment1", "moment2"):
        keys = [key for key in first if key.endswith(f"|{kind}")]
        values, others = (np.concatenate([file[key].read().ravel() for key in keys]) for file in (first, second))
        apart = float(np.linalg.norm(others - values) / np.linalg.norm(values))
        assert apart < bound, (kind, apart)


def same_states(one: Path, other: Path, tolerance: float) -> list[str]:
    """Compares weights and optimiser's states of two checkpoints of the same step; returns the keys of the states."""
    first, second = optimizer_files(one), optimizer_files(other)
    assert list(first) == list(second)
    for key, entry in first.items():
        assert (entry.dtype, entry.shape) == (second[key].dtype, second[key].shape)
        np.testing.assert_allclose(second[key].read(), entry.read(), rtol=1e-3, atol=tolerance, err_msg=key)
    learned = weights(other)
    for name, value in weights(one).items():
        np.testing.assert_allclose(learned[name], value, rtol=0, atol=10 * tolerance, err_msg=name)
    return list(first)
