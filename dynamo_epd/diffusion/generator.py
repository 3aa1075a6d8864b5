# SPDX-License-Identifier: Apache-2.0
"""Text-to-image pipelines of diffusers, any of them. The only file that imports it."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline

from dynamo_epd.diffusion.text_encoder import Ask, RemoteTextEncoder
from dynamo_epd.errors import InvalidRequest, UnsupportedParameter

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
T5_CLASSES = frozenset({"T5EncoderModel", "UMT5EncoderModel"})


@dataclass(frozen=True)
class Wanted:
    """One picture. None leaves a value to the pipeline."""

    prompt: str
    seed: int
    width: int
    height: int
    steps: int | None = None
    guidance_scale: float | None = None
    negative_prompt: str | None = None
    lora: str | None = None


@dataclass(frozen=True)
class Made:
    """One picture.

    Attributes:
        pixels: uint8 (height, width, 3).
        prompt_tokens: of the prompt, without padding.
        image_tokens: patches that the denoiser worked on.
        prompt_vector: little-endian float32, where an embed worker conditioned it.
    """

    pixels: np.ndarray
    prompt_tokens: int
    image_tokens: int
    prompt_vector: bytes | None


class Stopped(Exception):
    """The picture is not wanted any more."""


Preview = Callable[[], np.ndarray]
OnStep = Callable[[int, int, Preview], None]
"""Told after each denoise step: steps done, steps in all, and a function that decodes what there is by now."""


class Generator:
    """One pipeline with its weights.

    Args:
        model: a directory, or a name on the hub.
        dtype: ``auto`` is bfloat16 on a GPU and float32 elsewhere.
        ask: where T5's states come from. With it the pipeline's own T5 is never loaded.
        loras: LoRA adapters by the name that requests give them: directory or name on the hub.
    """

    def __init__(
        self,
        model: str,
        *,
        dtype: str = "auto",
        ask: Ask | None = None,
        attention_slicing: bool = False,
        vae_slicing: bool = False,
        cpu_offload: bool = False,
        compile: bool = False,
        loras: dict[str, str] | None = None,
    ):
        cuda = torch.cuda.is_available()
        self._device = torch.device("cuda" if cuda else "cpu")
        self._dtype = DTYPES.get(dtype) or (torch.bfloat16 if cuda else torch.float32)
        elsewhere: dict[str, Any] = {}
        if ask is not None:
            elsewhere = dict.fromkeys(t5_components(DiffusionPipeline.load_config(model)))
        pipeline = DiffusionPipeline.from_pretrained(model, dtype=self._dtype, **elsewhere)
        pipeline.set_progress_bar_config(disable=True)
        for name, path in (loras or {}).items():
            pipeline.load_lora_weights(path, adapter_name=name)
        if cpu_offload and cuda:
            pipeline.enable_model_cpu_offload()
        else:
            pipeline.to(self._device)
        if attention_slicing:
            pipeline.enable_attention_slicing()
        if vae_slicing:
            pipeline.vae.enable_slicing()
        if compile:
            pipeline.transformer.compile()
        self._remote: dict[str, RemoteTextEncoder] = {}
        for name in elsewhere:
            assert ask is not None
            self._remote[name] = RemoteTextEncoder(ask, self._dtype, self._device)
            setattr(pipeline, name, self._remote[name])
        self._pipeline = pipeline
        self._loras = frozenset(loras or {})
        self._takes = inspect.signature(pipeline.__call__).parameters

    @property
    def parameters(self) -> dict[str, int]:
        """Parameters that are held, by component."""
        return {
            name: sum(one.numel() for one in module.parameters())
            for name, module in self._pipeline.components.items()
            if isinstance(module, torch.nn.Module)
        }

    @property
    def steps(self) -> int:
        """Denoise steps where a request does not say."""
        return int(self._takes["num_inference_steps"].default)

    @torch.inference_mode()
    def generate(self, wanted: Wanted, on_step: OnStep, stop: threading.Event) -> Made:
        """The same seed gives the same pixels, whatever ran before. One call at a time.

        Raises `InvalidRequest` for what the pipeline cannot do and `Stopped` at the first step after ``stop`` is set.
        """
        pipeline = self._fresh(wanted)
        for encoder in self._remote.values():
            encoder.vector = None
        arguments = self._arguments(wanted)
        total = arguments.get("num_inference_steps", self.steps)

        def stepped(done: int, latents: torch.Tensor) -> None:
            if stop.is_set():
                raise Stopped
            on_step(done, total, lambda: self._decoded(pipeline, latents, wanted))

        if "callback_on_step_end" in self._takes:

            def on_end(_: Any, step: int, __: Any, values: dict[str, Any]) -> dict[str, Any]:
                stepped(step + 1, values["latents"])
                return {}

            arguments["callback_on_step_end"] = on_end
        else:
            arguments["callback"] = lambda step, _, latents: stepped(step + 1, latents)
        generator = torch.Generator("cpu").manual_seed(wanted.seed)
        try:
            found = pipeline(
                **arguments, height=wanted.height, width=wanted.width, generator=generator, output_type="np"
            )
        except ValueError as error:  # of a size that the model's patches do not divide, say
            raise InvalidRequest(f"the image pipeline refuses this request: {error}", param="size") from error
        return Made(
            to_bytes(found.images[0]),
            len(self._tokenizer(wanted.prompt).input_ids),
            self._patches(wanted.width, wanted.height),
            next((encoder.vector for encoder in self._remote.values()), None),
        )

    @property
    def _tokenizer(self) -> Any:
        """T5's where there are several: it comes last."""
        parts = self._pipeline.components
        return next(parts[name] for name in ("tokenizer_3", "tokenizer_2", "tokenizer") if parts.get(name) is not None)

    def _patches(self, width: int, height: int) -> int:
        side = self._pipeline.vae_scale_factor
        denoiser = self._pipeline.components.get("transformer") or self._pipeline.components["unet"]
        patch = 2 if hasattr(self._pipeline, "_pack_latents") else getattr(denoiser.config, "patch_size", None) or 1
        return (width // side // patch) * (height // side // patch)

    def _fresh(self, wanted: Wanted) -> Any:
        """The pipeline with a scheduler of its own: a scheduler is the state of one picture."""
        parts = dict(self._pipeline.components)
        parts["scheduler"] = parts["scheduler"].from_config(parts["scheduler"].config)
        pipeline = type(self._pipeline)(**(parts | dict.fromkeys(self._remote)))
        for name, encoder in self._remote.items():
            setattr(pipeline, name, encoder)
        pipeline.set_progress_bar_config(disable=True)
        if wanted.lora is not None and wanted.lora not in self._loras:
            raise InvalidRequest(
                f"there is no LoRA adapter of that name; there are {sorted(self._loras)}", param="lora"
            )
        if self._loras:
            pipeline.set_adapters([wanted.lora] if wanted.lora else [])
        return pipeline

    def _arguments(self, wanted: Wanted) -> dict[str, Any]:
        arguments: dict[str, Any] = {"prompt": wanted.prompt}
        optional = {
            "num_inference_steps": wanted.steps,
            "guidance_scale": wanted.guidance_scale,
            "negative_prompt": wanted.negative_prompt,
        }
        for name, value in optional.items():
            if value is None:
                continue
            if name not in self._takes:
                raise UnsupportedParameter(f"this image model takes no '{name}'", param=name)
            arguments[name] = value
        # A picture has the size that was asked for, and not the nearest of those that the model was trained on.
        if "use_resolution_binning" in self._takes:
            arguments["use_resolution_binning"] = False
        # Rewriting prompts needs a parser of HTML.
        if "clean_caption" in self._takes:
            arguments["clean_caption"] = False
        return arguments

    def _decoded(self, pipeline: Any, latents: torch.Tensor, wanted: Wanted) -> np.ndarray:
        vae = pipeline.vae
        if latents.ndim == 3:  # FLUX packs 2×2 patches
            latents = pipeline._unpack_latents(latents, wanted.height, wanted.width, pipeline.vae_scale_factor)
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        decoded = vae.decode((latents / vae.config.scaling_factor + shift).to(vae.dtype), return_dict=False)[0]
        return to_bytes(pipeline.image_processor.postprocess(decoded, output_type="np")[0])


def t5_components(index: dict[str, Any]) -> list[str]:
    """The components of a ``model_index.json`` that are T5 encoders."""
    return [
        name
        for name, found in index.items()
        if isinstance(found, (list, tuple)) and len(found) == 2 and found[1] in T5_CLASSES
    ]


def to_bytes(image: np.ndarray) -> np.ndarray:
    """float (height, width, 3) in 0 to 1 → uint8."""
    return (image * 255).round().clip(0, 255).astype(np.uint8)
