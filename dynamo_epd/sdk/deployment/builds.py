# SPDX-License-Identifier: Apache-2.0
"""``dynamo build``: a graph with its code, named after what is in it. The same source always gets the same tag.

A build is a directory::

    build.json    what the graph is: its services, links, endpoints; versions of the library and of the runtime
    Dockerfile    images for machines with and without GPUs
    code/         the graph's modules, as they lie below the working directory
    library/      this library, where it is run from a checkout; else what it needs on a machine without GPUs, exact

The tag is the hash of all of it, so nothing in it may depend on the machine or on the environment. Configurations are
no part of it: one build is deployed with many.
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import importlib.metadata
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dynamo_epd
from dynamo_epd.sdk.config import ConfigError
from dynamo_epd.sdk.deployment import DeploymentError
from dynamo_epd.sdk.deployment.images import dockerfile
from dynamo_epd.sdk.graph import Graph, load_graph
from dynamo_epd.sdk.nats_server import state_dir
from dynamo_epd.sdk.service import DYNAMO_IMAGE, info_of

BUILD_FILE, DOCKERFILE = "build.json", "Dockerfile"
CODE, LIBRARY = "code", "library"
FACTS = {"name", "graph", "root", "library", "runtime", "services", "links"}
"""What every build.json says, and hardly any other file of that name."""
DIGITS = 8
MAX_BYTES = 64 * 1024 * 1024
"""Of code and the data beside it: weights are no part of a build."""
PROJECT, REQUIREMENTS = "pyproject.toml", "requirements-cpu.txt"
_LIBRARY_FILES = (
    PROJECT,
    REQUIREMENTS,
    "build_hook.py",
    "dynamo_epd.pth",
    "README.md",
    "LICENSE",
)
_LIBRARY_PACKAGES = ("dynamo_epd", "dynamo")


@dataclasses.dataclass(frozen=True)
class Build:
    """One build in the store. ``facts`` is its build.json."""

    name: str
    digest: str
    directory: Path
    facts: dict[str, Any]

    @property
    def tag(self) -> str:
        return f"{self.name}:{self.digest}"

    @property
    def code(self) -> Path:
        return self.directory / CODE

    def graph(self) -> Graph:
        """The graph, loaded from the build's own code."""
        return load_graph(self.facts["graph"], str(self.code))


def build(spec: str, working_dir: str, *, force: bool = False) -> Build:
    """Builds the graph into the store, or finds that it is there.

    Raises ConfigError for a graph whose code does not lie below ``working_dir`` or is too large, and what `load_graph`
    does.
    """
    root = Path(working_dir).resolve()
    graph = load_graph(spec, str(root))
    spec, module = _below(spec, root)
    code = modules_of(module, root)
    files = {f"{CODE}/{path}": root / path for path in code}
    files |= {f"{LIBRARY}/{path}": file for path, file in library_files().items()}
    sizes = {path: file.stat().st_size for path, file in files.items()}
    if sum(sizes.values()) > MAX_BYTES:
        large = max(sizes, key=lambda path: sizes[path])
        raise ConfigError(f"the code of {spec} has more than {MAX_BYTES >> 20} MiB; the largest file is {large}")
    content = {path: file.read_bytes() for path, file in files.items()}
    facts = describe(graph, spec)
    content[BUILD_FILE] = (json.dumps(facts, indent=2) + "\n").encode()
    content[DOCKERFILE] = dockerfile(
        with_library=f"{LIBRARY}/{PROJECT}" in content,
        version=facts["library"],
        requirements=content[f"{LIBRARY}/{REQUIREMENTS}"].decode(),
    ).encode()
    name, digest = facts["name"], hash_of(content)
    directory = store() / name / digest
    if directory.exists() and (force or hash_of(_read(directory)) != digest):
        shutil.rmtree(directory)
    if not directory.exists():
        _write(directory, content)
    return Build(name, digest, directory, facts)


def find(tag: str) -> Build:
    """The build of a tag. Raises ConfigError, with the newest of that name, when there is none, and DeploymentError for
    one that is damaged.
    """
    name, _, digest = tag.rstrip(".").partition(":")
    directory = store() / name / digest
    if not name or not digest or "/" in tag or ".." in tag or not (directory / BUILD_FILE).is_file():
        raise ConfigError(f"no build {tag!r}; {_hint(name)}")
    return Build(name, digest, directory, _facts(directory / BUILD_FILE))


def _facts(file: Path) -> dict[str, Any]:
    """Of a build.json. Raises DeploymentError for one that is damaged, or of somebody else."""
    try:
        found = json.loads(file.read_text())
    except ValueError as error:
        raise DeploymentError(f"{file}: {error}; `dynamo build` makes it anew") from error
    if not isinstance(found, dict) or not found.keys() >= FACTS:
        raise DeploymentError(f"{file}: is no build's; `dynamo build` makes it anew")
    return found


def _hint(name: str) -> str:
    found = sorted((store() / name).glob(f"*/{BUILD_FILE}") if name.isidentifier() else [], key=_written)
    return f"did you mean {name}:{found[-1].parent.name}?" if found else "`dynamo build` makes one"


def _written(file: Path) -> float:
    return file.stat().st_mtime


def copy(build: Build, to: Path, *, force: bool) -> None:
    """A copy of the build in ``to``. Raises ConfigError when something is there, unless ``force`` and nothing but a
    build; DeploymentError for files that cannot be copied.
    """
    if to.exists() and any(to.iterdir() if to.is_dir() else [to]):
        if not _is_build(to):
            raise ConfigError(f"{to}: is there, and is no build")
        if strangers := sorted(_names(to) - {BUILD_FILE, DOCKERFILE, CODE, LIBRARY}):
            raise ConfigError(f"{to}: holds a build, and {strangers[0]}, which is no part of it; nothing is replaced")
        if not force:
            raise ConfigError(f"{to}: holds a build already; --force replaces it")
        for part in to.iterdir():  # not the directory itself, which may be where somebody stands
            part.unlink() if part.is_symlink() or part.is_file() else shutil.rmtree(part)
    try:
        shutil.copytree(build.directory, to, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    except shutil.Error as error:  # from, to and reason of every file that it stumbled over
        raise DeploymentError(f"{to}: {error.args[0][0][2]}") from error


def _is_build(directory: Path) -> bool:
    try:
        _facts(directory / BUILD_FILE)
    except (DeploymentError, OSError):
        return False
    return {DOCKERFILE, CODE} <= _names(directory)


def _names(directory: Path) -> set[str]:
    return {one.name for one in directory.iterdir()}


def store() -> Path:
    """Where this user's builds are: ``$XDG_STATE_HOME/dynamo/builds``."""
    return state_dir() / "builds"


def hash_of(content: dict[str, bytes]) -> str:
    """Eight hex digits of the SHA-256 over paths and contents."""
    total = hashlib.sha256()
    for path in sorted(content):
        total.update(f"{path}\0{hashlib.sha256(content[path]).hexdigest()}\n".encode())
    return total.hexdigest()[:DIGITS]


def describe(graph: Graph, spec: str) -> dict[str, Any]:
    """What build.json holds: all that the code says of the graph, nothing that the environment does."""
    return {
        "name": graph.root.__name__.lower().replace("_", "-"),
        "graph": spec,
        "root": graph.root.__name__,
        "library": importlib.metadata.version("dynamo-epd"),
        "runtime": importlib.metadata.version("ai-dynamo-runtime"),
        "services": {name: _service(cls) for name, cls in graph.services.items()},
        "links": sorted([caller.__name__, name, to.__name__] for (caller, name), to in graph.edges.items()),
    }


def _service(cls: type) -> dict[str, Any]:
    info = info_of(cls)
    found: dict[str, Any] = {
        "workers": info.workers,
        "resources": info.resources,
        "endpoints": [mark.name for mark in info.marked("endpoint").values()],
        "http": info.app is not None or bool(info.marked("api")),
    }
    if info.image is not None and info.image != DYNAMO_IMAGE:
        found["image"] = info.image
    if info.config is not None:
        found["keys"] = [field.name.replace("_", "-") for field in dataclasses.fields(info.config)]
    return found


def _below(spec: str, root: Path) -> tuple[str, Path]:
    """The spec as it will be found again in ``code/``, and the module's file."""
    place, colon, attribute = spec.partition(":")
    if place.endswith(".py"):
        file = (root / place).resolve()
        if not file.is_relative_to(root):
            raise ConfigError(f"{place}: only what lies below the working directory can be built")
        place = str(file.relative_to(root))
    else:
        found = _file_of(place, root)
        if found is None:
            raise ConfigError(f"{place}: only what lies below the working directory can be built")
        file = found
    return f"{place}{colon}{attribute}", file


def modules_of(start: Path, root: Path) -> list[str]:
    """The files that ``start`` needs of those below ``root``: the modules that it imports, also inside functions, the
    packages that they are in, and the data that lies in these, also in directories. This library is left out. In order
    of their paths.

    Modules whose names are put together while running are not found. Raises ConfigError for what is no Python, and for
    a link that leads out of ``root``.
    """
    roots = [root] if start.parent == root else [root, start.parent]
    found: set[Path] = set()
    todo = [start]
    while todo:
        file = todo.pop()
        if file in found:
            continue
        found.add(_within(file, root))
        for name in _imports(file, root):
            if name.partition(".")[0] in _LIBRARY_PACKAGES:
                continue
            parts = name.split(".")
            for length in range(1, len(parts) + 1):
                places = (_file_of(".".join(parts[:length]), one) for one in roots)
                todo += [place for place in places if place is not None]
        package = file.parent / "__init__.py"
        if package.is_file():
            todo.append(package)
    packages = {file.parent for file in found if (file.parent / "__init__.py").is_file()}
    found |= {data for package in packages for data in _beside(package, root)}
    return sorted(str(file.relative_to(root)) for file in found)


def _file_of(module: str, root: Path) -> Path | None:
    place = root.joinpath(*module.split("."))
    return next((file for file in (place / "__init__.py", place.with_suffix(".py")) if file.is_file()), None)


def _imports(file: Path, root: Path) -> Iterator[str]:
    package = list(file.parent.relative_to(root).parts)
    try:
        tree = ast.parse(file.read_bytes(), str(file))
    except (SyntaxError, ValueError) as error:
        raise ConfigError(f"{file.relative_to(root)}: {error}") from error
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{origin}.{alias.name}" if origin else alias.name for alias in node.names)


def _beside(directory: Path, root: Path, above: frozenset[Path] = frozenset()) -> Iterator[Path]:
    """The data of a package: files of its directory, and of the directories in it that are no packages themselves. What
    lies below ``root`` is in no package, whatever ``root`` has itself."""
    above |= {directory.resolve(), *directory.resolve().parents}  # a link back up would never end
    for path in directory.iterdir():
        if path.name.startswith(".") or path.name == "__pycache__" or path.suffix in (".py", ".pyc"):
            continue
        if path.is_file():
            yield _within(path, root)
        elif path.is_dir() and directory != root and not (path / "__init__.py").is_file():
            real = _within(path, root).resolve()
            if real not in above:
                yield from _beside(path, root, above)


def _within(path: Path, root: Path) -> Path:
    """The path, unless it is a link to what lies elsewhere on the machine: no build may take that along."""
    if not path.resolve().is_relative_to(root):
        raise ConfigError(f"{path.relative_to(root)}: a link to {path.resolve()}, which lies outside of {root}")
    return path


def library_files() -> dict[str, Path]:
    """This library's files, by where they stand in a checkout; of a wheel's that one alone which no index gives out."""
    root = Path(dynamo_epd.__file__).resolve().parent.parent
    if not (root / "build_hook.py").is_file():
        return {REQUIREMENTS: root / "dynamo_epd" / REQUIREMENTS}
    files = {name: root / name for name in _LIBRARY_FILES}
    for package in _LIBRARY_PACKAGES:
        for file in (root / package).rglob("*"):
            place = file.relative_to(root)
            if file.is_file() and file.suffix != ".pyc" and not any(part.startswith(".") for part in place.parts):
                files[str(place)] = _within(file, root)
    return files


def _read(directory: Path) -> dict[str, bytes]:
    """All but what Python leaves where a graph was loaded from its build."""
    found = {file.relative_to(directory): file for file in directory.rglob("*") if file.suffix != ".pyc"}
    return {
        str(path): file.read_bytes()
        for path, file in found.items()
        if "__pycache__" not in path.parts and file.is_file()
    }


def _write(directory: Path, content: dict[str, bytes]) -> None:
    """All or nothing: whoever looks finds a whole build or none."""
    directory.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    beside = Path(tempfile.mkdtemp(dir=directory.parent, prefix=".new-"))
    try:
        for path, data in content.items():
            (beside / path).parent.mkdir(parents=True, exist_ok=True)
            (beside / path).write_bytes(data)
        try:
            beside.rename(directory)
        except OSError:
            if not directory.is_dir():  # else another build of the same source was quicker
                raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)
