# SPDX-License-Identifier: Apache-2.0
"""Writes tiny checkpoints of the real architectures with random, seeded weights.

They stand in for the 7B models wherever the machinery is tested and not the answer: hub layout, safetensors,
processor, tokenizer and chat template, loaded by exactly the code that loads the big ones.

    python models/untrained.py llava DIRECTORY

Families: llava, llava_next, qwen2_5_vl, qwen3_vl, internvl, llama4; and pixart, flux, flux_schnell, sd3 and sdxl, which
draw (from the repository's root: they take the trained T5, or its tokenizer).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

LLAVA_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] if message['content'] is string "
    "else message['content'] | map(attribute='text') | join('') }} "
    "{% else %}{{ message['role'].upper() }}: "
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)

QWEN_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

INTERNVL_TEMPLATE = QWEN_TEMPLATE.replace("<|vision_start|><|image_pad|><|vision_end|>", "<IMG_CONTEXT>\n")

LLAMA4_TEMPLATE = (
    "<|begin_of_text|>{% for message in messages %}<|header_start|>{{ message['role'] }}<|header_end|>\n\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|image|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|header_start|>assistant<|header_end|>\n\n{% endif %}"
)


def byte_tokenizer(specials: list[str], *, bos: str | None, eos: str, pad: str, named: dict[str, str] | None = None):
    """A byte-level tokenizer without merges: 256 byte tokens, then ``specials`` in order.

    ``named`` are specials that the model's processor asks the tokenizer for by attribute.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        model_max_length=8192,
        extra_special_tokens=named or {},
    )


def randomise(model, seed: int, std: float) -> None:
    """Draws every matrix from N(0, (std / sqrt(fan_in))²) so that answers depend on the whole prompt, images included,
    and every embedding that is one vector from N(0, 1 / length).

    transformers' own initialisation (0.02) leaves a toy-sized model whose greedy answer ignores its input.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                fan_in = parameter[0].numel()
                scale = 1.0 if "embed" in name else std / fan_in**0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
            elif name.endswith("bias"):
                parameter.zero_()
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and name.endswith(("class_embedding", "image_newline")):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / len(parameter) ** 0.5)


def clip_and_llama(tokenizer):
    """Configurations of a CLIP tower (56×56 pixels, 16 patches) and of a Llama of two layers."""
    from transformers import CLIPVisionConfig, LlamaConfig

    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=2, image_size=56, patch_size=14
    )
    text = LlamaConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=8192,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return vision, text


def write_llava(directory: Path) -> None:
    """LlavaForConditionalGeneration: a picture is cropped to one square, 16 tokens."""
    from transformers import CLIPImageProcessor, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

    tokenizer = byte_tokenizer(["<s>", "</s>", "<pad>", "<image>"], bos="<s>", eos="</s>", pad="<pad>")
    vision, text = clip_and_llama(tokenizer)
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=16,
        vision_feature_layer=-2,
    )
    model = LlavaForConditionalGeneration(config).eval()
    randomise(model, seed=1, std=1.6)
    model.save_pretrained(directory)
    rename_tensors(directory, "vision_tower.", "vision_tower.vision_model.")
    side = {"shortest_edge": 56}
    LlavaProcessor(
        image_processor=CLIPImageProcessor(size=side, crop_size={"height": 56, "width": 56}),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        chat_template=LLAVA_TEMPLATE,
        num_additional_image_tokens=1,
    ).save_pretrained(directory)


def write_llava_next(directory: Path) -> None:
    """LlavaNextForConditionalGeneration: a thumbnail and two to four crops of 56×56 pixels."""
    from transformers import (
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
        LlavaNextImageProcessor,
        LlavaNextProcessor,
    )

    tokenizer = byte_tokenizer(["<s>", "</s>", "<pad>", "<image>"], bos="<s>", eos="</s>", pad="<pad>")
    vision, text = clip_and_llama(tokenizer)
    grids = [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]
    config = LlavaNextConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=16,
        image_grid_pinpoints=grids,
    )
    model = LlavaNextForConditionalGeneration(config).eval()
    randomise(model, seed=3, std=1.6)
    model.save_pretrained(directory)
    rename_tensors(directory, "vision_tower.", "vision_tower.vision_model.")
    LlavaNextProcessor(
        image_processor=LlavaNextImageProcessor(
            size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}, image_grid_pinpoints=grids
        ),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        chat_template=LLAVA_TEMPLATE,
        num_additional_image_tokens=1,
    ).save_pretrained(directory)


def qwen_tokenizer():
    specials = [
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        "<|vision_start|>",
        "<|vision_end|>",
        "<|vision_pad|>",
        "<|image_pad|>",
        "<|video_pad|>",
    ]
    return byte_tokenizer(specials, bos=None, eos="<|im_end|>", pad="<|endoftext|>")


def write_qwen2_5_vl(directory: Path) -> None:
    """Qwen2_5_VLForConditionalGeneration: dynamic resolution (28-pixel merges), mRoPE, two text layers."""
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
    )
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

    tokenizer = qwen_tokenizer()
    token = tokenizer.convert_tokens_to_ids
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 320,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 8192,
            "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 1000000.0},
            "bos_token_id": token("<|endoftext|>"),
            "eos_token_id": token("<|im_end|>"),
            "pad_token_id": token("<|endoftext|>"),
        },
        vision_config={
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 2,
            "out_hidden_size": 64,
            "fullatt_block_indexes": [1],
            "window_size": 56,
        },
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
    )
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    randomise(model, seed=2, std=1.6)
    model.save_pretrained(directory)
    pixels = {"shortest_edge": 56 * 56, "longest_edge": 224 * 224}
    Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=pixels),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(),
        chat_template=QWEN_TEMPLATE,
    ).save_pretrained(directory)


def write_qwen3_vl(directory: Path) -> None:
    """Qwen3VLForConditionalGeneration: 32-pixel merges, interleaved mRoPE, one DeepStack level."""
    from transformers import Qwen2VLImageProcessor, Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLProcessor
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

    tokenizer = qwen_tokenizer()
    token = tokenizer.convert_tokens_to_ids
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": 320,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "max_position_embeddings": 8192,
            "rope_parameters": {
                "rope_type": "default",
                "mrope_section": [8, 4, 4],
                "mrope_interleaved": True,
                "rope_theta": 5000000.0,
            },
            "bos_token_id": token("<|endoftext|>"),
            "eos_token_id": token("<|im_end|>"),
            "pad_token_id": token("<|endoftext|>"),
        },
        vision_config={
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 2,
            "out_hidden_size": 64,
            "num_position_embeddings": 49,
            "deepstack_visual_indexes": [0],
        },
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
    )
    model = Qwen3VLForConditionalGeneration(config).eval()
    randomise(model, seed=4, std=1.6)
    model.save_pretrained(directory)
    pixels = {"shortest_edge": 64 * 64, "longest_edge": 224 * 224}
    Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(
            size=pixels, patch_size=16, image_mean=[0.5, 0.5, 0.5], image_std=[0.5, 0.5, 0.5]
        ),
        tokenizer=tokenizer,
        video_processor=Qwen3VLVideoProcessor(),
        chat_template=QWEN_TEMPLATE,
    ).save_pretrained(directory)


def write_internvl(directory: Path) -> None:
    """InternVLForConditionalGeneration (the hub's ``-hf`` checkpoints): a thumbnail and up to four tiles."""
    from transformers import (
        GotOcr2ImageProcessor,
        InternVLConfig,
        InternVLForConditionalGeneration,
        InternVLProcessor,
        InternVLVideoProcessor,
    )

    named = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *named.values()]
    tokenizer = byte_tokenizer(specials, bos=None, eos="<|im_end|>", pad="<|endoftext|>", named=named)
    token = tokenizer.convert_tokens_to_ids
    config = InternVLConfig(
        vision_config={
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": [56, 56],
            "patch_size": [14, 14],
        },
        text_config={
            "model_type": "qwen2",
            "vocab_size": 320,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 8192,
            "bos_token_id": token("<|endoftext|>"),
            "eos_token_id": token("<|im_end|>"),
            "pad_token_id": token("<|endoftext|>"),
        },
        image_token_id=token("<IMG_CONTEXT>"),
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    model = InternVLForConditionalGeneration(config).eval()
    randomise(model, seed=5, std=1.6)
    model.save_pretrained(directory)
    side = {"height": 56, "width": 56}
    InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(size=side, crop_to_patches=True, min_patches=1, max_patches=4),
        tokenizer=tokenizer,
        video_processor=InternVLVideoProcessor(size=side),
        image_seq_length=4,
        chat_template=INTERNVL_TEMPLATE,
    ).save_pretrained(directory)


def write_llama4(directory: Path) -> None:
    """Llama4ForConditionalGeneration: tiles of 56×56 pixels, four text layers (the last without RoPE), two experts."""
    from transformers import Llama4Config, Llama4ForConditionalGeneration, Llama4ImageProcessor, Llama4Processor

    specials = [
        "<|begin_of_text|>",
        "<|eot|>",
        "<|finetune_right_pad|>",
        "<|header_start|>",
        "<|header_end|>",
        "<|image_start|>",
        "<|image_end|>",
        "<|image|>",
        "<|patch|>",
        "<|tile_x_separator|>",
        "<|tile_y_separator|>",
    ]
    tokenizer = byte_tokenizer(specials, bos="<|begin_of_text|>", eos="<|eot|>", pad="<|finetune_right_pad|>")
    token = tokenizer.convert_tokens_to_ids
    config = Llama4Config(
        vision_config={
            "hidden_size": 64,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 56,
            "patch_size": 14,
            "projector_input_dim": 64,
            "projector_output_dim": 64,
            "vision_output_dim": 64,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        text_config={
            "vocab_size": 320,
            "hidden_size": 64,
            "intermediate_size": 128,
            "intermediate_size_mlp": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "num_local_experts": 2,
            "max_position_embeddings": 8192,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        boi_token_index=token("<|image_start|>"),
        eoi_token_index=token("<|image_end|>"),
        image_token_index=token("<|patch|>"),
    )
    model = Llama4ForConditionalGeneration(config).eval()
    randomise(model, seed=6, std=1.6)
    model.save_pretrained(directory)
    Llama4Processor(
        image_processor=Llama4ImageProcessor(size={"height": 56, "width": 56}, max_patches=4),
        tokenizer=tokenizer,
        chat_template=LLAMA4_TEMPLATE,
    ).save_pretrained(directory)


def write_pixart(directory: Path) -> None:
    """PixArtSigmaPipeline of 64×64 pixels around the trained `models/tiny/t5`: noise that depends on every word."""
    import torch
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel
    from diffusers.pipelines.pixart_alpha.pipeline_pixart_sigma import PixArtSigmaPipeline
    from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
    from transformers import T5EncoderModel, T5Tokenizer

    torch.manual_seed(7)
    text = T5EncoderModel.from_pretrained(T5).eval()
    vae = AutoencoderKL(
        block_out_channels=(16, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=4,
        sample_size=64,
        scaling_factor=1.0,
    ).eval()
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        cross_attention_dim=32,
        caption_channels=text.config.d_model,
        sample_size=16,
        patch_size=2,
    ).eval()
    PixArtSigmaPipeline(
        tokenizer=T5Tokenizer.from_pretrained(T5),
        text_encoder=text,
        vae=vae,
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
    ).save_pretrained(directory)


def clip_tokenizer():
    """CLIP's, of bytes: each stands for itself, and another one ends a word."""
    from tokenizers import pre_tokenizers
    from transformers import CLIPTokenizer

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(f"{one}</w>" for one in alphabet), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)


def clip_texts(tokenizer, seed: int, *, projected: bool):
    """A CLIP text encoder, 16 wide; ``projected`` as SD3 and SDXL take its pooled state."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        projection_dim=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()
    randomise(model, seed=seed, std=1.6)
    return model


def small_t5(seed: int):
    """A T5 encoder, 32 wide, and the tokenizer of the trained one."""
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    tokenizer = T5Tokenizer.from_pretrained(T5)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=32,
        d_kv=16,
        d_ff=64,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )
    model = T5EncoderModel(config).eval()
    randomise(model, seed=seed, std=1.0)
    return model, tokenizer


def small_vae(**config):
    """An AutoencoderKL of 4 channels, one latent for 4×4 pixels."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=64,
        **config,
    ).eval()


def write_flux(directory: Path, *, schnell: bool = False) -> None:
    """FluxPipeline: CLIP and T5. ``schnell``: distilled, without guidance."""
    import torch
    from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
    from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    torch.manual_seed(8)
    tokenizer = clip_tokenizer()
    text, t5_tokenizer = small_t5(seed=9)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=text.config.d_model,
        pooled_projection_dim=16,
        guidance_embeds=not schnell,
        axes_dims_rope=(4, 6, 6),
    ).eval()
    FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=not schnell),
        vae=small_vae(scaling_factor=0.5, shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip_texts(tokenizer, 10, projected=False),
        tokenizer=tokenizer,
        text_encoder_2=text,
        tokenizer_2=t5_tokenizer,
        transformer=transformer,
    ).save_pretrained(directory)


def write_sd3(directory: Path) -> None:
    """StableDiffusion3Pipeline: two CLIPs and T5; up to 128×128 pixels."""
    import torch
    from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
    from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    torch.manual_seed(11)
    tokenizer = clip_tokenizer()
    text, t5_tokenizer = small_t5(seed=12)
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=text.config.d_model,
        pooled_projection_dim=32,
        pos_embed_max_size=16,
    ).eval()
    StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=small_vae(scaling_factor=1.5, shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip_texts(tokenizer, 13, projected=True),
        tokenizer=tokenizer,
        text_encoder_2=clip_texts(tokenizer, 14, projected=True),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=text,
        tokenizer_3=t5_tokenizer,
    ).save_pretrained(directory)


def write_sdxl(directory: Path) -> None:
    """StableDiffusionXLPipeline: a UNet, two CLIPs, no T5."""
    import torch
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
    from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler

    torch.manual_seed(15)
    tokenizer = clip_tokenizer()
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        transformer_layers_per_block=(1, 1),
        projection_class_embeddings_input_dim=6 * 4 + 16,
        cross_attention_dim=32,
        norm_num_groups=4,
    ).eval()
    StableDiffusionXLPipeline(
        vae=small_vae(scaling_factor=0.13),
        text_encoder=clip_texts(tokenizer, 16, projected=False),
        text_encoder_2=clip_texts(tokenizer, 17, projected=True),
        tokenizer=tokenizer,
        tokenizer_2=clip_tokenizer(),
        unet=unet,
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            timestep_spacing="leading",
        ),
        # Unlike the hub's base model: what a request's own pipeline must not lose.
        force_zeros_for_empty_prompt=False,
    ).save_pretrained(directory)


def rename_tensors(directory: Path, old: str, new: str) -> None:
    """transformers 5 writes ``vision_tower.*``; vLLM 0.31 and the hub say ``vision_tower.vision_model.*``."""
    from safetensors.torch import load_file, save_file

    path = directory / "model.safetensors"
    tensors = load_file(path)
    renamed = {}
    for name, tensor in tensors.items():
        at = name.find(old)
        if at >= 0 and new not in name:
            name = name[:at] + new + name[at + len(old) :]
        renamed[name] = tensor
    save_file(renamed, path, metadata={"format": "pt"})


WRITERS: dict[str, Callable[[Path], None]] = {
    "llava": write_llava,
    "llava_next": write_llava_next,
    "qwen2_5_vl": write_qwen2_5_vl,
    "qwen3_vl": write_qwen3_vl,
    "internvl": write_internvl,
    "llama4": write_llama4,
    "pixart": write_pixart,
    "flux": write_flux,
    "flux_schnell": partial(write_flux, schnell=True),
    "sd3": write_sd3,
    "sdxl": write_sdxl,
}
DRAWING = frozenset({"pixart", "flux", "flux_schnell", "sd3", "sdxl"})
T5 = Path("models/tiny/t5")
T5_FILES = ("model.safetensors", "tokenizer.json")


def write(family: str, directory: Path) -> None:
    """Writes the checkpoint of ``family`` (a key of `WRITERS`) unless ``directory`` already holds a whole one.

    One that took the trained T5 is written again when that has been trained again.
    """
    made_of = {"family": family, "weights": "random"}
    if family in DRAWING:
        made_of["t5"] = hashlib.sha256(b"".join((T5 / name).read_bytes() for name in T5_FILES)).hexdigest()
    mark = json.dumps(made_of) + "\n"
    done = directory / "untrained.json"
    if done.exists() and done.read_text() == mark:
        return
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent) as beside:
        made = Path(beside, "made")
        WRITERS[family](made)
        (made / done.name).write_text(mark)
        if directory.exists():
            directory.rename(Path(beside, "old"))
        made.rename(directory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=sorted(WRITERS))
    parser.add_argument("directory", type=Path)
    arguments = parser.parse_args()
    write(arguments.family, arguments.directory)


if __name__ == "__main__":
    main()
