"""Before the first step: one process decides where a run resumes, all see and read the same, one error ends all."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from paddlemix.errors import OtherProcessError, UserError
from paddlemix.trainer.recipe import run_recipe
from tests.parallel.cluster import Cluster
from tests.parallel.rank import Hook
from tests.tiny_world import World

COMMAND = "tools.supervised_finetune"
HOOKS = "tests.parallel.test_joint_start"


def enter(folder: str) -> None:
    """A hook: a process on a node whose disk has other files under the same relative names."""
    from paddlemix.checkpoints.files import directories

    directories._PATIENCE = 0.0
    os.chdir(folder)


def use(file: str) -> None:
    """A hook: a process that was started with another `dataset`."""
    from paddlemix.trainer import recipe

    begin = recipe.begin_processes

    def begin_with(config: Any, device: str) -> Any:
        config.dataset["train"] = [{**config.dataset["train"][0], "data_files": file}]
        return begin(config, device)

    recipe.begin_processes = begin_with


def spoil_model(message: str) -> None:
    """A hook: loading the base fails."""
    from paddlemix.trainer import recipe

    def fail(*_: Any) -> None:
        raise UserError(message)

    recipe.load_start = fail


def spoil_share(message: str) -> None:
    """A hook: this process cannot read its share of the checkpoint."""
    from paddlemix.trainer.resuming import restoring

    def fail(*_: Any) -> None:
        raise UserError(message)

    restoring.load_weights = fail


def agreeing(failing: dict[str, str]) -> list[str]:
    """Run on every process: what each hears of failures, by rank."""
    import paddle.distributed as dist

    from paddlemix.parallel.collectives import agree, decided_by_first, own_rank

    dist.init_parallel_env()
    heard = [str(decided_by_first(lambda: f"by {own_rank()}"))]
    report = failing.get(str(own_rank()))
    try:
        agree(None if report is None else UserError(report))
    except UserError as error:
        heard += [type(error).__name__, str(error)]
    return heard


def test_a_failure_is_told_by_the_first_that_has_it(cluster: Cluster) -> None:
    outcome = cluster.call(3, f"{HOOKS}:agreeing", failing={"1": "no file", "2": "no file"})
    assert outcome.ok, outcome.told()
    other = ["by 0", OtherProcessError.__name__, "process 1 failed: no file"]
    assert outcome.results == [other, ["by 0", UserError.__name__, "no file"], other]


@pytest.fixture
def nodes(world: World, tmp_path: Path) -> list[str]:
    """Folders of two nodes, in which relative names lead to different files."""
    folders = [tmp_path / "node0", tmp_path / "node1"]
    for folder in folders:
        folder.mkdir()
        shutil.copy(world.data / "train.json", folder)
    return [str(folder) for folder in folders]


def run(cluster: Cluster, world: World, folder: Path, nodes: list[str], **changes: Any) -> tuple[str, str]:
    """Runs two processes, each on its node, up to an error that ends both; their logs."""
    recipe = world.recipe(folder, max_steps=1, **changes)
    hooks = [Hook(f"{HOOKS}:enter", rank, {"folder": node}) for rank, node in enumerate(nodes)]
    outcome = cluster.run(2, COMMAND, recipe, hooks=hooks)
    assert outcome.statuses == [2, 2], outcome.told()
    return outcome.logs[0], outcome.logs[1]


def test_nodes_need_one_output_dir(cluster: Cluster, world: World, tmp_path: Path, nodes: list[str]) -> None:
    first, second = run(cluster, world, tmp_path, nodes, output_dir="out/deep")
    expected = "output_dir 'out/deep' is another folder on "
    assert f"error: {expected}" in second and "an output_dir that all nodes share, or one node" in second
    assert f"error: process 1 failed: {expected}" in first
    for node in nodes:  # neither the folder nor what it was looked for by
        assert os.listdir(node) == ["train.json"]


def test_nodes_need_the_same_data(cluster: Cluster, world: World, tmp_path: Path, nodes: list[str]) -> None:
    records = json.loads((world.data / "train.json").read_text(encoding="utf-8"))
    records[3]["conversations"][0][1] += "!"
    (Path(nodes[1]) / "train.json").write_text(json.dumps(records), encoding="utf-8")
    first, second = run(cluster, world, tmp_path, nodes, dataset={"train": [{"data_files": "train.json"}]})
    expected = (
        r"error: process 1 does not train what process 0 trains: file 1 of dataset.train 'train.json' with 12 records "
    )
    assert expected in first and expected in second and "learning_rate" not in first
    assert not (tmp_path / "out").exists()


def differing(changes: list[dict[str, Any]]) -> list[str]:
    """Run on every process: the error of each pair of configurations, of the first process and of the others."""
    import paddle.distributed as dist

    from paddlemix.config.schema import RunConfig
    from paddlemix.parallel.collectives import own_rank
    from paddlemix.trainer.joint_start import check_same_keys

    dist.init_parallel_env()
    heard = []
    for change in changes:
        values: dict[str, Any] = {"dataset": {"train": [{"data_files": "a.json", "chat_template": "/0/t.json"}]}}
        values |= change if own_rank() == 1 else {}
        try:
            check_same_keys(RunConfig(model_name_or_path="m", **values))
            heard.append("")
        except UserError as error:
            heard.append(str(error))
    return heard


def test_keys_are_compared_before_anything_is_read(cluster: Cluster) -> None:
    same = {"data_files": "/b/a.json", "image_root": "/b", "chat_template": "/1/t.json"}  # at other places of a node
    changes: list[dict[str, Any]] = [
        {"dataset": {"train": [same]}},
        {"do_train": True},
        {"dataset": {"train": [{**same, "weight": 2}]}},
    ]
    outcome = cluster.call(2, f"{HOOKS}:differing", changes=changes)
    assert outcome.ok, outcome.told()
    assert outcome.results[0] == outcome.results[1]
    none, key, entry = outcome.results[0]
    assert not none and "process 1 does not train what process 0 trains: do_train True, in process 0 False." in key
    assert "trains: entry 1 of dataset.train {'chat_template': 't.json', 'weight': 2}, in process 0 {'chat" in entry


def test_nodes_use_as_many_records(cluster: Cluster, world: World, tmp_path: Path) -> None:
    hooks = [Hook(f"{HOOKS}:use", rank, {"file": f"{world.data / 'train.json'}#{8 + rank}"}) for rank in range(2)]
    outcome = cluster.run(2, COMMAND, world.recipe(tmp_path, max_steps=1), hooks=hooks)
    assert outcome.statuses == [2, 2], outcome.told()
    for log in outcome.logs:
        assert (
            "error: process 1 does not train what process 0 trains: samples of dataset.train 9, in process 0 8" in log
        )


def test_an_error_of_one_process_ends_all(cluster: Cluster, world: World, tmp_path: Path) -> None:
    hook = Hook(f"{HOOKS}:spoil_model", 1, {"message": "the model is not here"})
    outcome = cluster.run(2, COMMAND, world.recipe(tmp_path, max_steps=1), hooks=[hook])
    assert outcome.statuses == [2, 2], outcome.told()
    assert "error: process 1 failed: the model is not here" in outcome.logs[0]
    assert "error: the model is not here" in outcome.logs[1] and not (tmp_path / "out").exists()


def test_the_first_process_decides_where_to_resume(cluster: Cluster, world: World, tmp_path: Path) -> None:
    damaged = tmp_path / "out" / "checkpoint-2"
    damaged.mkdir(parents=True)
    outcome = cluster.run(2, COMMAND, world.recipe(tmp_path, max_steps=1))
    assert outcome.statuses == [2, 2], outcome.told()
    assert "checkpoint-2 cannot be resumed: its training_state.json is missing" in outcome.logs[0]
    assert "error" not in outcome.logs[1]


@pytest.mark.parametrize("finished", [False, True])
def test_a_process_that_cannot_read_its_share_ends_all(
    cluster: Cluster, world: World, tmp_path: Path, finished: bool
) -> None:
    changes = {"save_strategy": "steps", "save_steps": 1, "gradient_accumulation_steps": 2}
    run_recipe(world.config(tmp_path / "out", **changes, max_steps=1))
    recipe = world.recipe(tmp_path, **{**changes, "gradient_accumulation_steps": 1}, max_steps=2 - finished)
    hook = Hook(f"{HOOKS}:spoil_share", 1, {"message": "the disk is gone"})
    outcome = cluster.run(2, COMMAND, recipe, hooks=[hook])
    assert outcome.statuses == [2, 2], outcome.told()
    assert "error: process 1 failed: the disk is gone" in outcome.logs[0]
    assert "error: the disk is gone" in outcome.logs[1]
    assert sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*")) == ["checkpoint-1"]
