"""``python -m hcma_fast.bench.gpu_check.pack``: what to carry to a GPU machine without a network.

A folder of wheels: this checkout, tiny's weights inside, and what the machine lacks.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

from hcma_fast.bench.gpu_check.missing import missing, parse_freeze, requires_here
from hcma_fast.errors import HcmaError, InputError, OutputError
from hcma_fast.files import read_file

LIMIT_MIB = 64.0
#: tags that a current pip takes on Linux, the newest first; pip matches each by name
_PLATFORMS = ("2_39", "2_35", "2_34", "2_31", "2_28", "2_27", "2_24", "2_17")
_PIN = re.compile(r"^([A-Za-z0-9._-]+)==(\S+)", re.MULTILINE)
INSTALL = "python3 -m pip install --no-deps --no-index --no-compile --target site {folder}/*.whl"
RUN = "PYTHONPATH=site python3 -m hcma_fast.bench.gpu_check --out gpu-check.json"


def wanted(installed: str, constraints: str, python: str) -> list[str]:
    """Requirements to download: ``name==version``, by the machine's list and our pins.

    Raises:
        InputError: ``installed`` lists no package.
    """
    pins = {name.lower().replace("_", "-"): v for name, v in _PIN.findall(constraints)}
    return missing(parse_freeze(installed), requires_here, python=python, pins=pins)


def wheel_command(checkout: Path, folder: Path) -> list[str]:
    """Builds our own wheel into ``folder``."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
    return [*command, "--no-build-isolation", "--wheel-dir", str(folder), str(checkout)]


def download_command(names: list[str], folder: Path, python: str) -> list[str]:
    """Fetches wheels for the other machine, each without its dependencies."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--implementation", "cp", "--python-version", python]
    for tag in _PLATFORMS:
        command += ["--platform", f"manylinux_{tag}_x86_64"]
    return [*command, "--platform", "manylinux2014_x86_64", "--dest", str(folder), *names]


def check_size(folder: Path) -> float:
    """MiB of the wheels.

    Raises:
        OutputError: more than fits (:data:`LIMIT_MIB`).
    """
    size = sum(path.stat().st_size for path in folder.iterdir()) / 2**20
    if size > LIMIT_MIB:
        largest = sorted(folder.iterdir(), key=lambda path: -path.stat().st_size)[:3]
        raise OutputError(
            f"the wheels are larger than {LIMIT_MIB:.0f} MiB",
            value=f"{size:.0f} MiB, the largest {', '.join(path.name for path in largest)}",
            remedy="Install the largest ones on the machine, and list its packages again.",
        )
    return size


def pack(installed: Path, folder: Path, python: str, checkout: Path) -> float:
    """Fill ``folder``, which must be new or empty; its size in MiB.

    Raises:
        InputError, OutputError: no list of packages; the folder is in use; more than fits.
    """
    text = read_file(installed, "the list of packages", limit=2**20).decode(errors="replace")
    names = wanted(text, (checkout / "constraints.txt").read_text(encoding="utf-8"), python)
    if folder.exists() and any(folder.iterdir()):
        raise OutputError(
            "this folder is not empty", value=str(folder), remedy="Name another with --out."
        )
    folder.mkdir(parents=True, exist_ok=True)
    commands = [wheel_command(checkout, folder)]
    commands += [download_command(names, folder, python)] if names else []
    for command in commands:
        try:
            subprocess.run(command, check=True)
        except subprocess.CalledProcessError as error:
            raise InputError(
                "pip could not make or fetch a wheel",
                value=" ".join(command[3:]),
                remedy="Read pip's message above; is there a package index?",
            ) from error
    return check_size(folder)


def main() -> int:
    """Exit code 0, or that of the error."""
    parser = argparse.ArgumentParser(prog="gpu-pack", description=__doc__)
    parser.add_argument("--installed", type=Path, required=True, help="pip list --format=freeze")
    parser.add_argument("--out", type=Path, default=Path("gpu-check"), help="the folder")
    parser.add_argument("--python", default="3.12", help="of the other machine")
    parser.add_argument("--checkout", type=Path, default=Path())
    given = parser.parse_args()
    try:
        size = pack(given.installed, given.out, given.python, given.checkout)
    except HcmaError as error:
        print(f"error: {error.message('command')}", file=sys.stderr)
        return error.exit_code
    print(f"{given.out}: {size:.1f} MiB. On the machine with the GPU:")
    print(f"  {INSTALL.format(folder=given.out)}\n  {RUN}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
