"""The cost of one SDXL image on several GPUs: arithmetic on assumptions, not measured. Prints Markdown.

Counted: parameters and FLOPs (torch's FlopCounterMode on the real configurations without weights).
Assumed: the share of its peak that a GPU reaches, its price, and the memory of a batch beside the weights.
"""

from dataclasses import dataclass

# Counted at 1024 x 1024 (latents 128 x 128), for one row of a call: guidance takes two rows a step.
BASE_ROW, REFINER_ROW, DECODE = 6.76, 7.29, 10.47  # TFLOP
PARAMETERS = {  # in billions
    "base UNet": 2.567,
    "refiner UNet": 2.260,
    "CLIP ViT-L text encoder": 0.123,
    "OpenCLIP bigG text encoder": 0.695,
    "VAE": 0.084,
}
HALF = 2  # bytes a weight, in bfloat16 or float16
# Estimated, not measured: the largest activations of a UNet call, a guided image being two rows; the VAE's decoding
# of one image in half precision; CUDA's context and libraries. GB.
A_ROW, DECODING, CONTEXT = 0.7, 3.0, 1.0

# Published, not measured here: one image of 30 steps at 1024 px on an H100. `scaling` computes with it.
PUBLISHED = {"published, H100, diffusers, 30 steps: s": 2.496, "published, H100, TensorRT, 30 steps: s": 1.471}

STEPS, HANDOVER, GUIDED_ROWS = 30, 0.8, 2  # service/promoted/sdxl: 24 steps of the base, 6 of the refiner
UTILISATION = 0.40  # of the dense peak, assumed for all; on a CPU, bench/README.md has 0.87 of a matrix product's rate
BUSY = 0.5  # of the paid time in which an image is being drawn
PRICES_OF = "November 2026"


@dataclass(frozen=True)
class Gpu:
    """`peak`: the maker's dense bfloat16 TFLOP/s; `memory`: GB; `price`: US dollars an hour, assumed."""

    name: str
    peak: float
    memory: int
    price: float


GPUS = (
    Gpu("L4", 121, 24, 0.70),
    Gpu("A10", 125, 24, 0.75),
    Gpu("L40S", 362, 48, 1.00),
    Gpu("A100", 312, 80, 1.50),
    Gpu("H100", 989, 80, 2.50),
)


def image_tflop() -> float:
    """UNet calls of both models and one decoding; the text encoders' share is below a hundredth."""
    base = round(STEPS * HANDOVER)
    return GUIDED_ROWS * (base * BASE_ROW + (STEPS - base) * REFINER_ROW) + DECODE


def weights_gb() -> float:
    return HALF * sum(PARAMETERS.values())


def seconds(gpu: Gpu) -> float:
    return image_tflop() / (gpu.peak * UTILISATION)


def rows_that_fit(gpu: Gpu) -> int:
    return int((gpu.memory - weights_gb() - DECODING - CONTEXT) / A_ROW)


def table() -> str:
    """The assumptions, the memory and the cost, for docs/deploy.md."""
    sizes = ", ".join(f"{name} {billions:.3f} B" for name, billions in PARAMETERS.items())
    lines = [
        f"- Weights: {sizes}; at {HALF} bytes each {weights_gb():.1f} GB.",
        f"- Estimated beside them: {A_ROW} GB a row, {DECODING:.0f} GB to decode, {CONTEXT:.0f} GB for CUDA.",
        f"- An image: 1024 x 1024, {STEPS} steps, hand-over at {HANDOVER}, guidance: {GUIDED_ROWS} rows a step of "
        f"{BASE_ROW} (base) or {REFINER_ROW} TFLOP (refiner), {DECODE} to decode: {image_tflop():.0f} TFLOP.",
        f"- Assumed: {UTILISATION:.0%} of the dense bfloat16 peak; prices an hour of {PRICES_OF}, which are examples "
        f"to be replaced; GPUs busy {BUSY:.0%} of the time that is paid.",
        "",
        "| GPU | peak TFLOP/s | memory GB | rows that fit | $ an hour | s an image | images a second "
        "| $ for 1000, busy always | $ for 1000, as assumed |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for gpu in GPUS:
        took = seconds(gpu)
        always = 1000 * took * gpu.price / 3600
        lines.append(
            f"| {gpu.name} | {gpu.peak:g} | {gpu.memory} | {rows_that_fit(gpu)} | {gpu.price:.2f} | {took:.1f} "
            f"| {1 / took:.2f} | {always:.2f} | {always / BUSY:.2f} |"
        )
    return "\n".join(lines)


def main(_: object = None) -> None:
    print(table())
