# SPDX-License-Identifier: Apache-2.0
"""The loop that every recipe trains with: one cycle, resumable, and a line that says how long it still takes."""

from __future__ import annotations

import ctypes
import fcntl
import json
import math
import os
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO

import torch
from safetensors.torch import load_file, save_file
from torch import nn

WORK = Path("build/models")
"""Where unfinished runs are kept, from the repository's root."""
SAVE_SECONDS = 60.0
REPORT_SECONDS = 15.0
WARM_UP = 0.05
"""Part of the steps in which the learning rate rises; then it falls along a cosine to nothing."""
GRADIENT_NORM = 1.0
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Parameters of glibc's `mallopt`: malloc.h."""
STATE = ("exp_avg", "exp_avg_sq", "momentum_buffer")
"""What AdamW and Muon remember of a parameter."""

_at_work: list[IO[str]] = []
"""This process's place among those that `share_cores`, as long as it lives."""

Loss = Callable[[random.Random], tuple[torch.Tensor, dict[str, float]]]
"""One step's loss from that step's own source of chance, and figures to show."""


def device() -> torch.device:
    """A GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def autocast() -> torch.autocast:
    """bfloat16 where the hardware multiplies it: GPUs, processors with AMX or AVX512-BF16. Elsewhere it is slower."""
    where = device().type
    fast = where == "cuda" or torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.autocast(where, dtype=torch.bfloat16, enabled=fast)


def keep_memory() -> None:
    """Keep what is freed for what is allocated next, where the C library is glibc.

    A step allocates and frees the same few hundred MB as the one before it. By itself glibc gives them back to the
    kernel and takes them again, page by page: an eighth of a step's time on a processor.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def share_cores(recipe: str) -> None:
    """Called by a recipe's process before anything else: with it each `Run` takes as many cores as there are for it."""
    keep_memory()
    place = WORK / "at-work" / recipe
    place.parent.mkdir(parents=True, exist_ok=True)
    file = place.open("w")
    fcntl.flock(file, fcntl.LOCK_EX)
    _at_work.append(file)


def take_cores() -> None:
    """Shares this machine's cores evenly among the recipes that are at work now. Alone, a recipe has them all.

    Asked again now and then: a recipe may end while another has an hour to go.
    """
    if not _at_work:
        return
    others = 0
    for place in (WORK / "at-work").iterdir():
        with place.open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                others += place.name != Path(_at_work[0].name).name
    cores = max(1, len(os.sched_getaffinity(0)) // (1 + others))
    if cores != torch.get_num_threads():
        torch.set_num_threads(cores)
        torch.compiler.reset()  # a compiled layer has its number of threads in it


def fuse(layers: Iterable[nn.Module]) -> None:
    """Compiles each layer's forward, where a processor trains and has a C++ compiler.

    Most of a small layer's time goes into passes over its activations, which a compiled one makes together. The first
    steps then take a minute or two.
    """
    if device().type != "cpu" or not shutil.which(os.environ.get("CXX", "g++")):
        return
    for layer in layers:
        # Not `layer.compile`: transformers wraps `forward` while it records hidden states, and would compile each time.
        layer.forward = torch.compile(layer.forward, dynamic=True)  # type: ignore[method-assign]


class Run:
    """One phase of a recipe: ``module`` is trained for ``steps`` steps, from where an earlier, ended run left it.

    Step k draws its data from a source of chance seeded by the phase and k, so a resumed run sees what an unbroken one
    would have seen. With ``average`` the module ends with the exponential average of its weights (decay per step), as
    diffusion models are sampled from.

    AdamW moves the weights; but those of the linear layers within ``layers`` are moved by Muon, at updates of the same
    size: each of its steps is a tenth dearer here, and a transformer needs less than half as many
    (https://kellerjordan.github.io/posts/muon, the size by arXiv 2502.16982).
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        steps: int,
        rate: float,
        *,
        average: float = 0.0,
        layers: Iterable[nn.Module] = (),
    ):
        self.name = name
        self.module = module.to(device())
        self.steps = steps
        self.rate = rate
        self.average = average
        self.curve: list[dict[str, float]] = []
        self.seconds = 0.0
        """What the steps have taken, those of earlier, ended runs with them."""
        self._parameters = [one for one in module.parameters() if one.requires_grad]
        matrices = [part.weight for layer in layers for part in layer.modules() if isinstance(part, nn.Linear)]
        others = [one for one in self._parameters if all(one is not matrix for matrix in matrices)]
        self._optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
        ]
        if matrices:
            self._optimizers.append(
                torch.optim.Muon(matrices, lr=rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
            )
        self._mover = {
            one: optimizer
            for optimizer in self._optimizers
            for group in optimizer.param_groups
            for one in group["params"]
        }
        self._averages = [one.detach().clone() for one in self._parameters] if average else []
        self._directory = WORK / name
        self._done = 0

    def train(self, loss: Loss) -> nn.Module:
        """Do the steps that are not yet done. Returns the module, in evaluation mode."""
        self._directory.mkdir(parents=True, exist_ok=True)
        alone = self._alone()
        take_cores()
        self._resume()
        self.module.train()
        began, saved, reported, first = time.monotonic(), time.monotonic(), time.monotonic(), self._done
        before = self.seconds
        while self._done < self.steps:
            shown = self._step(loss)
            now = time.monotonic()
            self.seconds = before + now - began
            ended = self._done == self.steps
            if ended or self._done == 1 or now - reported > REPORT_SECONDS:
                reported = now
                self._report(shown, (now - began) / (self._done - first))
            if ended or now - saved > SAVE_SECONDS:
                saved = now
                self._save()
                take_cores()
        for parameter, mean in zip(self._parameters, self._averages, strict=bool(self._averages)):
            parameter.data.copy_(mean)
        alone.close()
        return self.module.eval()

    def _alone(self) -> IO[str]:
        """A file that is locked while this run trains. Two that saved to one place would spoil each other."""
        file = (self._directory / "lock").open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SystemExit(f"{self.name}: another process trains this already") from None
        return file

    def _step(self, loss: Loss) -> dict[str, float]:
        for optimizer in self._optimizers:
            optimizer.zero_grad(set_to_none=True)
            for group in optimizer.param_groups:
                group["lr"] = self.rate * self._share()
        torch.manual_seed(self._done)
        with autocast():
            value, shown = loss(random.Random(f"{self.name} {self._done}"))
        value.backward()
        nn.utils.clip_grad_norm_(self._parameters, GRADIENT_NORM)
        for optimizer in self._optimizers:
            optimizer.step()
        self._done += 1
        if self.average:
            # A short memory at first: the first weights are noise.
            decay = min(self.average, (1 + self._done) / (10 + self._done))
            torch._foreach_lerp_(self._averages, [one.detach() for one in self._parameters], 1 - decay)
        return {"loss": value.item(), **shown}

    def _share(self) -> float:
        warm = max(1, round(WARM_UP * self.steps))
        if self._done < warm:
            return (self._done + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * (self._done - warm) / max(1, self.steps - warm)))

    def _report(self, shown: dict[str, float], seconds: float) -> None:
        self.curve.append({"step": self._done, **{name: round(value, 4) for name, value in shown.items()}})
        left = (self.steps - self._done) * seconds / 60
        figures = "  ".join(f"{name} {value:.4f}" for name, value in shown.items())
        line = f"{self.name}: {self._done}/{self.steps}  {figures}  {seconds * 1000:.0f} ms a step, {left:.0f} min left"
        print(line, file=sys.stderr, flush=True)

    def _save(self) -> None:
        tensors = {}
        for index, parameter in enumerate(self._parameters):
            tensors[f"{index}.weight"] = parameter.detach()
            found = self._mover[parameter].state.get(parameter, {})  # nothing where the loss does not depend on it
            tensors |= {f"{index}.{part}": found[part] for part in STATE if part in found}
            if self._averages:
                tensors[f"{index}.average"] = self._averages[index]
        about = {"step": self._done, "steps": self.steps, "seconds": round(self.seconds), "curve": self.curve}
        held = self._directory / "unfinished"
        save_file({key: one.contiguous() for key, one in tensors.items()}, held, {"about": json.dumps(about)})
        held.replace(self._directory / "state.safetensors")

    def _resume(self) -> None:
        path = self._directory / "state.safetensors"
        if not path.exists():
            return
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            about = json.loads(file.metadata()["about"])
        if about["steps"] != self.steps:
            raise SystemExit(f"{path} is of a run of {about['steps']} steps, not {self.steps}: remove it to start anew")
        tensors = load_file(path, device=str(device()))
        self._done, self.curve, self.seconds = about["step"], about["curve"], about.get("seconds", 0.0)
        for index, parameter in enumerate(self._parameters):
            parameter.data.copy_(tensors[f"{index}.weight"])
            found = {part: tensors[f"{index}.{part}"] for part in STATE if f"{index}.{part}" in tensors}
            if found:
                self._mover[parameter].state[parameter] = {"step": torch.tensor(float(self._done)), **found}
            if self._averages:
                self._averages[index].copy_(tensors[f"{index}.average"])
        print(f"{self.name}: goes on at step {self._done} of {self.steps}", file=sys.stderr, flush=True)
