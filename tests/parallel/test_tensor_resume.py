"""A run that is stopped and resumed with and without tensor parallelism is the run that nobody disturbed."""

from __future__ import annotations

from pathlib import Path

from tests.parallel.cluster import Cluster
from tests.parallel.curves import gaps, losses_and_weights
from tests.parallel.test_resume_layouts import Phase, same_states, train, whole_and_parts
from tests.tiny_world import LORA, World, changed, weights

ONE = Phase(1, "", "npu")
SPLIT = Phase(2, "", "npu", tensor=2)
PHASES = (SPLIT, ONE, Phase(2, "stage2", "npu"), SPLIT)
FOUR = {stage: Phase(4, stage, "npu", tensor=2) for stage in ("", "stage1", "stage2")}
SHARED_PHASES = (FOUR["stage2"], FOUR[""], FOUR["stage1"], ONE)


def names(directory: Path) -> list[Path]:
    return sorted(path.relative_to(directory) for path in directory.rglob("*"))


def test_tensor_parallel_goes_on_from_every_layout_and_every_layout_from_it(
    cluster: Cluster, world: World, tmp_path: Path
) -> None:
    whole, parts = whole_and_parts(cluster, world, tmp_path, PHASES, ONE)
    learned = losses_and_weights(parts)
    apart = gaps(losses_and_weights(whole), learned)
    assert max(apart.loss, apart.weight) < 1e-5, apart
    for step in range(2, 2 * len(PHASES) + 1, 2):
        same_states(whole / f"checkpoint-{step}", parts / f"checkpoint-{step}", 1e-6)
    assert names(parts) == names(whole)
    # Nothing is left to train: processes on another device publish the same once more.
    train(cluster, world, tmp_path / "parts", Phase(2, tensor=2), 2 * len(PHASES), {})
    assert not changed(learned.weights, weights(parts))


def test_adapters_and_master_weights_go_on_from_shared_states_too(
    cluster: Cluster, world: World, tmp_path: Path
) -> None:
    half = {"fp16": True, "fp16_opt_level": "O2", "scale_loss": 1024, **LORA, "lora_dropout": 0.0}
    whole, parts = whole_and_parts(cluster, world, tmp_path, SHARED_PHASES, ONE, **half)
    for step in range(2, 2 * len(SHARED_PHASES) + 1, 2):
        one, other = whole / f"checkpoint-{step}", parts / f"checkpoint-{step}"
        assert any(key.endswith("|master_weight") for key in same_states(one, other, 1e-3))
    apart = gaps(losses_and_weights(whole), losses_and_weights(parts))
    assert max(apart.loss, apart.weight) < 1e-2, apart
