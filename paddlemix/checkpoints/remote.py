"""What a server has of a model: its files with addresses, sizes and checksums, and which of them are needed.

Two kinds of server: Hugging Face, which gives a list, and PaddleMIX's, where every file is asked for by its name.
Knows nothing of where files go.

Sources: Hugging Face's model API (https://huggingface.co/docs/hub/api); PaddleMIX's address scheme (its documentation).
"""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass
from typing import Any

import requests

from paddlemix.errors import UserError
from paddlemix.network.failures import plain_cause

PADDLEMIX = "paddlemix/"  # how the names on PaddleMIX's server begin; all others are Hugging Face's
# Single weight files, best first; "x.index.json" beside one names the shards it was split into.
WEIGHTS = ("model.safetensors", "pytorch_model.bin", "model_state.pdparams")
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin", "non_lora_trainables.bin", "mm_projector.bin")
SMALL_FILE = re.compile(r"[^/]+\.(json|model|txt|jinja|tiktoken)|processor/(train|eval)/[^/]+\.json")
# What a PaddleMIX model may have beside its weights; its server gives no list.
_PADDLEMIX_SMALL = (
    *("config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json"),
    *("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("processor/train/preprocessor_config.json", "processor/eval/preprocessor_config.json"),
)

_FILE_NAME = re.compile(r"[A-Za-z0-9_][\w.\-]*", re.ASCII)
TIMEOUT = (10.0, 60.0)  # seconds to connect, seconds between bytes
ATTEMPTS = 3  # failures in a row without a new byte
FIRST_WAIT = 1.0  # seconds before the second attempt, doubled before each further one
RETRIED = (408, 429, 500, 502, 503, 504)


class UnavailableError(UserError):
    """A model cannot be downloaded; the message is the reason alone."""


@dataclass(frozen=True)
class RemoteFile:
    """A file on a server.

    Args:
        path: below the model's directory.
        url: its address.
        size: bytes, None where the server does not say.
        checksum: hex: SHA-256 (64 digits), git's blob SHA-1 (40) or MD5 (32); None where the server gives none.
    """

    path: str
    url: str
    size: int | None = None
    checksum: str | None = None


def list_files(session: requests.Session, name: str) -> list[RemoteFile]:
    """The files of a model, without downloading any; `name` as in `download_model`.

    Raises:
        UnavailableError: no such model, no weights in it, or no network.
    """
    return _list_paddlemix(session, name) if name.startswith(PADDLEMIX) else _list_hugging_face(session, name)


def _list_hugging_face(session: requests.Session, name: str) -> list[RemoteFile]:
    """The files of a Hugging Face repository that a model needs, all of one revision."""
    endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    url = f"{endpoint}/api/models/{name}?blobs=true"
    answer = _ask_json(session, url)
    try:
        items = {item["rfilename"]: item for item in answer["siblings"]}
        base = f"{endpoint}/{name}/resolve/{answer.get('sha') or 'main'}"
        files = {path: _hugging_face_file(base, item) for path, item in items.items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise UnavailableError(f"{url} did not answer with a list of files ({error!r})") from error
    return [files[path] for path in choose_files(list(files), name)]


def _hugging_face_file(base: str, item: dict[str, Any]) -> RemoteFile:
    large = item.get("lfs")  # of a large file the blob is only a pointer
    checksum = large.get("sha256") if large else item.get("blobId")
    return RemoteFile(item["rfilename"], f"{base}/{item['rfilename']}", item.get("size"), checksum)


def choose_files(paths: list[str], name: str) -> list[str]:
    """What to download of a repository: configuration, tokenizer, and the weights in the best one of their formats.

    Args:
        paths: all its files.
        name: of the model, for the message.

    Raises:
        UnavailableError: it has no weights that can be read, or no `config.json`.
    """
    chosen = next((found for weights in WEIGHTS if (found := _of_format(paths, weights))), None)
    chosen = chosen or [path for path in paths if path in ADAPTER_WEIGHTS]
    if not chosen or "config.json" not in paths:
        wanted = f"weights ({', '.join(WEIGHTS)})" if not chosen else "config.json"
        raise UnavailableError(f"{name} has no {wanted}; it holds {', '.join(sorted(paths)[:8]) or 'nothing'}")
    small = [path for path in paths if SMALL_FILE.fullmatch(path) and not path.endswith(".index.json")]
    return [*small, *chosen]


def shards_of(index: dict[str, Any]) -> list[str]:
    """Names of the files that a weight index lists.

    Raises:
        UserError: it lists none, or a path out of its directory.
    """
    weight_map = index.get("weight_map")
    names = sorted({str(name) for name in weight_map.values()}) if isinstance(weight_map, dict) else []
    if not names or any(not _FILE_NAME.fullmatch(name) for name in names):
        raise UserError("the weight index names no files of its own directory")
    return names


def _of_format(paths: list[str], weights: str) -> list[str]:
    stem, suffix = weights.split(".")
    pattern = re.compile(rf"{stem}(-\d+-of-\d+)?\.{suffix}")
    found = [path for path in paths if pattern.fullmatch(path)]
    return [*found, *(path for path in paths if found and path == f"{weights}.index.json")]


def _list_paddlemix(session: requests.Session, name: str) -> list[RemoteFile]:
    """The files of a model on PaddleMIX's server, which gives no list: each is asked for by its name."""
    prefix = os.environ.get("COMMUNITY_MODEL_PREFIX") or "https://bj.bcebos.com/paddlenlp/models/community"
    base = f"{prefix.rstrip('/')}/{name}"
    files = [_paddlemix_file(session, base, path) for path in _PADDLEMIX_SMALL]
    if files[0] is None:
        raise UnavailableError(f"{base}/config.json does not exist")
    for weights in WEIGHTS:
        index = _paddlemix_file(session, base, f"{weights}.index.json")
        if index is not None:
            shards = _ask_shards(session, index.url)
            files += [index, *(_paddlemix_file(session, base, shard, required=True) for shard in shards)]
            break
        single = _paddlemix_file(session, base, weights)
        if single is not None:
            files.append(single)
            break
    else:
        raise UnavailableError(f"{base} has no weights ({', '.join(WEIGHTS)})")
    return [file for file in files if file is not None]


def _paddlemix_file(session: requests.Session, base: str, path: str, required: bool = False) -> RemoteFile | None:
    response = _request(session, "HEAD", f"{base}/{path}")
    if response.status_code in (403, 404) and not required:  # an object store may answer 403 for what is not there
        return None
    existing(response)
    length, etag = response.headers.get("Content-Length", ""), response.headers.get("ETag", "").strip('"')
    checksum = etag if re.fullmatch(r"[0-9a-f]{32}", etag) else None  # an object stored in one piece: its MD5
    return RemoteFile(path, f"{base}/{path}", int(length) if length.isdecimal() else None, checksum)


def _ask_shards(session: requests.Session, url: str) -> list[str]:
    try:
        return shards_of(_ask_json(session, url))
    except UserError as error:
        raise UnavailableError(f"{url}: {error}") from error


def _ask_json(session: requests.Session, url: str) -> dict[str, Any]:
    response = existing(_request(session, "GET", url))
    try:
        return dict(response.json())
    except (ValueError, TypeError) as error:  # e.g. the page of a network's login
        raise UnavailableError(f"{url} did not answer with a JSON object") from error


def _request(session: requests.Session, method: str, url: str) -> requests.Response:
    """Asks until there is an answer; statuses that may pass are asked again."""
    reason = ""
    for attempt in range(ATTEMPTS):
        if attempt:
            pause(attempt)
        try:
            response = send(session, method, url)
        except requests.RequestException as error:
            reason = plain_cause(error)
            continue
        if response.status_code not in RETRIED:
            return response
        reason = f"status {response.status_code}"
    raise UnavailableError(f"{url}: {reason} ({ATTEMPTS} attempts)")


def send(session: requests.Session, method: str, url: str, **options: Any) -> requests.Response:
    """One request, following redirects, that gives up when the server is silent for too long.

    Raises:
        requests.RequestException: no answer.
    """
    return session.request(method, url, timeout=TIMEOUT, allow_redirects=True, **options)


def pause(failures: int) -> None:
    """Waits before another attempt, twice as long after every failure in a row."""
    time.sleep(FIRST_WAIT * 2 ** max(failures - 1, 0))


def existing(response: requests.Response) -> requests.Response:
    """The response, if it is no refusal.

    Raises:
        UnavailableError: its status is 400 or above.
    """
    if response.status_code >= 400:
        meaning = "; it does not exist there or is not public" if response.status_code in (401, 403, 404) else ""
        raise UnavailableError(f"{response.url}: status {response.status_code}{meaning}")
    return response
