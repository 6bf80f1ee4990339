"""Self-attention in which some rows of a call attend to nothing but themselves, each token to its own.

That is what perturbed-attention guidance (Ahn et al. 2024, arXiv 2403.17377) asks of its third row: where the map of
the attention is the identity, its outcome is the value. Which rows are so perturbed, and in which blocks, each call
says with `cross_attention_kwargs`; without them a call is diffusers' own, and costs nothing.
"""

from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor2_0, FusedAttnProcessor2_0
from torch.nn import functional

# The codes of the blocks in whose layers a row is perturbed; 0 is a row like any other.
PLACES = {"down": 1, "mid": 2, "up": 3}
PERTURBED = "perturbed"


class RowProcessor:
    """Scaled dot-product attention as diffusers' processors have it, for attentions with SDXL's settings.

    `place` is the code of the block that a self-attention lies in; a cross-attention has none, and perturbs no row.
    """

    def __init__(self, place: int | None) -> None:
        self.place = place

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
        perturbed: torch.Tensor | None = None,
    ) -> torch.Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        hidden: torch.Tensor = attn.to_out[0](mixed(attn, hidden_states, context, self.alone(perturbed)))
        return hidden

    def alone(self, perturbed: torch.Tensor | None) -> torch.Tensor | None:
        """Which rows (n,) of a call are perturbed here; None where none can be. `perturbed` (n,) are their codes."""
        return None if perturbed is None or self.place is None else perturbed == self.place


def mixed(
    attn: Attention, hidden: torch.Tensor, context: torch.Tensor, alone: torch.Tensor | None = None
) -> torch.Tensor:
    """The attention of `hidden` (n, tokens, channels) to `context` (n, others, width), before its output's projection.
    Rows that are `alone` (n,) keep their values; in them `context` is `hidden`."""
    if not attn.fused_projections:
        parts = attn.to_q(hidden), attn.to_k(context), attn.to_v(context)
    elif attn.is_cross_attention:
        parts = attn.to_q(hidden), *attn.to_kv(context).chunk(2, -1)
    else:
        parts = attn.to_qkv(hidden).chunk(3, -1)
    query, key, value = (part.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for part in parts)
    found = functional.scaled_dot_product_attention(query, key, value)
    if alone is not None:
        found = torch.where(alone[:, None, None, None], value, found)
    return found.transpose(1, 2).flatten(2)


def is_plain(attn: Attention) -> bool:
    """Whether an attention has SDXL's settings, which alone are known here."""
    parts = (attn.spatial_norm, attn.group_norm, attn.norm_q, attn.norm_k, attn.norm_cross)
    scaled = attn.residual_connection or attn.rescale_output_factor != 1
    processed = type(attn.processor) in (AttnProcessor2_0, FusedAttnProcessor2_0, RowProcessor)
    return processed and not scaled and not any(part is not None for part in parts)


def watch_rows(unet: UNet2DConditionModel) -> None:
    """Let the calls of a UNet perturb rows. Its projections are fused before, where they are to be."""
    for name, attn in _attentions(unet).items():
        if is_plain(attn):
            place = None if attn.is_cross_attention else PLACES.get(name.partition("_")[0])
            attn.processor = RowProcessor(place)


def perturbs(unet: Any, layers: str) -> bool:
    """Whether rows can be perturbed in these blocks of a UNet, which may stand behind CUDA graphs."""
    processors = (attn.processor for attn in _attentions(getattr(unet, "unet", unet)).values())
    return any(isinstance(each, RowProcessor) and each.place == PLACES[layers] for each in processors)


def _attentions(unet: Any) -> dict[str, Attention]:
    return {name: module for name, module in unet.named_modules() if isinstance(module, Attention)}
