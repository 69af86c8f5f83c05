"""5,000 generated answers for each benchmark: our scorers make of them what the real ones made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.evaluation.scoring.generated import CASES, COUNT, blocks, cases, rounded
from tests.evaluation.scoring.our_outcomes import OUTCOMES

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "scoring" / "outcomes.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", CASES)
def test_outcomes_are_the_real_scorers(name: str) -> None:
    found = cases(name)
    assert len(found) == COUNT
    assert blocks(found) == GOLDEN[name]["cases"], "other cases than the golden file was made of"
    made, golden = OUTCOMES[name](found), GOLDEN[name]["outcomes"]
    assert made.keys() == golden.keys()
    for key, values in made.items():
        assert rounded(values[: len(golden[key]["first"])]) == golden[key]["first"], key
        assert differing(values, golden[key]["blocks"]) == [], key


def differing(values: list[Any], digests: list[str]) -> list[str]:
    """The blocks of a hundred outcomes that are others than the golden file's."""
    found = blocks(values)
    assert len(found) == len(digests)
    return [
        f"{100 * n}..{100 * n + 99}" for n, (own, real) in enumerate(zip(found, digests, strict=True)) if own != real
    ]
