# SPDX-License-Identifier: Apache-2.0
"""Sharing out GPUs: whole cards to whole requests, one card to several fractions.

A ``resources.gpu`` that a decorator carries is a wish: on a machine without any GPU the service runs on the CPU. One
that the configuration carries is an order: too few is an error.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence

from dynamo_epd.sdk.config import ConfigError, ServiceSettings

FRACTION = "DYNAMO_GPU_FRACTION"
"""Environment of a worker that shares a card: the share of its memory that an engine may take."""


@dataclasses.dataclass(frozen=True)
class Share:
    """``devices`` as CUDA_VISIBLE_DEVICES names them; ``fraction`` of the one card, 1.0 for whole cards."""

    devices: tuple[str, ...]
    fraction: float = 1.0

    def as_environment(self) -> dict[str, str]:
        environment = {"CUDA_VISIBLE_DEVICES": ",".join(self.devices)}
        if self.fraction < 1:
            environment[FRACTION] = f"{self.fraction:g}"
        return environment


def visible_gpus(environment: Mapping[str, str] = os.environ) -> list[str]:
    """The cards that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    given = environment.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        devices = [one.strip() for one in given.split(",") if one.strip()]
        return devices[: devices.index("-1")] if "-1" in devices else devices
    if shutil.which("nvidia-smi") is None:
        return []
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=10, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [str(index) for index, _ in enumerate(line for line in listed.splitlines() if line.startswith("GPU "))]


def share_out(requests: Sequence[tuple[str, float]], devices: Sequence[str]) -> dict[str, Share]:
    """Cards for each (worker, number of GPUs) with a number above 0. Raises TooFewGpus."""
    shares: dict[str, Share] = {}
    free = list(devices)
    wanted = sum(request for _, request in requests)
    for worker, request in requests:
        if request >= 1:
            if request != int(request):
                raise ConfigError(f"{worker}: resources.gpu {request:g} is neither whole nor a fraction of one card")
            if len(free) < request:
                raise _too_few(worker, wanted, devices)
            shares[worker] = Share(tuple(free[: int(request)]))
            del free[: int(request)]
    left: dict[str, float] = {}
    for worker, request in requests:
        if not 0 < request < 1:
            continue
        card = next((one for one, room in left.items() if room >= request - 1e-9), None)
        if card is None:
            if not free:
                raise _too_few(worker, wanted, devices)
            card = free.pop(0)
            left[card] = 1.0
        left[card] -= request
        shares[worker] = Share((card,), request)
    return shares


class TooFewGpus(ConfigError):
    """The graph asks for more cards than are visible."""


def _too_few(worker: str, wanted: float, devices: Sequence[str]) -> TooFewGpus:
    return TooFewGpus(f"too few GPUs: {worker} finds none left; the graph asks for {wanted:g}, visible: {len(devices)}")


def gpus_for(settings: Mapping[str, ServiceSettings], devices: Sequence[str]) -> dict[str, Share]:
    """The share of each worker (``Service-index``), among the services that run."""
    requests: list[tuple[str, float]] = []
    for name, one in settings.items():
        try:
            request = float(one.resources.get("gpu") or 0)
        except ValueError as error:
            raise ConfigError(f"{name}: resources.gpu {one.resources['gpu']!r} is not a number") from error
        if request < 0:
            raise ConfigError(f"{name}: resources.gpu is negative")
        if request and one.runs and (devices or one.resources_configured):
            requests += [(f"{name}-{index}", request) for index in range(one.workers)]
    return share_out(requests, devices)
