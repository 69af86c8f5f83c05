"""What the first process says: on the screen at once, in its log without a bar's redrawing; and its start and end."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import termios

import pytest

from paddlemix.launch.rank_logs import RankLogs, end_of_log
from paddlemix.launch.relay import LogLines, Relay

_SPEAKER = """
import os, sys
size = os.get_terminal_size(2)
sys.stderr.write(f"{sys.stderr.isatty()} {size.columns}\\n" + "\\r10%" * 500 + "\\r100%\\nend\\n")
"""


def log_lines(path):
    return LogLines(open(path, "ab"))


def test_a_log_has_the_last_state_of_a_bar(tmp_path):
    path = tmp_path / "log"
    lines = log_lines(path)
    for part in (b"begin\n\r 1%|", b"\r 2%|\r", b" 3%|\r100%|\ndone\r\nno end", b"\rlast"):
        lines.write(part)
    lines.close()
    assert path.read_bytes() == b"begin\n100%|\ndone\nlast\n"


def test_a_bar_of_days_does_not_pile_up(tmp_path, monkeypatch):
    monkeypatch.setattr("paddlemix.launch.relay._LONGEST_LINE", 100)
    lines = log_lines(tmp_path / "log")
    for number in range(1000):
        lines.write(b"\r%d of 1000" % number)
        assert len(lines._rest) <= 120
    lines.close()
    assert (tmp_path / "log").read_bytes() == b"999 of 1000\n"


def test_on_a_terminal_the_process_has_a_terminal_of_the_same_size(tmp_path):
    ours, screen = os.openpty()
    termios.tcsetwinsize(screen, (40, 123))
    relay = Relay(screen, log_lines(tmp_path / "log"))
    with subprocess.Popen([sys.executable, "-c", _SPEAKER], stderr=relay.writes) as process:
        relay.started()
        while relay.is_open:
            relay.pump()
    assert process.returncode == 0
    relay._log.close()
    assert (tmp_path / "log").read_text() == "True 123\n100%\nend\n"
    shown = os.read(ours, 1 << 16)
    assert shown.count(b"\r10%") == 500 and b"\r\r\n" not in shown  # line ends are the real terminal's
    os.close(ours)
    os.close(screen)


def test_a_reader_that_is_gone_ends_what_is_shown_not_the_run(tmp_path):
    read, write = os.pipe()
    os.close(read)
    relay = Relay(write, log_lines(tmp_path / "log"))
    os.write(relay.writes, b"one\n")
    relay.pump()
    relay._log.close()
    assert (tmp_path / "log").read_text() == "one\n" and relay.is_open
    relay.started()
    relay.close()
    os.close(write)


def test_the_end_of_a_log_is_that_of_the_last_start(tmp_path):
    logs = RankLogs(tmp_path)
    for start in range(2):
        path = logs.begin(3, "python train.py")
        with open(path, "a") as file:
            file.write("".join(f"start {start} line {number}\n\n" for number in range(4)))
    assert end_of_log(str(path), 2) == ["start 1 line 2", "start 1 line 3"]
    assert end_of_log(str(path)) == [f"start 1 line {number}" for number in range(4)]
    assert end_of_log(str(tmp_path / "none")) == []


def test_what_a_run_that_never_began_has_made_is_removed_and_nothing_else(tmp_path):
    (tmp_path / "run").mkdir()
    logs = RankLogs(tmp_path / "run" / "logs" / "ranks")
    logs.begin(0, "x")
    (tmp_path / "run" / "logs" / "mine").touch()
    logs.remove_new()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["logs", "mine", "run"]


@pytest.mark.parametrize("first", ["stays", "fails"])
def test_a_launcher_removes_no_log_of_another_that_was_started_at_the_same_time(tmp_path, first):
    both = [RankLogs(tmp_path / "logs") for _ in range(2)]  # neither has found a folder
    both[1].remove_empty()  # one more gives up before it starts anything
    path = both[0].begin(0, "one")
    both[1].begin(0, "another")
    both[1 if first == "stays" else 0].remove_new()
    assert "one" in path.read_text() and "another" in path.read_text()


def test_a_terminal_that_does_not_read_holds_up_nothing(tmp_path):
    ours, screen = os.openpty()
    tty = Relay(screen, log_lines(tmp_path / "log"))
    tty.started()
    os.close(tty.reads)
    tty.reads, source = os.pipe()
    for number in range(300):  # more than any terminal buffers
        os.write(source, b"%04d " % number + b"x" * 994 + b"\n")
        tty.pump()
    assert tty.show()  # the rest waits
    shown = b""
    while tty.show() or select.select([ours], [], [], 0)[0]:
        shown += os.read(ours, 1 << 16)
    assert shown.replace(b"\r\n", b"\n").count(b"\n") == 300
    tty._log.close()
    assert (tmp_path / "log").read_bytes().count(b"\n") == 300
    for descriptor in (ours, screen, source, tty.reads):
        os.close(descriptor)


def test_a_full_disk_ends_the_log_not_what_is_shown():
    read, write = os.pipe()
    relay = Relay(write, LogLines(open("/dev/full", "ab", buffering=0)))  # noqa: SIM115
    os.write(relay.writes, b"one\n")
    relay.pump()
    assert os.read(read, 100) == b"one\n"
    relay.started()
    relay.close()
    os.close(read)
    os.close(write)
