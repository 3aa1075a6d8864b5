# SPDX-License-Identifier: Apache-2.0
"""What ``/openapi.json`` says beyond the routes: the bodies that they take, from the tables that check them, and the
one form of every refusal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI

from dynamo_epd.http.auth import OPEN
from dynamo_epd.http.fields import NULL, Schema

_TEXT = {"type": "string"}
_TEXT_OR_NULL = {"anyOf": [_TEXT, NULL]}
ERROR: Schema = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {"message": _TEXT, "type": _TEXT, "param": _TEXT_OR_NULL, "code": _TEXT_OR_NULL},
            "required": ["code", "message", "param", "type"],
        }
    },
    "required": ["error"],
}
"""`dynamo_epd.http.errors.error_body`."""


def describe(app: FastAPI, bodies: Mapping[str, Schema], *, keys: bool) -> None:
    """Puts ``bodies``, by the path that takes each with POST, and `ERROR` into the app's document; and with ``keys``
    that one is wanted.

    FastAPI reads no schema out of a handler that takes the raw request, and its own classes of a schema would make
    floats of bounds that are integers of 64 bits: so they are put in when it is done.
    """
    made = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = made()
            document["components"] = {"schemas": {"Error": ERROR}}
            if keys:
                document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
                document["security"] = [{"key": []}]
            refusal = {"description": "A refusal", "content": _json({"$ref": "#/components/schemas/Error"})}
            for path, operations in document["paths"].items():
                for method, operation in operations.items():
                    operation["responses"].pop("422", None)  # FastAPI's own form, which no route answers in
                    if path not in OPEN:
                        operation["responses"] |= {"4XX": refusal, "5XX": refusal}
                    elif keys:
                        operation["security"] = []
                    if method == "post" and path in bodies:
                        operation["requestBody"] = {"required": True, "content": _json(bodies[path])}
        return app.openapi_schema or {}

    app.openapi = openapi  # type: ignore[method-assign]  # as FastAPI's documentation has it


def _json(schema: Schema) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}
