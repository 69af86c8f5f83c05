"""Workers that fail, and what the launcher makes of it; signals are in `test_launcher.py`.

What is tested: paddlemix/launch/supervisor.py and paddlemix/launch/worker_process.py.
"""

from __future__ import annotations

import re
import signal

import pytest

from paddlemix.launch import supervisor
from paddlemix.launch.cards import Cards
from paddlemix.launch.events import Signals
from paddlemix.launch.nodes import Nodes
from paddlemix.launch.supervisor import Attempt

WAITING = ["ready", "wait"]


def ranks_of(text: str) -> list[str]:
    return re.findall(r"rank (\d) failed first", text)


def test_output_of_the_first_is_shown_and_each_has_a_log(run_here, tmp_path, capfd):
    assert run_here({"*": ["say"]}, processes=3) == 0
    shown = capfd.readouterr()
    assert shown.out == "answer of 0\n"
    assert "rank 0, terminal False" in shown.err and "rank 1" not in shown.err
    logs = [(tmp_path / "logs" / f"workerlog.{rank}").read_text() for rank in range(3)]
    assert all(f"answer of {rank}\n" in log for rank, log in enumerate(logs))
    assert "rank 0, terminal False" in logs[0]


def test_logs_of_a_second_start_are_added(run_here, tmp_path):
    run_here({"*": ["say"]})
    run_here({"*": ["say"]})
    assert (tmp_path / "logs" / "workerlog.1").read_text().count("answer of 1\n") == 2


@pytest.mark.parametrize(
    ("step", "status", "words"),
    [
        ("user_error", 2, "lora_rank=-1 is below 1"),
        ("crash", 1, "RuntimeError: out of luck"),
        ("killed", 137, "killed (SIGKILL)"),
        ("leave", 7, "it ended with status 7"),
        ("hang_after_error", 1, "a library hangs at the end"),
    ],
)
def test_the_rank_that_failed_is_shown_and_the_others_end(run_here, capfd, step, status, words):
    assert run_here({"0": WAITING, "1": ["ready", step], "2": WAITING}, processes=3) == status
    told = capfd.readouterr().err
    assert ranks_of(told) == ["1"] and words in told
    # The end of its log is shown too, unless the message says all.
    assert ("the end of" in told and "workerlog.1" in told) == (step in ("crash",))


def test_a_status_that_is_a_result_is_no_failure(run_here, capfd):
    assert run_here({"1": ["say", "leave"], "*": ["say"]}, results=(7,)) == 7
    told = capfd.readouterr().err
    assert not ranks_of(told) and "  answer of 1\n" in told


def test_a_failure_of_the_first_rank_is_on_the_screen_already(run_here, capfd):
    assert run_here({"0": ["user_error"], "1": WAITING}) == 2
    told = capfd.readouterr().err
    assert told.count("lora_rank=-1") == 1 and not ranks_of(told)


def test_bad_input_leaves_nothing_behind(run_here, tmp_path):
    assert run_here({"*": ["user_error"]}) == 2
    assert not (tmp_path / "logs").exists()
    run_here({"*": ["say"]})
    assert run_here({"*": ["user_error"]}) == 2
    assert "answer of 0" in (tmp_path / "logs" / "workerlog.0").read_text()


@pytest.mark.parametrize("ending", ["user_error", "leave_with_2"])
def test_a_run_that_has_begun_keeps_every_log(run_here, tmp_path, ending):
    # A full disk, a loss that is NaN, a sample that cannot be read: the status is that of bad input.
    assert run_here({"0": ["say", "begin", "wait"], "1": ["say", "begin", ending]}) == 2
    logs = [(tmp_path / "logs" / f"workerlog.{rank}").read_text() for rank in range(2)]
    assert all(f"answer of {rank}\n" in log for rank, log in enumerate(logs))


def test_logs_of_one_rank_s_run_are_kept_where_another_failed_first(run_here, tmp_path):
    # The one that fails may be behind the others.
    assert run_here({"0": ["begin", "ready", "wait"], "1": ["wait_for_0", "user_error"]}) == 2
    assert (tmp_path / "logs" / "workerlog.1").exists()


def test_logs_of_a_script_of_the_user_s_are_kept(run_here, tmp_path):
    # It does not say whether it has begun, and 2 may mean anything.
    assert run_here({"*": ["say", "leave_with_2"]}, reports_begin=False) == 2
    assert "answer of 0" in (tmp_path / "logs" / "workerlog.0").read_text()


def test_a_crash_is_started_again(run_here, tmp_path, capfd):
    assert run_here({"0": ["ready"], "1": ["ready", "crash_once"]}, restarts=3) == 0
    assert {path.name for path in tmp_path.glob("ready-*")} == {"ready-0-0", "ready-1-0", "ready-0-1", "ready-1-1"}
    assert "starting again (1 of at most 3)" in capfd.readouterr().err


def test_a_crash_is_started_again_only_so_often(run_here, tmp_path):
    assert run_here({"*": ["ready", "crash"]}, processes=1, restarts=1) == 1
    assert {path.name for path in tmp_path.glob("ready-*")} == {"ready-0-0", "ready-0-1"}


def test_bad_input_is_not_started_again(run_here, tmp_path):
    assert run_here({"*": ["ready", "user_error"]}, processes=1, restarts=1) == 2
    assert [path.name for path in tmp_path.glob("ready-*")] == ["ready-0-0"]


@pytest.mark.parametrize(
    ("number", "seconds", "is_at_once"),
    [
        (signal.SIGTERM, 4.9, False),  # a scheduler's repetition
        (signal.SIGHUP, 4.9, False),
        (signal.SIGTERM, 5.1, True),
        (signal.SIGINT, 5.1, True),
    ],
)
def test_only_a_second_wish_ends_at_once(monkeypatch, number, seconds, is_at_once):
    now = [100.0]
    monkeypatch.setattr(supervisor.time, "monotonic", lambda: now[0])
    attempt = Attempt((), Signals(), Nodes(Cards("cpu", (), (), 2), {}), may_restart=False)
    attempt._handle([signal.SIGTERM])
    now[0] += seconds
    attempt._handle([number])
    assert attempt._is_at_once == is_at_once
