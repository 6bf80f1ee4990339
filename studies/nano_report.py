"""`python -m studies.nano_report`: the sweeps that confirm nano's study, as Markdown and as plots."""

import sys
from pathlib import Path

import pandas as pd
from PIL import Image

from sdxl_lab.evaluation.statistics import paired
from sdxl_lab.research.cache import ImageCache
from sdxl_lab.research.plots import image_grid, quality_against_cost
from sdxl_lab.research.sweep import OUT, read_table

METRICS = ("scene_right", "scene_parts", "clip_score")
SERVED = "nano_served"


def differences(table: pd.DataFrame) -> pd.DataFrame:
    """A row for each configuration: its cost, its means, and the paired difference from the served one with its 95 %
    interval over prompts."""
    pairs = ["prompt", "seed"]
    served = table[table["config"] == SERVED].set_index(pairs)
    rows = []
    for name, found in table.groupby("config", sort=False):
        found = found.set_index(pairs).loc[served.index]
        row = {"configuration": name, "UNet rows": f"{found['unet_rows'].mean():.0f}"}
        for metric in METRICS:
            row[metric] = f"{found[metric].mean():.3g}"
            if name != SERVED:
                by = list(served.index.get_level_values("prompt"))
                gain = paired(found[metric].to_numpy(), served[metric].to_numpy(), by=by)
                row[metric] += f" ({gain.mean:+.2f}, {gain.low:+.2f} to {gain.high:+.2f})"
        rows.append(row)
    return pd.DataFrame(rows)


def markdown(table: pd.DataFrame) -> str:
    lines = [table.columns, ["---"] * len(table.columns), *table.itertuples(index=False)]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def main() -> None:
    table = read_table(OUT / "nano_confirm")
    for found in (table, read_table(OUT / "nano_final")):
        print(f"{len(found) // found['config'].nunique()} pairs\n{markdown(differences(found))}\n")
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "docs")
    quality_against_cost(table, "config", "unet_rows", "scene_parts", "unet_rows").save(out / "nano-confirmed.png")
    shown = [SERVED, "nano_trial_16", "nano_trial_20"]
    some = table[table["prompt"].isin(table["prompt"].unique()[:4]) & table["config"].isin(shown)]
    with ImageCache() as cache:
        sheet = image_grid(some, cache.image, "prompt", "config", notes=["scene_parts"], side=128)
    sheet.save(out / "nano-images.png", optimize=True)
    adapted(read_table(OUT / "nano_lora")).save(out / "lora.png", optimize=True)


def adapted(table: pd.DataFrame) -> Image.Image:
    """Every weight of the LoRA on every prompt."""
    with ImageCache() as cache:
        return image_grid(table[table["seed"] == 0], cache.image, "loras.0.weight", "prompt", side=128)


if __name__ == "__main__":
    main()
