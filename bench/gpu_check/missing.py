"""What an environment lacks to run this package: by metadata, with nothing installed.

An image of NVIDIA has torch and Triton of its own build, and pip would replace them. So what is
missing is installed by name, without dependencies (docs/gpu.md).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from hcma_fast.errors import InputError

GPU_EXTRA = ("triton",)
"""Of the extra ``gpu`` what eager and torch-compile use; onnxruntime-gpu is a choice"""
Requirements = Callable[[str], Iterable[str]]
"""From a distribution to what its metadata requires"""


def missing_here() -> list[str]:
    """Requirements of hcma-fast that this environment does not meet."""
    return missing({d.name: d.version for d in metadata.distributions()}, requires_here)


def missing(
    installed: Mapping[str, str],
    requires: Requirements,
    *,
    python: str | None = None,
    pins: Mapping[str, str] | None = None,
) -> list[str]:
    """``name==version`` or ``name>=...`` of all that must be added to ``installed``.

    What is installed in a version that is too old counts too. Of what must be added the
    requirements are looked at as well; those of installed packages are met.

    Args:
        installed: name -> version.
        requires: the metadata to follow, such as :func:`requires_here`.
        python: "3.12", for markers; default this one's.
        pins: name -> version to install; by default the specifier is given as it is.
    """
    known = {canonicalize_name(name): version for name, version in installed.items()}
    marked: dict[str, str] = {**default_environment(), "extra": ""}  # type: ignore[dict-item]
    if python is not None:
        marked |= {"python_version": python, "python_full_version": f"{python}.0"}
    found: dict[str, str] = {}
    waiting = ["hcma-fast"]
    followed: set[str] = set()
    while waiting:
        name = waiting.pop(0)
        if name in followed:
            continue
        followed.add(name)
        for requirement in map(Requirement, requires(name)):
            wanted = canonicalize_name(requirement.name)
            # of the extras only Triton's requirement is one
            of_gpu = name == "hcma-fast" and wanted in GPU_EXTRA
            extra = {**marked, "extra": "gpu" if of_gpu else ""}
            if requirement.marker is not None and not requirement.marker.evaluate(extra):
                continue
            if _fits(known.get(wanted), requirement):
                continue
            pin = (pins or {}).get(wanted)
            found[wanted] = f"{wanted}=={pin}" if pin else f"{wanted}{requirement.specifier}"
            waiting.append(wanted)
    return [found[name] for name in sorted(found)]


def parse_freeze(text: str) -> dict[str, str]:
    """Name -> version from ``pip list --format=freeze`` (or ``pip freeze``).

    Raises:
        InputError: it names no package.
    """
    pairs = re.findall(r"^([A-Za-z0-9._-]+)==(\S+)", text, re.MULTILINE)
    if not pairs:
        raise InputError(
            "this lists no installed package",
            value=text[:80],
            remedy="Write it by: python3 -m pip list --format=freeze > installed.txt",
        )
    return dict(pairs)


def requires_here(name: str) -> Iterable[str]:
    """By the metadata of this environment; nothing of what is not installed."""
    try:
        return metadata.requires(name) or ()
    except metadata.PackageNotFoundError:
        return ()


def _fits(version: str | None, requirement: Requirement) -> bool:
    if version is None:
        return False
    return requirement.specifier.contains(Version(version), prereleases=True)
