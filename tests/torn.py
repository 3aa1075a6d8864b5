# SPDX-License-Identifier: Apache-2.0
"""The way to an S3 server on which what is sent is torn."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future

from tests.s3_server import S3Server

OPEN_SECONDS = 20.0


class Torn:
    """A TCP proxy before an S3 server that passes on so many bytes of a connection, and then cuts both its sides."""

    def __init__(self, server: S3Server):
        self._server = server
        self.sent: int | None = None
        """Bytes that a client may send; None: all."""
        self.received: int | None = None
        """Bytes that it may receive."""
        self.cuts = 0

    async def __aenter__(self) -> Torn:
        self._listening = await asyncio.start_server(self._pass_on, "127.0.0.1", 0)
        self.port = self._listening.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._listening.close()

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", self._server.port)
        copies = [
            asyncio.create_task(self._copy(reader, back, self.sent)),
            asyncio.create_task(self._copy(there, writer, self.received)),
        ]
        with contextlib.suppress(asyncio.CancelledError):  # the test is over
            await asyncio.wait(copies, return_when=asyncio.FIRST_COMPLETED)
        for copy in copies:
            copy.cancel()
        for one in (back, writer):
            one.transport.abort()

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, left: int | None) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536 if left is None else min(65536, left)):
                writer.write(data)
                await writer.drain()
                if left is not None:
                    left -= len(data)
                    if left == 0:
                        self.cuts += 1
                        return


@contextlib.contextmanager
def torn_before(server: S3Server) -> Iterator[Torn]:
    """One that runs in a thread of its own, for a test that has no event loop."""
    opened: Future[tuple[Torn, Callable[[], object]]] = Future()

    async def stay_open() -> None:
        loop, over = asyncio.get_running_loop(), asyncio.Event()
        async with Torn(server) as torn:
            opened.set_result((torn, lambda: loop.call_soon_threadsafe(over.set)))
            await over.wait()

    thread = threading.Thread(target=asyncio.run, args=(stay_open(),), name="torn", daemon=True)
    thread.start()
    torn, close = opened.result(OPEN_SECONDS)
    try:
        yield torn
    finally:
        close()
        thread.join()
