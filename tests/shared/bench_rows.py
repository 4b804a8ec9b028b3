"""Rows and results of the speed harness, made up for tests that measure nothing.

pytest puts this folder on sys.path (pyproject.toml): values that parameters are made of cannot be
fixtures.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from hcma_fast.bench.shared.machine import describe_machine
from hcma_fast.bench.speed.harness.report import Report, Results, Row

MACHINE = describe_machine(clocks=False)


def make_row(name: str = "a", group: str = "g", **changes: Any) -> Row:
    """A case of three runs; medians and so on follow its seconds."""
    seconds = np.array(changes.get("seconds", (2.0, 2.0, 2.0)))
    row = {
        "group": group,
        "name": name,
        "labels": {"batch": 1},
        "images": 1,
        "preset": "fake",
        "weights_hash": "0" * 64,
        "load_s": 1.5,
        "warm_up_s": 3.0,
        "seconds": tuple(seconds.tolist()),
        "median_s": float(np.median(seconds)),
        "p10_s": float(seconds.min()),
        "p90_s": float(seconds.max()),
        "p99_s": float(seconds.max()),
        "images_per_second": 0.5,
        "peak_rss_mib": 100.0,
        "device_peak_mib": None,
        "figures": {},
        "relative_error": 1e-6,
        "max_error": 1e-3,
        "void": False,
        "speedup": 2.0,
        "speedup_interval": (1.9, 2.2),
    }
    return Row.model_validate(row | changes)


def results(*rows: Row, **changes: Any) -> Results:
    """Of one suite, ``latency`` unless the changes say otherwise."""
    report = {
        "suite": "latency",
        "model": "tiny",
        "device": "cpu",
        "rounds": 3,
        "quick": False,
        "rows": rows,
        "machine": MACHINE,
    }
    return Results(command="hcma-fast bench run", reports=(Report(**(report | changes)),))
