# SPDX-License-Identifier: Apache-2.0
# mypy: disable-error-code="attr-defined"
"""A graph as it was written for the old SDK; nothing in it is ours."""

import logging

from fastapi.responses import StreamingResponse
from pydantic import BaseModel

from dynamo.sdk import DYNAMO_IMAGE, api, async_on_start, depends, dynamo_context, dynamo_endpoint, service
from dynamo.sdk.lib.config import ServiceConfig

logger = logging.getLogger(__name__)


class RequestType(BaseModel):
    text: str


class ResponseType(BaseModel):
    text: str


@service(
    dynamo={"enabled": True, "namespace": "inference"},
    resources={"cpu": "2", "gpu": 1},
    workers=2,
    image=DYNAMO_IMAGE,
)
class Backend:
    def __init__(self) -> None:
        config = ServiceConfig.get_instance()
        self.message = config.get("Backend", {}).get("message", "back")
        self.args = config.as_args("Backend", prefix="engine-")
        self.started = False

    @async_on_start
    async def async_init(self):
        assert dynamo_context["runtime"] is not None
        self.started = True

    @dynamo_endpoint()
    async def generate(self, req: RequestType):
        assert self.started
        text = f"{req.text}-{self.message}"
        for token in text.split():
            yield f"Backend: {token} {' '.join(self.args)}"


@service(dynamo={"enabled": True, "namespace": "inference"}, resources={"cpu": "1"})
class Middle:
    backend = depends(Backend)

    def __init__(self) -> None:
        self.message = ServiceConfig.get_instance().get("Middle", {}).get("message", "mid")

    @dynamo_endpoint(name="generate")
    async def produce(self, req: RequestType):
        next_request = RequestType(text=f"{req.text}-{self.message}").model_dump_json()
        async for response in self.backend.generate(next_request):
            yield f"Middle: {response}"


@service(dynamo={"enabled": True, "namespace": "inference"}, resources={"cpu": "1"})
class Frontend:
    middle = depends(Middle)

    def __init__(self) -> None:
        self.port = ServiceConfig.get_instance().require("Frontend", "greeting")

    @api()
    async def generate(self, request: RequestType):
        async def content():
            async for response in self.middle.generate(request.model_dump_json()):
                yield f"{self.port} {response}\n"

        return StreamingResponse(content())


Frontend.link(Middle).link(Backend)
