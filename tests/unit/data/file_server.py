"""An HTTP server of files on loopback, which may lose connections, ignore ranges, refuse, wait."""

import base64
import hashlib
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Files:
    """What a server has, how it behaves, and what it was asked for.

    Attributes:
        files: content by path, without the first slash.
        ranges: whether it answers with the part that is asked for.
        lose: how many answers to GET end in the middle.
        down: it closes every connection without an answer.
        password: of the user "me"; empty: none is wanted.
        pause: seconds between pieces of 16 kB.
        sent: bytes of answers to GET, by path.
        starts: first bytes that were asked for, by path.
    """

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files, self.url = files, ""
        self.ranges, self.lose, self.down, self.password, self.pause = True, 0, False, "", 0.0
        self.sent: dict[str, int] = dict.fromkeys(files, 0)
        self.starts: dict[str, list[int]] = {name: [] for name in files}
        self.lock = threading.Lock()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Nothing is logged."""

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        files: Files = self.server.files  # type: ignore[attr-defined]
        if files.down:
            self.close_connection = True
            return
        wanted = "Basic " + base64.b64encode(f"me:{files.password}".encode()).decode()
        if files.password and self.headers.get("Authorization") != wanted:
            self._head(401, {"Content-Length": "0"})
            return
        name = self.path.lstrip("/")
        if name not in files.files:
            self._head(404, {"Content-Length": "0"})
            return
        data = files.files[name]
        etag, start, stop, status = f'"{hashlib.md5(data).hexdigest()}"', 0, len(data), 200
        headers = {"ETag": etag}
        if (asked := self.headers.get("Range")) and files.ranges:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, stop, status = int(first), min(int(last) + 1, len(data)), 206
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
        self._head(status, {**headers, "Content-Length": str(stop - start)})
        if body:
            files.starts[name].append(start)
            self._body(files, name, data[start:stop])

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()

    def _body(self, files: Files, name: str, data: bytes) -> None:
        with files.lock:
            lost = files.lose > 0
            files.lose -= lost
        data = data[: len(data) // 2] if lost else data
        for at in range(0, len(data), 1 << 14):
            piece = data[at : at + (1 << 14)]
            with files.lock:  # before it arrives, so that whoever has it finds it counted
                files.sent[name] += len(piece)
            try:
                self.wfile.write(piece)
            except OSError:  # whoever asked is gone
                self.close_connection = True
                return
            time.sleep(files.pause)
        self.close_connection = self.close_connection or lost


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, *_: object) -> None:
        """A connection that the client closed is none of the test's failures."""


@contextmanager
def serving(files: dict[str, bytes]) -> Iterator[Files]:
    """Serve these files; ``Files.url`` is the address, without a last slash."""
    server = _Server(("127.0.0.1", 0), Handler)
    server.files = made = Files(files)  # type: ignore[attr-defined]
    made.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}).start()
    try:
        yield made
    finally:
        server.shutdown()
        server.server_close()
