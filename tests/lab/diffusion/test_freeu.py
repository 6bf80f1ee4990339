"""FreeU's scales of some rows: diffusers' own in them, and the same bits as without in all others."""

import copy

import pytest
import torch

from sdxl_lab.diffusion import models
from sdxl_lab.diffusion.attention import watch_rows
from sdxl_lab.diffusion.freeu import SCALED, scalable, watch_scales
from sdxl_lab.diffusion.graphs import Graphed
from sdxl_lab.diffusion.inventory import NANO
from sdxl_lab.diffusion.lean import lighten
from tests.lab.diffusion.test_lean import answer, inputs

ROWS = [(1.1, 1.2, 0.6, 0.4), (1.0, 1.0, 1.0, 1.0), (1.5, 1.0, 1.0, 0.2)]


@pytest.fixture(scope="module", params=["nano's", "the refiner's blocks"])
def unet(request):
    """nano's, as diffusers loads it; one whose first block on the way up has no attention, as SDXL's refiner has it."""
    if request.param == "nano's":
        folder = NANO / "base" / "unet"
        return models.UNet2DConditionModel.from_pretrained(folder, variant="fp16", dtype=torch.float32).eval()
    torch.manual_seed(0)
    return models.UNet2DConditionModel(
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(32, 64),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        norm_num_groups=16,
        cross_attention_dim=128,
        addition_embed_type="text_time",
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=256,
        transformer_layers_per_block=(1, 1),
    ).eval()


def watched(unet, lean: bool):
    found = copy.deepcopy(unet)
    if lean:
        lighten(found)
    watch_rows(found)
    watch_scales(found)
    return found


@pytest.mark.parametrize("lean", [False, True], ids=["diffusers' blocks", "lean blocks"])
def test_each_row_is_scaled_as_diffusers_scales_a_call(unet, lean):
    given, ours = inputs(unet, 3), watched(unet, lean)
    scaled = {"cross_attention_kwargs": {SCALED: torch.tensor(ROWS)}}
    found, plain = answer(ours, given | scaled), answer(ours, given)
    for row, (b1, b2, s1, s2) in enumerate(ROWS):
        theirs = copy.deepcopy(unet)
        theirs.enable_freeu(s1=s1, s2=s2, b1=b1, b2=b2)
        expected = answer(theirs, given)[row]
        assert (found[row] - expected).abs().max() <= 2e-5 * expected.abs().max()
        assert torch.equal(found[row], plain[row]) is (row == 1)
    # A graph has buffers for them.
    graphed = Graphed(ours, lambda _: lambda call: (lambda: None, call()))
    with torch.no_grad():
        assert torch.equal(graphed(**given, **scaled)[0], found)


def test_other_blocks_than_sdxl_s_are_not_scaled(unet):
    other = copy.deepcopy(unet)
    assert scalable(other)
    assert scalable(Graphed(other))
    other.up_blocks[1] = torch.nn.Identity()
    assert not scalable(other)
