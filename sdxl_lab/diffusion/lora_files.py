"""Which file a LoRA is, and what identifies it: the sha256 of a local file, or the commit of a hub id.

Imports no torch, so that a door can say at once that a file is missing or a pickle.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

from sdxl_lab.checksums import sha256_of
from sdxl_lab.config import GenerationConfig, LoraRef
from sdxl_lab.diffusion import inversions
from sdxl_lab.diffusion.inventory import NANO, PICKLES, ModelError, conversion

LORAS = NANO / "loras"
# What PEFT writes beside its weights: the alpha stands there.
PEFT_CONFIG = "adapter_config.json"


def local_file(ref: LoraRef) -> Path | None:
    """The file of a LoRA on this machine; None for one of the hub. Raises `ModelError` for a missing file, a folder in
    which none can be chosen, and a pickle."""
    source = LORAS if ref.source == "nano" else Path(ref.source).expanduser()
    path = source if ref.file is None else source / ref.file
    _refuse_pickle(path)
    if ref.source != "nano" and ref.revision is not None and not source.exists():
        if ref.file is None:
            raise ModelError(
                f"a LoRA of the hub must name its file; received {ref.source!r} without one. Example: "
                f"{ref.source}@{ref.revision}/pytorch_lora_weights.safetensors"
            )
        return None
    if path.is_dir():
        found = sorted(path.glob("*.safetensors"))
        if len(found) != 1:
            raise ModelError(
                f"a LoRA's folder must hold one .safetensors file, or `file` must name one of them; received "
                f"{str(path)!r}, which holds {len(found)}. Example: {path / 'pytorch_lora_weights.safetensors'}"
            )
        return found[0]
    if not path.is_file():
        known = ", ".join(f"nano/{each.stem}" for each in sorted(LORAS.glob("*.safetensors")))
        raise ModelError(
            f"a LoRA must be a .safetensors file, a folder with one, org/name@COMMIT/FILE, or one of nano's ({known}); "
            f"received {str(path)!r}, which is not there. Example: {known.partition(',')[0] or 'outlines.safetensors'}"
        )
    return path


def _refuse_pickle(path: Path) -> None:
    if path.suffix in PICKLES:
        raise ModelError(
            f"a LoRA must be a .safetensors file, since a pickle may run any code; received {str(path)!r}. Convert it: "
            f"{conversion(path)}"
        )


def identity_of(ref: LoraRef) -> str:
    """`sha256 HEX` of its file, or `revision COMMIT FILE` of the hub. Raises `ModelError`."""
    path = local_file(ref)
    if path is None:
        return f"sha256 {ref.sha256}" if ref.sha256 else f"revision {ref.source} {ref.revision} {ref.file}"
    found = sha256_of(path)
    if ref.sha256 is not None and found != ref.sha256:
        raise ModelError(
            f"the LoRA {ref.name} must be the file that the configuration names, with the sha256 {ref.sha256}; "
            f"received {str(path)!r} with {found}. Example: the file that it was tuned with"
        )
    return f"sha256 {found}"


def identities(refs: Iterable[LoraRef], of: Callable[[LoraRef], str] = identity_of) -> dict[str, str]:
    """What LoRAs are, as an image's record has it among the weights: `lora NAME`, and for a name that came before
    `lora NAME 2`. Raises `ModelError`."""
    found: dict[str, str] = {}
    for ref in refs:
        key, count = f"lora {ref.name}", 1
        while key in found:
            count += 1
            key = f"lora {ref.name} {count}"
        found[key] = of(ref)
    return found


def pinned(config: GenerationConfig) -> GenerationConfig:
    """The configuration with the sha256 of every local file in it, a model's, a LoRA's or an embedding's, so that its
    digest says which files it means. Raises `ModelError`."""
    model, loras = config.model.pinned(), tuple(pinned_ref(ref) for ref in config.loras)
    embeddings = tuple(inversions.pinned_ref(ref) for ref in config.embeddings)
    if (model, loras, embeddings) == (config.model, config.loras, config.embeddings):
        return config
    return config.with_(model=model, loras=loras, embeddings=embeddings)


def pinned_ref(ref: LoraRef) -> LoraRef:
    """The same for one."""
    path = None if ref.sha256 else local_file(ref)
    return ref if path is None else ref.with_(sha256=sha256_of(path))
