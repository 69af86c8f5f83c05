"""What ends a run of several processes: all end by the same step and error, which names the process, and none waits."""

from __future__ import annotations

import json
import re
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from paddlemix.datasets.order import EpochBatchSampler
from paddlemix.errors import UserError
from paddlemix.trainer.resuming.checkpoint_check import check_checkpoint
from paddlemix.trainer.resuming.checkpoint_folders import list_checkpoints
from tests.parallel.cluster import Circumstances, Cluster, Outcome, Where
from tests.parallel.launched import Launched
from tests.parallel.rank import Hook
from tests.tiny_world import World, reports

RUN: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-4, "adam_epsilon": 1e-4}
COMMAND = "tools.supervised_finetune"
SEED = 3
FAILED = 2  # status of a command that ends by an error


def run(cluster: Cluster, world: World, folder: Path, *hooks: Hook, **changes: Any) -> Outcome:
    """Four steps of two processes with two samples each."""
    return cluster.run(2, COMMAND, world.recipe(folder, **{**RUN, **changes}), hooks=hooks)


def records_of(rank: int, number: int, size: int = 2) -> list[int]:
    """The records of a process's n-th batch in the first epoch, 1 for the first."""
    batches = list(EpochBatchSampler(12, size, 1, SEED, rank, 2))
    return sorted(int(row) for row in batches[number - 1])


def saved_steps(folder: Path) -> list[int]:
    """Steps of the checkpoints that are there; all of them are whole, and nothing half-written is left."""
    assert not list((folder / "out").glob(".checkpoint-*"))
    found = list_checkpoints(folder / "out")
    for path in found:
        check_checkpoint(path, with_optimizer=True)
    return [int(path.name.split("-")[1]) for path in found]


# ---- errors ----


def test_a_loss_that_is_no_number_names_its_process_and_only_its_samples(
    cluster: Cluster, world: World, tmp_path: Path
) -> None:
    outcome = run(cluster, world, tmp_path, Hook("tests.parallel.hooks:nan_loss", rank=1, values={"step": 3}))
    assert outcome.statuses == [FAILED, FAILED], outcome.told()
    for log in outcome.logs:
        [said] = re.findall(r"the loss of step 3 is nan in the batch of process (.*)", log)
        assert said.startswith("1 (")
        assert sorted(int(number) for number in re.findall(r"record (\d+)", said)) == records_of(1, 3)
    assert saved_steps(tmp_path) == [2]


def test_a_gradient_that_is_no_number_names_its_process(cluster: Cluster, world: World, tmp_path: Path) -> None:
    outcome = run(cluster, world, tmp_path, Hook("tests.parallel.hooks:nan_gradient", rank=1, values={"step": 3}))
    assert outcome.statuses == [FAILED, FAILED], outcome.told()
    for log in outcome.logs:
        [said] = re.findall(r"the gradient's norm of step 3 is nan in the batch of (.*)\. No weight was changed", log)
        assert said.startswith("process 1 (") and "process 0" not in said
        assert sorted(int(number) for number in re.findall(r"record (\d+)", said)) == records_of(1, 3)
    assert saved_steps(tmp_path) == [2]


def with_own_picture(world: World, folder: Path, record: int) -> tuple[str, str]:
    """A data file in which one record has a picture that no other has, and the picture."""
    records = json.loads((world.data / "train.json").read_text(encoding="utf-8"))
    picture, data = folder / "own.png", folder / "train.json"
    shutil.copy(world.picture, picture)
    records[record] = {"image": str(picture), "conversations": [["<image>\nHow many?", "two"]]}
    data.write_text(json.dumps(records), encoding="utf-8")
    return str(data), str(picture)


def cut_when_training_begins(path: str) -> None:
    """A hook: a picture breaks after the data was looked at and before the first batch is made."""
    from paddlemix.trainer.callbacks.progress import Progress

    begin = Progress.on_train_begin

    def cut(progress: Progress, *arguments: Any, **named: Any) -> None:
        Path(path).write_bytes(Path(path).read_bytes()[:200])
        begin(progress, *arguments, **named)

    Progress.on_train_begin = cut  # type: ignore[method-assign]


@pytest.mark.parametrize(("step", "accumulation"), [(1, 1), (3, 1), pytest.param(2, 2, marks=pytest.mark.slow)])
def test_a_bad_sample_of_one_process_ends_all_after_the_step_before(
    cluster: Cluster, world: World, tmp_path: Path, step: int, accumulation: int
) -> None:
    """In the first step nothing was told before; later the others know a step ahead, and the step before is saved."""
    record = records_of(1, step * accumulation, 1)[0]
    data, picture = with_own_picture(world, tmp_path, record)
    changes = {"gradient_accumulation_steps": accumulation, "save_steps": 1, "per_device_train_batch_size": 1}
    hook = Hook(f"{__name__}:cut_when_training_begins", rank=1, values={"path": picture})
    outcome = run(cluster, world, tmp_path, hook, dataset={"train": [{"data_files": data}]}, **changes)
    assert outcome.statuses == [FAILED, FAILED], outcome.told()
    assert f"record {record}: image" in outcome.logs[1]
    assert re.search(rf"error: process 1 failed: .*train\.json record {record}: image .* is broken", outcome.logs[0])
    assert saved_steps(tmp_path) == list(range(1, step))


def fail_to_log(step: int) -> None:
    """A hook: the disk is full when a step is reported."""
    from paddlemix.log import MetricsWriter

    write = MetricsWriter.write

    def failing(writer: MetricsWriter, values: dict[str, Any]) -> None:
        if values["step"] == step:
            raise UserError("metrics.jsonl: no space left on device")
        write(writer, values)

    MetricsWriter.write = failing  # type: ignore[method-assign]


@pytest.mark.parametrize(("step", "answers"), [(2, 2), (4, None)], ids=["answering", "last report"])
def test_an_error_between_two_steps_of_one_process_ends_all(
    cluster: Cluster, world: World, tmp_path: Path, step: int, answers: int | None
) -> None:
    """The first process alone writes reports; the other says nothing of it, because the launcher shows the first."""
    hook = Hook(f"{__name__}:fail_to_log", rank=0, values={"step": step})
    outcome = run(cluster, world, tmp_path, hook, sample_steps=answers, max_new_tokens=2)
    assert outcome.statuses == [FAILED, FAILED], outcome.told()
    assert "error: metrics.jsonl: no space left" in outcome.logs[0]
    assert saved_steps(tmp_path) == [number for number in (2, 4) if number <= step]


@pytest.mark.parametrize("sharding", ["", pytest.param("stage3", marks=pytest.mark.slow)])
def test_an_error_in_the_evaluation_of_one_process_ends_all(
    cluster: Cluster, world: World, tmp_path: Path, sharding: str
) -> None:
    """With stage3 the others would wait for it in a pass, which runs on stand-in devices."""
    where: Where = "npu" if sharding else "cpu"
    data, picture = with_own_picture(world, tmp_path, 2)  # of batches of two, the second is that of process 1
    files = {"train": [{"data_files": str(world.data / "train.json")}], "eval": [{"data_files": data}]}
    hook = Hook(f"{__name__}:cut_when_training_begins", rank=1, values={"path": picture})
    changes = {"dataset": files, "evaluation_strategy": "steps", "eval_steps": 2, "device": where, "sharding": sharding}
    recipe = world.recipe(tmp_path, **{**RUN, **changes})
    outcome = cluster.run(2, COMMAND, recipe, hooks=[hook], where=where)
    assert outcome.statuses == [FAILED, FAILED], outcome.told()
    assert "record 2: image" in outcome.logs[1] and "process 1 failed: " in outcome.logs[0]


def passes_until_one_fails() -> list[Any]:
    """Run on every process: the second's second batch cannot be made."""
    import paddle
    import paddle.distributed as dist

    from paddlemix.datasets.batches import LoadingSettings
    from paddlemix.trainer import evaluator as module

    dist.init_parallel_env()

    def batches(rows: Any) -> Iterator[Any]:
        for number in range(3):
            if (dist.get_rank(), number) == (1, 1):
                raise UserError("the picture is broken")
            yield SimpleNamespace(number=number, loss_index=[], skipped=())

    def score(batch: Any) -> Any:
        passes.append(batch.number)
        return paddle.zeros([]), paddle.zeros([])

    passes: list[int] = []
    vars(module)["batch_inputs"] = lambda batch: batch
    vars(module)["BatchMaker"] = lambda dataset, settings: SimpleNamespace(batches=batches)
    share = module.EvaluationShare(rank=dist.get_rank(), world_size=2, batch_size=1, max_batches=0, passes_alone=False)
    try:
        module.Evaluator(score, LoadingSettings(4)).sums(range(6), share)  # type: ignore[arg-type]
    except UserError as error:
        return [passes, str(error)]
    return [passes, ""]


def test_no_process_begins_a_pass_that_another_cannot_make(cluster: Cluster) -> None:
    outcome = cluster.call(2, f"{__name__}:passes_until_one_fails")
    assert outcome.results == [[[0], "process 1 failed: the picture is broken"], [[0], "the picture is broken"]]


def test_a_killed_process_ends_the_others(cluster: Cluster, world: World, tmp_path: Path) -> None:
    values = {"step": 3, "number": signal.SIGKILL}
    outcome = run(cluster, world, tmp_path, Hook("tests.parallel.hooks:signal_in_step", rank=1, values=values))
    assert outcome.statuses[1] == -signal.SIGKILL and outcome.statuses[0] not in (0, -signal.SIGKILL), outcome.told()
    assert saved_steps(tmp_path) == [2]


# ---- signals ----

IN_STEP = Hook("tests.parallel.hooks:signal_in_step", rank=1, values={"step": 2, "number": signal.SIGTERM})


def at_touch(rank: int, touch: str, number: int = 0) -> Hook:
    """SIGTERM to one process at a touch of a file."""
    values = {"touch": touch, "number": number, "signal": int(signal.SIGTERM)}
    return Hook("tests.parallel.hooks:at_touch", rank=rank, values=values)


@pytest.mark.parametrize(
    ("hook", "step"),
    [
        (IN_STEP, 2),
        (at_touch(0, "sync */out/.checkpoint-2*/*"), 3),  # while it saves: one step more
        # at a report, after the step has been agreed on
        pytest.param(at_touch(0, "open */out/metrics.jsonl", 3), 4, marks=pytest.mark.slow),
    ],
    ids=["step", "saving", "report"],
)
def test_a_signal_to_one_process_stops_all_after_the_same_step(
    cluster: Cluster, world: World, tmp_path: Path, hook: Hook, step: int
) -> None:
    outcome = run(cluster, world, tmp_path, hook, max_steps=6, evaluation_strategy="steps", eval_steps=2)
    assert outcome.statuses == [128 + signal.SIGTERM] * 2, outcome.told()
    assert saved_steps(tmp_path)[-1] == step
    assert max(reports(tmp_path / "out")) == step
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_signal_to_the_launcher_leaves_the_checkpoint_of_one_step(world: World, tmp_path: Path) -> None:
    """The launcher sends SIGTERM to each process three times, and not at the same time."""
    go = tmp_path / "go"
    recipe = world.recipe(tmp_path, **{**RUN, "save_steps": 100})
    hooks = [Hook("tests.parallel.hooks:wait_in_step", values={"step": 3, "until": str(go)})]
    job = Launched(
        tmp_path / "job", 2, f"paddlemix.{COMMAND}", {"arguments": [str(recipe)]}, Circumstances(hooks=hooks)
    )
    wait_for("step 2/4", tmp_path / "job" / "logs" / "workerlog.0", job)
    job.launcher.send_signal(signal.SIGTERM)
    wait_for("SIGTERM: saving after this step", tmp_path / "job" / "logs" / "workerlog.0", job)
    go.touch()
    status, outcome = job.wait()
    assert status != 0, outcome.told()
    assert saved_steps(tmp_path) == [3]


def wait_for(text: str, log: Path, job: Launched) -> None:
    """Waits until a log has a text."""
    while not (log.exists() and text in log.read_text()):
        assert job.launcher.poll() is None, job.output
        time.sleep(0.02)
