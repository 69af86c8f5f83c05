"""Batches made ahead: the same by thread and by processes, errors in their turn, never a hang."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path

import numpy as np
import pytest

from paddlemix.datasets import workers
from paddlemix.datasets.batches import BatchMaker, LoadingSettings, iterate_batches, make_batch
from paddlemix.datasets.workers import WorkerPool
from paddlemix.errors import UserError
from tests.conftest import HANG
from tests.rows import NumberedRows, echo, mixed_lengths, process_number

ROOT = Path(__file__).resolve().parents[2]
ROWS = [[number, number + 1, 59 - number] for number in range(12)]


def settings(**changes: int) -> LoadingSettings:
    return LoadingSettings(**{"tokens_per_tile": 4, **changes})  # type: ignore[arg-type]


def wait_until(happened: Callable[[], bool]) -> None:
    """Waits until something has happened, which it does."""
    end = time.monotonic() + HANG
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.02)


def dataset(**changes: int) -> NumberedRows:
    return NumberedRows(mixed_lengths(60, skipped=6), **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("number", [0, 2])
def test_batches_come_in_order_and_again(number: int) -> None:
    data = dataset()
    maker = BatchMaker(data, settings(num_workers=number))
    for _ in range(2):  # the same workers
        found = list(maker.batches(ROWS))
        assert len(found) == len(ROWS)
        for batch, rows in zip(found, ROWS, strict=True):
            wanted = make_batch(data, rows, settings())
            np.testing.assert_array_equal(batch.input_ids, wanted.input_ids)
            assert batch.sources == wanted.sources and batch.skipped == wanted.skipped
    assert next(maker.batches([index % 60] for index in count())).input_ids.size  # an endless one, left early
    maker.close()


@pytest.mark.parametrize("number", [0, 2])
def test_an_error_comes_in_its_batch_s_turn(number: int) -> None:
    found = []
    with pytest.raises(UserError, match="^5 is bad$"):
        found.extend(iterate_batches(dataset(bad=5), [[index] for index in range(20)], settings(num_workers=number)))
    assert len(found) == 5


def test_a_worker_that_is_killed_is_an_error_and_no_hang() -> None:
    maker = BatchMaker(dataset(deadly=9), settings(num_workers=2))
    with pytest.raises(UserError, match="worker processes ended without a word.*dataloader_num_workers"):
        list(maker.batches([[index] for index in range(30)]))
    assert len(list(maker.batches([[1], [2]]))) == 2  # new ones


def test_positions_are_padded_to_a_multiple() -> None:
    assert make_batch(dataset(), [0, 1], settings(pad_to_multiple_of=16)).input_ids.shape == (2, 16)


def test_a_batch_without_image_gets_an_unused_tile() -> None:
    batch = make_batch(dataset(), [0, 1], LoadingSettings(4, dummy_tile=(1, 3, 2, 2)))
    assert batch.pixel_values is not None and batch.pixel_values.shape == (1, 3, 2, 2)
    assert batch.merge_index is not None
    assert batch.merge_index.tolist() == list(range(batch.input_ids.size))


def test_a_thread_ends_when_nobody_listens() -> None:
    before = threading.active_count()
    batches = iterate_batches(dataset(), ([index % 60] for index in count()), settings())
    next(batches)
    batches.close()  # type: ignore[attr-defined]
    wait_until(lambda: threading.active_count() == before)


# ---- the pool itself ----


def arrays() -> list[dict[str, np.ndarray]]:
    """Large, small, empty and not contiguous."""
    return [
        {"large": np.full((100, 1000), number, dtype=np.float32), "small": np.arange(number)[::2], "none": np.zeros(0)}
        for number in range(6)
    ]


def check_pool(pool: WorkerPool[str, object, tuple[str, dict[str, np.ndarray]]]) -> None:
    for (context, found), wanted in zip(pool.map(arrays()), arrays(), strict=True):
        assert context == "context"
        for name, values in wanted.items():
            np.testing.assert_array_equal(found[name], values)
            found[name][...] = 0  # like any other array


def shared_files() -> set[str]:
    return {name for name in os.listdir("/dev/shm") if name.startswith("paddlemix-")}


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="this system has no shared memory that is a folder")
def test_large_arrays_come_through_shared_memory_and_leave_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    before = shared_files()
    seen = []
    unpack = workers._unpack
    monkeypatch.setattr(workers, "_unpack", lambda parcel: (seen.append(parcel), unpack(parcel))[1])
    pool = WorkerPool(echo, "context", 1)
    check_pool(pool)
    assert all(parcel.path is not None and len(parcel.pickled) < 10_000 for parcel in seen)
    [folder] = shared_files() - before
    assert not os.listdir(f"/dev/shm/{folder}")
    next(pool.map(arrays()))  # the rest is thrown away
    pool.close()
    wait_until(lambda: not shared_files() - before)

    dropped = WorkerPool(echo, "context", 1)
    next(dropped.map(arrays()))
    del dropped
    wait_until(lambda: not shared_files() - before)


def test_without_shared_memory_everything_is_pickled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(workers, "_SHARED_MEMORY", tmp_path / "none")
    pool = WorkerPool(echo, "context", 1)
    check_pool(pool)
    pool.close()


def test_full_shared_memory_falls_back_to_the_pipe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(folder: str, arrays: list[memoryview]) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(workers, "_write", full)
    parcel = workers._pack(arrays()[1], str(tmp_path))
    assert parcel.path is None
    np.testing.assert_array_equal(workers._unpack(parcel)["large"], arrays()[1]["large"])


def test_workers_end_with_a_killed_parent(tmp_path: Path) -> None:
    """A process that nobody can tell to stop would stay for ever."""
    script = tmp_path / "parent.py"
    script.write_text(
        "import os, signal, sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from paddlemix.datasets.workers import WorkerPool\n"
        "from tests.rows import process_number\n"
        "if __name__ == '__main__':\n"
        "    pool = WorkerPool(process_number, None, 1)\n"
        "    print(next(pool.map([0])), flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n",
        encoding="utf-8",
    )
    run = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=HANG, check=False)
    worker = int(run.stdout)
    wait_until(lambda: not running(worker))
    assert process_number(None, 0) == os.getpid()


def running(number: int) -> bool:
    """Whether a process lives; one that ended and waits to be collected does not."""
    try:
        status = Path(f"/proc/{number}/stat").read_text(encoding="utf-8")
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] not in "ZX"


def test_unused_tiles_are_padded_too() -> None:
    batch = make_batch(dataset(), [0, 1], LoadingSettings(4, dummy_tile=(1, 3, 2, 2), pad_tiles_to_multiple_of=4))
    assert batch.pixel_values is not None and batch.pixel_values.shape == (4, 3, 2, 2)
