"""Fuzzes for some time: batches of damaged files in processes of their own, under a watch.

    python -m tests.fuzz --seconds 600                          all targets in turn, a new seed
    python -m tests.fuzz --target model --seed 7 --case 1234    one case again

A case fails with a traceback, by ending its process, by more memory than the limit, and by 10 seconds of processor time
(time in which it computes: a loaded machine makes no case fail). What it read is kept. Status 1 where any case failed.
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile
import time
from pathlib import Path

from tests.fuzz.batches import BATCH, run_batch
from tests.fuzz.targets import TARGETS, run_case


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=600.0, help="how long, all targets together")
    parser.add_argument("--seed", type=int, default=None, help="default: drawn, and printed")
    parser.add_argument("--target", choices=TARGETS, help="default: all in turn")
    parser.add_argument("--case", type=int, help="this one alone, here, with its traceback")
    parser.add_argument("--failures", type=Path, default=Path("fuzz_failures"), help="folder for inputs that failed")
    arguments = parser.parse_args()
    os.environ["PADDLEMIX_OFFLINE"] = "1"
    if arguments.case is not None:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["PADDLEMIX_CACHE"] = f"{folder}/cache"
            seeds = Path(folder) / "seeds"
            seeds.mkdir()
            TARGETS[arguments.target].seeds(seeds)
            run_case(arguments.target, arguments.seed or 0, arguments.case, seeds, Path(folder) / "case")
        return 0
    seed = random.randrange(10**6) if arguments.seed is None else arguments.seed
    print(f"seed {seed}", flush=True)  # noqa: T201
    targets = [arguments.target] if arguments.target else list(TARGETS)
    counts, failed, until = dict.fromkeys(targets, 0), 0, time.monotonic() + arguments.seconds
    share = max(arguments.seconds / len(targets) / 3, 10.0)  # so that each has its turn, three times
    while time.monotonic() < until:
        for target in targets:
            end = min(until, time.monotonic() + share)
            while time.monotonic() < end:
                numbers = range(counts[target], counts[target] + BATCH)
                ran, bad = run_batch(target, seed, numbers, arguments.failures, end)
                counts[target], failed = counts[target] + ran, failed + bad
    print(", ".join(f"{target} {count:,}" for target, count in counts.items()) + f" cases; {failed} failed")  # noqa: T201
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
