# SPDX-License-Identifier: Apache-2.0
"""The recipe of `models/tiny/image`: a PixArt-Sigma pipeline that draws the world from a prompt.

    python -m models.image [vae]

Two parts. A VAE that packs a picture into 16 × 16 cells of 4 numbers; then a transformer that learns to draw such cells
out of noise, conditioned on the token states of `models/tiny/t5`, which stays as it is. It names the picture itself at
every level of noise (x-prediction), along the straight path of flow matching.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.models.attention_processor import AttnProcessor
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel
from diffusers.pipelines.pixart_alpha.pipeline_pixart_sigma import PixArtSigmaPipeline
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from torch.nn import functional
from transformers import T5EncoderModel, T5Tokenizer

from models import t5, world
from models.training import Run, autocast, device, share_cores

DIRECTORY = Path("models/tiny/image")
SEED = 3
CUTTING_STEPS = 2000
CUTTINGS = 32
CUTTING = 16
"""Pixels of a cutting's side."""
CUTTING_RATE = 3e-3
VAE_STEPS = 700
VAE_BATCH = 8
VAE_RATE = 1e-3
VAE_PAIRS = 0.25
DECODER_STEPS = 900
DECODER_NOISE = 0.1
"""Added to latents of unit spread while the decoder alone is taught: a transformer's latents are never quite right."""
KL = 1e-4
"""Weight of the term that keeps the latents near a normal distribution."""
STILL_STEPS = 4000
STILL_RATE = 1e-3
STEPS = 4500
RATE = 6e-4
FINE_STEPS = 3800
BATCH = 32
AVERAGE = 0.999
POOL = 16_000
"""Pictures whose latents are computed once; each is met several times, with another noise and another wording."""
SPREAD = 0.1
"""How far things stray from their usual place in what the transformer learns to draw at last: a prompt does not say
where they are, and what may be anywhere takes many times as long to learn. At first they do not stray at all: a prompt
then has one picture, and what its words look like is learned soon."""
FINE_SPREAD = 0.05
PAIRS = 0.5
FINE_PAIRS = 0.65
DROPPED = 0.1
"""Part of the prompts that are left out, for guidance."""
PARAPHRASED = 0.2
THING_WEIGHT = 5.0
"""Of a cell in the loss where a thing is or ends, against 1 for the background's."""
SHARE = 0.8
"""Later what such cells weigh together, whatever their number, beside 1 for all: a small thing counts as a large one.
At last those of each thing weigh that much: the small one of a pair counts as the large one."""
SIGNAL = 5.0
"""The error's weight is the signal's power in units of the noise's, from 1 to this (arXiv 2202.00512, truncated)."""
SHIFT = 3.0
"""More of the steps are taught where there is much noise: what is drawn, and where, is settled there."""


def build_vae() -> AutoencoderKL:
    """An untrained VAE: (n, 3, 64, 64) pixels in [-1, 1] to (n, 4, 16, 16) latents and back."""
    torch.manual_seed(SEED)
    vae = AutoencoderKL(
        block_out_channels=(32, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=world.SIDE,
    )
    with torch.no_grad():
        vae.quant_conv.bias[vae.config.latent_channels :] -= 6.0  # hardly any noise in the latents at first
    return vae


def build_transformer(text_width: int) -> PixArtTransformer2DModel:
    """An untrained transformer over 8 × 8 patches of the latents; it predicts the latents without their noise."""
    torch.manual_seed(SEED)
    model = PixArtTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=48,
        in_channels=4,
        out_channels=4,
        num_layers=6,
        cross_attention_dim=192,
        caption_channels=text_width,
        sample_size=16,
        patch_size=2,
        activation_fn="linear-silu",  # a third less time on a CPU than GELU
    )
    # As PixArt begins: every block adds nothing at first, and the output is zero.
    torch.nn.init.zeros_(model.adaln_single.linear.weight)
    torch.nn.init.zeros_(model.adaln_single.linear.bias)
    torch.nn.init.zeros_(model.proj_out.weight)
    torch.nn.init.zeros_(model.proj_out.bias)
    return model


def pixels(
    scenes: Iterator[world.Scene], count: int, chance: random.Random, spread: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor, list[world.Scene]]:
    """Drawn scenes: uint8 (count, 3, 64, 64); where the first and the second thing is, bool (count, 2, 64, 64); the
    scenes."""
    taken = [next(scenes) for _ in range(count)]
    drawn = [world.draw(scene, chance, spread=spread) for scene in taken]
    images = torch.from_numpy(np.stack([np.asarray(picture.image) for picture in drawn]))
    owners = torch.from_numpy(np.stack([picture.owner for picture in drawn]))
    return images.permute(0, 3, 1, 2).contiguous(), torch.stack((owners == 1, owners == 2), 1), taken


def _to_range(image: torch.Tensor) -> torch.Tensor:
    return image.to(device()).float() / 127.5 - 1


def _vae_loss(vae: AutoencoderKL, image: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
    latent = vae.encode(image).latent_dist
    spread = latent.kl().mean() / latent.mean[0].numel()
    error, absolute = _error(vae.decode(latent.sample()).sample, image)
    return error + KL * spread, {"l1": absolute, "kl": spread.item()}


def _decoder_loss(vae: AutoencoderKL, image: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
    with torch.no_grad():
        latent = vae.encode(image).latent_dist.mean
    noise = torch.randn_like(latent) * DECODER_NOISE / vae.config["scaling_factor"]
    error, absolute = _error(vae.decode(latent + noise).sample, image)
    return error, {"l1": absolute}


def _error(back: torch.Tensor, image: torch.Tensor) -> tuple[torch.Tensor, float]:
    absolute = functional.l1_loss(back.float(), image)
    # Edges are few among the pixels, and say which shape it is.
    edges = [functional.l1_loss(back.float().diff(dim=dim), image.diff(dim=dim)) for dim in (-1, -2)]
    return absolute + 0.5 * (edges[0] + edges[1]), absolute.item()


def _drawn(count: int, chance: random.Random) -> torch.Tensor:
    return _to_range(pixels(world.scenes(chance, held_out=False, pairs=VAE_PAIRS), count, chance)[0])


def _cut(count: int, chance: random.Random) -> torch.Tensor:
    """Cuttings from anywhere in drawn scenes, four of each: float32 (count, 3, CUTTING, CUTTING)."""
    found = []
    for image in _drawn(count // 4, chance):
        for _ in range(4):
            top, left = (chance.randrange(world.SIDE - CUTTING + 1) for _ in range(2))
            found.append(image[:, top : top + CUTTING, left : left + CUTTING])
    return torch.stack(found)


def train_vae() -> tuple[AutoencoderKL, list[Run]]:
    """The trained VAE, its latents' scale in its config, and its runs: on cuttings, on whole pictures, the decoder.

    A cutting costs a sixteenth of a picture, and a VAE learns from its colours and edges several times as fast.
    """
    vae = build_vae()
    cuttings = Run("image-vae-cuttings", vae, CUTTING_STEPS, CUTTING_RATE)
    cuttings.train(lambda chance: _vae_loss(vae, _cut(CUTTINGS, chance)))
    whole = Run("image-vae-whole", vae, VAE_STEPS, VAE_RATE)
    whole.train(lambda chance: _vae_loss(vae, _drawn(VAE_BATCH, chance)))
    chance = random.Random(SEED)
    with torch.no_grad():
        spread = vae.encode(_drawn(256, chance)).latent_dist.mean.std().item()
    vae.register_to_config(scaling_factor=round(1 / spread, 4))
    for name, parameter in vae.named_parameters():
        parameter.requires_grad_(name.startswith(("decoder.", "post_quant_conv.")))
    decoder = Run("image-vae-decoder", vae, DECODER_STEPS, VAE_RATE)
    decoder.train(lambda chance: _decoder_loss(vae, _drawn(VAE_BATCH, chance)))
    vae.requires_grad_(False)
    return vae, [cuttings, whole, decoder]


class Pool:
    """Scenes with one drawing each.

    latents: float32 (POOL, 4, 16, 16), at unit spread. weights: float32 (POOL, 1, 16, 16), of each cell in the loss.
    """

    def __init__(self, vae: AutoencoderKL, spread: float, pairs: float, share: float, apart: bool):
        print(f"image: drawing {POOL} pictures", file=sys.stderr, flush=True)
        chance = random.Random(f"pool {SEED} {spread}")
        scenes = world.scenes(chance, held_out=False, pairs=pairs)
        self.scenes: list[world.Scene] = []
        parts, weights = [], []
        with torch.no_grad(), autocast():
            while len(self.scenes) < POOL:
                image, things, taken = pixels(scenes, min(200, POOL - len(self.scenes)), chance, spread)
                parts.append(vae.encode(_to_range(image)).latent_dist.mean.float() * vae.config["scaling_factor"])
                # A thing and what lies around it: its shape shows there, in a few cells of many.
                near = functional.max_pool2d(things.to(device()).float(), 8, stride=4, padding=2)
                if not apart:
                    near = near.amax(1, keepdim=True)
                extra = share / near.mean((2, 3), keepdim=True).clamp(min=1e-6) if share else THING_WEIGHT - 1
                weights.append(1 + (extra * near).sum(1, keepdim=True))
                self.scenes += taken
        self.latents, self.weights = torch.cat(parts), torch.cat(weights)


def _loss(
    model: PixArtTransformer2DModel,
    text: T5EncoderModel,
    tokenizer: T5Tokenizer,
    pool: Pool,
    chance: random.Random,
) -> tuple[torch.Tensor, dict[str, float]]:
    chosen = [chance.randrange(POOL) for _ in range(BATCH)]
    prompts = [_prompt(pool.scenes[index], chance) for index in chosen]
    words = tokenizer(prompts, padding=True, return_tensors="pt").to(device())
    with torch.no_grad():
        states = text(input_ids=words.input_ids, attention_mask=words.attention_mask).last_hidden_state
    clean = pool.latents[chosen]
    noise = torch.randn_like(clean)
    time = torch.rand(BATCH, device=clean.device)
    time = SHIFT * time / (1 + (SHIFT - 1) * time)
    share = time[:, None, None, None]
    drawn = model(
        (1 - share) * clean + share * noise,
        encoder_hidden_states=states,
        encoder_attention_mask=words.attention_mask,
        timestep=time * 1000,
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
    ).sample
    square = (drawn.float() - clean).square()
    weighted = (square * pool.weights[chosen]).mean((1, 2, 3))
    signal = ((1 - time) / time).square()
    return (weighted * signal.clamp(1, SIGNAL)).mean(), {"error": square.mean().item()}


def _prompt(scene: world.Scene, chance: random.Random) -> str:
    """What the pipeline would hand to the tokenizer: it lowers the case of every prompt."""
    if chance.random() < DROPPED:
        return ""
    text = world.worded(scene, chance) if chance.random() < PARAPHRASED else scene.caption
    return f"{text}." if chance.random() < 0.1 else text


def build_scheduler() -> DPMSolverMultistepScheduler:
    """The solver for a model of the flow from noise to picture that names the picture at the flow's end."""
    return DPMSolverMultistepScheduler(prediction_type="sample", use_flow_sigmas=True, flow_shift=SHIFT)


def phase(run: Run) -> dict[str, Any]:
    """What the recipe's record says of one run."""
    return {"steps": run.steps, "minutes": round(run.seconds / 60, 1), "curve": run.curve}


def main() -> None:
    """Train what is not yet trained, and write the directory. The VAE alone needs no T5."""
    parser = argparse.ArgumentParser(prog="python -m models.image", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("only", nargs="?", choices=("vae",), help="train the VAE and end")
    only = parser.parse_args().only
    share_cores("image")
    vae, vae_runs = train_vae()
    if only:
        return
    tokenizer = T5Tokenizer.from_pretrained(t5.DIRECTORY)
    text = T5EncoderModel.from_pretrained(t5.DIRECTORY).to(device()).eval().requires_grad_(False)
    transformer = build_transformer(text.config.d_model)
    transformer.set_attn_processor(AttnProcessor())  # at this size a CPU's fused attention takes twice as long

    def train(
        name: str, steps: int, rate: float, spread: float, pairs: float, share: float = 0.0, apart: bool = False
    ) -> Run:
        pool: list[Pool] = []

        def loss(chance: random.Random) -> tuple[torch.Tensor, dict[str, float]]:
            if not pool:  # a finished run asks for no loss, and needs no pictures
                pool.append(Pool(vae, spread, pairs, share, apart))
            return _loss(transformer, text, tokenizer, pool[0], chance)

        run = Run(name, transformer, steps, rate, average=AVERAGE)
        run.train(loss)
        return run

    runs = [
        train("image-transformer-still", STILL_STEPS, STILL_RATE, 0.0, PAIRS),
        train("image-transformer", STEPS, RATE, SPREAD, PAIRS, SHARE),
        train("image-transformer-fine", FINE_STEPS, RATE, FINE_SPREAD, FINE_PAIRS, SHARE, apart=True),
    ]
    pipeline = PixArtSigmaPipeline(
        tokenizer=T5Tokenizer.from_pretrained(t5.DIRECTORY),  # not as the last batch was tokenized
        text_encoder=text.cpu(),
        vae=vae.cpu(),
        transformer=transformer.cpu(),
        scheduler=build_scheduler(),  # type: ignore[arg-type]
    )
    pipeline.save_pretrained(DIRECTORY)
    recipe = {
        "command": "python -m models.image",
        "seed": SEED,
        "hold_out_seed": world.HOLD_OUT_SEED,
        "device": device().type,
        "batch": BATCH,
        "pool": POOL,
        **{run.name.removeprefix("image-"): phase(run) for run in [*vae_runs, *runs]},
    }
    (DIRECTORY / "recipe.json").write_text(json.dumps(recipe, indent=1) + "\n")
    print(f"{DIRECTORY}: {sum(one.numel() for one in transformer.parameters()):,} parameters in the transformer")


if __name__ == "__main__":
    main()
