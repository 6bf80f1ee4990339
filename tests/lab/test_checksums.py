"""Checksums: remembered while a file stays as it is, by as many processes as like."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sdxl_lab import checksums
from sdxl_lab.checksums import SMALL, sha256_of

ROOT = Path(__file__).parents[2]
LONG_AGO = 1_600_000_000_000_000_000


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "sdxl_lab" / "checksums"


@pytest.fixture(autouse=True)
def settled(monkeypatch):
    """Files made just now count as settled; the one test about that says otherwise."""
    monkeypatch.setattr(checksums, "SETTLED_NS", -(10**18))


@pytest.fixture
def reads(monkeypatch) -> list[Path]:
    """Every file that is read block by block."""
    found, read = [], checksums._read_into
    monkeypatch.setattr(checksums, "_read_into", lambda digest, path: (found.append(path), read(digest, path))[1])
    return found


def weights(tmp_path: Path, byte: bytes = b"w", size: int = SMALL) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_bytes(byte * size)
    return path


def test_a_checksum_is_that_of_the_content(tmp_path):
    for size in (0, 1, SMALL - 1, SMALL, 3 * SMALL + 1):
        path = weights(tmp_path, size=size)
        assert sha256_of(path) == hashlib.sha256(b"w" * size).hexdigest()


def test_a_large_file_is_read_once(tmp_path, reads):
    path = weights(tmp_path)
    assert sha256_of(path) == sha256_of(path)
    assert reads == [path]


def test_a_small_file_leaves_nothing_behind(tmp_path, home):
    sha256_of(weights(tmp_path, size=SMALL - 1))
    assert not home.exists()


def kept_time(path: Path) -> None:
    """As `cp -p` and rsync do: other content, the same size and time."""
    before = path.stat()
    path.write_bytes(b"v" * SMALL)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def put_in_its_place(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(b"v" * SMALL)
    os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    other.replace(path)


CHANGES = {
    "size": lambda path: path.write_bytes(b"w" * (SMALL + 1)),
    "content": lambda path: path.write_bytes(b"v" * SMALL),
    "content, with the old time": kept_time,
    "another file in its place, with the old time": put_in_its_place,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_file_is_read_again(tmp_path, change):
    path = weights(tmp_path)
    os.utime(path, ns=(LONG_AGO, LONG_AGO))
    before = sha256_of(path)
    change(path)
    assert sha256_of(path) == hashlib.sha256(path.read_bytes()).hexdigest() != before


def test_a_link_that_points_elsewhere_is_followed(tmp_path):
    first, second, link = tmp_path / "first", tmp_path / "second", tmp_path / "link"
    first.write_bytes(b"a" * SMALL)
    second.write_bytes(b"b" * SMALL)
    link.symlink_to(first)
    before = sha256_of(link)
    link.unlink()
    link.symlink_to(second)
    assert (before, sha256_of(link)) == (sha256_of(first), sha256_of(second))


def test_a_file_of_this_moment_is_not_remembered_since_it_may_change_within_a_tick(tmp_path, reads, monkeypatch):
    monkeypatch.setattr(checksums, "SETTLED_NS", 2_000_000_000)
    path = weights(tmp_path)
    sha256_of(path)
    sha256_of(path)
    assert reads == [path, path]


DAMAGE = ["", "{", "[]", "{}", '{"path": 7}', "\x00"]


@pytest.mark.parametrize("text", DAMAGE)
def test_a_damaged_note_is_read_over(tmp_path, home, text):
    path = weights(tmp_path)
    expected = sha256_of(path)
    (note,) = home.iterdir()
    note.write_text(text)
    assert sha256_of(path) == expected
    assert json.loads(note.read_text())["sha256"] == expected


def test_a_home_that_takes_no_files_costs_only_time(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert sha256_of(weights(tmp_path)) == hashlib.sha256(b"w" * SMALL).hexdigest()


MANY = """
import sys
from pathlib import Path
from sdxl_lab import checksums
from sdxl_lab.files import cache_folder
checksums.SETTLED_NS = -(10**18)
found = set()
for _ in range(200):
    found.add(checksums.sha256_of(Path(sys.argv[1])))
    for note in (cache_folder() / "checksums").glob("*.json"):
        note.unlink(missing_ok=True)
print(*found)
"""


def test_processes_that_remember_and_forget_at_once_agree(tmp_path, home):
    path = weights(tmp_path)
    command = [sys.executable, "-c", MANY, str(path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    processes = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said = {process.communicate(timeout=60)[0].strip() for process in processes}
    assert said == {sha256_of(path)}
    assert all(process.returncode == 0 for process in processes)
    assert not list(home.glob("*.part"))
