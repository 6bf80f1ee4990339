"""Source images: what an image starts from, and the mask that says which part of it is painted anew.

A source comes as cameras and painting programs write it, and is brought into one form at birth, so that every door
means the same by it and its checksum names what the image was made of. Imports no torch.
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from PIL import Image, ImageFilter, ImageOps

from sdxl_lab.config import FIT, MASK_BLUR, STRENGTH, ConfigError
from sdxl_lab.record import ImageRecord, SourceRecord

Stage = Literal["base", "refiner"]
MULTIPLE = 8  # pixels a latent is wide
HALF = 128  # of 255: what a mask is cut at


@dataclass(frozen=True)
class SourceImage:
    """The image that a request starts from. Raises `ConfigError`.

    `image` is turned upright as its EXIF says; what is transparent in it lies on white, as in A1111. `strength`, above
    0 to 1, is how much of the noise schedule is gone through again. The base does that at the configuration's size,
    into which `fit` brings a source of another one; or, as the `stage`, the refiner, at the source's own size down to
    multiples of 8 pixels.

    `mask` is white where the image is painted anew and black where the source stays, as diffusers and A1111 have it;
    what is transparent in it stays, too. One of another size is stretched over the upright source, and then both are
    fitted alike. `mask_blur`, in pixels of the image, rounds its edge; then it is cut at one half. `record` is that of
    a source which was drawn here, and repeats it.
    """

    image: Image.Image
    strength: float = STRENGTH.default
    record: ImageRecord | None = None
    mask: Image.Image | None = None
    mask_blur: float = MASK_BLUR.default
    fit: str = FIT.default
    stage: Stage = "base"

    def __post_init__(self) -> None:
        strength = self.strength
        if isinstance(strength, bool) or not (isinstance(strength, int | float) and 0 < strength <= 1):
            raise ConfigError("strength", strength, "a number above 0, at most 1", 0.3)
        FIT.check(self.fit)
        MASK_BLUR.check(self.mask_blur)
        if self.stage not in ("base", "refiner"):
            raise ConfigError("stage", self.stage, "base or refiner", "base")
        object.__setattr__(self, "image", _flattened(self.image, "RGB", "white"))
        if self.mask is None:
            return
        object.__setattr__(self, "mask", _flattened(self.mask, "L", "black"))
        if self.mask.getextrema()[1] < HALF:  # type: ignore[operator]
            rule = "an image that is white where the source is to be painted anew"
            raise ConfigError("mask", "one without white", rule, "mask = mask.png")

    @cached_property
    def sha256(self) -> str:
        """The checksum of the upright RGB pixels: the same whatever file holds them."""
        return _sha256(self.image)

    def size(self, drawn: tuple[int, int]) -> tuple[int, int]:
        """Width and height of the image that is made of it, where the configuration says `drawn`."""
        if self.stage == "base":
            return drawn
        width, height = (side // MULTIPLE * MULTIPLE for side in self.image.size)
        return width, height

    def fitted(self, size: tuple[int, int]) -> Image.Image:
        """The source (RGB) at this width and height."""
        return self._fitted(self.image, size)

    def fitted_mask(self, size: tuple[int, int]) -> np.ndarray | None:
        """The mask (height, width) at this width and height, 1 where the image is painted anew, else 0; float32."""
        if self.mask is None:
            return None
        over = self.mask if self.mask.size == self.image.size else self.mask.resize(self.image.size, LANCZOS)
        mask = self._fitted(over, size)
        if self.mask_blur:
            mask = mask.filter(ImageFilter.GaussianBlur(self.mask_blur))
        return (np.asarray(mask) >= HALF).astype(np.float32)

    def _fitted(self, image: Image.Image, size: tuple[int, int]) -> Image.Image:
        if image.size == size:
            return image
        if self.fit == "crop" and self.stage == "base":
            return ImageOps.fit(image, size, LANCZOS)
        return image.resize(size, LANCZOS)

    def to_record(self) -> SourceRecord:
        """What the image's record says of it."""
        return SourceRecord(
            sha256=self.sha256,
            size=self.image.size,
            stage=self.stage,
            fit=self.fit,
            mask_sha256=None if self.mask is None else _sha256(self.mask),
            mask_blur=None if self.mask is None else float(self.mask_blur),
        )

    def differs(self, recorded: SourceRecord) -> list[str]:
        """Which of source and mask are other ones than those that a record names."""
        own = self.to_record()
        return [
            name
            for name, found, known in (
                ("source", own.sha256, recorded.sha256),
                ("mask", own.mask_sha256, recorded.mask_sha256),
            )
            if found != known
        ]


LANCZOS = Image.Resampling.LANCZOS


def _flattened(image: Image.Image, mode: str, ground: str) -> Image.Image:
    """An image upright, in 8 bits of `mode`, with what is transparent on the `ground`."""
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I"):  # 16 bits of grey, which Pillow would cut off at 255
        upright = Image.fromarray((np.asarray(upright).clip(0, 65_535) // 257).astype(np.uint8))
    if upright.has_transparency_data:
        layers = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", layers.size, ground), layers)
    return upright.convert(mode)


def _sha256(image: Image.Image) -> str:
    size = f"{image.mode} {image.width}x{image.height}\n".encode()
    return hashlib.sha256(size + image.tobytes()).hexdigest()
