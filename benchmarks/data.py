"""What the data pipeline costs and saves: the loader beside PIL, a file of a million records, packing beside padding.

    python benchmarks/data.py loader                  two processes, alternating rounds, about two minutes
    python benchmarks/data.py start --records 1000000 1 GB on the disk, removed afterwards
    python benchmarks/data.py padding                 arithmetic alone, seconds

Everything is made here: noise-textured JPEGs, records and lengths of LLaVA's kind.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from paddlemix.datasets.batches import LoadingSettings, iterate_batches  # noqa: E402
from paddlemix.datasets.data_settings import DataSettings  # noqa: E402
from paddlemix.datasets.length_statistics import batch_rows, count_positions  # noqa: E402
from paddlemix.datasets.mixture import SampleDataset  # noqa: E402
from paddlemix.demo.vocabulary import train_tokenizer  # noqa: E402
from paddlemix.processors.images.image_spec import ImageSpec  # noqa: E402
from paddlemix.processors.llava import LlavaProcessor  # noqa: E402
from paddlemix.processors.text.known_templates import get_template  # noqa: E402
from paddlemix.processors.text.tokenizer import load_tokenizer  # noqa: E402

PICTURE = (640, 480)
BATCH_SIZE = 8
RECIPE_BATCH_SIZE = 16  # samples per device. Source: haotian-liu/LLaVA scripts/v1_5/finetune.sh
IMAGE_TOKENS, MAX_LENGTH = 576, 2048
_TEXT = "the a red blue cat dog sits stands on under table street with and bus person holding looks small large"
_WORDS = np.array(_TEXT.split())


def build_parser() -> argparse.ArgumentParser:
    """The benchmark's arguments."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("part", choices=("loader", "start", "padding"), help="what to measure")
    parser.add_argument("--pictures", type=int, default=160, help="loader: JPEG files of a round (160)")
    parser.add_argument("--rounds", type=int, default=5, help="loader: rounds of each kind (5)")
    parser.add_argument("--workers", type=int, default=2, help="loader: processes of each kind (2)")
    parser.add_argument("--records", type=int, default=1_000_000, help="start, padding: records (1,000,000)")
    parser.add_argument("--batch-size", type=int, default=RECIPE_BATCH_SIZE, help="padding: samples (16, LLaVA's own)")
    parser.add_argument("--folder", type=Path, help="where files go; default: the system's temporary folder")
    parser.add_argument("--start-of", type=Path, help=argparse.SUPPRESS)  # the child of `start`
    return parser


def make_processor(folder: Path) -> LlavaProcessor:
    """LLaVA-1.5's pictures, with a small tokenizer trained here."""
    texts = [" ".join(np.random.default_rng(seed).choice(_WORDS, 12)) for seed in range(200)]
    folder.mkdir(exist_ok=True)
    train_tokenizer([get_template("vicuna_v1").system, *texts], folder, vocab_size=400)
    return LlavaProcessor(tokenizer=load_tokenizer(folder), template=get_template("vicuna_v1"), image_spec=ImageSpec())


def make_record(number: int, random: np.random.Generator, image: str | None) -> dict[str, Any]:
    """A record of LLaVA's form: one to three rounds, answers of lognormal length, about 1,000 bytes."""
    turns = []
    for round_ in range(int(random.integers(1, 4))):
        place = "<image>\n" if image is not None and round_ == 0 else ""
        words = random.choice(_WORDS, int(np.clip(random.lognormal(4.02, 0.6), 5, 300)))
        turns.append({"from": "human", "value": f"{place}{' '.join(words[:15])}?"})
        turns.append({"from": "gpt", "value": f"{' '.join(words)}."})
    record = {"id": f"{number:012d}", "conversations": turns}
    return record if image is None else {**record, "image": image}


def make_pictures(folder: Path, count: int) -> None:
    """JPEGs of 640 x 480 pixels and about 70 kB, with the detail of photographs rather than of noise."""
    random = np.random.default_rng(0)
    for number in range(count):
        coarse = Image.fromarray(random.integers(0, 256, (60, 80, 3), dtype=np.uint8)).resize(PICTURE)
        fine = Image.fromarray(random.integers(0, 256, (*PICTURE[::-1], 3), dtype=np.uint8))
        picture = Image.blend(coarse, fine.filter(ImageFilter.GaussianBlur(1)), 0.25)
        picture.save(folder / f"{number}.jpg", quality=90)


def bare_pil(path: str) -> int:
    """What nobody can leave out: decode a picture and resize its shorter side to 336 pixels."""
    with Image.open(path) as image:
        pixels = image.convert("RGB")
    scale = 336 / min(pixels.size)
    return pixels.resize((round(pixels.width * scale), round(pixels.height * scale)), Image.Resampling.BICUBIC).width


def measure_loader(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Pictures per second of the loader and of bare PIL, in as many processes, round about."""
    make_pictures(folder, arguments.pictures)
    random = np.random.default_rng(1)
    records = [make_record(number, random, f"{number}.jpg") for number in range(arguments.pictures)]
    (folder / "train.json").write_text(json.dumps(records))
    processor = make_processor(folder / "tokenizer")
    settings = DataSettings(max_length=MAX_LENGTH, image_root=str(folder))
    dataset = SampleDataset([{"data_files": str(folder / "train.json")}], lambda template: processor, settings)
    loading = LoadingSettings(tokens_per_tile=processor.image_spec.tokens_per_tile, num_workers=arguments.workers)
    paths = [str(folder / f"{number}.jpg") for number in range(arguments.pictures)]
    rates: dict[str, list[float]] = {"loader": [], "pil": []}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.workers, context) as pool:
        list(pool.map(bare_pil, paths[: 2 * BATCH_SIZE]))  # starts the processes
        loader = endless_loader(dataset, loading)
        take(loader, 2 * arguments.workers + 4)  # starts the processes and empties what was made ahead
        for number in range(2 * arguments.rounds):
            kind = ("loader", "pil")[number % 2]
            if kind == "loader":
                batches = arguments.pictures // BATCH_SIZE
                take(loader, 6)  # what was made ahead while PIL ran
                rates[kind].append(batches * BATCH_SIZE / timed(partial(take, loader, batches)))
                time.sleep(1.0)  # the loader makes ahead until it is full; PIL must not share the cores with it
            else:
                seconds = timed(lambda: list(pool.map(bare_pil, paths, chunksize=BATCH_SIZE)))
                rates[kind].append(len(paths) / seconds)
        loader.close()
    medians = {kind: statistics.median(values) for kind, values in rates.items()}
    return {
        "workers": arguments.workers,
        "loader_pictures_per_second": round(medians["loader"], 1),
        "pil_pictures_per_second": round(medians["pil"], 1),
        "ratio": round(medians["loader"] / medians["pil"], 3),
    }


def endless_loader(dataset: SampleDataset, loading: LoadingSettings) -> Generator[Any, None, None]:
    """Batches of 8 without an end."""

    def rows() -> Iterator[list[int]]:
        while True:
            for start in range(0, len(dataset) - BATCH_SIZE + 1, BATCH_SIZE):
                yield list(range(start, start + BATCH_SIZE))

    yield from iterate_batches(dataset, rows(), loading)


def take(batches: Iterator[Any], count: int) -> None:
    """Takes batches and drops them."""
    for _ in range(count):
        next(batches)


def timed(run: Callable[[], object]) -> float:
    """Seconds of a call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure_start(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds and memory until a run over one large JSON array knows its samples: the first time and later ones."""
    path = folder / "train.json"
    write_records(path, arguments.records)
    make_processor(folder / "tokenizer")
    result: dict[str, Any] = {"records": arguments.records, "gigabytes": round(path.stat().st_size / 1e9, 2)}
    for name in ("first", "second", "third"):
        start = run_child(folder)
        result[f"{name}_seconds"] = start["seconds"]
        result[f"{name}_process_seconds"] = start["process_seconds"]
        result[f"{name}_megabytes"] = start["megabytes"]
    return result


def write_records(path: Path, count: int) -> None:
    """A JSON array of records, one per line; every fifth is without image."""
    random = np.random.default_rng(2)
    texts = [make_record(number, random, None if number % 5 == 0 else f"{number}.jpg") for number in range(2000)]
    lines = [json.dumps(record).replace(f"{number:012d}", "{:012d}", 1) for number, record in enumerate(texts)]
    with open(path, "w") as file:
        for number in range(count):
            before = ",\n" if number else "[\n"
            file.write(before + lines[number % len(lines)].replace("{:012d}", f"{number:012d}", 1))
        file.write("\n]\n")


def run_child(folder: Path) -> dict[str, float]:
    """Starts over in a process of its own and watches the memory of all its processes together."""
    environment = {**os.environ, "PADDLEMIX_CACHE": str(folder / "cache")}
    command = [sys.executable, str(Path(__file__).resolve()), "start", "--start-of", str(folder)]
    begin, peak = time.perf_counter(), 0.0
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            peak = max(peak, memory_of_family(process.pid))
            time.sleep(0.05)
        assert process.stdout is not None
        found = json.loads(process.stdout.read().splitlines()[-1])
    whole = time.perf_counter() - begin
    return {**found, "process_seconds": round(whole, 1), "megabytes": round(peak)}


def memory_of_family(pid: int) -> float:
    """Memory of a process and its children now, MB: their own pages and their part of shared ones (PSS)."""
    total = 0
    children = Path(f"/proc/{pid}/task/{pid}/children")
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            total += int(line.split()[1]) * 1024 if line.startswith("Pss:") else 0
        family = [int(child) for child in children.read_text().split()]
    except (OSError, ValueError):
        return total / 1e6
    return total / 1e6 + sum(map(memory_of_family, family))


def start_child(folder: Path) -> dict[str, float]:
    """What the child does: open the data and ask for one sample."""
    begin = time.perf_counter()
    processor = LlavaProcessor(
        tokenizer=load_tokenizer(folder / "tokenizer"), template=get_template("vicuna_v1"), image_spec=ImageSpec()
    )
    dataset = SampleDataset(
        [{"data_files": str(folder / "train.json")}], lambda template: processor, DataSettings(max_length=MAX_LENGTH)
    )
    assert dataset.sample(len(dataset) - 1).messages
    seconds = time.perf_counter() - begin
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    child = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e3
    return {"seconds": round(seconds, 2), "self_rss_megabytes": round(own), "child_rss_megabytes": round(child)}


def llava_lengths(count: int) -> np.ndarray:
    """int64 [count, 2], tokens and visual ones, of the kind of LLaVA-1.5's 665,000 samples.

    Six per cent are conversations without image (ShareGPT, 40,000), median 1,100 tokens; the others have an image
    of 576 tokens and text of median 180.  Both are lognormal and cut at 2,048.  The shares are published, the lengths
    are our assumption.
    """
    random = np.random.default_rng(3)
    has_image = random.random(count) >= 0.06
    with_image = IMAGE_TOKENS + np.clip(random.lognormal(5.2, 0.7, count), 40, None)
    alone = np.clip(random.lognormal(7.0, 0.8, count), 40, None)
    tokens = np.minimum(np.where(has_image, with_image, alone), MAX_LENGTH).astype(np.int64)
    return np.column_stack([tokens, np.where(has_image, IMAGE_TOKENS, 0)])


def measure_padding(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Positions of an epoch: samples padded as they come, grouped, or packed into about as many tokens per batch."""
    lengths, size = llava_lengths(arguments.records), arguments.batch_size
    rows = max(round(size * float(lengths[:, 0].mean()) / MAX_LENGTH), 1)
    plain = count_positions(batch_rows(lengths, size))
    result: dict[str, Any] = {
        "samples": arguments.records,
        "batch_size": size,
        "mean_tokens": round(float(lengths[:, 0].mean()), 1),
        "plain_padding": round(1 - int(lengths[:, 0].sum()) / plain, 3),
        "packed_rows_per_batch": rows,
    }
    ways: dict[str, tuple[int, dict[str, Any]]] = {
        "grouped_by_modality": (size, {"grouping": "modality"}),
        "grouped_by_length": (size, {"grouping": "length"}),
        "packed": (rows, {"capacity": MAX_LENGTH}),
        "packed_one_row": (1, {"capacity": MAX_LENGTH}),
    }
    for name, (batch_size, way) in ways.items():
        start = time.perf_counter()
        positions = count_positions(batch_rows(lengths, batch_size, **way))
        result[f"{name}_saves"] = round(1 - positions / plain, 3)
        result[f"{name}_seconds"] = round(time.perf_counter() - start, 2)
    return result


def main() -> int:
    """Measures and prints a line of JSON and a table."""
    arguments = build_parser().parse_args()
    if arguments.start_of is not None:
        print(json.dumps(start_child(arguments.start_of)))
        return 0
    if arguments.folder is not None:
        arguments.folder.mkdir(parents=True, exist_ok=True)
    parts = {"loader": measure_loader, "start": measure_start, "padding": measure_padding}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        result = parts[arguments.part](Path(name), arguments)
    print(json.dumps(result))
    for key, value in result.items():
        print(f"{key:28} {value}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
