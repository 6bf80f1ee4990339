"""Rows whose self-attention is the identity: as diffusers' PAG processors have them, and only they."""

import copy

import pytest
import torch
from diffusers.models.attention_processor import Attention, PAGCFGIdentitySelfAttnProcessor2_0

from sdxl_lab.diffusion import models
from sdxl_lab.diffusion.attention import PERTURBED, PLACES, RowProcessor, perturbs, watch_rows
from sdxl_lab.diffusion.graphs import Graphed
from sdxl_lab.diffusion.inventory import NANO
from sdxl_lab.diffusion.lean import lighten
from tests.lab.diffusion.test_lean import answer, inputs


@pytest.fixture(scope="module")
def unet():
    """nano's, as diffusers loads it."""
    return models.UNet2DConditionModel.from_pretrained(
        NANO / "base" / "unet", variant="fp16", dtype=torch.float32
    ).eval()


def asked(codes: torch.Tensor) -> dict:
    return {"cross_attention_kwargs": {PERTURBED: codes}}


def watched(unet, fused: bool = False, lean: bool = True):
    found = copy.deepcopy(unet)
    if fused:
        found.fuse_qkv_projections()
    if lean:
        lighten(found)
    watch_rows(found)
    return found


@pytest.mark.parametrize("layers", PLACES)
@pytest.mark.parametrize("fused", [False, True], ids=["apart", "fused"])
@pytest.mark.parametrize("lean", [False, True], ids=["diffusers' blocks", "lean blocks"])
def test_the_third_of_three_rows_is_perturbed_as_diffusers_perturbs_it(unet, layers, fused, lean):
    given, theirs = inputs(unet, 3), copy.deepcopy(unet)
    for name, attn in theirs.named_modules():
        if isinstance(attn, Attention) and not attn.is_cross_attention and name.startswith(layers):
            attn.processor = PAGCFGIdentitySelfAttnProcessor2_0()
    ours = watched(unet, fused, lean)
    codes = torch.tensor([0, 0, PLACES[layers]])
    found = answer(ours, given | asked(codes))
    expected = answer(theirs, given)
    assert (found - expected).abs().max() <= 2e-5 * expected.abs().max()
    plain = answer(ours, given)
    assert torch.equal(plain[:2], found[:2]), "the others are as if there were none"
    assert (plain[2] - found[2]).abs().max() > 1e-3 * expected.abs().max()


def test_rows_of_one_call_are_perturbed_in_blocks_of_their_own(unet):
    ours, given = watched(unet), inputs(unet, 4)
    mixed = answer(ours, given | asked(torch.tensor([0, 1, 2, 3])))
    for row, code in enumerate([0, 1, 2, 3]):
        alone = answer(ours, given | asked(torch.full((4,), code)))
        assert torch.equal(mixed[row], alone[row])


@pytest.mark.parametrize("lean", [False, True], ids=["diffusers' blocks", "lean blocks"])
def test_a_call_without_such_rows_has_the_bits_of_one_without_the_processors(unet, lean):
    bare = copy.deepcopy(unet)
    if lean:
        lighten(bare)
    assert torch.equal(answer(watched(unet, lean=lean), inputs(unet, 3)), answer(bare, inputs(unet, 3)))


def test_where_there_is_no_attention_of_sdxl_s_kind_nothing_is_perturbed(unet):
    other = copy.deepcopy(unet)
    for name, attn in other.named_modules():
        if isinstance(attn, Attention) and name.startswith("mid"):
            attn.rescale_output_factor = 2.0
    watch_rows(other)
    assert [perturbs(other, layers) for layers in ("down", "mid", "up")] == [True, False, True]
    assert not perturbs(unet, "down"), "before it is made to watch rows"
    assert perturbs(Graphed(watched(unet)), "mid")


def test_a_graph_has_buffers_for_the_codes_and_is_kept_apart(unet):
    calls = []

    def recorder(call):
        calls.append(call)
        answer = call()
        return (lambda: answer.copy_(call())), answer

    graphed, given = Graphed(watched(unet), lambda _: recorder), inputs(unet, 2)
    with torch.no_grad():
        plain = graphed(**given)[0]
        for codes in (torch.tensor([0, 2]), torch.tensor([2, 0])):
            found = graphed(**given, **asked(codes))[0]
            still = codes == 0
            assert torch.equal(found[still], plain[still])
            assert not torch.equal(found[~still], plain[~still])
    assert len(calls) == 2, "one without codes, one with"


def test_every_attention_is_watched(unet):
    processors = [each.processor for each in watched(unet).modules() if isinstance(each, Attention)]
    assert {type(each) for each in processors} == {RowProcessor}
    assert {each.place for each in processors} == {None, 1, 2, 3}
