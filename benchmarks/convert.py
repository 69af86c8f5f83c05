"""Time and memory of converting a checkpoint, beside a plain copy of its files in the same run.

    python benchmarks/convert.py            about 1 GB, under a minute on a fast disk
    python benchmarks/convert.py --full     the shapes of LLaVA-1.5-7B, 14 GB; needs 42 GB of disk

The checkpoint is random numbers in original LLaVA's layout, float16, in shards; it is removed afterwards.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from paddlemix.checkpoints.convert import declared_files  # noqa: E402
from paddlemix.checkpoints.convert.export_model import to_layout  # noqa: E402
from paddlemix.checkpoints.files.tensors import FLOAT_TYPES, TensorEntry, convert  # noqa: E402
from paddlemix.checkpoints.files.weight_files import write_json, write_weights  # noqa: E402
from paddlemix.checkpoints.layouts.weight_names import CLIP, ORIGINAL  # noqa: E402
from paddlemix.models.configuration import DecoderConfig, LlavaConfig, VisionConfig  # noqa: E402
from paddlemix.models.presets import parameter_shapes  # noqa: E402

FULL_LAYERS, SMALL_LAYERS = 32, 1
SHARD_BYTES = 5 * 10**9


def build_parser() -> argparse.ArgumentParser:
    """The benchmark's arguments."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=SMALL_LAYERS, help="of the language model, 0.4 GB each")
    parser.add_argument("--full", action="store_true", help=f"{FULL_LAYERS} layers, as LLaVA-1.5-7B has")
    parser.add_argument("--to", default="paddlemix", choices=("paddlemix", "llava", "hf"), help="the layout to write")
    parser.add_argument("--folder", type=Path, help="where the files go; default: the system's temporary folder")
    return parser


def make_checkpoint(directory: Path, layers: int, dtype: str = "float16") -> int:
    """Writes a random LLaVA-1.5 in original LLaVA's layout, the tower beside it; gives its bytes.

    Args:
        dtype: "float16" or "bfloat16".
    """
    config = LlavaConfig(text=DecoderConfig(num_hidden_layers=layers), vision=VisionConfig(), mm_vision_select_layer=-2)
    assert config.vision is not None
    processor = declared_files.complete_processor(
        config,
        {
            "chat_template": "vicuna_v1",
            "image_aspect_ratio": "pad",
            "image_size": 336,
            "patch_size": 14,
            "image_mean": [0.5] * 3,
            "image_std": [0.5] * 3,
        },
    )
    facts = declared_files.Facts(config=config, processor=processor, special_ids={}, dtype=dtype)
    tensors = {name: _random_entry(shape, dtype) for name, shape in parameter_shapes(config).items()}
    tower = {name: entry for name, entry in tensors.items() if name.startswith("vision_tower.")}
    rest = {name: entry for name, entry in tensors.items() if name not in tower}
    place = directory / declared_files.TOWER_DIRECTORY
    place.mkdir(parents=True)
    write_json(directory / "config.json", {**declared_files.original_config(facts), "unfreeze_mm_vision_tower": False})
    write_json(place / "config.json", declared_files.tower_config(config.vision, dtype))
    write_json(place / "preprocessor_config.json", declared_files.tower_preprocessor(processor))
    write_weights(directory, to_layout(rest, ORIGINAL), SHARD_BYTES, {"format": "pt"})
    write_weights(place, to_layout(tower, CLIP), SHARD_BYTES, {"format": "pt"})
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def _random_entry(shape: tuple[int, ...], dtype: str) -> TensorEntry:
    kind = FLOAT_TYPES[dtype]

    def read() -> np.ndarray:
        random = np.random.default_rng(0)
        block = convert(random.standard_normal(1 << 20, dtype=np.float32), "F32", kind)
        return np.resize(block, shape)

    return TensorEntry(kind, shape, read)


def time_copy(source: Path, target: Path) -> float:
    """Seconds of copying a folder to the disk."""
    start = time.perf_counter()
    shutil.copytree(source, target)
    for path in target.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    return time.perf_counter() - start


def time_conversion(source: Path, target: Path, to: str) -> tuple[float, float]:
    """Seconds, and the process's largest resident memory in GB."""
    tool = ROOT / "paddlemix" / "tools" / "convert_checkpoint.py"
    start = time.perf_counter()
    command = [sys.executable, str(tool), "--input", str(source), "--output", str(target), "--to", to]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - start
    return seconds, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9


def main() -> int:
    """Measures and prints a line of JSON and a table."""
    arguments = build_parser().parse_args()
    layers = FULL_LAYERS if arguments.full else arguments.layers
    if arguments.folder is not None:
        Path(arguments.folder).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        num_bytes = make_checkpoint(folder / "source", layers)
        copied = time_copy(folder / "source", folder / "copy")
        shutil.rmtree(folder / "copy")
        seconds, memory = time_conversion(folder / "source", folder / "converted", arguments.to)
    result = {
        "to": arguments.to,
        "gigabytes": round(num_bytes / 1e9, 2),
        "copy_seconds": round(copied, 1),
        "convert_seconds": round(seconds, 1),
        "ratio": round(seconds / copied, 2),
        "peak_rss_gigabytes": round(memory, 2),
    }
    print(json.dumps(result))
    for key, value in result.items():
        print(f"{key:20} {value}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
