"""Which failure was the first, and in which words."""

from __future__ import annotations

import json
import signal

import pytest

from paddlemix.launch.first_failure import Failure, failure_of, first_failure, memory_kills


def test_the_first_is_the_earliest():
    assert first_failure([Failure(5.0, 1, 0, "b"), Failure(4.0, 1, 3, "a")]).rank == 3


def test_a_kill_comes_before_what_it_caused_though_noticed_later():
    peer = Failure(4.0, 1, 0, "connection closed")
    killed = Failure(4.2, 137, 3, "killed", is_killed=True)
    assert first_failure([peer, killed]) is killed
    # One that comes long after is our own doing, or has another cause.
    assert first_failure([peer, Failure(10.0, 137, 3, is_killed=True)]) is peer


def test_a_stop_of_one_process_comes_before_what_it_caused(tmp_path):
    peer = Failure(2.9, 1, 0, "RuntimeError: connection reset by peer")
    for found in (
        failure_of(1, -signal.SIGTERM, tmp_path / "none", seen=3.0, log="", out_of_memory=False),
        failure_of(1, 130, left(tmp_path, kind="interrupted", message=""), seen=9.0, log="", out_of_memory=False),
    ):
        assert first_failure([peer, found]) is found and not found.is_crash


def test_what_all_find_is_the_first_rank_s():
    found = [Failure(4.0 - rank, 2, rank, "no such file") for rank in range(3)]
    assert first_failure(found).rank == 0
    assert first_failure([*found, Failure(0.5, 2, 4, "another")]).rank == 4


def left(tmp_path, **values):
    path = tmp_path / "failure.json"
    path.write_text(json.dumps({"time": 3.0, "kind": "ConfigError", "is_users": True, "message": "no"} | values))
    return path


def test_a_worker_s_own_word_has_its_own_time(tmp_path):
    found = failure_of(2, 2, left(tmp_path), seen=9.0, log="x", out_of_memory=False)
    assert found == Failure(3.0, 2, 2, "no", log="x") and found.is_final
    found = failure_of(
        2, 1, left(tmp_path, kind="KeyError", is_users=False, message="'a'"), seen=9.0, log="x", out_of_memory=False
    )
    assert (found.status, found.message, found.is_final) == (1, "KeyError: 'a'", False)


def test_a_worker_that_does_not_end_has_the_status_of_its_error(tmp_path):
    assert failure_of(0, None, left(tmp_path), seen=9.0, log="", out_of_memory=False).status == 2
    assert (
        failure_of(
            0, None, left(tmp_path, kind="OSError", is_users=False), seen=9.0, log="", out_of_memory=False
        ).status
        == 1
    )


@pytest.mark.parametrize(
    ("code", "out_of_memory", "status", "words"),
    [
        (-signal.SIGKILL, False, 137, "by hand or by a limit on memory"),
        (-signal.SIGKILL, True, 137, "for lack of memory"),
        (-signal.SIGSEGV, False, 139, "SIGSEGV, a crash inside paddle"),
        (-signal.SIGTERM, False, 143, "ended by SIGTERM"),
        (255, False, 255, "status 255 and no error of its own"),
    ],
)
def test_a_worker_that_left_no_word_is_told_by_its_end(tmp_path, code, out_of_memory, status, words):
    found = failure_of(1, code, tmp_path / "none", seen=9.0, log="", out_of_memory=out_of_memory)
    assert found.status == status and words in found.message and found.time == 9.0
    assert found.is_killed == (code in (-signal.SIGKILL, -signal.SIGTERM))
    assert found.is_crash == (code != -signal.SIGTERM)


def test_another_machine_s_clock_may_differ(monkeypatch):
    monkeypatch.setattr("paddlemix.launch.first_failure.time.time", lambda: 100.0)
    message = json.loads(json.dumps(Failure(98.0, 1, 3, "a", log="b").to_message()))
    monkeypatch.setattr("paddlemix.launch.first_failure.time.time", lambda: 5000.0)
    assert Failure.from_message(message) == Failure(4998.0, 1, 3, "a", log="b")


def test_processes_that_the_system_ended_are_counted(monkeypatch, tmp_path):
    monkeypatch.setattr("paddlemix.launch.first_failure._COUNTERS", tmp_path / "vmstat")
    assert memory_kills() == 0
    (tmp_path / "vmstat").write_text("pgfault 5\noom_kill 3\n")
    assert memory_kills() == 3
