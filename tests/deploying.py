# SPDX-License-Identifier: Apache-2.0
"""The `dynamo` command in this process, on a copy of the toy shop, with a state directory of its own."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pytest

from dynamo_epd.sdk.cli import main
from dynamo_epd.sdk.deployment import builds
from tests.toys.running import ROOT

SHOP = ROOT / "tests" / "toys" / "shop"
UNWANTED = ("KUBE_NS", "KUBECONFIG", "DYNAMO_CLOUD", "DYNAMO_IMAGE", "DYNAMO_REGISTRY", "DYNAMO_ENV_SECRETS")


class Desk:
    """Where a person sits who builds and deploys. ``shop`` is the copy, ``state`` what stays of it all."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
        self.directory = directory
        self.shop = directory / "shop"
        self.state = directory / "state"
        self.patch = monkeypatch
        self._capsys = capsys
        self.said = self.noted = ""
        for name in UNWANTED:
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("XDG_STATE_HOME", str(self.state))
        monkeypatch.setenv("KUBECONFIG", str(directory / "no-kubeconfig"))
        monkeypatch.setattr(sys, "path", list(sys.path))
        self.library_files = builds.library_files
        # 130 files that are the same in every test; those that look for them put this back.
        few = {name: ROOT / name for name in (builds.PROJECT, builds.REQUIREMENTS)}
        monkeypatch.setattr(builds, "library_files", lambda: few)
        shutil.copytree(SHOP, self.shop, ignore=shutil.ignore_patterns("__pycache__"))

    def run(self, *arguments: str) -> int:
        """The exit status. ``said`` is what went to standard output, ``noted`` what went to standard error."""
        self._capsys.readouterr()
        try:
            return main(list(arguments))
        finally:
            self.said, self.noted = self._capsys.readouterr()

    def build(self, *arguments: str, graph: str = "shop:Door", where: Path | None = None) -> str:
        """The tag, cut out as scripts do."""
        for name in [one for one in sys.modules if one.partition(".")[0] in ("shop", "goods")]:
            del sys.modules[name]
        status = self.run("build", graph, "--working-dir", str(where or self.shop), *arguments)
        assert status == 0, self.noted
        built = re.fullmatch(r"Successfully built ([a-z-]+:[0-9a-f]{8})\.", self.said.splitlines()[-1])
        assert built is not None, self.said
        return built[1]


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Desk:
    return Desk(tmp_path, monkeypatch, capsys)
