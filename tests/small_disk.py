# SPDX-License-Identifier: Apache-2.0
"""A disk that is soon full: a tmpfs, which takes root."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk(path: Path, size: str) -> Iterator[Path]:
    """``path`` takes ``size`` (as mount says it: ``1m``) inside the block. Skips where nothing can be mounted."""
    path.mkdir(exist_ok=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path]).returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    try:
        yield path
    finally:
        subprocess.run(["umount", path], check=True)


def enlarge(disk: Path, size: str) -> None:
    """Room for what waits."""
    subprocess.run(["mount", "-o", f"remount,size={size}", disk], check=True)
