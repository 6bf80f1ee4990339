"""Images a second at saturation, 16 in flight: the engine and the service against the baselines."""

import itertools
import os
from collections.abc import Sequence
from contextlib import ExitStack

from bench.baselines import Pipeline, PipelineRequest
from bench.clients import rate
from bench.engine import DTYPES, all_at_once, one_by_one
from bench.isolated import isolated
from bench.measure import Measurement, Report, alternate, ratios
from bench.servers import server
from bench.settings import FLOAT32, Body, Size, body, config_of
from sdxl_lab.config import SCHEDULERS, GenerationConfig
from sdxl_lab.diffusion.engine import Engine
from sdxl_lab.job import ImageRequest

# Schedulers that the static servers can use, too; without second-order ones, whose steps cost two calls.
MIXED = [name for name in SCHEDULERS if name not in ("heun", "kdpm2", "kdpm2_a", "dpmpp_sde", "lcm", "tcd", "pndm")]


def bodies(size: Size, *, mixed: bool) -> Sequence[Body]:
    """One request for each client. With `mixed` each has steps, guidance and a scheduler of its own."""
    spread = itertools.cycle(range(-size.steps // 4, size.steps // 4 + 1, max(1, size.steps // 8)))
    batch = [body(size, size.steps, index) | {"scheduler": "euler"} for index in range(size.images)]
    if mixed:
        for index, each in enumerate(batch):
            each["steps"] = max(1, size.steps + next(spread))
            each["guidance_scale"] = 3.0 + index % 5
            each["scheduler"] = MIXED[index % len(MIXED)]
    return batch


def requests(config: GenerationConfig, batch: Sequence[Body]) -> list[ImageRequest]:
    names = ("steps", "guidance_scale", "scheduler", "width", "height")
    return [ImageRequest(config.with_(**{n: each[n] for n in names}), each["prompt"], each["seed"]) for each in batch]


def measure(size: Size) -> dict[bool, dict[str, list[float]]]:
    """Images a second of each, one value a round, with equal and with mixed settings. Models are loaded once."""
    config = config_of(size)
    with ExitStack() as stack:
        pipeline = stack.enter_context(isolated(Pipeline, size.model))
        engines = {
            dtype: stack.enter_context(isolated(Engine.load, config, FLOAT32.with_(dtype=dtype))) for dtype in DTYPES
        }
        ports = {kind: stack.enter_context(server(kind, config)) for kind in ("locked", "litserve")}
        ports["service"] = stack.enter_context(server("service", config))

        def measurements(batch: Sequence[Body]) -> dict[str, Measurement]:
            count, drawn = len(batch), requests(config, batch)
            alone = [PipelineRequest(**each) for each in batch]
            return {
                "(a) pipeline, one at a time": lambda: count / pipeline(one_by_one, alone),
                "(b) FastAPI, pipeline behind a lock": lambda: rate([ports["locked"]], batch),
                "(d) LitServe, dynamic batching": lambda: rate([ports["litserve"]], batch),
                "engine, float32": lambda: count / engines["float32"](all_at_once, drawn),
                "service, float32": lambda: rate([ports["service"]], batch),
            } | {
                f"engine, {dtype} UNet": lambda dtype=dtype: count / engines[dtype](all_at_once, drawn)
                for dtype in DTYPES[1:]
            }

        return {mixed: alternate(measurements(bodies(size, mixed=mixed)), size.rounds) for mixed in (False, True)}


def main(size: Size) -> None:
    for mixed, rates in measure(size).items():
        a, b, d = (next(v for k, v in rates.items() if k.startswith(f"({letter})")) for letter in "abd")
        ours, served = rates["engine, float32"], rates["service, float32"]
        low = rates.get("engine, bfloat16 UNet")
        lines = {
            **rates,
            "engine / (a)": ratios(ours, a),
            **({} if low is None else {"engine, bfloat16 / (a)": ratios(low, a)}),
            "service / (b)": ratios(served, b),
            "service / (d)": ratios(served, d),
        }
        aims = (
            {"service / (d)": "1.8"}
            if mixed
            else {
                "engine / (a)": "1.3",
                "engine, bfloat16 / (a)": "1.7",
                "service / (b)": "2.5",
                "service / (d)": "1.25",
            }
        )
        what = "steps, guidance and scheduler of each client's own" if mixed else "equal settings"
        Report(
            name="throughput-mixed" if mixed else "throughput",
            title=f"Images a second at saturation, {what}",
            lines=lines,
            conditions=f"{size.images} in flight, {size.steps} steps, {size.side} px, {os.cpu_count()} cores",
            aims=aims,
        ).show(size.folder)
