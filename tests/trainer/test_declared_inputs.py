"""A resumed run computes with the tokenizer, config.json and processor that the stopped one had, and its tower's."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from paddlemix.checkpoints.files.weight_files import read_json, read_weights, write_json
from paddlemix.checkpoints.identity import declared_identity
from paddlemix.checkpoints.layouts.file_names import CONFIG_FILE
from paddlemix.errors import UserError
from paddlemix.processors.text.tokenizer import load_tokenizer
from paddlemix.trainer.recipe import run_recipe
from tests.tiny_world import CLIP_TOWER, LORA, World

METHODS: dict[str, dict[str, Any]] = {"lora": LORA, "full": {}}
RUN = {"save_strategy": "steps", "save_steps": 2}


def run(world: World, folder: Path, output_dir: Path, method: str, **changes: Any) -> None:
    """A language model and a tower beside it, both in `folder`."""
    places = {"model_name_or_path": str(folder / "llama"), "mm_vision_tower": str(folder / "tower")}
    run_recipe(world.config(output_dir, **{**RUN, **places, **METHODS[method], **changes}))


def write_base(world: World, folder: Path) -> Path:
    shutil.copytree(world.llama, folder / "llama")
    shutil.copytree(CLIP_TOWER, folder / "tower")
    config = folder / "llama" / "tokenizer_config.json"
    write_json(config, {**(read_json(config) if config.is_file() else {}), "legacy": True})
    return folder


@pytest.fixture(scope="module")
def stopped(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of four steps in `lora` and `full`, whose checkpoint-2 the tests go on from, and their base."""
    folder = write_base(world, tmp_path_factory.mktemp("stopped"))
    for method in METHODS:
        run(world, folder, folder / method, method)
    return folder


@pytest.fixture
def place(stopped: Path, tmp_path: Path) -> Path:
    """A copy of the base, which a test may change."""
    for name in ("llama", "tower"):
        shutil.copytree(stopped / name, tmp_path / name)
    return tmp_path


def go_on(world: World, place: Path, stopped: Path, method: str, **changes: Any) -> None:
    checkpoint = stopped / method / "checkpoint-2"
    run(world, place, place / "again", method, resume_from_checkpoint=str(checkpoint), **changes)


def weights(checkpoint: Path) -> dict[str, bytes]:
    return {name: entry.read().tobytes() for name, entry in read_weights(checkpoint).items()}


def put(file: str, key: str, value: Any) -> Callable[[Path], None]:
    def change(place: Path) -> None:
        write_json(place / file, {**read_json(place / file), key: value})

    return change


def swap_pieces(place: Path) -> None:
    from sentencepiece import sentencepiece_model_pb2

    path = place / "llama" / "tokenizer.model"
    model = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
    first, second = model.pieces[-1], model.pieces[-2]
    first.piece, second.piece = second.piece, first.piece
    path.write_bytes(model.SerializeToString())


MEAN = [0.5, 0.4578275, 0.40821073]
CHANGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "pieces": (swap_pieces, "{place}/llama/tokenizer.model. Put it back"),
    "legacy": (
        put("llama/tokenizer_config.json", "legacy", False),
        "legacy true -> false in {place}/llama/tokenizer_config.json",
    ),
    "rope": (
        put("llama/config.json", "rope_theta", 50000),
        "rope_theta 10000.0 -> 50000.0 in {place}/llama/config.json",
    ),
    "norm": (
        put("llama/config.json", "rms_norm_eps", 1e-5),
        "rms_norm_eps 1e-06 -> 1e-05 in {place}/llama/config.json",
    ),
    "tower": (
        put("tower/config.json", "layer_norm_eps", 1e-3),
        "vision_config.layer_norm_eps 1e-05 -> 0.001 in {place}/tower/config.json",
    ),
    "mean": (
        put("tower/preprocessor_config.json", "image_mean", MEAN),
        "image_mean [0.48145466, 0.4578275, 0.40821073] -> [0.5, 0.4578275, 0.40821073] in "
        "{place}/tower/preprocessor_config.json",
    ),
}


@pytest.mark.parametrize("changed", CHANGES)
@pytest.mark.parametrize("method", METHODS)
def test_one_change_is_refused_by_name(world: World, place: Path, stopped: Path, method: str, changed: str) -> None:
    change, said = CHANGES[changed]
    change(place)
    with pytest.raises(UserError, match="has changed since: ") as caught:
        go_on(world, place, stopped, method)
    assert said.format(place=place) in str(caught.value)
    assert "or set allow_changed_recipe true" in str(caught.value)
    assert not (place / "again").exists()


@pytest.mark.parametrize("method", METHODS)
def test_what_computes_the_same_is_the_same_to_the_bit(world: World, place: Path, stopped: Path, method: str) -> None:
    for path in [*place.rglob("*.json")]:
        values = read_json(path)
        path.write_text(json.dumps({key: values[key] for key in reversed(values)}, indent=7), encoding="utf-8")
    put("llama/config.json", "rope_theta", 10000)(place)  # what it is without the key
    put("llama/tokenizer_config.json", "padding_side", "left")(place)
    write_json(place / "llama" / "generation_config.json", {"do_sample": True, "temperature": 0.3})
    (place / "llama" / "README.md").write_text("A model.", encoding="utf-8")
    for path in place.rglob("*"):
        os.utime(path, ns=(1, 1))
    go_on(world, place, stopped, method)
    files = [path / "checkpoint-4" for path in (stopped / method, place / "again")]
    if method == "full":
        assert weights(files[0]) == weights(files[1])
    else:
        first, second = ((path / "adapter_model.safetensors").read_bytes() for path in files)
        assert first == second


def test_a_tokenizer_that_was_saved_again_gives_the_same_ids(place: Path) -> None:
    """What transformers writes of what it read: tokens as objects, other files, other keys."""
    from transformers import LlamaTokenizer

    old, new = place / "llama", place / "again"
    LlamaTokenizer.from_pretrained(str(old), local_files_only=True).save_pretrained(str(new))
    assert (old / "tokenizer_config.json").read_bytes() != (new / "tokenizer_config.json").read_bytes()
    assert declared_identity._changed_tokenizer(old, load_tokenizer(new)) == []
    assert declared_identity._changed_tokenizer(place / "removed", load_tokenizer(new)) == []
    (new / "special_tokens_map.json").unlink()
    assert declared_identity._changed_tokenizer(old, load_tokenizer(new)) == []
    decoder = read_json(new / "tokenizer_config.json")["added_tokens_decoder"]
    added = {**next(iter(decoder.values())), "content": "[SEG]", "special": False}
    size = len(load_tokenizer(new))
    shutil.copytree(new, place / "grown")
    put("grown/tokenizer_config.json", "added_tokens_decoder", {**decoder, str(size): added})(place)
    (found,) = declared_identity._changed_tokenizer(new, load_tokenizer(place / "grown"))
    assert f'added_tokens_decoder.{size} (none) -> {{"content": "[SEG]"' in found  # not two objects that look alike


def test_changes_that_are_allowed(world: World, place: Path, stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put("llama/config.json", "rope_theta", 50000.0)(place)
    with pytest.raises(UserError, match="another base"):  # of the base of an adapter that it begins with
        run(world, place, place / "new", "lora", lora_path=str(stopped / "lora"))
    go_on(world, place, stopped, "full", allow_changed_recipe=True)
    assert "has changed since: rope_theta 10000.0 -> 50000.0 in" in capsys.readouterr().err
    assert read_json(place / "again" / CONFIG_FILE)["text_config"]["rope_theta"] == 50000.0


def test_a_processor_inside_a_model(world: World, tmp_path: Path) -> None:
    """Our own layout, which has a processor_config.json."""
    model = Path(shutil.copytree(world.model, tmp_path / "model"))
    values = {**RUN, "model_name_or_path": str(model)}
    run_recipe(world.config(tmp_path / "run", **values, max_steps=2))
    put("processor_config.json", "image_mean", MEAN)(model)
    with pytest.raises(UserError, match=r"image_mean .* -> \[0\.5, .*\] in \S+/model/processor_config\.json"):
        run_recipe(world.config(tmp_path / "run", **values))
