"""nano's CLIP: two text encoders and an image encoder trained by contrast (Radford et al. 2021, arXiv 2103.00020).

The image encoder and the second text encoder become the `CLIPModel` that scores images. Both text encoders learn
further with the UNet. Besides the batch's other captions, every image is contrasted with a caption that is wrong in one
part (Yuksekgonul et al. 2023, arXiv 2210.01936); without these, left and right are hardly learnt.
"""

import random
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from recipes.nano.fit import autocast, fit
from recipes.nano.scenes import caption, sample_scene
from recipes.nano.vae import images_of
from recipes.nano.words import contradiction, ids

SIDE = 96
WIDTH = 64
BATCH = 128
# The defaults of transformers' CLIPImageProcessor for an image's channels.
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def text_config(tokenizer: CLIPTokenizer, activation: str) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        projection_dim=WIDTH,
        hidden_act=activation,
        max_position_embeddings=77,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


class Towers(nn.Module):
    """The CLIP model and the extra first text encoder, which learn from the same images."""

    def __init__(self, first: CLIPTokenizer, second: CLIPTokenizer) -> None:
        super().__init__()
        vision = {
            "hidden_size": 96,
            "intermediate_size": 384,
            "num_hidden_layers": 4,
            "num_attention_heads": 3,
            "image_size": SIDE,
            "patch_size": 8,
            "projection_dim": WIDTH,
        }
        text = text_config(second, "gelu").to_dict()
        self.clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH))
        self.text_encoder = CLIPTextModelWithProjection(text_config(first, "quick_gelu"))


def normalised(images: torch.Tensor) -> torch.Tensor:
    """`uint8` (n, 3, h, w) to what CLIP's image encoder takes."""
    mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    return (images.float() / 255 - mean) / std


def train(
    folder: Path, towers: Towers, steps: int, tokenizers: tuple[CLIPTokenizer, CLIPTokenizer], count: int
) -> None:
    if steps == 0:
        return
    rng = random.Random(11)
    scenes = [sample_scene(rng) for _ in range(count)]
    images = images_of(scenes, SIDE)

    def loss_at(step: int) -> torch.Tensor:
        rng = random.Random(step)
        chosen = [rng.randrange(len(scenes)) for _ in range(BATCH)]
        said = [caption(scenes[i], rng if rng.random() < 0.35 else None) for i in chosen]
        wrong = [contradiction(scenes[i], rng) for i in chosen]
        with autocast():
            seen = towers.clip.vision_model(normalised(images[chosen])).pooler_output
            seen = F.normalize(towers.clip.visual_projection(seen).float(), dim=-1)
            texts = [
                towers.clip.text_projection(
                    towers.clip.text_model(ids(tokenizers[1], said + wrong, 40)).pooler_output
                ).float(),
                towers.text_encoder(ids(tokenizers[0], said + wrong, 40)).text_embeds.float(),
            ]
        scale = towers.clip.logit_scale.exp().clamp(max=100)
        target = torch.arange(BATCH)
        loss = torch.zeros(())
        for text in texts:
            logits = scale * seen @ F.normalize(text, dim=-1).T
            loss = loss + F.cross_entropy(logits, target) + F.cross_entropy(logits[:, :BATCH].T, target)
        return loss / 4

    fit(towers, loss_at, steps=steps, peak_lr=1e-3, folder=folder, ema=0.995, weight_decay=0.05)
