"""A launcher or a queue that starts a run again has it resume; a user who starts it may want it from scratch."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from paddlemix.trainer.joint_start import agreed_resume_point
from paddlemix.trainer.recipe import run_recipe
from paddlemix.trainer.resuming.job import JOB_FILE, Job, read_job
from tests.tiny_world import World, reports

LAUNCHED = {"PADDLE_RANK_IN_NODE": "0"}
QUEUED = {"SLURM_CLUSTER_NAME": "big", "SLURM_JOB_ID": "17"}


def test_a_job_is_told_by_its_launcher_or_its_number() -> None:
    one = Job.of_process(LAUNCHED)
    assert len(one.launchers) == 1 and f" {os.getppid()} " in f"{one.launchers[0]} " and one.queued == ""
    assert Job.of_process({}) == Job()
    platform = {"PADDLE_TRAINER_ENDPOINTS": "10.0.0.1:1", "PADDLE_TRAINER_ID": "0", "PADDLE_TRAINERS_NUM": "1"}
    assert Job.of_process(platform) == Job()  # exported to the shell, in which a user may start a run twice
    own = {"POD_NAME": "qwerty"}  # of a container; of Paddle's launcher only with its folder of logs
    assert Job.of_process(own) == Job() and Job.of_process(LAUNCHED | own) == one
    assert Job.of_process(LAUNCHED | own | {"PADDLE_LOG_DIR": "log"}).launchers == (*one.launchers, "pod qwerty")
    assert Job.of_process(QUEUED) == Job(queued="big/17")
    assert Job.of_process(QUEUED | {"SLURM_RESTART_COUNT": "2"}).restarts == 2


@pytest.mark.parametrize(
    ("before", "now", "restarted"),
    [
        (Job(("a 7 70",)), Job(("a 7 70",)), True),
        (Job(("a 7 70",)), Job(("a 7 71",)), False),  # another process of that number
        (Job(("a 7 70", "b 9 90")), Job(("b 9 90", "c 5 50")), True),  # node a was lost, c takes its place
        (Job(), Job(), False),  # by hand
        (Job(queued="big/17"), Job(queued="big/17"), False),  # twice by hand in one allocation
        (Job(queued="big/17"), Job(queued="big/17", restarts=1), True),
        (Job(queued="big/17", restarts=1), Job(queued="big/18", restarts=2), False),
    ],
)
def test_which_start_is_a_restart(before: Job, now: Job, restarted: bool) -> None:
    assert now.restarts_that_of(before) == restarted


def test_a_job_is_remembered(tmp_path: Path) -> None:
    job = Job.of_all([Job(("b 9 90",), "big/17", 1), Job(("a 7 70",)), Job(("b 9 90",))])
    job.write(tmp_path)
    assert read_job(tmp_path) == job == Job(("a 7 70", "b 9 90"), "big/17", 1)
    for damaged in ("", "[]", '{"launchers": 3, "queued": "", "restarts": 0}', '{"queued": "", "restarts": "x"}'):
        (tmp_path / JOB_FILE).write_text(damaged, encoding="utf-8")
        assert read_job(tmp_path) == Job()


@pytest.mark.parametrize("variables", [LAUNCHED, {}], ids=["launcher", "user"])
def test_a_restart_deletes_no_checkpoint(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]
) -> None:
    """`overwrite_output_dir` true is what a user says of the start that he makes."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    changes: dict[str, Any] = {"overwrite_output_dir": True, "save_strategy": "steps", "save_steps": 2}
    run_recipe(world.config(tmp_path, **changes, max_steps=2))
    kept = tmp_path / "checkpoint-2" / "kept"
    kept.touch()
    values = {**changes, "resume_from_checkpoint": None, "max_steps": 3}
    assert run_recipe(world.config(tmp_path, **values))["steps"] == 3
    assert kept.exists() == bool(variables) and sorted(reports(tmp_path)) == [1, 2, 3]


def test_a_restart_goes_on_from_its_own_newest_checkpoint(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the first start resumed another one, by name."""
    run_recipe(world.config(tmp_path / "other", save_strategy="steps", save_steps=1, max_steps=1))
    monkeypatch.setenv(*next(iter(LAUNCHED.items())))
    named = tmp_path / "other" / "checkpoint-1"
    changes: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "resume_from_checkpoint": str(named)}
    config = world.config(tmp_path / "out", **changes, max_steps=2)
    run_recipe(config)
    assert agreed_resume_point(config, 1) == tmp_path / "out" / "checkpoint-2"
    monkeypatch.delenv("PADDLE_RANK_IN_NODE")
    assert agreed_resume_point(config, 1) == named
    assert json.loads((tmp_path / "out" / JOB_FILE).read_text(encoding="utf-8"))["launchers"]
