"""Several machines, here two launchers on one: where all are, who stops, who fails, who comes back.

The two sides are `paddlemix/launch/first_node.py` and `paddlemix/launch/other_node.py`, both of
`paddlemix/launch/meeting.py`.
"""

from __future__ import annotations

import json
import select
import signal
import socket
import threading

import pytest

from paddlemix.errors import UserError
from paddlemix.launch import other_node
from paddlemix.launch.cards import Cards
from paddlemix.launch.channel import Channel
from paddlemix.launch.first_node import FirstNode, listen
from paddlemix.launch.meeting import WaitingLines
from paddlemix.launch.options import LaunchOptions
from paddlemix.launch.other_node import OtherNode
from paddlemix.launch.worker_environment import free_ports
from tests.conftest import HANG

CPU = Cards("cpu", (), (), 1)
TRAINING = ["handle", "ready", "train"]


@pytest.fixture
def pair(started):
    """Starts the same plan on two machines."""

    def start(plan, *options):
        port = free_ports(1, {})[0]
        both = ("--nnodes", "2", "--master", f"127.0.0.1:{port}", *options)
        return [started(plan, *both, "--rank", str(node)) for node in range(2)]

    return start


def test_machines_find_each_other_with_different_numbers_of_processes(started, tmp_path):
    port = free_ports(1, {})[0]
    # torchrun's variables, and no numbers: the one that has the port is the first.
    both = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    runs = [started({"*": ["environment"]}, "--nproc", count, **both) for count in ("1", "2")]
    assert [run.status() for run in runs] == [0, 0], runs[0].told()
    found = [json.loads((tmp_path / f"environment-{rank}").read_text()) for rank in range(3)]
    assert len({one["PADDLE_TRAINER_ENDPOINTS"] for one in found}) == len({one["PADDLE_MASTER"] for one in found}) == 1
    assert [one["PADDLE_TRAINER_ID"] for one in found] == ["0", "1", "2"]
    assert found[2]["PADDLE_CURRENT_ENDPOINT"] == found[0]["PADDLE_TRAINER_ENDPOINTS"].split(",")[2]
    # Where the launchers meet is not where the processes do.
    assert not any("MASTER_ADDR" in one or one["PADDLE_MASTER"].endswith(f":{port}") for one in found)


@pytest.mark.parametrize("asked", [0, 1])
def test_a_stop_of_one_machine_is_one_of_all(pair, tmp_path, asked):
    runs = pair({"*": TRAINING})
    runs[0].wait_for("ready-0-0", "ready-1-0")
    (tmp_path / "may-end").touch()
    runs[asked].send(signal.SIGTERM)
    assert [run.status() for run in runs] == [143, 143], runs[0].told()
    assert {path.name for path in tmp_path.glob("saved-*")} == {"saved-0-1", "saved-1-1"}
    assert "SIGTERM on another machine" in runs[1 - asked].told()


@pytest.mark.parametrize("failing", [0, 1])
def test_a_failure_on_one_machine_ends_all_with_its_status(pair, failing):
    runs = pair({str(failing): ["ready", "leave"], "*": ["ready", "wait"]})
    assert [run.status() for run in runs] == [7, 7], runs[0].told()
    # Both write into one file here.
    assert runs[0].told().count(f"rank {failing} failed first") == 2


def test_a_crash_on_one_machine_starts_all_again(pair, tmp_path):
    # The other machine is ready for the next start sooner than the first, which still waits for its worker.
    runs = pair({"0": ["ready", "wait_once"], "1": ["ready", "crash_once"]}, "--max-restart", "1")
    assert [run.status() for run in runs] == [0, 0], runs[0].told()
    assert {"ready-0-1", "ready-1-1"} <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize("lost", [0, 1])
def test_a_machine_that_is_gone_ends_the_others(pair, tmp_path, lost):
    runs = pair({"*": ["ready", "wait"]})
    runs[0].wait_for("ready-0-0", "ready-1-0")
    runs[lost].send(signal.SIGKILL)
    assert runs[1 - lost].status() == 1
    assert "is gone" in runs[0].told()


def test_machines_that_do_not_fit_are_refused(started, tmp_path):
    port = free_ports(1, {})[0]
    first = started({"*": []}, "--nnodes", "2", "--master", f"127.0.0.1:{port}", "--rank", "0")
    other = started({"*": []}, "--nnodes", "3", "--master", f"127.0.0.1:{port}", "--rank", "1")
    assert other.status() == 2
    assert "--nnodes is 3 there and 2 on the first machine" in other.told()
    # A scanner of ports does not disturb it; a signal ends the waiting.
    with socket.create_connection(("127.0.0.1", port)) as stranger:
        stranger.sendall(b"GET / HTTP/1.0\r\n\r\n[1]\n")
    with socket.create_connection(("127.0.0.1", port)) as stranger:
        stranger.sendall(b'{"hello": 5}\n{"failed": 3}\n')
        stranger.recv(100)
    assert first.is_running()
    first.send(signal.SIGTERM)
    assert first.status() == 143
    assert not (tmp_path / "logs").exists()  # nothing was started


def test_the_meeting_place_is_the_first_machine_s():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        place = ("127.0.0.1", taken.getsockname()[1])
        assert listen(place, must=False) is None
        with pytest.raises(UserError, match="the port is in use on this machine"):
            listen(place, must=True)
    # 192.0.2.1 is nobody's (RFC 5737): another machine's, unless this is said to be the first behind a service.
    port = free_ports(1, {})[0]
    assert listen(("192.0.2.1", port), must=False) is None
    behind = listen(("192.0.2.1", port), must=True)
    assert behind is not None and behind.getsockname() == ("0.0.0.0", port)
    behind.close()


class Stop(Exception):
    """Ends the waiting."""


@pytest.fixture
def told_while_waiting(monkeypatch, capsys):
    """What the launcher of a machine that is not the first says in so many rounds of waiting."""
    monkeypatch.setattr(other_node, "RETRY_SECONDS", 0.0)
    monkeypatch.setattr(other_node, "_ANSWER_SECONDS", 0.0)

    def wait(host, port, rounds=1, patience=0.0):
        node = OtherNode(LaunchOptions(nodes=2, master=(host, port), node=1), CPU, {})
        left = [rounds]

        def once(signals, readers, seconds, closing):
            left[0] -= 1
            if left[0] < 0:
                raise Stop
            for descriptor in select.select(list(readers), [], [], patience)[0] if readers else ():
                readers[descriptor]()

        monkeypatch.setattr(node, "_wait", once)
        with pytest.raises(Stop):
            node.gather(None)
        node.close()
        return [line for line in capsys.readouterr().err.splitlines() if "waiting for the run" in line]

    return wait


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (socket.gaierror(-2, "Name or service not known"), "unknown host (Name or service not known)"),
        (UnicodeError("label empty or too long"), "unknown host (label empty"),
        (ConnectionRefusedError(111, "Connection refused"), "connection refused: nothing listens"),
        (TimeoutError("timed out"), "timed out: there is no machine at this address, or a firewall"),
        (OSError(113, "No route to host"), "No route to host"),
    ],
)
def test_why_the_master_cannot_be_reached_is_said_at_once(told_while_waiting, monkeypatch, error, words):
    def refuse(*arguments, **values):
        raise error

    monkeypatch.setattr(socket, "create_connection", refuse)
    (told,) = told_while_waiting("nosuch.host.invalid", 29722, rounds=5)  # and not in every round
    assert f"nosuch.host.invalid:29722: {words}" in told


def test_what_is_still_missing_is_said_every_minute(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr("paddlemix.launch.meeting.time.monotonic", lambda: now[0])
    lines = WaitingLines()
    for _ in range(125):  # seconds
        lines.tell("refused")
        now[0] += 1
    now[0] += 5
    lines.tell("timed out")  # something else, sooner
    told = capsys.readouterr().err.splitlines()
    assert [line.partition("refused")[1] for line in told[:-1]] == ["refused"] * 3 and "timed out" in told[-1]


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"", "another program uses this port there"),
        (b"HTTP/1.0 400 Bad Request\r\n\r\n", "the connection was closed: what listens there is another program"),
        (b'{"welcome": 1}\n', "the first machine is there, others are not yet"),
    ],
    ids=["silent", "web server", "launcher"],
)
def test_a_port_of_another_program_is_told_from_the_first_machine_s(told_while_waiting, answer, words):
    held = []

    def serve():
        held.append(listening.accept()[0])
        held[0].sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = threading.Thread(target=serve)
        server.start()
        told = told_while_waiting(*listening.getsockname(), patience=HANG if answer else 0.0)
        server.join()
        held[0].close()
    assert len(told) == 1 and words in told[0]


def test_a_machine_that_has_come_is_welcomed():
    first = FirstNode(LaunchOptions(nodes=3, master=("10.0.0.1", 99)), CPU, {}, socket.socket())
    ours, theirs = socket.socketpair()
    first._heard(channel_of(ours), {"hello": {"nodes": 3, "kind": "cpu", "ports": [1, 2]}})
    assert theirs.recv(100) == b'{"welcome": 1}\n'
    first.close()
    theirs.close()


def channel_of(ours):
    """Without the options of a connection between machines."""
    channel = Channel.__new__(Channel)
    channel._socket, channel._rest, channel.is_open = ours, b"", True
    return channel


def test_a_message_may_come_in_pieces():
    ours, theirs = socket.socketpair()
    channel = channel_of(ours)
    theirs.sendall(b'{"stop": 15}\n{"do')
    assert channel.receive() == [{"stop": 15}]
    theirs.sendall(b'ne": true}\n')
    assert channel.receive() == [{"done": True}]
    theirs.close()
    assert channel.receive() == [] and not channel.is_open
