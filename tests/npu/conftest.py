"""The stand-in NPU as fixtures: servers that run commands on it and on the CPU, each started once, and their runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.npu.server import DeviceServer, Outcome
from tests.npu_double.build import NEWER, PLAIN, README_BLOCK, README_FIRST_LINE, STRICT, built_or_skipped
from tests.tiny_world import World

WAYS = ("bare", "block")  # without flags of the user's, and with those of PaddleMIX's README
# Which operators go to the host for want of one of the device's is in the log; no longer text, see doctor/card.py.
_TOLD = {"GLOG_vmodule": "kernel_fact*=3", "GLOG_minloglevel": "0"}
FLAGS = {
    "block": README_BLOCK,
    "whole block": {**README_BLOCK, **README_FIRST_LINE},
    "strict": {**STRICT, **_TOLD, **PLAIN},  # the operators of the real plugin alone, its own fused ones left out
    "fused": {**STRICT, **_TOLD},
    "newer": {**NEWER, **_TOLD, **PLAIN},
}


class Bench:
    """Commands by where they run: "cpu", "bare" or a key of `FLAGS`; equal trainings run once.

    Args:
        world: read by all of them.
        root: for runs and logs.
        plugin: of the stand-in NPU.
    """

    def __init__(self, world: World, root: Path, plugin: Path) -> None:
        self.world, self.root = world, root
        self._plugin = plugin
        self._servers: dict[str, DeviceServer] = {}
        self._trainings: dict[tuple[str, str], Outcome] = {}

    def run(self, where: str, command: str, *arguments: Any, **options: Any) -> Outcome:
        """Runs `paddlemix.COMMAND` there, see `DeviceServer.run`; chooses no device by itself."""
        if where not in self._servers:
            logs = self.root / where / "logs"
            logs.mkdir(parents=True)
            flags = FLAGS.get(where, {})
            self._servers[where] = DeviceServer(logs, None if where == "cpu" else self._plugin, **flags)
        return self._servers[where].run(command, *arguments, **options)

    def train(self, where: str, name: str, changes: dict[str, Any], command: str = "tools.supervised_finetune") -> Path:
        """The result of a training of the world's model; `outcome` has what it did.

        Args:
            name: of the run; equal ones are made once.
            changes: of the world's recipe.
        """
        out = self.root / where / name / "out"
        if (where, name) not in self._trainings:
            recipe = self.world.recipe(out.parent, **{"device": device_of(where), **changes})
            self._trainings[where, name] = self.run(where, command, recipe)
        assert self._trainings[where, name].status == 0, self._trainings[where, name].err
        return out

    def outcome(self, where: str, name: str) -> Outcome:
        """What such a training did."""
        return self._trainings[where, name]

    def close(self) -> None:
        """Ends the servers."""
        for server in self._servers.values():
            server.close()


def device_of(where: str) -> str:
    """As a configuration and `--device` name it."""
    return "cpu" if where == "cpu" else "npu"


@pytest.fixture(scope="session")
def plugin() -> Path:
    """The folder of the compiled stand-in; skips where it cannot exist, unless the environment requires it."""
    return built_or_skipped()


@pytest.fixture(scope="session")
def bench(world: World, tmp_path_factory: pytest.TempPathFactory, plugin: Path) -> Iterator[Bench]:
    """Shared by all tests: what one has trained, another questions."""
    bench = Bench(world, tmp_path_factory.mktemp("npu"), plugin)
    yield bench
    bench.close()


@pytest.fixture(params=WAYS)
def where(request: pytest.FixtureRequest) -> str:
    """Both ways to run on the device."""
    return str(request.param)
