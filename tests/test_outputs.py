"""The guard's rules one by one, and what it must not refuse: the places where users really write."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any, NoReturn

import pytest

from paddlemix.errors import UserError
from paddlemix.outputs import Needed, Output, Pictures, check_output, check_pictures, check_replaceable


@pytest.fixture
def needed(tmp_path: Path) -> list[Needed]:
    for name in ("model/parts", "data/images", "runs/one/checkpoint-4"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "model" / "weights").write_text("w")
    (tmp_path / "data" / "q.jsonl").write_text("{}")
    return [
        Needed("the model", tmp_path / "model", "model"),
        Needed("the checkpoint", tmp_path / "runs" / "one" / "checkpoint-4", "model"),
        Needed("the input", tmp_path / "data" / "q.jsonl", "file"),
        Needed("the images", tmp_path / "data" / "images", "pictures"),
    ]


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("data/a.jsonl", "file"),  # answers beside their questions
        ("data/images/report.json", "file"),
        ("model.json", "file"),
        ("runs/one/merged", "folder"),  # a checkpoint's sibling
        ("runs/one/checkpoint-5", "folder"),
        ("runs/two", "folder"),
        ("data/images/cut", "folder"),
        ("model-merged", "folder"),
        ("data", "additions"),
        ("data/images", "additions"),
        (".", "additions"),
    ],
)
def test_what_users_do_is_allowed(tmp_path: Path, needed: list[Needed], path: str, kind: str) -> None:
    check_output(Output("--output", tmp_path / path, kind), needed)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("path", "kind", "message"),
    [
        ("model", "folder", "is the model"),
        ("model/../model", "folder", "is the model"),
        ("model/parts", "folder", "is inside the model"),
        ("model/new/deep", "folder", "is inside the model"),
        ("model", "additions", "is the model"),
        ("model/logs", "additions", "is inside the model"),
        (".", "folder", "contains the model"),
        ("runs/one", "folder", "contains the checkpoint"),
        ("data", "folder", "contains the input"),
        ("data/images", "folder", "is the images"),
        ("model/a.json", "file", "is inside the model"),
        ("data/q.jsonl", "file", "is the input"),
        ("data", "file", "is a folder; name a file"),
        ("data/q.jsonl", "folder", "is a file; name a folder"),
        ("data/q.jsonl/x", "folder", "q.jsonl is a file; choose another"),
    ],
)
def test_what_would_lose_something_is_refused(
    tmp_path: Path, needed: list[Needed], path: str, kind: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        check_output(Output("--output", tmp_path / path, kind), needed)  # type: ignore[arg-type]


def test_links_are_seen_through_and_named(tmp_path: Path, needed: list[Needed]) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "model")
    os.link(tmp_path / "model" / "weights", tmp_path / "same.json")
    with pytest.raises(UserError, match=rf"link/new' \(leads to {tmp_path}/model/new\) is inside the model"):
        check_output(Output("--output", tmp_path / "link" / "new"), needed)
    with pytest.raises(UserError, match="same.json' is a file of the model"):
        check_output(Output("--output", tmp_path / "same.json", "file"), needed)


def test_a_place_that_will_be_an_input_is_refused_too(tmp_path: Path) -> None:
    missing = [Needed("the input", tmp_path / "none.json", "file")]
    with pytest.raises(UserError, match="is the input"):
        check_output(Output("--output", tmp_path / "x" / ".." / "none.json", "file"), missing)


def closed(*_: Any, **__: Any) -> NoReturn:
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def test_a_file_is_replaced_where_it_is_ours_or_a_flag_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = Output("--report", tmp_path / "r.json", "file")
    check_replaceable(output, overwrite=False)
    output.path.write_text('\ufeff  {"a": 1}', encoding="utf-8")
    with pytest.raises(UserError, match="r.json' exists; choose another name, or give --overwrite to replace it"):
        check_replaceable(output, overwrite=False)
    check_replaceable(output, overwrite=False, own=True)
    check_replaceable(output, overwrite=True)
    output.path.write_bytes(b"\x89PNG")
    with pytest.raises(UserError, match="is not a JSON file, so it is never replaced"):
        check_replaceable(output, overwrite=True)
    monkeypatch.setattr(Path, "open", closed)
    with pytest.raises(UserError, match=r"r.json' exists and cannot be read \(Permission denied\); choose "):
        check_replaceable(output, overwrite=True)
    with pytest.raises(UserError, match="is not a regular file"):
        check_replaceable(Output("--report", Path(os.devnull), "file"), overwrite=True)


@pytest.mark.parametrize("settings", ["config.json", "lora_config.json", "adapter_config.json"])
def test_no_file_of_a_model_is_replaced(tmp_path: Path, settings: str) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for name in (settings, "adapter_model.safetensors", "notes.json"):
        (model / name).write_text("{}", encoding="utf-8")
    (tmp_path / "link.json").symlink_to(model / settings)
    for path in (model / settings, model / "notes.json", tmp_path / "link.json"):
        with pytest.raises(UserError, match=f"{path.name}'.* exists in the folder of a model or adapter, '{model}'"):
            check_replaceable(Output("--output", path, "file"), overwrite=True, own=True)
    check_replaceable(Output("--output", model / "new.json", "file"), overwrite=False)
    (model / "adapter_model.safetensors").unlink()
    check_replaceable(Output("--output", model / settings, "file"), overwrite=True)  # a config.json of anything else


def pictures(data: str, folder: object, *names: Path) -> Pictures:
    """Of a data file with these pictures; without any, its records must not be read."""

    def read() -> list[str]:
        assert names
        return list(map(str, names))

    return Pictures(data, [str(folder)], read)


def test_a_folder_that_holds_named_pictures_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out" / "deep" / "pics").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "out" / "deep" / "pics")
    output = Output("output_dir", tmp_path / "out")
    named = [pictures("a.json", "/none"), pictures("b.json", tmp_path / "link")]
    with pytest.raises(UserError, match="out' holds pictures that b.json names, in '.*link', which must stay as they"):
        check_pictures(output, named)
    check_pictures(output, named, below=False)
    check_pictures(output, [pictures("a.json", tmp_path)])
    check_pictures(Output("output_dir", tmp_path / "new"), [pictures("a.json", tmp_path / "new")])
    with pytest.raises(UserError, match="holds pictures"):
        check_pictures(output, [pictures("a.json", tmp_path / "out" / "deep" / "..")], below=False)


@pytest.mark.parametrize("below", [True, False])
def test_a_picture_that_a_link_leads_to_is_in_the_output(tmp_path: Path, below: bool) -> None:
    """Links of pictures alone, and in folders of links to folders; records are read only where such a link is found."""
    held = tmp_path / "out" / "deep" if below else tmp_path / "out"
    for folder in (held, tmp_path / "pics", tmp_path / "elsewhere"):
        folder.mkdir(parents=True, exist_ok=True)
    for place in (held / "loss.png", held / "weights", tmp_path / "elsewhere" / "b.png"):
        place.touch()
    (tmp_path / "pics" / "b.png").symlink_to(tmp_path / "elsewhere" / "b.png")
    (tmp_path / "pics" / "gone.png").symlink_to(tmp_path / "gone.png")
    output, folder = Output("output_dir", tmp_path / "out"), tmp_path / "pics"
    check_pictures(output, [pictures("a.json", folder)], below)
    (folder / "latest").symlink_to(held / "weights")  # no picture of a record
    check_pictures(output, [pictures("a.json", folder, folder / "b.png")], below)
    (tmp_path / "elsewhere" / "a.png").symlink_to(held / "loss.png")
    (folder / "a.png").symlink_to(tmp_path / "elsewhere" / "a.png")
    message = f"holds a picture that a.json names: the link '{folder}/a.png' leads to '{held}/loss.png', which must"
    with pytest.raises(UserError, match=message):
        check_pictures(output, [pictures("a.json", folder, folder / "b.png", folder / "a.png")], below)
    if below:
        check_pictures(output, [pictures("a.json", folder, folder / "a.png")], below=False)
