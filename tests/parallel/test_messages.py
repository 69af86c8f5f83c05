"""What the first process of a tensor group and the others tell each other; whole commands are in
`test_tensor_commands.py`."""

from __future__ import annotations

import threading
from multiprocessing.connection import Client, Listener
from types import SimpleNamespace
from typing import Any

import pytest

from paddlemix.errors import OtherProcessError
from paddlemix.generation import following
from paddlemix.generation.leading import BEGIN, LOAD, Leader
from paddlemix.parallel.layout import Layout
from paddlemix.parallel.messages import Channel
from paddlemix.tools.common.tensor_parallel import AnsweringGroup


@pytest.fixture
def ends() -> tuple[Channel, Channel]:
    """Of the first process, and of another one."""
    with Listener(("127.0.0.1", 0)) as listener:
        other = Client(listener.address)
        return Channel([listener.accept()]), Channel([other])


def test_all_have_loaded_before_the_first_one_computes(
    ends: tuple[Channel, Channel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long another one reads: gloo would end the first sum after 30 seconds."""
    monkeypatch.setattr(following, "signal", SimpleNamespace(signal=lambda *given: None, SIGINT=0, SIG_IGN=0))
    first, other = ends
    begun, may_end, done = threading.Event(), threading.Event(), []

    def load(name: str) -> Any:
        if name == "other":
            begun.set()
            assert may_end.wait()
        done.append(name)
        return SimpleNamespace(model=SimpleNamespace())

    follower = threading.Thread(target=following.follow, args=(other, lambda: load("other").model))
    follower.start()
    leader = threading.Thread(target=AnsweringGroup(Layout(), first).load, args=(lambda layout: load("first"),))
    leader.start()
    assert begun.wait()
    leader.join(0.1)  # it would end in this time if it did not wait
    assert leader.is_alive()
    may_end.set()
    leader.join()
    assert done == ["first", "other"]
    first.close()
    follower.join()


def test_one_that_has_ended_is_not_waited_for(ends: tuple[Channel, Channel]) -> None:
    first, other = ends
    first.send((LOAD, ()))
    assert next(other.messages()) == (LOAD, ())
    other.close()
    with pytest.raises(OtherProcessError, match="process 1 of those that answer together has ended"):
        first.wait_for_others()


def test_a_sum_that_fails_because_another_has_ended_says_so(ends: tuple[Channel, Channel]) -> None:
    first, other = ends
    owner = threading.Event()
    leader = Leader(first)
    with leader.told(owner, BEGIN):
        pass
    with pytest.raises(OtherProcessError, match="process 1 of those that answer together has ended"):  # noqa: SIM117
        with leader.told(owner, "extend"):
            other.close()
            raise RuntimeError("gloo/transport/tcp/pair.cc:584] TIMEOUT")


def test_an_error_of_its_own_stays(ends: tuple[Channel, Channel], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paddlemix.parallel.messages._CLOSING", 0.0)
    with pytest.raises(RuntimeError, match="our own"), Leader(ends[0]).told(threading.Event(), BEGIN):
        raise RuntimeError("our own")


def test_one_that_has_ended_is_not_behind_one_that_loads() -> None:
    with Listener(("127.0.0.1", 0)) as listener:
        others = [Client(listener.address) for _ in range(2)]
        first = Channel([listener.accept() for _ in others])
    others[1].close()
    with pytest.raises(OtherProcessError, match="process 2 of"):
        first.wait_for_others()


def test_where_the_first_has_ended_the_others_end_quietly(ends: tuple[Channel, Channel]) -> None:
    first, other = ends
    first.close()
    other.report_ready()
    assert list(other.messages()) == []


def test_a_message_that_nobody_takes_names_who_has_ended(ends: tuple[Channel, Channel]) -> None:
    first, other = ends
    other.close()
    with pytest.raises(OtherProcessError, match="process 1 of those that answer together has ended"):
        for _ in range(1000):  # the first ones may still be taken by the system
            first.send(("extend", "x" * 10000))
