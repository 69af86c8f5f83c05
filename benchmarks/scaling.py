"""What several processes cost: speed of two beside one, the share of communication, and what each layout sends.

    python benchmarks/scaling.py                 about ten minutes
    python benchmarks/scaling.py --parts traffic about two; needs g++ for the stand-in NPU

Speed: one process with two threads beside two processes with one thread each, the same global batch, on CPU.  The same
two processes without what they exchange give the share of communication.  Traffic: the bytes of all collectives of a
step on two stand-in NPUs, as a ring sends them, beside the least that the layout needs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from memory import Case, write_case  # noqa: E402

from tests.parallel.cluster import Circumstances, Cluster, Outcome  # noqa: E402

CARDS, FLOAT32 = 2, 4
_LORA = ["lora=true", "lora_rank=16", "lora_alpha=32"]
_SPLIT = "tensor_parallel_degree=2"
SPEED = {
    "full": [],
    "LoRA": _LORA,
    "full, stage1": ["sharding=stage1"],
    "full, tensor parallel": [_SPLIT],
    "LoRA, tensor parallel": [*_LORA, _SPLIT],
}
LAYOUTS = {
    "data parallel": [],
    **{stage: [f"sharding={stage}"] for stage in ("stage1", "stage2", "stage3")},
    "tensor parallel": [_SPLIT],
}
_HOURS = 2 * 3600.0
# Weights of a decoder layer above 2**20 numbers, the least that stage 3 slices.
_WIDE = {"vocab_size": 4000, "hidden_size": 1152, "intermediate_size": 3072, "num_hidden_layers": 3}


def _call(cluster: Cluster, ranks: int, function: str, where: Any, **values: Any) -> Outcome:
    how = Circumstances(where=where, limit=_HOURS)
    values["overrides"] = [*values["overrides"], f"output_dir={tempfile.mkdtemp(dir=Path(values['recipe']).parent)}"]
    outcome = cluster.call(ranks, f"benchmarks.training.ranks:{function}", how, **values)
    if not outcome.ok:
        raise SystemExit(outcome.told())
    return outcome


def speed(folder: Path, rounds: int) -> list[dict[str, Any]]:
    """Medians of a step's seconds, alternating between one process and two."""
    recipe = str(write_case(Case(keys={"max_steps": 8}), folder / "speed"))
    seconds: dict[tuple[str, str], list[float]] = {}
    for _ in range(rounds):
        for kind, ranks, threads, silent in (("one", 1, 2, False), ("two", 2, 1, False), ("silent", 2, 1, True)):
            # Threads are counted when paddle is loaded, so each number needs its own server.
            os.environ["OMP_NUM_THREADS"] = str(threads)
            cluster = Cluster(Path(tempfile.mkdtemp(dir=folder)))
            for name, keys in SPEED.items():
                # The processes of a tensor group read the same samples.
                batch = f"per_device_train_batch_size={4 if _SPLIT in keys else 4 // ranks}"
                own = [key for key in keys if ranks > 1 or not key.startswith(("sharding", "tensor_parallel"))]
                outcome = _call(cluster, ranks, "timed", "cpu", recipe=recipe, overrides=[*own, batch], silent=silent)
                seconds.setdefault((name, kind), []).extend(outcome.results[0])
                print(
                    f"{name}, {kind}: {[round(value, 3) for value in outcome.results[0]]}", file=sys.stderr, flush=True
                )
            cluster.close()
    return [_speed_of(name, seconds) for name in SPEED]


def _speed_of(name: str, seconds: dict[tuple[str, str], list[float]]) -> dict[str, Any]:
    one, two, silent = (statistics.median(seconds[name, kind]) for kind in ("one", "two", "silent"))
    return {
        "run": name,
        "seconds_one": round(one, 3),
        "seconds_two": round(two, 3),
        "efficiency": round(one / two, 2),
        "communication": round(max(0.0, 1 - silent / two), 2),
    }


def traffic(folder: Path) -> list[dict[str, Any]]:
    """MB that a card sends in a step of full training, and the least for its layout."""
    case = Case(keys={"device": "npu", "per_device_train_batch_size": 1}, text=_WIDE)
    recipe = str(write_case(case, folder / "traffic"))
    cluster = Cluster(Path(tempfile.mkdtemp(dir=folder)))
    found = []
    for layout, keys in LAYOUTS.items():
        # The difference of two lengths leaves out what a run exchanges at its start and end.
        runs = [
            _call(cluster, CARDS, "ran", "npu", recipe=recipe, overrides=[*keys, f"max_steps={steps}"])
            for steps in (2, 4)
        ]
        sizes = runs[0].results[0]
        positions = (runs[1].results[0]["positions"] - sizes["positions"]) / 2  # of a step
        each = [sum(_sent(run, rank) for rank in range(CARDS)) / CARDS for run in runs]
        step, least = (each[1] - each[0]) / 2, _least(layout, {**sizes, "positions": positions})
        mb = {"sent_mb": round(step / 1e6, 1), "least_mb": round(least / 1e6, 1), "ratio": round(step / least, 2)}
        found.append({"layout": layout, **mb})
    cluster.close()
    return found


def _sent(run: Outcome, rank: int) -> float:
    """Bytes that a card sends where collectives go round in a ring, from those handed to each collective."""
    part = (CARDS - 1) / CARDS
    # A sum goes round twice; what one card sums up or hands out goes round once; own shares go to all others.
    factors = {"all_reduce": 2 * part, "reduce": part, "broadcast": part, "all_gather": CARDS - 1.0}
    return sum(factors[name.split(":")[0]] * counts[1] for name, counts in run.collectives[rank].items())


def _least(layout: str, sizes: dict[str, float]) -> float:
    """Bytes of a step of one pass in float32: stage 3 gathers twice and leaves each card its part of the sums; a tensor
    group adds up the outputs of two blocks in a layer, and as many gradients.

    Sources: Rajbhandari et al. 2020, "ZeRO", section 7; Shoeybi et al. 2019, "Megatron-LM", section 3.
    """
    gradients, gathered = FLOAT32 * sizes["trained"], FLOAT32 * 2 * sizes["sliced"]
    kinds = {
        "data parallel": 2 * gradients,
        "stage1": 2 * gradients,
        "stage2": 2 * gradients,
        "stage3": gathered + gradients,
        "tensor parallel": 2 * FLOAT32 * 4 * _WIDE["num_hidden_layers"] * sizes["positions"] * _WIDE["hidden_size"],
    }
    return (CARDS - 1) / CARDS * kinds[layout]


def build_parser() -> argparse.ArgumentParser:
    """The benchmark's arguments."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", nargs="+", default=["speed", "traffic"], choices=("speed", "traffic"))
    parser.add_argument("--rounds", type=int, default=2, help="repetitions of each run whose speed is measured")
    return parser


def main() -> int:
    """Prints a line of JSON and a table for each part."""
    arguments = build_parser().parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("PADDLEMIX_CACHE", str(Path(folder) / "cache"))
        for part in arguments.parts:
            rows = speed(Path(folder), arguments.rounds) if part == "speed" else traffic(Path(folder))
            print(json.dumps(rows))
            print("| " + " | ".join(rows[0]) + " |", "|---" * len(rows[0]) + "|", sep="\n")
            for row in rows:
                print("| " + " | ".join(str(value) for value in row.values()) + " |", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
