# SPDX-License-Identifier: Apache-2.0
"""A graph of one service that has nothing but the page and says which of its workers was asked."""

from __future__ import annotations

from fastapi import FastAPI

from dynamo_epd.page.mount import PATH, Page, PageSettings
from dynamo_epd.sdk import async_on_start, dynamo_context, on_shutdown, service

app = FastAPI()


@service(dynamo={"namespace": "toys"}, app=app)
class Door:
    def __init__(self) -> None:
        self.page = Page()
        app.mount(PATH, self.page)
        app.add_api_route("/v1/models", self.models)

    @async_on_start
    async def start(self) -> None:
        settings = PageSettings.of_worker(tabs=["chat"], deadline=10.0, upload_bytes=1024 * 1024)
        self.page.open(settings, dynamo_context["stopping"])

    @on_shutdown
    async def stop(self) -> None:
        await self.page.close()

    async def models(self) -> dict[str, object]:
        return {"data": [{"id": f"worker-{dynamo_context['worker_index']}", "max_model_len": 1}]}
