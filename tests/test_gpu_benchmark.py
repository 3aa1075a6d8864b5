# SPDX-License-Identifier: Apache-2.0
"""`benchmarks.gpu` on a CPU: a toy run as a user starts it, the count of work against torch's own, and what is said
when something cannot be run. The toy run of every model: acceptance/test_gpu_benchmark.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig

from benchmarks.gpu import report, roofline, sweep, towers
from benchmarks.gpu.__main__ import main
from benchmarks.gpu.sweep import Run, Setup, Swept
from benchmarks.gpu.towers import Tower
from tests.toys.running import ROOT

pytestmark = pytest.mark.usefixtures("compiling")

CPU = torch.device("cpu")
SETUP = Setup(CPU, torch.float32, roofline.Roofline(1e12, 1e11, "float32"), 3, sweep.CAPTURE)
NAMES = ["clip", "qwen", "t5", "flux"]
PARAMETERS = {"clip": 303_507_456, "qwen": 676_550_144, "t5": 4_762_310_656, "flux": 11_901_408_320}
"""Of the published checkpoints."""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", *arguments],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def tower(name: str, *, real: bool = False) -> Tower:
    return next(one for one in (towers.real() if real else towers.toy()) if one.name == name)


def has_reported(names: Sequence[str], directory: Path, *arguments: str) -> None:
    """A toy run with ``arguments`` runs the models of these ``names`` and no other, and says everything of each."""
    path = directory / "made" / "gpu.json"
    done = run("--toy", "--json", str(path), "--repeats", "5", *arguments)
    assert done.returncode == 0, done.stderr
    made = json.loads(path.read_text())
    assert [model["name"] for model in made["models"]] == names
    assert "No figures of a GPU have been recorded" in made["status"]
    assert made["status"] in done.stdout
    assert made["device"] in done.stdout
    assert (made["dtype"], made["sizes"], made["settings"]) == ("float32", "toy", [])
    assert made["versions"]["torch"] == torch.__version__
    assert [line.partition(" times: ")[2] for line in made["goals"]] == ["not measured: toy sizes"] * 3
    assert all(f"- {line}" in done.stdout for line in made["goals"])
    assert [bool(model["base"]) for model in made["models"]] == [name == "flux" for name in names]
    for model in made["models"]:
        assert model["title"] in done.stdout
        assert [(one["mode"], one["batch"]) for one in model["runs"]] == [
            (mode, batch) for mode in ("eager", "compiled") for batch in (1, 2)
        ]
        for one in model["runs"]:
            middle, least, most = one["seconds"]
            assert least <= middle <= most
            moved = model["read_bytes_per_forward"] + 4 * one["batch"] * model["activations_per_item"]
            flops, bandwidth = one["batch"] * model["flops_per_item"] / middle, moved / middle
            shares = flops / made["matmul_flops_per_second"], bandwidth / made["bandwidth_bytes_per_second"]
            assert one["items_per_second"] == pytest.approx(one["batch"] / middle)
            assert (one["of_matmul"], one["of_bandwidth"]) == pytest.approx(shares)
            assert 0 < min(shares) <= max(shares) < 1.5
            assert one["bound"] == ("arithmetic" if shares[0] >= shares[1] else "bandwidth")
            assert (one["compile_seconds"] is None) == (one["mode"] == "eager")


def test_the_toy_run_reports_a_model_in_both_modes(tmp_path: Path) -> None:
    """Of all four, the one that has a base."""
    has_reported(["flux"], tmp_path, "--models", "flux")


def test_real_sizes_are_refused_without_a_gpu() -> None:
    done = run()
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "benchmarks.gpu: there is no GPU here; --toy runs toy sizes, --on-cpu the real ones\n"


def test_an_attention_that_is_not_there_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--toy", "--attn", "nonsense"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("benchmarks.gpu: ")
    assert "nonsense" in said.err
    assert said.err.count("\n") == 1


@pytest.mark.parametrize("name", NAMES)
def test_work_is_what_torch_counts(name: str) -> None:
    one = tower(name)
    model = towers.materialise(one, CPU, torch.float32)
    assert counted(model, one.inputs(2, CPU, torch.float32)) == pytest.approx(2 * one.work.flops, rel=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_real_sizes_are_the_published_ones_and_their_work_is_what_torch_counts(name: str) -> None:
    """On the meta device, which has shapes and no values."""
    one = tower(name, real=True)
    meta = torch.device("meta")
    with meta:
        model = one.build().eval()
    assert sum(weight.numel() for weight in model.parameters()) == PARAMETERS[name]
    given = one.inputs(1, meta, torch.float32)
    if name == "t5":
        del given["attention_mask"]  # it is looked at
    if name == "qwen":  # its 81 windows a layer take seconds: the first 8 layers have one that sees everything
        layers = model.config.depth = 8
        del model.blocks[layers:]
        config = Qwen2_5_VLVisionConfig(**{**model.config.to_dict(), "fullatt_block_indexes": [7]})
        one = towers.qwen(config, (70, 70), (1,))
    assert counted(model, given) == pytest.approx(one.work.flops, rel=1e-3)


def counted(model: torch.nn.Module, given: dict[str, Any]) -> int:
    """FLOPs of one forward. torch has no count for the CPU's fused attention: the plain one is matrix products."""
    with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(**given)
    return counter.get_total_flops()


@pytest.mark.parametrize("name", NAMES)
def test_a_materialised_model_has_what_a_plain_one_has_and_runs(name: str) -> None:
    """Tables that no checkpoint holds are lost on the meta device, and so are ties."""
    one = tower(name)
    plain, made = one.build(), towers.materialise(one, CPU, torch.bfloat16)
    tables = dict(plain.named_buffers())
    assert tables.keys() == dict(made.named_buffers()).keys()
    for key, table in made.named_buffers():
        torch.testing.assert_close(table, tables[key], rtol=0, atol=0)
    assert {key for key, _ in made.named_parameters()} == {key for key, _ in plain.named_parameters()}
    for key, weight in made.named_parameters():
        assert weight.dtype == torch.bfloat16
        assert weight.isfinite().all(), key
        assert weight.dim() == 1 or 0 < weight.float().std() < 2, key
    with torch.inference_mode():
        (out, *_) = made(**one.inputs(2, CPU, torch.bfloat16), return_dict=False)
    assert out.dtype == torch.bfloat16
    assert out.isfinite().all()
    assert out.float().std() > 0


def test_weights_that_are_looked_up_are_not_read() -> None:
    model = towers.materialise(tower("t5"), CPU, torch.float32)
    tables = model.shared.weight.numel() + 32 * 4  # words, and the bias of 32 distances for 4 heads
    assert towers.weight_bytes(model) == 4 * (sum(one.numel() for one in model.parameters()) - tables)


def test_a_batch_without_memory_is_said_and_the_sweep_goes_on() -> None:
    one = tower("clip")

    def out_of_memory_double(batch: int, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        if batch == 1:
            raise torch.OutOfMemoryError("double")
        return one.inputs(batch, device, dtype)

    swept = sweep.sweep(replace(one, inputs=out_of_memory_double), SETUP)
    assert [(run.mode, run.batch, run.note, run.failed) for run in swept.runs] == [
        (mode, batch, note, False) for mode in sweep.MODES for batch, note in ((1, "out of memory"), (2, ""))
    ]
    assert [run.items_per_second is None for run in swept.runs] == [True, False, True, False]
    assert report.markdown([swept], SETUP, toy=False).count("| out of memory |") == 2


def test_weights_without_memory_are_said() -> None:
    def out_of_memory_double() -> NoReturn:
        raise torch.OutOfMemoryError("double")

    swept = sweep.sweep(replace(tower("flux"), build=out_of_memory_double), SETUP)
    assert {run.note for run in swept.runs} == {"out of memory: the weights do not fit"}
    assert report.settings(swept) == []
    assert "do not fit" in report.markdown([swept], SETUP, toy=False)


def test_what_cannot_be_compiled_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing_double(graph: object, inputs: object) -> NoReturn:
        raise ValueError("no compiler here")

    monkeypatch.setattr(sweep, "_compiled", lambda model, mode: torch.compile(model, backend=failing_double))
    swept = sweep.sweep(tower("clip"), SETUP)
    assert [run.failed for run in swept.runs] == [False, False, True, True]
    assert all("no compiler here" in run.note and "\n" not in run.note for run in swept.runs if run.failed)


def test_a_model_is_gone_when_its_memory_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    one = tower("clip")
    built: list[weakref.ref[torch.nn.Module]] = []
    there: list[bool] = []

    def remembered() -> torch.nn.Module:
        model = one.build()
        built.append(weakref.ref(model))
        return model

    def watched(device: torch.device) -> None:
        free(device)
        there.append(built[0]() is not None)

    free = sweep.free
    monkeypatch.setattr(sweep, "free", watched)
    sweep.sweep(replace(one, build=remembered), SETUP)
    assert there == [False]


def rate(mode: str, batch: int, items: float) -> Run:
    return Run(mode, batch, seconds=(batch / items,) * 3, items_per_second=items)


def test_the_smallest_batch_that_is_fast_enough_is_proposed() -> None:
    runs = [rate("eager", 1, 50), rate("eager", 2, 98), rate("eager", 4, 100), rate("compiled", 1, 500)]
    lines = report.settings(Swept(tower("t5", real=True), runs=runs))
    assert lines == ["`EmbedWorker.batch-tokens: 1024` (cova, cova-llama4): 98% of the best throughput"]
    assert report.settings(Swept(tower("clip"), runs=runs))[0].startswith("`EncodeWorker.max-batch: 2` (agg-llava")


@pytest.mark.parametrize(("items", "worth"), [(1.02, "false"), (1.5, "true")])
def test_compiling_is_proposed_where_it_pays(items: float, worth: str) -> None:
    runs = [rate("eager", 1, 1.0), rate("eager", 2, 9.0), rate("compiled", 1, items)]
    (line,) = report.settings(Swept(tower("flux"), runs=runs))
    assert line == f"`ImageWorker.compile: {worth}` (cova): {items:.3g} times eager"


def judged(swept: list[Swept], **changed: Any) -> list[str]:
    """What is said of each goal on a GPU."""
    setup = replace(SETUP, device=torch.device("cuda"))
    lines = report.goals(swept, replace(setup, **changed), toy=False)
    return [line.partition(" times: ")[2] for line in lines]


def test_goals_for_a_gpu_are_met_or_not_or_not_measured() -> None:
    compiled, base = rate("compiled", 1, 2.5), rate("eager", 1, 1.0)
    flux = Swept(tower("flux"), runs=[rate("eager", 1, 2.0), compiled], base=base)
    shares = [replace(rate("eager", batch, 1.0), of_matmul=of) for batch, of in ((1, 0.3), (2, 0.8))]
    both = [Swept(tower(name), runs=[*shares, replace(compiled, of_matmul=0.9)]) for name in ("clip", "t5")]
    no_graph = "not measured: this benchmark serves no graph"
    assert judged([flux, *both]) == [no_graph, "met: 2.5 times", "met: 0.8 times"]
    slow = [replace(flux, base=rate("eager", 1, 2.0)), both[0], replace(both[1], runs=shares[:1])]
    assert judged(slow) == [no_graph, "not met: 1.25 times", "not met: 0.3 times"]
    nothing = Run("eager", 1, "out of memory")
    without = [replace(flux, base=nothing), both[0], Swept(tower("t5"), runs=[nothing])]
    why = ["not measured: eager in float32: out of memory", "not measured: t5: out of memory"]
    assert judged(without)[1:] == why
    assert judged([])[1:] == ["not measured: flux was not run", "not measured: clip was not run"]
    assert judged([flux, *both], device=CPU) == ["not measured: there is no GPU here"] * 3


def test_calls_that_warm_up_are_not_counted() -> None:
    calls: list[int] = []
    taken = roofline.seconds(lambda: calls.append(1), CPU, 5)
    assert (len(taken), len(calls)) == (5, 5 + roofline.WARM_UP)
