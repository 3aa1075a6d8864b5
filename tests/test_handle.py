# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import msgspec
import pytest

from dynamo_epd.errors import HandOffFailed
from dynamo_epd.transfer import Handle

GOOD = Handle("encode/1", "arena-1", "ab-0", 256, 24, (2, 3), "float32", "0" * 32, 1e12, True)


def test_a_handle_survives_json() -> None:
    assert msgspec.json.decode(msgspec.json.encode(GOOD), type=Handle) == GOOD
    GOOD.check()


@pytest.mark.parametrize(
    "forged",
    [
        {"length": 23},
        {"length": -24, "shape": (-2, 3)},
        {"shape": (2, 3, 1, 1, 1, 1, 1, 1, 1)},
        {"shape": (-2, -3)},
        {"shape": (2**62, 2**62)},
        {"shape": ()},
        {"dtype": "object"},
        {"dtype": "bytes"},
        {"offset": -1},
        {"digest": ""},
        {"lease": ""},
        {"lease": "x" * 65},
        {"incarnation": ""},
        {"lease_end": math.nan},
        {"lease_end": math.inf},
    ],
)
def test_a_handle_that_disagrees_with_itself_is_refused(forged: dict[str, Any]) -> None:
    with pytest.raises(HandOffFailed):
        msgspec.structs.replace(GOOD, **forged).check()


def test_a_handle_ends_within_its_owners_arena() -> None:
    GOOD.check_within(280)
    with pytest.raises(HandOffFailed):
        GOOD.check_within(279)


def test_importing_it_imports_nothing_heavy() -> None:
    heavy = {"nixl", "nixl_cu13", "nixl_cu12", "torch", "numpy"}
    code = f"import sys, dynamo_epd.transfer; print({heavy} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
