"""Names become directories: caches first, then a download that survives what networks do (the server is below)."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from paddlemix.checkpoints import remote
from paddlemix.checkpoints.hub import KNOWN_NAMES, candidates, is_model_name, local_model, resolve_model
from paddlemix.errors import MissingFileError, UserError
from paddlemix.models.presets import TOWERS
from tests.conftest import HANG
from tests.tiny_models import GOLDEN

HF_NAME = "liuhaotian/llava-v1.5-7b"
TOWER_NAME = "openai/clip-vit-large-patch14-336"
PADDLEMIX_NAME = "paddlemix/llava/llava-v1.6-7b"
WEIGHTS = np.random.default_rng(0).bytes(1_000_000)
CONFIG = b'{"model_type": "llava"}'
REVISION = "0123abc"


class Server(ThreadingHTTPServer):
    """Serves `files` by path; `faults[path]` are what the next GETs of that path do instead."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.etags: dict[str, str] = {}
        self.faults: dict[str, list[str]] = {}
        self.seen: list[tuple[str, str, str | None]] = []  # method, path, Range
        self.released = threading.Event()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def add_repository(self, name: str, files: dict[str, bytes], **changed: object) -> None:
        """A Hugging Face repository; weights are large files, the others plain blobs."""
        siblings = []
        for path, content in files.items():
            item: dict[str, object] = {"rfilename": path, "size": len(content), "blobId": git_checksum(content)}
            if path.endswith((".bin", ".safetensors")):
                pointer = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
                item.update(lfs=pointer, blobId=git_checksum(b"pointer"))
            siblings.append(item)
            self.files[f"/{name}/resolve/{REVISION}/{path}"] = content
        answer = {"sha": REVISION, "siblings": siblings, **changed}
        self.files[f"/api/models/{name}"] = json.dumps(answer).encode()

    def ranges(self, path: str) -> list[str | None]:
        return [asked for method, seen, asked in self.seen if method == "GET" and seen == path]


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = self.path.split("?")[0]
        self.server.seen.append((self.command, path, self.headers["Range"]))
        faults = self.server.faults.get(path, []) if body else []
        fault = faults.pop(0) if faults else ""
        if fault == "silent":
            self.server.released.wait(HANG)
            return
        content = self.server.files.get(path)
        if fault.isdecimal() or content is None:
            self.start(int(fault or 404), 0)
            return
        content = b"x" * len(content) if fault == "damage" else content
        start = int(self.headers["Range"][6:-1]) if self.headers["Range"] and fault != "whole" else 0
        self.start(206 if start else 200, len(content) - start, start, len(content))
        if body:
            self.wfile.write(content[start : start + 600_000] if fault == "cut" else content[start:])

    def start(self, status: int, length: int, start: int = 0, total: int = 0) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        if etag := self.server.etags.get(self.path):
            self.send_header("ETag", f'"{etag}"')
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        pass


def git_checksum(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home directory, an empty working directory, and a network that may be used."""
    for variable in ("HF_HUB_CACHE", "XDG_CACHE_HOME", "HF_HUB_OFFLINE", "PADDLEMIX_OFFLINE"):
        monkeypatch.delenv(variable, raising=False)
    for variable, folder in (("PPMIX_HOME", "paddlemix"), ("PPNLP_HOME", "paddlenlp"), ("HF_HOME", "hf")):
        monkeypatch.setenv(variable, str(tmp_path / folder))
    working = tmp_path / "working"
    working.mkdir()
    monkeypatch.chdir(working)
    return tmp_path


@pytest.fixture
def server(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(remote, "TIMEOUT", (HANG, HANG))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with Server() as running:
        monkeypatch.setenv("HF_ENDPOINT", running.address)
        monkeypatch.setenv("COMMUNITY_MODEL_PREFIX", f"{running.address}/community")
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        yield running
        running.released.set()
        running.shutdown()


@pytest.fixture
def repository(server: Server) -> Server:
    server.add_repository(HF_NAME, {"config.json": CONFIG, "tokenizer.model": b"t", "pytorch_model.bin": WEIGHTS})
    return server


WEIGHT_PATH = f"/{HF_NAME}/resolve/{REVISION}/pytorch_model.bin"


def place(directory: Path, *names: str) -> Path:
    """Makes a directory with small files of these names."""
    for name in names:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(CONFIG)
    return directory


def leftovers(home: Path) -> list[str]:
    """Files of unfinished downloads."""
    return sorted(path.name for path in (home / "paddlemix").rglob("*") if ".partial/" in path.as_posix())


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


# Caches


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
    repository: Server, home: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "1")
    place(candidates(HF_NAME)[1], "config.json")
    with pytest.raises(MissingFileError) as caught:
        resolve_model(HF_NAME)
    message = str(caught.value)
    assert f"{variable}=1 forbids to ask a server" in message
    assert str(home / "working" / HF_NAME) in message
    assert all(str(place) in message for place in candidates(HF_NAME))
    assert "incomplete: no weights" in message
    assert f"copy its files (config.json, tokenizer, weights) into {candidates(HF_NAME)[0]}" in message
    assert "paddlemix/llava/llava-v1.5-7b" in message
    assert repository.seen == []


def test_no_network_is_one_error_with_every_place(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(MissingFileError, match="Connection refused") as caught:
        resolve_model(HF_NAME)
    assert all(str(place) in str(caught.value) for place in candidates(HF_NAME))


def test_a_path_into_a_folder_that_is_here_is_not_asked_of_a_server(server: Server) -> None:
    place(Path("checkpoints"), "x")
    with pytest.raises(MissingFileError, match="the folder 'checkpoints' is here"):
        resolve_model("checkpoints/llava_sft")
    assert server.seen == []


# Downloads


def test_a_hugging_face_model_is_downloaded_once(repository: Server, home: Path) -> None:
    directory = resolve_model(HF_NAME)
    assert directory == home / "paddlemix" / "models" / HF_NAME
    assert (directory / "pytorch_model.bin").read_bytes() == WEIGHTS
    assert sorted(path.name for path in directory.iterdir()) == ["config.json", "pytorch_model.bin", "tokenizer.model"]
    asked = len(repository.seen)
    assert resolve_model(HF_NAME) == directory
    assert len(repository.seen) == asked
    assert leftovers(home) == []


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        (["model.safetensors", "pytorch_model.bin", "tf_model.h5"], ["model.safetensors"]),
        (
            ["model-00001-of-00001.safetensors", "model.safetensors.index.json", "pytorch_model.bin.index.json"],
            ["model-00001-of-00001.safetensors", "model.safetensors.index.json"],
        ),
        (["pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json", "mm_projector.bin"], None),
        (
            ["adapter_model.bin", "non_lora_trainables.bin", "README.md"],
            ["adapter_model.bin", "non_lora_trainables.bin"],
        ),
    ],
)
def test_the_best_format_alone_is_taken(files: list[str], wanted: list[str] | None) -> None:
    chosen = remote.choose_files(["config.json", "images/x.json", *files], "owner/name")
    assert chosen == ["config.json", *(wanted or files[:2])]


@pytest.mark.parametrize("sharded", [True, False])
def test_a_paddlemix_model_is_downloaded_file_by_file(server: Server, home: Path, sharded: bool) -> None:
    base = f"/community/{PADDLEMIX_NAME}"
    files = {"config.json": CONFIG, "processor/train/preprocessor_config.json": b"{}", "tokenizer.model": b"t"}
    if sharded:
        index = {"weight_map": {"a": "model_state-1.pdparams", "b": "model_state-2.pdparams"}}
        files["model_state.pdparams.index.json"] = json.dumps(index).encode()
        files.update({"model_state-1.pdparams": WEIGHTS, "model_state-2.pdparams": b"2"})
    else:
        files["model_state.pdparams"] = WEIGHTS
    server.files = {f"{base}/{path}": content for path, content in files.items()}
    directory = resolve_model(PADDLEMIX_NAME)
    found = {path.relative_to(directory).as_posix(): path for path in directory.rglob("*") if path.is_file()}
    assert {name: path.read_bytes() for name, path in found.items()} == files
    assert directory == home / "paddlemix" / "models" / PADDLEMIX_NAME


def test_a_cut_connection_goes_on_where_it_stopped(repository: Server) -> None:
    repository.faults[WEIGHT_PATH] = ["cut"]
    assert (resolve_model(HF_NAME) / "pytorch_model.bin").read_bytes() == WEIGHTS
    first, second = repository.ranges(WEIGHT_PATH)
    assert first is None
    assert second is not None
    assert int(second[6:-1]) >= 500_000


def test_a_later_run_goes_on_where_the_last_one_stopped(repository: Server, home: Path) -> None:
    repository.faults[WEIGHT_PATH] = ["cut", "404"]
    with pytest.raises(MissingFileError, match="404"):
        resolve_model(HF_NAME)
    assert local_model(HF_NAME) is None
    assert leftovers(home) == ["config.json", "pytorch_model.bin.part", "tokenizer.model"]
    repository.seen.clear()
    assert (resolve_model(HF_NAME) / "pytorch_model.bin").read_bytes() == WEIGHTS
    assert [path for _, path, _ in repository.seen] == [f"/api/models/{HF_NAME}", WEIGHT_PATH]
    assert repository.ranges(WEIGHT_PATH) != [None]


def test_a_server_that_cannot_go_on_begins_again(repository: Server) -> None:
    repository.faults[WEIGHT_PATH] = ["cut", "whole"]
    assert (resolve_model(HF_NAME) / "pytorch_model.bin").read_bytes() == WEIGHTS


def test_a_part_of_another_version_is_thrown_away(repository: Server) -> None:
    partial = candidates(HF_NAME)[0].with_name(".llava-v1.5-7b.partial")
    place(partial, "pytorch_model.bin.part", "tokenizer.model")
    directory = resolve_model(HF_NAME)
    assert (directory / "pytorch_model.bin").read_bytes() == WEIGHTS
    assert (directory / "tokenizer.model").read_bytes() == b"t"


@pytest.mark.parametrize("path", ["pytorch_model.bin", "config.json"])
def test_a_wrong_checksum_leaves_no_model(repository: Server, home: Path, path: str) -> None:
    repository.faults[f"/{HF_NAME}/resolve/{REVISION}/{path}"] = ["damage"]
    with pytest.raises(MissingFileError, match=rf"{path} arrived damaged: its checksum is \w+, expected \w+"):
        resolve_model(HF_NAME)
    assert local_model(HF_NAME) is None
    assert resolve_model(HF_NAME).is_dir()


def test_the_checksum_of_an_object_store_is_held_too(server: Server) -> None:
    base = f"/community/{PADDLEMIX_NAME}"
    server.files = {f"{base}/config.json": CONFIG, f"{base}/model_state.pdparams": WEIGHTS}
    server.etags[f"{base}/model_state.pdparams"] = hashlib.md5(b"other").hexdigest()
    with pytest.raises(MissingFileError, match="model_state.pdparams arrived damaged"):
        resolve_model(PADDLEMIX_NAME)
    server.etags[f"{base}/model_state.pdparams"] = hashlib.md5(WEIGHTS).hexdigest()
    assert resolve_model(PADDLEMIX_NAME).is_dir()


@pytest.mark.parametrize("name", ["lmsys/vicuna-7b-v15", "paddlemix/llava/llava-v1.5-7"])
def test_a_model_that_is_not_there_gets_a_suggestion(server: Server, home: Path, name: str) -> None:
    with pytest.raises(MissingFileError, match=r"(?s)(404|does not exist).*did you mean '[\w/.-]+-v?1\.5"):
        resolve_model(name)
    assert not (home / "paddlemix").exists()


def test_a_repository_without_weights_is_refused(server: Server) -> None:
    server.add_repository("owner/data", {"config.json": CONFIG, "train.csv": b""})
    with pytest.raises(MissingFileError, match=r"owner/data has no weights .*it holds config.json, train.csv"):
        resolve_model("owner/data")


@pytest.mark.parametrize("answer", [b"<html>log in</html>", b"[]", b'{"siblings": [{}]}'])
def test_an_answer_that_is_no_list_is_refused(server: Server, answer: bytes) -> None:
    server.files[f"/api/models/{HF_NAME}"] = answer
    with pytest.raises(MissingFileError, match="did not answer with a"):
        resolve_model(HF_NAME)


def test_an_index_may_not_lead_out_of_the_directory(server: Server) -> None:
    base = f"/community/{PADDLEMIX_NAME}"
    index = json.dumps({"weight_map": {"a": "../../x"}}).encode()
    server.files = {f"{base}/config.json": CONFIG, f"{base}/model.safetensors.index.json": index}
    with pytest.raises(MissingFileError, match="names no files of its own directory"):
        resolve_model(PADDLEMIX_NAME)


@pytest.mark.parametrize("path", [f"/api/models/{HF_NAME}", WEIGHT_PATH])
def test_a_busy_server_is_asked_again(repository: Server, path: str) -> None:
    repository.faults[path] = ["503", "429"]
    assert resolve_model(HF_NAME).is_dir()
    assert len(repository.ranges(path)) == 3


@pytest.mark.parametrize(("path", "fault"), [(f"/api/models/{HF_NAME}", "silent"), (WEIGHT_PATH, "503")])
def test_after_some_attempts_it_gives_up(
    repository: Server, monkeypatch: pytest.MonkeyPatch, path: str, fault: str
) -> None:
    if fault == "silent":
        monkeypatch.setattr(remote, "TIMEOUT", (HANG, 0.2))
    repository.faults[path] = [fault] * 9
    with pytest.raises(MissingFileError, match=r"(?i)(timed out|503).*3 attempts"):
        resolve_model(HF_NAME)
    assert len(repository.ranges(path)) == remote.ATTEMPTS


def test_a_place_that_cannot_be_written_is_named(
    repository: Server, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / "file").write_bytes(b"")
    monkeypatch.setenv("PPMIX_HOME", str(home / "file"))
    with pytest.raises(UserError, match=f"cannot write '{home / 'file' / 'models' / HF_NAME}'"):
        resolve_model(HF_NAME)


def test_a_full_disk_is_seen_before_the_download(repository: Server) -> None:
    name = "owner/huge"
    item = {"rfilename": "model.safetensors", "size": 10**18}
    siblings = [{"rfilename": "config.json", "size": len(CONFIG)}, item]
    repository.add_repository(name, {"config.json": CONFIG}, siblings=siblings)
    with pytest.raises(UserError, match=r"needs 1,000,000,000,000,\d+,\d+ bytes more"):
        resolve_model(name)
    assert [path for _, path, _ in repository.seen] == [f"/api/models/{name}"]


def test_an_incomplete_place_is_completed(repository: Server) -> None:
    directory = place(candidates(HF_NAME)[0], "config.json", "notes.txt")
    assert resolve_model(HF_NAME) == directory
    assert (directory / "pytorch_model.bin").read_bytes() == WEIGHTS
    assert (directory / "notes.txt").is_file()


def test_processes_that_start_together_download_once(repository: Server) -> None:
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(resolve_model(HF_NAME))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG)
    assert found == [candidates(HF_NAME)[0]] * 3
    assert len(repository.ranges(WEIGHT_PATH)) == 1


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
    from paddlemix.checkpoints.parts import find_part

    monkeypatch.setenv("PADDLEMIX_OFFLINE", "1")
    with pytest.raises(MissingFileError) as caught:
        find_part(home, TOWER_NAME, "vision tower")
    message = str(caught.value)
    assert str(home / "clip-vit-large-patch14-336") in message
    assert all(str(place) in message for place in candidates(TOWER_NAME))


def test_an_adapter_remembers_the_name_of_its_base(home: Path) -> None:
    from paddlemix.checkpoints.load import BaseSpec, base_reference

    reference = base_reference(BaseSpec(model=HF_NAME, tower=TOWER_NAME), home / "adapter")
    assert (reference["model"], reference["tower"], reference["relative"]) == (HF_NAME, TOWER_NAME, {})
    place(Path(HF_NAME), "config.json")
    reference = base_reference(BaseSpec(model=HF_NAME), home / "adapter")
    assert reference["model"] == str(home / "working" / HF_NAME)
    assert reference["relative"] == {"model": f"../working/{HF_NAME}"}
