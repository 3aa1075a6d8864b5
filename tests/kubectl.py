# SPDX-License-Identifier: Apache-2.0
"""kubectl: that of requirements-dev.txt, which is the same everywhere, else what this machine has. Where that is none,
or too old, a test that needs it is skipped and says so.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

OLDEST = (1, 21)
"""The first whose `kubectl kustomize` knows components."""


def run(*arguments: str, text: str | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    """What it does with these arguments, ``text`` as its standard input and ``variables`` in its environment."""
    command = [needed(), *arguments]
    return subprocess.run(
        command, input=text, env=environment(**variables), capture_output=True, text=True, timeout=120, check=False
    )


def needed() -> str:
    """Its path. Skips the test that asks where there is none that will do."""
    path, trouble = _look(environment()["PATH"])
    if trouble:
        pytest.skip(f"{trouble}; what is then not checked: deploy/README.md")
    return path


def environment(**variables: str) -> dict[str, str]:
    """In which a shell finds the same one by its name."""
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", **variables}


@functools.cache
def _look(search: str) -> tuple[str, str]:
    """Where it is, and why it will not do."""
    path = shutil.which("kubectl", path=search)
    if path is None:
        return "", "no kubectl here"
    ran = subprocess.run([path, "version", "--client", "-o", "json"], capture_output=True, text=True, timeout=120)
    version = re.search(r'"gitVersion": *"v((\d+)\.(\d+)[^"]*)"', ran.stdout)
    if version is None:
        return path, "this kubectl does not tell its version"
    if (int(version[2]), int(version[3])) < OLDEST:
        return path, f"kubectl {version[1]} is older than {OLDEST[0]}.{OLDEST[1]}"
    return path, ""
