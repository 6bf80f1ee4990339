"""Checksums of files: read block by block, and remembered between runs.

A checksum is remembered for a path, its size and the times of its last change; a file that changed in any of these is
read again. Imports no torch.
"""

import hashlib
import json
import os
import time
from contextlib import suppress
from pathlib import Path

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


def git_sha1_of(path: Path) -> str:
    """A file's name in git, in 40 hexadecimal digits: what the hub calls its small files by."""
    head = f"blob {path.stat().st_size}\0".encode()
    return _read_into(hashlib.sha1(head, usedforsecurity=False), path)


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
