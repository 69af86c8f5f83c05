"""Answers of the small LLaVA, beside transformers' `generate`: prefill, decoding and memory.

    python benchmarks/generate.py                     about 3 minutes; needs `make reference` once
    python benchmarks/generate.py --batch-sizes 1 --rounds 20

Each library runs in a process of its own, with as many threads, and they take turns.  The model and the questions are
those of `training/workload.py`: 256 image and 128 text positions, greedy.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER))

from turns import REST_SECONDS, Worker, start_worker  # noqa: E402


def build_parser() -> argparse.ArgumentParser:
    """The benchmark's arguments."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--rounds", type=int, default=12, help="timed turns of each")
    parser.add_argument("--warmup", type=int, default=2, help="turns of each before")
    parser.add_argument("--tokens", type=int, default=33, help="of an answer")
    parser.add_argument("--threads", type=int, default=2, help="of each process")
    parser.add_argument(
        "--reference", type=Path, default=FOLDER.parent / ".venv-reference/bin/python", help="python that has torch"
    )
    return parser


def compare(batch_size: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Lets both take turns at one token and at a whole answer; a decoded token is what the second takes longer."""
    given = [str(batch_size), str(arguments.tokens)]
    pythons = {"ours": Path(sys.executable), "torch_peer": arguments.reference}
    workers = [
        start_worker(name, python, FOLDER / "generation" / f"{name}.py", given, arguments.threads)
        for name, python in pythons.items()
    ]
    try:
        for _ in range(arguments.warmup + arguments.rounds):
            for kind in ("first", "answer"):
                for worker in workers:
                    worker.work(kind)
                    time.sleep(REST_SECONDS)
        memory = [worker.ask("memory")["bytes"] for worker in workers]
    finally:
        for worker in workers:
            worker.stop()
    prefill = [_middle(worker, "first", arguments.warmup) for worker in workers]
    decode = [
        (_middle(worker, "answer", arguments.warmup) - first) / (arguments.tokens - 1)
        for worker, first in zip(workers, prefill, strict=True)
    ]
    return {
        "batch_size": batch_size,
        "our_prefill_seconds": round(prefill[0], 3),
        "peer_prefill_seconds": round(prefill[1], 3),
        "prefill_ratio": round(prefill[1] / prefill[0], 2),
        "our_token_milliseconds": round(1000 * decode[0], 2),
        "peer_token_milliseconds": round(1000 * decode[1], 2),
        "decode_ratio": round(decode[1] / decode[0], 2),
        "our_megabytes": round(memory[0] / 1e6),
        "peer_megabytes": round(memory[1] / 1e6),
        "memory_ratio": round(memory[0] / memory[1], 2),
        "equal_tokens": workers[0].values["answer"][0] == workers[1].values["answer"][0],
    }


def _middle(worker: Worker, kind: str, warmup: int) -> float:
    return statistics.median(worker.seconds[kind][warmup:])


def main() -> int:
    """Measures and prints a line of JSON and a table for every batch size."""
    arguments = build_parser().parse_args()
    if not arguments.reference.exists():
        raise SystemExit(f"{arguments.reference} does not exist; run `make reference` once")
    for batch_size in arguments.batch_sizes:
        result = compare(batch_size, arguments)
        print(json.dumps(result))
        for key, value in result.items():
            print(f"{key:26} {value}")
        print(flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
