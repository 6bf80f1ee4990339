"""nano's two UNets, with SDXL's own conditioning (Podell et al. 2023, arXiv 2307.01952).

The base learns every noise level, first on 128 px images, which are four times cheaper, then on 256 px ones; both text
encoders learn with it. The refiner starts from the base and learns only the low-noise fifth, with the second text
encoder and an aesthetic score that measures the sharpness of the training image.

Noise has an offset for each channel: with SDXL's betas the mean of a latent, here the plain background, is otherwise
never destroyed, and at inference the model reads a background into the initial noise.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from PIL import Image, ImageFilter
from torch import nn
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from recipes.nano.clip import WIDTH
from recipes.nano.fit import autocast, fit, generator
from recipes.nano.scenes import Scene, caption, render, sample_scene
from recipes.nano.vae import encode
from recipes.nano.words import ids

NOISE_OFFSET = 0.25
DROPPED = 0.1
REFINED = 200  # of 1000 timesteps: the low-noise fifth
BATCH = 32  # of the refiner
TIME_WIDTH = 32


def new_scheduler() -> EulerDiscreteScheduler:
    """SDXL base's scheduler, with all fields, since schedulers built from it read fields that Euler does not."""
    return EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        num_train_timesteps=1000,
        prediction_type="epsilon",
        interpolation_type="linear",
        timestep_spacing="leading",
        steps_offset=1,
    )


# Fields of SDXL's scheduler_config.json that Euler ignores and others read.
FOREIGN_FIELDS = {
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "sample_max_value": 1.0,
    "trained_betas": None,
}


def new_unet(cross_attention_dim: int, time_ids: int) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=32,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(32, 64, 128),
        layers_per_block=1,
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=(1, 2, 4),  # heads a level, as in SDXL's own config
        cross_attention_dim=cross_attention_dim,
        norm_num_groups=16,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_WIDTH,
        projection_class_embeddings_input_dim=WIDTH + time_ids * TIME_WIDTH,
    )


@dataclass
class Pool:
    """Cached latents (n, 4, h, w), already scaled, with their scenes and `time_ids` (n, k)."""

    scenes: list[Scene]
    latents: torch.Tensor
    time_ids: torch.Tensor


def base_image(scene: Scene, side: int, rng: random.Random) -> tuple[Image.Image, list[float]]:
    """An image and its SDXL micro-conditioning: original size, crop corner, target size; a tenth each are cropped
    from a larger canvas, or enlarged from a smaller, blurred original."""
    kind = rng.random()
    if kind < 0.1:
        top, left = (rng.randrange(0, side // 4 + 1, 8) for _ in range(2))
        whole = side + side // 4
        return render(scene, side, (top / side, left / side)), [whole, whole, top, left, side, side]
    if kind < 0.2:
        small = rng.randrange(side // 4, side * 3 // 4, 8)
        image = render(scene, small).resize((side, side), Image.Resampling.BICUBIC)
        return image, [small, small, 0, 0, side, side]
    return render(scene, side), [side, side, 0, 0, side, side]


def refiner_image(scene: Scene, side: int, rng: random.Random) -> tuple[Image.Image, list[float]]:
    """An image blurred by a random radius and its score: 6.5 for a sharp one, 2 for one blurred by 1.5 px."""
    radius = rng.uniform(0, 1.5) if rng.random() < 0.5 else 0.0
    image = render(scene, side)
    if radius:
        image = image.filter(ImageFilter.GaussianBlur(radius))
    return image, [side, side, 0, 0, 6.5 - 3 * radius]


Draw = Callable[[Scene, int, random.Random], tuple[Image.Image, list[float]]]


def make_pool(vae: AutoencoderKL, path: Path, *, count: int, side: int, seed: int, draw: Draw = base_image) -> Pool:
    """Draw and encode `count` scenes once, and keep them in `path`."""
    rng = random.Random(seed)
    scenes = [sample_scene(rng) for _ in range(count)]
    if not path.exists():
        latents, rows = [], []
        for start in range(0, count, 64):
            made = [draw(scene, side, rng) for scene in scenes[start : start + 64]]
            images = torch.from_numpy(np.stack([np.asarray(image) for image, _ in made])).permute(0, 3, 1, 2)
            latents.append(encode(vae, images) * vae.config.scaling_factor)
            rows += [row for _, row in made]
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"latents": torch.cat(latents), "time_ids": torch.tensor(rows, dtype=torch.float32)}, path)
        print(f"{path.name}: {count} scenes", flush=True)
    return Pool(scenes, **torch.load(path, weights_only=True))


class Base(nn.Module):
    """The base UNet and the text encoders that learn with it."""

    def __init__(
        self, unet: UNet2DConditionModel, first: CLIPTextModelWithProjection, second: CLIPTextModelWithProjection
    ) -> None:
        super().__init__()
        self.unet, self.text_encoder, self.text_encoder_2 = unet, first, second


def alphas() -> torch.Tensor:
    return new_scheduler().alphas_cumprod


def noised(x: torch.Tensor, t: torch.Tensor, draw: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents (n, 4, h, w) at the timesteps (n,), and the noise in them."""
    noise = torch.randn(x.shape, generator=draw)
    noise += NOISE_OFFSET * torch.randn((len(x), 4, 1, 1), generator=draw)
    alpha = alphas()[t][:, None, None, None]
    return alpha.sqrt() * x + (1 - alpha).sqrt() * noise, noise


def min_snr(t: torch.Tensor, gamma: float = 5.0) -> torch.Tensor:
    """Hang et al. 2023, arXiv 2303.09556, for epsilon prediction."""
    alpha = alphas()[t]
    snr = alpha / (1 - alpha)
    return snr.clamp(max=gamma) / snr


def evened(t: torch.Tensor) -> torch.Tensor:
    """Weights that raise the high noise levels, where nouns, colours and places are decided. There the loss of epsilon
    falls as SNR^0.35 (measured on nano), so that without weights nearly all of the gradient is about texture."""
    alpha = alphas()[t]
    return (alpha / (1 - alpha)).clamp(0.005, 1) ** -0.35


def embed(base: Base, tokenizers: tuple[CLIPTokenizer, CLIPTokenizer], texts: list[str]) -> tuple[torch.Tensor, ...]:
    """The texts as the UNet takes them: hidden states (n, 77, width) and the pooled projection."""
    first = base.text_encoder(ids(tokenizers[0], texts), output_hidden_states=True)
    second = base.text_encoder_2(ids(tokenizers[1], texts), output_hidden_states=True)
    return torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1), second.text_embeds


def train_base(
    folder: Path,
    base: Base,
    tokenizers: tuple[CLIPTokenizer, CLIPTokenizer],
    pools: list[tuple[Pool, int]],
    *,
    steps: int,
    peak_lr: float,
) -> None:
    """`pools` are taken in turn, each with its own batch size; a tenth of the captions is dropped: most to SDXL's zero
    embeddings (`force_zeros_for_empty_prompt`), the rest to the empty prompt."""
    base.unet.set_attn_processor(AttnProcessor())  # on a CPU, plain attention trains faster than the fused kind
    base.unet.to(memory_format=torch.channels_last)

    def loss_at(step: int) -> torch.Tensor:
        draw, rng = generator(step, seed=3), random.Random(step)
        pool, size = pools[step % len(pools)]
        chosen = torch.randint(len(pool.scenes), (size,), generator=draw)
        # More of the high noise levels, where colours and places are decided.
        t = (1000 * torch.rand(size, generator=draw) ** 0.65).long().clamp(max=999)
        noisy, noise = noised(pool.latents[chosen], t, draw)
        texts = [caption(pool.scenes[i], rng if rng.random() < 0.4 else None) for i in chosen.tolist()]
        texts = ["" if rng.random() < DROPPED * 0.3 else text for text in texts]
        kept = (torch.rand(size, generator=draw) > DROPPED * 0.7).float()
        with autocast():
            hidden, pooled = embed(base, tokenizers, texts)
            added = {"text_embeds": pooled * kept[:, None], "time_ids": pool.time_ids[chosen]}
            out = base.unet(
                noisy.contiguous(memory_format=torch.channels_last),
                t,
                encoder_hidden_states=hidden * kept[:, None, None],
                added_cond_kwargs=added,
            ).sample
        return ((out.float() - noise).square().mean((1, 2, 3)) * min_snr(t) * evened(t)).mean()

    fit(base, loss_at, steps=steps, peak_lr=peak_lr, folder=folder, ema=0.999)


def refiner_from(base: UNet2DConditionModel) -> UNet2DConditionModel:
    """A refiner UNet that begins as the base: of the text it keeps the second encoder's part, of the time ids the
    original size and the crop."""
    refiner = new_unet(WIDTH, time_ids=5)
    own = refiner.state_dict()
    for name, weight in base.state_dict().items():
        if own[name].shape == weight.shape:
            own[name] = weight
        elif name.startswith("add_embedding"):
            own[name] = own[name] * 0
            own[name][:, : WIDTH + 4 * TIME_WIDTH] = weight[:, : WIDTH + 4 * TIME_WIDTH]
        else:  # attn2.to_k and to_v
            own[name] = weight[:, -WIDTH:]
    refiner.load_state_dict(own)
    return refiner


def train_refiner(
    folder: Path,
    unet: UNet2DConditionModel,
    text_encoder_2: CLIPTextModelWithProjection,
    tokenizer_2: CLIPTokenizer,
    pool: Pool,
    *,
    steps: int,
) -> None:
    unet.set_attn_processor(AttnProcessor())
    unet.to(memory_format=torch.channels_last)
    text_encoder_2.eval()

    def loss_at(step: int) -> torch.Tensor:
        draw, rng = generator(step, seed=4), random.Random(step)
        chosen = torch.randint(len(pool.scenes), (BATCH,), generator=draw)
        t = torch.randint(REFINED, (BATCH,), generator=draw)
        noisy, noise = noised(pool.latents[chosen], t, draw)
        texts = [caption(pool.scenes[i], rng if rng.random() < 0.4 else None) for i in chosen.tolist()]
        kept = (torch.rand(BATCH, generator=draw) > DROPPED).float()
        with autocast():
            with torch.no_grad():
                text = text_encoder_2(ids(tokenizer_2, texts), output_hidden_states=True)
            added = {"text_embeds": text.text_embeds * kept[:, None], "time_ids": pool.time_ids[chosen]}
            out = unet(
                noisy.contiguous(memory_format=torch.channels_last),
                t,
                encoder_hidden_states=text.hidden_states[-2] * kept[:, None, None],
                added_cond_kwargs=added,
            ).sample
        # The lowest noise levels, where epsilon is nearly unpredictable, would otherwise dominate.
        return ((out.float() - noise).square().mean((1, 2, 3)) * min_snr(t, gamma=20.0)).mean()

    fit(unet, loss_at, steps=steps, peak_lr=4e-4, folder=folder, ema=0.998)
