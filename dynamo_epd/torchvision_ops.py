# SPDX-License-Identifier: Apache-2.0
"""Makes a CUDA build of torchvision importable beside a CPU build of torch.

torchvision's registry wheel is built for CUDA. Beside CPU torch its ``_C`` library cannot load, and the import then
fails on the missing schema of ``torchvision::nms``, although nothing on our path calls that operator. Declaring the
schemas is enough. It must hold in every process, vLLM's children included, so a ``.pth`` file in the environment calls
`install` at interpreter start-up. That costs an empty finder: torch is looked at only when somebody imports
torchvision.
"""

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder

_kept: list[object] = []  # a torch.library.Library ends its declarations when it is collected


class _BeforeTorchvision(MetaPathFinder):
    """Finds nothing itself; runs once, right before torchvision is imported."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname != "torchvision":
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.submodule_search_locations:
            _declare_missing(list(spec.submodule_search_locations))
        return spec


def _declare_missing(locations):
    import torch

    library = PathFinder.find_spec("_C", locations)
    if library is None or library.origin is None:
        return
    try:
        torch.ops.load_library(library.origin)
    except OSError:
        schemas = torch.library.Library("torchvision", "DEF")
        schemas.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        schemas.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _kept.append(schemas)


def install():
    """Registers the hook. Called from ``dynamo_epd.pth`` at interpreter start-up; imports nothing heavy."""
    if not any(isinstance(finder, _BeforeTorchvision) for finder in sys.meta_path):
        sys.meta_path.insert(0, _BeforeTorchvision())
