"""What the VAE may take of the memory: how many images it has at once, and in tiles of which side.

A decode takes more memory than a UNet call, and grows with the image's area. Where it does not fit, half of the images
are tried at a time, then each image in overlapping tiles, then in smaller ones. What was too much for a size is
remembered, so that the next images of it do not run into it again. Knows no VAE: who calls says what is to be tried.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from sdxl_lab.config import RuntimeProfile

log = logging.getLogger(__name__)

# The smallest tiles, in pixels a side: below, their overlap costs more than it saves, and seams are everywhere.
SMALLEST = 128
# A tile's side is a multiple of this: its overlap, a quarter, is then one of the latents' 8 pixels, and the tiles fit.
STEP = 32

Size = tuple[int, int]  # height, width in pixels
Attempt = Callable[[torch.Tensor, int | None], torch.Tensor]


@dataclass
class VaeMemory:
    """Images with a side longer than `above` pixels are had in tiles, whose side is `usual` where that is shorter.
    One thread uses it."""

    above: int = RuntimeProfile().tile_above
    usual: int = 1024
    _most: dict[Size, int] = field(default_factory=dict)
    _tiles: dict[Size, int] = field(default_factory=dict)

    def tile(self, size: Size) -> int | None:
        """The side of an image's tiles in pixels; None where it is had whole."""
        if size in self._tiles:
            return self._tiles[size]
        return _whole(min(self.usual, self.above)) if max(size) > self.above else None

    def within(self, attempt: Attempt, given: torch.Tensor, size: Size, most: int) -> torch.Tensor:
        """What `attempt` makes of a batch `given` for images of this size, at most so many at a time, in as many goes
        and tiles as the memory asks for. Raises `torch.OutOfMemoryError`."""
        found: list[torch.Tensor] = []
        left = given
        while len(left):
            count = min(len(left), most, self._most.get(size, most))
            made = _tried(attempt, left[:count], self.tile(size))
            if made is None:
                self._shrink(size, count)
                continue
            found.append(made)
            left = left[count:]
        return torch.cat(found)

    def _shrink(self, size: Size, count: int) -> None:
        """So many images of the size at once were too many for the memory."""
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        height, width = size
        if count > 1:
            self._most[size] = count // 2
            log.warning("out of memory: the VAE has at most %d images of %dx%d at a time", count // 2, width, height)
            return
        side = _whole((self.tile(size) or max(size)) // 2)
        if side < SMALLEST:
            raise torch.OutOfMemoryError(f"the VAE's memory ran out for an image of {width}x{height} pixels")
        self._tiles[size] = side
        log.warning("out of memory: the VAE has images of %dx%d in tiles of %d pixels", width, height, side)


def _whole(side: int) -> int:
    return max(STEP, side // STEP * STEP)


def _tried(attempt: Attempt, given: torch.Tensor, tile: int | None) -> torch.Tensor | None:
    """None where memory ran out. The error is gone when this returns, and with its frames the memory they held."""
    try:
        return attempt(given, tile)
    except torch.OutOfMemoryError:
        return None
