"""What a UNet call on a CPU consists of, and what each way to make it cheaper gains.

CPU time of one thread: on a machine that does other things, too, wall time would measure those. All trials are in one
process and take turns; allocations are tried in two engines.
"""

import copy
import os
import resource
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from bench.engine import draw_all
from bench.isolated import isolated
from bench.measure import Measurement, Report, alternate, ratios
from bench.random_sdxl import new_unet
from bench.settings import FLOAT32, PROMPTS, Size, config_of
from sdxl_lab.config import GenerationConfig
from sdxl_lab.diffusion.engine import Engine
from sdxl_lab.diffusion.inventory import folder_of
from sdxl_lab.diffusion.lean import lighten
from sdxl_lab.diffusion.processor import capability
from sdxl_lab.environment import KEEPING, processor
from sdxl_lab.job import ImageRequest

ROWS = (2, 8, 16)
TOKENS = 77
DIFFUSERS, LEAN, LAST = "diffusers' own", "lean", "lean, channels last"
Inputs = dict[str, Any]


def inputs(unet: UNet2DConditionModel, rows: int, side: int, device: str = "cpu") -> Inputs:
    """Rows of a call for an image of `side` pixels."""
    width = unet.config.cross_attention_dim
    ids = 6
    pooled = unet.config.projection_class_embeddings_input_dim - ids * unet.config.addition_time_embed_dim
    return {
        "sample": torch.randn(rows, 4, side // 8, side // 8, device=device),
        "timestep": torch.linspace(900, 10, rows, device=device),
        "encoder_hidden_states": torch.randn(rows, TOKENS, width, device=device),
        "added_cond_kwargs": {
            "text_embeds": torch.randn(rows, pooled, device=device),
            "time_ids": torch.full((rows, ids), float(side), device=device),
        },
        "return_dict": False,
    }


# --- the trials ------------------------------------------------------------------------------------------------------


class Kept(nn.Module):
    """A projection of the text that is computed once. Beside it, another number of rows is another text."""

    def __init__(self, projection: nn.Module) -> None:
        super().__init__()
        self.projection = projection
        self.kept: dict[int, torch.Tensor] = {}

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        if len(hidden) not in self.kept:
            self.kept[len(hidden)] = self.projection(hidden)
        return self.kept[len(hidden)]


class Packed(nn.Module):
    """A linear layer with its weights in oneDNN's own layout."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weights, self.bias = torch.ops.mkldnn._reorder_linear_weight(layer.weight), layer.bias

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(hidden, self.weights, self.bias, "none", [], "")


def replaced(unet: UNet2DConditionModel, chosen: Callable[[str], bool], make: Callable[[Any], nn.Module]) -> None:
    for name, module in list(unet.named_modules()):
        if type(module) is nn.Linear and chosen(name):
            parent, _, own = name.rpartition(".")
            setattr(unet.get_submodule(parent), own, make(module))


def of_the_text(name: str) -> bool:
    return name.endswith(("attn2.to_k", "attn2.to_v"))


def made(unet: UNet2DConditionModel, trial: str) -> UNet2DConditionModel:
    unet = copy.deepcopy(unet)
    if "channels last" in trial:
        unet.to(memory_format=torch.channels_last)
    if "fused" in trial:
        unet.fuse_qkv_projections()
    if "lean" in trial:
        lighten(unet)
    if "packed" in trial:
        replaced(unet, lambda name: "ff.net.0" not in name, Packed)
    if "keys and values" in trial:
        replaced(unet, of_the_text, Kept)
    return unet


TRIALS = (
    "channels last",
    LEAN,
    f"{LEAN}, inference mode",
    LAST,
    f"{LAST}, inference mode",
    f"{LAST}, fused projections",
    f"{LAST}, linear weights packed",
    f"{LAST}, text's keys and values kept",
    f"{LAST}, denormals flushed",
    f"{LAST}, attention as plain products",
)


class Subject:
    """One UNet in all its forms, called in a thread of its own as by the engine, with one thread of torch's."""

    def __init__(self, folder: str, side: int) -> None:
        self.side = side
        self._thread = ThreadPoolExecutor(1)
        self._thread.submit(self._load, folder).result()

    def _load(self, folder: str) -> None:
        torch.set_num_threads(1)
        variant = {"variant": "fp16", "dtype": torch.float32}
        plain = UNet2DConditionModel.from_pretrained(folder, **variant).eval().requires_grad_(False)
        self.unets = {trial: made(plain, trial) for trial in (DIFFUSERS, *TRIALS)}
        self.inputs = {rows: inputs(plain, rows, self.side) for rows in ROWS}

    def call(self, trial: str, rows: int) -> float:
        """Milliseconds of CPU time."""
        return self._thread.submit(self._call, trial, rows).result()

    def _call(self, trial: str, rows: int) -> float:
        given = self.inputs[rows]
        torch.set_flush_denormal("denormals" in trial)
        kinds = [SDPBackend.MATH] if "attention" in trial else [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
        with torch.inference_mode("inference" in trial), torch.no_grad(), sdpa_kernel(kinds):
            began = time.process_time()
            self.unets[trial](**given)
            return 1000 * (time.process_time() - began)

    def shares(self, rows: int, calls: int) -> dict[str, dict[str, float]]:
        """Milliseconds by kind of operation, of diffusers' own call and the lean one. Of each operation of a call it is
        the least time over `calls` calls in turns, so that what the machine did meanwhile does not count."""
        return self._thread.submit(self._shares, rows, calls).result()

    def _shares(self, rows: int, calls: int) -> dict[str, dict[str, float]]:
        seen: dict[str, list[list[tuple[str, float]]]] = {trial: [] for trial in (DIFFUSERS, LEAN, LAST)}
        with torch.no_grad():
            for _ in range(calls + 1):
                for trial, calls_seen in seen.items():
                    with profile(activities=[ProfilerActivity.CPU]) as profiler:
                        self.unets[trial](**self.inputs[rows])
                    calls_seen.append([(event.name, event.self_cpu_time_total) for event in profiler.events()])
        found: dict[str, dict[str, float]] = {}
        for trial, calls_seen in seen.items():
            spent = dict.fromkeys((*KINDS, REST), 0.0)
            for events in zip(*calls_seen[1:], strict=True):
                spent[kind(events[0][0])] += min(took for _, took in events) / 1000
            found[trial] = spent
        return found


KINDS = {
    "convolutions": ("mkldnn_convolution", "_slow_conv2d_forward", "thnn_conv2d"),
    "matrix products": ("addmm", "mm", "bmm"),
    "attention": ("_scaled_dot_product_flash_attention_for_cpu",),
    "norms": ("native_group_norm", "native_layer_norm"),
    "SiLU and GELU": ("silu", "silu_", "gelu"),
    "sums and products": ("add", "add_", "mul", "mul_", "div"),
    "copies": ("copy_", "cat", "upsample_nearest2d"),
}
REST, WHOLE = "dispatch and the rest", "the whole call"


def kind(operation: str) -> str:
    name = operation.removeprefix("aten::")
    return next((each for each, names in KINDS.items() if name in names), REST)


# --- allocations -----------------------------------------------------------------------------------------------------


def engine_of(config: GenerationConfig, keep: bool) -> Engine:
    """An engine that keeps what its calls free, or leaves that to malloc."""
    if not keep:
        os.environ[KEEPING[0]] = ""  # which says that somebody has chosen
    return Engine.load(config, FLOAT32.with_(threads=1))


def drawn(engine: Engine, config: GenerationConfig, count: int) -> tuple[float, float, float]:
    """CPU milliseconds, system milliseconds and page faults for each row of `count` guided images drawn at once, with
    what goes with the rows. The batcher chooses the calls."""
    requests = [ImageRequest(config, PROMPTS[seed % 4], seed) for seed in range(count)]
    before, rows = resource.getrusage(resource.RUSAGE_SELF), engine.stats().rows_in_calls
    draw_all(engine, requests)
    after, rows = resource.getrusage(resource.RUSAGE_SELF), engine.stats().rows_in_calls - rows
    system, user = after.ru_stime - before.ru_stime, after.ru_utime - before.ru_utime
    return 1000 * (user + system) / rows, 1000 * system / rows, (after.ru_minflt - before.ru_minflt) / rows


# --- what is counted -------------------------------------------------------------------------------------------------


def text_share(unet: UNet2DConditionModel, side: int) -> tuple[float, float]:
    """The share of the text's keys and values in a row's FLOPs, and the MB that one prompt's take in half precision.
    `unet` may be on the device `meta`."""
    device = str(next(unet.parameters()).device)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        unet(**inputs(unet, 1, side, device))
    widths = [(m.in_features, m.out_features) for name, m in unet.named_modules() if of_the_text(name)]
    products = sum(2 * TOKENS * into * out for into, out in widths)
    return products / counter.get_total_flops(), sum(2 * TOKENS * out for _, out in widths) / 1e6


def trials(size: Size, folder: str) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """The trials' lines, and those of the profile."""
    lines: dict[str, list[float]] = {}
    shares: dict[str, list[float]] = {}
    with isolated(Subject, folder, size.side) as subject:
        for rows in ROWS:
            turns: dict[str, Measurement] = {
                trial: partial(subject, Subject.call, trial, rows) for trial in (DIFFUSERS, *TRIALS)
            }
            measured = alternate(turns, 2 * size.rounds)
            lines[f"{rows} rows, {DIFFUSERS}: ms a row"] = [value / rows for value in measured[DIFFUSERS]]
            for trial in TRIALS:
                lines[f"{rows} rows: {trial}"] = ratios(measured[trial], measured[DIFFUSERS])
        for rows in ROWS:
            for trial, spent in subject(Subject.shares, rows, 4 * size.rounds).items():
                whole = spent | {WHOLE: sum(spent.values())}
                shares |= {f"{rows} rows, {trial}: {each}": [took / rows] for each, took in whole.items()}
    return lines, shares


def allocations(size: Size) -> dict[str, list[float]]:
    config = config_of(size, steps=size.steps // 2)
    lines: dict[str, list[float]] = {}
    with isolated(engine_of, config, True) as kept, isolated(engine_of, config, False) as left:
        for count in (1, 4, 8):
            found: dict[str, list[tuple[float, float, float]]] = {"left alone": [], "kept": []}
            for _ in range(size.rounds + 2):
                for name, run in (("left alone", left), ("kept", kept)):
                    found[name].append(run(drawn, config, count))
            for name, each in found.items():
                for what, values in zip(
                    ("CPU ms", "system ms", "page faults"), zip(*each[1:], strict=True), strict=True
                ):
                    lines[f"{count} images, allocations {name}: {what} a row"] = list(values)
    return lines


def main(size: Size) -> None:
    found = folder_of(size.model, "base")
    if found is None:
        raise SystemExit(f"the model must be nano or a folder; received {size.model!r}. Example: nano")
    folder = str(found / "unet")
    lines, shares = trials(size, folder)
    lines |= allocations(size)
    with torch.device("meta"):
        true = new_unet()
    own = UNet2DConditionModel.from_pretrained(folder, variant="fp16", dtype=torch.float32)
    for name, unet, side in ((size.model, own, size.side), ("SDXL", true, 1024)):
        share, megabytes = text_share(unet, side)
        lines[f"text's keys and values, {name} at {side} px: % of the FLOPs"] = [100 * share]
        lines[f"text's keys and values, {name}: MB a prompt"] = [megabytes]
    conditions = f"{size.side} px, float32, one thread, {capability()}, {processor()}"
    title = "CPU time of a UNet call over diffusers' own"
    Report("call", title, lines, conditions).show(size.folder)
    Report("call-profile", "What a UNet call consists of, ms a row", shares, conditions).show(size.folder)
