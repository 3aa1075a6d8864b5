# SPDX-License-Identifier: Apache-2.0
"""Runs that are kept in this directory: text between two marks of its `README.md`, data and plots in `report/`.

What stands between the marks is a run's, unedited; the next one that is recorded replaces it, and nothing else. Goals
that a report missed have paragraphs written by hand, outside of the marks: `unexplained` says which are to be written.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
END = "<!-- its end -->"
MISSED = "## Goals that are not met"
"""The section of `README.md` that has a paragraph for each, which begins as `key_of` does."""


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


def key_of(number: int, what: str) -> str:
    """How the paragraph begins that tells of a goal of a row."""
    return f"**{number}. {what}**"


def missed(report: dict[str, Any]) -> list[str]:
    """Keys of the goals that a report, as its JSON has it, calls not met. Those of a void row are neither."""
    return [
        key_of(row["number"], goal["what"])
        for row in report["rows"]
        if not row["void"]
        for goal in row["goals"]
        if not goal["met"]
    ]


def unexplained(directory: Path = HERE) -> list[str]:
    """What is wrong with the section `MISSED`, by the report that is recorded: goals that have no paragraph there, and
    paragraphs of goals that it does not miss."""
    kept = directory / "report" / "report.json"
    keys = missed(json.loads(kept.read_text())) if kept.exists() else []
    _, _, rest = (directory / "README.md").read_text().partition(f"\n{MISSED}\n")
    section, *_ = re.split(r"^## ", rest, maxsplit=1, flags=re.MULTILINE)
    told = re.findall(r"^(\*\*\d+\. .*?\*\*)", section, re.MULTILINE)
    return [
        *(f"{key}: it is missed, and has no paragraph" for key in keys if key not in told),
        *(f"{key}: it has a paragraph, and is not missed" for key in told if key not in keys),
    ]
