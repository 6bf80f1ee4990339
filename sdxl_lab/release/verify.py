"""Is a slot's golden still what the slot draws? The one comparison that the command line, the regression notebook and
a service at its start make.

Pixels are a function of the configuration, the prompt, the seed and the machine. Goldens are drawn exactly (see
`RuntimeProfile.exact`): where processor, threads and libraries are those of the promotion, a golden must come back bit
for bit. On the same kind of machine (device and dtype) samples may be rounded the other way. Elsewhere that is not
promised: there its mean difference must be small and its structure the same. Imports no torch: the engine comes from
the caller.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from PIL import Image

from sdxl_lab.errors import Cancelled, EngineStopped, QueueFull
from sdxl_lab.images import GeneratedImage, beside, max_difference, mean_difference, open_image, ssim
from sdxl_lab.job import ImageRequest, Job
from sdxl_lab.record import ImageRecord
from sdxl_lab.release.promote import changed_values
from sdxl_lab.release.slot import Golden, Slot, SlotError

if TYPE_CHECKING:
    from sdxl_lab.diffusion.engine import Engine

# What must agree of two exact runtimes for the same bits.
DECIDES_BITS = (
    "device",
    "dtype",
    "exact",
    "processor",
    "cpu_capability",
    "threads",
    "channels_last",
    "fuse_qkv",
    "compile",
)
# An image of 8 bits cannot show float32's 1e-3 better than by one step of a sample, where a value is rounded the
# other way. Another device or dtype moves whole images slightly: bfloat16 by 13/255 at most, far less on average.
EXACT_RUNTIME = 0.0
SAME_RUNTIME = 1 / 255
OTHER_RUNTIME = 5 / 255
# nano's images in bfloat16 have an SSIM of 0.9988 to 0.9994 with those in float32. No limit tells that from a small
# change of a setting (guidance 3.1 for 3: 0.9989 to 0.9997); such are caught where the goldens were drawn. One in
# eight, of a prompt that leaves its background to chance, became another image (0.78): a golden's prompt should name
# all it means.
LEAST_SSIM = 0.99


@dataclass(frozen=True)
class GoldenCheck:
    """A golden beside the image drawn again.

    `difference` and `tolerance` are on [0, 1] and of the same `measure`: `max-abs`, the largest over all samples,
    where both were drawn on the same kind of device in the same dtype, and then 0 is asked for where both are exact on
    one kind of processor; `mean-abs` otherwise, and then `ssim` (Wang et
    al. 2004) counts too. It is None where it is not asked for, or the sizes differ. `reason` says why the golden is not
    what was promoted; None if it is.
    """

    golden: Golden
    image: GeneratedImage
    measure: str
    difference: float
    tolerance: float
    ssim: float | None
    reason: str | None

    @property
    def passed(self) -> bool:
        return self.reason is None

    @property
    def panels(self) -> list[tuple[str, Image.Image]]:
        """Each under its label: what was expected, what came, and the difference magnified."""
        expected = open_image(self.golden.path)
        actual, difference, magnified = beside(expected, self.image.image)
        return [
            (f"expected: {self.golden.prompt}, seed {self.golden.seed}", expected),
            (f"actual: {'as promoted' if self.passed else 'regressed'}", actual),
            (f"{magnified}, {self.measure} {self.difference:.4f}", difference),
        ]

    def to_dict(self) -> dict[str, Any]:
        """The finding as plain values."""
        return {
            "golden": self.golden.path.name,
            "prompt": self.golden.prompt,
            "seed": self.golden.seed,
            "measure": self.measure,
            "difference": round(self.difference, 6),
            "tolerance": round(self.tolerance, 6),
            "ssim": None if self.ssim is None else round(self.ssim, 6),
            "passed": self.passed,
            "reason": self.reason,
        }


def verify(slot: Slot, engine: "Engine") -> list[GoldenCheck]:
    """Draw all goldens of a slot exactly and compare them.

    Raises `SlotError` for a slot without goldens, which promises nothing that could be checked, and for a golden that
    cannot be drawn; `Cancelled` or `EngineStopped` where the engine is closed.
    """
    goldens = slot.goldens
    if not goldens:
        raise SlotError(
            f"a slot must have golden images to be held against; {slot.folder} has none. Promote into it first"
        )
    jobs: list[Job[GeneratedImage]] = []
    try:
        for golden in goldens:
            jobs.append(_submitted(engine, ImageRequest(slot.config, golden.prompt, golden.seed), jobs))
        return [_compared(golden, job) for golden, job in zip(goldens, jobs, strict=True)]
    except BaseException:
        for job in jobs:
            job.cancel()
        raise


def _submitted(engine: "Engine", request: ImageRequest, before: Sequence[Job[GeneratedImage]]) -> Job[GeneratedImage]:
    """The job, once the engine's queue has room for it beside those `before` it."""
    for earlier in before:
        try:
            return engine.submit(request, exact=True)
        except QueueFull:
            earlier.exception()
    return engine.submit(request, exact=True)


def _compared(golden: Golden, job: Job[GeneratedImage]) -> GoldenCheck:
    try:
        return compare_golden(golden, job.result())
    except (Cancelled, EngineStopped):
        raise
    except Exception as error:
        raise SlotError(f"golden {golden.path.name}: it could not be drawn and compared: {error}") from error


def compare_golden(golden: Golden, image: GeneratedImage) -> GoldenCheck:
    """Whether `image`, drawn from the golden's configuration, prompt and seed, is the image promoted.

    A model of another identity fails whatever the pixels say.
    """
    before, now = golden.record, image.record
    same = all(before.runtime.get(name) == now.runtime.get(name) for name in ("device", "dtype"))
    measure, tolerance = ("max-abs", SAME_RUNTIME) if same else ("mean-abs", OTHER_RUNTIME)
    if _same_bits(before, now):
        tolerance = EXACT_RUNTIME
    promoted, similar = open_image(golden.path), None
    if promoted.size != image.image.size:
        difference = 1.0
    elif same:
        difference = max_difference(promoted, image.image)
    else:
        difference, similar = mean_difference(promoted, image.image), ssim(promoted, image.image)
    reason = _reason(measure, difference, tolerance, similar)
    if before.weights != now.weights:
        reason = f"the weights are not those it was promoted with: {changed_values(before.weights, now.weights)}"
    if reason is not None:
        reason = f"golden {golden.path.name}: {reason}"
    return GoldenCheck(golden, image, measure, difference, tolerance, similar, reason)


def _same_bits(before: ImageRecord, now: ImageRecord) -> bool:
    """Whether both were drawn exactly, on one kind of processor with the same libraries."""
    agree = all(before.runtime.get(name) == now.runtime.get(name) for name in DECIDES_BITS)
    return agree and now.runtime.get("exact") is True and before.libraries == now.libraries


def _reason(measure: str, difference: float, tolerance: float, similar: float | None) -> str | None:
    if difference > tolerance + 1e-9:
        return f"the image differs by {difference:.4f} ({measure} on [0, 1]); at most {tolerance:.4f} is allowed"
    if similar is not None and similar < LEAST_SSIM:
        return f"the SSIM is {similar:.4f}; at least {LEAST_SSIM} is asked for on another machine"
    return None
