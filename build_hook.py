# SPDX-License-Identifier: Apache-2.0
"""Puts ``dynamo_epd.pth`` beside the packages, in wheels and editable installs: see dynamo_epd/torchvision_ops.py."""

from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class PthHook(BuildHookInterface):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        kind = "force_include_editable" if version == "editable" else "force_include"
        build_data[kind]["dynamo_epd.pth"] = "dynamo_epd_startup.pth"
