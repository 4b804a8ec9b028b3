"""Files that torch pickled (.ckpt, .pth, .bin): made into safetensors once, by a child process.

A pickle is a program. torch reads it with ``weights_only=True``, which runs none of it; should that
fail one day, it happens in a process with little memory and no part of ours.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

from filelock import FileLock

from hcma_fast.config import cache_root
from hcma_fast.errors import OutputError, WeightsError
from hcma_fast.files import make_folder
from hcma_fast.models.checkpoint.formats.tensor_file import TensorFile, file_kind
from hcma_fast.models.checkpoint.json_files import shorten
from hcma_fast.opened import OpenedFile

_log = logging.getLogger("hcma_fast")
_PROGRAM = Path(__file__).with_name("unpickle.py")
_TIMEOUT_S = 900
_KEY_LETTERS = 32
#: what torch needs to be imported; tokens and keys of the user stay here
_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "SYSTEMROOT", "TMPDIR", "LANG")


def converted_folder() -> Path:
    """Where the safetensors that were made of pickles lie."""
    return cache_root() / "converted"


def as_safetensors(path: Path) -> Path:
    """The file itself if it is safetensors, else what its pickle was converted to.

    Raises:
        WeightsError: it is of another format, damaged, or holds code.
        OutputError: the cache cannot be written.
    """
    if file_kind(path) == "safetensors":
        return path
    try:
        source = OpenedFile(path)
    except OSError as error:
        raise OutputError.from_os(error, path) from error
    folder = converted_folder()
    target = folder / f"{source.sha256[:_KEY_LETTERS]}.safetensors"
    make_folder(folder)
    with FileLock(folder / f".{target.name}.lock"):
        if not target.exists():
            _log.info("Converting %s to safetensors, once: %s", path, target)
            _convert(source, target)
    return target


def _convert(source: OpenedFile, target: Path) -> None:
    partial = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with source.named() as name:
            report = _run(name, source, partial)
        if "refused" in report:
            raise _refused(source.path, report["refused"], report.get("code"))
        # what the child wrote is read like any file from outside
        TensorFile.read(partial)
        partial.replace(target)
    except OSError as error:
        raise OutputError.from_os(error, target) from error
    finally:
        partial.unlink(missing_ok=True)


def _run(name: Path, source: OpenedFile, partial: Path) -> dict[str, str]:
    """What the child says: {} for a file that it wrote."""
    # -I: neither the caller's folder nor PYTHON* variables; the program needs torch alone
    command = [sys.executable, "-I", str(_PROGRAM), str(name), str(partial), str(source.size)]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_TIMEOUT_S,
            pass_fds=(source.descriptor,) if os.name == "posix" else (),
            env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"refused": f"it was not read within {_TIMEOUT_S} seconds"}
    if done.returncode:
        # killed for memory or crashed: the file asked for more than it can hold
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        return {"refused": f"the process that read it ended with {done.returncode} {lines[-1:]}"}
    report = json.loads(done.stdout)
    return {str(key): str(value) for key, value in report.items()}


def _refused(path: Path, reason: str, code: str | None) -> WeightsError:
    if code is not None:
        return WeightsError(
            f"this file asks to call {shorten(code)} when it is read: it holds code, not weights "
            "alone. Nothing of it was run",
            value=str(path),
            remedy="Delete it, unless you know where it is from; look for another copy.",
        )
    return WeightsError(
        f"this file cannot be read as weights: {shorten(reason)}",
        value=str(path),
        remedy="It is damaged, incomplete or not of torch: download it again, or look for the "
        "model in safetensors.",
    )
