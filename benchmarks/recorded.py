# SPDX-License-Identifier: Apache-2.0
"""Runs that are kept in this directory: text between two marks of its `README.md`, data and plots in `report/`.

What stands between the marks is a run's, unedited; the next one that is recorded replaces it, and nothing else.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
END = "<!-- its end -->"


def begin(name: str) -> str:
    """The mark before a block; `END` is the one after it."""
    return f"<!-- the last {name} -->"


def put(name: str, text: str, readme: Path) -> None:
    """``text``, whole lines, becomes the block. Raises ValueError where it has none of this name."""
    before, mark, rest = readme.read_text().partition(begin(name))
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"{readme} has no block {begin(name)} … {END}")
    readme.write_text(f"{before}{mark}\n{text}{END}{after}")


def keep(name: str, text: str, files: Sequence[Path], directory: Path = HERE) -> None:
    """`put`, and the files beside it; what links to one of them in the text leads there."""
    kept = directory / "report"
    kept.mkdir(exist_ok=True)
    for file in files:
        shutil.copy(file, kept)
        text = text.replace(f"]({file.name})", f"]({kept.name}/{file.name})")
    put(name, text, directory / "README.md")
