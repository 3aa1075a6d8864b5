# SPDX-License-Identifier: Apache-2.0
"""A web server for pictures on this machine, and a port that must not be dialled."""

from __future__ import annotations

import http.server
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType


class PictureServer:
    """``with PictureServer() as server``: what ``files`` holds by name is at `url` of that name until replaced."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.asked: list[str] = []
        files, asked = self.files, self.asked

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                name = self.path.lstrip("/")
                asked.append(name)
                body = files.get(name)
                self.send_response(404 if body is None else 200)
                self.send_header("content-type", "image/png")
                self.send_header("content-length", str(len(body or b"")))
                self.end_headers()
                self.wfile.write(body or b"")

            def log_message(self, *_: object) -> None:
                """Quiet."""

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/{name}"

    def put(self, name: str, file: bytes) -> str:
        """The file's URL."""
        self.files[name] = file
        return self.url(name)

    def __enter__(self) -> PictureServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class Canary:
    """A listening port (any free one, unless given) on every address of this machine. `dialled` says how often somebody
    connected. Raises OSError for a port that cannot be had."""

    def __init__(self, port: int = 0) -> None:
        self._listener = socket.socket(socket.AF_INET6, socket.SOCK_STREAM)
        self._listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        try:
            self._listener.bind(("::", port))
        except OSError:
            self._listener.close()
            raise
        self._listener.listen(64)
        self._listener.setblocking(False)
        self.port = self._listener.getsockname()[1]
        self._count = 0

    def dialled(self) -> int:
        while True:
            try:
                self._listener.accept()[0].close()
            except BlockingIOError:
                return self._count
            self._count += 1

    def __enter__(self) -> Canary:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.close()


@contextmanager
def silent() -> Iterator[tuple[socket.socket, str]]:
    """A server that never answers, whose connections the test accepts, and the address of a picture on it."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        listener.settimeout(60)
        yield listener, f"http://127.0.0.1:{listener.getsockname()[1]}/never.png"
