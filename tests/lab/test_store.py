"""A folder of pictures: whole or not at all, and an id never becomes a path."""

import os
import uuid

import pytest

from sdxl_lab.store import FolderStore, UnknownPicture

ID = uuid.UUID("12345678-1234-5678-1234-567812345678")


@pytest.fixture
def store(tmp_path):
    return FolderStore(tmp_path / "pictures")


def test_what_is_put_is_got_by_uuid_or_by_its_text(store):
    store.put(ID, b"a picture")
    assert store.get(ID) == store.get(str(ID)) == b"a picture"
    assert [path.name for path in store.folder.iterdir()] == [f"{ID}.png"]


def test_a_picture_put_again_replaces_the_old(store):
    store.put(ID, b"old")
    store.put(ID, b"new")
    assert store.get(ID) == b"new"


BAD_IDS = ["../x", f"../{ID}", f"{ID}.png", f"{ID}/..", f"x{ID}", f"{ID}\0", "", None, 7, b"x", ["x"]]


@pytest.mark.parametrize("bad", [*BAD_IDS, "/etc/passwd", "..", "a" * 5000], ids=lambda bad: repr(bad)[:30])
def test_an_id_that_is_none_is_unknown(store, bad):
    store.put(ID, b"a picture")
    (store.folder.parent / "x.png").write_bytes(b"a secret")
    (store.folder.parent / f"{ID}.png").write_bytes(b"a secret")
    with pytest.raises(UnknownPicture, match="no picture has the id"):
        store.get(bad)


def test_an_absolute_path_is_unknown_even_where_it_exists(store, tmp_path):
    secret = tmp_path / "secret.png"
    secret.write_bytes(b"a secret")
    with pytest.raises(UnknownPicture):
        store.get(str(secret.with_suffix("")))


def test_an_id_without_a_picture_is_unknown(store):
    with pytest.raises(UnknownPicture, match=str(ID)):
        store.get(ID)


@pytest.mark.parametrize("bad", ["../x", str(ID), None])
def test_only_a_uuid_names_what_is_put(store, bad):
    with pytest.raises(TypeError, match="a picture's id must be a UUID"):
        store.put(bad, b"a picture")
    assert not store.folder.exists()


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_put_that_fails_leaves_the_old_picture_and_no_remains(store, monkeypatch, step):
    store.put(ID, b"old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, step, full)
    with pytest.raises(OSError, match="No space left"):
        store.put(ID, b"new")
    assert store.get(ID) == b"old"
    assert [path.name for path in store.folder.iterdir()] == [f"{ID}.png"]
