"""What TensorRT libraries compile or measure for an engine when they load it, in the user's cache.

Beside the engines, not in their folders, whose files are hashed and do not change. Each engine has
a folder here, ``kernels/<sha256>``; the file ``engine`` in it names where the engine lies, so that
what belongs to no engine any more can be found.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
from pathlib import Path
from typing import Any

from hcma_fast.config import cache_root
from hcma_fast.errors import InputError, OutputError
from hcma_fast.export.manifest import hash_file, manifest_values
from hcma_fast.files import read_file, read_json, write_whole

_ENGINE = "engine"
_HASHES = "hashes.json"
_LETTERS = 24
_MAX_BYTES = 2**20
#: of earlier versions a file, with the GPU in its name
_OURS = re.compile(rf"[0-9a-f]{{{_LETTERS}}}(-sm\d+-\d+)?")
#: what the libraries write: TensorRT-RTX's kernels, and the engines and timings of ONNX Runtime's
#: TensorRT; and what a process that was killed leaves
_WRITTEN = re.compile(
    rf"{_ENGINE}|{re.escape(_HASHES)}|sm\d+(-\d+)?|.+\.(engine|profile|timing)|\..+\.\d+\.part"
)
_log = logging.getLogger("hcma_fast")


def kernel_folder(engine: Path, sha256: str) -> Path:
    """The folder for what is compiled for the file ``engine``, made where that is possible.

    Where it is not, engines run all the same, and say that they cannot keep their kernels.
    """
    folder = cache_root() / "kernels" / sha256[:_LETTERS]
    with contextlib.suppress(OSError, OutputError):
        folder.mkdir(parents=True, exist_ok=True)
        place = str(engine.resolve()).encode()
        write_whole(folder / _ENGINE, lambda file: file.write(place))
    return folder


def kernel_folders() -> list[tuple[Path, bool]]:
    """Everything that is kept, and whether its engine is still where it was."""
    root = cache_root() / "kernels"
    paths = root.iterdir() if root.is_dir() else ()
    return [(path, _has_engine(path)) for path in paths if _OURS.fullmatch(path.name)]


def remove_kernels(path: Path) -> None:
    """Delete one of :func:`kernel_folders`, and nothing that the libraries did not write.

    Raises:
        InputError: it holds something else; then nothing is deleted.
        OutputError: it cannot be read or written.
    """
    try:
        if not path.is_dir():
            path.unlink()
            return
        files = sorted(path.iterdir())
        strange = [p for p in files if not _WRITTEN.fullmatch(p.name) or _is_folder(p)]
        if strange:
            raise InputError(
                "this folder of compiled kernels holds something else, so it is not deleted",
                value=", ".join(map(str, strange[:5])),
                remedy="Move these files away.",
            )
        for file in files:
            file.unlink()
        path.rmdir()
    except OSError as error:
        raise OutputError.from_os(error, path) from error


def drop_damaged(folder: Path) -> None:
    """Remove the libraries' files that :func:`note_hashes` does not know, or knows as others.

    A library reads files by names of its own kind only, so that others are left alone.
    """
    known = _hashes(folder)
    for path in _files(folder):
        if known.get(path.name) != hash_file(path):
            _log.warning("%s is damaged, or of a run that was cut off: it is made anew.", path)
            path.unlink()


def note_hashes(folder: Path) -> None:
    """Remember the files of ``folder``, for :func:`drop_damaged`."""
    hashes = json.dumps({path.name: hash_file(path) for path in _files(folder)}).encode()
    with contextlib.suppress(OutputError):  # the next process makes them again
        write_whole(folder / _HASHES, lambda file: file.write(hashes))


def _files(folder: Path) -> list[Path]:
    """Of the libraries."""
    found = folder.iterdir() if folder.is_dir() else ()
    ours = (path for path in found if _WRITTEN.fullmatch(path.name))
    return [path for path in ours if path.is_file() and path.name not in (_ENGINE, _HASHES)]


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _hashes(folder: Path) -> dict[str, Any]:
    try:
        known = read_json(folder / _HASHES, "the list of kernels", limit=_MAX_BYTES)
    except InputError:
        return {}
    return known if isinstance(known, dict) else {}


def _has_engine(folder: Path) -> bool:
    try:
        engine = Path(
            read_file(folder / _ENGINE, "the name of an engine", limit=_MAX_BYTES).decode()
        )
        graphs = manifest_values(engine.parent)["graphs"].values()
        hashes = [str(graph["sha256"]) for graph in graphs if graph["file"] == engine.name]
        return engine.is_file() and any(text.startswith(folder.name) for text in hashes)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):
        return False
