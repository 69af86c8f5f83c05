"""Worker of `benchmarks/generate.py`: the same with transformers' `generate`, at its defaults.

Runs in the environment of `make reference`.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(FOLDER / "training"), str(FOLDER)]

from torch_peer import build_model  # noqa: E402
from turns import claim_output, take_turns  # noqa: E402
from workload import Workload, draw_batch  # noqa: E402


def main() -> int:
    """Builds the model and waits for the driver."""
    output = claim_output()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("batch_size", type=int)
    parser.add_argument("tokens", type=int)
    arguments = parser.parse_args()
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    work = Workload(batch_size=arguments.batch_size)
    model, raw = build_model(work).eval(), draw_batch(work)
    model.config.text_config.use_cache = model.generation_config.use_cache = True
    model.generation_config.pad_token_id = 0
    input_ids = torch.from_numpy(raw.input_ids)
    inputs = {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "pixel_values": torch.from_numpy(raw.pixel_values),
    }

    def answer(count: int) -> list[list[int]]:
        found = model.generate(**inputs, max_new_tokens=count, do_sample=False, eos_token_id=None)
        return found[:, input_ids.shape[1] :].tolist()

    take_turns(output, {"first": lambda: answer(1), "answer": lambda: answer(arguments.tokens)})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
