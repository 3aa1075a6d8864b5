# SPDX-License-Identifier: Apache-2.0
"""The names of vLLM's engine arguments, read from its source: importing vLLM takes seconds, checking a key must not."""

from __future__ import annotations

import ast
import functools
import importlib.util
from pathlib import Path

_CLASSES = ("EngineArgs", "AsyncEngineArgs")


@functools.cache
def engine_arg_names() -> frozenset[str]:
    """Field names (snake_case) of vLLM's EngineArgs and AsyncEngineArgs; empty where vLLM is not installed."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        return frozenset()
    source = Path(spec.origin).parent / "engine" / "arg_utils.py"
    tree = ast.parse(source.read_text(encoding="utf-8"))
    return frozenset(
        statement.target.id
        for node in tree.body
        if isinstance(node, ast.ClassDef) and node.name in _CLASSES
        for statement in node.body
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
    )
