"""What every test file may rely on: the environment that paddle reads at its start, and common fixtures.

Loads neither paddle nor numpy, so that a file that needs neither stays quick.
"""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

from paddlemix.launch.events import STOP_SIGNALS
from paddlemix.launch.variables import FAILURE_FILE, begin_file
from tests.forked import child as child  # a fixture
from tests.kernels_built import need_kernels
from tests.moments import signals_of_a_terminal

if TYPE_CHECKING:
    from paddlemix.processors.text.tokenizer import Tokenizer
    from tests.parallel.cluster import Cluster
    from tests.tiny_world import World

ROOT = Path(__file__).resolve().parent.parent
HANG = 900.0  # seconds after which a test tells that something never ends; nothing that works depends on it

# Read once, when paddle loads.  One thread: the tests' tensors are tiny, and test processes run side by side.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# MKL then takes its AVX2 kernels on processors of every make; without it some get the slow generic ones.
os.environ.setdefault("MKL_DEBUG_CPU_TYPE", "5")

# No test asks a server for a model; those of downloads serve themselves.
os.environ.setdefault("PADDLEMIX_OFFLINE", "1")

# What is kept between runs is kept for this one alone.
os.environ["PADDLEMIX_CACHE"] = tempfile.mkdtemp(prefix="paddlemix-cache-")
atexit.register(shutil.rmtree, os.environ["PADDLEMIX_CACHE"], ignore_errors=True)

# A shared machine may stall any example: its time says nothing about the code.
settings.register_profile("paddlemix", settings(deadline=None))
settings.load_profile("paddlemix")


@pytest.fixture(scope="session", autouse=True)
def _signals() -> Iterator[None]:
    """Whether a terminal, a script's background job or `nohup` started the tests makes no difference to them."""
    with signals_of_a_terminal():
        yield


@pytest.fixture(autouse=True)
def _same_signals(_signals: None) -> Iterator[None]:
    """A test leaves signals as it found them: a later one's processes would inherit what it left, and never end."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    left = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    for number, handler in before.items():
        if left[number] is not handler:
            signal.signal(number, handler)
    assert left == before, "the test left other signal handlers than it found"


@pytest.fixture
def begun(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Exists once a command that this test runs has told its launcher that its work begins."""
    failure_file = tmp_path_factory.mktemp("launcher") / "rank-0.json"
    monkeypatch.setattr("paddlemix.launch.worker._failure_file", None)
    monkeypatch.setenv(FAILURE_FILE, str(failure_file))
    return begin_file(failure_file)


@pytest.fixture(params=["compiled", "plain"])
def form(request: pytest.FixtureRequest) -> Iterator[str]:
    """What a test computes with: the kernels in C, then paddle's operators in their place."""
    from paddlemix.models.kernels import cpu_library

    if request.param == "plain":
        with cpu_library.switched_off():
            yield request.param
    else:
        need_kernels()
        yield request.param


@pytest.fixture
def kernels() -> None:
    """For a test that computes with the kernels in C, see `need_kernels`."""
    need_kernels()


@pytest.fixture(scope="session")
def tokenizer_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of a small tokenizer of the Llama kind, trained once per session."""
    from tests.tiny import write_tokenizer

    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def tokenizer(tokenizer_directory: Path) -> Tokenizer:
    """The same, loaded."""
    from paddlemix.processors.text.tokenizer import load_tokenizer

    return load_tokenizer(tokenizer_directory)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> World:
    """Pictures, conversations and a tiny model to train; only to be read."""
    from tests.tiny_world import build_world

    return build_world(tmp_path_factory.mktemp("world"), tokenizer)


@pytest.fixture(scope="session")
def uneven_world(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> World:
    """As `world`, with a language model that up to eight processes can share, not all of them equally."""
    from tests.tiny_world import build_world

    sizes = {"vocab_size": 481, "intermediate_size": 45, "num_attention_heads": 8, "num_key_value_heads": 8}
    return build_world(tmp_path_factory.mktemp("uneven world"), tokenizer, **sizes)


@pytest.fixture(scope="session")
def adapter(tmp_path_factory: pytest.TempPathFactory, world: World) -> Path:
    """An adapter trained for four steps on the world's model; only to be read."""
    from paddlemix.trainer.recipe import run_recipe
    from tests.tiny_world import LORA

    directory = tmp_path_factory.mktemp("adapter") / "adapter"
    run_recipe(world.config(directory, learning_rate=0.02, **LORA))
    return directory


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Runs of several processes, on the CPU or on stand-in NPUs."""
    from tests.parallel.cluster import Cluster

    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    yield cluster
    cluster.close()
