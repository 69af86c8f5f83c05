"""A judge behind an OpenAI-compatible address, asked once for each request: replies are kept in the cache.

The key comes from the environment and is sent to that address alone; no message repeats it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from paddlemix.cache import cache_directory, cache_key, replacing
from paddlemix.errors import UserError, cut
from paddlemix.evaluation.judging.judge_request import JudgeRequest
from paddlemix.network.addresses import check_address
from paddlemix.network.client import Client, RemoteSettings, Secret, status_of
from paddlemix.network.failures import UnreachableError
from paddlemix.network.switches import offline_switch

_PATH = "/chat/completions"
_CACHE = "judge"
_SHOWN = 200  # characters of a reply that is no reply
# the user names the address: a server on this machine or in its network is as good as any
_SETTINGS = RemoteSettings(
    timeout=120.0, retries=5, max_bytes=4 * 1024**2, allow_local_network=True, limit_name="the limit of a judge's reply"
)


@dataclass(frozen=True, kw_only=True)
class Judge:
    """A language model that judges.

    Args:
        address: of the interface, with or without "/chat/completions": "https://api.openai.com/v1".
        model: its name there.
        key: proves who asks; None where the server needs none.
        settings: limits of a request.
    """

    address: str
    model: str
    key: str | None = field(default=None, repr=False)
    settings: RemoteSettings = _SETTINGS

    @property
    def url(self) -> str:
        """The address that is asked."""
        base = self.address.rstrip("/")
        return base if base.endswith(_PATH) else base + _PATH

    def missing(self, requests: Sequence[JudgeRequest]) -> list[JudgeRequest]:
        """The requests that would be sent: those without a kept reply, each once, in order."""
        unsent = {request: None for request in requests if self._kept(request) is None}
        return list(unsent)

    def ask(self, request: JudgeRequest) -> str:
        """The reply to a request: the kept one, else the server's, which is kept.

        Raises:
            UserError: the server cannot be asked or does not reply in the form of chat completions.
        """
        kept = self._kept(request)
        if kept is not None:
            return kept
        reply = self._send(request)
        with replacing(self._place(request)) as path:
            path.write_text(json.dumps({"model": self.model, "reply": reply}, ensure_ascii=False), encoding="utf-8")
        return reply

    def _place(self, request: JudgeRequest) -> Path:
        # everything that the reply depends on; not the key, which may change
        parts = (self.url, self.model, request.system, request.user, request.temperature, request.max_tokens)
        return cache_directory(_CACHE) / f"{cache_key(*parts)}.json"

    def _kept(self, request: JudgeRequest) -> str | None:
        try:
            reply = json.loads(self._place(request).read_text(encoding="utf-8"))["reply"]
        except (OSError, ValueError, KeyError, TypeError):
            return None  # not there, or damaged: asked again
        return reply if isinstance(reply, str) else None

    def _send(self, request: JudgeRequest) -> str:
        switch = offline_switch(self.settings.offline)
        if switch is not None:
            raise UserError(f"the judge {self.address} is not asked, because of {switch}")
        check_address(self.url, self.settings.allow_local_network)
        body = {
            "model": self.model,
            "messages": request.messages(),
            "temperature": request.temperature,
            "max_tokens": request.max_tokens,
        }
        secret = Secret(self.url, {"Authorization": f"Bearer {self.key}"}) if self.key else None
        try:
            with Client(self.settings, secret) as client:
                status, received = client.repeat(lambda: self._post(client, body))
        except UnreachableError as error:
            raise UserError(f"the judge {self.address} cannot be asked: {error}") from error
        if status != "200":
            raise UserError(f"the judge {self.address} answers {status}: {_shown(received)}")
        return self._reply(received)

    def _post(self, client: Client, body: dict[str, Any]) -> tuple[str, bytes]:
        sent = json.dumps(body, ensure_ascii=False).encode("utf-8", "replace")
        headers = {"Content-Type": "application/json"}
        with client.request(self.url, "POST", headers, sent) as response:
            received = b""
            for piece in client.chunks(response):
                received += piece
                client.check_size(len(received))
            return "200" if response.status_code == 200 else status_of(response), received

    def _reply(self, received: bytes) -> str:
        try:
            reply = json.loads(received)["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError, RecursionError):
            reply = None
        if not isinstance(reply, str):
            raise UserError(
                f"the judge {self.address} does not reply in the form of chat completions, "
                f"choices[0].message.content: {_shown(received)}"
            )
        return reply


def key_from_environment(variable: str, is_needed: bool = True) -> str | None:
    """The key in an environment variable.

    Raises:
        UserError: it is needed, and the variable is empty or does not exist.
    """
    key = os.environ.get(variable, "").strip()
    if not key and is_needed:
        raise UserError(f"the judge needs a key: set the environment variable {variable}")
    return key or None


def _shown(received: bytes) -> str:
    return cut(received.decode("utf-8", "replace").strip(), _SHOWN)
