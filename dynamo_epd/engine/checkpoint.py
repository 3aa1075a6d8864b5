# SPDX-License-Identifier: Apache-2.0
"""What can be told of a checkpoint without loading it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def revision_of(engine_args: Mapping[str, Any]) -> str:
    """Two encoders with the same revision give the same embedding for the same picture.

    SHA-256 over the model's name and version, dtype and image processor arguments and, for a local directory, its
    configuration files' bytes and its weights' names, sizes and times of change. 64 hex characters.
    """
    parts = [str(engine_args.get(key)) for key in ("model", "revision", "dtype", "mm_processor_kwargs", "quantization")]
    directory = Path(str(engine_args.get("model", "")))
    if directory.is_dir():
        for path in sorted(directory.iterdir()):
            if path.suffix in (".json", ".jinja"):
                parts.append(hashlib.sha256(path.read_bytes()).hexdigest())
            elif path.suffix == ".safetensors":
                status = path.stat()
                parts.append(f"{path.name} {status.st_size} {status.st_mtime_ns}")
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
