"""Time and memory of a training step, beside torch + transformers + PEFT and beside PaddleNLP's own Llama.

    python benchmarks/train.py                        LoRA and full, about 10 minutes; needs `make reference` once
    python benchmarks/train.py --methods lora --rounds 20 --rank 128
    python benchmarks/train.py --peers paddlenlp      needs no torch

Every library runs in a process of its own, with as many threads, and they take turns: one step each, round by round,
while the others sleep.  `training/workload.py` defines a step.
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
sys.path[:0] = [str(FOLDER), str(FOLDER / "training")]

from operations import count_operations  # noqa: E402
from turns import REST_SECONDS, Worker, start_worker  # noqa: E402
from workload import METHODS, Workload  # noqa: E402

WORKERS = {"ours": "ours.py", "torch": "torch_peer.py", "paddlenlp": "paddlenlp_peer.py"}
SAME_LOSS = 2e-6


def build_parser() -> argparse.ArgumentParser:
    """The benchmark's arguments."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--peers", nargs="+", default=["torch", "paddlenlp"], choices=[*WORKERS][1:])
    parser.add_argument("--rounds", type=int, default=15, help="timed steps of each")
    parser.add_argument("--warmup", type=int, default=3, help="steps of each before")
    parser.add_argument("--rank", type=int, default=Workload.lora_rank, help="of the LoRA adapters")
    parser.add_argument("--threads", type=int, default=2, help="of each process")
    parser.add_argument(
        "--reference", type=Path, default=FOLDER.parent / ".venv-reference/bin/python", help="python that has torch"
    )
    return parser


def start(name: str, method: str, work: Workload, arguments: argparse.Namespace) -> Worker:
    """Starts a worker and waits until it is ready."""
    python = arguments.reference if name == "torch" else sys.executable
    given = [method, "--rank", str(work.lora_rank), *(["--text-only"] if work.text_only else [])]
    return start_worker(name, python, FOLDER / "training" / WORKERS[name], given, arguments.threads)


def compare(peer: str, method: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Lets us and a peer take turns; gives medians, ratios and the share of the matrix rate that our step reaches."""
    work = Workload(text_only=peer == "paddlenlp", lora_rank=arguments.rank)
    workers = [start(name, method, work, arguments) for name in ("ours", peer)]
    rates = []
    try:
        for _ in range(arguments.warmup + arguments.rounds):
            for worker in workers:
                worker.work("step")
                time.sleep(REST_SECONDS)
            product = workers[0].ask("product 3")
            rates.append(product["values"][0] / min(product["seconds"]))
            time.sleep(REST_SECONDS)
        memory = [worker.ask("memory")["bytes"] for worker in workers]
    finally:
        for worker in workers:
            worker.stop()
    ours, theirs = (statistics.median(worker.seconds["step"][arguments.warmup :]) for worker in workers)
    difference = max(abs(a / b - 1) for a, b in zip(*(worker.values["step"] for worker in workers), strict=True))
    operations = count_operations(work, method)
    return {
        "method": method,
        "peer": peer,
        "our_seconds": round(ours, 3),
        "peer_seconds": round(theirs, 3),
        "speed_ratio": round(theirs / ours, 2),
        "speed_ratio_of_fastest": round(
            min(workers[1].seconds["step"][arguments.warmup :]) / min(workers[0].seconds["step"][arguments.warmup :]), 2
        ),
        "our_megabytes": round(memory[0] / 1e6),
        "peer_megabytes": round(memory[1] / 1e6),
        "memory_ratio": round(memory[0] / memory[1], 2),
        "our_gigaflop": round(operations / 1e9),
        "our_gigaflop_per_second": round(operations / ours / 1e9),
        "peak_gigaflop_per_second": round(max(rates) / 1e9),
        "share_of_peak": round(operations / ours / max(rates), 2),
        "largest_loss_difference": float(f"{difference:.1e}"),
    }


def main() -> int:
    """Measures and prints a line of JSON and a table for every method and peer."""
    arguments = build_parser().parse_args()
    if "torch" in arguments.peers and not arguments.reference.exists():
        raise SystemExit(f"{arguments.reference} does not exist; run `make reference` once, or use --peers paddlenlp")
    for peer in arguments.peers:
        for method in arguments.methods:
            result = compare(peer, method, arguments)
            print(json.dumps(result))
            for key, value in result.items():
                print(f"{key:26} {value}")
            print(flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
