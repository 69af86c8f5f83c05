"""Hugging Face: the files of a repository by `huggingface_hub`, which is imported when it is needed.

The library sends the token of HF_TOKEN or of `hf auth login` to its hub alone, resumes interrupted files and knows the
hub's storage; here its errors become ours, and nothing that it receives is believed unchecked.

Source: huggingface_hub's documentation (guides/download, package_reference/environment_variables) and its errors.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import requests

from paddlemix import __version__
from paddlemix.errors import without_secrets
from paddlemix.network.client import backoff
from paddlemix.network.failures import UnreachableError, may_pass, plain_cause
from paddlemix.network.transfer import MODEL_DOWNLOADS, RemoteFile, mismatch

Result = TypeVar("Result")

_DEFAULT_ENDPOINT = "https://huggingface.co"
_LOGIN = "hf auth login"
_BOOKKEEPING = ".cache"  # below a directory that files are downloaded into: what `huggingface_hub` notes about them
_sleep = time.sleep


class HuggingFaceRepository:
    """A repository of models.

    Args:
        name: `owner/name`.
        revision: branch, tag or commit; None for "main".

    The endpoint is that of HF_ENDPOINT.
    """

    def __init__(self, name: str, revision: str | None = None) -> None:
        self._name, self._revision = name, revision
        self._endpoint = (os.environ.get("HF_ENDPOINT") or _DEFAULT_ENDPOINT).rstrip("/")
        self._commit = revision

    def list_files(self) -> list[RemoteFile]:
        """All its files, of one commit: that of the revision at this moment.

        Raises:
            UnreachableError: no such repository or revision, a token is needed, no network, or an answer that is not
                a list.
        """
        hub, where = _library(), f"{self._endpoint}/api/models/{self._name}"
        api = hub.HfApi(endpoint=self._endpoint, library_name="paddlemix", library_version=__version__)
        try:
            found = self._answer(
                lambda: api.model_info(
                    self._name, revision=self._revision, files_metadata=True, timeout=MODEL_DOWNLOADS.timeout
                ),
                where,
            )
            self._commit = found.sha or self._revision or "main"
            return [self._remote_file(item) for item in found.siblings or ()]
        except (KeyError, TypeError, AttributeError, requests.exceptions.InvalidJSONError) as error:
            raise UnreachableError(f"{where} did not answer with a list of files ({error!r})") from error

    def _remote_file(self, item: Any) -> RemoteFile:
        large = item.lfs  # of a large file the blob is only a pointer
        url = f"{self._endpoint}/{self._name}/resolve/{self._commit}/{item.rfilename}"
        return RemoteFile(item.rfilename, url, item.size, large.sha256 if large else item.blob_id)

    def receive(self, file: RemoteFile, directory: Path) -> None:
        """Downloads one of its files to its place below a directory, resuming what an earlier attempt has left.

        Raises:
            UnreachableError: as `list_files`, or what came is not what was announced.
            OSError: it cannot be written.
        """
        hub, path = _library(), directory / file.path
        self._answer(
            lambda: hub.hf_hub_download(
                self._name,
                file.path,
                revision=self._commit,
                local_dir=directory,
                endpoint=self._endpoint,
                library_name="paddlemix",
                library_version=__version__,
            ),
            file.url,
            lambda: _unfinished(directory),
        )
        wrong = mismatch(path, file)
        if wrong is not None:
            path.unlink(missing_ok=True)
            raise UnreachableError(f"{file.url} arrived damaged: {wrong}; try again")

    def _answer(self, ask: Callable[[], Result], where: str, received: Callable[[], int] = lambda: 0) -> Result:
        """What a call of the library returns, tried again where that may help.

        Args:
            ask: the call.
            where: the address, for messages.
            received: bytes that attempts have gained so far; after a gain all attempts are left again.
        """
        failures = 0
        while True:
            before = received()
            try:
                return ask()
            except requests.exceptions.InvalidJSONError:
                raise
            except Exception as error:
                reason = self._reason_to_try_again(error)
                if reason is None:
                    explained = self._explained(error, where)
                    if explained is None:
                        raise
                    raise explained from error
                failures = 0 if received() > before else failures
                if failures == MODEL_DOWNLOADS.retries:
                    raise UnreachableError(f"{where}: {reason} (attempt {failures + 1})") from error
            _sleep(backoff(failures))
            failures += 1

    @staticmethod
    def _reason_to_try_again(error: Exception) -> str | None:
        """Why another attempt may succeed, in words; None where it cannot."""
        errors = _library().errors
        if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
            error = error.__cause__  # "cannot find it in the cache", said after every failed connection
        response = getattr(error, "response", None)
        if isinstance(error, requests.HTTPError) and response is not None:
            return f"status {response.status_code}" if may_pass(response.status_code) else None
        if isinstance(error, (requests.exceptions.SSLError, requests.exceptions.InvalidURL)):
            return None
        if isinstance(error, requests.RequestException):
            return plain_cause(error)
        if isinstance(error, RuntimeError):  # of the storage's own transfer program
            return f"{without_secrets(str(error))}; HF_HUB_DISABLE_XET=1 downloads without it"
        if isinstance(error, OSError) and error.errno is None and "Consistency check" in str(error):
            return "the connection ended before the whole file had come"
        return None

    def _explained(self, error: Exception, where: str) -> UnreachableError | None:
        """An error of the library as ours; None for what is neither the hub's nor the network's, as of a full disk."""
        errors, cause = _library().errors, error.__cause__
        if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(cause, Exception):
            error = cause
        if isinstance(error, errors.RevisionNotFoundError):
            return UnreachableError(f"{self._endpoint}/{self._name} has no revision '{self._revision}'")
        if isinstance(error, errors.GatedRepoError):
            return UnreachableError(self._of_gated())
        if isinstance(error, errors.RepositoryNotFoundError):
            return UnreachableError(self._of_missing())
        response = getattr(error, "response", None)
        if isinstance(error, requests.HTTPError) and response is not None:
            if response.status_code == 401 and _token_source() is not None:
                return UnreachableError(
                    f"{self._endpoint} does not accept the token of {_token_source()}: it is wrong or has expired; "
                    f"make another one at {self._endpoint}/settings/tokens"
                )
            meaning = f"; {self._of_missing()}" if response.status_code in (401, 403, 404) else ""
            return UnreachableError(f"{where}: status {response.status_code}{meaning}")
        if isinstance(error, (requests.RequestException, errors.FileMetadataError, errors.HFValidationError)):
            return UnreachableError(f"{where}: {plain_cause(error)}")
        return None

    def _of_gated(self) -> str:
        page, source = f"{self._endpoint}/{self._name}", _token_source()
        if source is None:
            return (
                f"{self._name} is gated and needs a token: accept the terms at {page}, then set HF_TOKEN or log in "
                f"with `{_LOGIN}`"
            )
        return (
            f"{self._name} is gated, and the token of {source} has no access to it: accept the terms at {page} with "
            "the account of the token; a fine-grained token also needs the permission to read gated repositories"
        )

    def _of_missing(self) -> str:
        page, source = f"{self._endpoint}/{self._name}", _token_source()
        if source is None:
            return (
                f"{page} does not exist, or it is private and needs a token: set HF_TOKEN or log in with `{_LOGIN}`, "
                "and accept the terms there if it has some"
            )
        return f"{page} does not exist, or the token of {source} has no access to it"


def remove_bookkeeping(directory: Path) -> None:
    """Removes what the library notes beside the files that it downloads, their finished parts included."""
    shutil.rmtree(directory / _BOOKKEEPING, ignore_errors=True)


def _unfinished(directory: Path) -> int:
    """Bytes of files that the library has begun."""
    return sum(path.stat().st_size for path in (directory / _BOOKKEEPING).rglob("*.incomplete"))


def _token_source() -> str | None:
    """Where the token that is sent comes from; None where none is sent."""
    for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if os.environ.get(variable, "").strip():
            return variable
    return f"`{_LOGIN}`" if _library().get_token() else None


def _library() -> Any:
    """`huggingface_hub`, which reports nothing about its use and repeats no secret in what it logs."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    import huggingface_hub
    import huggingface_hub.errors

    huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY = True  # where another library imported it before
    for handler in logging.getLogger("huggingface_hub").handlers:
        if _masked not in handler.filters:
            handler.addFilter(_masked)
    return huggingface_hub


def _masked(record: logging.LogRecord) -> bool:
    record.msg, record.args = without_secrets(record.getMessage()), ()
    return True
