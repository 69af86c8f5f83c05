"""Memory of a process that loads its part of a model, beside that of one that loads the whole: tensor parallelism.

    python benchmarks/loading.py                the shapes of LLaVA-1.5-7B, 14 GB of disk and of memory; 5 minutes
    python benchmarks/loading.py --layers 4     to try it out

The checkpoint is random bfloat16 numbers in original LLaVA's layout, which is removed afterwards.  Each measurement is
a process of its own, one after the other: loading sends nothing, so a process needs no other one to load its part.
Memory is the largest resident set, libraries and pages of mapped files included; weights are held in bfloat16.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

LIMIT = 0.6  # of one process's memory, for two


def build_parser() -> argparse.ArgumentParser:
    """The benchmark's arguments."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=32, help="of the language model, 0.4 GB each")
    parser.add_argument("--degree", type=int, default=2, help="processes that share the model")
    parser.add_argument("--folder", type=Path, help="where the files go; default: the system's temporary folder")
    parser.add_argument("--part", nargs=3, help=argparse.SUPPRESS)  # the children: directory, degree, rank
    return parser


def measure(directory: str, degree: int, rank: int) -> dict[str, float]:
    """Loads a part in this process: seconds, and gigabytes of the part and at the peak."""
    from paddlemix.checkpoints.load import load_pretrained
    from paddlemix.device import peak_memory_bytes, select_device
    from paddlemix.parallel.layout import ALONE, Layout

    device = select_device("cpu")
    before = peak_memory_bytes(device)
    group = SimpleNamespace(nranks=degree, rank=rank)
    layout = ALONE if degree == 1 else Layout(world_size=degree, rank=rank, tensor_group=group)
    start = time.perf_counter()
    model = load_pretrained(directory, "bfloat16", layout=layout).model
    return {
        "seconds": round(time.perf_counter() - start, 1),
        "weights_gb": round(sum(weight.size for weight in model.parameters()) * 2 / 1e9, 3),
        "before_gb": round(before / 1e9, 3),
        "peak_gb": round(peak_memory_bytes(device) / 1e9, 3),
    }


def measured(directory: str, degree: int, rank: int) -> dict[str, Any]:
    """The same in a process of its own."""
    command = [sys.executable, str(Path(__file__).resolve()), "--part", directory, str(degree), str(rank)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    result = {"processes": degree, "rank": rank, **json.loads(output.splitlines()[-1])}
    print(json.dumps(result), flush=True)
    return result


def main() -> int:
    """Prints a line of JSON for each process; status 1 where two processes need more than `LIMIT` of one's memory."""
    arguments = build_parser().parse_args()
    if arguments.part:
        directory, degree, rank = arguments.part
        print(json.dumps(measure(directory, int(degree), int(rank))))
        return 0
    from convert import make_checkpoint

    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        print(f"wrote {make_checkpoint(Path(name), arguments.layers, 'bfloat16') / 1e9:.1f} GB", flush=True)
        whole = measured(name, 1, 0)
        parts = [measured(name, arguments.degree, rank) for rank in range(arguments.degree)]
    ratio = max(part["peak_gb"] for part in parts) / whole["peak_gb"]
    print(json.dumps({"ratio": round(ratio, 3)}))
    return int(arguments.degree == 2 and ratio > LIMIT)


if __name__ == "__main__":
    raise SystemExit(main())
