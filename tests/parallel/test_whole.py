"""A checkpoint of several processes is that of one, byte for byte; and all of it, or nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from paddlemix.checkpoints.files.header import read_header
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


def small_slices() -> None:
    """A hook: stage3 slices the weights of a tiny model too."""
    from paddlemix.parallel import stage3

    stage3.LARGE = 64


def run(cluster: Cluster, world: World, folder: Path, ranks: int, **changes: Any) -> Path:
    recipe = world.recipe(folder, gradient_accumulation_steps=2 // ranks, **{**EQUAL, **changes})
    where, hooks = changes.get("device", "cpu"), [Hook(f"{__name__}:small_slices")]
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
