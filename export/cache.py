"""The user's cache of engine folders: find, build once, list, prune."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock
from pydantic import BaseModel, ConfigDict

from hcma_fast.config import cache_root
from hcma_fast.errors import EngineError, HcmaError, InputError
from hcma_fast.export.build import Progress, build
from hcma_fast.export.kernel_cache import kernel_folders
from hcma_fast.export.key import key_of, key_parts
from hcma_fast.export.manifest import MANIFEST_FILE, Manifest, load_manifest
from hcma_fast.export.target import COMPILED_BACKENDS, Target
from hcma_fast.models.checkpoint.folder import Checkpoint, ModelSource, load_components

_log = logging.getLogger("hcma_fast")
_KEY_LETTERS = 24
#: engine folders, and what a build leaves when it is killed; nothing else there is ours to remove
_OURS = re.compile(
    rf"\.?(?P<name>({'|'.join(COMPILED_BACKENDS)})-[0-9a-f]{{{_KEY_LETTERS}}})(\.(part|old)-\w+)?"
)
State = Literal["current", "stale", "elsewhere", "damaged", "building", "leftover"]


def cached_folder(weights_hash: str, target: Target) -> Path:
    """The folder in the user's cache where the engine is, or would be."""
    key = key_of(key_parts(weights_hash, target))
    return cache_root() / f"{target.backend}-{key[:_KEY_LETTERS]}"


def cached_engine(weights_hash: str, target: Target) -> Path | None:
    """The engine folder in the user's cache, checked; None when it is missing or damaged.

    The log says why: what is damaged, or what the nearest engine in the cache differs in.
    """
    folder = cached_folder(weights_hash, target)
    if not (folder / MANIFEST_FILE).is_file():
        differs = _nearest_difference(key_parts(weights_hash, target))
        if differs:
            _log.info("The engines in the cache differ in: %s.", ", ".join(differs))
        return None
    try:
        load_manifest(folder)
    except EngineError as error:
        _log.warning("The cached engine is built again. %s", error)
        return None
    return folder


def find_or_build(
    weights_hash: str,
    load: Callable[[], ModelSource],
    target: Target,
    *,
    progress: Progress | None = None,
    force: bool = False,
) -> Path:
    """The engine folder in the user's cache, built when it is missing or damaged, or by ``force``.

    Two processes that want the same engine build it once: the second waits for the first.

    Args:
        load: gives the model, when there is something to build.

    Raises:
        InputError: the cache cannot be written.
        BackendError, EngineError, DeviceMemoryError: see :func:`hcma_fast.export.build.build`.
    """
    folder = cached_folder(weights_hash, target)
    if not force and (found := cached_engine(weights_hash, target)) is not None:
        return found
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        held = _lock(folder.parent, folder.name).acquire()
    except OSError as error:
        raise InputError(
            f"the engine cache cannot be written: {error.strerror}",
            value=str(folder.parent),
            remedy="Set HCMA_FAST_CACHE to a folder that you may write to.",
        ) from error
    with held:
        missing = not (folder / MANIFEST_FILE).is_file()  # and why, has been said above
        if force or missing or cached_engine(weights_hash, target) is None:
            # what a killed build left; the lock says that nobody is at work on it
            for leftover in folder.parent.glob(f".{folder.name}.*-*"):
                shutil.rmtree(leftover, ignore_errors=True)
            if missing:
                # half an engine, after somebody's clean-up
                shutil.rmtree(folder, ignore_errors=True)
            build(load(), folder, target, progress=progress, force=True)
    return folder


def engine_folder(
    checkpoint: Checkpoint, target: Target, *, progress: Progress | None = None
) -> Path:
    """:func:`find_or_build` for a checkpoint, whose weights are read only to build."""
    return find_or_build(
        checkpoint.weights_hash, lambda: load_components(checkpoint), target, progress=progress
    )


class CacheEntry(BaseModel):
    """One folder of the cache: an engine, or the kernels that were compiled for one."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    folder: Path
    state: State
    """stale: of other versions, or for an engine that is gone, so it is never found again;
    elsewhere: for a backend that is not installed here, or another machine; building: a process is
    at work on it; leftover: of a build that was killed"""
    reason: str
    backend: str | None
    precision: str | None
    preset: str | None
    size_bytes: int
    age_days: float


def list_cache() -> list[CacheEntry]:
    """All engine folders in the cache, and engines' kernels, the newest first.

    Files are not hashed.
    """
    root, entries = cache_root(), []
    for folder in root.iterdir() if root.is_dir() else ():
        # a build that runs beside us may take files away
        with contextlib.suppress(FileNotFoundError):
            if _OURS.fullmatch(folder.name) and folder.is_dir():
                entries.append(_entry(folder))
    entries += _kernel_entries()
    return sorted(entries, key=lambda entry: entry.age_days)


def prune_cache(*, older_than_days: float | None = None, everything: bool = False) -> list[Path]:
    """Remove what can no longer be used, and what is older than asked; returns what was removed.

    A folder that somebody builds at this moment is left alone, and so is what another environment
    or machine with the same cache may use.

    Raises:
        InputError: a folder cannot be removed.
    """

    def unwanted(entry: CacheEntry) -> bool:
        old = older_than_days is not None and entry.age_days > older_than_days
        return everything or old or entry.state not in ("current", "elsewhere")

    removed = []
    for entry in list_cache():
        match = _OURS.fullmatch(entry.folder.name)
        if match is None or not unwanted(entry):
            continue
        try:
            with _lock(entry.folder.parent, match["name"]).acquire(blocking=False):
                if not entry.folder.exists():
                    continue  # of a build that has ended since
                _remove(entry.folder)
        except TimeoutError:
            _log.warning("%s is left: it is being built.", entry.folder)
            continue
        removed.append(entry.folder)
    # after the engines: their kernels go with them
    for entry in filter(unwanted, _kernel_entries()):
        _remove(entry.folder)
        removed.append(entry.folder)
    return removed


def _lock(root: Path, name: str) -> FileLock:
    """Of the engine folder of that name; who holds it may write there."""
    return FileLock(root / f".{name}.lock")


def _is_building(folder: Path, name: str) -> bool:
    """Is a process at work on the engine of that name, of which ``folder`` is a part?"""
    lock = _lock(folder.parent, name)
    # a list makes no files, and needs no right to
    if not Path(lock.lock_file).exists():
        return False
    try:
        with lock.acquire(blocking=False):
            return False
    except TimeoutError:
        return True
    except OSError:
        # in a cache that is only to be read
        return False


def _remove(path: Path) -> None:
    try:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    except OSError as error:
        raise InputError(
            f"this cannot be removed from the cache: {error.strerror}",
            value=str(path),
            remedy="Remove it by hand.",
        ) from error


def _kernel_entries() -> list[CacheEntry]:
    entries = []
    for folder, has_engine in kernel_folders():
        with contextlib.suppress(FileNotFoundError):
            entry = CacheEntry(
                folder=folder,
                state="current" if has_engine else "stale",
                reason="kernels" if has_engine else "kernels of an engine that is gone",
                backend=None,
                precision=None,
                preset=None,
                size_bytes=_size(folder),
                age_days=_age_days(folder),
            )
            entries.append(entry)
    return entries


def _entry(folder: Path) -> CacheEntry:
    manifest, state, reason = _judge(folder)
    return CacheEntry(
        folder=folder,
        state=state,
        reason=reason,
        backend=manifest.backend if manifest else None,
        precision=manifest.precision if manifest else None,
        preset=manifest.info.preset if manifest else None,
        size_bytes=_size(folder),
        age_days=_age_days(folder),
    )


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _age_days(folder: Path) -> float:
    return (time.time() - folder.stat().st_mtime) / 86400


def _judge(folder: Path) -> tuple[Manifest | None, State, str]:
    if folder.name.startswith("."):
        match = _OURS.fullmatch(folder.name)
        if match is not None and _is_building(folder, match["name"]):
            return None, "building", "by a process that runs"
        return None, "leftover", "of a build that did not end"
    try:
        manifest = Manifest.model_validate_json((folder / MANIFEST_FILE).read_bytes())
    except (OSError, ValueError, HcmaError) as error:
        return None, "damaged", f"manifest: {type(error).__name__}"
    try:
        parts = key_parts(manifest.weights_hash, manifest.target)
    except HcmaError as error:  # the backend is gone
        return manifest, "elsewhere", str(error.what)
    differs = [name for name, value in parts.items() if manifest.key_parts.get(name) != value]
    if "machine" in differs:
        return manifest, "elsewhere", "for another machine"
    if differs:
        return manifest, "stale", f"another {' and '.join(differs)}"
    return manifest, "current", ""


def _nearest_difference(parts: dict[str, str]) -> list[str]:
    """In what the most similar engine of the cache differs; nothing when there is no engine.

    One of the same model, if there is any.
    """
    found = [
        [name for name, value in parts.items() if other.get(name) != value]
        for other in _all_key_parts()
    ]
    return min(found, key=lambda names: ("weights" in names, len(names)), default=[])


def _all_key_parts() -> Iterator[dict[str, Any]]:
    for path in cache_root().glob(f"*/{MANIFEST_FILE}"):
        try:
            parts = json.loads(path.read_bytes())["key_parts"]
        except (OSError, ValueError, KeyError):
            continue
        if isinstance(parts, dict):
            yield parts
