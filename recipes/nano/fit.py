"""The training loop of every stage: AdamW, warm-up then cosine, averaged weights, checkpoints, a curve.

A stage passes a module and a function from a step number to a loss. It draws its batches from `generator(step)`, so a
resumed run sees the same batches as an uninterrupted one.
"""

import csv
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from sdxl_lab.diffusion.processor import CallThreads, multiplies

Loss = Callable[[int], torch.Tensor]
WARM_UP = 100  # steps
SAVE_EVERY = 100


def generator(step: int, seed: int = 0) -> torch.Generator:
    """A CPU generator for one step, the same whether or not the run was interrupted before it."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def autocast() -> torch.autocast:
    """bfloat16 where the processor multiplies it."""
    return torch.autocast("cpu", torch.bfloat16, enabled=multiplies(torch.bfloat16))


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up, then a cosine down to 2 % of the peak."""
    if step < WARM_UP:
        return peak * (step + 1) / WARM_UP
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - WARM_UP) / max(1, steps - WARM_UP))))


def fit(
    module: nn.Module,
    loss_at: Loss,
    *,
    steps: int,
    peak_lr: float,
    folder: Path,
    ema: float,
    weight_decay: float = 0.01,
) -> None:
    """Train `module` in place and leave the averaged weights in it.

    A step has as many threads as steps before it show to be fastest: a busy neighbour makes one the best count.
    `folder` holds `checkpoint.pt` (weights, averages, optimiser, step; replaced atomically, resumed from) and
    `curve.csv` (step, mean loss since the last row, learning rate, seconds). A finished stage returns at once.
    """
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint, curve = folder / "checkpoint.pt", folder / "curve.csv"
    module.train()
    optimiser = torch.optim.AdamW(
        module.parameters(), peak_lr, weight_decay=weight_decay, betas=(0.9, 0.99), fused=True
    )
    parameters = list(module.parameters())
    averages = [p.detach().clone() for p in parameters]
    start = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        module.load_state_dict(state["module"])
        optimiser.load_state_dict(state["optimiser"])
        averages, start = state["averages"], state["step"]
        print(f"{folder.name}: resumed at step {start} of {steps}", flush=True)

    running, since, began = 0.0, 0, time.monotonic()
    threads = CallThreads()
    for step in range(start, steps):
        rate = learning_rate(step, steps, peak_lr)
        for group in optimiser.param_groups:
            group["lr"] = rate
        with threads.call("step"):
            loss = loss_at(step)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            decay = min(ema, (1 + step) / (10 + step))
            torch._foreach_lerp_(averages, [p.detach() for p in parameters], 1 - decay)
        running, since = running + loss.item(), since + 1
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            state = {
                "module": module.state_dict(),
                "optimiser": optimiser.state_dict(),
                "averages": averages,
                "step": step + 1,
            }
            torch.save(state, checkpoint.with_suffix(".new"))
            checkpoint.with_suffix(".new").replace(checkpoint)
            seconds = (time.monotonic() - began) / since
            row = [step + 1, f"{running / since:.5f}", f"{rate:.2e}", f"{seconds:.3f}"]
            new = not curve.exists()
            with curve.open("a", newline="") as file:
                writer = csv.writer(file)
                if new:
                    writer.writerow(["step", "loss", "learning_rate", "seconds_a_step"])
                writer.writerow(row)
            print(f"{folder.name}: step {step + 1}/{steps} loss {row[1]} lr {row[2]} {row[3]} s/step", flush=True)
            running, since, began = 0.0, 0, time.monotonic()
    with torch.no_grad():
        for parameter, average in zip(parameters, averages, strict=True):
            parameter.copy_(average)
    module.eval()
