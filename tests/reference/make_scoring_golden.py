"""Writes tests/golden/scoring/outcomes.json: what the real scorers make of the generated cases.

    LLAVA_PACKAGE=... LMMS_PACKAGE=... python -m tests.reference.make_scoring_golden

Run it where `make reference` has put the scorers.  Of each list of outcomes the file has the first ones and a digest
of every hundred.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from tests.evaluation.scoring.generated import CASES, blocks, cases, rounded
from tests.reference.scoring_outcomes import outcomes

TARGET = Path(__file__).parents[1] / "golden" / "scoring" / "outcomes.json"
SHOWN = 40


def main() -> None:
    """Makes the file."""
    found = {name: cases(name) for name in CASES}
    with tempfile.TemporaryDirectory() as folder:
        made = outcomes(found, Path(folder))
    golden = {
        name: {
            "cases": blocks(found[name]),
            "outcomes": {
                key: {"first": rounded(values[:SHOWN]), "blocks": blocks(values)} for key, values in kinds.items()
            },
        }
        for name, kinds in made.items()
    }
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    TARGET.write_text(json.dumps(golden, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
