"""What a model or adapter needs: itself, its tower, its base and theirs, wherever a name in its files may lead."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from paddlemix.checkpoints.hub.needs import needed_by_model


def write(folder: Path, file: str, **values: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / file).write_text(json.dumps(values), encoding="utf-8")
    return folder


def places(name: str | Path) -> dict[Path, str]:
    return {item.path.resolve(): item.role for item in needed_by_model(name, "the input")}


def test_an_adapters_base_and_its_tower(tmp_path: Path) -> None:
    tower = write(tmp_path / "clip", "config.json", model_type="clip_vision_model")
    base = write(tmp_path / "models" / "base", "config.json", mm_vision_tower=str(tower))
    (tmp_path / "projector.bin").write_bytes(b"")
    given = {"model": "/moved/away", "projector_file": str(tmp_path / "projector.bin"), "tower": None}
    adapter = write(tmp_path / "ad", "lora_config.json", base={**given, "relative": {"model": "../models/base"}})
    assert places(adapter) == {
        adapter: "the input",
        base: "the base model of the input",
        tower: "the vision tower of the base model of the input",
        tmp_path / "projector.bin": "the projector file of the input",
    }


@pytest.mark.parametrize("file", ["adapter_config.json", "lora_config.json", "llm_adapter/adapter_config.json"])
def test_other_programs_adapters(tmp_path: Path, file: str) -> None:
    base = write(tmp_path / "base", "config.json", model_type="llama")
    adapter = write((tmp_path / "ad" / file).parent, Path(file).name, base_model_name_or_path=str(base))
    assert base in places(tmp_path / "ad")
    (adapter / Path(file).name).write_text(json.dumps({"base_model_name_or_path": "/gone/base"}), encoding="utf-8")
    assert base in places(tmp_path / "ad")  # beside it, where loading looks too


def test_a_sibling_of_the_bases_name_is_not_the_base_where_that_is_found(tmp_path: Path) -> None:
    base = write(tmp_path / "models" / "llava", "config.json", model_type="llama")
    sibling = write(tmp_path / "runs" / "llava", "config.json", model_type="llama")
    write(tmp_path / "runs" / "ad", "adapter_config.json", base_model_name_or_path=str(base))
    assert base in places(tmp_path / "runs" / "ad") and sibling not in places(tmp_path / "runs" / "ad")


@pytest.mark.parametrize("content", ["{", "[]", '{"mm_vision_tower": 3}', '{"mm_vision_tower": "a\\u0000b"}', "\xff"])
def test_damaged_files_are_left_to_whoever_loads_them(tmp_path: Path, content: str) -> None:
    for file in ("config.json", "lora_config.json", "adapter_config.json"):
        (tmp_path / file).write_text(content, encoding="latin-1")
    assert list(places(tmp_path)) == [tmp_path]
    assert places(tmp_path / "missing") == {} and places("nobody/no-such-model") == {}


def test_folders_that_name_each_other_end(tmp_path: Path) -> None:
    one = write(tmp_path / "one", "config.json", mm_vision_tower="../two")
    two = write(tmp_path / "two", "config.json", mm_vision_tower="../one")
    assert list(places(one)) == [one, two]
