"""A random float16 checkpoint of LLaVA-1.5-7B's shapes, loaded in 8 and in 4 bits: memory, and seconds per token.

Each kind runs in a process of its own, which loads the checkpoint as `--load-8bit` and `--load-4bit` do, answers a
short question and one about a picture.  Memory is its largest resident set, pages of mapped files included.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

LIMITS = {"int8": 11.0, "nf4": 7.0}  # GiB
_SHORT, _TOKENS = "What is this?", 8
_TEXT = "USER: What is this? ASSISTANT: A chat between a curious user and an assistant gives polite answers."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What this part takes."""
    parser.add_argument("--kinds", nargs="+", default=list(LIMITS), choices=LIMITS)
    parser.add_argument("--layers", type=int, default=32, help="of the language model; fewer to try this out")
    parser.add_argument("--folder", type=Path, help="where the files go; default: the system's temporary folder")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)


def run(arguments: argparse.Namespace) -> int:
    """Prints a line of JSON and a table per kind; status 1 where one takes more memory than its limit."""
    if arguments.worker:
        print(json.dumps(measure(*arguments.worker)))
        return 0
    from convert import make_checkpoint

    from paddlemix.demo.vocabulary import train_tokenizer

    failed = False
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        num_bytes = make_checkpoint(folder, arguments.layers)
        train_tokenizer([_TEXT[place:] for place in range(len(_TEXT))], folder, vocab_size=320)
        print(f"wrote {num_bytes / 1e9:.1f} GB", flush=True)
        for kind in arguments.kinds:
            script = str(Path(__file__).resolve().parent.parent / "quantize.py")
            command = [sys.executable, script, "7b", "--worker", kind, name]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            result = json.loads(output.splitlines()[-1])
            failed |= result["peak_gib"] > LIMITS[kind]
            print(json.dumps(result))
            print("  ".join(f"{key} {value}" for key, value in result.items()), flush=True)
    return int(failed)


def measure(kind: str, directory: str) -> dict[str, Any]:
    """Loads and asks, in this process."""
    from paddlemix.checkpoints.load import load_pretrained
    from paddlemix.device import peak_memory_bytes, select_device
    from paddlemix.generation.predict import predict
    from paddlemix.generation.sampling import GenerationSettings

    device = select_device("cpu")
    start = time.perf_counter()
    loaded = load_pretrained(directory, quantize=kind)
    seconds, after_loading = time.perf_counter() - start, peak_memory_bytes(device)
    picture = os.path.join(directory, "picture.png")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)).save(picture)
    times = {}
    for name, tokens, record in (
        ("first_token", 1, {"text": _SHORT}),
        ("all_tokens", 1 + _TOKENS, {"text": _SHORT}),
        ("first_token_with_image", 1, {"text": _SHORT, "image": picture}),
    ):
        start = time.perf_counter()
        (answer,) = predict(loaded, [record], GenerationSettings(max_new_tokens=tokens))
        times[name] = time.perf_counter() - start
        assert answer.error is None, answer.error
    return {
        "kind": kind,
        "load_seconds": round(seconds, 1),
        "gib_after_loading": round(after_loading / 2**30, 2),
        "peak_gib": round(peak_memory_bytes(device) / 2**30, 2),
        "limit_gib": LIMITS[kind],
        "first_token_seconds": round(times["first_token"], 1),
        "seconds_per_token": round((times["all_tokens"] - times["first_token"]) / _TOKENS, 2),
        "first_token_with_image_seconds": round(times["first_token_with_image"], 1),
    }
