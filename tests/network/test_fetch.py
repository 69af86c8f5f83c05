"""An address is fetched once, whole, within bounded time, and never from the local network unasked."""

from __future__ import annotations

import pickle
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
import requests
from filelock import FileLock

from paddlemix.errors import UserError
from paddlemix.network import addresses, client, connections
from paddlemix.network import fetch as downloads
from paddlemix.network.addresses import check_literal, is_local
from paddlemix.network.client import RemoteSettings, length_of
from paddlemix.network.failures import retry_after
from paddlemix.network.fetch import cached, content_type, discard, fetch
from paddlemix.network.switches import offline_switch
from tests.conftest import HANG
from tests.faulty_server import FaultyServer, picture_bytes, serving

# What comes by itself may take its time; short waits are for what never comes, so that no test asks for a fast machine.
PATIENT = RemoteSettings(timeout=300, retries=2, max_bytes=1 << 20, allow_local_network=True, deadline=900)
IMPATIENT = {"silence": replace(PATIENT, timeout=0.2)} | dict.fromkeys(
    ("dripping-body", "dripping-headers"), replace(PATIENT, deadline=0.5)
)
PUBLIC = "93.184.215.14"


@pytest.fixture(scope="module")
def running() -> Iterator[FaultyServer]:
    with serving() as server:
        yield server


@pytest.fixture
def server(running: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FaultyServer:
    """The server, an empty cache, and a network that may be used; waits are as short as may be, and skipped."""
    for variable in ("PADDLEMIX_OFFLINE", "HF_HUB_OFFLINE", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PADDLEMIX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(client, "_sleep", lambda seconds: None)
    monkeypatch.setattr(client._random, "uniform", lambda low, high: low)
    running.asked.clear()
    running.authorizations.clear()
    return running


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Certificate and key of secure.example, made by the openssl command."""
    if shutil.which("openssl") is None:
        pytest.skip("the command openssl is not installed")
    folder = tmp_path_factory.mktemp("tls")
    names = ["-subj", "/CN=secure.example", "-addext", "subjectAltName=DNS:secure.example"]
    kind = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    files = ["-keyout", str(folder / "key.pem"), "-out", str(folder / "certificate.pem")]
    subprocess.run(["openssl", "req", "-x509", *kind, *names, *files], check=True, capture_output=True)
    return folder / "certificate.pem", folder / "key.pem"


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch, server: FaultyServer) -> list[float]:
    seen: list[float] = []
    monkeypatch.setattr(client, "_sleep", seen.append)
    return seen


@pytest.fixture
def loopback_is_public(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (addresses, connections):
        monkeypatch.setattr(module, "is_local", lambda address: address != "127.0.0.1" and is_local(address))


def test_fetched_once(server: FaultyServer) -> None:
    url = f"{server.address}/picture.png"
    assert cached(url) is None and content_type(url) == ""
    path = fetch(url, PATIENT)
    assert path.read_bytes() == picture_bytes()
    assert fetch(f"{url}#part", PATIENT) == cached(url) == path
    assert content_type(url) == "image/png"
    assert server.asked == ["picture.png"]
    assert sorted(file.suffix for file in path.parent.iterdir()) == [".bin", ".json"]
    discard(url)
    assert cached(url) is None
    discard(url)


def test_the_query_is_part_of_the_address(server: FaultyServer) -> None:
    assert fetch(f"{server.address}/picture.png?a=1", PATIENT) != fetch(f"{server.address}/picture.png?a=2", PATIENT)


@pytest.mark.parametrize("path", ["moved", "unsized", "endless-moved"])
def test_other_ways_to_the_file(server: FaultyServer, path: str) -> None:
    assert fetch(f"{server.address}/{path}", PATIENT).read_bytes() == picture_bytes()


def test_a_failure_that_passes(server: FaultyServer, waits: list[float]) -> None:
    assert fetch(f"{server.address}/flaky", RemoteSettings(allow_local_network=True)).read_bytes() == picture_bytes()
    assert server.asked == ["flaky"] * 3
    assert 0.25 <= waits[0] <= 0.75 and 0.5 <= waits[1] <= 1.5  # doubled, with jitter


def test_retry_after_is_honoured(server: FaultyServer, waits: list[float]) -> None:
    fetch(f"{server.address}/busy", RemoteSettings(allow_local_network=True))
    assert waits == [7.0]


def test_retry_after_has_a_cap(server: FaultyServer, waits: list[float]) -> None:
    with pytest.raises(UserError, match="503 Service Unavailable .attempt 2"):
        fetch(f"{server.address}/busy-for-hours", RemoteSettings(allow_local_network=True, retries=1))
    assert waits == [60.0]
    with pytest.raises(UserError, match="503 Service Unavailable .attempt 1"):  # it would wait past the deadline
        fetch(f"{server.address}/busy-for-hours", RemoteSettings(allow_local_network=True, deadline=50))


def test_forms_of_retry_after() -> None:
    soon = datetime.now(timezone.utc) + timedelta(days=100)
    assert 99 < (retry_after(format_datetime(soon, usegmt=True)) or 0) / 86400 <= 100
    assert retry_after("Fri, 31 Dec 1999 23:59:59 GMT") == 0
    assert retry_after("12") == 12
    assert [retry_after(text) for text in ("", "soon", "-5")] == [None] * 3
    assert retry_after("Mon, 01 Jan 99999999999999999999 00:00:00 GMT") is None


def test_a_length_that_no_file_has_is_not_believed() -> None:
    answer = requests.Response()
    for text, length in {"12": 12, "": None, "-1": None, "9" * 5000: None}.items():
        answer.headers["Content-Length"] = text
        assert length_of(answer) == length


FAULTS = {
    "missing": ("cannot be fetched: 404 Not Found$", 1),
    "forbidden": ("cannot be fetched: 403 Forbidden$", 1),
    "failing": (r"cannot be fetched: 500 Internal Server Error \(attempt 3\)", 3),
    "nothing": ("cannot be fetched: 204 No Content", 1),
    "silence": (r"cannot be fetched: .*timed out.*\(attempt 3\)", None),
    "dripping-body": ("cannot be fetched: it was not complete after 0.5 s", None),
    "dripping-headers": ("cannot be fetched: it was not complete after 0.5 s", None),
    "endless": (r"is larger than 1 MiB \(max_bytes=1048576\)", 1),
    "huge": (r"is larger than 1 MiB \(max_bytes=1048576\)", 1),
    "short": ("cannot be fetched: .*(bytes|IncompleteRead).*attempt 3", 3),
    "cut-chunks": (r"cannot be fetched: .*\(attempt 3\)", 3),
    "false-gzip": ("cannot be fetched: .*decompressing.*attempt 3", 3),
    "close": ("cannot be fetched: .*attempt 3", 3),
    "garbage": (r"cannot be fetched: BadStatusLine: .*this is not HTTP .attempt 3", 3),
    "loop": ("cannot be fetched: it redirects more than 5 times", 6),
    "astray": ("cannot be fetched: 302 Found", 1),
    "to-file": (
        "cannot be fetched: its server redirects to 'file:///etc/passwd': the scheme 'file' is neither http nor https",
        1,
    ),
    "to-nowhere": (r"cannot be fetched: its server redirects to 'http://\[broken/'", 1),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_one_error_in_bounded_time(server: FaultyServer, fault: str) -> None:
    expected, requests = FAULTS[fault]
    with pytest.raises(UserError, match=rf"^'{server.address}/{fault}' {expected}"):
        fetch(f"{server.address}/{fault}", IMPATIENT.get(fault, PATIENT))
    assert requests is None or len(server.asked) == requests
    assert cached(f"{server.address}/{fault}") is None
    assert [path for path in (Path(downloads.cache_directory("downloads"))).rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("fault", ["dripping-body", "dripping-headers"])
def test_a_long_deadline_wants_progress(server: FaultyServer, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    monkeypatch.setattr(client, "Deadline", lambda seconds, pace: connections.Deadline(seconds, pace / 2000))
    with pytest.raises(UserError, match=f"{fault}' cannot be fetched: less than 64 KiB came in 1200 s"):
        fetch(f"{server.address}/{fault}", replace(PATIENT, deadline=3600))


def test_nobody_listens(server: FaultyServer) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        with pytest.raises(UserError, match=r"cannot be fetched: .*refused \(attempt 3\)"):
            fetch(f"http://127.0.0.1:{port}/a.png", PATIENT)


def test_a_name_without_address(server: FaultyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    with pytest.raises(UserError, match="absent.example/a.png' cannot be fetched: .*absent.example has no address"):
        fetch("http://absent.example/a.png", RemoteSettings(retries=1))


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("ftp://example.org/a.png", "the scheme 'ftp' is neither http nor https"),
        ("file:///etc/passwd", "the scheme 'file' is neither"),
        ("a.png", "the scheme '' is neither"),
        ("http:///a.png", "it names no host"),
        ("http://[::1/a.png", "not an address"),
        ("http://example.org:port/a.png", "not an address"),
        (f"http://{'a' * 80}.org/a.png", "cannot be fetched"),
    ],
)
def test_no_address(server: FaultyServer, url: str, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        fetch(url, RemoteSettings(retries=0, timeout=1))


LOCAL = ["127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.0.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1"]
LOCAL += ["240.0.0.1", "255.255.255.255", "::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1", "ff02::1", "ff0e::1"]
LOCAL += ["::ffff:10.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::", "2001:db8::1"]
# Special ranges, and IPv4 addresses reached through them: local-use translation, IPv4-compatible and -translated forms,
# documentation, segment routing, site-local.
LOCAL += ["64:ff9b:1::a00:1", "64:ff9b:1:ffff::808:808", "::10.0.0.1", "::8.8.8.8", "::ffff:0:10.0.0.1"]
LOCAL += ["::ffff:0:8.8.8.8", "3fff::1", "3fff:fff::1", "5f00::1", "fec0::1", "4000::1", "2001::1"]


@pytest.mark.parametrize("address", LOCAL)
def test_local_addresses(address: str) -> None:
    assert is_local(address)


@pytest.mark.parametrize(
    "address", [PUBLIC, "8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808", "2002:808:808::"]
)
def test_public_addresses(address: str) -> None:
    assert not is_local(address)


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "[::1]", "127.1", "0x7f000001", "2130706433", "localhost", "a.localhost."]
)
def test_local_hosts_are_refused(server: FaultyServer, host: str) -> None:
    with pytest.raises(UserError, match="belongs to the local network; set allow_local_network to true"):
        check_literal(f"http://{host}:{server.server_port}/picture.png")
    with pytest.raises(UserError, match="cannot be fetched: .* belongs to the local network"):
        fetch(f"http://{host}:{server.server_port}/picture.png", RemoteSettings())
    assert server.asked == []


def resolve_to(*answers: str) -> Callable[..., list[Any]]:
    """A name service that gives one answer after the other, the last one for ever."""
    left = list(answers)

    def look_up(host: str, port: int, *_: Any, **__: Any) -> list[Any]:
        address = left.pop(0) if len(left) > 1 else left[0]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    return look_up


def test_a_name_with_a_local_address_is_refused(server: FaultyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", resolve_to("127.0.0.1"))
    with pytest.raises(UserError, match=r"cannot be fetched: intranet.example \(127.0.0.1\) belongs to the local"):
        fetch(f"http://intranet.example:{server.server_port}/picture.png", RemoteSettings())
    assert server.asked == []


def test_a_name_that_changes_its_address(server: FaultyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection goes to the address that was checked: the name is not looked up a second time."""
    called: list[Any] = []

    def connect(self: socket.socket, address: Any) -> None:
        called.append(address[0])
        raise OSError("no route")

    monkeypatch.setattr(socket.socket, "connect", connect)
    answers = {"rebinding.example": [PUBLIC, "127.0.0.1"]}

    def look_up(host: str, port: int, *_: Any, **__: Any) -> list[Any]:
        address = answers[host].pop(0) if host in answers else host
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    with pytest.raises(UserError, match="no route"):
        fetch(f"http://rebinding.example:{server.server_port}/picture.png", RemoteSettings(retries=0))
    assert called == [PUBLIC]
    with pytest.raises(UserError, match="127.0.0.1. belongs to the local network"):
        fetch(f"http://rebinding.example:{server.server_port}/picture.png", RemoteSettings(retries=0))
    assert called == [PUBLIC]


@pytest.mark.parametrize("path", ["to-private", "to-metadata"])
@pytest.mark.usefixtures("loopback_is_public")
def test_redirect_to_the_local_network(server: FaultyServer, path: str) -> None:
    with pytest.raises(
        UserError, match=f"{path}' cannot be fetched: its server redirects to 'http://1.* local network"
    ):
        fetch(f"{server.address}/{path}", RemoteSettings())
    assert server.asked == [path]


@pytest.mark.parametrize("path", ["missing", "picture.png", "to-file"])
def test_no_secret_of_an_address_is_repeated(server: FaultyServer, tmp_path: Path, path: str) -> None:
    """The password reaches the server it is for, and neither an error nor a file of the cache."""
    url = f"{server.address}/{path}?size=4&X-Amz-Signature=hidden1&token=hidden2".replace("//", "//me:hidden3@")
    message = ""
    try:
        fetch(url, PATIENT)
    except UserError as error:
        message = str(error)
        assert f"'{server.address.replace('//', '//***@')}/{path}?size=4&X-Amz-Signature=***&token=***'" in message
    assert server.authorizations == ["Basic bWU6aGlkZGVuMw=="]
    kept = [file.read_bytes() for file in (tmp_path / "cache").rglob("*.json")]
    assert len(kept) == (path == "picture.png")
    assert b"hidden" not in b"".join(kept) + message.encode()


def test_a_password_is_not_sent_to_another_server(server: FaultyServer) -> None:
    with serving() as other:
        server.other = other.address
        fetch(f"{server.address}/to-other".replace("//", "//me:hidden@"), PATIENT)
        assert server.authorizations == ["Basic bWU6aGlkZGVu"]
        assert (other.asked, other.authorizations) == (["picture.png"], [None])


@pytest.mark.usefixtures("loopback_is_public")
def test_a_public_name_is_fetched(server: FaultyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", resolve_to("127.0.0.1"))
    path = fetch(f"http://public.example:{server.server_port}/picture.png", RemoteSettings())
    assert path.read_bytes() == picture_bytes()


def test_the_next_address_is_tried(server: FaultyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name with two addresses, of which the first does not answer."""
    monkeypatch.setattr(connections, "is_local", lambda address: False)
    real = socket.getaddrinfo

    def look_up(host: str, port: int, *arguments: Any, **options: Any) -> list[Any]:
        if host != "two.example":
            return real(host, port, *arguments, **options)
        kind = (socket.AF_INET, socket.SOCK_STREAM, 6, "")
        return [(*kind, ("127.0.0.2", 9)), (*kind, ("127.0.0.1", port))]

    def connect(self: socket.socket, address: Any) -> None:
        if address[0] == "127.0.0.2":
            raise ConnectionRefusedError(111, "Connection refused")
        original(self, address)

    original = socket.socket.connect
    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    assert fetch(f"http://two.example:{server.server_port}/picture.png", RemoteSettings(retries=0)).is_file()


@pytest.mark.usefixtures("loopback_is_public")
def test_tls_verifies_the_name(
    server: FaultyServer, certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection goes to a checked number; what the server must prove is the name."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    monkeypatch.setattr(socket, "getaddrinfo", resolve_to("127.0.0.1"))
    with serving() as secure:
        secure.socket = context.wrap_socket(secure.socket, server_side=True)
        url = f"https://secure.example:{secure.server_port}"
        with pytest.raises(UserError, match=r"cannot be fetched: .*certificate verify failed"):
            fetch(f"{url}/picture.png", RemoteSettings())
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate[0]))
        assert fetch(f"{url}/picture.png", RemoteSettings()).read_bytes() == picture_bytes()
        with pytest.raises(UserError, match="cannot be fetched: it was not complete after 0.6 s"):
            fetch(f"{url}/dripping-headers", RemoteSettings(timeout=300, deadline=0.6))
        with pytest.raises(UserError, match=r"cannot be fetched: .*Hostname mismatch"):
            fetch(f"{url.replace('secure', 'another')}/picture.png", RemoteSettings())
        assert secure.asked == ["picture.png", "dripping-headers"]


def test_proxy(server: FaultyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy on the local network is the user's choice; it is asked for public names only."""
    monkeypatch.setenv("http_proxy", server.address)
    monkeypatch.setattr(FaultyServer, "finish_request", _as_proxy(FaultyServer.finish_request))
    assert fetch("http://somewhere.example/picture.png", RemoteSettings()).read_bytes() == picture_bytes()
    with pytest.raises(UserError, match="10.0.0.1 belongs to the local network"):
        fetch("http://10.0.0.1/picture.png", RemoteSettings())
    assert len(server.asked) == 1


def _as_proxy(original: Any) -> Any:
    """Makes the server understand the absolute addresses that a proxy is asked for."""

    def finish(self: Any, request: Any, client_address: Any) -> None:
        handler = self.RequestHandlerClass

        class Proxy(handler):  # type: ignore[misc, valid-type]
            def do_GET(self) -> None:
                self.path = "/" + self.path.split("/", 3)[3]
                super().do_GET()

        Proxy(request, client_address, self)

    return finish


@pytest.mark.parametrize(
    ("variables", "setting", "switch"),
    [
        ({"PADDLEMIX_OFFLINE": "1"}, None, "PADDLEMIX_OFFLINE=1"),
        ({"HF_HUB_OFFLINE": "true"}, None, "HF_HUB_OFFLINE=true"),
        ({"PADDLEMIX_OFFLINE": "0"}, None, None),
        ({"PADDLEMIX_OFFLINE": "1"}, False, None),
        ({}, True, "the setting offline"),
    ],
)
def test_offline(
    server: FaultyServer, monkeypatch: pytest.MonkeyPatch, variables: Any, setting: bool | None, switch: str | None
) -> None:
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    settings = RemoteSettings(allow_local_network=True, offline=setting)
    assert offline_switch(setting) == switch
    if switch is None:
        assert fetch(f"{server.address}/picture.png", settings).is_file()
        return
    with pytest.raises(UserError, match=f"picture.png' is not in the cache, and {switch} forbids asking its server"):
        fetch(f"{server.address}/picture.png", settings)
    fetch(f"{server.address}/picture.png", RemoteSettings(allow_local_network=True, offline=False))
    assert fetch(f"{server.address}/picture.png", settings).is_file()


def test_several_at_once_fetch_it_once(server: FaultyServer) -> None:
    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(lambda _: fetch(f"{server.address}/picture.png", PATIENT), range(8)))
    assert len(set(paths)) == 1 and server.asked == ["picture.png"]


def test_who_gives_up_waiting_leaves_the_lock_to_its_holder(server: FaultyServer) -> None:
    """Else the next process would start a second download beside the first."""
    url = f"{server.address}/picture.png"
    lock = downloads._place(url).with_suffix(".lock")
    lock.parent.mkdir(parents=True)
    with FileLock(lock):
        held = lock.stat().st_ino
        for _ in range(2):
            with pytest.raises(UserError, match=r"another process is still fetching it after 0\.05 s"):
                fetch(url, replace(PATIENT, deadline=0.05))
        assert lock.stat().st_ino == held and server.asked == []
    fetch(url, PATIENT)
    assert server.asked == ["picture.png"] and not lock.exists()


def test_threads_end(server: FaultyServer) -> None:
    with pytest.raises(UserError):
        fetch(f"{server.address}/missing", PATIENT)
    for thread in threading.enumerate():
        if thread.name == "deadline":
            thread.join(HANG)
            assert not thread.is_alive()


def test_cache_that_cannot_be_written(server: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PADDLEMIX_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="set PADDLEMIX_CACHE"):
        fetch(f"{server.address}/picture.png", PATIENT)


def test_settings_travel() -> None:
    assert pickle.loads(pickle.dumps(PATIENT)) == PATIENT
    assert RemoteSettings(timeout=2).seconds == 8 and PATIENT.seconds == 900
