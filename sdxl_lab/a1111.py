"""What A1111's text in a PNG says, as settings of ours: prompt, negative prompt, and one line of names and values.

What has no setting here is handed back by name: a model is not known by its file's name, and of some samplers and
schedules there is none. Imports no torch; the text that this project writes is `images.py`'s.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from sdxl_lab.config import ConfigError
from sdxl_lab.schedules import OWN, SAMPLERS, SCHEDULE_TYPES

PAIR = re.compile(r'\s*(?P<name>[\w /-]+):\s*(?P<value>"(?:\\.|[^\\"])*"|[^,]*)(?:,|$)')
NEGATIVE = "Negative prompt:"
KARRAS = SCHEDULE_TYPES["karras"]
# A1111's own, which says so, or says nothing; and the noise of timesteps that are spaced evenly.
PLAIN = ("Automatic", "Uniform")


class Told(NamedTuple):
    """A text's prompt and seed, its `settings` as `GenerationConfig.changed` takes them, and what was `unread`."""

    prompt: str
    seed: int | None
    settings: Mapping[str, Any]
    unread: Mapping[str, str]


def read(text: str) -> Told:
    """What A1111's text says. Raises `ConfigError` where it is none, or names a sampler or a schedule that is not here:
    another one would draw another image."""
    *lines, last = text.strip().split("\n")
    pairs = {found["name"].strip(): found["value"].strip().strip('"') for found in PAIR.finditer(last)}
    if not {"Steps", "Sampler"} <= set(pairs):
        example = 'parameters = "a cat\\nSteps: 20, Sampler: Euler"'
        raise ConfigError("parameters", last, "A1111's text, which ends with steps and sampler", example)
    cut = next((index for index, line in enumerate(lines) if line.startswith(NEGATIVE)), len(lines))
    negative = "\n".join(lines[cut:]).removeprefix(NEGATIVE).strip()
    scheduler, schedule = _scheduler(pairs.pop("Sampler"), pairs.pop("Schedule type", None))
    settings: dict[str, Any] = {"scheduler": scheduler, "sigma_schedule": schedule, "prompt_syntax": "a1111"}
    if negative:
        settings["negative_prompt"] = negative
    for name, take in TAKEN.items():
        if name in pairs and (found := take(pairs[name])) is not None:
            settings |= found
            del pairs[name]
    settings |= _hires(pairs)
    seed = pairs.pop("Seed", None)
    return Told("\n".join(lines[:cut]).strip(), None if seed is None else int(seed), settings, pairs)


def _scheduler(sampler: str, schedule_type: str | None) -> tuple[str, str]:
    """The scheduler and the sigma schedule; until version 1.9 A1111 had both in the sampler's name."""
    name, by_name, _ = sampler.partition(f" {KARRAS}")
    names = {theirs: ours for ours, theirs in SAMPLERS.items()}
    if name not in names:
        rule = f"a sampler that is here, too: {', '.join(names)}"
        raise ConfigError("Sampler", sampler, rule, "Sampler = Euler")
    asked = KARRAS if by_name else schedule_type or PLAIN[0]
    types = {theirs: ours for ours, theirs in SCHEDULE_TYPES.items()} | dict.fromkeys(PLAIN, OWN)
    if asked not in types:
        rule = f"a schedule that is here, too: {', '.join(types)}"
        raise ConfigError("Schedule type", asked, rule, f"Schedule type = {KARRAS}")
    return names[name], types[asked]


def _size(text: str) -> dict[str, Any] | None:
    found = re.fullmatch(r"(\d+)x(\d+)", text)
    return {"width": int(found[1]), "height": int(found[2])} if found else None


def _clip_skip(text: str) -> dict[str, Any] | None:
    """A1111 counts from the last layer, which is its 1; SDXL's is the penultimate, and what none is skipped before."""
    return {"clip_skip": int(text) - 2} if text.isdecimal() and int(text) >= 2 else None


def _hires(pairs: dict[str, str]) -> dict[str, Any]:
    """The second pass, where its upscaler is here, too; its names are taken out of the pairs. A1111 counts the steps
    that it makes, ours are those of the whole schedule, of which the strength is made."""
    upscaler = UPSCALERS.get(pairs.get("Hires upscaler", ""))
    if upscaler is None or not {"Hires upscale", "Denoising strength"} <= set(pairs):
        return {}
    strength = float(pairs.pop("Denoising strength"))
    found = {"hires.scale": float(pairs.pop("Hires upscale")), "hires.strength": strength, "hires.upscaler": upscaler}
    del pairs["Hires upscaler"]
    if made := int(pairs.pop("Hires steps", 0)):
        found["hires.steps"] = math.ceil(round(made / strength, 6))
    return found


UPSCALERS = {"Latent": "latent", "Lanczos": "lanczos"}
TAKEN: Mapping[str, Callable[[str], dict[str, Any] | None]] = {
    "Steps": lambda text: {"steps": int(text)},
    "CFG scale": lambda text: {"guidance_scale": float(text)},
    "Size": _size,
    "Clip skip": _clip_skip,
}
