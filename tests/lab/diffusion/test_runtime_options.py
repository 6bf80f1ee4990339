"""What a profile changes of a model's memory and of its previews: weights in eight bits, a small decoder."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny

from sdxl_lab.config import GenerationConfig, LoraRef, ModelRef, RuntimeProfile
from sdxl_lab.diffusion.engine import Engine
from sdxl_lab.diffusion.inventory import ModelError
from sdxl_lab.diffusion.models import Models, load
from sdxl_lab.images import max_difference
from sdxl_lab.job import Change, ImageRequest, Job, Stepped
from tests.lab.diffusion.test_denoising import PROMPTS, TOLERANCE, Bench, Pipelines, difference

CPU = RuntimeProfile(device="cpu", dtype="float32", rows=256)


def ref_of(folder: Path) -> ModelRef:
    return ModelRef(base=str(folder / "base"), refiner=str(folder / "refiner"))


# --- weights in eight bits -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cast(lively_model: Path) -> Models:
    return load(ref_of(lively_model), CPU.with_(storage="float8"))


def test_weights_in_eight_bits_draw_as_diffusers_layerwise_casting_does(cast, lively_model):
    pipelines = Pipelines.load(lively_model)
    config = GenerationConfig(model=ref_of(lively_model), steps=4, width=64, height=64)
    requests = [
        ImageRequest(config.with_(scheduler=name), PROMPTS[index], index)
        for index, name in enumerate(("euler", "heun"))
    ]
    plain = [pipelines.draw(request) for request in requests]
    pipelines.base.unet.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    with Engine(cast, CPU.with_(storage="float8"), {}) as engine:
        drawn = Bench(engine, pipelines, config).together(requests)
        record = engine.draw(requests[0]).record
    for request, mine, before in zip(requests, drawn, plain, strict=True):
        assert difference(mine, pipelines.draw(request)) <= TOLERANCE
        assert difference(mine, before) > TOLERANCE, "eight bits are not as good as 32"
    assert record.runtime["storage"] == "float8"


def test_weights_in_eight_bits_take_a_quarter_of_the_memory(cast, tiny_models):
    def size(models: Models) -> int:
        return sum(each.numel() * each.element_size() for each in models.base.unet.parameters())

    assert size(cast) < 0.3 * size(tiny_models)


def test_a_lora_on_weights_in_eight_bits_is_refused_by_name(cast):
    with Engine(cast, CPU.with_(storage="float8"), {}) as engine:
        config = GenerationConfig(
            model=cast.ref, steps=2, width=64, height=64, loras=(LoraRef(source="outlines.safetensors"),)
        )
        with pytest.raises(ModelError, match=r"stored as they are computed with; received 'outlines.safetensors:1'"):
            engine.draw(ImageRequest(config, "a cat", 1))


# --- a small decoder for previews ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(4)
    sides = {"encoder_block_out_channels": (8, 8, 8, 8), "decoder_block_out_channels": (8, 8, 8, 8)}
    blocks = {"num_encoder_blocks": (1, 1, 1, 1), "num_decoder_blocks": (1, 1, 1, 1)}
    folder = tmp_path_factory.mktemp("previews") / "taesd"
    AutoencoderTiny(**sides, **blocks).save_pretrained(folder)
    return folder


def test_a_small_decoder_makes_the_previews_and_moves_no_image(tiny_decoder, tiny_model, start, tiny_models):
    profile = CPU.with_(preview_decoder=str(tiny_decoder))
    models = load(ref_of(tiny_model), profile)
    config = GenerationConfig(model=ref_of(tiny_model), steps=3, width=64, height=72)
    seen = []
    request = ImageRequest(config, "a cat", 1)
    threads = torch.get_num_threads()
    with Engine(models, profile, {}) as engine:
        job = Job(request)

        def look(change: Change) -> None:
            if isinstance(change, Stepped):
                seen.append((job.preview(), engine._works[job].trajectory.denoised()))

        job.watch(look)
        image = engine.submit(job).result(60)
    assert torch.get_num_threads() == threads
    preview, latents = seen[-1]
    assert preview.size == (64, 72)
    decoded = AutoencoderTiny.from_pretrained(tiny_decoder).decode(latents).sample[0].permute(1, 2, 0)
    expected = (decoded.detach() / 2 + 0.5).clamp(0, 1).numpy()
    assert np.abs(np.asarray(preview) / 255 - expected).max() <= 1 / 255
    plain = Engine(replace(models, tiny=None), profile, {})
    with plain:
        assert max_difference(plain.draw(request).image, image.image) == 0


def test_without_a_small_decoder_the_linear_map_makes_the_previews(tiny_models):
    assert tiny_models.tiny is None
    assert tiny_models.sketched(torch.zeros(1, 4, 8, 8)) is None


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nobody/nothing", "must name the commit"),
        ("decoder.pt", "safetensors"),
        ("{empty}", "the preview decoder must be an AutoencoderTiny of SDXL's latents"),
        ("{flux}", "must turn 4 channels into 3 colours; received .* with 16 into 3"),
    ],
)
def test_what_is_no_small_decoder_is_refused(name, said, tiny_decoder, tiny_model, tmp_path):
    (tmp_path / "empty").mkdir()
    if "flux" in name:
        sides = {"encoder_block_out_channels": (8, 8, 8, 8), "decoder_block_out_channels": (8, 8, 8, 8)}
        AutoencoderTiny(latent_channels=16, **sides).save_pretrained(tmp_path / "flux")
    path = name.format(empty=tmp_path / "empty", flux=tmp_path / "flux")
    with pytest.raises(ModelError, match=said):
        load(ref_of(tiny_model), CPU.with_(preview_decoder=path))


def test_a_damaged_small_decoder_is_refused(tiny_decoder, tiny_model, tmp_path):
    shutil.copytree(tiny_decoder, tmp_path / "cut")
    path = tmp_path / "cut" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ModelError, match="the preview decoder must be"):
        load(ref_of(tiny_model), CPU.with_(preview_decoder=str(tmp_path / "cut")))
