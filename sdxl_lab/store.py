"""Where pictures stay: a folder of PNGs, one a picture, each carrying its own record.

An id is a UUID, minted or derived by the caller; anything else is unknown, and never becomes part of a path.
"""

import os
import uuid
from pathlib import Path
from tempfile import NamedTemporaryFile


class UnknownPicture(KeyError):
    """No picture has this id."""

    def __str__(self) -> str:
        return f"no picture has the id {self.args[0]!r}"


class FolderStore:
    """Pictures as files. A picture is there whole or not at all: it is written beside its place, then renamed."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)

    def put(self, picture_id: uuid.UUID, png: bytes) -> None:
        path = self._path(picture_id)
        self.folder.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=self.folder, suffix=".part", delete=False) as file:
            try:
                file.write(png)
                file.flush()
                os.fsync(file.fileno())
                os.replace(file.name, path)
            except BaseException:
                Path(file.name).unlink(missing_ok=True)
                raise

    def get(self, picture_id: str | uuid.UUID) -> bytes:
        """The PNG; `UnknownPicture` for an id that is no UUID or has no picture."""
        try:
            return self._path(picture_id if isinstance(picture_id, uuid.UUID) else uuid.UUID(picture_id)).read_bytes()
        except (ValueError, FileNotFoundError, AttributeError, TypeError) as error:
            raise UnknownPicture(str(picture_id)) from error

    def _path(self, picture_id: uuid.UUID) -> Path:
        if not isinstance(picture_id, uuid.UUID):
            raise TypeError(f"a picture's id must be a UUID; received {picture_id!r}")
        return self.folder / f"{picture_id}.png"
