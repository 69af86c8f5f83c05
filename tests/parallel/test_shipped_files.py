"""The shipped files with sharding: three steps on two stand-in NPUs, killed, resumed; the result is one process's."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from paddlemix.checkpoints.load import load_pretrained
from paddlemix.generation.chat import ChatSession
from paddlemix.generation.sampling import GenerationSettings
from tests.families.families import QUESTION
from tests.parallel.cluster import Cluster, Outcome
from tests.parallel.curves import gaps, losses_and_weights
from tests.parallel.rank import Hook
from tests.parallel.shipped import build_start, cut, sharded_files
from tests.parallel.table import SLICED

IN_EVERY_TEST_RUN = ("mistral/sft_argument.json", "v1_5/lora_sft_argument_stage2.json")
FILES = [pytest.param(name, marks=[] if name in IN_EVERY_TEST_RUN else [pytest.mark.slow]) for name in sharded_files()]
SLICES = Hook("tests.parallel.hooks:slice_weights", values={"largest": SLICED})


def train(cluster: Cluster, ranks: int, values: dict[str, Any], *hooks: Hook) -> Outcome:
    path = Path(values["output_dir"]).with_suffix(".json")
    path.write_text(json.dumps(values), encoding="utf-8")
    return cluster.run(ranks, "tools.supervised_finetune", path, where="npu", hooks=hooks, limit=300)


def answer(directory: Path, picture: Path) -> str:
    session = ChatSession(load_pretrained(directory), settings=GenerationSettings(temperature=0.0, max_new_tokens=12))
    return session.answer(QUESTION, [Image.open(picture)])


def test_there_are_such_files() -> None:
    assert len(FILES) == 15 and set(IN_EVERY_TEST_RUN) <= set(sharded_files())


@pytest.mark.parametrize("name", FILES)
def test_three_steps_two_processes_a_kill_and_a_result(cluster: Cluster, tmp_path: Path, name: str) -> None:
    (tmp_path / "start").mkdir()
    files = build_start(name, tmp_path / "start")
    one = cut(name, files, tmp_path / "one")
    one |= {"sharding": "", "gradient_accumulation_steps": 2 * one["gradient_accumulation_steps"]}
    one.pop("sharding_parallel_degree", None)
    outcome = train(cluster, 1, one)
    assert outcome.ok, outcome.told()

    two = cut(name, files, tmp_path / "two")
    killed = Hook("tests.parallel.hooks:signal_in_step", values={"step": 3, "number": int(signal.SIGKILL)})
    outcome = train(cluster, 2, two, SLICES, killed)
    assert outcome.statuses == [-9, -9] and (tmp_path / "two" / "checkpoint-2").is_dir(), outcome.told()
    outcome = train(cluster, 2, two, SLICES)
    assert outcome.ok, outcome.told()
    assert "step 3/3" in outcome.logs[0] and "step 2/3" not in outcome.logs[0], outcome.told()

    apart = gaps(losses_and_weights(tmp_path / "one"), losses_and_weights(tmp_path / "two"))
    assert apart.loss < 1e-5 and apart.norm < 1e-3, apart
    assert apart.weight < 1e-5, apart
    said = [answer(tmp_path / which, files.picture) for which in ("one", "two")]
    assert said[0] == said[1]
