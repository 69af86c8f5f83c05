"""float16 on several processes: a gradient that overflows on one costs all of them the same step, and no other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.parallel.cluster import Cluster
from tests.parallel.rank import Hook
from tests.tiny_world import World, reports

SCALE = 1024.0


@pytest.mark.parametrize(
    ("sharding", "master_grad", "tensor"), [("stage1", False, 1), ("stage2", True, 1), ("", False, 2)]
)
def test_all_leave_out_the_step_in_which_one_overflows(
    cluster: Cluster, world: World, tmp_path: Path, sharding: str, master_grad: bool, tensor: int
) -> None:
    values = {"fp16": True, "fp16_opt_level": "O2", "amp_master_grad": master_grad, "scale_loss": SCALE}
    values |= {"save_strategy": "steps", "save_steps": 4, "adam_epsilon": 1e-4, "device": "npu", "sharding": sharding}
    values |= {"tensor_parallel_degree": tensor}
    hook = Hook("tests.parallel.hooks:nan_gradient", rank=1, values={"step": 2})
    recipe = world.recipe(tmp_path, **values)
    outcome = cluster.run(2, "tools.supervised_finetune", recipe, where="npu", hooks=[hook])
    assert outcome.ok, outcome.told()
    assert sorted(reports(tmp_path / "out")) == [1, 2, 3, 4]
    norms = reports(tmp_path / "out", "grad_norm")
    assert sorted(norms) == [1, 3, 4] and all(1 < norm < 100 for norm in norms.values())  # free of the scale
    state = json.loads((tmp_path / "out" / "checkpoint-4" / "training_state.json").read_text(encoding="utf-8"))
    assert state["scaler"]["scale"] == [SCALE / 2] and state["scaler"]["incr_count"] == 2


def test_as_many_steps_are_left_out_by_any_number_of_processes(cluster: Cluster, world: World, tmp_path: Path) -> None:
    """The scale at which a gradient overflows does not depend on how many processes share the step."""
    values = {"fp16": True, "fp16_opt_level": "O2", "device": "npu", "adam_epsilon": 1e-4, "max_steps": 4}
    losses, norms = [], []
    for processes, tensor in ((1, 1), (4, 1), (4, 2)):
        out = tmp_path / f"{processes} {tensor}"
        factors = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4 * tensor // processes}
        factors |= {"tensor_parallel_degree": tensor}
        outcome = cluster.run(
            processes, "tools.supervised_finetune", world.recipe(out, **values, **factors), where="npu"
        )
        assert outcome.ok, outcome.told()
        losses.append(reports(out / "out"))
        norms.append(sorted(reports(out / "out", "grad_norm")))
    assert norms[0] == norms[1] == norms[2] and 1 not in norms[0]  # the first scale is too large for all
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)
    assert losses[2] == pytest.approx(losses[0], rel=1e-2)
