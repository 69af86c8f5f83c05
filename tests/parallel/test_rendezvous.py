"""Processes on CPU wait for one that is late, longer than gloo would (paddlemix.parallel.rendezvous)."""

from __future__ import annotations

import signal
import threading
import time
from collections import Counter

import pytest

from paddlemix.errors import UserError
from paddlemix.parallel.rendezvous import meet, meet_at
from tests.parallel.cluster import Circumstances, Cluster

GLOO_SECONDS = 33  # more than gloo waits


class Counts:
    """A store in this process."""

    def __init__(self) -> None:
        self._numbers: Counter[str] = Counter()
        self._lock = threading.Lock()

    def add(self, key: str, amount: int) -> int:
        with self._lock:
            self._numbers[key] += amount
            return self._numbers[key]


def test_nobody_goes_on_before_the_last_has_come() -> None:
    store, gone = Counts(), []
    others = [threading.Thread(target=lambda: (meet_at(store, "a", 3, 60), gone.append(1))) for _ in range(2)]
    for other in others:
        other.start()
    time.sleep(0.1)
    assert gone == []
    meet_at(store, "a", 3, 60)
    for other in others:
        other.join()
    assert gone == [1, 1]


def test_who_never_comes_is_an_error() -> None:
    with pytest.raises(UserError, match="1 of 2 processes did not come within 0 seconds"):
        meet_at(Counts(), "a", 2, 0)


def test_a_signal_waits_until_the_store_has_answered() -> None:
    """Paddle's store ends by it: its answer is lost, and the process with it."""
    seen = []

    class Interrupted(Counts):
        def add(self, key: str, amount: int) -> int:
            signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)
            seen.append("answer")
            return super().add(key, amount)

    before = signal.signal(signal.SIGUSR1, lambda *_: seen.append("signal"))
    try:
        meet_at(Interrupted(), "a", 1, 60)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert seen == ["answer", "signal"]


def test_one_process_meets_nobody() -> None:
    meet()


def late(seconds: float) -> list[list[int]]:
    """Run on every process; the second is late."""
    import paddle.distributed as dist

    from paddlemix.parallel.collectives import agree, gathered_objects

    dist.init_parallel_env()
    found = []
    for collective in (lambda: gathered_objects(dist.get_rank()), lambda: agree(None)):
        if dist.get_rank() == 1:
            time.sleep(seconds)
        found.append(collective() or [])
    return found


@pytest.mark.parametrize("seconds", [0.2, pytest.param(GLOO_SECONDS, marks=pytest.mark.slow)])
def test_a_process_may_be_late(cluster: Cluster, seconds: float) -> None:
    outcome = cluster.call(2, f"{__name__}:late", Circumstances(limit=200), seconds=seconds)
    assert outcome.ok, outcome.told()
    assert outcome.results == [[[0, 1], []]] * 2
