"""FreeU (Si et al. 2023, arXiv 2309.11497) for some rows of a call: no training, no further row.

In the first two blocks of the UNet's way up half of the backbone's channels are amplified, and the lowest frequencies
of the skip connections are damped. All of that is a matter of scales, so each row has its own: a call says them with
`cross_attention_kwargs`, and rows whose scales are 1 keep their bits. Without them a call is diffusers' own.
"""

from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.unets.unet_2d_blocks import CrossAttnUpBlock2D, UpBlock2D

from sdxl_lab.config import FreeU

SCALED = "scaled"
NONE = (1.0, 1.0, 1.0, 1.0)
THRESHOLD = 1  # frequencies on either side of the lowest that are damped


def scales(config: FreeU | None) -> tuple[float, float, float, float]:
    """A row's scales: of the backbone in the first and second block, and of the skip connections there."""
    return NONE if config is None else (config.b1, config.b2, config.s1, config.s2)


def watch_scales(unet: UNet2DConditionModel) -> None:
    """Let the calls of a UNet scale rows. A call's scales lie at the blocks while it lasts."""
    unet.register_forward_pre_hook(_told, with_kwargs=True)
    for block in unet.up_blocks[:2]:
        block.register_forward_pre_hook(_entering, with_kwargs=True)
        for part in _between(block):
            part.register_forward_hook(_leaving)


def scalable(unet: Any) -> bool:
    """Whether both blocks are such as SDXL's, in a UNet that may stand behind CUDA graphs."""
    blocks = getattr(unet, "unet", unet).up_blocks[:2]
    return all(isinstance(block, CrossAttnUpBlock2D | UpBlock2D) for block in blocks)


def _between(block: Any) -> Any:
    """The parts of a block whose answer meets the next skip connection."""
    return (block.attentions if isinstance(block, CrossAttnUpBlock2D) else block.resnets)[:-1]


def _told(unet: Any, given: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    asked = dict(named.get("cross_attention_kwargs") or {})
    rows = asked.pop(SCALED, None)
    for place, block in enumerate(unet.up_blocks[:2]):
        for part in (block, *_between(block)):
            part.row_scales = None if rows is None else (rows[:, place], rows[:, 2 + place])
    return None if rows is None else (given, named | {"cross_attention_kwargs": asked or None})


def _entering(
    block: Any, given: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    if block.row_scales is None:
        return None
    backbone, skips = block.row_scales
    return given, named | {
        "hidden_states": amplified(named["hidden_states"], backbone),
        "res_hidden_states_tuple": tuple(damped(skip, skips) for skip in named["res_hidden_states_tuple"]),
    }


def _leaving(part: Any, _: tuple[Any, ...], answer: Any) -> Any:
    if part.row_scales is None:
        return None
    backbone, _ = part.row_scales
    return (amplified(answer[0], backbone),) if isinstance(answer, tuple) else amplified(answer, backbone)


def amplified(hidden: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The backbone (n, channels, h, w) with the first half of its channels times each row's scale (n,)."""
    half = hidden.shape[1] // 2
    first, second = hidden[:, :half], hidden[:, half:]
    return torch.cat([first * scale.to(hidden.dtype)[:, None, None, None], second], 1)


def damped(skip: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """A skip connection (n, channels, h, w) with its lowest frequencies times each row's scale (n,)."""
    (height, width), by_row = skip.shape[-2:], scale.float()[:, None, None, None]
    spectrum = torch.fft.fftshift(torch.fft.fftn(skip.float(), dim=(-2, -1)), dim=(-2, -1))
    mask = torch.ones((len(skip), 1, height, width), device=skip.device)
    rows, columns = (slice(side // 2 - THRESHOLD, side // 2 + THRESHOLD) for side in (height, width))
    mask[..., rows, columns] = by_row
    found = torch.fft.ifftn(torch.fft.ifftshift(spectrum * mask, dim=(-2, -1)), dim=(-2, -1)).real
    return torch.where(by_row == 1, skip, found.to(skip.dtype))
