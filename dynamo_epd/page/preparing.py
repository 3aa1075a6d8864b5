# SPDX-License-Identifier: Apache-2.0
"""What ``/ui`` says until the page is there: it asks again by itself."""

from __future__ import annotations

from starlette.responses import HTMLResponse
from starlette.types import Receive, Scope, Send

ICON = (
    "<link rel=\"icon\" href=\"data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 32 32'%3E"
    "%3Crect width='32' height='32' rx='8' fill='%230f766e'/%3E%3Cpath d='M9 16.5l5 5 9-11' fill='none' "
    "stroke='white' stroke-width='3.2' stroke-linecap='round' stroke-linejoin='round'/%3E%3C/svg%3E\">"
)
_TEXT = (
    "<!doctype html><html lang='en'><head><meta charset='utf-8'><meta http-equiv='refresh' content='2'>"
    "<meta name='viewport' content='width=device-width'><meta name='color-scheme' content='light dark'>"
    f"<title>dynamo-epd</title>{ICON}</head><body style='font-family: system-ui, sans-serif; margin: 15vh auto; "
    "max-width: 32em; padding: 0 1em'><p role='status'>The page is being prepared; it will be here in a few seconds."
    "</p></body></html>"
)


async def preparing(scope: Scope, receive: Receive, send: Send) -> None:
    """503 with Retry-After, for people and for programs."""
    await HTMLResponse(_TEXT, 503, {"retry-after": "2", "cache-control": "no-store"})(scope, receive, send)
