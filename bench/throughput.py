"""Pictures a second at saturation, 16 in flight: the engine and the service against what people use instead."""

import itertools
import os
import time
from contextlib import ExitStack

from bench.baselines import Asked, Pipeline
from bench.clients import Body, rate, server
from bench.measure import Report, Trial, alternate, ratios
from bench.rooms import room
from bench.settings import PROMPTS, Size
from sdxl_lab.config import SCHEDULERS, GenerationConfig, RuntimeProfile
from sdxl_lab.engine import Engine
from sdxl_lab.trajectory import Job

# Taken from all that the static servers can do, too: no second-order ones, whose steps cost two calls.
MIXED = [name for name in SCHEDULERS if name not in ("heun", "kdpm2", "kdpm2_a", "dpmpp_sde", "lcm", "tcd", "pndm")]


def bodies(size: Size, *, mixed: bool) -> list[Body]:
    """One request a client; mixed, each has steps, guidance and a scheduler of its own."""
    spread = itertools.cycle(range(-size.steps // 4, size.steps // 4 + 1, max(1, size.steps // 8)))
    return [
        {
            "prompt": PROMPTS[index % len(PROMPTS)],
            "seed": index,
            "steps": max(1, size.steps + next(spread)) if mixed else size.steps,
            "guidance_scale": 3.0 + (index % 5 if mixed else 0),
            "scheduler": MIXED[index % len(MIXED)] if mixed else "euler",
            "width": size.side,
            "height": size.side,
        }
        for index in range(size.pictures)
    ]


def jobs(config: GenerationConfig, asked: list[Body]) -> list[Job]:
    names = ("steps", "guidance_scale", "scheduler", "width", "height")
    return [Job(config.with_(**{n: body[n] for n in names}), body["prompt"], body["seed"]) for body in asked]


def engine_rate(engine: Engine, asked: list[Job]) -> float:
    began = time.monotonic()
    for ticket in [engine.submit(job) for job in asked]:
        ticket.result()
    return len(asked) / (time.monotonic() - began)


def loop_rate(pipeline: Pipeline, asked: list[Body]) -> float:
    began = time.monotonic()
    for body in asked:
        pipeline.draw([Asked(**body)])
    return len(asked) / (time.monotonic() - began)


def measure(size: Size) -> dict[bool, dict[str, list[float]]]:
    """Pictures a second of each, a value a round: with equal settings, and mixed. Whatever draws is loaded once."""
    config = GenerationConfig.for_model(size.model, limits=size.limits, width=size.side, height=size.side)
    with ExitStack() as stack:
        pipeline = stack.enter_context(room(Pipeline, size.model))
        engines = {
            dtype: stack.enter_context(room(Engine.load, config, RuntimeProfile(device="cpu", dtype=dtype, rows=32)))
            for dtype in ("float32", "bfloat16")
        }
        ports = {kind: stack.enter_context(server(kind, config)) for kind in ("locked", "litserve")}
        ports["service"] = stack.enter_context(server("service", config, SDXL_MAX_ROWS="32"))

        def trials(asked: list[Body]) -> dict[str, Trial]:
            return {
                "(a) pipeline, one at a time": lambda: pipeline(loop_rate, asked),
                "(b) FastAPI, pipeline behind a lock": lambda: rate(ports["locked"], asked),
                "(d) LitServe, dynamic batching": lambda: rate(ports["litserve"], asked),
                "engine, float32": lambda: engines["float32"](engine_rate, jobs(config, asked)),
                "engine, bfloat16 UNet": lambda: engines["bfloat16"](engine_rate, jobs(config, asked)),
                "service, float32": lambda: rate(ports["service"], asked),
            }

        return {mixed: alternate(trials(bodies(size, mixed=mixed)), size.rounds) for mixed in (False, True)}


def main(size: Size) -> None:
    for mixed, rates in measure(size).items():
        a, b, d = (next(v for k, v in rates.items() if k.startswith(f"({letter})")) for letter in "abd")
        ours, low, served = rates["engine, float32"], rates["engine, bfloat16 UNet"], rates["service, float32"]
        lines = {
            **rates,
            "engine / (a)": ratios(ours, a),
            "engine, bfloat16 / (a)": ratios(low, a),
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
            title=f"Pictures a second at saturation, {what}",
            lines=lines,
            conditions=f"{size.pictures} in flight, {size.steps} steps, {size.side} px, {os.cpu_count()} cores",
            aims=aims,
        ).show(size.folder)
