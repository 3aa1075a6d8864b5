# SPDX-License-Identifier: Apache-2.0
"""A graph without processes: its door, and its workers' metrics over real HTTP."""

from __future__ import annotations

import asyncio
import json
import threading
from contextlib import asynccontextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from dynamo_epd.planning.doors import Worker
from dynamo_epd.planning.observing import SCRAPE_BYTES


class Exporters:
    """``with Exporters() as exporters``: one server, a path per worker.

    ``texts``: path → what it says, or more bytes than a scrape takes for None.
    """

    def __init__(self) -> None:
        self.texts: dict[str, str | None] = {}
        exporters = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                text = exporters.texts.get(self.path, "")
                self.send_response(200)
                self.end_headers()
                try:
                    if text is None:
                        for _ in range(2 * SCRAPE_BYTES // 65536):
                            self.wfile.write(b"#" * 65536)
                    else:
                        self.wfile.write(text.encode())
                except OSError:
                    return  # who scrapes has had enough

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    def worker(self, name: str, ready: bool = True) -> Worker:
        return Worker(name, ready, f"http://127.0.0.1:{self._server.server_address[1]}/{name}")

    def __enter__(self) -> Exporters:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class DoorThatAnswers:
    """A double of a graph's door: ``services`` is what it says of its workers."""

    def __init__(self) -> None:
        self.services: dict[str, list[dict[str, Any]]] = {}

    @asynccontextmanager
    async def open(self, path: Path) -> Any:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readline()
            writer.write(json.dumps({"services": self.services}).encode() + b"\n")
            writer.close()

        async with await asyncio.start_unix_server(answer, str(path)):
            yield path
