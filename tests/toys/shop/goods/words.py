# SPDX-License-Identifier: Apache-2.0
"""Labels, from a file that lies beside this one."""

from pathlib import Path


def label(what: str) -> str:
    return Path(__file__).with_name("label.txt").read_text().strip().format(what)
