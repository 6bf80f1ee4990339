"""Textual inversion (Gal et al. 2022, arXiv 2208.01618): files with vectors that a word of a prompt stands for.

An SDXL's file has as many vectors for its first text encoder (`clip_l`) as for its second (`clip_g`), as model sites
hand them out. Torch is imported where a file is read.
"""

from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from sdxl_lab.checksums import sha256_of
from sdxl_lab.config import EmbeddingRef
from sdxl_lab.diffusion.inventory import ModelError

PARTS = ("clip_l", "clip_g")
MOST = 75  # vectors: a word is read in one chunk


def file_of(ref: EmbeddingRef) -> Path:
    """The file, which is the one that the configuration names. Raises `ModelError`."""
    path = Path(ref.source).expanduser()
    if path.suffix != ".safetensors":
        raise _refused(ref, "a .safetensors file, since a pickle may run any code", str(path))
    if not path.is_file():
        raise _refused(ref, "a .safetensors file", f"{str(path)!r}, which is not there")
    if ref.sha256 is not None and sha256_of(path) != ref.sha256:
        raise _refused(ref, f"the file with the sha256 {ref.sha256}", f"{str(path)!r} with {sha256_of(path)}")
    return path


def pinned_ref(ref: EmbeddingRef) -> EmbeddingRef:
    """With the sha256 of its file, so that the digest says which file is meant. Raises `ModelError`."""
    return ref if ref.sha256 else ref.with_(sha256=sha256_of(file_of(ref)))


def identities(refs: Iterable[EmbeddingRef]) -> dict[str, str]:
    """What embeddings are, as an image's record has it among the weights. Raises `ModelError`."""
    return {f"embedding {ref.token}": f"sha256 {ref.sha256 or sha256_of(file_of(ref))}" for ref in refs}


def vectors_of(refs: Iterable[EmbeddingRef], part: str, width: int | None = None) -> dict[str, Any]:
    """The vectors (n, width) of one text encoder by their words. Raises `ModelError`, also for another width than the
    encoder's, where one is given."""
    found = {}
    for ref in refs:
        path = file_of(ref)
        vectors = _read(ref.with_(sha256=sha256_of(path)))[part]
        if width not in (None, vectors.shape[1]):
            raise _refused(ref, f"made for this model, whose {part} has {width} numbers a vector", vectors.shape[1])
        found[ref.token] = vectors
    return found


@lru_cache(maxsize=64)
def _read(ref: EmbeddingRef) -> dict[str, Any]:
    """A file's vectors by part."""
    import torch

    try:
        with safe_open(file_of(ref), framework="pt", device="cpu") as file:
            vectors = {name: file.get_tensor(name) for name in list(file.keys())}
    except (SafetensorError, OSError) as error:
        raise _refused(ref, "a whole .safetensors file", f"{ref.source!r} ({error})") from error
    if sorted(vectors) != sorted(PARTS):
        raise _refused(ref, "an SDXL's, with the keys clip_l and clip_g", ", ".join(sorted(vectors)[:4]) or "no key")
    shapes = {name: tuple(tensor.shape) for name, tensor in vectors.items()}
    first, second = (shapes[name] for name in PARTS)
    if len(first) != 2 or len(second) != 2 or first[0] != second[0] or not 1 <= first[0] <= MOST:
        rule = f"made of as many vectors for clip_l as for clip_g, 1 to {MOST}"
        raise _refused(ref, rule, f"the shapes {first} and {second}")
    if not all(torch.isfinite(tensor).all() for tensor in vectors.values()):
        raise _refused(ref, "made of finite numbers", "some that are not")
    return vectors


def _refused(ref: EmbeddingRef, rule: str, received: object) -> ModelError:
    return ModelError(
        f"the embedding {ref.token} must be {rule}; received {received}. Example: {ref.token}.safetensors"
    )
