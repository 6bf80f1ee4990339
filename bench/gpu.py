"""SDXL on a GPU: seconds an image at 1024 px, and the share of the bound. Needs CUDA and the weights.

The bound: 6.76 TFLOP a UNet row at 1024x1024, two rows a guided step, and 10.47 TFLOP a VAE decode.
"""

from dataclasses import replace

import torch

from bench.cost import BASE_ROW, DECODE
from bench.engine import all_at_once, seconds
from bench.measure import Report
from bench.settings import PROMPTS, Size, config_of
from sdxl_lab.config import RuntimeProfile
from sdxl_lab.diffusion.engine import Engine
from sdxl_lab.job import ImageRequest

# Published, one image of 30 steps at 1024 px on an H100: diffusers in float16, and TensorRT.
PUBLISHED = {"published, H100, diffusers, 30 steps: s": 2.496, "published, H100, TensorRT, 30 steps: s": 1.471}


def main(size: Size) -> None:
    if not torch.cuda.is_available():
        print("\ngpu: not measured, since torch sees no CUDA device here")
        return
    lines: dict[str, list[float]] = {}
    size = replace(size, model="sdxl", side=1024)
    product = _product_rate()
    lines["float16 matrix product, TFLOP/s"] = [product]
    for compiled in (False, True):
        profile = RuntimeProfile(device="cuda", rows=16, channels_last=True, compile=compiled)
        config = config_of(size, watermark=False)
        with Engine.load(config, profile) as engine:
            for steps in (20, 30):
                for count in (1, 8):
                    requests = [ImageRequest(config.with_(steps=steps), PROMPTS[0], seed) for seed in range(count)]
                    took = [all_at_once(engine, requests) / count for _ in range(size.rounds + 1)][1:]
                    name = f"{'compiled, ' if compiled else ''}{steps} steps, {count} at once"
                    lines[f"{name}: s an image"] = took
                    lines[f"{name}: share of the bound"] = [(2 * BASE_ROW * steps + DECODE) / s / product for s in took]
    lines |= {name: [value] for name, value in PUBLISHED.items()}
    Report("gpu", f"SDXL at 1024 px on {torch.cuda.get_device_name()}", lines, "float16").show(size.folder)


def _product_rate(side: int = 8192) -> float:
    a, b = (torch.randn(side, side, dtype=torch.float16, device="cuda") for _ in range(2))

    def work() -> None:
        for _ in range(20):
            a @ b
        torch.cuda.synchronize()

    work()
    return 20 * 2 * side**3 / seconds(work) / 1e12
