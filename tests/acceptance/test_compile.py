# SPDX-License-Identifier: Apache-2.0
"""The image worker's `compile` switch. Minutes: a compiler works on each denoiser."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dynamo_epd.diffusion.generator import Generator
from tests.serving import untrained
from tests.test_generator import RING, START, WANTED, expected, make, plain
from tests.toys.running import ROOT


@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no compiler")
@pytest.mark.parametrize("family", ["flux", "sdxl"])
def test_a_compiled_denoiser_makes_the_same_picture_before_and_after_another_size(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # a test that is killed leaves half a library there
    one = Generator(str(untrained(family)), compile=True)
    first = make(one, WANTED).pixels
    assert np.abs(first.astype(int) - expected(plain(family), WANTED)).max() <= 2
    other = replace(WANTED, width=96, height=40, prompt=RING)
    assert np.abs(make(one, other).pixels.astype(int) - expected(plain(family), other)).max() <= 2
    np.testing.assert_array_equal(make(one, WANTED).pixels, first)


def test_compiling_without_a_compiler_is_an_error_at_start() -> None:
    start = START.replace("Generator(sys.argv[1])", "Generator(sys.argv[1], compile=True)")
    command = [sys.executable, "-c", start, str(untrained("flux"))]
    environment = os.environ | {"CXX": "/bin/false"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500, check=True)
    assert done.stdout.startswith("said: compile is on, and this machine cannot")
    assert done.stdout.count("\n") == 1
