"""One stage in its own process: case after case, each written as soon as it is known."""

from __future__ import annotations

import argparse
import importlib
import json
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hcma_fast.bench.gpu_check.records import FAILED, OK
from hcma_fast.errors import HcmaError

if TYPE_CHECKING:
    from hcma_fast.bench.gpu_check.device import Device

Figures = Mapping[str, Any]
_TRACE_LINES = 14


class Case(NamedTuple):
    """One thing that is checked or timed."""

    name: str
    run: Callable[[], Figures]


class Wrong(Exception):
    """A result that is not what it must be, with the figures that were found."""

    def __init__(self, problem: str, figures: Figures) -> None:
        super().__init__(problem)
        self.figures = figures


def cases_of(stage: str, device: Device, *, small: bool, result: Path) -> list[Case]:
    """All cases of a stage, in order of value."""
    module = importlib.import_module(f"hcma_fast.bench.gpu_check.stages.{stage}")
    found: list[Case] = module.cases(device, small=small, result=result)
    return found


def run_cases(
    cases: Sequence[Case],
    write: Callable[[dict[str, Any]], None],
    release: Callable[[], None],
    *,
    done: Sequence[str] = (),
    last: Sequence[str] = (),
) -> None:
    """Run the cases that are not ``done``, those of ``last`` at the end."""
    write({"cases": [case.name for case in cases]})
    waiting = [case for case in cases if case.name not in done]
    waiting.sort(key=lambda case: case.name in last)
    for case in waiting:
        write({"begin": case.name})
        started = time.monotonic()
        try:
            entry: dict[str, Any] = {"state": OK, "figures": dict(case.run())}
        except Wrong as wrong:
            entry = {"state": FAILED, "error": str(wrong), "figures": dict(wrong.figures)}
        except Exception as error:  # whatever fails, the next case may work
            text = (
                str(error) if isinstance(error, HcmaError) else f"{type(error).__name__}: {error}"
            )
            trace = traceback.format_exc().splitlines()[-_TRACE_LINES:]
            entry = {"state": FAILED, "error": text[:600], "trace": trace}
        write({"case": case.name, "seconds": round(time.monotonic() - started, 2), **entry})
        release()
    write({"end": True})


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one stage, as :mod:`.runner` starts it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage")
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--part", type=Path, required=True)
    parser.add_argument("--result", type=Path, required=True)
    parser.add_argument("--order", default="{}")
    parser.add_argument("--small", action="store_true")
    given = parser.parse_args(arguments)
    with given.part.open("a", encoding="utf-8") as stream:

        def write(entry: dict[str, Any]) -> None:
            stream.write(json.dumps(entry) + "\n")
            stream.flush()

        from hcma_fast.bench.gpu_check.device import open_device

        device = open_device(given.device)
        cases = cases_of(given.stage, device, small=given.small, result=given.result)
        run_cases(cases, write, device.release, **json.loads(given.order))


if __name__ == "__main__":
    main()
