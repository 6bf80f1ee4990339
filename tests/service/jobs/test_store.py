"""Images and their records: whole or not at all, listed newest first, and an id never becomes a path."""

import subprocess
import sys
import time
import urllib.request
import uuid
from dataclasses import replace

import obstore
import pytest
from moto.server import ThreadedMotoServer
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sdxl_lab.config import ConfigError
from sdxl_lab.images import encode_png
from service.jobs.records import JobRecord, StoredImage
from service.jobs.store import (
    ABANDONED,
    RecordChanged,
    Store,
    StoreRefused,
    StoreUnreachable,
    UnknownImage,
    check_place,
    image_id,
)
from tests.made import image_record

ID = uuid.UUID("12345678-1234-5678-1234-567812345678")
RECORD = {"prompt": "a red ring", "seed": 3}


@pytest.fixture(scope="module")
def s3():
    """The URL of a bucket that moto keeps in memory."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    address = f"http://{host}:{port}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT", address)
        patch.setenv("AWS_REGION", "us-east-1")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "any")
        urllib.request.urlopen(urllib.request.Request(f"{address}/bucket", method="PUT")).close()
        yield "s3://bucket"
    server.stop()


@pytest.fixture(params=["folder", "file", "memory", "s3"])
def store(request, tmp_path):
    folder = tmp_path / "images of mine"
    if request.param == "s3":
        return Store(f"{request.getfixturevalue('s3')}/{uuid.uuid4()}")
    return Store({"folder": folder, "file": folder.as_uri(), "memory": "memory://"}[request.param])


@pytest.fixture
def folder(tmp_path):
    return Store(tmp_path / "images")


def put(store, id, png, **record):
    """Store an image that is made now."""
    image = StoredImage(id=id, created=round(time.time(), 3), record=image_record(**RECORD | record))
    store.put(image, png)
    return image


def job(id=ID, **changes):
    asked = {"prompt": "a red ring", "seed": 3, "config": {}, "promoted": "0" * 64, "overridden": ()}
    return JobRecord(**{"id": id, "created": 1.0, "attempts": 1, "fingerprint": ""} | asked | changes)


def listed(store):
    return [image.id for image in store.page(10).records]


def test_what_is_put_is_got_with_its_record(store):
    kept = put(store, ID, b"an image")
    assert store.get(ID) == b"an image"
    assert store.record(ID) == kept


def test_a_image_put_again_replaces_the_old_and_is_listed_once(store):
    put(store, ID, b"old", prompt="old")
    time.sleep(0.005)
    put(store, ID, b"new", prompt="new")
    assert store.get(ID) == b"new"
    assert [image.record.prompt for image in store.page(10).records] == ["new"]


BAD_IDS = ["../x", f"../{ID}", f"{ID}.png", f"{ID}/..", f"x{ID}", f"{ID}\0", "", None, 7, b"x", ["x"]]


@pytest.mark.parametrize("bad", [*BAD_IDS, "/etc/passwd", "..", "a" * 5000], ids=lambda bad: repr(bad)[:30])
def test_text_that_is_no_id_is_unknown(bad):
    with pytest.raises(UnknownImage, match="no image has the id"):
        image_id(bad)


@pytest.mark.parametrize("bad", ["../x", str(ID), None])
@pytest.mark.parametrize("method", ["get", "record", "delete", "job", "drop_job"])
def test_only_a_uuid_names_an_object(folder, bad, method):
    with pytest.raises(TypeError, match="an image's id must be a UUID"):
        getattr(folder, method)(bad)
    assert not list(folder.folder.iterdir())


def test_an_id_without_a_image_is_unknown(store):
    for method in (store.get, store.record, store.delete, store.job):
        with pytest.raises(UnknownImage, match=str(ID)):
            method(ID)
    store.drop_job(ID)


def test_pages_go_from_the_newest_to_the_oldest_and_meet_each_once(store):
    ids = [uuid.uuid4() for _ in range(11)]
    for each in ids:
        put(store, each, b"")
        time.sleep(0.002)
    seen, cursor = [], None
    while True:
        page = store.page(4, cursor)
        seen += [image.id for image in page.records]
        cursor = page.cursor
        if cursor is None:
            break
        put(store, uuid.uuid4(), b"")  # what comes meanwhile is newer, and moves nothing
    assert seen == ids[::-1]
    assert store.page(11).cursor is not None
    assert Store("memory://").page(5).records == []


@pytest.mark.parametrize("cursor", ["", "x", "../" * 5, "0" * 15, f"{'0' * 15}-../../../../../../../../../../../../.."])
def test_a_cursor_of_no_page_is_refused(store, cursor):
    with pytest.raises(ConfigError, match="an earlier page"):
        store.page(1, cursor)


def test_a_deleted_image_is_gone(store):
    other = uuid.uuid4()
    put(store, ID, b"an image")
    put(store, other, b"another")
    store.delete(ID)
    with pytest.raises(UnknownImage):
        store.get(ID)
    assert listed(store) == [other]
    assert len([*store._listing("")]) == 3 if store.folder is None else len([*store.folder.rglob("*-*")]) == 3


def test_retention_removes_what_is_older_and_keeps_the_rest(store, monkeypatch):
    old, again, new = uuid.uuid4(), uuid.uuid4(), uuid.uuid4()
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now - 100)
    put(store, old, b"old")
    put(store, again, b"old")
    store.put_job(job(old))
    monkeypatch.setattr(time, "time", lambda: now)
    put(store, again, b"new")
    put(store, new, b"new")
    store.put_job(job(new))
    names = list(store.job_names())  # whose age is by the store's clock, which no test turns back
    aged = [replace(name, changed=name.changed - 100 * (name.id == old)) for name in names]
    monkeypatch.setattr(store, "job_names", lambda: iter(aged))
    assert store.remove_older(50) == 1
    monkeypatch.undo()
    assert set(listed(store)) == {again, new}
    assert [name.id for name in store.job_names()] == [new]
    with pytest.raises(UnknownImage):
        store.get(old)


def test_a_clock_that_jumps_back_loses_nothing(store, monkeypatch):
    put(store, ID, b"first")
    monkeypatch.setattr(time, "time", lambda: 1.0)
    other = uuid.uuid4()
    put(store, other, b"second")
    assert set(listed(store)) == {ID, other}
    assert store.get(other) == b"second"


def test_a_job_is_kept_until_it_is_dropped(store):
    ids = [uuid.uuid4() for _ in range(3)]
    for number, each in enumerate(reversed(ids)):
        store.put_job(job(each, created=-number))
    assert {name.id for name in store.job_names()} == set(ids)
    store.drop_job(ids[0])
    assert store.job(ids[1]) == job(ids[1], created=-1)
    assert {name.id for name in store.job_names()} == set(ids[1:])
    assert store.page(5).records == []


def test_a_folder_of_images_from_before_is_read_and_listed(tmp_path):
    (tmp_path / f"{ID}.png").write_bytes(
        encode_png(Image.new("RGB", (8, 8)), image_record(prompt="a red ring", seed=3))
    )
    (tmp_path / f"{uuid.UUID(int=1)}.png").write_bytes(b"no image of ours")
    (tmp_path / "holiday.png").write_bytes(b"no image of ours")
    store = Store(tmp_path)
    assert listed(store) == [ID]
    assert store.record(ID).record.prompt == "a red ring"
    assert store.get(uuid.UUID(int=1)) == b"no image of ours"
    assert listed(Store(tmp_path)) == [ID]


def test_a_job_takes_the_place_of_the_version_that_was_read(store):
    store.swap_job(job(), None)
    read, version = store.read_job(ID)
    store.swap_job(read.with_(state="running"), version)
    assert store.job(ID).state == "running"
    (name,) = store.job_names()
    assert name.id == ID
    assert abs(name.changed - time.time()) < 60
    store.put_job(read.with_(state="failed"))
    assert [each.tag for each in store.job_names()] != [name.tag]
    if store.folder is None:  # a folder has one owner, and takes what comes last
        store.swap_job(job(attempts=2), store.read_job(ID)[1])
        for late in (None, version):
            with pytest.raises(RecordChanged):
                store.swap_job(job(), late)
        store.drop_job(ID)
        with pytest.raises(RecordChanged):
            store.swap_job(job(), version)


@pytest.mark.slow
def test_a_store_that_is_away_is_unreachable_and_no_refusal(s3, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT", "http://127.0.0.1:9")
    store = Store("s3://bucket/prefix")
    for act in (
        lambda: put(store, ID, b""),
        lambda: store.get(ID),
        lambda: store.drop_job(ID),
        lambda: store.swap_job(job(), None),
        lambda: list(store.job_names()),
    ):
        with pytest.raises(StoreUnreachable, match="the store does not"):
            act()


SHARED = {
    "s3://bucket/prefix": {},
    "gs://bucket/prefix": {},
    "az://container/prefix": {"AZURE_STORAGE_ACCOUNT_NAME": "account"},
}


@pytest.mark.parametrize("url", SHARED)
def test_every_scheme_opens_a_store(url, monkeypatch):
    """Opened and no more: talking to them takes their servers. `memory` and `file` are exercised above."""
    for name, value in SHARED[url].items():
        monkeypatch.setenv(name, value)
    store = Store(url)
    assert store.folder is None
    assert store._objects.prefix == "prefix"


@pytest.mark.parametrize("place", ["", " ", "ftp://host/x", "http://host/x", "s3://", "://x"])
def test_a_place_that_is_none_is_refused_with_the_schemes(place):
    with pytest.raises(ValueError, match="s3://, gs://, az://, file://, memory://"):
        check_place(place)


def test_a_store_that_cannot_be_opened_says_why(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StoreRefused, match="cannot be opened"):
        Store(tmp_path / "file" / "images")


@pytest.mark.parametrize("fails", [1, 2, 3])
def test_a_put_that_fails_lists_nothing_and_leaves_the_old_image_whole(folder, monkeypatch, fails):
    honest, calls = obstore.put, []

    def full(*arguments, **options):
        calls.append(arguments)
        if len(calls) == fails:
            raise OSError(28, "No space left on device", "/a/path")
        return honest(*arguments, **options)

    monkeypatch.setattr(obstore, "put", full)
    with pytest.raises(StoreRefused, match="No space left on device") as caught:
        put(folder, ID, b"an image")
    assert "/a/path" not in str(caught.value)
    assert folder.page(5).records == []
    assert put(folder, ID, b"an image") in folder.page(5).records


def test_a_full_disk_refuses_and_keeps_what_it_has(small_disk):
    store = Store(small_disk)
    put(store, ID, b"x" * 10_000)
    with pytest.raises(StoreRefused, match="No space left on device"):
        put(store, uuid.uuid4(), b"x" * 200_000)
    assert store.get(ID) == b"x" * 10_000
    assert listed(store) == [ID]
    other = uuid.uuid4()
    put(store, other, b"x" * 1000)
    assert store.get(other) == b"x" * 1000


def test_a_read_only_disk_refuses_and_still_gives(small_disk):
    store = Store(small_disk)
    put(store, ID, b"x")
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    for act in (lambda: put(store, uuid.uuid4(), b"x"), lambda: store.delete(ID)):
        with pytest.raises(StoreRefused, match="Read-only file system"):
            act()
    assert Store(small_disk).get(ID) == b"x"
    assert listed(store) == [ID]


WRITER = """
import sys, time, uuid
from pathlib import Path
from service.jobs.records import StoredImage
from service.jobs.store import Store
from sdxl_lab.record import ImageRecord
store, record = Store(Path(sys.argv[1])), ImageRecord.read(sys.argv[2], "a test")
for number in range(100_000):
    each = uuid.uuid4()
    store.put(StoredImage(id=each, created=round(time.time(), 3), record=record), each.bytes * 20_000)
    print(each, flush=True)
"""


def test_a_writer_killed_at_any_moment_leaves_no_torn_image(tmp_path):
    """What was acknowledged is there; what is listed is whole; what it was writing goes with time."""
    acknowledged = []
    for moment in range(6):
        command = [sys.executable, "-c", WRITER, tmp_path, image_record().to_json()]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            acknowledged += [uuid.UUID(writer.stdout.readline().strip()) for _ in range(3)]
            time.sleep(0.001 * moment)
            writer.kill()
            acknowledged += [uuid.UUID(line.strip()) for line in writer.stdout if len(line) == 37]
    store = Store(tmp_path)
    found = [image.id for image in store.page(10_000).records]
    assert set(acknowledged) <= set(found)
    for each in found:
        assert store.get(each) == each.bytes * 20_000
    for path in tmp_path.glob("*.json"):
        StoredImage.read(path.read_bytes(), path.name)
    store.remove_older(-60)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and "#" not in path.name]


def test_what_an_interrupted_write_left_is_removed_once_it_is_old(folder, monkeypatch):
    left = folder.folder / f"{ID}.png#1"
    left.write_bytes(b"half a pic")
    folder.remove_leftovers()
    assert left.exists()
    assert folder.page(5).records == []
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + ABANDONED + 1)
    folder.remove_leftovers()
    assert not left.exists()


@pytest.mark.parametrize("name", ["0" * 36, str(uuid.UUID(int=7))])
def test_a_strange_png_in_the_folder_does_not_keep_the_store_closed(tmp_path, name):
    info = PngInfo()
    info.add_itxt("sdxl_lab", "{")
    Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png", pnginfo=info)
    assert Store(tmp_path).page(10).records == []
