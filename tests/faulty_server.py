"""A local server that misbehaves in every way that its paths name; for tests of downloads."""

from __future__ import annotations

import contextlib
import io
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from tests.tiny import noise_picture

PICTURE = noise_picture(6, 4)
_STEP = 0.05  # seconds between bytes that drip


def picture_bytes() -> bytes:
    """`PICTURE` as a PNG file."""
    file = io.BytesIO()
    PICTURE.save(file, "PNG")
    return file.getvalue()


class FaultyServer(ThreadingHTTPServer):
    """Answers on 127.0.0.1; `asked` are the paths of its requests, `stopped` frees those that hang."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked: list[str] = []
        self.other = ""  # address that `/to-other` redirects to
        self.authorizations: list[str | None] = []  # of the same requests
        self.stopped = threading.Event()
        self.address = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that go away are what the tests are about."""


@contextlib.contextmanager
def serving() -> Iterator[FaultyServer]:
    """A running server, for as long as the block."""
    server = FaultyServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.stopped.set()
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: FaultyServer

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].strip("/")
        self.server.asked.append(path)
        self.server.authorizations.append(self.headers["Authorization"])
        getattr(self, f"send_{path.replace('-', '_').partition('.')[0]}")()

    def log_message(self, *arguments: object) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", kind: str = "image/png", **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        for name, value in {"Content_Length": str(len(body)), **headers}.items():
            if value:
                self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def drip(self, byte: bytes) -> None:
        while not self.server.stopped.wait(_STEP):
            self.wfile.write(byte)
            self.wfile.flush()

    def send_picture(self) -> None:
        self.answer(200, picture_bytes())

    def send_unsized(self) -> None:
        self.answer(200, picture_bytes(), Content_Length="")

    def send_html(self) -> None:
        self.answer(200, b"<html>please log in</html>", "text/html; charset=utf-8")

    def send_untyped(self) -> None:
        self.answer(200, b"what is it", "")

    def send_missing(self) -> None:
        self.answer(404)

    def send_forbidden(self) -> None:
        self.answer(403)

    def send_failing(self) -> None:
        self.answer(500)

    def send_flaky(self) -> None:
        self.answer(200, picture_bytes()) if len(self.server.asked) > 2 else self.answer(500)

    def send_busy(self) -> None:
        self.answer(200, picture_bytes()) if len(self.server.asked) > 1 else self.answer(429, Retry_After="7")

    def send_busy_for_hours(self) -> None:
        self.answer(503, Retry_After="Fri, 31 Dec 2999 23:59:59 GMT")

    def send_nothing(self) -> None:
        self.answer(204)

    def send_silence(self) -> None:
        self.server.stopped.wait()

    def send_dripping_body(self) -> None:
        self.answer(200, Content_Length="")
        self.drip(b"x")

    def send_dripping_headers(self) -> None:
        self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Long: ")
        self.drip(b"x")

    def send_endless(self) -> None:
        self.answer(200, Content_Length="")
        while not self.server.stopped.is_set():
            self.wfile.write(bytes(1 << 16))

    def send_endless_moved(self) -> None:
        self.answer(302, Location="/picture.png", Content_Length="")
        while not self.server.stopped.is_set():
            self.wfile.write(bytes(1 << 16))

    def send_huge(self) -> None:
        self.answer(200, Content_Length=str(10**12))

    def send_short(self) -> None:
        body = picture_bytes()
        self.answer(200, body[:-10], Content_Length=str(len(body)))

    def send_long(self) -> None:
        body = picture_bytes()
        self.answer(200, body, Content_Length=str(len(body) - 40))

    def send_cut_chunks(self) -> None:
        self.answer(200, b"20\r\nhalf a chunk", Content_Length="", Transfer_Encoding="chunked")

    def send_false_gzip(self) -> None:
        self.answer(200, b"this is no gzip", Content_Encoding="gzip")

    def send_close(self) -> None:
        self.close_connection = True

    def send_garbage(self) -> None:
        self.wfile.write(b"\x00\x01\x02 this is not HTTP\r\n\r\n")

    def send_moved(self) -> None:
        self.answer(302, Location="/picture.png")

    def send_to_other(self) -> None:
        self.answer(302, Location=f"{self.server.other}/picture.png")

    def send_loop(self) -> None:
        self.answer(302, Location="/loop")

    def send_astray(self) -> None:
        self.answer(302)

    def send_to_file(self) -> None:
        self.answer(302, Location="file:///etc/passwd")

    def send_to_private(self) -> None:
        self.answer(302, Location="http://10.0.0.1/picture.png")

    def send_to_metadata(self) -> None:
        self.answer(307, Location="http://169.254.169.254/latest/")

    def send_to_nowhere(self) -> None:
        self.answer(302, Location="http://[broken/")
