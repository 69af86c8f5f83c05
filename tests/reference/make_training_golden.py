"""Writes `tests/golden/training/*.json`: the reference's losses and final weights of every run.

    .venv-reference/bin/python -m tests.reference.make_training_golden

Needs the reference environment (`make reference` makes it).  `test_training_reference.py` compares the same runs live.
"""

from __future__ import annotations

import platform
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from paddlemix.checkpoints.files.weight_files import write_json
from tests.reference.training_reference import run_reference
from tests.training_cases import CASES, GOLDEN_TRAINING, Case, build_start, data_digest, start_weights, summary


def golden(case: Case, start: Path, output_dir: Path) -> dict[str, Any]:
    """The content of a case's file; of the weights only those that changed."""
    losses, weights = run_reference(case, start, output_dir)
    before = start_weights(case, start)
    made_by = {name: version(name) for name in ("torch", "transformers", "peft", "numpy")}
    made_by |= {"llava-torch": version("llava-torch")} if case.modality else {}
    return {
        "made_by": {**made_by, "python": platform.python_version(), "device": "cpu", "dtype": "float32"},
        "data_sha256": data_digest(case, start),
        "losses": losses,
        "weights": {
            name: summary(weight)
            for name, weight in sorted(weights.items())
            if not np.array_equal(weight, before[name])
        },
    }


def main() -> None:
    """Writes all files."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        starts = {kind: build_start(root / f"start{kind}", kind) for kind in (False, True)}
        for case in CASES:
            content = golden(case, starts[case.any_resolution], root / case.name)
            write_json(GOLDEN_TRAINING / f"{case.name}.json", content)


if __name__ == "__main__":
    main()
