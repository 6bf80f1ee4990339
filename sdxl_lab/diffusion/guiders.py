"""Guidance: from the predictions of a step's rows to the one that the scheduler takes.

A guider has one signature, `(unguided, guided, scale) -> prediction`; tensors are (1, channels, h, w), as the UNet
predicts. `guider_of` makes an image's, which may remember its earlier steps. They do what diffusers' own guiders do.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from sdxl_lab.config import GenerationConfig, PerturbedAttention

Guider = Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]


def guider_of(config: GenerationConfig) -> Guider:
    """The guider that a configuration asks for, of one image and one stage."""
    if config.apg is not None:
        return Projected(config.apg.eta, config.apg.threshold, config.apg.momentum)
    return zero_star if config.cfg_zero is not None else classifier_free


def classifier_free(unguided: torch.Tensor, guided: torch.Tensor, scale: float) -> torch.Tensor:
    """Classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598)."""
    return unguided + scale * (guided - unguided)


def zero_star(unguided: torch.Tensor, guided: torch.Tensor, scale: float) -> torch.Tensor:
    """CFG-Zero* (Fan et al. 2025, arXiv 2503.18886), section 4.1: the unguided prediction is scaled to the guided one's
    projection on it before the two are parted."""
    axes = _all_but_rows(unguided)
    fit = (guided * unguided).sum(axes, keepdim=True) / ((unguided**2).sum(axes, keepdim=True) + 1e-8)
    return classifier_free(fit * unguided, guided, scale)


@dataclass
class Projected:
    """Adaptive projected guidance (Sadat et al. 2024, arXiv 2410.02416), algorithm 1: the difference of the
    predictions, averaged with `momentum`, no longer than `threshold` (0: as long as it is), and of its part that is
    parallel to the guided prediction only `eta`. As in diffusers it is the UNet's predictions that are projected."""

    eta: float
    threshold: float
    momentum: float
    average: torch.Tensor | None = None

    def __call__(self, unguided: torch.Tensor, guided: torch.Tensor, scale: float) -> torch.Tensor:
        axes = _all_but_rows(guided)
        difference = guided - unguided
        if self.average is not None:
            difference = difference + self.momentum * self.average
        self.average = difference
        if self.threshold > 0:
            length = difference.norm(p=2, dim=axes, keepdim=True)
            difference = difference * (self.threshold / length).clamp(max=1)
        direction = guided.double() / guided.double().norm(p=2, dim=axes, keepdim=True).clamp(min=1e-12)
        parallel = (difference.double() * direction).sum(axes, keepdim=True) * direction
        update = (difference.double() - parallel).to(guided.dtype) + self.eta * parallel.to(guided.dtype)
        return guided + (scale - 1) * update


def perturbed_scale(config: PerturbedAttention | None, timestep: float) -> float:
    """How far a step at this timestep goes away from the perturbed row, as diffusers' PAG pipelines have it; 0 where it
    needs no such row."""
    return 0.0 if config is None else max(0.0, config.scale - config.adaptive * (1000 - timestep))


def away_from(prediction: torch.Tensor, guided: torch.Tensor, perturbed: torch.Tensor, scale: float) -> torch.Tensor:
    """Perturbed-attention guidance (Ahn et al. 2024, arXiv 2403.17377) on top of another guidance's prediction."""
    return prediction + scale * (guided - perturbed)


def rescaled(prediction: torch.Tensor, guided: torch.Tensor, rescale: float) -> torch.Tensor:
    """The prediction with the spread of the guided one, by `rescale` (Lin et al. 2023, arXiv 2305.08891, section
    3.4)."""
    axes = _all_but_rows(prediction)
    matched = prediction * (guided.std(axes, keepdim=True) / prediction.std(axes, keepdim=True))
    return rescale * matched + (1 - rescale) * prediction


def _all_but_rows(tensor: torch.Tensor) -> list[int]:
    return list(range(1, tensor.ndim))
