# SPDX-License-Identifier: Apache-2.0
"""The ``dynamo`` command."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from dynamo_epd.sdk.config import ConfigError, split_overrides
from dynamo_epd.sdk.deployment import DeploymentError
from dynamo_epd.sdk.deployment.commands import add_parsers
from dynamo_epd.sdk.graph import GraphError, ModuleFailed

FAILED, BAD_CONFIG = 1, 2
Overrides = list[tuple[str, str, str]]


class _Parser(argparse.ArgumentParser):
    """What it cannot read is said in one line, like all that is wrong. Sub-commands are of this class too."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see `{self.prog} --help`")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="dynamo", description="Serves, builds and deploys graphs of services.", allow_abbrev=False)
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
    serve.add_argument(
        "--depends",
        action="append",
        default=[],
        metavar="Service=namespace/component",
        help="where a stage is served that this graph is to use",
    )
    serve.add_argument("-p", "--port", type=int, default=8000, help="of the frontend (default: %(default)s)")
    serve.add_argument(
        "--host", default="127.0.0.1", help="that it listens on (default: %(default)s: this machine alone)"
    )
    serve.add_argument("--working-dir", help="where the graph's modules are found (default: here)")
    serve.add_argument("--dry-run", action="store_true", help="print the resolved configuration and the environment")
    serve.add_argument("-v", "--verbose", action="store_true", help="show everything that the workers print")
    serve.set_defaults(run=_serve)
    _add_scale(commands.add_parser("scale", allow_abbrev=False, help="change how many workers a running graph has"))
    _add_top(commands.add_parser("top", allow_abbrev=False, help="watch the stages of a running graph"))
    add_parsers(commands)
    _add_batch(
        commands.add_parser("batch", allow_abbrev=False, help="make pictures of a file of prompts, and judge them")
    )
    key = commands.add_parser("key", allow_abbrev=False, help="draw an API key, and show it once")
    key.add_argument("name", help="of the tenant who will use it")
    key.set_defaults(run=_key)
    commands.add_parser("env", help="versions and devices of this machine").set_defaults(run=_env)
    return parser


def _add_scale(scale: argparse.ArgumentParser) -> None:
    scale.add_argument("graph", help="a graph that runs on this machine, named as `dynamo serve` was told")
    scale.add_argument("workers", nargs="*", metavar="Service=N", help="how many there shall be; none: how many are")
    scale.add_argument("--wait", action=argparse.BooleanOptionalAction, default=True, help="until it is so (default)")
    scale.add_argument("--timeout", type=float, default=600.0, help="seconds to wait (default: %(default)g)")
    scale.add_argument("--pid", type=int, help="of `dynamo serve`, where several run the same graph")
    scale.set_defaults(run=_scale)


def _add_top(top: argparse.ArgumentParser) -> None:
    top.add_argument("graph", nargs="?", help="as `dynamo serve` was told (default: the one that runs)")
    top.add_argument("--interval", type=float, default=2.0, metavar="S", help="seconds (default: %(default)g)")
    top.add_argument("--once", action="store_true", help="one interval as a plain table; so without a terminal, too")
    top.add_argument("--json", action="store_true", help="one interval as JSON")
    top.add_argument("--pid", type=int, help="of `dynamo serve`, where several run the same graph")
    top.set_defaults(run=_top)


def _add_batch(batch: argparse.ArgumentParser) -> None:
    batch.epilog = (
        "Run again with the same directory, it goes on where it was: what is done is not asked again. "
        "Exit status: 0 all is done and matches, 1 something failed, 2 nothing could be done, "
        "3 all is done and some pictures do not match their prompts, 130 interrupted."
    )
    batch.add_argument("prompts", help="a text file with a prompt a line, JSON lines, or - for standard input")
    batch.add_argument("-o", "--output", required=True, metavar="DIRECTORY", help="pictures, and results.jsonl")
    batch.add_argument("--url", default="http://127.0.0.1:8000", help="of a running graph (default: %(default)s)")
    batch.add_argument("--concurrency", type=int, default=4, help="prompts at a time (default: %(default)s)")
    what = batch.add_mutually_exclusive_group()
    what.add_argument("--images", dest="validate", action="store_false", help="make the pictures, judge nothing")
    what.add_argument("--validate", action="store_true", default=True, help="caption and compare too (default)")
    batch.add_argument("--size", help="WIDTHxHEIGHT, or a name that the graph's configuration gives a size")
    batch.add_argument("--quality", help="a name that the graph's configuration gives a number of steps")
    batch.add_argument("--num-inference-steps", type=int, help="denoise steps (default: the graph's)")
    batch.add_argument("--seed", type=int, help="of every prompt (default: one that follows from the prompt)")
    batch.add_argument("--threshold", type=float, help="similarity from which a picture matches")
    batch.add_argument("--output-format", choices=("png", "webp", "jpeg"), help="default: png")
    batch.add_argument("--timeout", type=float, default=600.0, help="seconds for a prompt with all of its attempts")
    batch.add_argument(
        "--api-key-env",
        metavar="NAME",
        help="environment variable with the key (default: OPENAI_API_KEY, which goes to --url where it is set)",
    )
    batch.set_defaults(run=_batch)


def _serve(arguments: argparse.Namespace, overrides: Overrides) -> int:
    from dynamo_epd.sdk.serve import serve

    return serve(arguments, overrides)


def _scale(arguments: argparse.Namespace, overrides: Overrides) -> int:
    from dynamo_epd.sdk.control import scale

    if overrides:
        raise ConfigError(f"--{overrides[0][0]}.{overrides[0][1]}: scaling takes no configuration")
    return scale(arguments)


def _top(arguments: argparse.Namespace, overrides: Overrides) -> int:
    from dynamo_epd.sdk.top import top

    if overrides:
        raise ConfigError(f"--{overrides[0][0]}.{overrides[0][1]}: watching takes no configuration")
    return top(arguments)


def _batch(arguments: argparse.Namespace, overrides: Overrides) -> int:
    from dynamo_epd.batch import run

    if overrides:
        raise ConfigError(f"--{overrides[0][0]}.{overrides[0][1]}: a batch takes no configuration")
    return run(arguments)


def _key(arguments: argparse.Namespace, _: Overrides) -> int:
    from dynamo_epd.http.auth import new_key

    key, entry = new_key(arguments.name)
    print(f"# The key of {arguments.name}, shown this once:\n{key}\n# Its line for the keys file:\n{entry}")
    return 0


def _env(_arguments: argparse.Namespace, _: Overrides) -> int:
    from dynamo_epd.sdk.machine import describe

    print(describe())
    return 0


def _reason(error: OSError) -> str:
    """What the system refused, and of which file."""
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or str(error) or type(error).__name__}"


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit status: 2 for what cannot be run, 1 for what failed on the way."""
    try:
        rest, overrides = split_overrides(sys.argv[1:] if argv is None else argv)
        arguments = _parser().parse_args(rest)
        run: Callable[[argparse.Namespace, Overrides], int] = arguments.run
        return run(arguments, overrides)
    except (ConfigError, GraphError, ModuleFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_CONFIG
    except DeploymentError as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    except OSError as error:
        print(f"error: {_reason(error)}", file=sys.stderr)
        return FAILED
    except ImportError:
        traceback.print_exc()  # of the user's module: the place is what helps
        return BAD_CONFIG


if __name__ == "__main__":
    sys.exit(main())
