"""ModelScope: the files of a repository, and who asks for them.

Its files come by our own downloader: the package `modelscope` is not needed.

Source: the HTTP interface that ModelScope's own client uses (github.com/modelscope/modelscope_hub,
src/modelscope_hub/_legacy_api.py and config.py, read in 2026).
"""

from __future__ import annotations

import json
import os
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import quote_plus

from paddlemix.network.client import Client, Secret, status_of
from paddlemix.network.failures import UnreachableError
from paddlemix.network.transfer import MODEL_DOWNLOADS, RemoteFile, receive_file
from paddlemix.paths import user_path

_TOKEN = "MODELSCOPE_API_TOKEN"


class ModelScopeRepository:
    """A repository of models.

    Args:
        name: `owner/name`.
        revision: branch, tag or commit; None for "master".

    Endpoint and token are those of MODELSCOPE_ENDPOINT (or MODELSCOPE_DOMAIN) and MODELSCOPE_API_TOKEN.
    """

    def __init__(self, name: str, revision: str | None = None) -> None:
        self._name, self._revision = name, revision or "master"
        self._endpoint = _endpoint()
        token = os.environ.get(_TOKEN, "").strip()
        # Its older servers know the cookie, its newer ones the header, its own client sends both.
        headers = {"Authorization": f"Bearer {token}", "Cookie": f"m_session_id={token}"}
        self._secret = Secret(self._endpoint, headers) if token else None

    def list_files(self) -> list[RemoteFile]:
        """All its files.

        Raises:
            UnreachableError: no such repository or revision, no network, or another answer than a list.
        """
        base = f"{self._endpoint}/api/v1/models/{self._name}/repo"
        url = f"{base}/files?Revision={quote_plus(self._revision)}&Recursive=True"
        try:
            with Client(MODEL_DOWNLOADS, self._secret) as client:
                answer = client.repeat(lambda: self._ask(client, url))
        except UnreachableError as error:
            raise UnreachableError(f"{url}: {error}") from error
        try:
            if not answer.get("Success", answer.get("Code") == 200):
                raise UnreachableError(f"{url}: {answer.get('Message') or answer.get('Code')}; {self._advice()}")
            # folders are listed as items of their own
            items = [item for item in answer["Data"]["Files"] if item.get("Type") != "tree"]
            return [self._remote_file(base, item) for item in items]
        except (KeyError, TypeError, AttributeError) as error:
            raise UnreachableError(f"{url} did not answer with a list of files ({error!r})") from error

    def receive(self, file: RemoteFile, directory: Path) -> None:
        """Downloads one of its files to its place below a directory; see `receive_file`."""
        try:
            receive_file(file, directory / file.path, self._secret)
        except UnreachableError as error:
            refused = any(status in str(error) for status in ("status 401", "status 403", "status 404"))
            raise UnreachableError(f"{error}; {self._advice()}" if refused else str(error)) from error

    def _remote_file(self, base: str, item: dict[str, Any]) -> RemoteFile:
        url = f"{base}?Revision={quote_plus(self._revision)}&FilePath={quote_plus(item['Path'])}"
        size, checksum = item.get("Size"), item.get("Sha256")
        return RemoteFile(item["Path"], url, size if isinstance(size, int) else None, checksum or None)

    def _ask(self, client: Client, url: str) -> dict[str, Any]:
        with closing(client.request(url)) as response:
            if response.status_code in (401, 403, 404):
                raise UnreachableError(f"status {status_of(response)}; {self._advice()}")
            if response.status_code >= 400:
                raise UnreachableError(f"status {status_of(response)}")
            body = b"".join(client.chunks(response))
        try:
            answer = json.loads(body)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):  # e.g. the page of a network's login
            raise UnreachableError("did not answer with a JSON object")
        return answer

    def _advice(self) -> str:
        where = f"{self._endpoint}/models/{self._name}"
        if self._secret is None:
            return (
                f"{where} or its revision '{self._revision}' does not exist, or needs a token: set {_TOKEN} to one of "
                f"{self._endpoint}/my/myaccesstoken (the login of ModelScope's own program is not read)"
            )
        return (
            f"{where} or its revision '{self._revision}' does not exist, or the token of {_TOKEN} may not read it: "
            "accept its terms there, and see whether the token is still valid"
        )


def _endpoint() -> str:
    given = os.environ.get("MODELSCOPE_ENDPOINT") or os.environ.get("MODELSCOPE_DOMAIN") or "https://www.modelscope.cn"
    return (given if "://" in given else f"https://{given}").rstrip("/")


def cached_places(name: str, revision: str | None = None) -> list[Path]:
    """Where ModelScope's own client, of today and of earlier, keeps a repository."""
    owner, _, repository = name.partition("/")
    cache = user_path(os.environ.get("MODELSCOPE_CACHE") or "~/.cache/modelscope", "MODELSCOPE_CACHE")
    places = [cache / "models" / f"{owner}--{repository}" / "snapshots" / (revision or "master")]
    if revision is None:  # the earlier ones name no revision, and write "." as "___"
        plain = Path(owner) / repository.replace(".", "___")
        places += [cache / "models" / plain, cache / "hub" / "models" / plain, cache / "hub" / plain]
    return places
