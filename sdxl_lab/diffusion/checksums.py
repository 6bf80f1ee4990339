"""Checksums of files: read block by block, remembered between runs, and held against those of the hub.

A checksum is remembered for a path, its size and the times of its last change; a file that changed in any of these is
read again. Imports no torch.
"""

import hashlib
import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from sdxl_lab.files import cache_folder, write_whole

SMALL = 1 << 20  # bytes: reading the file takes no longer than looking its checksum up
# File systems stamp changes with a clock that ticks in milliseconds to seconds: a file that was written just now may be
# written again under the same stamp.
SETTLED_NS = 2_000_000_000


def sha256_of(path: Path) -> str:
    """A file's sha256 in 64 hexadecimal digits; links are followed. A large file is read once.

    Several processes may ask at the same time: every checksum is a file of its own, renamed into its place.
    """
    path = path.resolve()
    state = _state(path)
    if state["size"] < SMALL:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    note = cache_folder() / "checksums" / f"{hashlib.sha256(os.fsencode(path)).hexdigest()[:32]}.json"
    with suppress(OSError, ValueError, KeyError, TypeError):
        kept = json.loads(note.read_bytes())
        if kept["path"] == str(path) and kept["state"] == state:
            return str(kept["sha256"])
    began = time.time_ns()
    found = _read_into(hashlib.sha256(), path)
    if _state(path) == state and began - max(state["mtime_ns"], state["ctime_ns"]) > SETTLED_NS:
        with suppress(OSError):  # a home that is read-only or full costs time, nothing else
            write_whole(note, json.dumps({"path": str(path), "state": state, "sha256": found}).encode())
    return found


class Difference(NamedTuple):
    """A file whose checksum is not the hub's. `expected` is None where the cache does not say what it should be."""

    path: Path
    found: str
    expected: str | None


def hub_difference(snapshot: Path) -> Difference | None:
    """The first cached file of a hub revision that is not what the hub sent. Its checksum names the blob that the file
    links to: sha256 for weights, git's own sha1 for small files."""
    for path in sorted(path for path in snapshot.rglob("*") if not path.is_dir()):
        expected = path.resolve().name
        if len(expected) == 64:
            found = sha256_of(path)
        else:
            head = f"blob {path.stat().st_size}\0".encode()
            found = _read_into(hashlib.sha1(head, usedforsecurity=False), path)
        if not path.is_symlink() or found != expected:
            return Difference(path, found, expected if path.is_symlink() else None)
    return None


def _state(path: Path) -> dict[str, int]:
    """What changes when the file does. A copy may keep the time of the last change (mtime), but not of the inode's."""
    found = path.stat()
    return {"size": found.st_size, "mtime_ns": found.st_mtime_ns, "ctime_ns": found.st_ctime_ns}


def _read_into(digest: "hashlib._Hash", path: Path) -> str:
    """The hexadecimal digest, block by block: SDXL's weights are gigabytes."""
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
