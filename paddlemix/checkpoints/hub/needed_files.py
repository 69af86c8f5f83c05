"""Which files of a model are needed, and the hubs that have them.

Hugging Face and ModelScope list a model's files; on PaddleMIX's server every file is requested by its name.  Does not
know where files go.

Source: PaddleMIX's address scheme (its documentation).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, Protocol, TypeVar

from paddlemix.checkpoints.files.weight_files import WEIGHT_FILES
from paddlemix.checkpoints.hub.model_names import NAME_PATTERN, ModelName
from paddlemix.checkpoints.layouts.file_names import (
    ADAPTER_FILE,
    CONFIG_FILE,
    PADDLEMIX_WEIGHTS,
    PEFT_ADAPTER_FILE,
    PEFT_OTHER_WEIGHTS,
    PEFT_WEIGHTS,
)
from paddlemix.errors import UserError
from paddlemix.network.client import Client, length_of
from paddlemix.network.failures import UnreachableError
from paddlemix.network.hugging_face import HuggingFaceRepository
from paddlemix.network.modelscope import ModelScopeRepository
from paddlemix.network.transfer import MODEL_DOWNLOADS, RemoteFile, expect_found, receive_file

Result = TypeVar("Result")

# Those of an adapter: one of the first three, and what may be beside it.
ADAPTER_WEIGHT_FILES = (*PEFT_WEIGHTS, PADDLEMIX_WEIGHTS)
_BESIDE_ADAPTER = (PEFT_OTHER_WEIGHTS, "mm_projector.bin")
# One of these makes a directory a model or an adapter; it is the last to be moved into place.
DECLARATIONS = (CONFIG_FILE, PEFT_ADAPTER_FILE, ADAPTER_FILE)
SMALL_FILE = re.compile(r"[^/]+\.(json|model|txt|jinja|tiktoken)|processor/(train|eval)/[^/]+\.json")
# What a PaddleMIX model may have beside its weights; its server has no list.
_PADDLEMIX_SMALL = (
    *(CONFIG_FILE, "generation_config.json", "preprocessor_config.json", "processor_config.json"),
    *("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("processor/train/preprocessor_config.json", "processor/eval/preprocessor_config.json"),
)

_FILE_NAME = re.compile(NAME_PATTERN, re.ASCII)


class Repository(Protocol):
    """A model on a server."""

    def list_files(self) -> list[RemoteFile]:
        """Its files, without downloading any.

        Raises:
            UnreachableError: no such model, or no network.
        """

    def receive(self, file: RemoteFile, directory: Path) -> None:
        """Downloads a file to its place below a directory, resumed and checked.

        Raises:
            UnreachableError: it cannot be downloaded, or arrived damaged.
            OSError: it cannot be written.
        """


def repository_of(name: ModelName) -> Repository:
    """The model of a name, on the server that has it."""
    if name.hub == "modelscope":
        return ModelScopeRepository(name.name, name.revision)
    if name.hub == "huggingface":
        return HuggingFaceRepository(name.name, name.revision)
    return PaddlemixModel(name.name)


def needed_files(repository: Repository, name: ModelName) -> list[RemoteFile]:
    """The files to download of a model.

    Raises:
        UnreachableError: no such model, no weights in it, or no network.
    """
    files = {file.path: file for file in repository.list_files()}
    if name.hub == "paddlemix":
        return list(files.values())  # only what is needed was requested
    return [files[path] for path in choose_files(list(files), name.name)]


def choose_files(paths: list[str], name: str) -> list[str]:
    """What to download of a repository: configuration, tokenizer, and the weights in the best of their formats.

    Args:
        paths: all its files.
        name: of the model, for the message.

    Raises:
        UnreachableError: it has no weights that can be read, or no `config.json` (of an adapter: none of
            `DECLARATIONS`).
    """
    # one format is enough: repositories often hold the same weights as safetensors and as .bin
    chosen = next((found for weights in WEIGHT_FILES if (found := _of_format(paths, weights))), [])
    declared: tuple[str, ...] = DECLARATIONS[:1]
    if not chosen:  # not a whole model, so an adapter?
        chosen, declared = [path for path in paths if path in (*ADAPTER_WEIGHT_FILES, *_BESIDE_ADAPTER)], DECLARATIONS
    if not chosen or not any(declaration in paths for declaration in declared):
        wanted = f"weights ({', '.join(WEIGHT_FILES)})" if not chosen else " or ".join(declared)
        raise UnreachableError(f"{name} has no {wanted}; it holds {', '.join(sorted(paths)[:8]) or 'nothing'}")
    small = [path for path in paths if SMALL_FILE.fullmatch(path) and not path.endswith(".index.json")]
    return [*small, *chosen]


def shards_of(index: dict[str, Any]) -> list[str]:
    """Names of the files that a weight index lists.

    Raises:
        UserError: it lists none, or a path that leaves its directory.
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


class PaddlemixModel:
    """A model on PaddleMIX's server, which has no list: each file is requested by its name.

    Args:
        name: `paddlemix/...`.  The server is that of COMMUNITY_MODEL_PREFIX.
    """

    def __init__(self, name: str) -> None:
        prefix = os.environ.get("COMMUNITY_MODEL_PREFIX") or "https://bj.bcebos.com/paddlenlp/models/community"
        self._base = f"{prefix.rstrip('/')}/{name}"

    def list_files(self) -> list[RemoteFile]:
        """See `Repository`."""
        with Client(MODEL_DOWNLOADS) as client:
            files = [self._find(client, path) for path in _PADDLEMIX_SMALL]
            if files[0] is None:  # config.json, the first of `_PADDLEMIX_SMALL`
                raise UnreachableError(f"{self._base}/{CONFIG_FILE} does not exist")
            return [file for file in (*files, *self._weights(client)) if file is not None]

    def receive(self, file: RemoteFile, directory: Path) -> None:
        """See `Repository`."""
        receive_file(file, directory / file.path)

    def _weights(self, client: Client) -> list[RemoteFile | None]:
        for weights in WEIGHT_FILES:
            index = self._find(client, f"{weights}.index.json")
            if index is not None:
                shards = self._ask_shards(client, index.url)
                return [index, *(self._find(client, shard, required=True) for shard in shards)]
            single = self._find(client, weights)
            if single is not None:
                return [single]
        raise UnreachableError(f"{self._base} has no weights ({', '.join(WEIGHT_FILES)})")

    def _find(self, client: Client, path: str, required: bool = False) -> RemoteFile | None:
        url = f"{self._base}/{path}"

        def ask() -> RemoteFile | None:
            with closing(client.request(url, "HEAD")) as response:
                # An object store may answer 403 for a missing object, so as not to reveal what exists.
                if response.status_code in (403, 404) and not required:
                    return None
                etag = expect_found(response).headers.get("ETag", "").strip('"')
                checksum = etag if re.fullmatch(r"[0-9a-f]{32}", etag) else None  # stored in one piece: its MD5
                version = etag or response.headers.get("Last-Modified")
                return RemoteFile(path, url, length_of(response), checksum, version)

        return _asked(client, ask, url)

    @staticmethod
    def _ask_shards(client: Client, url: str) -> list[str]:
        def ask() -> list[str]:
            with closing(client.request(url)) as response:
                expect_found(response)
                body = b"".join(client.chunks(response))
            try:
                return shards_of(dict(json.loads(body)))
            except (ValueError, TypeError) as error:  # a UserError too; e.g. the page of a network's login
                reason = str(error) if isinstance(error, UserError) else "did not answer with a JSON object"
                raise UnreachableError(reason) from error

        return _asked(client, ask, url)


def _asked(client: Client, ask: Callable[[], Result], url: str) -> Result:
    try:
        return client.repeat(ask)
    except UnreachableError as error:
        raise UnreachableError(f"{url}: {error}") from error
