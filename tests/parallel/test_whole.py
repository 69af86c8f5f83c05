"""A checkpoint of several processes is that of one, byte for byte; and all of it, or nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from paddlemix.checkpoints.files.header import read_header
from paddlemix.trainer.resuming.checkpoint_folders import list_checkpoints
from tests.parallel.cluster import Circumstances, Cluster, Where
from tests.parallel.rank import Hook
from tests.tiny_world import LORA, World

# One process adds up two micro-batches, two processes make one each: the same numbers are added.
EQUAL = {
    "adam_epsilon": 1e-4,
    "max_grad_norm": 0.0,
    "per_device_train_batch_size": 1,
    "max_steps": 2,
    "save_strategy": "steps",
    "save_steps": 2,
}


def run(cluster: Cluster, world: World, folder: Path, ranks: int, **changes: Any) -> Path:
    recipe = world.recipe(folder, gradient_accumulation_steps=2 // ranks, **{**EQUAL, **changes})
    where, hooks = changes.get("device", "cpu"), [Hook("tests.parallel.hooks:slice_weights", values={"largest": 64})]
    outcome = cluster.run(ranks, "tools.supervised_finetune", recipe, where=where, hooks=hooks)
    assert outcome.ok, outcome.told()
    return folder / "out"


def tensor_files(directory: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes() for path in directory.glob("*.safetensors") if path.name != "inputs.safetensors"
    }


HALF = {"device": "npu", "bf16": True, "fp16_opt_level": "O2", "amp_master_grad": True}
METHODS: dict[str, dict[str, Any]] = {"full": {}, "lora": {**LORA, "lora_dropout": 0.0}, "half": HALF}


@pytest.fixture(scope="module")
def alone(cluster: Cluster, world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: run(cluster, world, tmp_path_factory.mktemp(name), 1, **values) for name, values in METHODS.items()}


@pytest.mark.parametrize(
    ("method", "sharding"), [("full", ""), ("full", "stage1"), ("lora", "stage1"), ("half", "stage3")]
)
def test_two_processes_write_the_files_of_one(
    cluster: Cluster, world: World, tmp_path: Path, alone: dict[str, Path], method: str, sharding: str
) -> None:
    out, alone_out = run(cluster, world, tmp_path, 2, sharding=sharding, **METHODS[method]), alone[method]
    for name in ("", "checkpoint-2"):
        found, expected = tensor_files(out / name), tensor_files(alone_out / name)
        assert found.keys() == expected.keys()
        for file in found:
            header = read_header(out / name / file)
            assert list(header.tensors.items()) == list(read_header(alone_out / name / file).tensors.items())
        assert found == expected
    assert sorted(path.name for path in out.rglob("*")) == sorted(path.name for path in alone_out.rglob("*"))


def first_is_best() -> None:
    """A hook: every evaluation is worse than the one before."""
    from paddlemix.trainer.trainer import LlavaTrainer

    losses = iter((1.0, 2.0, 3.0))
    LlavaTrainer._evaluation_values = lambda self, dataset: {"loss": next(losses), "token_accuracy": 0.5}  # type: ignore[method-assign]


def test_the_best_of_two_processes_stays_and_ends_the_run(cluster: Cluster, world: World, tmp_path: Path) -> None:
    best = {"evaluation_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "save_total_limit": 1}
    recipe = world.recipe(tmp_path, **{**EQUAL, "max_steps": 3, "save_steps": 1, "sharding": "stage1", **best})
    hook = Hook(f"{__name__}:first_is_best")
    outcome = cluster.run(2, "tools.supervised_finetune", recipe, hooks=[hook])
    assert outcome.ok, outcome.told()
    out = tmp_path / "out"
    assert [path.name for path in list_checkpoints(out)] == ["checkpoint-1", "checkpoint-3"]
    assert (out / "model.safetensors").read_bytes() == (out / "checkpoint-1" / "model.safetensors").read_bytes()
    # A damaged best one ends both, and not the first alone, which compares the checksums.
    weights = out / "checkpoint-1" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8] + bytes(8))
    again = cluster.run(2, "tools.supervised_finetune", recipe, hooks=[hook])
    assert again.statuses == [2, 2], again.told()
    assert "the weights of the best checkpoint, " in again.logs[0] + again.logs[1]


@pytest.mark.parametrize(
    ("where", "ranks", "stages", "halves"),
    [
        ("cpu", 2, ["stage1"], [False]),
        ("npu", 2, ["stage1", "stage2", "stage3"], [False, True]),
        ("npu", 4, ["stage1", "stage2", "stage3"], [False]),
    ],
)
def test_states_of_every_stage_are_gathered_one_at_a_time(
    cluster: Cluster, tmp_path: Path, where: Where, ranks: int, stages: list[str], halves: list[bool]
) -> None:
    """By the two processes of the first copy, where four processes hold two copies."""
    cases = [(stage, half) for stage in stages for half in halves]
    target, values = "tests.parallel.shared_states:write_cases", {"folder": str(tmp_path), "degree": 2}
    outcome = cluster.call(ranks, target, Circumstances(where=where), cases=cases, **values)
    assert outcome.ok, outcome.told()
    for name in (f"{stage}-{half}" for stage, half in cases):
        found, expected = tensor_files(tmp_path / name), tensor_files(tmp_path / f"{name}-alone")
        assert found == expected, name
        (writers, one), (_, other), *rest = (result[name] for result in outcome.results)
        assert writers == {file: number % 2 for number, file in enumerate(sorted(found))}
        assert (one, other) == (0, 0)
        assert rest == [[writers, 0]] * (ranks - 2)
