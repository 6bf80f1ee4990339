"""Models of the hub: the commit that a revision names, and whether cached files are what the hub sent.

Imports no torch.
"""

import json
import re
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import HfApi, constants
from huggingface_hub.file_download import repo_folder_name

from sdxl_lab.checksums import git_sha1_of, sha256_of
from sdxl_lab.config import PINS, ModelRef, is_file
from sdxl_lab.diffusion.inventory import ModelError, folder_of

COMMIT = re.compile("[0-9a-f]{40}")


class Difference(NamedTuple):
    """A file whose checksum is not the hub's. `expected` is None where the cache does not say what it should be."""

    path: Path
    found: str
    expected: str | None


def pinned(ref: ModelRef) -> ModelRef:
    """With a commit for every hub id that comes with a branch, a tag or nothing: the one that it names now. Raises
    `ModelError`."""
    named = {role: revision for role, (revision, _) in PINS.items()} | {"config": "config_revision"}
    changes = {}
    for role, revision in named.items():
        name, asked = getattr(ref, role), getattr(ref, revision)
        if name is None or is_file(name) or COMMIT.fullmatch(asked or "") or folder_of(name, role) is not None:
            continue
        changes[revision] = commit_of(name, asked or constants.DEFAULT_REVISION)
    return ref.with_(**changes) if changes else ref


def commit_of(name: str, revision: str) -> str:
    """The commit that a branch or tag names: what the hub says, or where it cannot be asked the cache of the last
    download. Raises `ModelError`."""
    try:
        commit = HfApi().model_info(name, revision=revision).sha
    except Exception as error:  # the hub client, its transport and its checks each raise kinds of their own
        with suppress(OSError):
            return (cache_of(name) / "refs" / revision).read_text().strip()
        raise ModelError(
            f"a model must be nano, sdxl, a folder or a file that is there, or a hub id; received {name!r} at revision "
            f"{revision!r}, of which the hub says: {type(error).__name__}: {' '.join(str(error).split())}. "
            "Example: nano"
        ) from error
    return str(commit)


def check_pinned(role: str, name: str, revision: str | None) -> None:
    """A branch moves: what it held when the configuration was tuned, nobody could say."""
    if not COMMIT.fullmatch(revision or ""):
        raise ModelError(
            f"the {role} model of the hub must name the commit of its revision, 40 hex digits; received {name!r} at "
            f"revision {revision!r}. `generate --model` asks the hub which it is. Example: "
            "462165984030d82259a11f4367a4eed129e94a7b"
        )


def check_downloaded(role: str, name: str, revision: str) -> None:
    """Every cached file of the revision against the checksum that the hub gave with it. Raises `ModelError`."""
    folder = cache_of(name) / "snapshots" / revision
    differs = difference(folder)
    if differs is not None:
        raise ModelError(
            f"the {role} model's files must be those of its revision, as the hub named them; received {name!r} at "
            f"revision {revision}, whose {differs.path.relative_to(folder)} has the checksum {differs.found} and "
            f"should have {differs.expected or 'one that the cache knows'}. Remove {folder.parents[1]} to load it "
            "again. Example: an untouched download"
        )


def cache_of(name: str) -> Path:
    """The folder of a hub id in the hub client's cache."""
    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="model")


def difference(snapshot: Path) -> Difference | None:
    """The first cached file of a hub revision that is not what the hub sent.

    What it sent is known from the listing of the commit that the hub client keeps, or from the blob that a file links
    to, which has its checksum for a name: sha256 for weights, git's own sha1 for small files. A cache may be made of
    copies instead of links, by a file system without them or by whoever copied it: then one of the blobs must have the
    content.
    """
    listed = _listed(snapshot)
    blobs = {path.name for path in (snapshot.parents[1] / "blobs").glob("*")}
    for path in sorted(path for path in snapshot.rglob("*") if not path.is_dir()):
        expected = listed.get(path.relative_to(snapshot).as_posix())
        if expected is None and path.is_symlink():
            expected = path.resolve().name
        if expected is None:
            found = sha256_of(path)
            if found not in blobs and git_sha1_of(path) not in blobs:
                return Difference(path, found, None)
            continue
        found = sha256_of(path) if len(expected) == 64 else git_sha1_of(path)
        if found != expected:
            return Difference(path, found, expected)
    return None


def _listed(snapshot: Path) -> dict[str, str]:
    """The checksum of each file by its relative path, as the hub listed it: sha256 for weights, git's sha1 for small
    files. Empty where the hub client kept no listing."""
    path = snapshot.parents[1] / "trees" / f"{snapshot.name}.json"
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        files = json.loads(path.read_bytes())["files"]
        return {name: str(entry.get("lfs_sha256") or entry["blob_id"]) for name, entry in files.items()}
    return {}
