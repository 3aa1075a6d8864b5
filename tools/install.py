# SPDX-License-Identifier: Apache-2.0
"""Fills a virtual environment with the CPU set, step by step and visibly. Needs nothing but Python itself.

    python3.11 tools/install.py .venv

The order matters. torch goes first, alone: where a CPU build is on offer pip takes it, elsewhere the CUDA build comes
with all it needs. The rest follows with exact pins and ``--no-deps``: three of its packages require others that break
it beside CPU torch (torchaudio, torchcodec) or fail to install without the network (aisimulate).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def torch_pin() -> str:
    """``torch==…`` as the comment in requirements-cpu.txt says it."""
    for line in (ROOT / "requirements-cpu.txt").read_text().splitlines():
        if line.startswith("# torch=="):
            return line.removeprefix("# ")
    raise SystemExit("requirements-cpu.txt does not name torch")


def pip(python: Path, title: str, expected: int, *arguments: str) -> None:
    """Runs pip and shows one line that counts packages. ``expected`` is how many there are."""
    command = [str(python), "-m", "pip", "install", "--no-input", "--disable-pip-version-check", "--no-compile"]
    command += arguments
    started, seen = time.monotonic(), 0
    tail: list[str] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        for line in process.stdout:
            tail = [*tail[-30:], line]
            if line.startswith(("Collecting ", "Obtaining ", "Processing ")):
                seen += 1
                show(f"{title}: {min(seen, expected)}/{expected} {line.split()[1][:50]}", passing=True)
            elif line.startswith("Installing collected"):
                show(f"{title}: unpacking {seen} packages", passing=True)
    if process.returncode != 0:
        print("".join(tail), file=sys.stderr)
        raise SystemExit(f"{title}: pip failed with exit status {process.returncode}")
    show(f"{title}: done in {time.monotonic() - started:.0f} s")


def compile_all(python: Path, environment: Path, title: str) -> None:
    """What pip would do in one process, and what imports would do in each: a graph starts a dozen at once."""
    started = time.monotonic()
    show(title, passing=True)
    (packages,) = environment.glob("lib/python3*/site-packages")
    # Not checked: some packages have templates and tests beside their code that are no Python.
    subprocess.run([python, "-m", "compileall", "-q", "-j", "0", packages], check=False, capture_output=True)
    show(f"{title}: done in {time.monotonic() - started:.0f} s")


def show(text: str, *, passing: bool = False) -> None:
    """One line; a ``passing`` one is overwritten by the next, and left out where nobody watches."""
    if sys.stdout.isatty():
        print(f"\r\033[K{text}", end="" if passing else "\n", flush=True)
    elif not passing:
        print(text, flush=True)


def pins(*names: str) -> list[str]:
    lines = [line for name in names for line in (ROOT / name).read_text().splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("environment", type=Path)
    environment = parser.parse_args().environment
    if sys.version_info < (3, 11):
        raise SystemExit(f"Python 3.11 or newer is needed; this is {sys.version.split()[0]}")
    python = environment / "bin" / "python"
    show("[1/5] virtual environment")
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    pip(python, "[2/5] torch", 12, torch_pin())
    files = ("requirements-cpu.txt", "requirements-dev.txt")
    given = [argument for name in files for argument in ("-r", name)]
    pip(python, "[3/5] vLLM, NIXL, the Dynamo runtime and what they need", len(pins(*files)), "--no-deps", *given)
    pip(python, "[4/5] dynamo-epd itself", 1, "--no-deps", "--no-build-isolation", "--editable", ".")
    compile_all(python, environment, "[5/5] compiling what was installed")


if __name__ == "__main__":
    main()
