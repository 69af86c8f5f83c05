"""How fast inputs are told from others: hashing files, weights and pictures, and knowing those that have not changed.

    python benchmarks/identity.py                    needs 6 GB of disk, about three minutes
    python benchmarks/identity.py --small            a tenth of everything

The cache is empty at the start; everything is removed afterwards.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.convert import make_checkpoint  # noqa: E402
from paddlemix.checkpoints.convert.export_model import convert_checkpoint  # noqa: E402
from paddlemix.checkpoints.convert.verify import Conversion  # noqa: E402
from paddlemix.checkpoints.identity.weight_identity import source_digests  # noqa: E402
from paddlemix.checkpoints.source import open_source  # noqa: E402
from paddlemix.identity import file_digest, file_digests  # noqa: E402

_PICTURE = 20_000  # bytes


def build_parser() -> argparse.ArgumentParser:
    """The benchmark's arguments."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--small", action="store_true", help="a tenth of everything")
    parser.add_argument("--folder", type=Path, help="where the files go; default: the system's temporary folder")
    return parser


def seconds_of(action: Callable[[], object]) -> float:
    """How long something takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def speed_of(num_bytes: int, action: Callable[[], object], name: str = "") -> dict[str, float]:
    """GB per second, and per second of one core, which other programs do not slow down as much."""
    cpu = time.process_time()
    wall = seconds_of(action)
    cpu = time.process_time() - cpu
    return {f"{name}GB/s": num_bytes / 1e9 / wall, f"{name}GB/s of a core": num_bytes / 1e9 / cpu}


def settle() -> None:
    """Waits until files that were just written may be told by their times."""
    time.sleep(2.1)


def write_random(path: Path, num_bytes: int) -> None:
    """Writes random bytes, which stay in the system's memory where there is room."""
    block = np.random.default_rng(0).bytes(1 << 24)
    with path.open("wb") as file:
        for _ in range(num_bytes >> 24):
            file.write(block)


def measure_file(folder: Path, num_bytes: int) -> dict[str, float]:
    """One large file."""
    write_random(folder / "large", num_bytes)
    settle()
    return {"GB": num_bytes / 1e9} | speed_of(num_bytes, lambda: file_digest(folder / "large"))


def measure_weights(folder: Path, layers: int) -> dict[str, float]:
    """Tensor by tensor: original LLaVA's layout, and ours, whose linear weights are turned before they are hashed."""
    num_bytes = make_checkpoint(folder / "original", layers)
    convert_checkpoint(folder / "original", folder / "ours", Conversion(to="paddlemix"))
    settle()
    result = {"weights GB": num_bytes / 1e9}
    digests = []
    for name in ("original", "ours"):
        source = open_source(folder / name)
        result |= speed_of(num_bytes, lambda source=source: digests.append(source_digests(source)), f"{name} ")
        result[f"{name} unchanged s"] = seconds_of(lambda source=source: digests.append(source_digests(source)))
    assert all(found == digests[0] for found in digests)
    return result


def measure_unchanged(folder: Path, num_bytes: int) -> dict[str, float]:
    """Sparse files as large as a large model, in shards of 5 GB."""
    paths = [folder / f"shard-{number}" for number in range(max(num_bytes // (5 * 10**9), 1))]
    for path in paths:
        with path.open("wb") as file:
            file.truncate(min(num_bytes, 5 * 10**9))
    settle()
    file_digests(paths)
    return {"unchanged GB": num_bytes / 1e9, "seconds": seconds_of(lambda: file_digests(paths))}


def measure_pictures(folder: Path, count: int) -> dict[str, float]:
    """Many small files."""
    content = bytearray(np.random.default_rng(0).bytes(_PICTURE))
    paths = []
    for number in range(count):
        if number % 1000 == 0:
            (folder / f"{number // 1000:05d}").mkdir()
        paths.append(str(folder / f"{number // 1000:05d}" / f"{number}.jpg"))
        content[:8] = number.to_bytes(8, "big")
        Path(paths[-1]).write_bytes(content)
    settle()
    first, cpu = seconds_of(lambda: file_digests(paths)), time.process_time()
    again = seconds_of(lambda: file_digests(paths))
    return {"count": count, "first s": first, "unchanged s": again, "of a core s": time.process_time() - cpu}


def main(argv: list[str]) -> int:
    """Measures and prints."""
    arguments = build_parser().parse_args(argv)
    share = 10 if arguments.small else 1
    folder = Path(tempfile.mkdtemp(dir=arguments.folder))
    os.environ["PADDLEMIX_CACHE"] = str(folder / "cache")
    found: dict[str, dict[str, float]] = {}
    try:
        for name, measure in {
            "file": lambda place: measure_file(place, 3 * 10**9 // share),
            "weights": lambda place: measure_weights(place, 1 if arguments.small else 4),
            "unchanged": lambda place: measure_unchanged(place, 10**11 // share),
            "pictures": lambda place: measure_pictures(place, 100_000 // share),
        }.items():
            (folder / name).mkdir()
            found[name] = measure(folder / name)
            shutil.rmtree(folder / name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(found))
    for name, values in found.items():
        print(f"{name:10}", "  ".join(f"{key} {value:.3g}" for key, value in values.items()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
