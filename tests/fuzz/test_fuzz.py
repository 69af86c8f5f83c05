"""A short part of `make fuzz` with a fixed seed: damaged files are read or refused in words, never with a traceback."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fuzz.mutations import ABSURD, _other_type, mutate_json
from tests.fuzz.targets import TARGETS, run_case

SEED = 1


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    written: dict[str, Path] = {}

    def write(target: str) -> Path:
        if target not in written:
            written[target] = tmp_path_factory.mktemp(target) / "seeds"
            written[target].mkdir()
            TARGETS[target].seeds(written[target])
        return written[target]

    return write


@pytest.mark.parametrize("target", TARGETS)
def test_damaged_files_are_read_or_refused(seeds: Callable[[str], Path], tmp_path: Path, target: str) -> None:
    for number in range(TARGETS[target].in_tests):
        try:
            run_case(target, SEED, number, seeds(target), tmp_path / "case")
        except Exception as error:
            pytest.fail(
                f"case {number}: {type(error).__name__}: {error}\n"
                f"repeat it: python -m tests.fuzz --target {target} --seed {SEED} --case {number}"
            )


def test_a_case_depends_on_its_number_alone() -> None:
    value = {"sizes": [1, 2], "model": {"layers": 3, "names": ["a", "b"]}}
    cases = [json.dumps(mutate_json(random.Random(number), value, times=3)) for number in range(600)]
    assert cases == [json.dumps(mutate_json(random.Random(number), value, times=3)) for number in range(600)]
    assert {} in ABSURD and [] in ABSURD and [[]] in ABSURD


def test_a_vocabulary_is_not_repeated_until_it_is_all_memory() -> None:
    value = {str(number): number for number in range(20_000)}
    length = len(json.dumps(value))
    sizes = [len(json.dumps(_other_type(random.Random(number), value))) for number in range(20)]
    assert 2 * length < max(sizes) < 3 * length
