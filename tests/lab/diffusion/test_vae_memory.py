"""Decodes that do not fit into the memory: halved, then in tiles, then in smaller ones."""

import logging
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from sdxl_lab.config import ConfigError, RuntimeProfile
from sdxl_lab.diffusion.models import Models
from sdxl_lab.diffusion.vae_memory import VaeMemory
from sdxl_lab.job import ImageRequest


class Memory:
    """Has room for so many pixels at once, tiles taken one by one. Notes what was tried: images, tile."""

    def __init__(self, room: int, side: int) -> None:
        self.room, self.side = room, side
        self.tried: list[tuple[int, int | None]] = []

    def __call__(self, given: torch.Tensor, tile: int | None) -> torch.Tensor:
        self.tried.append((len(given), tile))
        if len(given) * min(tile or self.side, self.side) ** 2 > self.room:
            raise torch.OutOfMemoryError("no room")
        return given + 1


def test_what_fits_is_had_whole():
    attempt = Memory(8 * 256**2, 256)
    found = VaeMemory().within(attempt, torch.arange(8), (256, 256), 8)
    assert attempt.tried == [(8, None)]
    assert found.tolist() == list(range(1, 9))


def test_images_are_halved_until_they_fit_and_that_is_remembered(caplog):
    attempt, memory = Memory(2 * 256**2, 256), VaeMemory()
    with caplog.at_level(logging.WARNING):
        found = memory.within(attempt, torch.arange(7), (256, 256), 7)
    assert found.tolist() == list(range(1, 8))
    assert attempt.tried == [(7, None), (3, None), *[(1, None)] * 7]
    assert "the VAE has at most 1 images of 256x256 at a time" in caplog.text
    attempt.tried.clear()
    memory.within(attempt, torch.arange(2), (256, 256), 7)
    assert attempt.tried == [(1, None)] * 2
    attempt.tried.clear()
    memory.within(attempt, torch.arange(2), (128, 128), 7)
    assert attempt.tried == [(2, None)], "another size has its own"


def test_one_image_that_does_not_fit_is_had_in_tiles_and_then_in_smaller_ones():
    attempt, memory = Memory(300**2, 1024), VaeMemory()
    assert memory.within(attempt, torch.arange(2), (1024, 1024), 1).tolist() == [1, 2]
    assert attempt.tried == [(1, None), (1, 512), (1, 256), (1, 256)]
    assert memory.tile((1024, 1024)) == 256
    assert memory.tile((512, 512)) is None


def test_an_image_that_no_tile_is_small_enough_for_fails():
    with pytest.raises(torch.OutOfMemoryError, match="the VAE's memory ran out for an image of 512x256 pixels"):
        VaeMemory().within(Memory(0, 512), torch.arange(1), (256, 512), 1)


@pytest.mark.parametrize(
    ("size", "tile"), [((2048, 2048), None), ((64, 2056), 1024), ((2056, 64), 1024)], ids=["at", "wide", "high"]
)
def test_images_above_the_stated_side_are_had_in_tiles(size, tile):
    assert VaeMemory(2048, 1024).tile(size) == tile


def test_tiles_are_no_larger_than_what_needs_none():
    assert VaeMemory(100, 1024).tile((104, 104)) == 96


# --- with a VAE ------------------------------------------------------------------------------------------------------


def tiled(models: Models, above: int) -> Models:
    return replace(models, memory=VaeMemory(above, models.vae.config.sample_size))


@torch.no_grad()
def test_an_image_in_tiles_is_that_of_diffusers_tiles(tiny_models):
    latents = torch.randn(2, 4, 12, 20, generator=torch.Generator().manual_seed(1))
    ours, whole = tiled(tiny_models, 64).decode(latents), tiny_models.decode(latents)
    vae = tiny_models.vae
    before = vae.tile_sample_min_size, vae.tile_latent_min_size
    try:
        vae.enable_tiling()
        vae.tile_sample_min_size, vae.tile_latent_min_size = 64, 8
        theirs = vae.decode(latents / vae.config.scaling_factor).sample
    finally:
        vae.disable_tiling()
        vae.tile_sample_min_size, vae.tile_latent_min_size = before
    expected = (theirs / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    assert np.abs(ours - expected).max() <= 1e-5
    assert np.abs(ours - whole).max() > 1e-3, "tiles move pixels, so they are had where they are needed only"
    assert not vae.use_tiling, "the next image is had whole again"


def test_a_source_is_encoded_in_tiles_too(tiny_models):
    pixels = torch.rand(1, 3, 96, 160, generator=torch.Generator().manual_seed(2)) * 2 - 1
    whole, tiles = (
        models.encode(pixels, torch.Generator().manual_seed(3)) for models in (tiny_models, tiled(tiny_models, 64))
    )
    assert whole.shape == tiles.shape == (1, 4, 12, 20)
    assert (whole - tiles).abs().max() > 1e-4


def test_an_image_whose_decode_ran_out_of_memory_is_drawn_in_tiles_and_its_record_says_so(
    start: Callable, tiny_models, tiny_config, monkeypatch
):
    models = tiled(tiny_models, 2048)
    whole = start().draw(ImageRequest(tiny_config.with_(width=256), "a cat", 1))
    assert "vae_tile" not in whole.record.runtime
    decode = type(models.vae).decode

    def short(vae, latents, **options):
        if not vae.use_tiling or vae.tile_sample_min_size > 128:
            raise torch.OutOfMemoryError("no room")
        return decode(vae, latents, **options)

    monkeypatch.setattr(type(models.vae), "decode", short)
    engine = start()
    monkeypatch.setattr(engine, "models", models)
    images = [engine.submit(ImageRequest(tiny_config.with_(width=256), "a cat", seed)) for seed in (1, 2)]
    first, _ = (job.result(60) for job in images)
    assert first.record.runtime["vae_tile"] == 128
    difference = np.abs(np.asarray(first.image, dtype=int) - np.asarray(whole.image, dtype=int))
    assert difference.max() > 0
    assert difference.mean() < 20


def test_the_profile_says_above_which_side():
    assert RuntimeProfile(tile_above=1536).tile_above == 1536
    with pytest.raises(ConfigError, match="tile_above must be a whole number from 64 to 65536 "):
        RuntimeProfile(tile_above=8)
