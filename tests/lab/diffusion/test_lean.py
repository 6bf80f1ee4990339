"""The lean blocks answer as diffusers' own do, and take the place of no block whose settings they do not know."""

import copy

import pytest
import torch
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import nn

from sdxl_lab.config import RuntimeProfile
from sdxl_lab.diffusion import models
from sdxl_lab.diffusion.inventory import NANO
from sdxl_lab.diffusion.lean import LEAN, Pointwise, lighten

CPU = RuntimeProfile(device="cpu", dtype="float32")


@pytest.fixture(scope="module", params=["base", "refiner"])
def unet(request):
    """nano's, as diffusers loads it."""
    folder = NANO / request.param / "unet"
    return models.UNet2DConditionModel.from_pretrained(folder, variant="fp16", dtype=torch.float32).eval()


def inputs(unet, rows: int) -> dict:
    draw = torch.Generator().manual_seed(rows)
    width = unet.config.cross_attention_dim
    ids = (unet.config.projection_class_embeddings_input_dim - width) // unet.config.addition_time_embed_dim
    return {
        "sample": torch.randn(rows, 4, 8, 16, generator=draw),
        "timestep": torch.linspace(900, 10, rows),
        "encoder_hidden_states": torch.randn(rows, 77, width, generator=draw),
        "added_cond_kwargs": {
            "text_embeds": torch.randn(rows, width, generator=draw),
            "time_ids": torch.full((rows, ids), 64.0),
        },
    }


def answer(unet, given: dict) -> torch.Tensor:
    with torch.no_grad():
        return unet(**given, return_dict=False)[0]


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("fused", [False, True], ids=["apart", "fused"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_lean_unet_answers_as_diffusers_own(unet, rows, fused, layout):
    given = inputs(unet, rows)
    expected, kept = answer(unet, given), copy.deepcopy(given)
    light = copy.deepcopy(unet).to(memory_format=layout)
    if fused:
        light.fuse_qkv_projections()
    lighten(light)
    assert (answer(light, given) - expected).abs().max() <= 2e-5 * expected.abs().max()
    for name in ("sample", "encoder_hidden_states"):
        assert torch.equal(given[name], kept[name]), f"{name} is the caller's"
    assert answer(light, given).equal(answer(light, given)), "nor does a call leave anything to the next"


def test_but_for_the_halves_of_a_geglu_and_single_pixels_the_bits_are_the_same(unet, monkeypatch):
    """So what the others leave out is passes over memory, and no arithmetic."""
    monkeypatch.delitem(LEAN, GEGLU)
    monkeypatch.delitem(LEAN, nn.Conv2d)
    light = copy.deepcopy(unet)
    lighten(light)
    assert torch.equal(answer(light, inputs(unet, 2)), answer(unet, inputs(unet, 2)))


def test_every_block_of_an_sdxl_is_made_lean(unet):
    light = copy.deepcopy(unet)
    lighten(light)
    assert {type(module) for module in light.modules()} >= set(LEAN.values())
    left = {type(module) for module in light.modules()} & set(LEAN)
    assert left == {nn.Conv2d}, "but for convolutions of more than a pixel"
    assert not [each for each in light.modules() if type(each) is nn.Conv2d and each.kernel_size == (1, 1)]


def test_a_lean_vae_answers_as_diffusers_own():
    """Its only lean parts are the convolutions of one pixel, whose bits then do not depend on the number of threads."""
    vae = models.AutoencoderKL.from_pretrained(NANO / "base" / "vae", variant="fp16", dtype=torch.float32).eval()
    light = copy.deepcopy(vae)
    lighten(light)
    assert {type(module) for module in light.modules()} & set(LEAN.values()) == {Pointwise}
    latents = torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(0))
    pixels = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for (one,), (other,) in (
            (light.decode(latents, return_dict=False), vae.decode(latents, return_dict=False)),
            ((light.encode(pixels).latent_dist.mean,), (vae.encode(pixels).latent_dist.mean,)),
        ):
            assert (one - other).abs().max() <= 2e-5 * other.abs().max()


class NotLinear(nn.Linear):
    """As an adapter's would be, whose weights are not all that it adds up."""


def geglu_with_an_adapter() -> GEGLU:
    block = GEGLU(8, 8)
    block.proj = NotLinear(8, 16)
    return block


def block_with(**attention: object) -> BasicTransformerBlock:
    block = BasicTransformerBlock(32, 2, 16, cross_attention_dim=32)
    for name, value in attention.items():
        setattr(block.attn2, name, value)
    return block


OTHER_SETTINGS = {
    "a resnet that scales its output": lambda: ResnetBlock2D(in_channels=32, output_scale_factor=2.0),
    "a resnet whose time scales": lambda: ResnetBlock2D(in_channels=32, time_embedding_norm="scale_shift"),
    "a resnet without a time": lambda: ResnetBlock2D(in_channels=32, temb_channels=None),
    "a resnet that samples up": lambda: ResnetBlock2D(in_channels=32, up=True),
    "a resnet with another activation": lambda: ResnetBlock2D(in_channels=32, non_linearity="mish"),
    "a transformer of convolutions": lambda: Transformer2DModel(2, 16, in_channels=32, use_linear_projection=False),
    "a block without cross-attention": lambda: BasicTransformerBlock(32, 2, 16),
    "a block with another norm": lambda: BasicTransformerBlock(
        32, 2, 16, cross_attention_dim=32, norm_type="ada_norm", num_embeds_ada_norm=10
    ),
    "an attention that scales": lambda: block_with(rescale_output_factor=2.0),
    "an attention with a residual of its own": lambda: block_with(residual_connection=True),
    "an attention of another processor": lambda: block_with(processor=object()),
    "a GEGLU with an adapter": geglu_with_an_adapter,
    "a convolution of more pixels": lambda: nn.Conv2d(4, 4, 3),
    "a convolution that skips pixels": lambda: nn.Conv2d(4, 4, 1, stride=2),
    "a convolution with a border": lambda: nn.Conv2d(4, 4, 1, padding=1),
    "a convolution in groups": lambda: nn.Conv2d(4, 4, 1, groups=2),
}


@pytest.mark.parametrize("make", OTHER_SETTINGS.values(), ids=OTHER_SETTINGS)
def test_a_block_of_other_settings_keeps_its_own_forward(make):
    block = make()
    lighten(nn.ModuleList([block]))
    assert type(block) in LEAN


@pytest.mark.parametrize(("options", "light"), [({}, True), ({"compile": True}, False)])
def test_a_cpu_gets_the_lean_blocks_unless_the_compiler_makes_its_own(tiny_model, monkeypatch, options, light):
    monkeypatch.setattr(models.UNet2DConditionModel, "compile", lambda self, **_: None)
    ref = models.ModelRef(base=str(tiny_model / "base"), refiner=str(tiny_model / "refiner"))
    loaded = models.load(ref, CPU.with_(**options))
    for denoiser in (loaded.base, loaded.refiner):
        assert any(type(module) in LEAN.values() for module in denoiser.unet.modules()) == light


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda"])
def test_a_settled_profile_stays(monkeypatch, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    settled = models.settled(RuntimeProfile(device=device))
    assert models.settled(settled) == settled
    assert "auto" not in settled.to_dict().values()
