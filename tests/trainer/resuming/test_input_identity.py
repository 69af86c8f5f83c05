"""A resumed run reads what the stopped one read: records, pictures and an adapter's base, each change by its name."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from paddlemix.checkpoints.files.weight_files import read_safetensors, write_safetensors
from paddlemix.checkpoints.layouts.file_names import ADAPTER_WEIGHTS
from paddlemix.datasets import data_identity
from paddlemix.errors import UserError
from paddlemix.trainer.recipe import run_recipe
from paddlemix.trainer.resuming import input_identity
from paddlemix.trainer.resuming.checkpoint_folders import CHECKSUMS_FILE
from paddlemix.trainer.resuming.input_identity import INPUTS_FILE, InputIdentity
from tests.tiny_models import flip_bit
from tests.tiny_world import CLIP_TOWER, LORA, World

RUN = {"save_strategy": "steps", "save_steps": 2, "learning_rate": 0.01, "evaluation_strategy": "steps", **LORA}


@pytest.fixture(scope="module")
def stopped(world: World, tmp_path_factory: pytest.TempPathFactory) -> World:
    """A copy of the world with a LoRA run of four steps in `run`, whose checkpoint-2 the tests go on from."""
    copy = World(tmp_path_factory.mktemp("stopped"))
    shutil.copytree(world.model, copy.model)
    shutil.copytree(world.data, copy.data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(input_identity, "_WAIT", 600.0)  # however slow the machine is
        run_recipe(copy.config(copy.root / "run", **RUN))
    return copy


@pytest.fixture
def place(stopped: World, tmp_path: Path) -> Iterator[World]:
    """The same, whatever a test changes in it."""
    for folder in (stopped.model, stopped.data):
        shutil.copytree(folder, tmp_path / folder.name)
    yield stopped
    for folder in (stopped.model, stopped.data):
        shutil.rmtree(folder)
        shutil.copytree(tmp_path / folder.name, folder)


def go_on(place: World, output_dir: Path, **changes: Any) -> None:
    values = {**RUN, "resume_from_checkpoint": str(place.root / "run" / "checkpoint-2"), **changes}
    run_recipe(place.config(output_dir, **values))


def weights(checkpoint: Path) -> dict[str, bytes]:
    return {name: entry.read().tobytes() for name, entry in read_safetensors(checkpoint / ADAPTER_WEIGHTS).items()}


def edit(path: Path, change: Callable[[list[Any]], Any]) -> None:
    records = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(change(records), ensure_ascii=False), encoding="utf-8")


def replace_answer(records: list[Any]) -> list[Any]:
    text = json.dumps(records[5], ensure_ascii=False)
    key = next(answer for answer in ("It is red.", "On the mat", "45", "红色") if answer in text)
    return [*records[:5], json.loads(text.replace(key, "No")), *records[6:]]


CHANGES: dict[str, tuple[Callable[[World], Any], str]] = {
    "edited": (lambda w: edit(w.data / "train.json", replace_answer), "record 5 of {data}/train.json"),
    "dropped": (
        lambda w: edit(w.data / "train.json", lambda records: records[:7] + records[8:]),
        "{data}/train.json (it has 11 records instead of 12 and differs from record 7 on)",
    ),
    "added": (
        lambda w: edit(w.data / "train.json", lambda records: [*records, records[0]]),
        "{data}/train.json (it has 13 records instead of 12 and differs from record 12 on)",
    ),
    "reordered": (
        lambda w: edit(w.data / "train.json", lambda records: [records[0], *records[:0:-1]]),
        "{data}/train.json (the same records in another order from record 1 on)",
    ),
    "evaluation": (lambda w: edit(w.data / "eval.json", lambda records: records[1:] + records[:1]), "{data}/eval.json"),
    "picture": (
        lambda w: shutil.copy(w.data / "images" / "1.png", w.data / "images" / "2.png"),
        "picture {data}/images/2.png",
    ),
    "base": (
        lambda w: flip_bit(w.model, "language_model.layers.1.self_attn.v_proj.weight"),
        "the base's weights (language_model: layers.1.self_attn.v_proj.weight differ)",
    ),
    "tower": (
        lambda w: flip_bit(w.model, "vision_tower.layers.0.mlp.fc2.weight"),
        "the base's weights (vision_tower: layers.0.mlp.fc2.weight differ)",
    ),
}


@pytest.mark.parametrize("changed", CHANGES)
def test_one_change_is_refused_by_name(place: World, tmp_path: Path, changed: str) -> None:
    change, said = CHANGES[changed]
    change(place)
    with pytest.raises(UserError, match="has changed since: ") as caught:
        go_on(place, tmp_path / "again")
    expected = said.format(data=place.data)
    assert expected in str(caught.value) and "or set allow_changed_recipe true" in str(caught.value)
    assert not (tmp_path / "again").exists()


def test_one_bit_of_a_picture_with_its_time_put_back(place: World, tmp_path: Path) -> None:
    picture = place.data / "images" / "0.png"
    content, status = bytearray(picture.read_bytes()), picture.stat()
    content[-1] ^= 1  # of the last chunk's checksum: it decodes all the same
    picture.write_bytes(content)
    os.utime(picture, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(UserError, match=r"changed since: picture .*images/0\.png\. Put it back"):
        go_on(place, tmp_path / "again")


def test_what_was_copied_and_touched_is_the_same_to_the_bit(
    place: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(input_identity, "_WAIT", 600.0)
    for folder in (place.model, place.data):
        shutil.copytree(folder, tmp_path / "aside" / folder.name)
        shutil.rmtree(folder)
        shutil.move(tmp_path / "aside" / folder.name, folder)
    edit(place.data / "train.json", lambda records: records)  # written otherwise
    for path in place.data.rglob("*"):
        os.utime(path, ns=(1, 1))
    go_on(place, tmp_path / "again")
    assert weights(tmp_path / "again" / "checkpoint-4") == weights(place.root / "run" / "checkpoint-4")
    first, second = (
        read_safetensors(path / "checkpoint-4" / INPUTS_FILE) for path in (place.root / "run", tmp_path / "again")
    )
    assert first["digests"].read().all() and second["digests"].read().tobytes() == first["digests"].read().tobytes()


def test_changes_that_are_allowed(place: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(place.data / "train.json", replace_answer)
    go_on(place, tmp_path / "again", allow_changed_recipe=True)
    assert "has changed since: record 5 of" in capsys.readouterr().err


def test_evaluations_may_be_switched_off(place: World, tmp_path: Path) -> None:
    edit(place.data / "eval.json", lambda records: records[1:])
    go_on(place, tmp_path / "again", evaluation_strategy="no")
    assert weights(tmp_path / "again" / "checkpoint-4") == weights(place.root / "run" / "checkpoint-4")


def test_a_checkpoint_of_an_earlier_version(place: World, tmp_path: Path) -> None:
    old = Path(shutil.copytree(place.root / "run" / "checkpoint-2", tmp_path / "checkpoint-2"))
    (old / INPUTS_FILE).unlink()
    (old / CHECKSUMS_FILE).unlink()
    edit(place.data / "train.json", replace_answer)
    go_on(place, tmp_path / "again", resume_from_checkpoint=str(old))


def test_without_the_cache_the_file_is_named(place: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_identity, "cached_record_digests", lambda content: None)
    monkeypatch.setattr(input_identity, "cached_record_digests", lambda content: None)
    edit(place.data / "train.json", replace_answer)
    with pytest.raises(UserError, match=r"changed since: \S+/train\.json\. Put it back"):
        go_on(place, tmp_path / "again")


def test_pictures_that_were_not_hashed_in_time(place: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their files' states tell what has changed, but not a touched file from another one."""
    monkeypatch.setattr(input_identity, "hashed", lambda paths, pictures, threads=None: pictures)
    run_recipe(place.config(tmp_path / "run", **RUN))
    checkpoint = tmp_path / "run" / "checkpoint-2"
    saved = read_safetensors(checkpoint / INPUTS_FILE)
    assert not saved["digests"].read().any() and saved["states"].read().all()
    monkeypatch.undo()
    os.utime(place.data / "images" / "3.png", ns=(1, 1))
    with pytest.raises(UserError, match=r"changed since: picture .*images/3\.png"):
        go_on(place, tmp_path / "again", resume_from_checkpoint=str(checkpoint))


def test_saves_wait_for_pictures_only_while_they_are_hashed(tmp_path: Path) -> None:
    identity, waits = InputIdentity({}, None, {}), list[float]()  # type: ignore[arg-type]
    hashing = True
    identity._thread = SimpleNamespace(is_alive=lambda: hashing, join=waits.append)  # type: ignore[assignment]
    identity.write(tmp_path)
    identity.write(tmp_path)
    assert waits[0] == input_identity._WAIT and waits[0] > waits[1] >= 0.0
    hashing = False
    identity.write(tmp_path)
    assert len(waits) == 2


def test_a_tower_beside_the_base(world: World, tmp_path: Path) -> None:
    tower = Path(shutil.copytree(CLIP_TOWER, tmp_path / "tower"))
    values = {**RUN, "model_name_or_path": str(world.llama), "mm_vision_tower": str(tower)}
    run_recipe(world.config(tmp_path / "run", **values, max_steps=2))
    flip_bit(tower, "vision_model.encoder.layers.0.mlp.fc1.weight", 0)
    with pytest.raises(UserError, match=r"the base's weights \(vision_tower: layers\.0\.mlp\.fc1\.weight differ\)"):
        go_on(world, tmp_path / "again", **values | {"resume_from_checkpoint": str(tmp_path / "run" / "checkpoint-2")})


def test_a_damaged_note_is_told(place: World, tmp_path: Path) -> None:
    """Where no checksum tells it first."""
    checkpoint = Path(shutil.copytree(place.root / "run" / "checkpoint-2", tmp_path / "checkpoint-2"))
    (checkpoint / CHECKSUMS_FILE).unlink()
    tensors = dict(read_safetensors(checkpoint / INPUTS_FILE))
    write_safetensors(tmp_path / "damaged", tensors, {"data_files": "[3]"})
    shutil.move(tmp_path / "damaged", checkpoint / INPUTS_FILE)
    with pytest.raises(UserError, match=r"inputs\.safetensors' cannot be understood .*; copy the checkpoint again"):
        go_on(place, tmp_path / "again", resume_from_checkpoint=str(checkpoint))
