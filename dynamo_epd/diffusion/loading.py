# SPDX-License-Identifier: Apache-2.0
"""Pipelines of diffusers as they are loaded: which model, without its T5 if that is elsewhere, and the switches.

What cannot work fails here, when the service starts, in one line.
"""

from __future__ import annotations

import inspect
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from transformers.modeling_outputs import BaseModelOutput

from dynamo_epd import weights
from dynamo_epd.diffusion.text_encoder import RemoteTextEncoder
from dynamo_epd.sdk.config import ConfigError

log = logging.getLogger(__name__)

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
T5_CLASSES = frozenset({"T5EncoderModel", "UMT5EncoderModel"})
NEEDED = frozenset({"prompt", "height", "width", "num_inference_steps", "generator", "output_type"})
FOREIGN = frozenset({"strength", "mask_image", "control_image", "num_frames"})
"""What pipelines take that change a picture, or make films."""
VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "spiece.model", "tokenizer.model")
KEPT_TEXTS = 16
"""Prompts whose states a pipeline's own T5 keeps."""
GRAPHS = 64
"""Compiled forms of one denoiser: for each size, with and without guidance, for each LoRA adapter. torch allows 8."""


class PipelineError(ConfigError):
    """A model that is not there or makes no pictures, or a switch that it, or this machine, does not have."""


@dataclass(frozen=True)
class Switches:
    """How a pipeline is run. See `load`."""

    attention_slicing: bool = False
    vae_slicing: bool = False
    cpu_offload: bool = False
    compile: bool = False


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def dtype_of(name: str) -> torch.dtype:
    """``auto`` is bfloat16 on a GPU and float32 elsewhere."""
    if name == "auto":
        return torch.bfloat16 if device().type == "cuda" else torch.float32
    return DTYPES[name]


def load(
    model: str,
    dtype: torch.dtype,
    switches: Switches,
    loras: Mapping[str, str],
    remote: Callable[[], RemoteTextEncoder] | None,
) -> Any:
    """A text-to-image pipeline, ready on this machine's device. Only safetensors are read.

    Args:
        model: a directory, a name on the hub, or ``s3://bucket/prefix``.
        loras: adapters by the name that they are to have.
        remote: makes what stands in the place of each T5 encoder, whose weights are then neither had nor held.

    Raises:
        PipelineError: see there.
        WeightsError: see `weights.local`.
    """
    diffusers.utils.logging.set_verbosity_error()  # its warnings quote prompts
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    with _in_one_line(model):
        index = weights.pipeline_index(model)
    if index is None:
        raise PipelineError(f"model {model!r} is no pipeline of diffusers: it has no model_index.json")
    kind = pipeline_class(model, index)
    elsewhere: dict[str, Any] = {} if remote is None else dict.fromkeys(t5_components(index))
    directory = weights.local(model, lambda path: path.split("/")[0] not in elsewhere)
    _check_tokenizers(directory, index)
    with _in_one_line(model):
        pipeline = kind.from_pretrained(directory, dtype=dtype, use_safetensors=True, **elsewhere)
    if denoiser_of(pipeline) is None or not hasattr(pipeline, "vae_scale_factor"):
        raise PipelineError(f"model {model!r} is a {kind.__name__}, which is not built as text-to-image pipelines are")
    pipeline.set_progress_bar_config(disable=True)
    for name, source in loras.items():
        _load_lora(pipeline, name, source)
    for name in elsewhere:
        assert remote is not None
        setattr(pipeline, name, remote())
    # A pipeline that takes the mask of a prompt gives it to its denoiser too; others show theirs the padding.
    if not elsewhere and "prompt_attention_mask" in inspect.signature(kind.__call__).parameters:
        for name in t5_components(index):
            _encode_without_padding(pipeline.components[name])
    with _in_one_line(model):
        _place(pipeline, switches.cpu_offload)
    if switches.attention_slicing:
        _slice_attention(pipeline)
    if switches.vae_slicing:
        _slice_vae(pipeline)
    if switches.compile:
        _compile(pipeline)
    else:  # which has one form for each shape, and would make one for each length of prompt
        denoiser_of(pipeline).register_forward_pre_hook(_without_padding, with_kwargs=True)
    return pipeline


def pipeline_class(model: str, index: Mapping[str, Any]) -> Any:
    """The class that a ``model_index.json`` names. Raises PipelineError unless it makes a picture of a text."""
    name = index.get("_class_name")
    kind = getattr(diffusers, name, None) if isinstance(name, str) else None
    if kind is None:
        raise PipelineError(
            f"model {model!r} is of class {name!r}, which diffusers {diffusers.__version__} does not have"
        )
    takes = inspect.signature(kind.__call__).parameters
    others = {key for key, one in takes.items() if one.default is one.empty and key not in ("self", "args", "kwargs")}
    if not takes.keys() >= NEEDED or others - NEEDED or FOREIGN & takes.keys():
        raise PipelineError(f"model {model!r} is a {name}, which makes no picture of a text alone")
    return kind


def t5_components(index: Mapping[str, Any]) -> list[str]:
    """The components of a ``model_index.json`` that are T5 encoders."""
    return [
        name
        for name, found in index.items()
        if isinstance(found, (list, tuple)) and len(found) == 2 and found[1] in T5_CLASSES
    ]


def _check_tokenizers(directory: str, index: Mapping[str, Any]) -> None:
    """A tokenizer without its file loads as one of three tokens, and every prompt would be the same."""
    if not Path(directory).is_dir():  # the hub gives all or nothing
        return
    for name in index:
        there = not name.startswith("tokenizer") or index[name][0] is None
        if not there and not any((Path(directory) / name / file).exists() for file in VOCABULARIES):
            raise PipelineError(f"model {directory!r} has no vocabulary in its {name!r}")


def denoiser_name(pipeline: Any) -> str:
    """Of the component that `denoiser_of` gives."""
    return "transformer" if pipeline.components.get("transformer") else "unet"


def denoiser_of(pipeline: Any) -> Any:
    """The transformer or UNet that is called at every step."""
    return pipeline.components.get(denoiser_name(pipeline))


def _without_padding(_: Any, given: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    """Cuts off the text's padding where the denoiser is told of it: PixArt pads ten tokens to 300, and attends to none
    of what it adds."""
    states, mask = named.get("encoder_hidden_states"), named.get("encoder_attention_mask")
    if states is None or mask is None or mask.shape != states.shape[:2]:
        return None
    real = _longest(mask)
    return given, named | {"encoder_hidden_states": states[:, :real], "encoder_attention_mask": mask[:, :real]}


def _encode_without_padding(encoder: Any) -> None:
    """Has a T5 encode no padding, of whose states nobody takes any: they are 0. Texts of late are not encoded again:
    what guides away is the same in every request, and a request may want several pictures of one prompt."""
    forward = encoder.forward
    kept: OrderedDict[tuple[int, ...], torch.Tensor] = OrderedDict()

    def encoded(input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **named: Any) -> Any:
        if attention_mask is None or len(input_ids) != 1:
            return forward(input_ids, attention_mask=attention_mask, **named)
        length, real = input_ids.shape[1], _longest(attention_mask)
        text = (*input_ids[0, :real].tolist(), *attention_mask[0, :real].tolist())
        if text not in kept:
            found = forward(input_ids[:, :real], attention_mask=attention_mask[:, :real], **named)
            kept[text] = found.last_hidden_state
            if len(kept) > KEPT_TEXTS:
                kept.popitem(last=False)
        kept.move_to_end(text)
        states = torch.nn.functional.pad(kept[text], (0, 0, 0, length - real))
        return BaseModelOutput(last_hidden_state=states)

    encoder.forward = encoded


def _longest(mask: torch.Tensor) -> int:
    """Columns of a mask (rows, tokens) up to the last one that any row attends to, 1 at least."""
    attended = mask.any(0).nonzero()
    return int(attended[-1]) + 1 if len(attended) else 1


def _load_lora(pipeline: Any, name: str, source: str) -> None:
    if not hasattr(pipeline, "load_lora_weights"):
        raise PipelineError(f"a {type(pipeline).__name__} takes no LoRA adapters")
    directory = weights.local(source)
    with _in_one_line(source):
        pipeline.load_lora_weights(directory, adapter_name=name, use_safetensors=True)
    if not any(name in held for held in pipeline.get_list_adapters().values()):
        raise PipelineError(f"LoRA adapter {source!r} has nothing for a {type(pipeline).__name__}")


def _place(pipeline: Any, cpu_offload: bool) -> None:
    if cpu_offload and device().type == "cuda":
        pipeline.enable_model_cpu_offload()
        return
    if cpu_offload:
        log.warning("cpu-offload changes nothing: there is no GPU here")
    pipeline.to(device())


def _slice_attention(pipeline: Any) -> None:
    if not any(hasattr(one, "set_attention_slice") for one in pipeline.components.values()):
        log.warning("attention-slicing changes nothing: a %s has no attention to slice", type(pipeline).__name__)
        return
    pipeline.enable_attention_slicing()


def _slice_vae(pipeline: Any) -> None:
    if not hasattr(getattr(pipeline, "vae", None), "enable_slicing"):
        log.warning("vae-slicing changes nothing: a %s has no VAE to slice", type(pipeline).__name__)
        return
    pipeline.vae.enable_slicing()


def _compile(pipeline: Any) -> None:
    """One form for each size, made when it is first asked for: a form for all sizes, made when the second size comes,
    would give a seed other pixels from then on, and torch cannot make one of every denoiser."""
    from torch._inductor.utils import fresh_cache

    try:
        with fresh_cache():  # what was compiled before would hide that nothing can be compiled now
            torch.compile(lambda number: number + 1)(torch.ones(2, device=device()))
    except Exception as error:  # of many kinds: a compiler that is missing, or one that fails
        raise PipelineError(f"compile is on, and this machine cannot: {_first_line(error)}") from error
    torch._dynamo.config.recompile_limit = max(GRAPHS, torch._dynamo.config.recompile_limit)
    denoiser_of(pipeline).compile(dynamic=False)


@contextmanager
def _in_one_line(model: str) -> Iterator[None]:
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # what a broken model raises is up to three libraries
        raise PipelineError(f"{model!r} cannot be loaded: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
