"""What TensorRT libraries compile or measure for an engine when they load it, in the user's cache.

Beside the engines, not in their folders, whose files are hashed and do not change. Each engine has
a folder here, ``kernels/<sha256>``; the file ``engine`` in it names where the engine lies, so that
what belongs to no engine any more can be found.
"""

from __future__ import annotations

import contextlib
import json
import logging
from pathlib import Path

from hcma_fast.config import cache_root
from hcma_fast.errors import OutputError
from hcma_fast.export.manifest import MANIFEST_FILE, hash_file
from hcma_fast.files import write_whole

_ENGINE = "engine"
_HASHES = "hashes.json"
_LETTERS = 24
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
    return [(path, _has_engine(path)) for path in (root.iterdir() if root.is_dir() else ())]


def drop_damaged(folder: Path) -> None:
    """Remove the files that :func:`note_hashes` does not know, or knows as others."""
    try:
        known = json.loads((folder / _HASHES).read_bytes())
    except (OSError, ValueError):
        known = {}
    for path in _files(folder):
        if not isinstance(known, dict) or known.get(path.name) != hash_file(path):
            _log.warning("%s is damaged, or of a run that was cut off: it is made anew.", path)
            path.unlink()


def note_hashes(folder: Path) -> None:
    """Remember the files of ``folder``, for :func:`drop_damaged`."""
    hashes = json.dumps({path.name: hash_file(path) for path in _files(folder)}).encode()
    with contextlib.suppress(OutputError):  # the next process makes them again
        write_whole(folder / _HASHES, lambda file: file.write(hashes))


def _files(folder: Path) -> list[Path]:
    found = folder.iterdir() if folder.is_dir() else ()
    return [path for path in found if path.is_file() and path.name not in (_ENGINE, _HASHES)]


def _has_engine(folder: Path) -> bool:
    try:
        engine = Path((folder / _ENGINE).read_text())
        graphs = json.loads((engine.parent / MANIFEST_FILE).read_bytes())["graphs"].values()
        hashes = [graph["sha256"] for graph in graphs if graph["file"] == engine.name]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    return engine.is_file() and any(text.startswith(folder.name) for text in hashes)
