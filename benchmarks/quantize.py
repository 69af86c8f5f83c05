"""What holding a language model in 8 or 4 bits costs and saves: in a layer, in a small model's answers, and at 7B.

    python benchmarks/quantize.py layers                 512 x 1376 and 4096 x 11008, 512 rows and 1 row
    python benchmarks/quantize.py model --model runs/demo/scenes --data runs/demo/data/scenes_heldout.json \\
        --image-root runs/demo/data                      error of logits, perplexity, right answers
    python benchmarks/quantize.py 7b                     14 GB of random weights on the disk, removed afterwards

Each part has a file in `quantizing/`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from paddlemix.device import prepare_environment  # noqa: E402

prepare_environment()  # must come before the first `import paddle`

from quantizing import large, layers, model  # noqa: E402

PARTS = {"layers": layers, "model": model, "7b": large}


def main() -> int:
    """Runs one part."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parts = parser.add_subparsers(dest="part", required=True)
    for name, module in PARTS.items():
        module.add_arguments(parts.add_parser(name, help=(module.__doc__ or "").splitlines()[0]))
    arguments = parser.parse_args()
    return PARTS[arguments.part].run(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
