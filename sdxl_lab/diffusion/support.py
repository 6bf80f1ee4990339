"""What the engine draws, told from a model's configurations. Any other family is refused by name, never drawn wrong.

Imports no torch.
"""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from sdxl_lab.diffusion.checkpoint import CHANNELS
from sdxl_lab.diffusion.inventory import ModelError

# Those whose configuration is a schedule of betas over discrete timesteps: any of the engine's own takes it over.
SCHEDULERS = (
    "DDIMParallelScheduler",
    "DDIMScheduler",
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSDEScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "SASolverScheduler",
    "TCDScheduler",
    "UniPCMultistepScheduler",
)
# What each part's configuration may say, where it says anything.
DRAWN: Mapping[str, Mapping[str, Collection[Any]]] = {
    "scheduler": {
        "_class_name": SCHEDULERS,
        "prediction_type": ("epsilon", "v_prediction"),
        "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
        "timestep_type": ("discrete",),
        "use_flow_sigmas": (False,),
        "num_train_timesteps": (1000,),
    },
    "unet": {
        "_class_name": ("UNet2DConditionModel",),
        "in_channels": (4, 9),  # 9 for a base that inpaints
        "out_channels": (4,),
        "addition_embed_type": ("text_time",),
        "class_embed_type": (None,),
        "encoder_hid_dim_type": (None,),
    },
    "vae": {"_class_name": ("AutoencoderKL",), "in_channels": (3,), "latent_channels": (4,)},
    "text_encoder": {"architectures": (["CLIPTextModel"], ["CLIPTextModelWithProjection"])},
    "text_encoder_2": {"architectures": (["CLIPTextModelWithProjection"],)},
}
FILES = {"scheduler": "scheduler_config.json"}
# What a word that is not drawn stands for, by a piece of it.
MEANS = {
    "EDM": "an EDM model, as Playground 2.5 is one",
    "FlowMatch": "a flow-matching model",
    "flow_prediction": "a flow-matching model",
    "continuous": "an EDM model, as CosXL is one",
    "Tiny": "a decoder for previews",
}


def check_folder_is_drawn(folder: Path, role: str, parts: Collection[str]) -> None:
    """`ModelError` for the first of a folder's parts that the engine does not draw. What cannot be read is not judged
    here: loading it says why."""
    for part in parts:
        path = folder / part / FILES.get(part, "config.json")
        if part in DRAWN and path.is_file():
            check_is_drawn(json.loads(path.read_text()), part, role, str(folder))


def check_is_drawn(config: Mapping[str, Any], part: str, role: str, name: str) -> None:
    """`ModelError` for a part's configuration with a value that the engine does not draw."""
    for key, drawn in DRAWN[part].items():
        if (part, key, role) == ("unet", "in_channels", "refiner"):
            drawn = (4,)
        if key in config and config[key] not in drawn:
            value = config[key]
            means: Mapping[Any, str | None] = {value: CHANNELS.get(value)} if key == "in_channels" else MEANS
            meaning = next(
                (f": {family}" for piece, family in means.items() if family and str(piece) in str(value)), ""
            )
            raise ModelError(
                f"the {role} model must be one that the engine draws, whose {part} has {key} "
                f"{' or '.join(map(str, drawn))}; received {name!r} with {value}{meaning}. Example: nano"
            )
