"""Names become directories, found in the caches of several programs; downloads are in test_download.py."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from paddlemix.checkpoints.hub.model_names import ModelName, candidates, is_model_name
from paddlemix.checkpoints.hub.resolve import KNOWN_NAMES, local_model, resolve_model
from paddlemix.errors import MissingFileError, UserError
from paddlemix.models.presets import TOWERS
from tests.hub_server import HubServer
from tests.tiny_models import GOLDEN

HF_NAME = "liuhaotian/llava-v1.5-7b"
TOWER_NAME = "openai/clip-vit-large-patch14-336"
PADDLEMIX_NAME = "paddlemix/llava/llava-v1.6-7b"
CONFIG = b'{"model_type": "llava"}'


def place(directory: Path, *names: str) -> Path:
    """Makes a directory with small files of these names."""
    for name in names:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(CONFIG)
    return directory


# Directories and names


def test_an_existing_directory_wins_over_a_name(home: Path) -> None:
    place(Path(HF_NAME), "anything")
    assert resolve_model(HF_NAME) == Path(HF_NAME)
    assert resolve_model(home / "working") == home / "working"


@pytest.mark.parametrize("path", ["./a/b", "/no/such", "../a/b", "one", "a/b/c", "a/../b", "~/a/b", "a/", ""])
def test_what_is_no_name_is_a_directory_that_does_not_exist(home: Path, path: str) -> None:
    assert not is_model_name(path)
    with pytest.raises(MissingFileError, match="does not exist"):
        resolve_model(path)


def test_a_file_is_no_directory(home: Path) -> None:
    Path("model.bin").write_bytes(b"")
    with pytest.raises(MissingFileError, match="'model.bin' is a file"):
        resolve_model("model.bin")


def test_every_known_name_is_a_name() -> None:
    assert [name for name in KNOWN_NAMES if not is_model_name(name)] == []


def test_a_name_without_its_owner_gets_a_suggestion(home: Path) -> None:
    with pytest.raises(MissingFileError, match=f"did you mean '{HF_NAME}'"):
        resolve_model("llava-v1.5-7b")


@pytest.mark.parametrize(
    ("text", "variables", "expected"),
    [
        ("a/b", {}, ModelName("huggingface", "a/b")),
        ("a/b@v1.0", {}, ModelName("huggingface", "a/b", "v1.0")),
        ("paddlemix/llava/x", {"PADDLEMIX_HUB": "modelscope"}, ModelName("paddlemix", "paddlemix/llava/x")),
        ("modelscope:a/b", {}, ModelName("modelscope", "a/b")),
        ("ms:lmsys/vicuna-7b-v1.5@x", {}, ModelName("modelscope", "lmsys/vicuna-7b-v1.5", "x")),
        ("hf:a/b", {"PADDLEMIX_HUB": "modelscope"}, ModelName("huggingface", "a/b")),
        ("huggingface:a/b", {"USE_MODELSCOPE_HUB": "1"}, ModelName("huggingface", "a/b")),
        ("a/b", {"PADDLEMIX_HUB": "ModelScope"}, ModelName("modelscope", "a/b")),
        ("a/b", {"USE_HF": "0"}, ModelName("modelscope", "a/b")),
        ("a/b", {"USE_HF": "1", "USE_MODELSCOPE_HUB": "1"}, ModelName("huggingface", "a/b")),
        ("a/b", {"VLLM_USE_MODELSCOPE": "True"}, ModelName("modelscope", "a/b")),
        ("a/b", {"USE_MODELSCOPE_HUB": "0"}, ModelName("huggingface", "a/b")),
        (
            "openai/clip-vit-large-patch14-336",
            {"PADDLEMIX_HUB": "modelscope"},
            ModelName("modelscope", "AI-ModelScope/clip-vit-large-patch14-336"),
        ),
        ("modelscope:a", {}, None),
        ("other:a/b", {}, None),
        ("a/b@", {}, None),
        ("paddlemix/llava/x@1", {}, None),
    ],
)
def test_the_hub_of_a_name(
    home: Path, monkeypatch: pytest.MonkeyPatch, text: str, variables: dict[str, str], expected: ModelName | None
) -> None:
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    assert ModelName.parse(text) == expected
    assert is_model_name(text) is (expected is not None)


def test_an_unknown_hub_is_refused(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PADDLEMIX_HUB", "modelskope")
    with pytest.raises(UserError, match="PADDLEMIX_HUB='modelskope' is not one of huggingface, modelscope; did you"):
        resolve_model("a/b")


# Caches


@pytest.mark.parametrize(
    "place_of",
    ["models/a--b.c/snapshots/master", "models/a/b___c", "hub/models/a/b___c", "hub/a/b___c"],
)
def test_each_cache_of_modelscope_is_found_without_network(
    home: Path, monkeypatch: pytest.MonkeyPatch, place_of: str
) -> None:
    monkeypatch.setenv("PADDLEMIX_OFFLINE", "1")
    directory = place(home / "ms" / place_of, "config.json", "model.safetensors")
    assert resolve_model("modelscope:a/b.c") == directory
    with pytest.raises(MissingFileError):
        resolve_model("modelscope:a/b.d")
    assert local_model("a/b.c") is None


def test_one_model_of_two_hubs_is_two_models(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = place(candidates("a/b")[0], "config.json", "model.safetensors")
    second = place(candidates("modelscope:a/b")[0], "config.json", "model.safetensors")
    assert (local_model("a/b"), local_model("modelscope:a/b")) == (first, second)
    monkeypatch.setenv("PADDLEMIX_HUB", "modelscope")
    assert local_model("a/b") == second


def test_a_revision_has_a_place_of_its_own(home: Path) -> None:
    newest = place(candidates("a/b")[0], "config.json", "model.safetensors")
    assert local_model("a/b@v1") is None
    cached = home / "hf" / "hub" / "models--a--b"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "v1").write_text("abc")
    tagged = place(cached / "snapshots" / "abc", "config.json", "model.safetensors")
    assert (local_model("a/b"), local_model("a/b@v1"), local_model("a/b@abc")) == (newest, tagged, tagged)


def test_an_adapter_needs_no_config_of_a_model(home: Path) -> None:
    directory = place(candidates("a/b")[0], "adapter_config.json", "adapter_model.safetensors")
    assert local_model("a/b") == directory
    (directory / "adapter_model.safetensors").rename(directory / "model.safetensors")
    assert local_model("a/b") is None


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin", "model_state.pdparams"])
def test_each_cache_is_found_without_network(home: Path, which: int, weights: str) -> None:
    reference = home / "hf" / "hub" / "models--liuhaotian--llava-v1.5-7b" / "refs" / "main"
    reference.parent.mkdir(parents=True)
    reference.write_text("abc")
    directory = place(candidates(HF_NAME)[which], "config.json", weights)
    assert resolve_model(HF_NAME) == directory
    assert which != 2 or directory.name == "abc"


def test_the_cache_folders_are_those_of_the_other_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("PPMIX_HOME", "PPNLP_HOME", "HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", "/home/user")
    cached = "models--liuhaotian--llava-v1.5-7b/snapshots/main"
    assert [str(path) for path in candidates(HF_NAME)] == [
        f"/home/user/.paddlemix/models/{HF_NAME}",
        f"/home/user/.paddlenlp/models/{HF_NAME}",
        f"/home/user/.cache/huggingface/hub/{cached}",
    ]
    assert len(candidates(PADDLEMIX_NAME)) == 2
    for variable, value in (("XDG_CACHE_HOME", "/x"), ("HF_HOME", "/h"), ("HF_HUB_CACHE", "/c")):
        monkeypatch.setenv(variable, value)
        inside = {"/x": "/x/huggingface/hub", "/h": "/h/hub", "/c": "/c"}[value]
        assert str(candidates(HF_NAME)[2]) == f"{inside}/{cached}"


@pytest.mark.parametrize("shards", [["a.safetensors"], ["a.safetensors", "b.safetensors"]])
def test_a_cache_without_all_shards_is_not_whole(home: Path, shards: list[str]) -> None:
    directory = place(candidates(HF_NAME)[0], "config.json", *shards)
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    assert (local_model(HF_NAME) is not None) is (len(shards) == 2)


def test_the_two_halves_that_paddlemix_keeps_are_joined(home: Path) -> None:
    weights, rest = candidates(PADDLEMIX_NAME)
    place(weights, "model_state.pdparams")
    place(rest, "config.json", "tokenizer.model", "processor/eval/preprocessor_config.json", "other.bin")
    assert resolve_model(PADDLEMIX_NAME) == weights
    names = sorted(path.relative_to(weights).as_posix() for path in weights.rglob("*") if path.is_file())
    expected = ["config.json", "model_state.pdparams", "processor/eval/preprocessor_config.json", "tokenizer.model"]
    assert names == expected


# Offline


@pytest.mark.parametrize("variable", ["PADDLEMIX_OFFLINE", "HF_HUB_OFFLINE"])
def test_offline_asks_no_server_and_says_every_place(
    server: HubServer, home: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "1")
    place(candidates(HF_NAME)[1], "config.json")
    with pytest.raises(MissingFileError) as caught:
        resolve_model(HF_NAME)
    message = str(caught.value)
    assert f"{variable}=1 forbids network access" in message
    assert str(home / "working" / HF_NAME) in message
    assert all(str(place) in message for place in candidates(HF_NAME))
    assert "incomplete: no weights" in message
    assert f"copy its files (config.json, tokenizer, weights) into {candidates(HF_NAME)[0]}" in message
    assert "paddlemix/llava/llava-v1.5-7b" in message
    assert server.seen == []


def test_a_path_into_an_existing_folder_is_not_requested_from_a_server(server: HubServer) -> None:
    place(Path("checkpoints"), "x")
    with pytest.raises(MissingFileError, match="the folder 'checkpoints' exists in"):
        resolve_model("checkpoints/llava_sft")
    assert server.seen == []


# Where names are used


def cache_golden(name: str, part: str = "original") -> Path:
    """Puts a golden model into the first cache under a name."""
    directory = candidates(name)[0]
    directory.parent.mkdir(parents=True)
    shutil.copytree(GOLDEN / "llava_v16_llama" / part, directory)
    return directory


def test_a_model_and_its_tower_load_by_their_names(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from paddlemix.checkpoints.load import load_pretrained

    monkeypatch.setenv("PADDLEMIX_OFFLINE", "1")
    directory = cache_golden(HF_NAME)
    tower = candidates(TOWER_NAME)[0]
    tower.parent.mkdir(parents=True)
    shutil.move(directory / "vision_tower", tower)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "mm_vision_tower": TOWER_NAME}))
    loaded = load_pretrained(HF_NAME)
    assert loaded.directory == directory
    assert loaded.model.config.vision is not None


def test_a_tower_inside_a_checkpoint_takes_its_sizes_from_the_declared_name(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from paddlemix.checkpoints.source import Source

    monkeypatch.setenv("PADDLEMIX_OFFLINE", "1")
    directory = cache_golden(HF_NAME)
    expected = Source.open(directory)
    assert expected.config.vision is not None
    shutil.rmtree(directory / "vision_tower")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "mm_vision_tower": TOWER_NAME}))
    monkeypatch.setitem(TOWERS, "clip-vit-large-patch14-336", expected.config.vision)
    found = Source.open(directory)
    assert found.config == expected.config
    assert found.tower_directory is None
    assert {key: found.processor[key] for key in expected.processor} == expected.processor
    assert found.tensors().keys() == expected.tensors().keys()


def test_a_named_tower_that_is_nowhere_is_one_error(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from paddlemix.checkpoints.hub.part_places import find_part

    monkeypatch.setenv("PADDLEMIX_OFFLINE", "1")
    with pytest.raises(MissingFileError) as caught:
        find_part(home, TOWER_NAME, "vision tower")
    message = str(caught.value)
    assert str(home / "clip-vit-large-patch14-336") in message
    assert all(str(place) in message for place in candidates(TOWER_NAME))


def test_an_adapter_remembers_the_name_of_its_base(home: Path) -> None:
    from paddlemix.checkpoints.adapters.base_places import base_reference
    from paddlemix.checkpoints.base_model import BaseSpec

    reference = base_reference(BaseSpec(model=HF_NAME, tower=TOWER_NAME), home / "adapter")
    assert (reference["model"], reference["tower"], reference["relative"]) == (HF_NAME, TOWER_NAME, {})
    place(Path(HF_NAME), "config.json")
    reference = base_reference(BaseSpec(model=HF_NAME), home / "adapter")
    assert reference["model"] == str(home / "working" / HF_NAME)
    assert reference["relative"] == {"model": f"../working/{HF_NAME}"}
