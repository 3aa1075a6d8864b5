# SPDX-License-Identifier: Apache-2.0
"""How fast a GPU runs the four large models, against what the same GPU did in matrix products and in copies.

    python -m benchmarks.gpu                 # on a GPU: real sizes, tens of minutes, most of them compiling
    python -m benchmarks.gpu --toy           # anywhere: toy sizes, seconds

No figures of a GPU have been recorded in this project yet. Weights are random, and made on the device: nothing is
downloaded. CLIP ViT-L/14-336, the tower of Qwen2.5-VL 7B, the encoder of T5 v1.1 XXL and the transformer of FLUX.1 each
run eagerly and compiled over a range of batch sizes. The tables go to stdout, progress to stderr, everything to one
JSON file, rewritten after each model. `towers` says how work and bytes are counted.

Exit status: 0, also where a batch had no memory; 1 if a model could not be compiled; 2 for what cannot be run.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

MODELS = ("clip", "qwen", "t5", "flux")
DTYPES = ("bfloat16", "float16", "float32")
COMPILE_MODES = ("capture", "default", "reduce-overhead", "max-autotune")


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    import torch  # seconds, which neither --help nor a typing error should take

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not (options.toy or options.on_cpu):
        print("benchmarks.gpu: there is no GPU here; --toy runs toy sizes, --on-cpu the real ones", file=sys.stderr)
        return 2
    from benchmarks.gpu import report, roofline, sweep, towers

    small = device.type == "cpu"
    dtype = getattr(torch, options.dtype or ("float32" if options.toy else "bfloat16"))
    try:
        known = towers.toy(options.attn) if options.toy else towers.real(options.attn)
        chosen = [one for one in known if one.name in options.models]
        with torch.device("meta"):
            for tower in chosen:  # costs nothing, and says at once what transformers thinks of --attn
                tower.build()
        options.json.parent.mkdir(parents=True, exist_ok=True)
    except (OSError, ImportError, ValueError) as error:
        print(f"benchmarks.gpu: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    found = roofline.measure(
        device,
        dtype,
        options.repeats,
        sides=(256, 512) if small else (4096, 8192, 16384),
        copied=2**26 if small else 2**31,
    )
    compile_mode = options.compile or (sweep.CAPTURE if options.toy else "default")
    setup = sweep.Setup(device, dtype, found, options.repeats, compile_mode)
    command = shlex.join(["python", "-m", "benchmarks.gpu", *(sys.argv[1:] if arguments is None else arguments)])
    swept = []
    for tower in chosen:
        swept.append(sweep.sweep(tower, setup))
        made = report.as_json(swept, setup, toy=options.toy, command=command)
        options.json.write_text(json.dumps(made, indent=1) + "\n")
    print(report.markdown(swept, setup, toy=options.toy))
    return int(any(run.failed for one in swept for run in one.runs))


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--toy", action="store_true", help="toy sizes, on a GPU or a CPU")
    parser.add_argument("--on-cpu", action="store_true", help="real sizes although there is no GPU: hours, 30 GB")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16, for toy sizes float32")
    parser.add_argument(
        "--compile", choices=COMPILE_MODES, help="mode of torch.compile; capture, which --toy has, makes no code"
    )
    parser.add_argument("--attn", default="sdpa", help="attention of the vision towers, as transformers names it")
    parser.add_argument("--repeats", type=int, default=10, choices=range(3, 101), metavar="3..100")
    parser.add_argument("--json", type=Path, default=Path("build/gpu.json"))
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
