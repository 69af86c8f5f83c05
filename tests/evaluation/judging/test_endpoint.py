"""A judge behind an address: what is sent, that a reply is kept, and one error for every way in which it fails."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from paddlemix.errors import UserError
from paddlemix.evaluation.judging.endpoint import Judge, key_from_environment
from paddlemix.evaluation.judging.judge_request import JudgeRequest
from paddlemix.network.client import RemoteSettings

SETTINGS = RemoteSettings(timeout=20.0, retries=0, max_bytes=10_000, allow_local_network=True)
REQUEST = JudgeRequest(user="Who wins? 谁", system="Be fair.", temperature=0.2, max_tokens=7)


class _Handler(BaseHTTPRequestHandler):
    server: JudgeServer

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.seen.append((self.path, self.headers.get("Authorization"), json.loads(body)))
        status, headers, reply = self.server.replies.pop(0)
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(reply))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *arguments: object) -> None:
        pass


class JudgeServer(ThreadingHTTPServer):
    """Says what `replies` has, in order: status, headers, body."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.seen: list[tuple[str, str | None, Any]] = []
        self.replies: list[tuple[int, dict[str, str], bytes]] = []

    def say(self, content: object, status: int = 200, **headers: str) -> None:
        text = {"choices": [{"message": {"content": content}}]} if status == 200 else content
        self.replies.append((status, headers, json.dumps(text).encode()))


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[JudgeServer]:
    monkeypatch.setenv("PADDLEMIX_CACHE", str(tmp_path / "cache"))
    for variable in ("PADDLEMIX_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(variable, raising=False)
    started = JudgeServer()
    thread = threading.Thread(target=started.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield started
    started.shutdown()
    thread.join()
    started.server_close()


def judge(server: JudgeServer, **changed: Any) -> Judge:
    given = {
        "address": f"http://127.0.0.1:{server.server_port}/v1/",
        "model": "gpt",
        "key": "sk-1",
        "settings": SETTINGS,
    }
    return Judge(**{**given, **changed})


def test_a_request_is_sent_once(server: JudgeServer) -> None:
    server.say("8 9")
    one = judge(server)
    assert one.missing([REQUEST, REQUEST]) == [REQUEST]
    assert one.ask(REQUEST) == "8 9" and one.ask(REQUEST) == "8 9"
    assert one.missing([REQUEST]) == []
    messages = [{"role": "system", "content": "Be fair."}, {"role": "user", "content": "Who wins? 谁"}]
    body = {"model": "gpt", "messages": messages, "temperature": 0.2, "max_tokens": 7}
    assert server.seen == [("/v1/chat/completions", "Bearer sk-1", body)]
    # another model is another judge
    assert judge(server, model="other").missing([REQUEST]) == [REQUEST]


def test_an_empty_reply_is_a_reply_and_a_key_is_not_needed(server: JudgeServer) -> None:
    server.say("")
    assert judge(server, key=None).ask(REQUEST) == "" and server.seen[0][1] is None


def test_failures_are_one_error_without_the_key(server: JudgeServer) -> None:
    server.say({"error": "wrong key"}, status=401)
    server.say(None)
    server.replies.append((200, {}, b"<html>"))
    server.say("x", status=307, Location="http://127.0.0.1:1/v1")
    server.replies.append((200, {}, b" " * 20_000))
    server.say("busy", status=503)
    for wanted in ("401.*wrong key", "does not reply in the form", "<html>", "redirects to", "larger than", "503"):
        with pytest.raises(UserError, match=wanted) as caught:
            judge(server).ask(REQUEST)
        assert "sk-1" not in str(caught.value)
    assert judge(server).missing([REQUEST]) == [REQUEST] and "sk-1" not in repr(judge(server))


def test_a_passing_failure_is_tried_again(server: JudgeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paddlemix.network.client._sleep", lambda seconds: None)
    server.say("busy", status=429)
    server.say("7 8")
    again = RemoteSettings(timeout=20.0, retries=1, allow_local_network=True)
    assert judge(server, settings=again).ask(REQUEST) == "7 8" and len(server.seen) == 2


def test_a_damaged_reply_is_asked_for_again(server: JudgeServer, tmp_path: Path) -> None:
    server.say("1 2")
    server.say("3 4")
    assert judge(server).ask(REQUEST) == "1 2"
    (kept,) = (tmp_path / "cache" / "judge").iterdir()
    kept.write_text("{")
    assert judge(server).ask(REQUEST) == "3 4"


def test_offline_and_keys(server: JudgeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PADDLEMIX_OFFLINE", "1")
    with pytest.raises(UserError, match="PADDLEMIX_OFFLINE=1"):
        judge(server).ask(REQUEST)
    monkeypatch.setenv("MY_KEY", " sk-2 ")
    assert key_from_environment("MY_KEY") == "sk-2" and key_from_environment("NO_KEY", is_needed=False) is None
    with pytest.raises(UserError, match="set the environment variable NO_KEY"):
        key_from_environment("NO_KEY")


def test_addresses() -> None:
    for address in ("http://h/v1", "http://h/v1/", "http://h/v1/chat/completions"):
        assert Judge(address=address, model="m").url == "http://h/v1/chat/completions"
