"""What a model is: the files that decide its images, and their checksums.

A model under the same name may change: its weights, the configuration of any part, its scheduler's, its tokenizers.
`identity` changes with each of them, and with no other file. Imports no torch.
"""

import hashlib
import json
import re
import shlex
from collections.abc import Collection
from pathlib import Path
from typing import Any

from sdxl_lab.checksums import sha256_of
from sdxl_lab.config import PINS, ModelRef, is_file

NANO = Path(__file__).parents[1] / "nano"
SDXL = Path(__file__).parents[1] / "sdxl"  # SDXL's configurations, for files that come without
# A refiner has these of its base.
SHARED = ("text_encoder_2", "tokenizer_2", "vae")
# Weights; configurations, tokenizers and lists of shards; and what tokenizers keep in other files.
SUFFIXES = (".safetensors", ".json", ".model")
NAMES = ("merges.txt", "vocab.txt")
PICKLES = (".bin", ".ckpt", ".pkl", ".pt", ".pth")
# `model.safetensors`, its variants and shards, as diffusers and transformers name them, the older way included.
SHARD = r"(-\d{5}-of-\d{5})?"
WEIGHTS = re.compile(rf"(diffusion_pytorch_model|model){SHARD}(\.(?P<variant>\w+))?{SHARD}\.safetensors")


class ModelError(ValueError):
    """A checkpoint cannot be loaded, or lacks what is asked of it."""


def identity(ref: ModelRef) -> dict[str, str]:
    """What a model is, for each role that it has: base, refiner, vae.

    `sha256 HEX` of the sorted relative paths and checksums of a local folder's files (`inventory`), `sha256 HEX` of a
    single file, or `revision COMMIT` of a hub id. The configurations that `ref.config` names are a role of their own.
    Raises `ModelError` for a folder that is no model.
    """
    found = {role: _identity(ref, role) for role in PINS if getattr(ref, role) is not None}
    if ref.config is not None:
        found["config"] = _config_identity(ref.config, ref.config_revision)
    return found


def check_pins(ref: ModelRef) -> None:
    """`ModelError` where a role has another checksum than the configuration says: another file lies there now."""
    for role, (_, pin) in PINS.items():
        expected = getattr(ref, pin)
        if expected is None:
            continue
        found = _identity(ref, role) if getattr(ref, role) is not None else "left out"
        if found != f"sha256 {expected}":
            raise ModelError(
                f"the {role} model must be what the configuration was tuned with, of the sha256 {expected}; received "
                f"{getattr(ref, role)!r}, which is {found}. Example: the file of that checksum, or a configuration "
                "that names this one"
            )


# What decides which weights a role has.
DECIDES = {
    "base": ("base", "config", "config_revision", "prediction_type", "zero_snr", *PINS["base"]),
    "refiner": ("refiner", *PINS["refiner"]),
    "vae": ("vae", *PINS["vae"]),
}


def differing(own: ModelRef, asked: ModelRef) -> list[str]:
    """The roles in which two models have another name, commit or checksum: base, refiner, vae."""
    return [role for role, names in DECIDES.items() if any(own.value(name) != asked.value(name) for name in names)]


def _identity(ref: ModelRef, role: str) -> str:
    name, revision = str(getattr(ref, role)), getattr(ref, PINS[role][0])
    others = SHARED if role == "refiner" else ("vae",) if role == "base" and ref.vae is not None else ()
    check_no_pickle(name, role)
    if is_file(name):
        return f"sha256 {sha256_of(file_of(name, role))}"
    folder = folder_of(name, "base/vae" if role == "vae" else role)
    if folder is None:
        return f"revision {revision}"
    return _combined(inventory(folder, role, others))


def _config_identity(name: str, revision: str | None) -> str:
    """Of the files beside the weights, for base and refiner."""
    folders = {role: folder_of(name, role) for role in ("base", "refiner")}
    if folders["base"] is None:
        return f"revision {revision}"
    return _combined(
        {
            f"{role}/{path}": checksum
            for role, folder in folders.items()
            if folder is not None and (folder / "model_index.json").is_file()
            for path, checksum in inventory(folder, role).items()
            if not path.endswith(".safetensors")
        }
    )


def _combined(files: dict[str, str]) -> str:
    lines = [f"{path}\0{checksum}\n" for path, checksum in files.items()]
    return f"sha256 {hashlib.sha256(''.join(lines).encode()).hexdigest()}"


def file_of(name: str, role: str) -> Path:
    """The single file that a model's name means. Raises `ModelError` where there is none."""
    path = Path(name).expanduser()
    if not path.is_file():
        raise ModelError(
            f"the {role} model must be a .safetensors file that is there; received {name!r}. Example: nano"
        )
    return path


def inventory(folder: Path, role: str, others: Collection[str] = ()) -> dict[str, str]:
    """Every file of a role's folder that decides an image, by its sorted relative path, with its sha256. `others` are
    the parts that come from elsewhere. Links are followed. Raises `ModelError`."""
    if role == "vae":
        places = [folder]
        if not (folder / "config.json").is_file():
            raise ModelError(
                f"the vae must be a folder with the config.json of an AutoencoderKL; received {str(folder)!r}. "
                "Example: madebyollin/sdxl-vae-fp16-fix"
            )
    else:
        places = [folder / part for part in parts_of(check_folder(folder, role)) if part not in others]
    files = [] if role == "vae" else [folder / "model_index.json"]
    files += [path for place in places if place.is_dir() for path in place.iterdir() if _decides(path)]
    return {path.relative_to(folder).as_posix(): sha256_of(path) for path in sorted(files)}


def _decides(path: Path) -> bool:
    hidden = path.name.startswith(".")
    return not hidden and (path.suffix in SUFFIXES or path.name in NAMES) and path.is_file()


def parts_of(index: dict[str, Any]) -> list[str]:
    """The parts that a `model_index.json` lists; one that a pipeline goes without has null for its class."""
    return [name for name, value in index.items() if isinstance(value, list) and value and value[0] is not None]


def check_folder(folder: Path, role: str) -> dict[str, Any]:
    """The `model_index.json` of an SDXL's folder. Raises `ModelError` for a foreign one, before its gigabytes are
    read."""
    path = folder / "model_index.json"
    rule = f"the {role} model must be a folder with the model_index.json of an SDXL pipeline"
    try:
        index: dict[str, Any] = json.loads(path.read_text())
        kind = index["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{rule}; received {str(folder)!r} ({type(error).__name__}: {error}). Example: nano"
        ) from error
    if not str(kind).startswith("StableDiffusionXL"):
        raise ModelError(f"{rule}; received {str(folder)!r}, which holds a {kind}. Example: nano")
    return index


def variant_of(folder: Path, parts: Collection[str]) -> str | None:
    """Which of their variants the parts of a folder load as: fp16 where any has it, else the plain one, else the only
    other. Parts that lack it load plain."""
    found = {
        match["variant"]
        for part in parts
        for path in (folder / part).glob("*")
        if (match := WEIGHTS.fullmatch(path.name))
    }
    if "fp16" in found:
        return "fp16"
    return None if None in found or not found else sorted(map(str, found))[0]


def conversion(path: Path) -> str:
    """The command that makes a pickle of weights a `.safetensors` file, and runs nothing that it may hold."""
    program = (
        "import sys, torch, safetensors.torch as s; found = torch.load(sys.argv[1], 'cpu', weights_only=True); "
        "found = found.get('state_dict', found); s.save_file({k: v.contiguous().clone() for k, v in found.items() if "
        "torch.is_tensor(v)}, sys.argv[2])"
    )
    return shlex.join(("python", "-c", program, str(path), str(path.with_suffix(".safetensors"))))


def check_no_pickle(name: str, role: str) -> None:
    """`ModelError` for a file that would be unpickled, with the command that converts it."""
    if not name.endswith(PICKLES):
        return
    path = Path(name)
    raise ModelError(
        f"the {role} model must be in safetensors, since loading a pickle runs whatever code it holds; received "
        f"{name!r}. Convert it, without running any: {conversion(path)}. Example: "
        f"{path.with_suffix('.safetensors').name}"
    )


def check_safe(folder: Path, role: str, name: str, parts: Collection[str]) -> None:
    """`ModelError` for a folder with a part whose weights are in pickles alone: loading one runs whatever it holds."""
    for part in parts:
        files = [path for path in (folder / part).glob("*") if path.suffix in (*PICKLES, ".safetensors")]
        if files and all(path.suffix in PICKLES for path in files):
            loads = f"DiffusionPipeline.from_pretrained({name!r}).save_pretrained('CONVERTED')"
            command = shlex.join(("python", "-c", f"from diffusers import DiffusionPipeline; {loads}"))
            raise ModelError(
                f"the {role} model must have its weights in safetensors, since loading a pickle runs whatever code it "
                f"holds; received {name!r} with {part}/{files[0].name}. If you trust its source, convert it: "
                f"{command}. Example: nano"
            )


def folder_of(name: str, role: str) -> Path | None:
    """The local folder a model's name means; None for a hub id. A folder may hold `base/` and `refiner/`, as nano does,
    or be the checkpoint itself."""
    path = NANO if name == "nano" else Path(name).expanduser()
    if (path / role).is_dir():
        return path / role
    if name == "nano" or path.exists() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        return path
    return None
