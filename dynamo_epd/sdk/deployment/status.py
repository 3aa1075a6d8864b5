# SPDX-License-Identifier: Apache-2.0
"""What a deployment's status says, for people."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from typing import Any

from dynamo_epd.sdk.deployment.manifest import BUILD, components_of
from dynamo_epd.sdk.operator import HTTP_PORT

READY = "ready"


def state(live: dict[str, Any], asked: Mapping[str, int] | None = None) -> str:
    """``ready``, or what is missing. ``asked``: replicas that scaling adapters were just told of. Until the operator
    follows them the deployment is as before, generation and all, and the old status calls it ready.
    """
    status = live.get("status") or {}
    if not _seen(live):
        return "the operator has not seen it yet"
    condition = next((one for one in status.get("conditions") or [] if one["type"] == "Ready"), None)
    if condition is not None and condition["status"] == "True":
        behind = _behind(live, asked or {})
        return f"scaling ({', '.join(behind)})" if behind else READY
    missing = [
        f"{name} {_up(one)}/{one['replicas']}"
        for name, one in (status.get("components") or {}).items()
        if _up(one) < one["replicas"]
    ]
    said = (condition or {}).get("message") or status.get("state") or "pending"
    return f"{said} ({', '.join(missing)})" if missing else str(said)


def _behind(live: dict[str, Any], asked: Mapping[str, int]) -> list[str]:
    components, counts = components_of(live), live["status"].get("components") or {}
    found = []
    for name, replicas in asked.items():
        up = _up(counts.get(name, {}))
        if not components.get(name, {}).get("replicas", 1) == replicas == up:
            found.append(f"{name} {up}/{replicas}")
    return found


def failed(live: dict[str, Any]) -> bool:
    """Whether the operator has given up."""
    return _seen(live) and live["status"].get("state") == "failed"


def _seen(live: dict[str, Any]) -> bool:
    """Whether the status is of what is wanted now. An operator that does not number it is believed."""
    status = live.get("status") or {}
    generation = live["metadata"].get("generation", 0)
    return bool(status) and status.get("observedGeneration", generation) >= generation


def _up(count: dict[str, Any]) -> int:
    """Scaling groups have no count of what is ready, only of what is available."""
    return int(count.get("readyReplicas", count.get("availableReplicas", 0)))


def frontend_service(live: dict[str, Any]) -> str:
    """The Service that the operator makes for the frontend (``<deployment>-<component>``, in lower case)."""
    components = live["spec"].get("components") or []
    name = next((one["name"] for one in components if one.get("type") == "frontend"), "Frontend")
    return f"{live['metadata']['name']}-{name.lower()}"


def describe(live: dict[str, Any], addresses: list[str]) -> str:
    """Several lines: the deployment, its components, where it answers."""
    metadata = live["metadata"]
    namespace, service = metadata["namespace"], frontend_service(live)
    lines = [
        f"name:      {metadata['name']}",
        f"namespace: {namespace}",
        f"build:     {_build(live)}",
        f"state:     {state(live)}",
    ]
    counts = (live.get("status") or {}).get("components") or {}
    for one in live["spec"].get("components") or []:
        count = counts.get(one["name"], {})
        lines.append(f"  {one['name']} ({one.get('type', 'worker')}): {_ready(count, one)}")
    lines += [f"url:       {address}" for address in addresses]
    if not addresses:
        lines.append(f"url:       http://{service}.{namespace}.svc:{HTTP_PORT} inside the cluster; from outside after")
        lines.append(f"           kubectl port-forward service/{service} {HTTP_PORT}:{HTTP_PORT} -n {namespace}")
    return "\n".join(lines)


def _ready(count: dict[str, Any], component: dict[str, Any]) -> str:
    return f"{_up(count)} of {count.get('replicas', component.get('replicas', 1))} ready"


def table(found: list[dict[str, Any]]) -> str:
    """One line a deployment, under a head."""
    rows = [("NAME", "BUILD", "STATE", "AGE")]
    for live in found:
        age = _age(live["metadata"].get("creationTimestamp"))
        rows.append((live["metadata"]["name"], _build(live), state(live), age))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _build(live: dict[str, Any]) -> str:
    return str((live["metadata"].get("annotations") or {}).get(BUILD, "-"))


def _age(created: str | None) -> str:
    if not created:
        return "-"
    seconds = (datetime.datetime.now(datetime.UTC) - datetime.datetime.fromisoformat(created)).total_seconds()
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f}{unit}"
    return f"{max(0.0, seconds):.0f}s"
