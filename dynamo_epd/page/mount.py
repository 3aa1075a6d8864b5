# SPDX-License-Identifier: Apache-2.0
"""The page as an ASGI app, to be mounted at ``/ui``: it answers at once, and shows the page when Gradio has loaded.

Where several workers share the port, a browser's requests reach now this one and now that one, and Gradio keeps its
runs in memory: the first worker has the page, the others pass requests on to it through a socket in a directory that
only this user can open.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import logging
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Mount, Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dynamo_epd import heap
from dynamo_epd.page.preparing import preparing
from dynamo_epd.sdk import dynamo_context
from dynamo_epd.sdk.http_server import SHARED_PORT
from dynamo_epd.sdk.old_sdk import ENVIRONMENT as CONFIGURATION

if TYPE_CHECKING:
    import httpx
    import uvicorn

log = logging.getLogger(__name__)

PATH = "/ui"
GRAPH = "dynamo_epd.graph"
"""Key of a request's scope: the address at which this process took it, and so one at which it can be asked."""
FORWARDED = b"x-dynamo-epd-server"
"""The same, from a worker that passes a request on."""
ENVIRONMENT = {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_ANALYTICS_MAX_EVENTS": "100", "GRADIO_MCP_SERVER": "False"}
DIRECTORY = "dynamo-ui-"
CONNECT_SECONDS = 2.0
HOP_BY_HOP = frozenset({b"connection", b"keep-alive", b"transfer-encoding", b"upgrade", b"te", b"trailer"})


@dataclass(frozen=True)
class PageSettings:
    """What the Frontend tells the page."""

    tabs: Sequence[str]
    """Those of "validate", "chat" and "gallery" for which the graph has the stages."""
    sizes: Sequence[str] = ()
    """Names of picture sizes."""
    deadline: float = 300.0
    """Seconds that the graph gives one request."""
    upload_bytes: int = 20 * 1024 * 1024
    """Of one uploaded picture."""
    worker_index: int = 0
    shared: bool = False
    """Whether other workers may take requests at the same port, as they may under every supervisor."""
    cert_file: Path | None = None
    """The frontend's own certificate, where it serves TLS."""

    @classmethod
    def of_worker(
        cls, *, tabs: Sequence[str], deadline: float, upload_bytes: int, cert_file: Path | None = None
    ) -> PageSettings:
        """What is known in a worker's process: its index, its port, and the sizes that the configuration names."""
        sections = json.loads(os.environ.get(CONFIGURATION) or "{}")
        return cls(
            tabs,
            tuple(sections.get("ImageWorker", {}).get("sizes", {})),
            deadline,
            upload_bytes,
            dynamo_context.get("worker_index", 0),
            bool(os.environ.get(SHARED_PORT)),
            cert_file,
        )


class Page:
    """`open` begins to load, in a thread, and returns; `close` ends what runs and removes the page's files."""

    def __init__(self) -> None:
        self._app: ASGIApp = preparing
        self._loading: asyncio.Task[None] | None = None
        self._stack = AsyncExitStack()
        self._streams: set[asyncio.Task[None]] = set()
        self._scheme = "http"

    def open(self, settings: PageSettings, stopping: asyncio.Event | None = None) -> None:
        """``stopping``: set when the process begins to drain; the page's streams would hold that up."""
        self._scheme = "https" if settings.cert_file else "http"
        keep = self._keep(settings) if settings.worker_index == 0 else self._pass_on()
        self._loading = asyncio.create_task(self._load(keep, stopping))

    async def close(self) -> None:
        if self._loading is not None:
            self._loading.cancel()
            await asyncio.gather(self._loading, return_exceptions=True)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope = {**scope, GRAPH: _address(self._scheme, scope)}
        begun = False

        async def watch(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        # A task of its own, so that streams can be ended when the process drains.
        task = asyncio.ensure_future(_run(self._app(scope, receive, watch)))
        self._streams.add(task)
        try:
            await asyncio.wait({task})
            if task.cancelled():
                if not begun:
                    await PlainTextResponse("The graph is going down", 503, {"retry-after": "5"})(scope, receive, send)
                else:
                    await send({"type": "http.response.body", "body": b"", "more_body": False})
            else:
                task.result()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            self._streams.discard(task)

    async def _load(self, keep: Coroutine[Any, Any, None], stopping: asyncio.Event | None) -> None:
        """The page's life: loading, serving, and the end of its streams."""
        try:
            await keep
            await (stopping or asyncio.Event()).wait()
        except ImportError as error:
            log.warning("there is no page at %s: %s", PATH, error)
            self._app = PlainTextResponse("This installation has no page: Gradio is not installed.", 404)
            await asyncio.Event().wait()
        except Exception:  # the page is not worth the graph
            log.exception("there is no page at %s", PATH)
            self._app = PlainTextResponse("The page could not be prepared; the log says why.", 500)
            await asyncio.Event().wait()
        finally:
            for stream in list(self._streams):
                stream.cancel()
            await self._stack.aclose()

    async def _keep(self, settings: PageSettings) -> None:
        """The page itself."""
        directory = self._stack.enter_context(_directory(settings.shared))
        os.environ |= ENVIRONMENT | {
            "GRADIO_TEMP_DIR": str(directory / "files"),
            "GRADIO_EXAMPLES_CACHE": str(directory / "examples"),
        }
        await self._stack.enter_async_context(_gradio_running(outer := await asyncio.to_thread(_built, settings)))
        from dynamo_epd.page.door import Door

        app = Door(outer.app, directory / "files")
        if settings.shared:
            await self._stack.enter_async_context(_listening(Router([Mount(PATH, self)]), _socket(directory)))
        self._app = app
        heap.keep()

    async def _pass_on(self) -> None:
        """To the worker that has the page; it may be found only later, and made again."""
        import httpx

        path = _socket(_directory_path(shared=True))
        client = httpx.AsyncClient(
            transport=httpx.AsyncHTTPTransport(uds=str(path)),
            timeout=httpx.Timeout(None, connect=CONNECT_SECONDS),
            trust_env=False,
        )
        await self._stack.enter_async_context(client)
        self._app = _Forward(client, path.parent)


class _Forward:
    """Passes a request on, and its reply back, as it comes."""

    def __init__(self, client: httpx.AsyncClient, directory: Path):
        self._client = client
        self._directory = directory

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        import httpx

        body = b""
        while (message := await receive())["type"] == "http.request":
            body += message.get("body", b"")
            if not message.get("more_body", False):
                break
        headers = [pair for pair in scope["headers"] if pair[0] not in HOP_BY_HOP and pair[0] != FORWARDED]
        headers.append((FORWARDED, scope[GRAPH].encode()))
        query = scope.get("query_string", b"")
        url = httpx.URL("http://page", raw_path=scope["raw_path"] + (b"?" + query if query else b""))
        request = self._client.build_request(scope["method"], url, headers=headers, content=body)
        try:
            if not _is_ours(self._directory):
                raise httpx.ConnectError("no page yet")
            reply = await self._client.send(request, stream=True)
        except httpx.ConnectError:  # its worker is being started
            await preparing(scope, receive, send)
            return
        try:
            response = StreamingResponse(reply.aiter_raw(), reply.status_code)
            response.raw_headers = [pair for pair in reply.headers.raw if pair[0].lower() not in HOP_BY_HOP]
            await response(scope, receive, send)
        finally:
            await reply.aclose()


def _built(settings: PageSettings) -> Any:
    """The Gradio app in its mount, built in a thread: the imports take seconds."""
    import warnings

    from fastapi import FastAPI

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about other versions of what Gradio uses
        import gradio

        from dynamo_epd.page import theme
        from dynamo_epd.page.blocks import Tabs
        from dynamo_epd.page.graph_api import GraphApi

        graph = GraphApi(settings.deadline, settings.cert_file)
        outer = FastAPI()
        gradio.mount_gradio_app(
            outer,
            Tabs(graph, tabs=settings.tabs, sizes=settings.sizes).blocks(),
            PATH,
            footer_links=[],
            run_history=False,
            show_error=False,
            max_file_size=settings.upload_bytes,
            ssr_mode=False,
            enable_monitoring=False,
            pwa=False,
            mcp_server=False,
            theme=theme.theme(),
            css=theme.style(),
            head=theme.head(),
        )
    outer.state.graph = graph
    return outer


@contextlib.asynccontextmanager
async def _gradio_running(outer: Any) -> AsyncIterator[None]:
    """Gradio's own tasks. ``outer.app`` is then the app inside the mount."""
    (mount,) = (route for route in outer.routes if isinstance(route, Mount))
    outer.app = mount.app
    try:
        async with outer.router.lifespan_context(outer):
            try:
                yield
            finally:
                outer.app.get_blocks()._queue.close()
    finally:
        await outer.state.graph.close()


@contextlib.asynccontextmanager
async def _listening(app: ASGIApp, path: Path) -> AsyncIterator[None]:
    import uvicorn

    config = uvicorn.Config(app, uds=str(path), log_config=None, access_log=False, lifespan="off")
    server = _server(config)
    serving = asyncio.create_task(server.serve())
    try:
        while not server.started and not serving.done():
            await asyncio.sleep(0.01)
        yield
    finally:
        server.should_exit = server.force_exit = True
        await asyncio.gather(serving, return_exceptions=True)


def _server(config: uvicorn.Config) -> uvicorn.Server:
    import uvicorn

    class Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Any:
            yield  # the process has handlers of its own

    return Server(config)


async def _run(work: Any) -> None:
    await work


def _address(scheme: str, scope: Scope) -> str:
    """Where this process took the request: the port is known for certain only here (it may have been 0)."""
    host, port = scope["server"]
    if port is None:  # our own socket
        forwarded = [value for name, value in scope["headers"] if name == FORWARDED]
        return forwarded[0].decode("latin-1") if forwarded else ""
    try:
        if ipaddress.ip_address(host).version == 6:
            host = f"[{host}]"
    except ValueError:
        pass
    return f"{scheme}://{host}:{port}"


def _socket(directory: Path) -> Path:
    return directory / "page.sock"


def _directory_path(shared: bool) -> Path:
    """Of this process; where it shares its port, one place for all workers: they have one parent."""
    return Path(tempfile.gettempdir()) / f"{DIRECTORY}{os.getppid() if shared else os.getpid()}"


def _is_ours(directory: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        status = directory.lstat()
        return status.st_uid == os.getuid() and status.st_mode & 0o777 == 0o700
    return False


@contextlib.contextmanager
def _directory(shared: bool) -> Iterator[Path]:
    """The page's files while it is there; what a killed process left is removed first."""
    own = _directory_path(shared)
    for path in Path(tempfile.gettempdir()).glob(f"{DIRECTORY}*"):
        owner = path.name.removeprefix(DIRECTORY)
        if _is_ours(path) and (path == own or (owner.isdigit() and not _is_alive(int(owner)))):
            shutil.rmtree(path, ignore_errors=True)
    own.mkdir(mode=0o700)
    (own / "files").mkdir()
    try:
        yield own
    finally:
        shutil.rmtree(own, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
