"""The compiled kernels of every kind of processor that this one can run, on one thread and on several."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest

import paddlemix.models  # noqa: F401  sets the environment before paddle is imported
from paddlemix.models.kernels import cpu_library
from tests.kernels_built import need_kernels

KINDS, THREADS = ("plain", "avx2", "avx512"), (1, 3)


@pytest.fixture
def fresh_library() -> Iterator[Callable[[], None]]:
    """Has the library loaded anew, now and at each call; the next test's is too."""

    def forget() -> None:
        cpu_library._load.cache_clear()
        cpu_library._best_file.cache_clear()

    forget()
    yield forget
    forget()


@pytest.fixture(params=list(itertools.product(KINDS, THREADS)), ids=lambda pair: f"{pair[0]}-{pair[1]}")
def library(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, fresh_library: Callable[[], None]
) -> Iterator[tuple[str, int]]:
    """Kind and threads that the kernels compute with, however few numbers there are."""
    kind, threads = request.param
    need_kernels(kind)
    monkeypatch.setattr(cpu_library, "_processor_features", lambda: cpu_library._KINDS[kind])
    monkeypatch.setattr(cpu_library, "_LEAST_NUMBERS", 0)
    monkeypatch.setenv("OMP_NUM_THREADS", str(threads))
    fresh_library()
    assert cpu_library.kind() == kind and cpu_library.threads(1) == threads
    yield kind, threads
