"""Where images stay: a folder or an object store, behind one small class.

Beside every image `<id>.png` stands its record `<id>.json`, and `newest/<time>-<id>`, an empty object whose name
sorts the newest first. They are written in the order name, image, record and deleted in the order record, image,
name: an image is listed only while it can be fetched, and an interruption leaves nothing that `remove_older` does not
find.
`jobs/<id>.json` are durable jobs that are not done yet. Several processes may write them: `swap_job` takes the place
of exactly the version that was read. What the two kinds of `.json` hold, `records.py` says.

An id is a UUID, minted or derived by the caller; anything else is unknown, and never becomes part of a path.
"""

import contextlib
import heapq
import logging
import os
import re
import time
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, GenericError, NotSupportedError, PreconditionError
from obstore.store import LocalStore, from_url

from sdxl_lab.config import ConfigError, canonical
from sdxl_lab.images import read_record
from sdxl_lab.record import RecordError
from service.jobs.records import JobRecord, StoredImage

SCHEMES = ("s3", "gs", "az", "file", "memory")
EXAMPLE = "s3://bucket/prefix"
LAST = 10**15  # milliseconds; names count down from here, so that the newest sorts first
CURSOR = r"^[0-9]{15}-[0-9a-f-]{36}$"  # a name under newest/
ABANDONED = 600  # seconds after which a half-written file has lost its writer
# obstore's own would try for three minutes, with a client waiting.
RETRIES = {"max_retries": 4, "retry_timeout": timedelta(seconds=15)}
CLIENT = {"timeout": timedelta(seconds=30), "allow_http": True}  # http: only where an endpoint says so, such as MinIO

log = logging.getLogger(__name__)


class UnknownImage(KeyError):
    """No image has this id."""

    def __str__(self) -> str:
        return f"no image has the id {self.args[0]!r}"


class StoreRefused(OSError):
    """The store takes nothing: it is full, read-only, or not ours to write."""


class StoreUnreachable(OSError):
    """The store does not answer."""


class RecordChanged(RuntimeError):
    """Somebody else wrote the job's record since it was read, or before us."""


class _Unconditional(Exception):
    """The store knows no conditional writes."""


Version = Mapping[str, str]  # what tells one content of an object from another


@dataclass(frozen=True)
class JobName:
    """A job as the store lists it: `changed` in seconds since 1970, by the store's clock; `tag` names the content."""

    id: uuid.UUID
    changed: float
    tag: str


@dataclass(frozen=True)
class Page:
    """Some images' records, the newest first; `cursor` asks for the next ones, None after the last."""

    records: list[StoredImage]
    cursor: str | None


def image_id(text: str | uuid.UUID) -> uuid.UUID:
    """The id; `UnknownImage` where the text is none."""
    try:
        return text if isinstance(text, uuid.UUID) else uuid.UUID(text)
    except (ValueError, AttributeError, TypeError) as error:
        raise UnknownImage(str(text)) from error


class Store:
    """Images, their records, and the records of durable jobs.

    `place` is a folder, which is made, or a URL: `file:///folder`, `s3://bucket/prefix`, `gs://bucket/prefix`,
    `az://container/prefix`, or `memory://`, which lasts as long as the process. Credentials come from the environment,
    by the names that each provider's tools have (AWS_ACCESS_KEY_ID, GOOGLE_APPLICATION_CREDENTIALS,
    AZURE_STORAGE_ACCOUNT_NAME, ...). Raises `ValueError` for another scheme, `StoreRefused` where it cannot be opened.
    Every method blocks, and may be called from any thread.
    """

    def __init__(self, place: Path | str) -> None:
        self.folder = _folder(place)
        try:
            if self.folder is not None:
                self._objects: Any = LocalStore(self.folder, mkdir=True)
            elif urlsplit(str(place)).scheme == "memory":
                self._objects = from_url("memory://")
            else:
                self._objects = from_url(str(place), retry_config=RETRIES, client_options=CLIENT)  # type: ignore[call-overload]
        except (BaseError, OSError) as error:
            raise StoreRefused(f"the store {place} cannot be opened: {reason(error)}") from error
        self._adopt()

    # --- images --------------------------------------------------------------------------------------------------

    def put(self, image: StoredImage, png: bytes) -> None:
        """Keep an image, durably by the time this returns, in place of an earlier one with this id. Raises
        `StoreRefused`; then nothing is listed."""
        self._write(_newest(image.id, image.created), b"")
        self._write(f"{image.id}.png", png)
        self._write(f"{image.id}.json", canonical(image.to_dict()).encode())

    def get(self, image_id: uuid.UUID) -> bytes:
        """The PNG; `UnknownImage` where there is none."""
        _check_id(image_id)
        return self._read(f"{image_id}.png", image_id)

    def record(self, image_id: uuid.UUID) -> StoredImage:
        """The image's record; `UnknownImage` where there is none, `RecordError` for one that is not ours."""
        _check_id(image_id)
        name = f"{image_id}.json"
        return StoredImage.read(self._read(name, image_id), name)

    def delete(self, image_id: uuid.UUID) -> None:
        """Remove an image; `UnknownImage` where there is none, `StoreRefused` where the store is read-only."""
        self.get(image_id)
        try:
            created = self.record(image_id).created
        except (UnknownImage, RecordError):
            created = None
        self._remove(image_id, None if created is None else _newest(image_id, created))

    def page(self, limit: int, cursor: str | None = None) -> Page:
        """Up to `limit` images, the newest first, from after `cursor`. Raises `ConfigError` for a cursor of no
        page."""
        if cursor is not None and not re.fullmatch(CURSOR, cursor):
            raise ConfigError("cursor", cursor, "what an earlier page gave as next", f"{0:015d}-{uuid.UUID(int=0)}")
        records: list[StoredImage] = []
        names = self._names(cursor)
        with ThreadPoolExecutor(8, thread_name_prefix="records") as pool:
            while len(records) < limit:
                batch = list(islice(names, limit - len(records)))
                if not batch:
                    return Page(records, None)
                for name, record in zip(batch, pool.map(self._listed, batch), strict=True):
                    cursor = name
                    # A name of an earlier writing of the same image is passed over.
                    if record is not None and _newest(record.id, record.created).endswith(name):
                        records.append(record)
        return Page(records, cursor if next(names, None) else None)

    def remove_older(self, seconds: float) -> int:
        """Remove the images that are older than this, the unfinished jobs that nobody wrote for as long, and what
        interrupted writes left. How many images went."""
        removed = 0
        bound = time.time() - seconds
        for name in self._names(f"{LAST - round(1000 * bound):015d}-"):
            old = uuid.UUID(name[16:])
            record = self._listed(name)
            if record is not None and record.created > bound:
                self._erase(f"newest/{name}")  # it was written again since
                continue
            self._remove(old, f"newest/{name}")
            removed += 1
        for job in list(self.job_names()):
            if job.changed < bound:
                self.drop_job(job.id)
        self.remove_leftovers()
        return removed

    def remove_leftovers(self) -> None:
        """What a killed process was writing: obstore's LocalStore writes `name#1`, then renames it."""
        for path in self.folder.rglob("*#*") if self.folder else ():
            with contextlib.suppress(FileNotFoundError):  # it got its name meanwhile
                if re.search(r"#\d+$", path.name) and time.time() - path.stat().st_mtime > ABANDONED:
                    path.unlink()

    # --- jobs ------------------------------------------------------------------------------------------------------

    def put_job(self, job: JobRecord) -> None:
        """Keep a job's record, durably by the time this returns. Raises `StoreRefused`."""
        self._write(f"jobs/{job.id}.json", canonical(job.to_dict()).encode())

    def job(self, job_id: uuid.UUID) -> JobRecord:
        """The record of the job with this id; `UnknownImage` where there is none, `RecordError` for one that is not
        ours."""
        return self.read_job(job_id)[0]

    def read_job(self, job_id: uuid.UUID) -> tuple[JobRecord, Version]:
        """A job's record and its version. Raises as `job` does."""
        _check_id(job_id)
        name = f"jobs/{job_id}.json"
        content, version = self._read_version(name, job_id)
        return JobRecord.read(content, name), version

    def swap_job(self, job: JobRecord, version: Version | None) -> None:
        """Put a record in place of this version, None: where there is none. Raises `RecordChanged` where the store has
        another. A folder, and an object store that knows no conditions, take what comes last."""
        if self.folder is not None:  # LocalStore cannot compare, and creates by a hard link, which not all disks have
            return self.put_job(job)
        try:
            self._write(
                f"jobs/{job.id}.json", canonical(job.to_dict()).encode(), "create" if version is None else dict(version)
            )
        except _Unconditional:
            self.put_job(job)

    def job_names(self) -> Iterator[JobName]:
        """All jobs that have a record, without reading it; in any order."""
        for meta in self._listing("jobs"):
            name = re.fullmatch(r"jobs/([0-9a-f-]{36})\.json", meta["path"])
            if name:
                yield JobName(uuid.UUID(name[1]), meta["last_modified"].timestamp(), meta["e_tag"] or "")

    def drop_job(self, job_id: uuid.UUID) -> None:
        """Remove a job's record; nothing happens where there is none."""
        _check_id(job_id)
        self._erase(f"jobs/{job_id}.json")

    # --- objects ---------------------------------------------------------------------------------------------------

    def _write(self, path: str, content: bytes, mode: Any = "overwrite") -> None:
        try:
            obstore.put(self._objects, path, content, mode=mode, use_multipart=False)
            if self.folder is not None:
                _settle(self.folder / path)
        except (AlreadyExistsError, PreconditionError) as error:
            raise RecordChanged(path) from error
        except (NotImplementedError, NotSupportedError) as error:
            raise _Unconditional from error
        except (BaseError, OSError) as error:
            if mode != "overwrite" and "501 Not Implemented" in str(error):
                raise _Unconditional from error
            raise self._failure(error, "take the image") from error

    def _read(self, path: str, asked: object) -> bytes:
        return self._read_version(path, asked)[0]

    def _read_version(self, path: str, asked: object) -> tuple[bytes, Version]:
        try:
            got = obstore.get(self._objects, path)
            version = {name: tag for name in ("e_tag", "version") if (tag := got.meta[name])}
            return bytes(got.bytes()), version
        except FileNotFoundError as error:
            raise UnknownImage(str(asked)) from error
        except (BaseError, OSError) as error:
            raise StoreUnreachable(f"the store does not answer: {reason(error)}") from error

    def _erase(self, path: str) -> None:
        try:
            obstore.delete(self._objects, path)
        except FileNotFoundError:
            pass
        except (BaseError, OSError) as error:
            raise self._failure(error, "delete") from error

    def _failure(self, error: Exception, what: str) -> OSError:
        """What becomes of a write: an object store that answers 5xx, or not at all, may do so later."""
        if self.folder is None and isinstance(error, GenericError):
            return StoreUnreachable(f"the store does not {what}: {reason(error)}")
        return StoreRefused(f"the store refuses to {what}: {reason(error)}")

    def _remove(self, old: uuid.UUID, newest: str | None) -> None:
        for path in (f"{old}.json", f"{old}.png", newest):
            if path is not None:
                self._erase(path)

    def _names(self, after: str | None = None) -> Iterator[str]:
        """The images' names under `newest/`, in order, lazily where the store sorts."""
        listing = self._listing("newest", None if after is None else f"newest/{after}")
        names = (meta["path"].removeprefix("newest/") for meta in listing)
        yield from names if self.folder is None else _sorted(names)

    def _listing(self, prefix: str, offset: str | None = None) -> Iterator[Any]:
        try:
            for chunk in obstore.list(self._objects, prefix, offset=offset):
                yield from chunk
        except (BaseError, OSError) as error:
            raise StoreUnreachable(f"the store does not answer: {reason(error)}") from error

    def _listed(self, name: str) -> StoredImage | None:
        try:
            return self.record(uuid.UUID(name[16:]))
        except UnknownImage:
            return None
        except RecordError as error:  # damaged, or of a newer version: it hides no other image
            log.error("%s", error)
            return None

    def _adopt(self) -> None:
        """List the images of a folder that were put there by hand, or by a version that kept no records beside."""
        for path in self.folder.glob("*.png") if self.folder else ():
            if path.with_suffix(".json").exists() or not re.fullmatch(r"[0-9a-f-]{36}", path.stem):
                continue
            try:
                created = round(path.stat().st_mtime, 3)
                found = StoredImage(id=uuid.UUID(path.stem), created=created, record=read_record(path))
                self._write(_newest(found.id, created), b"")
                self._write(f"{found.id}.json", canonical(found.to_dict()).encode())
            except (StoreRefused, ValueError):  # no image of ours, or a name that only looks like an id
                continue  # it can still be fetched


def reason(error: Exception) -> str:
    """Why, in a few words for a client: no paths, no addresses. The log has the rest."""
    code = re.search(r"os error (\d+)", str(error))
    if code or getattr(error, "errno", None):
        return os.strerror(int(code[1]) if code else error.errno)  # type: ignore[attr-defined]
    log.error("the store fails: %s", str(error).partition("\n")[0])
    return "the log says why" if isinstance(error, GenericError) else type(error).__name__


def check_place(place: str) -> Path | str:
    """A folder, or a URL of a known scheme; `ValueError` says the rule."""
    scheme, marked, rest = place.partition("://")
    if not place.strip() or (marked and (scheme not in SCHEMES or not (rest or scheme == "memory"))):
        schemes = ", ".join(f"{name}://" for name in SCHEMES)
        raise ValueError(f"must be a folder, or a URL that begins with {schemes}, such as {EXAMPLE}")
    return place if marked else Path(place).expanduser()


def _folder(place: Path | str) -> Path | None:
    """The folder that a place is, or None for an object store."""
    checked = place if isinstance(place, Path) else check_place(place)
    if isinstance(checked, Path):
        return checked
    return Path(unquote(urlsplit(checked).path)) if checked.startswith("file://") else None


def _settle(path: Path) -> None:
    """Have the disk hold a file and its name: obstore's LocalStore leaves both to the system, for some seconds."""
    for place in (path, path.parent):
        handle = os.open(place, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _newest(image_id: uuid.UUID, created: float) -> str:
    return f"newest/{LAST - round(1000 * created):015d}-{image_id}"


def _sorted(names: Iterator[str]) -> Iterator[str]:
    """In order, at the price of the first few: a page of a long list needs no full sort."""
    heap = list(names)
    heapq.heapify(heap)
    while heap:
        yield heapq.heappop(heap)


def _check_id(image_id: uuid.UUID) -> None:
    if not isinstance(image_id, uuid.UUID):
        raise TypeError(f"an image's id must be a UUID; received {image_id!r}")
