# SPDX-License-Identifier: Apache-2.0
"""Text-to-image pipelines of diffusers, any of them: one request becomes one picture."""

from __future__ import annotations

import copy
import inspect
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dynamo_epd.diffusion.loading import Switches, denoiser_name, denoiser_of, device, dtype_of, load
from dynamo_epd.diffusion.meeting import Meeting
from dynamo_epd.diffusion.text_encoder import Ask, RemoteTextEncoder
from dynamo_epd.errors import InvalidRequest, UnsupportedParameter


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
        model: a directory, a name on the hub, or ``s3://bucket/prefix``.
        dtype: ``auto`` is bfloat16 on a GPU and float32 elsewhere.
        ask: where T5's states come from. With it the pipeline's own T5 is never loaded.
        loras: LoRA adapters by the name that requests give them; each where a model may be.
        max_batch: pictures whose denoise steps are taken together. 1 gives the very pixels of plain diffusers, of
            PixArt up to float32's rounding; with more they may differ by a level. Compiled denoisers would have a form
            for each size of batch, and offloading moves weights from under others: with either it is 1.
        on_batch: told how many pictures each call of the denoiser was for.

    Raises:
        PipelineError, WeightsError: what cannot be loaded, or run in this way, in one line.
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
        loras: Mapping[str, str] | None = None,
        max_batch: int = 1,
        on_batch: Callable[[int], None] = lambda _: None,
    ):
        switches = Switches(attention_slicing, vae_slicing, cpu_offload, compile)
        # torch takes no dots in a module's name; requests may name an adapter as they like.
        self._loras = {name: f"lora_{index}" for index, name in enumerate(loras or {})}
        sources = {self._loras[name]: source for name, source in (loras or {}).items()}
        remote = None if ask is None else lambda: RemoteTextEncoder(self._asking(ask), dtype_of(dtype), device())
        self._pipeline = load(model, dtype_of(dtype), switches, sources, remote)
        self._remote = [one for one in self._pipeline.components.values() if isinstance(one, RemoteTextEncoder)]
        self._takes = inspect.signature(self._pipeline.__call__).parameters
        # One to count with, in any thread: the pipeline's own is changed by whoever has his turn. The first call of a
        # tokenizer takes its file's padding off, and later ones change nothing.
        self._tokenizer = copy.deepcopy(tokenizer_of(self._pipeline))
        self._tokenizer.backend_tokenizer.no_padding()
        self._tokenizer.backend_tokenizer.no_truncation()
        self._alone = max_batch == 1 or compile or cpu_offload
        if not self._alone:
            _settle_device(self._pipeline)
        self._meeting = Meeting(denoiser_of(self._pipeline), 1 if self._alone else max_batch, on_batch)

    def _asking(self, ask: Ask) -> Ask:
        return lambda row: self._meeting.away(lambda: ask(row))

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

    def check(self, wanted: Wanted) -> None:
        """Raises `InvalidRequest` for what would be ignored, cut or is not there, naming the field. Any thread may ask,
        whatever is made meanwhile. What a pipeline refuses itself, such as some sizes, is known only in `generate`.
        """
        if wanted.lora is not None and wanted.lora not in self._loras:
            known = ", ".join(sorted(self._loras)) or "none"
            raise InvalidRequest(f"there is no LoRA adapter of that name; there is: {known}", param="lora")
        if wanted.width % self._patch or wanted.height % self._patch:
            raise InvalidRequest(f"both sides must be multiples of {self._patch} with this image model", param="size")
        if wanted.guidance_scale is not None and not self._takes_guidance:
            raise UnsupportedParameter("this image model takes no 'guidance_scale'", param="guidance_scale")
        if wanted.negative_prompt is not None and self._negation(wanted) <= 1:
            raise UnsupportedParameter(
                "this image model takes no 'negative_prompt', or not at this 'guidance_scale'", param="negative_prompt"
            )
        for name, text in (("prompt", wanted.prompt), ("negative_prompt", wanted.negative_prompt or "")):
            if self._tokens(text) > self._most_tokens:
                raise InvalidRequest(
                    f"'{name}' has {self._tokens(text)} tokens, {self._most_tokens} are this image model's limit",
                    param=name,
                    code="text_too_long",
                )

    def generate(
        self, wanted: Wanted, on_step: OnStep, stop: threading.Event, on_begin: Callable[[], None] = lambda: None
    ) -> Made:
        """The same seed gives the same pixels, whatever ran before: up to rounding where pictures are batched.

        Called from many threads; each of them is busy until its picture is there. ``on_begin`` is called when its turn
        has come: others may be made before.

        Raises:
            InvalidRequest: what the pipeline cannot do, naming the field, or makes no numbers of.
            Stopped: when its turn has come, or at the first step, after ``stop`` is set.
        """
        self.check(wanted)  # before its turn: an adapter that there is not would keep all others waiting for nothing

        def picture(denoiser: Any) -> tuple[np.ndarray, bytes | None]:
            if stop.is_set():
                raise Stopped
            on_begin()
            found = self._drawn(wanted, self._fresh(denoiser), on_step, stop)
            return found, next((encoder.vector for encoder in self._remote), None)

        found, vector = self._meeting.make(wanted.lora, picture)
        if found.shape[:2] != (wanted.height, wanted.width):
            raise InvalidRequest(f"the image model makes {found.shape[1]}x{found.shape[0]} of this", param="size")
        if not np.isfinite(found).all():
            raise InvalidRequest(
                "the picture is not finite: another 'guidance_scale', prompt or seed may do; if none does, the image "
                "model needs another dtype"
            )
        tokens = wanted.width * wanted.height // self._patch**2
        return Made(to_bytes(found), self._tokens(wanted.prompt), tokens, vector)

    def _drawn(self, wanted: Wanted, pipeline: Any, on_step: OnStep, stop: threading.Event) -> np.ndarray:
        """float32 (height, width, 3) in 0 to 1, or as large as the pipeline has made it."""
        self._choose_lora(wanted.lora)
        arguments = self._arguments(wanted) | self._callback(pipeline, wanted, on_step, stop)
        try:
            found: np.ndarray = pipeline(**arguments, output_type="np").images[0]
        except ValueError as error:
            about_size = any(word in str(error).lower() for word in ("height", "width", "size"))
            raise InvalidRequest(
                f"the image pipeline refuses this request: {error}", param="size" if about_size else None
            ) from error
        except Stopped:
            pipeline.maybe_free_model_hooks()  # as a pipeline does at its end: nothing stays on the GPU
            raise
        return found

    def _fresh(self, denoiser: Any) -> Any:
        """The pipeline for one picture, with a scheduler of its own: a scheduler is the state of one picture."""
        pipeline = copy.copy(self._pipeline)
        if not self._alone:
            # Not by setattr, which would also have it in the configuration that all copies share.
            vars(pipeline)[denoiser_name(pipeline)] = denoiser
        pipeline.scheduler = copy.deepcopy(self._pipeline.scheduler)  # which nobody steps
        return pipeline

    def _choose_lora(self, name: str | None) -> None:
        if name is not None:
            self._pipeline.set_adapters(self._loras[name])
            self._pipeline.enable_lora()
        elif self._loras:
            self._pipeline.disable_lora()

    def _arguments(self, wanted: Wanted) -> dict[str, Any]:
        """What the pipeline is called with."""
        arguments: dict[str, Any] = {
            "prompt": wanted.prompt,
            "width": wanted.width,
            "height": wanted.height,
            "generator": torch.Generator("cpu").manual_seed(wanted.seed),  # one noise on every device
        }
        optional = {
            "num_inference_steps": wanted.steps,
            "guidance_scale": wanted.guidance_scale,
            "negative_prompt": wanted.negative_prompt,
        }
        arguments |= {name: value for name, value in optional.items() if value is not None}
        # A picture has the size that was asked for, and not the nearest of those that the model was trained on.
        if "use_resolution_binning" in self._takes:
            arguments["use_resolution_binning"] = False
        # Rewriting prompts needs a parser of HTML.
        if "clean_caption" in self._takes:
            arguments["clean_caption"] = False
        return arguments

    @property
    def _takes_guidance(self) -> bool:
        """Not so the models that were distilled to do without: their pipelines ignore it."""
        distilled = getattr(denoiser_of(self._pipeline).config, "guidance_embeds", None) is False
        return "guidance_scale" in self._takes and (
            not distilled or hasattr(self._pipeline, "do_classifier_free_guidance")
        )

    def _negation(self, wanted: Wanted) -> float:
        """How strongly a negative prompt would guide; up to 1 pipelines ignore it."""
        if "negative_prompt" not in self._takes or getattr(
            denoiser_of(self._pipeline).config, "time_cond_proj_dim", None
        ):
            return 0.0
        if "true_cfg_scale" in self._takes:
            return float(self._takes["true_cfg_scale"].default)
        default = self._takes["guidance_scale"].default if "guidance_scale" in self._takes else 0.0
        return float(default if wanted.guidance_scale is None else wanted.guidance_scale)

    def _tokens(self, text: str) -> int:
        return len(self._tokenizer.backend_tokenizer.encode(text))

    @property
    def _most_tokens(self) -> int:
        """Pipelines cut what is longer."""
        if "max_sequence_length" in self._takes:
            return int(self._takes["max_sequence_length"].default)
        return int(self._tokenizer.model_max_length)

    @property
    def _patch(self) -> int:
        """Pixels along one side of what the denoiser takes for one token."""
        patch = getattr(denoiser_of(self._pipeline).config, "patch_size", None)
        packed = 2 if hasattr(self._pipeline, "_pack_latents") else 1
        return int(self._pipeline.vae_scale_factor * packed * (patch if isinstance(patch, int) else 1))

    def _callback(self, pipeline: Any, wanted: Wanted, on_step: OnStep, stop: threading.Event) -> dict[str, Any]:
        """The argument by which the pipeline tells of its steps: the newer of the two that there are."""
        total = wanted.steps or self.steps
        told = 0

        def stepped(index: int, latents: torch.Tensor) -> None:
            nonlocal told
            if stop.is_set():
                raise Stopped
            # Schedulers of second order call the denoiser twice for most steps.
            done = -(-(index + 1) * total // max(total, len(pipeline.scheduler.timesteps)))
            if done > told:
                told = done
                on_step(done, total, lambda: self._decoded(pipeline, latents, wanted))

        if "callback_on_step_end" in self._takes:

            def on_end(_: Any, index: int, __: Any, values: dict[str, Any]) -> dict[str, Any]:
                stepped(index, values["latents"])
                return {}

            return {"callback_on_step_end": on_end}
        if "callback" in self._takes:
            return {"callback": lambda index, _, latents: stepped(index, latents)}
        return {}

    def _decoded(self, pipeline: Any, latents: torch.Tensor, wanted: Wanted) -> np.ndarray:
        """What the latents show by now: uint8 (height, width, 3)."""
        if latents.ndim == 3 and hasattr(pipeline, "_unpack_latents"):  # FLUX packs 2×2 patches
            latents = pipeline._unpack_latents(latents, wanted.height, wanted.width, pipeline.vae_scale_factor)
        if latents.ndim != 4:
            raise UnsupportedParameter("this image model shows no partial pictures", param="partial_images")
        vae, dtype = pipeline.vae, pipeline.vae.dtype
        config = vae.config
        mean, deviation = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
        if mean is not None and deviation is not None:
            shape = (1, -1, 1, 1)
            latents = latents * latents.new_tensor(deviation).view(shape) / config.scaling_factor
            latents = latents + latents.new_tensor(mean).view(shape)
        else:
            latents = latents / config.scaling_factor + (getattr(config, "shift_factor", None) or 0.0)
        upcast = dtype == torch.float16 and getattr(config, "force_upcast", False)
        if upcast:
            vae.to(torch.float32)
        decoded = vae.decode(latents.to(vae.dtype), return_dict=False)[0]
        if upcast:
            vae.to(dtype)
        return to_bytes(pipeline.image_processor.postprocess(decoded, output_type="np")[0])


def tokenizer_of(pipeline: Any) -> Any:
    """T5's where there are several: it comes last."""
    parts = pipeline.components
    return parts[max(name for name in parts if name.startswith("tokenizer") and parts[name] is not None)]


def _settle_device(pipeline: Any) -> None:
    """Three times a picture diffusers looks through all modules for hooks that would say where they run, a tenth of
    all that there is to do for a tiny one. Where nothing is offloaded there are none."""
    kind = type(pipeline)
    pipeline.__class__ = type(kind.__name__, (kind,), {"_execution_device": pipeline._execution_device})


def to_bytes(image: np.ndarray) -> np.ndarray:
    """float (height, width, 3) in 0 to 1 → uint8."""
    return (image * 255).round().clip(0, 255).astype(np.uint8)
