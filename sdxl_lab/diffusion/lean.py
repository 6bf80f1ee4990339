"""The blocks of diffusers' UNet with fewer passes over memory: what makes a call on a CPU cheaper.

There every operation between two products reads and writes its whole tensor. These blocks compute what diffusers' do,
in the same order, but write into results that nobody else holds, leave out divisions by one and copies into another
layout, and compute the two halves of a GEGLU apart, so that the gate's GELU reads contiguous memory. A block of other
settings than SDXL's keeps diffusers' own `forward`.
"""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.attention import Attention, BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import nn
from torch.nn import functional

from sdxl_lab.diffusion.attention import PERTURBED, is_plain, mixed


class LeanResnet(ResnetBlock2D):
    """GroupNorm, SiLU, convolution, the time's embedding, and again; then the shortcut."""

    def forward(self, input_tensor: torch.Tensor, temb: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        hidden = self.conv1(functional.silu(self.norm1(input_tensor), inplace=True))
        hidden += self.time_emb_proj(functional.silu(temb))[:, :, None, None]
        hidden = self.conv2(functional.silu(self.norm2(hidden), inplace=True))
        hidden += input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor)
        return hidden


class LeanTransformer(Transformer2DModel):
    """Its output keeps the layout of its input."""

    def _get_output_for_continuous_inputs(
        self, hidden_states: torch.Tensor, residual: torch.Tensor, batch_size: int, height: int, width: int, **_: Any
    ) -> torch.Tensor:
        hidden = self.proj_out(hidden_states).unflatten(1, (height, width)).permute(0, 3, 1, 2)
        return residual + hidden  # in this order: the sum has the layout of its first part


class LeanBlock(BasicTransformerBlock):
    """Self-attention, cross-attention and feed-forward, each added to what it was given."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        *_: Any,
        cross_attention_kwargs: Mapping[str, torch.Tensor] | None = None,
        **__: Any,
    ) -> torch.Tensor:
        normed = self.norm1(hidden_states)
        asked = cross_attention_kwargs or {}
        alone = self.attn1.processor.alone(asked[PERTURBED]) if PERTURBED in asked else None
        hidden_states = _attended(self.attn1, normed, normed, hidden_states, alone)
        hidden_states = _attended(self.attn2, self.norm2(hidden_states), encoder_hidden_states, hidden_states)
        hidden = self.ff(self.norm3(hidden_states))
        hidden += hidden_states
        return hidden


def _attended(
    attn: Attention,
    hidden: torch.Tensor,
    context: torch.Tensor | None,
    residual: torch.Tensor,
    alone: torch.Tensor | None = None,
) -> torch.Tensor:
    """`residual` plus the attention of `hidden` (n, tokens, channels) to `context` (n, others, width)."""
    assert context is not None, "SDXL's UNet is called with text"
    out: torch.Tensor = attn.to_out[0](mixed(attn, hidden, context, alone))
    out += residual
    return out


class LeanGEGLU(GEGLU):
    """One product for the values and one for the gate. An adapter in the place of the projection is not passed over:
    its product is made in one piece."""

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        if type(self.proj) is not nn.Linear:
            projected: torch.Tensor = super().forward(hidden_states)
            return projected
        values, gate = zip(self.proj.weight.chunk(2), self.proj.bias.chunk(2), strict=True)
        gated = functional.gelu(functional.linear(hidden_states, *gate))
        gated *= functional.linear(hidden_states, *values)
        return gated


class Pointwise(nn.Conv2d):
    """A convolution of one pixel, as the matrix product that it is. torch takes one of two implementations by the
    number of threads, which round differently; a product has the same bits with one thread as with two or four."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        mixed = torch.matmul(self.weight.flatten(1), pixels.flatten(2)).unflatten(2, pixels.shape[2:])
        return mixed if self.bias is None else mixed.add_(self.bias[:, None, None])


LEAN: dict[type[nn.Module], type[nn.Module]] = {
    ResnetBlock2D: LeanResnet,
    Transformer2DModel: LeanTransformer,
    BasicTransformerBlock: LeanBlock,
    GEGLU: LeanGEGLU,
    nn.Conv2d: Pointwise,
}


def lighten(model: nn.Module) -> None:
    """Give every block that `LEAN` has one for its leaner `forward`. Weights stay as they are."""
    for module in model.modules():
        if type(module) in LEAN and _is_sdxls(module):
            module.__class__ = LEAN[type(module)]


def _is_sdxls(module: nn.Module) -> bool:
    """Whether a block has the settings of SDXL's, which alone the lean ones know."""
    if isinstance(module, nn.Conv2d):
        pointwise = module.kernel_size == module.stride == module.dilation == (1, 1) and not any(module.padding)
        return pointwise and module.groups == 1
    if isinstance(module, ResnetBlock2D):
        scaled = module.output_scale_factor != 1 or module.time_embedding_norm != "default" or module.skip_time_act
        resampled = module.upsample is not None or module.downsample is not None
        return not scaled and not resampled and isinstance(module.nonlinearity, nn.SiLU) and bool(module.time_emb_proj)
    if isinstance(module, Transformer2DModel):
        return module.is_input_continuous and module.use_linear_projection
    if isinstance(module, BasicTransformerBlock):
        plain = module.norm_type == "layer_norm" and module.pos_embed is None and not module.only_cross_attention
        return plain and module.attn2 is not None and all(is_plain(each) for each in (module.attn1, module.attn2))
    return type(getattr(module, "proj", None)) is nn.Linear
