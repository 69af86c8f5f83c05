"""A launcher that gets signals, and what it prints."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from paddlemix.launch.cards import Cards
from paddlemix.launch.launcher import Job, equivalent_command
from paddlemix.launch.options import LaunchOptions
from tests.conftest import HANG

TRAINING = {"*": ["handle", "ready", "train"]}
READY = ("ready-0-0", "ready-1-0")


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)], ids=str
)
def test_each_worker_is_asked_once_and_waited_for(started, tmp_path, number, status):
    run = started(TRAINING, "--nproc", "2")
    run.wait_for(*READY)
    run.send(number)
    run.wait_for("saving-0", "saving-1")
    (tmp_path / "may-end").touch()
    assert run.status() == status, run.told()
    assert {path.name for path in tmp_path.glob("saved-*")} == {"saved-0-1", "saved-1-1"}


def test_a_second_ctrl_c_ends_at_once(started, tmp_path, monkeypatch):
    monkeypatch.setattr("paddlemix.launch.supervisor.SAME_SIGNAL", 0.0)
    run = started(TRAINING, "--nproc", "2")
    run.wait_for(*READY)
    run.send(signal.SIGINT)
    run.wait_for("saving-0", "saving-1")
    run.send(signal.SIGINT)
    assert run.status() == 130, run.told()
    assert not list(tmp_path.glob("saved-*")) and "ending at once" in run.told()


def test_workers_save_when_their_launcher_is_killed(started, tmp_path):
    run = started({"*": ["handle", "ready", "train"]}, "--nproc", "2")
    run.wait_for(*READY)
    run.send(signal.SIGKILL)
    assert run.status() == -9
    (tmp_path / "may-end").touch()
    end = time.monotonic() + HANG
    while len(list(tmp_path.glob("saved-*"))) < 2:
        assert time.monotonic() < end
        time.sleep(0.02)


def test_before_anything_can_be_saved_a_stop_ends_all(started):
    run = started({"*": ["ready", "wait"]}, "--nproc", "2")
    run.wait_for(*READY)
    run.send(signal.SIGTERM)
    assert run.status() == 143, run.told()


def test_an_agreed_stop_of_one_worker_is_no_failure(started, tmp_path):
    # The user's SIGTERM to one worker: all agree to stop, one is done sooner.
    (tmp_path / "may-end").touch()
    run = started({"0": ["handle", "ready", "train"], "1": ["ready"]}, "--nproc", "2")
    run.wait_for(*READY)
    os.kill(int((tmp_path / READY[0]).read_text()), signal.SIGTERM)
    assert run.status() == 143, run.told()
    assert "failed" not in run.told()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=str)
def test_a_stop_of_one_worker_before_its_first_step_is_not_started_again(started, tmp_path, number, status):
    run = started({"*": ["ready", "wait"]}, "--nproc", "2", "--max-restart", "1")
    run.wait_for(*READY)
    os.kill(int((tmp_path / READY[1]).read_text()), number)
    assert run.status() == status, run.told()
    assert not (tmp_path / "ready-0-1").exists() and "rank 1 failed first" in run.told()


def job(options: LaunchOptions, cards: Cards) -> Job:
    return Job(
        Path("paddlemix/tools/supervised_finetune.py").absolute(), ["a b.json"], options, cards, Path("out/logs")
    )


def test_the_command_of_paddle_s_launcher_is_printed():
    python = "python -m paddle.distributed.launch"
    rest = "--log_dir out/logs paddlemix/tools/supervised_finetune.py 'a b.json'"
    one = job(LaunchOptions(), Cards("gpu", ("4", "5"), ("0", "1"), 2))
    assert equivalent_command(one) == f"{python} --devices 4,5 {rest}"
    two = job(LaunchOptions(nodes=2, master=("10.0.0.1", 99), node=1), Cards("cpu", (), (), 3))
    assert equivalent_command(two) == f"{python} --nnodes 2 --master 10.0.0.1:99 --rank 1 --nproc_per_node 3 {rest}"
