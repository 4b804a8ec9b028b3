"""Mixed requests for a long time, with faults on the way: does it stay as it was at the start?

A worker process generates through ``runtime.generator``. After a share of the time it is killed,
and another one takes its place; from time to time it is given a request that must be refused, of
one kind after the other (``bench.soak.bad_requests``), and its disk is full. Memory and latency are
judged over the second process, without its beginning, where caches and allocators fill. A leak is
what is allocated and not given back, of the C library's memory and of Python's objects: the
resident memory also has steps, as an allocator asks the system for more and keeps what was freed.
"""

from __future__ import annotations

import gc
import hashlib
import resource
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hcma_fast.bench.shared.machine import describe_machine
from hcma_fast.bench.shared.memory import allocated_mib, status_mib
from hcma_fast.bench.soak.bad_requests import bad_requests, check_refused
from hcma_fast.bench.soak.report import JUDGED_ROUNDS, SoakReport, drift, slope_per_hour
from hcma_fast.bench.speed.harness.contestants import SEED, Ours, Work, build_missing, open_pipe
from hcma_fast.bench.speed.harness.workers import Contestant, Run, Worker, worker
from hcma_fast.config import AlignmentSettings
from hcma_fast.errors import BackendError, HcmaError, OutputError, UsageError
from hcma_fast.files import write_whole
from hcma_fast.runtime.request import Request

_KILL_AT, _SETTLED = 0.15, 0.3
"""Shares: of the time, until the kill; of the second process's rounds, that are not judged"""
_KILL_AFTER_S = 0.1
_COLLECT_EVERY = 20
"""Rounds: what Python's full collection finds is no leak, and by itself Python puts that off until
a quarter of all objects wait for it"""
_FAULT_EVERY = 3
"""Rounds; the first one has both faults"""
_FULL_BYTES = 64
"""That a file may have while the disk is full"""
_SCENES = 12
"""Prompts with their layouts: few, for the cache of encodings grows with every new one"""


def soak(
    model: str = "tiny",
    *,
    backend: str = "onnxruntime",
    minutes: float = 20.0,
    max_batch: int = 4,
    progress: Callable[[str], None] = lambda line: None,
) -> SoakReport:
    """Generate until the time is over.

    Raises:
        UsageError: not a positive time or batch.
        WeightsError, BackendError, EngineError: as in ``HCMAPipeline.from_pretrained``.
        HcmaError: a fault was not handled: the message says which.
    """
    if not minutes > 0 or max_batch < 1:
        raise UsageError(
            "minutes and the batch must be above 0",
            value=(minutes, max_batch),
            remedy="Use 20 and 4.",
        )
    build_missing(model, Ours(backend), None, progress)

    def said(process: int) -> Callable[[str], None]:
        return lambda line: progress(f"process {process}, {line}")

    end = time.monotonic() + 60 * minutes
    with tempfile.TemporaryDirectory() as folder:
        load = partial(load_soak, model, backend, max_batch, folder)
        progress(f"process 1, for {_KILL_AT:.0%} of {minutes:g} min, then it is killed")
        with worker("soak", load) as first:
            before = _rounds(first, time.monotonic() + _KILL_AT * 60 * minutes, said(1))
            _kill(first)
        progress("killed; another process takes its place")
        with worker("soak", load) as second:
            start = time.monotonic()
            after = _rounds(second, end, said(2))
    at_s = np.array([at - start for at, _ in after])
    runs = [run for _, run in after]
    rss = np.array([run.figures["rss_mib"] for run in runs])
    allocated = np.array([run.figures.get("allocated_mib", np.nan) for run in runs])
    blocks = np.array([run.figures["python_blocks"] for run in runs])
    known = bool(np.isfinite(allocated).all())
    seconds = np.array([run.figures["reference_s"] for run in runs])
    kept = slice(int(_SETTLED * len(runs)), None)
    judged = len(runs[kept])
    enough = judged >= JUDGED_ROUNDS
    every = [run for _, run in before] + runs
    hashes = {run.result.tobytes() for run in every}
    return SoakReport(
        model=model,
        backend=backend,
        minutes=minutes,
        rounds=len(every),
        images=int(sum(run.figures["images"] for run in every)),
        refused=_counted("refused: ", every),
        full_disks=int(sum(run.figures["full_disks"] for run in every)),
        kills=1,
        same_image=len(hashes) == 1,
        image_sha256=runs[-1].result.astype(np.uint8).tobytes().hex(),
        seconds=tuple(seconds.tolist()),
        at_s=tuple(at_s.tolist()),
        rss_mib=tuple(rss.tolist()),
        judged_rounds=judged,
        rss_mib_per_hour=slope_per_hour(at_s[kept], rss[kept]) if enough else None,
        python_blocks=tuple(blocks.astype(int).tolist()),
        python_blocks_per_hour=slope_per_hour(at_s[kept], blocks[kept]) if enough else None,
        allocated_mib=tuple(allocated.tolist()) if known else (),
        allocated_mib_per_hour=(
            slope_per_hour(at_s[kept], allocated[kept]) if enough and known else None
        ),
        latency_drift=drift(seconds[kept]) if enough else None,
        machine=describe_machine(),
    )


def _counted(prefix: str, runs: Sequence[Run]) -> dict[str, int]:
    """Sums of the figures whose names begin with the prefix, by the rest of their names."""
    found: Counter[str] = Counter()
    for run in runs:
        for name, value in run.figures.items():
            if name.startswith(prefix):
                found[name.removeprefix(prefix)] += int(value)
    return dict(found)


def _rounds(
    process: Worker, end: float, progress: Callable[[str], None]
) -> list[tuple[float, Run]]:
    """When each round was over, and what it did; at least one."""
    found: list[tuple[float, Run]] = []
    while not found or time.monotonic() < end:
        run = process()
        found.append((time.monotonic(), run))
        if len(found) % 20 == 1:
            progress(
                f"round {len(found)}: {run.figures['rss_mib']:.0f} MiB resident, "
                f"{run.figures['reference_s']:.2f} s for the reference images"
            )
    return found


def _kill(process: Worker) -> None:
    """In the middle of a round; a round that was faster has a dead process after it."""
    timer = threading.Timer(_KILL_AFTER_S, process.kill)
    timer.start()
    try:
        process()
        timer.join()
        process()
    except HcmaError as error:
        if error.value != -signal.SIGKILL:
            raise
        return
    finally:
        timer.join()
    raise HcmaError(
        "a killed process still answers", value=process.name, remedy="Report it as a bug."
    )


def load_soak(model: str, backend: str, max_batch: int, folder: str) -> Contestant:
    """One round of mixed requests, faults and the reference, whose image's hash is the result.

    Raises:
        WeightsError, BackendError, EngineError: as in ``HCMAPipeline.from_pretrained``.
        BackendError: the system tells no process its memory.
    """
    from hcma_fast.runtime.generator import BatchGenerator

    if status_mib("VmRSS") is None:
        raise BackendError(
            "a process cannot read its memory here", value="/proc", remedy="Use Linux."
        )
    pipe = open_pipe(model, Ours(backend))
    _grow_table_of_names()
    generator = BatchGenerator(pipe, max_batch=max_batch)
    rng = np.random.default_rng(SEED)
    bad = bad_requests()
    figures: dict[str, float] = {}
    number = 0

    def generate() -> NDArray[np.float32]:
        nonlocal number
        figures.clear()
        figures.update(images=0, full_disks=0)
        requests = [mixed_request(rng, pipe.settings) for _ in range(rng.integers(1, 9))]
        for result in generator.generate(requests):
            if result.image is None:
                raise result.error or HcmaError("no image", remedy="Report it as a bug.")
            figures["images"] += 1
            save = partial(result.image.save, format="PNG")
            write_whole(Path(folder) / f"{result.index}.png", save)
        if number % _FAULT_EVERY == 0:
            kind = bad[number // _FAULT_EVERY % len(bad)]
            check_refused(generator, requests, kind)
            check_full_disk(save, Path(folder) / "full.png")
            figures[f"refused: {kind.what}"] = 1
            figures["full_disks"] += 1
        number += 1
        start = time.perf_counter()
        found = list(generator.generate(_reference()))
        figures["reference_s"] = time.perf_counter() - start
        figures["rss_mib"] = status_mib("VmRSS") or 0.0
        if number % _COLLECT_EVERY == 1:
            gc.collect()
        figures["python_blocks"] = sys.getallocatedblocks()
        if (allocated := allocated_mib()) is not None:
            figures["allocated_mib"] = allocated
        pixels = b"".join(r.image.tobytes() if r.image else b"" for r in found)
        return np.frombuffer(hashlib.sha256(pixels).digest(), np.uint8).astype(np.float32)

    return Contestant(generate, pipe.preset, pipe.weights_hash, figures=lambda: dict(figures))


def _grow_table_of_names() -> None:
    """Let Python's table of interned strings take the size that it will keep.

    Each round interns some strings that are soon gone. The table's dictionary is made anew when its
    free places are used up, after some 11,000 strings: with torch's names in it that is one step of
    3.7 MiB, around the 1,000th round (found on 2026-11-26), and none after it.
    """
    for number in range(2**18):
        sys.intern(f"soak {number}")


def mixed_request(rng: np.random.Generator, settings: AlignmentSettings) -> Request:
    """Any prompt, layout, seed, number of steps, guidance (1 too), end of the gated attention and
    rate (0 too)."""
    scene = int(rng.integers(_SCENES))
    changes = {
        "guidance_scale": float(rng.choice([1.0, 3.0, 7.5])),
        "grounding_beta": float(rng.choice([0.5, 1.0])),
        "eta0": float(rng.choice([0.0, 0.5, 1.0])) * settings.eta0,
    }
    return Request(
        f"scene {scene}",
        Work(boxes=scene).layout,
        seed=int(rng.integers(2**31)),
        num_inference_steps=int(rng.choice([4, 8, 12])),
        settings=settings.model_copy(update=changes),
    )


def _reference() -> list[Request]:
    return [
        Request("a dog", Work(boxes=boxes).layout, seed=SEED + boxes, num_inference_steps=8)
        for boxes in (0, 2, 5)
    ]


def check_full_disk(save: Callable[..., object], path: Path) -> None:
    """While no file may be as large as the image, writing is an error and leaves nothing behind.

    Raises:
        HcmaError: it left something, or ended without an error.
    """
    error: OutputError | None = None
    with _disk_full():
        try:
            write_whole(path, save)
        except OutputError as caught:
            error = caught
    left = [entry.name for entry in path.parent.iterdir() if path.name in entry.name]
    if error is None or left:
        raise HcmaError(
            "a full disk was no error, or left a file behind",
            value=left,
            remedy="Report it as a bug.",
        )
    write_whole(path, save)
    path.unlink()


@contextmanager
def _disk_full() -> Iterator[None]:
    """Files of this process may not grow beyond some bytes: EFBIG, as ENOSPC, while writing."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (_FULL_BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
