# SPDX-License-Identifier: Apache-2.0
"""The models that are measured: the libraries' own classes at real and at toy sizes, and the work of one item.

An item is what a batch counts: a picture for the vision towers, a text for T5, one denoising step of one picture for
FLUX. Its FLOPs are those of its matrix products, a multiply-add counted as two:

- a linear layer: 2 x rows x inner x columns, which is 2 per weight and token (Kaplan et al. 2020, arXiv:2001.08361,
  table 1);
- attention that sees both ways: 4 x tokens² x width, half for the scores and half for the values (Chowdhery et al.
  2022, arXiv:2204.02311, appendix B, a third of it: forward only).

Norms, activations and softmax are left out. Its bytes are the fewest that can move where each product is a kernel of
its own and all between them is fused: each weight read once a forward, each product's input read and its output
written, each attention's q, k and v read and its output written. Work over rate and bytes over bandwidth are the two
floors of the roofline (Williams, Waterman and Patterson 2009, CACM 52(4)).

The vision tower of Qwen2.5-VL has one attention call for each window where the attention is `sdpa`: many small kernels,
and a long graph to compile. vLLM's class, which the encode worker runs, has one for them all, as this one has under
`flash_attention_2`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from diffusers import FluxTransformer2DModel
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel, T5Config, T5EncoderModel
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel
from transformers.vision_utils import get_vision_cu_seqlens, get_vision_position_ids, get_vision_window_index

TIME_WIDTH = 256
"""Sinusoids that FLUX's time and guidance embeddings start from; fixed in diffusers' class."""


class Work(NamedTuple):
    """``flops`` of one item, and the ``values`` of activations that it moves at least."""

    flops: int
    values: int

    def __add__(self, other: tuple[Any, ...]) -> Work:
        return Work(self.flops + other[0], self.values + other[1])

    def times(self, count: int) -> Work:
        return Work(self.flops * count, self.values * count)


@dataclass(frozen=True)
class Tower:
    """A model at one size.

    Attributes:
        build: makes the module; called under the meta device.
        inputs: keyword arguments of one forward, by batch, device and dtype.
        work: of one item.
        batches: what a sweep tries.
        setting: the key that the best batch, or the compiled mode, is a value for.
        configs: the files in ``configs/`` that have it.
        unit: what one item counts in that setting.
        precision: whether its goal counts precision: it is then run eagerly in float32 too.
    """

    name: str
    title: str
    item: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int, torch.device, torch.dtype], dict[str, Any]]
    work: Work
    batches: tuple[int, ...]
    setting: str
    configs: str
    unit: int = 1
    precision: bool = False


def linear(rows: int, inner: int, columns: int) -> Work:
    return Work(2 * rows * inner * columns, rows * (inner + columns))


def attention(tokens: int, width: int) -> Work:
    return Work(4 * tokens**2 * width, 4 * tokens * width)


def clip(config: CLIPVisionConfig, batches: tuple[int, ...]) -> Tower:
    side, width, mlp = config.image_size, config.hidden_size, config.intermediate_size
    patches = (side // config.patch_size) ** 2
    tokens = patches + 1  # the class token
    layer = linear(tokens, width, 3 * width) + attention(tokens, width) + linear(tokens, width, width)
    layer += linear(tokens, width, mlp) + linear(tokens, mlp, width)

    def inputs(batch: int, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        return {"pixel_values": torch.randn(batch, 3, side, side, device=device, dtype=dtype)}

    return Tower(
        name="clip",
        title=f"CLIP ViT, {config.num_hidden_layers} layers, {width} wide",
        item=f"picture of {side} x {side}",
        build=partial(CLIPVisionModel, config),
        inputs=inputs,
        work=linear(patches, 3 * config.patch_size**2, width) + layer.times(config.num_hidden_layers),
        batches=batches,
        setting="EncodeWorker.max-batch",
        configs="agg-llava, disagg",
    )


def qwen(config: Qwen2_5_VLVisionConfig, grid: tuple[int, int], batches: tuple[int, ...]) -> Tower:
    """Args: ``grid``: patches of a picture, down and across; both even, since 2 x 2 of them become one token."""
    width, mlp, patch = config.hidden_size, config.intermediate_size, config.patch_size
    patches, merge = grid[0] * grid[1], config.spatial_merge_size**2
    pixels = 3 * config.temporal_patch_size * patch**2
    side = config.window_size // patch
    full = len(config.fullatt_block_indexes)
    windows = [down * across for down in _windows(grid[0], side) for across in _windows(grid[1], side)]
    layer = linear(patches, width, 3 * width) + linear(patches, width, width)
    layer += linear(patches, width, mlp).times(2) + linear(patches, mlp, width)  # gated: two products up
    work = linear(patches, pixels, width) + layer.times(config.depth)
    work += attention(patches, width).times(full)
    for window in windows:
        work += attention(window, width).times(config.depth - full)
    work += linear(patches // merge, merge * width, merge * width)
    work += linear(patches // merge, merge * width, config.out_hidden_size)

    def inputs(batch: int, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        grids = torch.tensor([[1, *grid]] * batch)
        index, edges = get_vision_window_index(grids, config.spatial_merge_size, config.window_size, patch)
        # sdpa reads the edges on the host: on the device they would be a wait for it in every layer.
        at = device if "flash" in (config._attn_implementation or "") else torch.device("cpu")
        return {
            "hidden_states": torch.randn(batch * patches, pixels, device=device, dtype=dtype),
            "grid_thw": grids,
            "position_ids": get_vision_position_ids(grids, config.spatial_merge_size).to(device),
            "cu_seqlens": get_vision_cu_seqlens(grids).to(at),
            "window_index": index.to(device),
            "cu_window_seqlens": edges.to(at),
        }

    return Tower(
        name="qwen",
        title=f"Qwen2.5-VL tower, {config.depth} layers, {width} wide",
        item=f"picture of {patch * grid[1]} x {patch * grid[0]}",
        build=partial(Qwen2_5_VisionTransformerPretrainedModel, config),
        inputs=inputs,
        work=work,
        batches=batches,
        setting="EncodeWorker.max-batch",
        configs="agg-qwen, disagg-qwen, cova",
    )


def t5(config: T5Config, tokens: int, batches: tuple[int, ...]) -> Tower:
    width, inner, mlp = config.d_model, config.num_heads * config.d_kv, config.d_ff
    layer = linear(tokens, width, inner).times(3) + attention(tokens, inner) + linear(tokens, inner, width)
    layer += linear(tokens, width, mlp).times(2) + linear(tokens, mlp, width)  # gated: two products up

    def inputs(batch: int, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        ids = torch.randint(config.vocab_size, (batch, tokens), device=device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    return Tower(
        name="t5",
        title=f"T5 encoder, {config.num_layers} layers, {width} wide",
        item=f"text of {tokens} tokens",
        build=partial(T5EncoderModel, config),
        inputs=inputs,
        work=layer.times(config.num_layers),
        batches=batches,
        setting="EmbedWorker.batch-tokens",
        configs="cova, cova-llama4",
        unit=tokens,
    )


def flux(sizes: dict[str, Any], side: int, text: int, batches: tuple[int, ...]) -> Tower:
    """Args: ``sizes``: arguments of diffusers' class. ``side``: of the latent in tokens, each 16 x 16 pixels.
    ``text``: tokens of a prompt."""
    width = sizes["num_attention_heads"] * sizes["attention_head_dim"]
    channels, states, pooled = sizes["in_channels"], sizes["joint_attention_dim"], sizes["pooled_projection_dim"]
    picture = side**2
    tokens = picture + text
    both = attention(tokens, width)
    # Two streams, each with weights of its own, that meet in the attention; six modulations a stream, once an item.
    double = linear(1, width, 6 * width).times(2) + both
    for rows in (picture, text):
        double += linear(rows, width, 3 * width) + linear(rows, width, width)
        double += linear(rows, width, 4 * width) + linear(rows, 4 * width, width)
    single = linear(1, width, 3 * width) + linear(tokens, width, 3 * width) + both
    single += linear(tokens, width, 4 * width) + linear(tokens, 5 * width, width)
    work = double.times(sizes["num_layers"]) + single.times(sizes["num_single_layers"])
    work += linear(picture, channels, width) + linear(text, states, width) + linear(picture, width, channels)
    work += (linear(1, TIME_WIDTH, width) + linear(1, width, width)).times(2)  # time and guidance
    work += linear(1, pooled, width) + linear(1, width, width) + linear(1, width, 2 * width)

    def inputs(batch: int, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        draw = partial(torch.randn, device=device, dtype=dtype)
        place = torch.arange(side, device=device, dtype=dtype)
        rows, columns = torch.meshgrid(place, place, indexing="ij")
        return {
            "hidden_states": draw(batch, picture, channels),
            "encoder_hidden_states": draw(batch, text, states),
            "pooled_projections": draw(batch, pooled),
            "timestep": torch.full((batch,), 0.5, device=device, dtype=dtype),
            "guidance": torch.full((batch,), 3.5, device=device),
            "img_ids": torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3),
            "txt_ids": torch.zeros(text, 3, device=device, dtype=dtype),
        }

    return Tower(
        name="flux",
        title=f"FLUX transformer, {sizes['num_layers']} + {sizes['num_single_layers']} blocks, {width} wide",
        item=f"step of a picture of {16 * side} x {16 * side}",
        build=lambda: FluxTransformer2DModel(**sizes, guidance_embeds=True),
        inputs=inputs,
        work=work,
        batches=batches,
        setting="ImageWorker.compile",
        configs="cova",
        precision=True,
    )


def real(attn: str = "sdpa") -> list[Tower]:
    """The sizes of openai/clip-vit-large-patch14-336, Qwen/Qwen2.5-VL-7B-Instruct, google/t5-v1_1-xxl and
    black-forest-labs/FLUX.1-dev, as their own configurations state them.

    Args:
        attn: transformers' ``attn_implementation`` of the two vision towers.
    """
    return [
        clip(
            CLIPVisionConfig(
                hidden_size=1024,
                intermediate_size=4096,
                num_hidden_layers=24,
                num_attention_heads=16,
                image_size=336,
                patch_size=14,
                attn_implementation=attn,
            ),
            batches=(1, 2, 4, 8, 16, 32, 64, 128),
        ),
        qwen(
            Qwen2_5_VLVisionConfig(
                depth=32,
                hidden_size=1280,
                intermediate_size=3420,
                num_heads=16,
                out_hidden_size=3584,
                fullatt_block_indexes=[7, 15, 23, 31],
                attn_implementation=attn,
            ),
            grid=(70, 70),  # a picture of 1024 x 1024 under the configs' `max_pixels`
            batches=(1, 2, 4, 8, 16),
        ),
        t5(
            T5Config(
                vocab_size=32128,
                d_model=4096,
                d_kv=64,
                d_ff=10240,
                num_layers=24,
                num_heads=64,
                feed_forward_proj="gated-gelu",
            ),
            tokens=512,  # as FLUX's pipeline pads its prompts
            batches=(1, 2, 4, 8, 16, 32, 64, 128),
        ),
        flux(
            {
                "in_channels": 64,
                "num_layers": 19,
                "num_single_layers": 38,
                "attention_head_dim": 128,
                "num_attention_heads": 24,
                "joint_attention_dim": 4096,
                "pooled_projection_dim": 768,
            },
            side=64,
            text=512,
            batches=(1, 2, 4, 8),
        ),
    ]


def toy(attn: str = "sdpa") -> list[Tower]:
    """The same classes with two layers of a few dozen values: they show that the benchmark runs, and nothing else."""
    return [
        clip(
            CLIPVisionConfig(
                hidden_size=64,
                intermediate_size=256,
                num_hidden_layers=2,
                num_attention_heads=2,
                image_size=56,
                patch_size=14,
                attn_implementation=attn,
            ),
            batches=(1, 2),
        ),
        qwen(
            Qwen2_5_VLVisionConfig(
                depth=2,
                hidden_size=64,
                intermediate_size=96,
                num_heads=2,
                out_hidden_size=128,
                fullatt_block_indexes=[1],
                attn_implementation=attn,
            ),
            grid=(10, 8),  # two windows, one of them cut
            batches=(1, 2),
        ),
        t5(
            T5Config(
                vocab_size=256,
                d_model=64,
                d_kv=16,
                d_ff=160,
                num_layers=2,
                num_heads=4,
                feed_forward_proj="gated-gelu",
            ),
            tokens=32,
            batches=(1, 2),
        ),
        flux(
            {
                "in_channels": 16,
                "num_layers": 1,
                "num_single_layers": 1,
                "attention_head_dim": 16,
                "num_attention_heads": 4,
                "joint_attention_dim": 64,
                "pooled_projection_dim": 32,
                "axes_dims_rope": (4, 6, 6),
            },
            side=8,
            text=16,
            batches=(1, 2),
        ),
    ]


def materialise(tower: Tower, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The tower on ``device`` with random weights, drawn there: a file of its size would take minutes to read.

    Raises:
        torch.OutOfMemoryError: the weights do not fit.
    """
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # and not `to(dtype)`, which would round the tables that are float32 in any dtype
    try:
        with torch.device("meta"):
            model = tower.build()
    finally:
        torch.set_default_dtype(usual)
    model.to_empty(device=device)
    if hasattr(model, "init_weights"):  # transformers: the tables that no checkpoint has, too, and ties
        model.init_weights()
    else:
        _draw(model)
    return model.eval().requires_grad_(False)


def weight_bytes(model: nn.Module) -> int:
    """What one forward reads of the weights: of an embedding's table only some rows, which are not counted."""
    tables = {id(one.weight) for one in model.modules() if isinstance(one, nn.Embedding)}
    return sum(one.numel() * one.element_size() for one in model.parameters() if id(one) not in tables)


def _draw(model: nn.Module) -> None:
    """Matrices normal, norms one, biases zero: values as a trained model's in size, since they decide what a card draws
    in power, and with it its clock."""
    for name, one in model.named_parameters():
        if one.dim() > 1:
            nn.init.normal_(one, std=0.02)
        else:
            nn.init.constant_(one, float(name.endswith("weight")))


def _windows(patches: int, side: int) -> list[int]:
    """Patches along one axis, in windows of ``side``; the last is what is left."""
    return [min(side, patches - start) for start in range(0, patches, side)]
