"""Features of a frozen tower from the disk: the same losses to the last bit, and no tower from the second epoch on."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import paddle
import paddle.distributed as dist
import pytest

from paddlemix.checkpoints.load import load_pretrained
from paddlemix.datasets.images.sources import ImageSettings
from paddlemix.datasets.images.tower_features import FeatureStore
from paddlemix.errors import UserError
from paddlemix.models.vision import VisionTower
from paddlemix.parallel.layout import Layout
from paddlemix.processors.images.image_spec import ImageSpec
from paddlemix.trainer.batches.vision_cache import VisionCache
from paddlemix.trainer.recipe import run_recipe
from tests.tiny import PINPOINTS
from tests.tiny_world import LORA, World, changed, reports, weights

RUN = {"max_steps": -1, "num_train_epochs": 2, "per_device_train_batch_size": 4, "evaluation_strategy": "epoch"}
ANYRES = {
    "image_aspect_ratio": "anyres",
    "image_grid_pinpoints": [list(pinpoint) for pinpoint in PINPOINTS],
    "mm_patch_merge_type": "spatial",
}


def tower_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tiles of each call of the tower from now on."""
    calls: list[int] = []
    original = VisionTower.forward

    def forward(self: VisionTower, pixel_values: Any) -> Any:
        calls.append(len(pixel_values))
        return original(self, pixel_values)

    monkeypatch.setattr(VisionTower, "forward", forward)
    return calls


@pytest.mark.parametrize(
    "values",
    [{}, LORA, {"mixtoken": True}, ANYRES, {"dataloader_num_workers": 2}],
    ids=["full", "lora", "packed", "anyres", "workers"],
)
def test_no_loss_changes_by_a_bit(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: dict[str, Any]
) -> None:
    run_recipe(world.config(tmp_path / "plain", **RUN, **values))
    calls = tower_calls(monkeypatch)
    cache = {"cache_vision_features": True, "vision_cache_dir": str(tmp_path / "features")}
    run_recipe(world.config(tmp_path / "cached", **RUN, **values, **cache))
    for key in ("loss", "eval_loss"):
        assert reports(tmp_path / "plain", key) == reports(tmp_path / "cached", key)
    assert not changed(weights(tmp_path / "plain"), weights(tmp_path / "cached"))
    stored = list((tmp_path / "features").rglob("*.npy"))
    assert len(stored) == 6  # one for each picture
    assert calls
    calls.clear()
    run_recipe(world.config(tmp_path / "again", **RUN, **values, **cache))
    assert not calls
    assert not changed(weights(tmp_path / "plain"), weights(tmp_path / "again"))


def test_the_tower_runs_in_the_first_epoch_only(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = tower_calls(monkeypatch)
    run = {**RUN, "evaluation_strategy": "no", "cache_vision_features": True}
    run_recipe(world.config(tmp_path / "one", **{**run, "num_train_epochs": 1}, vision_cache_dir=str(tmp_path / "a")))
    first = len(calls)
    run_recipe(world.config(tmp_path / "many", **{**run, "num_train_epochs": 6}, vision_cache_dir=str(tmp_path / "b")))
    assert len(calls) - first <= first + 1  # batches that were made ahead of the first epoch's end hold pixels still


def test_another_tower_or_processing_has_other_features(world: World, tmp_path: Path) -> None:
    run = {"cache_vision_features": True, "vision_cache_dir": str(tmp_path / "features")}
    for number, changes in enumerate(({}, {"image_aspect_ratio": "square"})):
        run_recipe(world.config(tmp_path / str(number), **RUN, **run, **changes))
        assert len(list((tmp_path / "features").rglob("*.npy"))) == 6 * (number + 1)
    moved = load_pretrained(world.model)
    moved.model.vision_tower.class_embedding.set_value(moved.model.vision_tower.class_embedding + 1.0)
    from paddlemix.checkpoints.pretrained import save_model

    save_model(moved, tmp_path / "model")
    run_recipe(world.config(tmp_path / "2", **RUN, **run, model_name_or_path=str(tmp_path / "model")))
    assert len(list((tmp_path / "features").rglob("*.npy"))) == 18


def test_a_tower_that_trains_cannot_be_kept(world: World, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cache_vision_features needs a tower that does not train"):
        run_recipe(world.config(tmp_path, cache_vision_features=True, vision_tower="full"))
    with pytest.raises(UserError, match="has no vision tower"):
        text = {"dataset": {"train": [{"data_files": write_text(tmp_path)}]}, "model_name_or_path": str(world.llama)}
        text |= {"per_device_train_batch_size": 1}
        run_recipe(world.config(tmp_path / "out", cache_vision_features=True, **text))


def write_text(folder: Path) -> str:
    (folder / "text.json").write_text('[{"conversations": [["How many?", "two"]]}]')
    return str(folder / "text.json")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_tensor_group_gets_the_type_of_the_tower(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    """As one process has it, so that the projector of a model in half precision can take it."""
    tower = load_pretrained(world.model, dtype).model.vision_tower
    sent: list[str] = []
    monkeypatch.setattr(dist, "broadcast", lambda tensor, src, group: sent.append(str(tensor.dtype)))
    layout = Layout(world_size=2, tensor_group=SimpleNamespace(ranks=[0, 1], nranks=2, rank=0))
    cache = VisionCache(FeatureStore(tmp_path, "mark", 10**6, (4, 3)), tower, layout)
    features = cache.complete({"tile_features": paddle.ones([1, 4, 3])})["tile_features"]
    assert (sent, str(features.dtype)) == (["paddle.float32"], f"paddle.{dtype}")


# ---- the store ----


def make_store(folder: Path, limit: int = 10**6) -> FeatureStore:
    return FeatureStore(folder, "mark", limit, (4, 3))


FEATURES = np.arange(24, dtype=np.float32).reshape(2, 4, 3)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    assert store.read("ab", 2) is None
    store.write("ab", FEATURES)
    np.testing.assert_array_equal(make_store(tmp_path).read("ab", 2), FEATURES)
    assert store.read("ab", 3) is None


@pytest.mark.parametrize("content", [b"", b"no array", None])
def test_damaged_files_are_made_anew(tmp_path: Path, content: bytes | None) -> None:
    store = make_store(tmp_path)
    store.write("ab", FEATURES)
    path = tmp_path / "ab" / "ab.npy"
    path.write_bytes(path.read_bytes()[:-10] if content is None else content)
    assert store.read("ab", 2) is None


def test_it_is_bounded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = make_store(tmp_path, limit=250)
    for key in ("ab", "cd", "ef"):
        store.write(key, FEATURES)
    assert [store.read(key, 2) is not None for key in ("ab", "cd", "ef")] == [True, False, False]
    assert caplog.text.count("vision_cache_gb allows no more") == 1
    later = make_store(tmp_path, limit=250)
    later.write("gh", FEATURES)  # what is there already counts
    assert later.read("gh", 2) is None


def test_several_writers_keep_the_bound_together(tmp_path: Path) -> None:
    features = np.ones((1, 4, 3), dtype=np.float32)
    make_store(tmp_path, limit=10_000).write("there", features)
    size = next(tmp_path.rglob("*.npy")).stat().st_size
    stores = [FeatureStore(tmp_path, "mark", 5 * size, (4, 3), writers=2) for _ in range(2)]
    for number in range(20):
        stores[number % 2].write(f"{number:02}x", features)
    assert len(list(tmp_path.rglob("*.npy"))) == 5


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="for vision features cannot be made"):
        make_store(tmp_path / "file" / "folder")


def test_a_full_disk_stops_storing_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = make_store(tmp_path)

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", fail)
    store.write("ab", FEATURES)
    store.write("cd", FEATURES)
    assert caplog.text.count("No space left on device") == 1
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_keys(world: World, tmp_path: Path) -> None:
    store, settings, spec = make_store(tmp_path / "a"), ImageSettings(), ImageSpec()
    other = FeatureStore(tmp_path / "b", "another", 10, (4, 3))
    copy = tmp_path / "copy.png"
    copy.write_bytes(world.picture.read_bytes())
    key = store.key(str(world.picture), settings, spec)
    assert store.key(str(copy), settings, spec) == key  # the content counts, not the name
    keys = {key, other.key(str(copy), settings, spec), store.key(str(copy), settings, ImageSpec(aspect_mode="square"))}
    copy.write_bytes(copy.read_bytes() + b"\0")
    assert len(keys | {store.key(str(copy), settings, spec)}) == 4
