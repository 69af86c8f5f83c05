"""What is fuzzed: for each kind of file valid ones, how a copy is damaged, and the code of ours that reads it.

A target's read may return or raise a UserError.  Anything else that it raises is a defect.
"""

from __future__ import annotations

import io
import json
import pickle
import random
import shutil
import struct
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tests.fuzz.mutations import encode_json, mutate_bytes, mutate_json, mutate_pickle


@dataclass(frozen=True)
class Target:
    """One kind of file.

    Args:
        seeds: writes valid inputs into an empty folder, each as a file or folder of its own.
        damage: changes a copy of one of them.
        read: reads it.
        in_tests: cases of the short run in the default tests.
    """

    seeds: Callable[[Path], None]
    damage: Callable[[random.Random, Path], None]
    read: Callable[[Path], object]
    in_tests: int


# ---- weight files ----


def _weights() -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    arrays = {f"layers.{number}.weight": draw.random((3, 4), dtype=np.float32) for number in range(4)}
    return {**arrays, "large": draw.random((40, 60), dtype=np.float32), "half": np.ones(7, np.float16)}


def _write_safetensors(folder: Path) -> None:
    from paddlemix.checkpoints.files.tensors import array_entry
    from paddlemix.checkpoints.files.weight_files import write_safetensors, write_weights

    entries = {name: array_entry(array) for name, array in _weights().items()}
    (folder / "single").mkdir()
    write_safetensors(folder / "single" / "model.safetensors", entries, {"format": "pt"})
    (folder / "shards").mkdir()
    write_weights(folder / "shards", entries, 200)


def _damage_safetensors(draw: random.Random, folder: Path) -> None:
    path = draw.choice(sorted(folder.iterdir()))
    content = path.read_bytes()
    if path.suffix == ".json":
        path.write_bytes(encode_json(draw, mutate_json(draw, json.loads(content))))
    elif draw.random() < 0.3:
        path.write_bytes(mutate_bytes(draw, content))
    else:
        length = struct.unpack("<Q", content[:8])[0]
        header = encode_json(draw, mutate_json(draw, json.loads(content[8 : 8 + length])))
        path.write_bytes(struct.pack("<Q", len(header)) + header + content[8 + length :])


def _read_weights(folder: Path) -> object:
    from paddlemix.checkpoints.files.weight_files import read_weights

    return [np.array(entry.read()).nbytes for entry in read_weights(folder).values()]


def _write_pickles(folder: Path) -> None:
    import paddle

    from paddlemix.checkpoints.convert.export_adapter import write_torch
    from paddlemix.checkpoints.files.tensors import array_entry

    arrays = _weights()
    for name in ("torch", "numpy", "paddle"):
        (folder / name).mkdir()
    write_torch(folder / "torch" / "pytorch_model.bin", {name: array_entry(array) for name, array in arrays.items()})
    (folder / "numpy" / "model_state.pdparams").write_bytes(pickle.dumps(arrays, 2))
    tensors = {name: paddle.to_tensor(array) for name, array in arrays.items()}
    paddle.save(tensors, str(folder / "paddle" / "model_state.pdparams"), protocol=4)


def _damage_pickle(draw: random.Random, folder: Path) -> None:
    path = next(folder.iterdir())
    content = path.read_bytes()
    if path.suffix == ".bin" and draw.random() < 0.8:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = [(info, archive.read(info)) for info in archive.infolist()]
        with zipfile.ZipFile(path, "w") as archive:
            for info, member in members:
                archive.writestr(info, mutate_pickle(draw, member) if info.filename.endswith("data.pkl") else member)
    else:
        path.write_bytes(mutate_pickle(draw, content) if path.suffix != ".bin" else mutate_bytes(draw, content))


# ---- models ----


def _write_models(folder: Path) -> None:
    from tests.tiny import write_tokenizer
    from tests.tiny_models import GOLDEN, GOLDEN_MODELS
    from tests.tiny_world import LORA, build_world

    tokenizer_folder = write_tokenizer(folder.parent / "tokenizer")
    from paddlemix.processors.text.tokenizer import load_tokenizer
    from paddlemix.trainer.recipe import run_recipe

    world = build_world(folder.parent / "world", load_tokenizer(tokenizer_folder))
    shutil.copytree(world.model, folder / "ours")
    shutil.copytree(world.llama, folder / "llama")
    run_recipe(world.config(folder / "adapter", **{**LORA, "max_steps": 1}))
    for name in GOLDEN_MODELS:
        for layout in ("original", "hf"):
            shutil.copytree(GOLDEN / name / layout, folder / f"{name}-{layout}")


def _damage_model(draw: random.Random, folder: Path) -> None:
    declared = sorted(path for path in folder.rglob("*.json") if "trainer" not in path.name)
    config = [path for path in declared if path.name in ("config.json", "lora_config.json")]
    path = draw.choice(config if draw.random() < 0.5 else declared)
    others = ("generation_config.json", "preprocessor_config.json", "adapter_config.json", "chat_template.json")
    if draw.random() < 0.1:  # a file that was not there
        path = folder / draw.choice(others)
        path.write_bytes(encode_json(draw, mutate_json(draw, {"eos_token_id": [2], "size": {"height": 1}, "r": 4})))
        return
    path.write_bytes(encode_json(draw, mutate_json(draw, json.loads(path.read_text(encoding="utf-8")))))


def _read_model(folder: Path) -> object:
    from paddlemix.checkpoints.load import load_pretrained

    return load_pretrained(folder).model


# ---- a run's file ----


def _write_recipes(folder: Path) -> None:
    recipes = Path(__file__).resolve().parents[2] / "paddlemix" / "config" / "llava"
    for number, path in enumerate(sorted(recipes.rglob("*.json"))):
        shutil.copy(path, folder / f"{number}.json")


def _damage_json(draw: random.Random, path: Path) -> None:
    if path.suffix == ".jsonl":
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        at = draw.randrange(len(lines))
        encoded = [encode_json(draw, mutate_json(draw, line) if n == at else line) for n, line in enumerate(lines)]
        path.write_bytes(b"\n".join(encoded))
        return
    value = json.loads(path.read_text(encoding="utf-8"))
    path.write_bytes(encode_json(draw, mutate_json(draw, value)))


def _read_recipe(path: Path) -> object:
    from paddlemix.config.load import load_config

    return load_config(path)


# ---- data ----


def _write_data(folder: Path) -> None:
    record = {"id": 7, "image": "no.png", "conversations": []}
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A cat."}]
    forms = {
        "llava": [{**record, "conversations": turns}, {"conversations": [{**turns[0], "value": "How?"}, turns[1]]}],
        "pairs": [{**record, "conversations": [["<image>\nWhat?", "A cat."], ["And?", "Yes."]]}],
        "swift": [{"messages": [{"role": "user", "content": "<image>Q"}, {"role": "assistant", "content": "A"}]}],
        "query": [{"query": "Q", "response": "A", "history": [["a", "b"]], "images": ["no.png"]}],
        "alpaca": [
            {"instruction": "I", "input": "x", "output": "A", "objects": {"ref": ["a"], "bbox": [[0, 0, 5, 5]]}}
        ],
    }
    for name, records in forms.items():
        (folder / f"{name}.json").write_text(json.dumps(records * 3), encoding="utf-8")
        lines = "\n".join(map(json.dumps, records * 3))
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")


def _read_data(path: Path) -> object:
    from paddlemix.datasets.checking.check import check_files
    from paddlemix.datasets.checking.record_checker import CheckSettings, DataFile

    return check_files([DataFile(path=str(path), image_root=str(path.parent))], CheckSettings())


# ---- pictures ----

_FORMATS = {
    "png": {},
    "jpg": {"format": "JPEG"},
    "webp": {},
    "gif": {},
    "bmp": {},
    "tiff": {"compression": "tiff_lzw"},
    "ppm": {},
    "jp2": {"format": "JPEG2000"},
    "ico": {},
    "tga": {},
}


def _write_pictures(folder: Path) -> None:
    from PIL import Image, features

    from tests.tiny import noise_picture

    picture = noise_picture(24, 16)
    for suffix, options in _FORMATS.items():
        if suffix != "jp2" or features.check("jpg_2000"):
            picture.save(folder / f"picture.{suffix}", **options)
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(folder / "turned.jpg", exif=exif)
    picture.save(folder / "turned.png", exif=exif)
    picture.convert("P").save(folder / "palette.png", transparency=0)
    picture.convert("I;16").save(folder / "deep.png")
    picture.save(folder / "moving.gif", save_all=True, append_images=[picture.rotate(90)])


def _damage_bytes(draw: random.Random, path: Path) -> None:
    path.write_bytes(mutate_bytes(draw, path.read_bytes()))


def _read_picture(path: Path) -> object:
    from paddlemix.datasets.images.decode import image_size, load_image
    from paddlemix.errors import UserError

    try:
        size = image_size(path)
    except UserError:
        size = None
    picture = load_image(path)
    if size is not None and picture.size != size and path.suffix != ".ico":
        raise AssertionError(f"image_size says {size}, load_image {picture.size}")
    return picture


TARGETS: dict[str, Target] = {
    "safetensors": Target(_write_safetensors, _damage_safetensors, _read_weights, 80),
    "pickle": Target(_write_pickles, _damage_pickle, _read_weights, 50),
    "model": Target(_write_models, _damage_model, _read_model, 25),
    "recipe": Target(_write_recipes, _damage_json, _read_recipe, 60),
    "data": Target(_write_data, _damage_json, _read_data, 80),
    "picture": Target(_write_pictures, _damage_bytes, _read_picture, 120),
}


def run_case(target: str, seed: int, number: int, seeds: Path, place: Path) -> None:
    """Damages a copy of one valid input and reads it.

    Args:
        seeds: what the target's `seeds` wrote.
        place: a folder for the copy, emptied before.

    Raises:
        Exception: whatever the read raises but UserError.
    """
    from paddlemix.errors import UserError

    draw = random.Random(f"{seed} {target} {number}")
    chosen = draw.choice(sorted(seeds.iterdir()))
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    copy = place / chosen.name
    (shutil.copytree if chosen.is_dir() else shutil.copy)(chosen, copy)
    TARGETS[target].damage(draw, copy)
    try:
        with warnings.catch_warnings():  # Pillow warns of damaged pictures
            warnings.simplefilter("ignore")
            TARGETS[target].read(copy)
    except UserError as error:
        if len(str(error)) > 5000:
            raise AssertionError(f"an error of {len(str(error)):,} characters") from error
        str(error).encode("utf-8", "strict")
