"""The user's cache of engine folders: find, build once, list, prune."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock
from pydantic import BaseModel, ConfigDict

from hcma_fast.config import cache_root
from hcma_fast.errors import EngineError, HcmaError, InputError
from hcma_fast.export.build import Progress, build
from hcma_fast.export.kernel_cache import kernel_folders, remove_kernels
from hcma_fast.export.key import key_of, key_parts
from hcma_fast.export.manifest import (
    MANIFEST_FILE,
    FormatError,
    Manifest,
    VerifiedFolder,
    manifest_values,
    open_folder,
    read_manifest,
)
from hcma_fast.export.removal import has_listing, remove_engine
from hcma_fast.export.target import COMPILED_BACKENDS, Target
from hcma_fast.models.checkpoint.folder import Checkpoint, ModelSource, load_components

_log = logging.getLogger("hcma_fast")
_KEY_LETTERS = 24
_SHOWN = 5
#: engine folders, and what a build leaves when it is killed; nothing else there is ours to remove
_OURS = re.compile(
    rf"\.?(?P<name>({'|'.join(COMPILED_BACKENDS)})-[0-9a-f]{{{_KEY_LETTERS}}})(\.(part|old)-\w+)?"
)
State = Literal["current", "stale", "elsewhere", "damaged", "building", "leftover"]


def cached_folder(weights_hash: str, target: Target) -> Path:
    """The folder in the user's cache where the engine is, or would be."""
    key = key_of(key_parts(weights_hash, target))
    return cache_root() / f"{target.backend}-{key[:_KEY_LETTERS]}"


def cached_engine(weights_hash: str, target: Target) -> VerifiedFolder | None:
    """The engine folder in the user's cache, opened; None when it is missing, or not usable.

    The log says why: what is damaged, what an engine under this name is of instead, or what the
    nearest engine in the cache differs in.
    """
    folder, parts = cached_folder(weights_hash, target), key_parts(weights_hash, target)
    if not os.path.lexists(folder / MANIFEST_FILE):
        differs = _nearest_difference(parts)
        if differs:
            _log.info("The engines in the cache differ in: %s.", ", ".join(differs))
        return None
    try:
        opened = open_folder(folder)
    except EngineError as error:
        _log.warning("The cached engine is built again. %s", error)
        return None
    differs = _differences(opened.manifest, parts, target)
    if differs:
        _log.warning(
            "The cached engine is built again: %s is an engine of another %s.",
            folder,
            ", ".join(differs),
        )
        return None
    return opened


def _differences(manifest: Manifest, parts: dict[str, str], target: Target) -> list[str]:
    """In what an engine is not the one that was asked for."""
    differs = [name for name, value in parts.items() if manifest.key_parts.get(name) != value]
    if manifest.weights_hash != parts["weights"] and "weights" not in differs:
        differs.append("weights")
    # no batch sizes, and the default ones, are one target
    built_for = replace(manifest.target, batch=manifest.target.batch_range)
    if not differs and built_for != replace(target, batch=target.batch_range):
        differs.append("target")
    if not differs and manifest.key != key_of(parts):
        differs.append("key")
    return differs


def find_or_build(
    weights_hash: str,
    load: Callable[[], ModelSource],
    target: Target,
    *,
    progress: Progress | None = None,
    force: bool = False,
) -> VerifiedFolder:
    """The engine folder in the user's cache, opened.

    It is built when it is missing or damaged, or by ``force``.

    Two processes that want the same engine build it once: the second waits for the first.

    Args:
        load: gives the model, when there is something to build.

    Raises:
        InputError, OutputError: the cache cannot be written; or there is something else where the
            engine would be, which is not deleted.
        BackendError, EngineError, DeviceMemoryError: see :func:`hcma_fast.export.build.build`.
    """
    folder = cached_folder(weights_hash, target)
    found = None if force else cached_engine(weights_hash, target)
    if found is not None:
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
        missing = not os.path.lexists(folder / MANIFEST_FILE)  # and why, has been said above
        if force or missing or (found := cached_engine(weights_hash, target)) is None:
            # what a killed build left; the lock says that nobody is at work on it
            for leftover in folder.parent.glob(f".{folder.name}.*-*"):
                _remove_or_say(leftover)
            if folder.is_dir() and not has_listing(folder):
                # half an engine, after somebody's clean-up, or one whose manifest is damaged
                remove_engine(folder)
            build(load(), folder, target, progress=progress, force=True)
            found = open_folder(folder)
    return found


def engine_folder(
    checkpoint: Checkpoint, target: Target, *, progress: Progress | None = None
) -> VerifiedFolder:
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
    or machine with the same cache may use. What holds files that are not of an engine, or cannot be
    removed, is left with a warning.
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
                # or of a build that has ended since
                if entry.folder.exists() and _remove_or_say(entry.folder):
                    removed.append(entry.folder)
        except TimeoutError:
            _log.warning("%s is left: it is being built.", entry.folder)
    # after the engines: their kernels go with them
    removed += [
        entry.folder
        for entry in filter(unwanted, _kernel_entries())
        if _remove_or_say(entry.folder, remove_kernels)
    ]
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


def _remove_or_say(path: Path, remove: Callable[[Path], None] = remove_engine) -> bool:
    """Remove a folder of the cache, if it holds nothing but what we wrote."""
    if path.is_symlink():
        _log.warning("%s is left: it is a link.", path)
        return False
    try:
        remove(path)
    except HcmaError as error:
        _log.warning("%s is left: %s", path, error)
        return False
    return True


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
        manifest = read_manifest(folder)
    except EngineError as error:
        state: State = "stale" if isinstance(error, FormatError) else "damaged"
        return None, state, error.what.split(": ")[1]
    try:
        parts = key_parts(manifest.weights_hash, manifest.target)
    except HcmaError as error:  # the backend is gone
        return manifest, "elsewhere", str(error.what)
    differs = _differences(manifest, parts, manifest.target)
    if "machine" in differs:
        return manifest, "elsewhere", "for another machine"
    if differs:
        return manifest, "stale", f"another {' and '.join(differs)}"
    if folder != cached_folder(manifest.weights_hash, manifest.target):
        return manifest, "stale", "an engine under another one's name"
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


def _all_key_parts() -> list[dict[str, Any]]:
    """Of every engine in the cache; one note names the manifests that cannot be read."""
    found, unread = [], []
    for path in sorted(cache_root().glob(f"*/{MANIFEST_FILE}")):
        if path.parent.name.startswith("."):
            continue
        try:
            parts = manifest_values(path.parent)["key_parts"]
        except (OSError, InputError, KeyError, TypeError, IndexError):
            parts = None
        if isinstance(parts, dict):
            found.append(parts)
        else:
            unread.append(str(path))
    if unread:
        _log.warning("Not of engines, and skipped in the cache: %s.", ", ".join(unread[:_SHOWN]))
    return found
