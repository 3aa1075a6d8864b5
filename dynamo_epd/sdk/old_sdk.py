# SPDX-License-Identifier: Apache-2.0
"""`ServiceConfig`: the old SDK's view of the configuration, a dict of service name → its keys."""

from __future__ import annotations

import json
import os
from typing import Any, ClassVar

ENVIRONMENT = "DYNAMO_SERVICE_CONFIG"
_NOT_ARGUMENTS = ("ServiceArgs", "common-configs")


class ServiceConfig(dict[str, Any]):
    """The resolved configuration of every service, from the worker's environment."""

    _instance: ClassVar[ServiceConfig | None] = None

    @classmethod
    def get_instance(cls) -> ServiceConfig:
        """The configuration of this process, read once."""
        if cls._instance is None:
            cls._instance = cls(json.loads(os.environ.get(ENVIRONMENT) or "{}"))
        return cls._instance

    @classmethod
    def get_parsed_config(cls, service_name: str) -> dict[str, Any]:
        """The keys of one service."""
        return dict(cls.get_instance().get(service_name, {}))

    def require(self, service_name: str, key: str) -> Any:
        """The value of ``key``. Raises ValueError when it is not configured."""
        if service_name not in self or key not in self[service_name]:
            raise ValueError(f"{service_name}.{key} must be specified in configuration")
        return self[service_name][key]

    def as_args(self, service_name: str, prefix: str = "") -> list[str]:
        """One service's keys as a command line: ``["--key", "value", "--flag"]``.

        With ``prefix`` only the keys that start with it, without it.
        """
        arguments: list[str] = []
        for key, value in self.get(service_name, {}).items():
            if key in _NOT_ARGUMENTS or not key.startswith(prefix):
                continue
            flag = "--" + key[len(prefix) :]
            if isinstance(value, bool):
                arguments += [flag] if value else []
            elif isinstance(value, dict):
                arguments += [flag, json.dumps(value)]
            else:
                arguments += [flag, str(value)]
        return arguments
