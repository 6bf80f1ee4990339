"""nano's autoencoder: `AutoencoderKL`, 8 times smaller each way, 4 channels, as SDXL's."""

import random
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch.nn import functional as F

from recipes.nano.fit import autocast, fit, generator
from recipes.nano.scenes import Scene, render, sample_scene

CROP = 128
CROPS, WHOLE = 6, 2


def new_vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=256,
        force_upcast=False,
        mid_block_add_attention=False,
    )


def images_of(scenes: list[Scene], side: int) -> torch.Tensor:
    """Rendered scenes, `uint8` of shape (count, 3, side, side)."""
    stack = np.stack([np.asarray(render(scene, side)) for scene in scenes])
    return torch.from_numpy(stack).permute(0, 3, 1, 2).contiguous()


def images(count: int, side: int, seed: int) -> torch.Tensor:
    """`count` invented scenes, rendered."""
    rng = random.Random(seed)
    return images_of([sample_scene(rng) for _ in range(count)], side)


def to_signed(images: torch.Tensor) -> torch.Tensor:
    """`uint8` to float in [-1, 1], the range the VAE works in."""
    return images.float() / 127.5 - 1


def _gradients(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x[..., 1:, :] - x[..., :-1, :], x[..., :, 1:] - x[..., :, :-1]


def train(folder: Path, steps: int, scenes: int) -> AutoencoderKL:
    """L1 + 2 MSE + L1 of the gradients + 1e-4 KL on crops, then `scaling_factor` from the latents' deviation."""
    torch.manual_seed(0)
    vae = new_vae()
    large, small = images(scenes, 256, seed=1), images(scenes * 3 // 8, CROP, seed=2)

    def batch(step: int) -> torch.Tensor:
        draw = generator(step, seed=1)
        chosen = torch.randint(len(large), (CROPS,), generator=draw).tolist()
        if step % 3 == 0:  # whole images: the group norms see other statistics in a crop
            return to_signed(large[chosen[:WHOLE]])
        corners = torch.randint(0, 256 - CROP + 1, (CROPS, 2), generator=draw).tolist()
        crops = [large[i][:, y : y + CROP, x : x + CROP] for i, (y, x) in zip(chosen, corners, strict=True)]
        crops[0] = small[chosen[0] % len(small)]
        return to_signed(torch.stack(crops))

    def loss_at(step: int) -> torch.Tensor:
        x = batch(step)
        with autocast():
            posterior = vae.encode(x).latent_dist
            mean, logvar = posterior.mean.float(), posterior.logvar.float().clamp(-30, 20)
            noise = torch.randn(mean.shape, generator=generator(step, seed=2))
            y = vae.decode(mean + noise * (0.5 * logvar).exp()).sample
        y = y.float()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum() / y[:, 0].numel()
        edges = sum(F.l1_loss(a, b) for a, b in zip(_gradients(y), _gradients(x), strict=True))
        return F.l1_loss(y, x) + 2 * F.mse_loss(y, x) + edges + 1e-4 * kl

    fit(vae, loss_at, steps=steps, peak_lr=1.5e-3, folder=folder, ema=0.999, weight_decay=0.0)
    vae.register_to_config(scaling_factor=measured_scale(vae))
    return vae


@torch.no_grad()
def encode(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    """Images (n, 3, h, w) `uint8` to unscaled latent means (n, 4, h/8, w/8) in float32, in small batches."""
    parts = []
    for chunk in images.split(16):
        with autocast():
            parts.append(vae.encode(to_signed(chunk)).latent_dist.mean.float())
    return torch.cat(parts)


def measured_scale(vae: AutoencoderKL) -> float:
    """One over the deviation of the latents of unseen scenes (Rombach et al. 2022, section D.1)."""
    return round(1 / encode(vae, images(128, 256, seed=3)).std().item(), 5)


def latent_rgb(vae: AutoencoderKL) -> list[list[float]]:
    """The linear map (5, 3) from scaled latents and a constant to RGB in [-1, 1] that previews use: least squares on
    unseen scenes, each latent against the mean of its 8 by 8 pixels."""
    pixels = images(64, 256, seed=4)
    latents = (encode(vae, pixels) * vae.config.scaling_factor).permute(0, 2, 3, 1).reshape(-1, 4)
    means = F.avg_pool2d(to_signed(pixels), 8).permute(0, 2, 3, 1).reshape(-1, 3)
    inputs = torch.cat([latents, torch.ones(len(latents), 1)], 1)
    fitted: list[list[float]] = torch.linalg.lstsq(inputs, means).solution.tolist()
    return [[round(value, 4) for value in row] for row in fitted]


@torch.no_grad()
def psnr(vae: AutoencoderKL, images: torch.Tensor) -> float:
    """Mean PSNR in dB of the round trip of whole images, in float32."""
    values = []
    for chunk in images.split(8):
        x = to_signed(chunk)
        y = vae.decode(vae.encode(x).latent_dist.mode()).sample.clamp(-1, 1)
        error = ((x - y) / 2).square().mean((1, 2, 3))
        values.append(-10 * error.log10())
    return torch.cat(values).mean().item()
