"""Downloads of models survive what networks do, from each hub; who asks is told to that hub alone."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paddlemix.checkpoints.hub import needed_files
from paddlemix.checkpoints.hub.model_names import candidates
from paddlemix.checkpoints.hub.resolve import local_model, resolve_model
from paddlemix.errors import MissingFileError, UserError
from paddlemix.network import hugging_face
from tests.conftest import HANG
from tests.hub_server import REVISION, TOKEN, HubServer, sha256

HF_NAME = "liuhaotian/llava-v1.5-7b"
PADDLEMIX_NAME = "paddlemix/llava/llava-v1.6-7b"
WEIGHTS = np.random.default_rng(0).bytes(1_000_000)
CONFIG = b'{"model_type": "llava"}'
FILES = {"config.json": CONFIG, "tokenizer.model": b"t"}


@dataclass(frozen=True)
class Hub:
    """A model on one of the hubs.

    Args:
        name: by which it is asked for.
        path: of one of its files, on the server.
        listing: the request that tells what it holds; None where each file is asked for.
        weights: its weight file.
        add: puts it on the server.
    """

    name: str
    path: Callable[[str], str]
    listing: str | None
    weights: str
    add: Callable[[HubServer, dict[str, bytes]], None]


def _add_objects(server: HubServer, files: dict[str, bytes]) -> None:
    for path, content in files.items():
        server.files[f"/community/{PADDLEMIX_NAME}/{path}"] = content


HUBS = {
    "huggingface": Hub(
        HF_NAME,
        lambda path: f"/{HF_NAME}/resolve/{REVISION}/{path}",
        f"/api/models/{HF_NAME}",
        "pytorch_model.bin",
        lambda server, files: server.add_repository(HF_NAME, files),
    ),
    "modelscope": Hub(
        "modelscope:swift/llava",
        lambda path: f"/api/v1/models/swift/llava/repo?Revision=master&FilePath={path}",
        "/api/v1/models/swift/llava/repo/files?Revision=master",
        "model.safetensors",
        lambda server, files: server.add_modelscope("swift/llava", files),
    ),
    "paddlemix": Hub(
        PADDLEMIX_NAME,
        lambda path: f"/community/{PADDLEMIX_NAME}/{path}",
        None,
        "model_state.pdparams",
        _add_objects,
    ),
}


@pytest.fixture(params=HUBS)
def hub(request: pytest.FixtureRequest, server: HubServer) -> Hub:
    """A model on each hub."""
    found = HUBS[request.param]
    found.add(server, {**FILES, found.weights: WEIGHTS})
    return found


@pytest.fixture
def repository(server: HubServer) -> HubServer:
    """A server with the model of Hugging Face."""
    HUBS["huggingface"].add(server, {**FILES, "pytorch_model.bin": WEIGHTS})
    return server


def contents(directory: Path) -> dict[str, bytes]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}


def leftovers(home: Path) -> list[str]:
    """Files of unfinished downloads."""
    return sorted(path.name for path in (home / "paddlemix").rglob("*") if ".partial/" in path.as_posix())


# What arrives


def test_a_model_is_downloaded_once(hub: Hub, server: HubServer, home: Path) -> None:
    directory = resolve_model(hub.name)
    assert directory == candidates(hub.name)[0]
    assert directory.is_relative_to(home / "paddlemix")
    assert contents(directory) == {**FILES, hub.weights: WEIGHTS}
    asked = len(server.seen)
    assert resolve_model(hub.name) == directory
    assert len(server.seen) == asked
    assert leftovers(home) == []


@pytest.mark.parametrize("kind", ["huggingface", "modelscope"])
def test_only_what_is_needed_is_fetched(server: HubServer, kind: str) -> None:
    hub = HUBS[kind]
    others = dict.fromkeys(("model.gguf", "pytorch_model.bin", "README.md", "onnx/model.onnx", "a/b.json"), b"x")
    hub.add(server, {**FILES, "model.safetensors": WEIGHTS, **others})
    assert contents(resolve_model(hub.name)) == {**FILES, "model.safetensors": WEIGHTS}
    assert [name for name in others if server.requests(hub.path(name))] == []


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
    chosen = needed_files.choose_files(["config.json", "images/x.json", *files], "owner/name")
    assert chosen == ["config.json", *(wanted or files[:2])]


def test_an_adapter_comes_without_a_config_of_a_model(server: HubServer) -> None:
    files = {"adapter_config.json": b"{}", "adapter_model.safetensors": WEIGHTS}
    server.add_repository("owner/adapter", {**files, "optimizer.pt": b"x"})
    assert contents(resolve_model("owner/adapter")) == files


def test_a_sharded_paddlemix_model_is_downloaded_file_by_file(server: HubServer) -> None:
    index = {"weight_map": {"a": "model_state-1.pdparams", "b": "model_state-2.pdparams"}}
    files = {
        **FILES,
        "processor/train/preprocessor_config.json": b"{}",
        "model_state.pdparams.index.json": json.dumps(index).encode(),
        "model_state-1.pdparams": WEIGHTS,
        "model_state-2.pdparams": b"2",
    }
    _add_objects(server, files)
    assert contents(resolve_model(PADDLEMIX_NAME)) == files


def test_a_plain_name_is_asked_of_the_chosen_hub(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PADDLEMIX_HUB", "modelscope")
    server.add_modelscope("swift/llava-1.5-7b-hf", {**FILES, "model.safetensors": WEIGHTS})
    assert (resolve_model("llava-hf/llava-1.5-7b-hf") / "model.safetensors").read_bytes() == WEIGHTS
    with pytest.raises(MissingFileError, match="models/owner/absent or its revision 'master' does not exist"):
        resolve_model("owner/absent")


@pytest.mark.parametrize("kind", ["huggingface", "modelscope"])
def test_a_revision_is_asked_for(server: HubServer, kind: str) -> None:
    server.add_repository("owner/name", {**FILES, "model.safetensors": WEIGHTS})
    server.add_modelscope("owner/name", {**FILES, "model.safetensors": WEIGHTS}, revision="main")
    prefix = {"huggingface": "", "modelscope": "modelscope:"}[kind]
    assert contents(resolve_model(f"{prefix}owner/name@main")) == {**FILES, "model.safetensors": WEIGHTS}
    expected = {"huggingface": "owner/name has no revision 'v9'", "modelscope": "its revision 'v9' does not exist"}
    with pytest.raises(MissingFileError, match=expected[kind]):
        resolve_model(f"{prefix}owner/name@v9")


# Who asks


def test_a_gated_repository_needs_a_token(repository: HubServer, home: Path) -> None:
    repository.closed[HF_NAME] = "gated"
    with pytest.raises(MissingFileError) as caught:
        resolve_model(HF_NAME)
    page = f"{repository.address}/{HF_NAME}"
    assert (
        f"is gated and needs a token: accept the terms at {page}, then set HF_TOKEN or log in with `hf auth login`"
        in (str(caught.value))
    )
    assert local_model(HF_NAME) is None


@pytest.mark.parametrize("source", ["HF_TOKEN", "login"])
@pytest.mark.parametrize("kind", ["gated", "private"])
def test_a_token_opens_a_closed_repository(
    repository: HubServer, home: Path, monkeypatch: pytest.MonkeyPatch, kind: str, source: str
) -> None:
    """The hub sees the token in every request; the server that it redirects large files to sees none."""
    repository.closed[HF_NAME] = kind
    if source == "HF_TOKEN":
        monkeypatch.setenv("HF_TOKEN", TOKEN)
    else:
        (home / "hf").mkdir()
        (home / "hf" / "token").write_text(TOKEN)
    assert contents(resolve_model(HF_NAME)) == {**FILES, "pytorch_model.bin": WEIGHTS}
    assert {request.secrets for request in repository.seen} == {(f"Bearer {TOKEN}",)}
    assert repository.storage is not None
    assert [(request.method, request.secrets) for request in repository.storage.seen] == [("GET", ())]


def test_a_token_without_access_is_told_where_to_ask(repository: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "of-another-account")
    repository.closed[HF_NAME] = "gated"
    with pytest.raises(
        MissingFileError, match=f"token of HF_TOKEN has no access to it: accept the terms at http.*{HF_NAME}"
    ):
        resolve_model(HF_NAME)
    repository.closed[HF_NAME] = "private"
    with pytest.raises(MissingFileError, match="does not exist, or the token of HF_TOKEN has no access to it"):
        resolve_model(HF_NAME)


def test_a_private_repository_without_a_token(repository: HubServer) -> None:
    repository.closed[HF_NAME] = "private"
    with pytest.raises(MissingFileError, match="it is private and needs a token: set HF_TOKEN or log in with"):
        resolve_model(HF_NAME)


def test_a_wrong_token_is_told(repository: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    with pytest.raises(
        MissingFileError, match="does not accept the token of HF_TOKEN: it is wrong or has expired"
    ) as one:
        resolve_model(HF_NAME)
    assert "hf_expired" not in str(one.value)


def test_modelscope_is_told_who_asks_and_no_other_server(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    HUBS["modelscope"].add(server, {**FILES, "model.safetensors": WEIGHTS})
    server.closed["swift/llava"] = "private"
    with pytest.raises(MissingFileError, match="or needs a token: set MODELSCOPE_API_TOKEN to one of http.*/my/myacc"):
        resolve_model("modelscope:swift/llava")
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", "of-another-account")
    with pytest.raises(MissingFileError, match="or the token of MODELSCOPE_API_TOKEN may not read it"):
        resolve_model("modelscope:swift/llava")
    server.seen.clear()
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", TOKEN)
    assert (resolve_model("modelscope:swift/llava") / "model.safetensors").read_bytes() == WEIGHTS
    assert {request.secrets for request in server.seen} == {(f"Bearer {TOKEN}", f"m_session_id={TOKEN}")}
    assert server.storage is not None
    assert [(request.method, request.secrets) for request in server.storage.seen] == [("GET", ())]


def test_a_password_of_netrc_does_not_replace_the_token(
    server: HubServer, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    HUBS["modelscope"].add(server, {**FILES, "model.safetensors": WEIGHTS})
    (home / "netrc").write_text("machine 127.0.0.1 login me password pass\n")
    monkeypatch.setenv("NETRC", str(home / "netrc"))
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", TOKEN)
    resolve_model("modelscope:swift/llava")
    assert {request.secrets[0] for request in server.seen} == {f"Bearer {TOKEN}"}


def test_signatures_of_the_storage_are_not_logged(
    repository: HubServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    library = logging.getLogger("huggingface_hub")
    hugging_face._library()
    monkeypatch.setattr(library.handlers[0], "stream", __import__("sys").stderr)
    library.warning("Error while downloading from %s: cut", f"{repository.address}/lfs/a?X-Amz-Signature=hidden&a=1")
    logged = capsys.readouterr().err
    assert "X-Amz-Signature=***&a=1: cut" in logged and "hidden" not in logged


# Interruptions


def test_a_cut_connection_goes_on_where_it_stopped(hub: Hub, server: HubServer) -> None:
    server.set_faults(hub.path(hub.weights), "cut")
    assert (resolve_model(hub.name) / hub.weights).read_bytes() == WEIGHTS
    first, second = server.ranges(hub.path(hub.weights))
    assert first is None
    assert second is not None and int(second[6:-1]) >= 500_000


def test_a_later_run_goes_on_where_the_last_one_stopped(hub: Hub, server: HubServer, home: Path) -> None:
    server.set_faults(hub.path(hub.weights), "cut", "404")
    with pytest.raises(MissingFileError, match="404"):
        resolve_model(hub.name)
    assert local_model(hub.name) is None
    assert any(name.endswith((".part", ".incomplete")) for name in leftovers(home))
    server.seen.clear()
    assert server.storage is not None
    server.storage.seen.clear()
    assert (resolve_model(hub.name) / hub.weights).read_bytes() == WEIGHTS
    assert server.requests(hub.path("tokenizer.model")) == []
    (resumed,) = server.ranges(hub.path(hub.weights))
    assert resumed is not None and int(resumed[6:-1]) >= 500_000
    assert leftovers(home) == []


def test_a_server_that_cannot_go_on_begins_again(hub: Hub, server: HubServer) -> None:
    server.set_faults(hub.path(hub.weights), "cut", "whole")
    assert (resolve_model(hub.name) / hub.weights).read_bytes() == WEIGHTS


def test_a_line_that_breaks_again_and_again_gets_there(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as bytes come, attempts are not counted."""
    monkeypatch.setattr("tests.hub_server.CUT", 100_000)
    for hub in HUBS.values():
        hub.add(server, {**FILES, hub.weights: WEIGHTS})
        server.set_faults(hub.path(hub.weights), *["cut"] * 8)
        assert (resolve_model(hub.name) / hub.weights).read_bytes() == WEIGHTS


def test_a_part_of_another_version_is_thrown_away(hub: Hub, server: HubServer) -> None:
    partial = candidates(hub.name)[0].with_name(f".{candidates(hub.name)[0].name}.partial")
    partial.mkdir(parents=True)
    for name in (f"{hub.weights}.part", "tokenizer.model", "config.json"):
        (partial / name).write_bytes(b"of another version")
    assert contents(resolve_model(hub.name)) | FILES == {**FILES, hub.weights: WEIGHTS}


def test_a_wrong_checksum_leaves_no_model(hub: Hub, server: HubServer) -> None:
    if hub.listing is None:
        server.etags[hub.path(hub.weights)] = hashlib.md5(WEIGHTS).hexdigest()
    server.set_faults(hub.path(hub.weights), "damage")
    with pytest.raises(MissingFileError, match=r"arrived damaged: its checksum is \w+, expected \w+; try again"):
        resolve_model(hub.name)
    assert local_model(hub.name) is None
    assert (resolve_model(hub.name) / hub.weights).read_bytes() == WEIGHTS


def test_a_small_file_is_checked_too(repository: HubServer) -> None:
    repository.set_faults(HUBS["huggingface"].path("config.json"), "damage")
    with pytest.raises(MissingFileError, match=r"config.json arrived damaged: its checksum is \w+"):
        resolve_model(HF_NAME)


@pytest.mark.parametrize("which", ["listing", "weights"])
def test_a_busy_server_is_asked_again(hub: Hub, server: HubServer, which: str) -> None:
    path = hub.path(hub.weights) if which == "weights" else hub.listing or hub.path("config.json")
    server.set_faults(path, "503", "503")
    assert resolve_model(hub.name).is_dir()
    assert len(server.ranges(path)) == 3


@pytest.mark.parametrize("fault", ["silent", "503"])
def test_after_some_attempts_it_gives_up(
    hub: Hub, server: HubServer, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    path = hub.listing or hub.path(hub.weights)
    if fault == "silent":
        from paddlemix.network import modelscope, transfer

        for module in (hugging_face, modelscope, transfer):
            monkeypatch.setattr(module, "MODEL_DOWNLOADS", replace(transfer.MODEL_DOWNLOADS, timeout=0.2))
    server.set_faults(path, *[fault] * 9)
    with pytest.raises(MissingFileError, match=r"(?i)(timed out|less than 64 KiB|503).*attempt 3"):
        resolve_model(hub.name)
    assert len(server.ranges(path)) == 3


def test_processes_that_start_together_download_once(hub: Hub, server: HubServer) -> None:
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(resolve_model(hub.name))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG)
    assert found == [candidates(hub.name)[0]] * 3
    assert len(server.ranges(hub.path(hub.weights))) == 1


# What cannot be had


@pytest.mark.parametrize("name", ["lmsys/vicuna-7b-v15", "paddlemix/llava/llava-v1.5-7"])
def test_a_model_that_is_not_there_gets_a_suggestion(server: HubServer, home: Path, name: str) -> None:
    with pytest.raises(MissingFileError, match=r"(?s)(404|does not exist).*did you mean '[\w/.-]+-v?1\.5"):
        resolve_model(name)
    assert not (home / "paddlemix").exists()


@pytest.mark.parametrize("kind", ["huggingface", "modelscope"])
def test_a_repository_without_weights_is_refused(server: HubServer, kind: str) -> None:
    hub = HUBS[kind]
    hub.add(server, {"config.json": CONFIG, "train.csv": b""})
    with pytest.raises(MissingFileError, match=r" has no weights .*it holds config.json, train.csv"):
        resolve_model(hub.name)


@pytest.mark.parametrize("kind", ["huggingface", "modelscope"])
@pytest.mark.parametrize(
    "answer",
    [
        b"<html>log in</html>",
        b"[]",
        b'{"id": "a/b", "siblings": [{}], "Data": {}, "Code": 200}',
        b'{"siblings": [{"rfilename": "", "blobId": 5}], "Data": {"Files": [{"Path": "a", "Sha256": 5}]}, "Code": 200}',
        b'{"siblings": [{"rfilename": "a", "size": "5"}], "Data": {"Files": [{"Path": 5}]}, "Code": 200}',
    ],
)
def test_an_answer_that_is_no_list_is_refused(server: HubServer, kind: str, answer: bytes) -> None:
    listing = HUBS[kind].listing
    assert listing is not None
    server.files[listing] = answer
    with pytest.raises(MissingFileError, match="did not answer with a"):
        resolve_model(HUBS[kind].name)


def test_modelscope_says_why(server: HubServer) -> None:
    listing = HUBS["modelscope"].listing
    assert listing is not None
    server.files[listing] = b'{"Code": 10010205001, "Success": false, "Message": "the model is under review"}'
    with pytest.raises(MissingFileError, match="the model is under review"):
        resolve_model("modelscope:swift/llava")


def test_an_index_may_not_lead_out_of_the_directory(server: HubServer) -> None:
    index = json.dumps({"weight_map": {"a": "../../x"}}).encode()
    _add_objects(server, {"config.json": CONFIG, "model.safetensors.index.json": index})
    with pytest.raises(MissingFileError, match="names no files of its own directory"):
        resolve_model(PADDLEMIX_NAME)


@pytest.mark.parametrize("kind", HUBS)
def test_no_network_is_one_error_with_every_place(
    server: HubServer, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    for variable in ("HF_ENDPOINT", "MODELSCOPE_ENDPOINT", "COMMUNITY_MODEL_PREFIX"):
        monkeypatch.setenv(variable, "http://127.0.0.1:1")
    with pytest.raises(MissingFileError, match="Connection refused") as caught:
        resolve_model(HUBS[kind].name)
    assert all(str(place) in str(caught.value) for place in candidates(HUBS[kind].name))


# Places


def test_a_place_that_cannot_be_written_is_named(
    repository: HubServer, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / "file").write_bytes(b"")
    monkeypatch.setenv("PPMIX_HOME", str(home / "file"))
    with pytest.raises(UserError, match=f"cannot write '{home / 'file' / 'models' / HF_NAME}'"):
        resolve_model(HF_NAME)


def test_a_full_disk_is_seen_before_the_download(repository: HubServer) -> None:
    name = "owner/huge"
    item = {"rfilename": "model.safetensors", "size": 10**18}
    siblings = [{"rfilename": "config.json", "size": len(CONFIG)}, item]
    repository.add_repository(name, {"config.json": CONFIG}, siblings=siblings)
    with pytest.raises(UserError, match=r"needs 1,000,000,000,000,\d+,\d+ bytes more"):
        resolve_model(name)
    assert [request.path for request in repository.seen] == [f"/api/models/{name}"]


def test_a_disk_that_fills_up_is_one_error(hub: Hub, server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("paddlemix.network.transfer.os.fsync", full)
    monkeypatch.setattr("huggingface_hub.file_download.http_get", full)
    with pytest.raises(UserError, match="cannot write '.*': No space left on device; free space or choose another"):
        resolve_model(hub.name)
    assert local_model(hub.name) is None


def test_an_incomplete_place_is_completed(hub: Hub, server: HubServer) -> None:
    directory = candidates(hub.name)[0]
    directory.mkdir(parents=True)
    (directory / "config.json").write_bytes(b"{}")
    (directory / "notes.txt").write_bytes(b"mine")
    assert resolve_model(hub.name) == directory
    assert contents(directory) == {**FILES, hub.weights: WEIGHTS, "notes.txt": b"mine"}


def test_the_library_is_told_not_to_report(repository: HubServer) -> None:
    import huggingface_hub

    resolve_model(HF_NAME)
    assert huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY is True
    assert sha256(WEIGHTS) == sha256((candidates(HF_NAME)[0] / "pytorch_model.bin").read_bytes())
