"""Image files by the names that annotations give them."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath

from hcma_fast.errors import InputError


class ImageFolder:
    """Files below one folder, or anywhere below ``root`` where that is given.

    Names may have sub-folders, with either slash. A name is found however its accents are composed
    (NFC or NFD): macOS stores other bytes than annotations have.
    """

    def __init__(self, folder: Path, root: Path | None = None) -> None:
        """Raises InputError: ``folder`` cannot be read."""
        self.folder = folder
        self._root = None if root is None else Path(os.path.abspath(root))
        self._names: dict[Path, dict[str, str]] = {}
        try:
            self._list(folder)
        except OSError as error:
            raise InputError(
                f"cannot read the folder of images: {error.strerror}",
                value=str(folder),
                remedy="Give the folder of the image files.",
            ) from error

    def find(self, name: str) -> Path | None:
        """The file that ``name`` means; None where there is none.

        Raises:
            InputError: the name is absolute or leaves the folder, and no root allows it; or it
                names no file at all.
        """
        parts = _parts(name)
        outside = parts[:1] == ("/",) or ".." in parts
        if outside and self._root is None:
            raise InputError(
                "an image's file name is absolute or leaves the folder of images",
                value=name,
                remedy="Allow the folder that it lies in by --root FOLDER.",
            )
        if not outside:
            return self._walk(self.folder, parts)
        assert self._root is not None
        place = Path(os.path.normpath(Path(os.path.abspath(self.folder), *parts)))
        if not place.is_relative_to(self._root):
            raise InputError(
                f"an image's file name leaves the folder of --root, {self._root}",
                value=name,
                remedy="Give a --root that holds all images.",
            )
        return self._walk(self._root, place.relative_to(self._root).parts)

    def _walk(self, place: Path, parts: Sequence[str]) -> Path | None:
        for part in parts:
            try:
                names = self._list(place)
            except OSError:
                return None
            actual = names.get(part) or names.get(unicodedata.normalize("NFC", part))
            if actual is None:
                return None
            place /= actual
        return place

    def _list(self, folder: Path) -> dict[str, str]:
        """What the folder holds, by its names and by their composed form.

        Listed once: a question for each of 100,000 files takes minutes on a network drive.
        """
        if folder not in self._names:
            entries = sorted(os.listdir(folder))
            composed = {unicodedata.normalize("NFC", entry): entry for entry in entries}
            self._names[folder] = composed | {entry: entry for entry in entries}
        return self._names[folder]


def _parts(name: str) -> tuple[str, ...]:
    """The name's folders and file; an absolute name begins with "/"."""
    windows = PureWindowsPath(name)
    path = PurePosixPath(windows.as_posix())
    if windows.drive:
        raise InputError(
            "an image's file name has a drive",
            value=name,
            remedy="Write names relative to the folder of images.",
        )
    parts = tuple(part for part in path.parts if part != ".")
    if not parts or "\0" in name:
        raise InputError("an image's file name is empty", value=name, remedy="Name its file.")
    if parts[-1].startswith("._"):
        raise InputError(
            "this file holds macOS's metadata of another file, and no image",
            value=name,
            remedy="Name the image, whose name has no ._ before it.",
        )
    return parts
