"""LoRAs: what a batch of images with different ones costs over one without, and over switching between them.

Peers switch: the pipeline gets the LoRAs of one image, draws it, and gets those of the next. Here they share calls. The
second table is about a single layer: three ways to mix LoRAs in one call, of which the engine has the first.
"""

import copy
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

from bench.baselines import Pipeline
from bench.engine import all_at_once, pipeline_request, seconds
from bench.isolated import isolated
from bench.measure import Report, alternate, ratios
from bench.settings import FLOAT32, PROMPTS, Size, config_of
from sdxl_lab.config import LoraRef
from sdxl_lab.diffusion.adapters import Adapter, Layer, Run, changed, stacked
from sdxl_lab.diffusion.engine import Engine
from sdxl_lab.diffusion.lora_files import local_file
from sdxl_lab.job import ImageRequest

SHAPES = {"nano's largest layer": (128, 128, 1024, 8), "one of SDXL's": (1280, 1280, 256, 16)}  # in, out, tokens, rank
ROWS = 8  # two without, two with A at 0.5, two with A, two with A and B
MIX = ((), ("A:0.5",), ("A:1",), ("A:1", "B:1"))


def main(size: Size) -> None:
    """Whole images, then single layers."""
    images(size)
    layers(size)


# --- images ----------------------------------------------------------------------------------------------------------


def images(size: Size) -> None:
    """Seconds of the same images without LoRAs, with one, with four mixes in one batch, mix by mix, and in diffusers'
    pipeline, which switches."""
    with tempfile.TemporaryDirectory() as folder:
        files = _two(Path(folder))
        mixes = [tuple(f"{files[word[0]]}{word[1:]}" for word in words) for words in MIX]

        def requests(*chosen: tuple[str, ...]) -> list[ImageRequest]:
            return [
                ImageRequest(config_of(size, loras=chosen[seed % len(chosen)]), PROMPTS[seed % 4], seed)
                for seed in range(size.images)
            ]

        apart = [[each for each in requests(*mixes) if each.config.loras == _refs(mix)] for mix in mixes]
        with isolated(Engine.load, config_of(size), FLOAT32) as engine, isolated(Switching, size.model) as pipeline:
            measured = alternate(
                {
                    "without": lambda: engine(all_at_once, requests(())),
                    "one LoRA in all": lambda: engine(all_at_once, requests(mixes[2])),
                    "four mixes in one batch": lambda: engine(all_at_once, requests(*mixes)),
                    "four mixes, one after the other": lambda: sum(engine(all_at_once, each) for each in apart),
                    "pipeline, switching for each image": lambda: pipeline(_switched, requests(*mixes)),
                },
                size.rounds,
            )
    mixed = measured["four mixes in one batch"]
    lines = measured | {
        "four mixes in one batch / without": ratios(mixed, measured["without"]),
        "one LoRA in all / without": ratios(measured["one LoRA in all"], measured["without"]),
        "one after the other / one batch": ratios(measured["four mixes, one after the other"], mixed),
        "pipeline, switching / one batch": ratios(measured["pipeline, switching for each image"], mixed),
    }
    conditions = f"{size.images} images, {size.steps} steps, {size.side} px, float32, rank 4, UNet alone"
    Report("lora", "Seconds of a batch with LoRAs", lines, conditions).show(size.folder)


def _refs(words: tuple[str, ...]) -> tuple[LoraRef, ...]:
    return tuple(LoraRef.named(word) for word in words)


def _two(folder: Path) -> dict[str, Path]:
    """nano's neon, and another of its shape."""
    neon = local_file(LoraRef.named("nano/neon"))
    assert neon is not None
    files = {name: folder / f"{name}.safetensors" for name in "AB"}
    for name, scale in (("A", 1.0), ("B", -0.3)):
        tensors = load_file(neon)
        save_file({key: scale * each if "lora_up" in key else each for key, each in tensors.items()}, files[name])
    return files


class Switching(Pipeline):
    """diffusers' pipeline, which has loaded every LoRA that it was asked for."""

    def __init__(self, model: str) -> None:
        super().__init__(model)
        self.names: dict[str, str] = {}

    def switch(self, loras: tuple[LoraRef, ...]) -> None:
        for ref in loras:
            if ref.source not in self.names:
                self.names[ref.source] = f"number_{len(self.names)}"
                self.pipe.load_lora_weights(ref.source, adapter_name=self.names[ref.source])
        if loras:
            self.pipe.enable_lora()
            self.pipe.set_adapters([self.names[ref.source] for ref in loras], [ref.weight for ref in loras])
        elif self.names:
            self.pipe.disable_lora()


def _switched(pipeline: Switching, requests: list[ImageRequest]) -> float:
    def draw() -> None:
        for request in requests:
            pipeline.switch(request.config.loras)
            pipeline.draw([pipeline_request(request)])

    return seconds(draw)


# --- a layer ---------------------------------------------------------------------------------------------------------


def layers(size: Size) -> None:
    """Milliseconds of one layer's call of eight rows: plain, and with the mixes in each of three ways."""
    lines: dict[str, list[float]] = {}
    for name, (inner, outer, tokens, rank) in SHAPES.items():
        torch.manual_seed(0)
        x = torch.randn(ROWS, tokens, inner)
        ways = _ways(inner, outer, rank)
        plain = nn.Linear(inner, outer)
        calls: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"plain": plain, **ways}
        with torch.inference_mode():
            times = alternate({way: partial(_milliseconds, call, x) for way, call in calls.items()}, size.rounds)
        lines |= {f"{name}: {way} / plain": ratios(times[way], times["plain"]) for way in ways}
        lines[f"{name}: plain, ms"] = times["plain"]
    conditions = f"{ROWS} rows of four mixes of two LoRAs; {torch.get_num_threads()} threads, float32"
    Report("lora-layer", "A layer with LoRAs over one without", lines, conditions).show(size.folder)


def _milliseconds(call: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, times: int = 20) -> float:
    return 1000 * seconds(lambda: [call(x) for _ in range(times)]) / times


def _ways(inner: int, outer: int, rank: int) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """The same layer and LoRAs: what each way is called, and what computes the eight rows."""
    base = nn.Linear(inner, outer)
    pair = [Layer(torch.randn(rank, inner), torch.randn(outer, rank) / inner, (rank,)) for _ in range(2)]
    first, second = (Adapter({"unet": {"layer": each}}) for each in pair)
    both = stacked([first, second])
    ours = nn.ModuleDict({"layer": copy.deepcopy(base)})
    runs = [
        Run(2, 6, ("A",), first, [(0.5,)] * 2 + [(1.0,)] * 2),
        Run(6, 8, ("A", "B"), both, [(1.0, 1.0)] * 2),
    ]

    def side_by_side(x: torch.Tensor) -> torch.Tensor:
        with changed(ours, "unet", runs):
            return ours["layer"](x)

    down, up = torch.stack([each.down for each in pair]), torch.stack([each.up for each in pair])
    weights = torch.tensor([[0, 0], [0, 0], [0.5, 0], [0.5, 0], [1, 0], [1, 0], [1, 1], [1, 1]])
    indices = torch.tensor([[0, 1]] * ROWS)

    def gathered(x: torch.Tensor) -> torch.Tensor:
        a = down[indices].flatten(1, 2)  # (rows, 2 rank, in)
        b = (up[indices] * weights[:, :, None, None]).transpose(1, 2).flatten(2)  # (rows, out, 2 rank)
        return torch.baddbmm(functional.linear(x, base.weight, base.bias), torch.bmm(x, a.transpose(1, 2)), b.mT)

    model = nn.ModuleDict({"layer": copy.deepcopy(base)})
    mixes = {"a_half": (pair[0], 0.5), "a": (pair[0], 1.0), "a_b": (both.parts["unet"]["layer"], 1.0)}
    for name, (layer, weight) in mixes.items():
        width = len(layer.down)
        with warnings.catch_warnings(action="ignore"):  # PEFT warns of a second one
            inject_adapter_in_model(LoraConfig(r=width, lora_alpha=width, target_modules=["layer"]), model, name)
        adapted: Any = model["layer"]
        adapted.lora_A[name].weight = nn.Parameter(layer.down)
        adapted.lora_B[name].weight = nn.Parameter(weight * layer.up)
    names = [name for name in ("__base__", "a_half", "a", "a_b") for _ in range(2)]
    adapted = model.eval()["layer"]

    def pefts(x: torch.Tensor) -> torch.Tensor:
        return adapted(x, adapter_names=names)

    return {"side by side (the engine's)": side_by_side, "gathered row by row": gathered, "PEFT's adapter_names": pefts}
