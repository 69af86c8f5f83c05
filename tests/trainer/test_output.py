"""The output directory: may it be used, what of it goes, and how a result gets there."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from paddlemix.config.load import load_config
from paddlemix.config.schema import RunConfig
from paddlemix.errors import MissingFileError, UserError
from paddlemix.launch.rank_logs import FOLDER, RankLogs
from paddlemix.trainer.output import clear_earlier_run, find_resume_point, publishing, remove_leftovers, sole_writer


def settings(output_dir: Path, **values: Any) -> RunConfig:
    given = {
        "model_name_or_path": "model",
        "output_dir": str(output_dir),
        "do_train": True,
        "dataset": {"train": [{"data_files": "train.json"}]},
        **values,
    }
    return load_config(None, [f"{key}={json.dumps(value)}" for key, value in given.items()])


def add_checkpoint(output_dir: Path, step: int, complete: bool = True) -> Path:
    path = output_dir / f"checkpoint-{step}"
    path.mkdir(parents=True)
    if complete:
        (path / "training_state.json").write_text("{}", encoding="utf-8")
    return path


def listing(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


def test_a_new_or_empty_folder_starts_at_the_beginning(tmp_path: Path) -> None:
    assert find_resume_point(settings(tmp_path / "new" / "deep")) is None
    assert find_resume_point(settings(tmp_path)) is None
    assert listing(tmp_path) == []


def test_the_newest_checkpoint_is_gone_on_from(tmp_path: Path) -> None:
    for step in (900, 1000):
        add_checkpoint(tmp_path, step)
    add_checkpoint(tmp_path, 800, complete=False)
    add_checkpoint(tmp_path, 1100).rename(tmp_path / ".checkpoint-1100.abc")  # a killed save
    (tmp_path / "checkpoint-old").mkdir()
    assert find_resume_point(settings(tmp_path)) == tmp_path / "checkpoint-1000"
    assert find_resume_point(settings(tmp_path, overwrite_output_dir=True)) is None
    named = settings(tmp_path, overwrite_output_dir=True, resume_from_checkpoint=str(tmp_path / "checkpoint-900"))
    assert find_resume_point(named) == tmp_path / "checkpoint-900"


def test_logs_of_a_launcher_do_not_make_a_folder_used(tmp_path: Path) -> None:
    logs = RankLogs(tmp_path / FOLDER)
    logs.begin(0, "a start")
    assert find_resume_point(settings(tmp_path)) is None
    (tmp_path / FOLDER.parent / "mine.txt").touch()
    with pytest.raises(UserError, match="is not empty"):
        find_resume_point(settings(tmp_path))


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("lost", ["its training_state.json is missing", "it is a link to 'gone', which does not exist"])
def test_a_newest_checkpoint_without_its_state_is_not_passed_over(tmp_path: Path, older: bool, lost: str) -> None:
    if older:
        add_checkpoint(tmp_path, 900)
    (tmp_path / "run_config.json").write_text("{}", encoding="utf-8")
    if "link" in lost:
        (tmp_path / "checkpoint-1000").symlink_to("gone")
    else:
        (add_checkpoint(tmp_path, 1000, complete=False) / "model.safetensors").touch()
    with pytest.raises(UserError, match=f"checkpoint-1000 cannot be resumed: {lost}. .*overwrite_output_dir"):
        find_resume_point(settings(tmp_path))
    assert find_resume_point(settings(tmp_path, overwrite_output_dir=True)) is None
    if older:
        named = {"resume_from_checkpoint": str(tmp_path / "checkpoint-900")}
        assert find_resume_point(settings(tmp_path, **named)) == tmp_path / "checkpoint-900"


def test_a_checkpoint_that_was_moved_and_linked_back_is_gone_on_from(tmp_path: Path) -> None:
    moved = add_checkpoint(tmp_path / "disk", 4)
    out = tmp_path / "out"
    out.mkdir()
    (out / "checkpoint-4").symlink_to(moved)
    (out / "run_config.json").write_text("{}", encoding="utf-8")
    for values in ({}, {"resume_from_checkpoint": str(out / "checkpoint-4")}):
        assert find_resume_point(settings(out, **values)) == out / "checkpoint-4"
    clear_earlier_run(out)
    assert listing(tmp_path) == ["disk", "disk/checkpoint-4", "disk/checkpoint-4/training_state.json", "out"]


def test_an_incomplete_checkpoint_is_not_gone_on_from(tmp_path: Path) -> None:
    path = add_checkpoint(tmp_path, 5, complete=False)
    with pytest.raises(MissingFileError, match="checkpoint-5' is not a complete checkpoint"):
        find_resume_point(settings(tmp_path, resume_from_checkpoint=str(path)))


def test_foreign_content_needs_a_word(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match="is not empty and holds no checkpoint .* overwrite_output_dir"):
        find_resume_point(settings(tmp_path))
    assert find_resume_point(settings(tmp_path, overwrite_output_dir=True)) is None
    assert find_resume_point(settings(tmp_path, do_train=False)) is None  # an evaluation writes nothing there


def test_a_run_that_ended_before_its_first_checkpoint_begins_anew(tmp_path: Path) -> None:
    for name in ("run_config.json", "metrics.jsonl", "notes.txt"):
        (tmp_path / name).write_text("{}", encoding="utf-8")
    assert find_resume_point(settings(tmp_path)) is None
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")  # that one has a result
    with pytest.raises(UserError, match="is not empty and holds no checkpoint"):
        find_resume_point(settings(tmp_path))


def test_what_a_killed_run_left_under_temporary_names_counts_for_nothing(tmp_path: Path) -> None:
    for name in (".checkpoint-4.abc", ".checkpoint-2.old.abc", ".result.xyz"):
        (tmp_path / name / "old").mkdir(parents=True)
    for name in (".run_config.json.12.tmp", "metrics.tmp"):
        (tmp_path / name).write_text("", encoding="utf-8")
    (tmp_path / ".hidden").mkdir()
    with pytest.raises(UserError, match="is not empty"):
        find_resume_point(settings(tmp_path))
    (tmp_path / ".hidden").rmdir()
    assert find_resume_point(settings(tmp_path)) is None
    assert len(listing(tmp_path)) == 8  # looking removes nothing
    remove_leftovers(tmp_path)
    assert listing(tmp_path) == []
    remove_leftovers(tmp_path / "missing")


def test_a_folder_with_the_name_of_a_result_is_refused_at_the_start(tmp_path: Path) -> None:
    add_checkpoint(tmp_path, 10)
    (tmp_path / "lora_config.json").mkdir()
    with pytest.raises(UserError, match="holds a folder named lora_config.json, where a file of the result goes; move"):
        find_resume_point(settings(tmp_path))


def test_a_file_and_a_closed_folder_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match="file' is a file; name a folder"):
        find_resume_point(settings(tmp_path / "file"))
    with pytest.raises(UserError, match=f"below' cannot be made: {tmp_path / 'file'} is a file; choose another"):
        find_resume_point(settings(tmp_path / "file" / "deep" / "below"))
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UserError, match=f"cannot be written: no permission in {tmp_path}"):
        find_resume_point(settings(tmp_path / "a" / "b"))


def test_clearing_takes_a_runs_own_files_and_no_other(tmp_path: Path) -> None:
    own = [
        *("config.json", "model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json"),
        *("lora_config.json", "adapter_model.safetensors", "processor_config.json", "tokenizer.model"),
        *("tokenizer_config.json", "run_config.json", "metrics.jsonl", "loss.png"),
    ]
    foreign = ["train.json", "recipe.json", "notes.jsonl", "other.safetensors", "projector.safetensors", "figure.png"]
    for name in (*own, *foreign):
        (tmp_path / name).write_text("", encoding="utf-8")
    for name in ("checkpoint-5", ".checkpoint-7.abc", "images", "checkpoint-notes"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("", encoding="utf-8")
    clear_earlier_run(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*foreign, "images", "checkpoint-notes"])
    clear_earlier_run(tmp_path / "missing")


def test_a_checkpoint_of_another_run_needs_a_folder_of_its_own(tmp_path: Path) -> None:
    checkpoint = add_checkpoint(tmp_path / "run", 2)
    given = {"resume_from_checkpoint": str(checkpoint)}
    other = tmp_path / "other"
    assert find_resume_point(settings(other, **given)) == checkpoint
    other.mkdir()
    (other / "model.safetensors").write_text("any other model", encoding="utf-8")
    with pytest.raises(
        UserError, match="is not empty and is not the folder of the run that saved resume_from_checkpoint"
    ):
        find_resume_point(settings(other, **given))
    assert find_resume_point(settings(other, **given, overwrite_output_dir=True)) == checkpoint
    (other / "run_config.json").write_text(json.dumps(given), encoding="utf-8")  # it was begun there, and killed
    assert find_resume_point(settings(other, **given)) == checkpoint
    with pytest.raises(UserError, match="is inside the checkpoint that the run resumes from"):
        find_resume_point(settings(checkpoint / "new", **given))


def test_only_the_first_process_of_a_run_holds_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings(tmp_path)
    with sole_writer(config) as take:
        take(None)
        assert [path.name for path in tmp_path.iterdir()] == [".paddlemix.lock"]
        assert find_resume_point(config) is None  # a lock is no content
        with pytest.raises(UserError, match="is being written by process"), sole_writer(config):
            pass
        with sole_writer(settings(tmp_path, do_train=False)) as evaluate:  # an evaluation writes nothing there
            evaluate(None)
        monkeypatch.setenv("PADDLE_TRAINER_ID", "1")
        with sole_writer(config) as follow:
            follow(None)
    assert not list(tmp_path.iterdir())


def test_a_new_folder_is_made_and_held_when_the_run_is_ready(tmp_path: Path) -> None:
    config = settings(tmp_path / "out")
    with sole_writer(config) as first, sole_writer(config) as second:
        assert not (tmp_path / "out").exists()
        first(None)
        with pytest.raises(UserError, match="is being written by process"):
            second(None)
    assert not (tmp_path / "out").exists()
    with sole_writer(config) as late:  # another run was made in the meantime
        add_checkpoint(tmp_path / "out", 4)
        with pytest.raises(UserError, match="was written by another run meanwhile; start this one again"):
            late(None)
    assert listing(tmp_path / "out") == ["checkpoint-4", "checkpoint-4/training_state.json"]


def test_a_new_run_is_not_among_its_data(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "train.json").write_text("[]", encoding="utf-8")
    entry = {"data_files": str(tmp_path / "train.json#5"), "image_root": str(tmp_path / "images")}
    values = {"dataset": {"train": [entry]}, "overwrite_output_dir": True}
    with pytest.raises(UserError, match="contains the data file of dataset.train"):
        find_resume_point(settings(tmp_path, **values))
    with pytest.raises(UserError, match="is the image_root"):
        find_resume_point(settings(tmp_path / "images", **values))
    assert find_resume_point(settings(tmp_path / "images" / "run", **values)) is None
    values["overwrite_output_dir"] = False
    add_checkpoint(tmp_path, 2)  # a run of an earlier version, which allowed it
    assert find_resume_point(settings(tmp_path, **values)) == tmp_path / "checkpoint-2"


@pytest.mark.parametrize("key", ["logging_dir", "metrics_output_path", "vision_cache_dir"])
def test_other_folders_of_a_run_are_not_in_its_model(tmp_path: Path, key: str) -> None:
    (tmp_path / "model").mkdir()
    values = {"model_name_or_path": str(tmp_path / "model")}
    with pytest.raises(UserError, match=f"{key} '.*logs' is inside the run's own model_name_or_path"):
        find_resume_point(settings(tmp_path / "run", **values, **{key: str(tmp_path / "model" / "logs")}))
    assert find_resume_point(settings(tmp_path / "run", **values, **{key: str(tmp_path)})) is None


@pytest.mark.parametrize("key", ["model_name_or_path", "mm_vision_tower", "lora_path"])
def test_a_run_may_not_write_where_what_it_starts_from_is(tmp_path: Path, key: str) -> None:
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    again = tmp_path / "x" / ".."
    (tmp_path / "x").mkdir()
    for given, relation in ((again, "is"), (add_checkpoint(tmp_path, 3), "contains"), (tmp_path / "x", "contains")):
        with pytest.raises(UserError, match=f"{relation} the run's own {key} '{given}', which must stay as it is"):
            find_resume_point(settings(tmp_path, overwrite_output_dir=True, **{key: str(given)}))
    with pytest.raises(UserError, match=f"is inside the run's own {key} '{tmp_path}'"):
        find_resume_point(settings(tmp_path / "run", **{key: str(tmp_path)}))
    assert find_resume_point(settings(tmp_path / "run", **{key: str(tmp_path / "x")})) is None


@pytest.mark.parametrize("name", ["projector.safetensors", "model.safetensors"])
def test_a_projector_file_is_not_in_the_folder_that_a_run_writes(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("", encoding="utf-8")
    given = {"overwrite_output_dir": True, "pretrain_mm_mlp_adapter": str(tmp_path / name)}
    with pytest.raises(UserError, match="contains the run's own pretrain_mm_mlp_adapter"):
        find_resume_point(settings(tmp_path, **given))
    assert find_resume_point(settings(tmp_path / "run", **given)) is None


def write_model_files(directory: Path) -> None:
    for name in ("config.json", "model.safetensors", "tokenizer.model"):
        (directory / name).write_text("new", encoding="utf-8")


def test_a_result_replaces_an_earlier_model_and_nothing_else(tmp_path: Path) -> None:
    out = tmp_path / "out"
    add_checkpoint(out, 3)
    old = ("lora_config.json", "model.safetensors.index.json", "model-00001-of-00001.safetensors", "config.json")
    for name in (*old, "metrics.jsonl", "mine.txt"):
        (out / name).write_text("old", encoding="utf-8")
    with publishing(out) as directory:
        write_model_files(directory)
    names = ["checkpoint-3", "config.json", "metrics.jsonl", "mine.txt", "model.safetensors", "tokenizer.model"]
    assert sorted(path.name for path in out.iterdir()) == names
    assert (out / "config.json").read_text(encoding="utf-8") == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]  # no temporary folder is left


def test_a_result_that_cannot_be_written_changes_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("old", encoding="utf-8")

    with pytest.raises(UserError, match="cannot write '.*out': No space left on device"), publishing(out) as directory:
        write_model_files(directory)
        raise OSError(28, "No space left on device")
    assert listing(tmp_path) == ["out", "out/config.json"]
    assert (out / "config.json").read_text(encoding="utf-8") == "old"
