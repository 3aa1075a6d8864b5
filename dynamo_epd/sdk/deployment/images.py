# SPDX-License-Identifier: Apache-2.0
"""A build as an image: the Dockerfile that is part of it, and docker or podman to make and push what it says."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from dynamo_epd.sdk.deployment import DeploymentError

REGISTRY = "DYNAMO_REGISTRY"
"""Environment: where images of builds are pushed to and pulled from, as ``registry.example/team``."""
IMAGE = "DYNAMO_IMAGE"
"""Environment: an image that was made by other means, has the graph's code, and runs as `USER` too."""
BASE = "python:3.11.13-slim-bookworm@sha256:86adf8dbadc3d6e82ee5dd2c74bec2e1c2467cdad47886280501df722372d2e1"
"""For both images: the CUDA libraries come with torch's wheels, the driver with the node's container runtime. It is the
digest that counts, that of the index of all architectures; the tag tells a reader what it is.
"""
DEVICES = ("cpu", "gpu")
USER = 1000
"""Of both images. A number: of a name Kubernetes cannot tell whether it is root."""
ANSWER_SECONDS = 20.0
"""For a daemon to say that it is there."""

_HEAD = f"""\
# Images of this build: `docker build --target cpu .` or `--target gpu`.
FROM {BASE} AS base
RUN apt-get update \\
 && apt-get install -y --no-install-recommends g++ libnuma1 \\
 && rm -rf /var/lib/apt/lists/* \\
 && useradd --uid {USER} --create-home dynamo
# An index that offers torch without CUDA makes the CPU image smaller by some gigabytes.
ARG PIP_EXTRA_INDEX_URL
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1
WORKDIR /workspace

"""
_TAIL = f"""\
COPY code /workspace
USER {USER}
ENTRYPOINT ["dynamo"]
"""


def dockerfile(*, with_library: bool, version: str, requirements: str) -> str:
    """Two targets, ``cpu`` and ``gpu``. Without the library in the build it comes from the package index.
    ``requirements`` is the text of requirements-cpu.txt, which is in the build either way.
    """
    torch = _torch(requirements)
    if with_library:
        own = "COPY library /library\nRUN pip install --no-deps /library\n"
        gpu = f"RUN pip install {torch}\nCOPY library /library\nRUN pip install '/library[gpu]'\n"
    else:
        own = f"RUN pip install --no-deps dynamo-epd=={version}\n"
        gpu = f"RUN pip install {torch} && pip install 'dynamo-epd[gpu]=={version}'\n"
    # torch goes first, by itself: requirements-cpu.txt says why.
    cpu = (
        "COPY library/requirements-cpu.txt /library/\n"
        f"RUN pip install {torch} && pip install --no-deps -r /library/requirements-cpu.txt\n{own}"
    )
    # Which cards is for who starts the container: said here, pods that ask for none would be given all of them where
    # NVIDIA's runtime is the node's own.
    nvidia = "ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility\n"
    return f"{_HEAD}FROM base AS cpu\n{cpu}{_TAIL}\nFROM base AS gpu\n{nvidia}{gpu}{_TAIL}"


def _torch(requirements: str) -> str:
    """``torch==…``, as the comment there says it."""
    return next(line.removeprefix("# ") for line in requirements.splitlines() if line.startswith("# torch=="))


def engine() -> str:
    """docker or podman, whichever answers. Raises DeploymentError."""
    found = [name for name in ("docker", "podman") if shutil.which(name)]
    for name in found:
        try:
            # `version` asks docker's daemon; podman has none and answers by itself.
            ran = subprocess.run(
                [name, "version"],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=ANSWER_SECONDS,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired):
            continue
        if ran.returncode == 0:
            return name
    if found:
        raise DeploymentError(
            f"{' and '.join(found)} is installed, but no daemon answers: the image cannot be made here"
        )
    raise DeploymentError("neither docker nor podman is installed: the image cannot be made here")


def containerize(directory: Path, image: str, device: str) -> None:
    """Makes ``image`` of the build in ``directory``. Raises DeploymentError."""
    _run([engine(), "build", "--target", device, "--tag", image, str(directory)], f"the image {image} was not made")


def push(image: str) -> None:
    """Raises DeploymentError."""
    _run([engine(), "push", image], f"{image} was not pushed")


def _run(command: list[str], failed: str) -> None:
    status = subprocess.run(command, stdin=subprocess.DEVNULL, check=False).returncode
    if status != 0:
        raise DeploymentError(f"{failed}: {command[0]} ended with exit status {status}")


def name_of(tag: str) -> str:
    """The image of a build: its tag, in the registry and path of ``DYNAMO_REGISTRY`` where that is set."""
    registry = os.environ.get(REGISTRY, "").rstrip("/")
    return f"{registry}/{tag}" if registry else tag


def deployed(tag: str) -> str:
    """What pods run: the build's own image where it has a registry, else ``DYNAMO_IMAGE``, else the bare tag."""
    return name_of(tag) if os.environ.get(REGISTRY) else os.environ.get(IMAGE) or tag
