"""A launcher whose first process talks with the user: it has the terminal, and the others end with it."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from paddlemix.launch.cards import Cards
from paddlemix.launch.launcher import Job, launch
from paddlemix.launch.options import LaunchOptions
from tests.conftest import HANG, ROOT
from tests.launch.conftest import FAKE, Plan


@pytest.fixture
def talk(tmp_path: Path, impatient: None) -> Callable[[Plan], int]:
    """Launches two fake workers of which the first has the terminal."""

    def run(plan: Plan) -> int:
        arguments, cards = [str(tmp_path), json.dumps(plan)], Cards("cpu", (), (), 2)
        job = Job(FAKE, arguments, LaunchOptions(), cards, tmp_path / "logs", has_terminal=True)
        return launch(job, {**os.environ, "PYTHONPATH": str(ROOT)})

    return run


def test_it_has_the_input_and_the_others_end_with_it(talk, tmp_path, capfd):
    read, write = os.pipe()
    os.write(write, b"What?\n")
    before = os.dup(0)
    os.dup2(read, 0)
    try:
        assert talk({"0": ["wait_for_1", "read"], "1": ["ready", "wait"]}) == 0
    finally:
        os.dup2(before, 0)
    told = capfd.readouterr()
    assert told.out == "heard 'What?' of the group\n" and "failed" not in told.err
    assert not (tmp_path / "logs").exists()  # nothing broke


def test_its_ctrl_c_is_the_status_and_no_failure(talk, tmp_path, capfd):
    assert talk({"0": ["interrupted"], "1": ["wait"]}) == 130
    told = capfd.readouterr().err
    assert "interrupted" in told and "failed first" not in told
    assert not (tmp_path / "logs").exists()


def test_its_wrong_input_is_said_once(talk, tmp_path, capfd):
    """Both find it.  The other one later, or the launcher would end the first before it could say anything."""
    assert talk({"0": ["ready", "user_error"], "1": ["until_the_first_has_ended", "user_error"]}) == 2
    assert capfd.readouterr().err.count("lora_rank=-1") == 1
    assert not (tmp_path / "logs").exists()


def test_another_that_breaks_ends_it(talk, tmp_path, capfd):
    assert talk({"0": ["wait"], "1": ["crash"]}) == 1
    assert "rank 1 failed first" in capfd.readouterr().err
    assert "out of luck" in (tmp_path / "logs" / "workerlog.1").read_text()


@pytest.mark.parametrize(
    ("number", "steps", "to_group", "status"),
    [
        (signal.SIGINT, ["handle", "ready", "until_a_signal"], True, 0),
        (signal.SIGINT, ["handle", "ready", "until_a_signal"], False, 0),
        (signal.SIGTERM, ["ready", "wait"], False, 143),
    ],
)
def test_ctrl_c_is_its_own_and_other_signals_are_for_all(talk, tmp_path, number, steps, to_group, status):
    """A terminal sends Ctrl-C to the launcher and the first process, which may go on; a program to the launcher alone,
    which passes it on."""
    pid = os.fork()
    if not pid:
        os.setsid()  # without a terminal
        os._exit(talk({"0": steps, "1": ["ready", "wait"]}))
    end = time.monotonic() + HANG
    while len(list(tmp_path.glob("ready-*"))) < 2:
        assert time.monotonic() < end
        time.sleep(0.02)
    if to_group:
        os.killpg(pid, number)
    else:
        os.kill(pid, number)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == status
    others = [int(path.read_text()) for path in tmp_path.glob("ready-*")]
    assert not any(Path(f"/proc/{other}").exists() for other in others)


@pytest.mark.parametrize(("steps", "status"), [([], 0), (["stopped"], 143)])
def test_a_library_that_aborts_when_it_is_unloaded_fails_no_run(talk, tmp_path, capfd, steps, status):
    assert talk({"*": ["abort_at_the_end", *steps]}) == status
    assert "failed" not in capfd.readouterr().err
    assert {path.name for path in tmp_path.glob("*-[01]")} == {"written-0", "written-1", "at-exit-0", "at-exit-1"}
