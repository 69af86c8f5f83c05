"""Model hubs on this machine, as far as downloads ask them: Hugging Face, ModelScope and an object store; with faults.

Large files are on a second server, as on the real hubs: what is secret to the first one must not reach it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

REVISION = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_secret"
LARGE = (".bin", ".safetensors", ".pdparams", ".gguf")
CUT = 600_000  # bytes that come before a fault "cut"


@dataclass(frozen=True)
class Request:
    """What a server was asked; `secrets` are the values of the headers that say who asks."""

    method: str
    path: str
    range: str | None
    secrets: tuple[str, ...]


class HubServer(ThreadingHTTPServer):
    """Serves `files` by path; `faults[path]` are what the next GETs of that path do instead.

    Attributes:
        storage: the second server, of large files; None on the second server itself.
        closed: repository -> "gated" or "private": who is let in is who sends `TOKEN`.
        seen: all requests, in order.
    """

    daemon_threads = True

    def __init__(self, storage: HubServer | None = None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.storage = storage
        self.files: dict[str, bytes] = {}
        self.etags: dict[str, str] = {}
        self.faults: dict[str, list[str]] = {}
        self.closed: dict[str, str] = {}
        self.seen: list[Request] = []
        self.released = threading.Event()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def add_repository(self, name: str, files: dict[str, bytes], **changed: object) -> None:
        """A Hugging Face repository; weights are large files, the others plain blobs."""
        siblings = []
        for path, content in files.items():
            item: dict[str, object] = {"rfilename": path, "size": len(content), "blobId": git_checksum(content)}
            if path.endswith(LARGE):
                pointer = {"sha256": sha256(content), "size": len(content), "pointerSize": 134}
                item.update(lfs=pointer, blobId=git_checksum(b"pointer"))
            siblings.append(item)
            self.put(f"/{name}/resolve/{REVISION}/{path}", content)
        answer = {"id": name, "sha": REVISION, "siblings": siblings, **changed}
        for path in ("", "/revision/main", f"/revision/{REVISION}"):
            self.files[f"/api/models/{name}{path}"] = json.dumps(answer).encode()

    def add_modelscope(self, name: str, files: dict[str, bytes], revision: str = "master") -> None:
        """A repository of ModelScope."""
        items: list[dict[str, object]] = [{"Path": "assets", "Name": "assets", "Type": "tree", "Size": 0}]
        for path, content in files.items():
            items.append({"Path": path, "Type": "blob", "Size": len(content), "Sha256": sha256(content)})
            self.put(f"/api/v1/models/{name}/repo?Revision={revision}&FilePath={path}", content)
        answer = {"Code": 200, "Success": True, "Data": {"Files": items}}
        listing = f"/api/v1/models/{name}/repo/files?Revision={revision}"
        self.files[listing] = json.dumps(answer).encode()

    def put(self, path: str, content: bytes) -> None:
        """A file; a large one goes to the second server."""
        self.files[path] = content
        if self.storage is not None and self.is_redirected(path):
            self.storage.files[f"/lfs/{sha256(content)}"] = content

    def requests(self, path: str, method: str = "GET") -> list[Request]:
        """The requests for a path, large files' on the second server included."""
        content = self.files.get(path, b"")
        known = (path, f"/lfs/{sha256(content)}")
        everything = [*self.seen, *(self.storage.seen if self.storage is not None else [])]
        return [request for request in everything if request.method == method and request.path in known]

    def ranges(self, path: str) -> list[str | None]:
        """The `Range` of each request that a file came by; redirects do not count."""
        of_content = [request for request in self.requests(path) if not self.is_redirected(request.path)]
        return [request.range for request in of_content]

    def is_redirected(self, path: str) -> bool:
        """Whether the second server has the content; an object store, "/community/", has all of its own."""
        return self.storage is not None and path.endswith(LARGE) and not path.startswith("/community/")

    def set_faults(self, path: str, *faults: str) -> None:
        """What the next GETs of a file's content do instead."""
        server = self.storage if self.storage is not None and self.is_redirected(path) else self
        content = self.files[path]
        server.faults[f"/lfs/{sha256(content)}" if server is not self else path] = list(faults)

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that go away are what the tests are about."""


@contextlib.contextmanager
def serving_hub() -> Iterator[HubServer]:
    """A hub and its storage, for as long as the block."""
    with HubServer() as storage, HubServer(storage) as hub:
        threads = [
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True) for server in (storage, hub)
        ]
        for thread in threads:
            thread.start()
        try:
            yield hub
        finally:
            for server in (hub, storage):
                server.released.set()
                server.shutdown()


class _Handler(BaseHTTPRequestHandler):
    server: HubServer

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        server, path = self.server, self._known_path()
        secrets = tuple(value for name in ("Authorization", "Cookie") if (value := self.headers[name]))
        server.seen.append(Request(self.command, path, self.headers["Range"], secrets))
        faults = server.faults.get(path, []) if body else []
        fault = faults.pop(0) if faults else ""
        if fault == "silent":
            server.released.wait(10)
            return
        refusal = self._refusal(path, secrets)
        content = server.files.get(path)
        if refusal is not None:
            self.start(*refusal)
        elif fault.isdecimal():
            self.start(int(fault), {})
        elif content is None:
            self.start(404, {"X-Error-Code": "RevisionNotFound"} if "/revision/" in path else {})
        elif server.storage is not None and server.is_redirected(path):
            self.start(302, {**self._facts(content), "Location": self._place(server.storage, content)})
        else:
            self.send(content, fault, body)

    def send(self, content: bytes, fault: str, body: bool) -> None:
        facts = self._facts(content)
        content = b"x" * len(content) if fault == "damage" else content
        start = int(self.headers["Range"][6:-1]) if self.headers["Range"] and fault != "whole" else 0
        start = int(fault.removeprefix("range ")) if fault.startswith("range ") else start
        facts |= {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if start else {}
        self.start(206 if start else 200, facts, len(content) - start)
        if body:
            self.wfile.write(content[start : start + CUT] if fault == "cut" else content[start:])

    def start(self, status: int, headers: dict[str, str], length: int = 0) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(length), **headers}.items():
            self.send_header(name, value)
        self.end_headers()

    def _known_path(self) -> str:
        """The path as `files` knows it: of the query what names a file of ModelScope."""
        parts = urlsplit(self.path)
        query = parse_qs(parts.query)
        named = "&".join(f"{key}={query[key][0]}" for key in ("Revision", "FilePath") if key in query)
        return f"{parts.path}?{named}" if named else parts.path

    def _facts(self, content: bytes) -> dict[str, str]:
        """What a server says of a file beside its bytes."""
        path = self._known_path()
        if "/resolve/" not in path:
            etag = self.server.etags.get(path)
            return {"ETag": f'"{etag}"'} if etag else {}
        etag = sha256(content) if path.endswith(LARGE) else git_checksum(content)
        linked = {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(content))} if path.endswith(LARGE) else {}
        return {"X-Repo-Commit": REVISION, "ETag": f'"{etag}"', **linked}

    @staticmethod
    def _place(storage: HubServer, content: bytes) -> str:
        return f"{storage.address}/lfs/{sha256(content)}?X-Amz-Signature=hidden"

    def _refusal(self, path: str, secrets: tuple[str, ...]) -> tuple[int, dict[str, str]] | None:
        """Status and headers for who is not let in.  Source: what huggingface.co answers (huggingface_hub's errors)."""
        name, kind = next(((name, kind) for name, kind in self.server.closed.items() if f"/{name}" in path), ("", ""))
        sent = next((secret for secret in secrets if secret.startswith("Bearer ")), None)
        if sent is not None and sent not in (f"Bearer {TOKEN}", "Bearer of-another-account"):
            return 401, {"X-Error-Message": "Invalid credentials in Authorization header"}
        if not name or sent == f"Bearer {TOKEN}":
            return None
        if kind == "private":
            return (404 if sent else 401), {"X-Error-Code": "RepoNotFound"}
        if path.startswith("/api/models/"):
            return None  # that a gated repository exists, and what it holds, everybody may know
        return (403 if sent else 401), {"X-Error-Code": "GatedRepo"}

    def log_message(self, *arguments: object) -> None:
        pass


def git_checksum(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
