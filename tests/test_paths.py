"""The one rule for paths: `~`, NUL, half a surrogate, names too long; in every flag and in every key that is a path."""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from paddlemix.__main__ import COMMANDS
from paddlemix.config.load import ConfigError, load_config
from paddlemix.config.schema import SPECS
from paddlemix.errors import UserError
from paddlemix.paths import user_path, user_place

NAME_256 = "n" * 256
IMPOSSIBLE = {
    "a\0b": "NUL byte",
    "\ud83d": "not valid Unicode",
    "caf\udce9": "not valid Unicode",
    NAME_256: "256 bytes",
    "é" * 128: "256 bytes",
    "/".join(["d" * 200] * 21): "4220 bytes",
    "~nobody-of-this-name/x": "~nobody-of-this-name has no home folder",
}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_home_is_expanded_only_where_a_shell_would(home: Path) -> None:
    assert user_path("~/runs/a", "output_dir") == home / "runs" / "a"
    assert user_path("~", "output_dir") == home
    assert user_path("runs/~/a", "output_dir") == Path("runs/~/a")
    assert user_path("./~", "output_dir") == Path("~")


def test_addresses_and_names_come_back_unchanged(home: Path) -> None:
    for text in ("https://host/~me/data.json", "data:image/png;base64,~", "owner/name", "./owner/name"):
        assert user_place(text, "--input") == text
    assert user_place("~/data.json", "--input") == f"{home}/data.json"
    with pytest.raises(UserError, match="--output 's3://bucket/a' is an address; name a path on this machine"):
        user_path("s3://bucket/a", "--output")


@pytest.mark.parametrize(("text", "reason"), IMPOSSIBLE.items())
def test_what_no_file_system_holds_is_refused_by_name(text: str, reason: str) -> None:
    for read in (user_path, user_place):
        with pytest.raises(UserError, match="--output") as caught:
            read(text, "--output")
        assert reason in str(caught.value)
        str(caught.value).encode()  # can be printed


def test_the_longest_names_are_taken() -> None:
    assert user_path("n" * 255, "--output") == Path("n" * 255)
    with pytest.raises(UserError, match="--output is empty"):
        user_path("", "--output")


# keys of one text that name something on the disk; the rest of SPECS does not
PATH_KEYS = (
    *("model_name_or_path", "mm_vision_tower", "pretrain_mm_mlp_adapter", "lora_path", "chat_template", "image_root"),
    *("vision_cache_dir", "output_dir", "resume_from_checkpoint", "logging_dir", "metrics_output_path"),
)


def test_every_key_that_is_a_path_is_declared_as_one() -> None:
    assert {name for name, spec in SPECS.items() if spec.path} == set(PATH_KEYS)
    named = {name for name in SPECS if name.endswith(("_dir", "_path", "_root", "_file"))}
    assert {name for name in named - set(PATH_KEYS) if SPECS[name].status == "used"} == {"overwrite_output_dir"}


@pytest.mark.parametrize("name", PATH_KEYS)
def test_keys_follow_the_rule(name: str, home: Path) -> None:
    given = {"model_name_or_path": "M", "output_dir": "O"} | {name: "~/x"}
    config = load_config(None, [f"{key}={value}" for key, value in given.items()])
    assert getattr(config, name) == f"{home}/x"
    with pytest.raises(ConfigError, match=f"{name} 'nnn.*256 bytes"):
        load_config(None, [f"{key}={value}" for key, value in (given | {name: NAME_256}).items()])


def test_entries_of_a_file_follow_the_rule(home: Path) -> None:
    entry = {"data_files": ["~/a.json", "~/b.json#5"], "image_root": "~/images", "chat_template": "~/t.json"}
    values = {
        "model_name_or_path": "M",
        "output_dir": "O",
        "dataset": {"train": [entry], "eval": [{"data_files": "~/c.json"}]},
        "sample_steps": 1,
        "sample_prompts": [{"image": "~/i.png", "question": "?"}, {"question": "?"}],
    }
    file = home / "run.json"
    file.write_text(json.dumps(values))
    config = load_config(file)
    train = config.dataset["train"][0]  # type: ignore[index]
    assert train["data_files"] == [f"{home}/a.json", f"{home}/b.json#5"]
    assert (train["image_root"], train["chat_template"]) == (f"{home}/images", f"{home}/t.json")
    assert config.dataset["eval"][0]["data_files"] == f"{home}/c.json"  # type: ignore[index]
    assert config.sample_prompts == [{"image": f"{home}/i.png", "question": "?"}, {"question": "?"}]
    entry["data_files"] = ["a\0b"]
    values["sample_prompts"] = [{"image": "\ud83d", "question": "?"}]
    file.write_text(json.dumps(values))
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    assert [("data_files" in fault, "sample_prompts" in fault) for fault in caught.value.faults] == [
        (True, False),
        (False, True),
    ]


def path_flags() -> Iterator[tuple[str, str]]:
    """Every flag of every command whose name says that it is a path."""
    for command, found in COMMANDS.items():
        module = importlib.import_module(found.module)
        if not hasattr(module, "build_parser"):
            continue
        for action in module.build_parser()._actions:
            word = action.dest.replace("-", "_").split("_")[-1]
            if word in ("path", "root", "file", "output", "input", "inputs", "report", "fix", "data"):
                yield command, action.option_strings[0] if action.option_strings else action.dest


@pytest.mark.parametrize(("command", "flag"), list(path_flags()))
def test_flags_follow_the_rule(command: str, flag: str, home: Path) -> None:
    parser = importlib.import_module(COMMANDS[command].module).build_parser()
    action = next(item for item in parser._actions if flag in item.option_strings or item.dest == flag)
    assert str(parser._get_value(action, "~/x")) == f"{home}/x"
    with pytest.raises(argparse.ArgumentError, match="NUL byte"):
        parser._get_value(action, "a\0b")
