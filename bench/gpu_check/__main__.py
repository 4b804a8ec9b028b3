"""``python -m hcma_fast.bench.gpu_check``: the check as a command."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from hcma_fast.bench.gpu_check.records import OK
from hcma_fast.bench.gpu_check.runner import BUDGET_S, STAGES, run_check, stages_for
from hcma_fast.errors import HcmaError


def main() -> int:
    """Exit code: 0 all cases worked, 1 some did not or were not reached, 3 a bad result file."""
    parser = argparse.ArgumentParser(prog="gpu-check", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("gpu-check.json"), help="the JSON")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="small sizes: no figures of use")
    parser.add_argument("--again", action="store_true", help="forget an earlier result")
    parser.add_argument("--budget", type=float, default=BUDGET_S, help="seconds of this call")
    names = [stage.name for stage in STAGES]
    parser.add_argument("--stage", choices=names, action="append", help="this one; repeat it")
    given = parser.parse_args()
    # an end from outside ends the stage's process too, and keeps what it found
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    stages = [s for s in stages_for(given.device) if given.stage is None or s.name in given.stage]
    try:
        check = run_check(
            given.out,
            device=given.device,
            small=given.small,
            again=given.again,
            stages=stages,
            budget_s=given.budget,
            say=lambda line: print(line, flush=True),
        )
    except HcmaError as error:
        print(f"error: {error.message('command')}", file=sys.stderr)
        return error.exit_code
    print(f"{given.out}: {check.seconds:.0f} s in all")
    return 0 if all(check.stages[stage.name].state == OK for stage in stages) else 1


if __name__ == "__main__":
    sys.exit(main())
