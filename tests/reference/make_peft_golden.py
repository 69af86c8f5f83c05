"""Writes `tests/golden/peft_llava_hf/`: adapters of a tiny llava-hf model as PEFT saves them, and PEFT's logits.

    .venv-reference/bin/python -m tests.reference.make_peft_golden

Needs the reference environment (`make reference` makes it); with transformers 5 in it the cases of its names are
written, else the others.  `test_peft_llava_hf_reference.py` compares the same cases, and more, live.
"""

from __future__ import annotations

import os
import shutil

import numpy as np

from tests.peft_cases import BASE, CASES, GOLDEN_ADAPTERS, NUM_POSITIONS, with_base
from tests.reference.peft_llava_hf import IS_5, adapted_model, save, their_logits


def main() -> None:
    """Writes the files of every golden case."""
    for name in (name for name, case in CASES.items() if case.is_golden and (case.spelling == "5") is IS_5):
        directory, model = GOLDEN_ADAPTERS / name, adapted_model(CASES[name])
        shutil.rmtree(directory, ignore_errors=True)
        logits = their_logits(model)[-NUM_POSITIONS:]
        save(model, CASES[name], directory)
        with_base(directory, os.path.relpath(BASE, directory))
        np.savez_compressed(directory / "logits.npz", logits=logits)


if __name__ == "__main__":
    main()
