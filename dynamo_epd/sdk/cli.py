# SPDX-License-Identifier: Apache-2.0
"""The ``dynamo`` command."""

from __future__ import annotations

import argparse
import sys
import traceback

from dynamo_epd.sdk.config import ConfigError, split_overrides
from dynamo_epd.sdk.graph import GraphError

BAD_CONFIG = 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dynamo", description="Serves graphs of services.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    serve = commands.add_parser(
        "serve",
        allow_abbrev=False,
        help="run a graph on this machine",
        epilog="--Service.key=value overrides the configuration file.",
    )
    serve.add_argument("graph", help="module[:Service] or path/to/file.py[:Service]")
    serve.add_argument("-f", "--config-file", "--file", dest="file", help="YAML: service names, and Common")
    serve.add_argument("--service-name", help="run that service alone in this terminal")
    serve.add_argument("--depends", action="append", default=[], metavar="Service=namespace/component")
    serve.add_argument("-p", "--port", type=int, default=8000)
    serve.add_argument("--host", default="127.0.0.1")
    serve.add_argument("--working-dir", help="where the graph's modules are found (default: here)")
    serve.add_argument("--dry-run", action="store_true", help="print the resolved configuration and the environment")
    serve.add_argument("-v", "--verbose", action="store_true", help="show everything that the workers print")
    commands.add_parser("env", help="versions and devices of this machine")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit status: 2 for a configuration that cannot be run."""
    try:
        rest, overrides = split_overrides(sys.argv[1:] if argv is None else argv)
        arguments = _parser().parse_args(rest)
        if arguments.command == "env":
            from dynamo_epd.sdk.machine import describe

            print(describe())
            return 0
        from dynamo_epd.sdk.serve import serve

        return serve(arguments, overrides)
    except (ConfigError, GraphError) as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_CONFIG
    except ImportError:
        traceback.print_exc()  # of the user's module: the place is what helps
        return BAD_CONFIG


if __name__ == "__main__":
    sys.exit(main())
