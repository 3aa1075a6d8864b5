# SPDX-License-Identifier: Apache-2.0
"""The frontend's OpenAPI document, without a graph."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi import FastAPI

from components import frontend


def document() -> dict[str, Any]:
    """As ``/openapi.json`` has it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frontend, "app", FastAPI(title="dynamo-epd"))
        frontend.Frontend()
        return frontend.app.openapi()
