"""Several machines, here two launchers on one: where all are, who stops, who fails, who comes back.

The two sides are `paddlemix/launch/first_node.py` and `paddlemix/launch/other_node.py`, both of
`paddlemix/launch/meeting.py`.
"""

from __future__ import annotations

import json
import signal
import socket

import pytest

from paddlemix.errors import UserError
from paddlemix.launch.channel import Channel
from paddlemix.launch.first_node import listen
from paddlemix.launch.worker_environment import free_ports

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


def test_machines_that_do_not_fit_are_refused(started):
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


def test_a_message_may_come_in_pieces():
    ours, theirs = socket.socketpair()
    channel = Channel.__new__(Channel)
    channel._socket, channel._rest, channel.is_open = ours, b"", True
    theirs.sendall(b'{"stop": 15}\n{"do')
    assert channel.receive() == [{"stop": 15}]
    theirs.sendall(b'ne": true}\n')
    assert channel.receive() == [{"done": True}]
    theirs.close()
    assert channel.receive() == [] and not channel.is_open
