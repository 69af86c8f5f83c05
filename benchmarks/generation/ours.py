"""Worker of `benchmarks/generate.py`: answers of `paddlemix` to the workload's questions."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "benchmarks" / "training")]

from ours import build_model  # noqa: E402
from turns import claim_output, take_turns  # noqa: E402
from workload import Workload, draw_batch  # noqa: E402


def main() -> int:
    """Builds the model and waits for the driver."""
    output = claim_output()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("batch_size", type=int)
    parser.add_argument("tokens", type=int)
    arguments = parser.parse_args()
    import paddlemix.models  # noqa: F401  sets the environment before paddle is imported
    from paddlemix.generation.generate import generate
    from paddlemix.generation.sampling import GenerationSettings
    from paddlemix.sample import IMAGE_TOKEN_INDEX, Example

    work = Workload(batch_size=arguments.batch_size)
    model, raw = build_model(work), draw_batch(work)
    model.eval()
    ids = np.where(raw.input_ids == work.image_token, IMAGE_TOKEN_INDEX, raw.input_ids)
    assert raw.pixel_values is not None
    prompts = [
        Example(input_ids=row, labels=row, pixel_values=tile[None], image_index=np.arange(work.image_tokens))
        for row, tile in zip(ids, raw.pixel_values, strict=True)
    ]

    def answer(count: int) -> list[list[int]]:
        return generate(model, prompts, GenerationSettings(max_new_tokens=count), ())

    take_turns(output, {"first": lambda: answer(1), "answer": lambda: answer(arguments.tokens)})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
