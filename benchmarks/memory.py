"""What `--dry-run` estimates beside what a run takes: peak memory on the CPU, five kinds of runs.

    python benchmarks/memory.py                  about five minutes
    python benchmarks/memory.py --cases full

Each case is a small LLaVA with its data, made here, and a recipe as a user writes it.  A process estimates it, another
runs it through the training command's own recipe.  Measured is the largest resident set of the whole process less that
before the model was built.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

TILE, PATCH = 224, 14  # pixels: 256 tokens for a tile
_WORDS = np.array(
    [
        "the",
        "red",
        "blue",
        "cat",
        "dog",
        "sits",
        "stands",
        "on",
        "under",
        "table",
        "street",
        "with",
        "and",
        "bus",
        "person",
    ]
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One kind of run.

    Args:
        keys: of its recipe, besides those that all have.
        words: of an answer, fewest and most.
        picture: width and height, pixels.
        grids: any-resolution grids; none: images are padded to one tile.
        text: sizes of the language model, instead of the usual ones.
    """

    keys: dict[str, Any]
    words: tuple[int, int] = (60, 70)
    picture: tuple[int, int] = (320, 240)
    grids: list[list[int]] = field(default_factory=list)
    text: dict[str, int] = field(default_factory=dict)


_LORA = {"lora": True, "lora_rank": 16, "lora_alpha": 32, "learning_rate": 1e-4}
CASES = {
    "full": Case(keys={"per_device_train_batch_size": 4}),
    "lora": Case(keys={**_LORA, "per_device_train_batch_size": 6}),
    "recompute": Case(keys={"recompute": True, "per_device_train_batch_size": 6}, words=(150, 160)),
    "any-resolution": Case(
        keys={**_LORA, "lora_dropout": 0.0, "per_device_train_batch_size": 2},
        picture=(480, 460),
        grids=[[TILE, 2 * TILE], [2 * TILE, TILE], [2 * TILE, 2 * TILE]],
    ),
    "packed": Case(keys={"mixtoken": True, "max_length": 1024, "per_device_train_batch_size": 2}, words=(30, 90)),
}


def write_case(case: Case, folder: Path) -> Path:
    """Model, data and recipe of a case; gives the recipe."""
    from paddlemix.checkpoints.pretrained import Pretrained, build_model, save_model
    from paddlemix.demo.vocabulary import train_tokenizer
    from paddlemix.models.configuration import DecoderConfig, LlavaConfig, VisionConfig
    from paddlemix.processors.images.image_spec import ImageSpec
    from paddlemix.processors.llava import LlavaProcessor
    from paddlemix.processors.text.known_templates import get_template
    from paddlemix.processors.text.tokenizer import load_tokenizer

    texts = [get_template("vicuna_v1").system, *(" ".join(np.roll(_WORDS, number)) for number in range(40))]
    (folder / "tokenizer").mkdir(parents=True)
    train_tokenizer(texts, folder / "tokenizer", vocab_size=380)
    usual = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8}
    text = DecoderConfig(**{**usual, **case.text})
    vision = VisionConfig(
        hidden_size=384,
        intermediate_size=1536,
        num_hidden_layers=12,
        num_attention_heads=6,
        image_size=TILE,
        patch_size=PATCH,
    )
    spec = ImageSpec(tile_size=TILE, patch_size=PATCH)
    if case.grids:
        grids = tuple((width, height) for width, height in case.grids)
        spec = replace(spec, aspect_mode="anyres", merge_type="spatial_unpad", grid_pinpoints=grids)
    processor = LlavaProcessor(
        tokenizer=load_tokenizer(folder / "tokenizer"), template=get_template("vicuna_v1"), image_spec=spec
    )
    model = build_model(LlavaConfig(text=text, vision=vision, image_newline=bool(case.grids)), initialise=True)
    save_model(Pretrained(model, processor, folder / "model"), folder / "model")
    _write_data(case, folder)
    recipe = {
        "model_name_or_path": str(folder / "model"),
        "dataset": {"train": [{"data_files": str(folder / "train.json"), "image_root": str(folder)}]},
        "output_dir": str(folder / "out"),
        "do_train": True,
        "max_steps": 8,
        "save_strategy": "no",
        "disable_tqdm": True,
        "device": "cpu",
        **case.keys,
    }
    path = folder / "recipe.json"
    path.write_text(json.dumps(recipe, indent=2))
    return path


def _write_data(case: Case, folder: Path) -> None:
    """16 records of one picture and one question."""
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (*case.picture[::-1], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "picture.png")
    records = []
    for _ in range(16):
        answer = " ".join(random.choice(_WORDS, int(random.integers(*case.words))))
        records.append({"image": "picture.png", "conversations": [["<image>\nWhat is this?", answer]]})
    (folder / "train.json").write_text(json.dumps(records))


def estimate(recipe: Path) -> dict[str, float]:
    """What `--dry-run` says of a recipe, MB: of all tensors, and of the process."""
    from paddlemix.config.load import load_config
    from paddlemix.dry_run.device import LATER_BYTES
    from paddlemix.dry_run.plan import plan_run

    memory = plan_run(load_config(recipe, [])).memory
    return {"tensors": memory.tensors / 1e6, "process": (memory.total - memory.program + LATER_BYTES) / 1e6}


def measure(recipe: Path) -> dict[str, float]:
    """What the run takes, MB: the largest sum of paddle's blocks, and the process's growth over its libraries."""
    from paddlemix.device import prepare_environment

    prepare_environment()  # a run does it before it loads paddle
    import paddle

    from paddlemix.config.load import load_config
    from paddlemix.trainer import recipe as training

    paddle.matmul(paddle.ones([64, 64]), paddle.ones([64, 64]))
    before = _resident("VmRSS")
    training.run_recipe(load_config(recipe, []))
    tensors = paddle.base.core.host_memory_stat_peak_value("Allocated", 0)
    return {"tensors": tensors / 1e6, "process": (_resident("VmHWM") - before) / 1e6}


def _resident(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) * 1024


def _in_process(task: str, recipe: Path, folder: Path) -> dict[str, float]:
    """Runs `estimate` or `measure` in a process of its own."""
    command = [sys.executable, str(Path(__file__).resolve()), "--task", task, "--recipe", str(recipe)]
    environment = {**os.environ, "PADDLEMIX_CACHE": str(folder / "cache"), "PADDLEMIX_OFFLINE": "1"}
    result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(result.stdout.splitlines()[-1]))


def compare(name: str, folder: Path) -> dict[str, Any]:
    """Estimate and measurement of a case, MB, and the estimate's errors."""
    recipe = write_case(CASES[name], folder / name)
    estimated, measured = _in_process("estimate", recipe, folder), _in_process("measure", recipe, folder)
    result: dict[str, Any] = {"case": name}
    for kind in ("tensors", "process"):
        result[f"{kind}_estimated"], result[f"{kind}_measured"] = round(estimated[kind]), round(measured[kind])
        result[f"{kind}_error"] = round(estimated[kind] / measured[kind] - 1, 3)
    return result


def build_parser() -> argparse.ArgumentParser:
    """The benchmark's arguments."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--task", choices=("estimate", "measure"), help=argparse.SUPPRESS)  # the children
    parser.add_argument("--recipe", type=Path, help=argparse.SUPPRESS)
    return parser


def main() -> int:
    """Prints a line of JSON for every case."""
    arguments = build_parser().parse_args()
    if arguments.task:
        print(json.dumps({"estimate": estimate, "measure": measure}[arguments.task](arguments.recipe)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.cases:
            print(json.dumps(compare(name, Path(folder))), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
