"""Models on the hub: ``owner/name``, or ``owner/name@revision``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hcma_fast.errors import WeightsError

_REVISION = re.compile(r"[\w.][\w./-]*")


def is_hub_id(name: str) -> bool:
    """Does ``name`` read owner/name, with @revision perhaps, if no folder is called so?"""
    repository = name.partition("@")[0]
    return repository.count("/") == 1 and not name.startswith((".", "/", "~"))


def download(name: str, patterns: list[str], *, offline: bool) -> Path:
    """The folder in the hub's cache with the files of these patterns.

    Raises:
        WeightsError: the hub does not deliver, or the revision is not one.
    """
    from huggingface_hub import snapshot_download

    repository, at, revision = name.partition("@")
    if at and not _REVISION.fullmatch(revision):
        raise WeightsError(
            "this is no revision of a model on the hub",
            value=name,
            remedy="Write owner/name@REVISION: a branch, a tag, a commit, or refs/pr/2.",
        )
    chosen: dict[str, Any] = {"revision": revision} if at else {}
    try:
        found = snapshot_download(
            repository, local_files_only=offline, allow_patterns=patterns, **chosen
        )
    except Exception as error:  # huggingface_hub raises many kinds, its HTTP client's among them
        raise WeightsError(
            f"there is no such folder, and the hub delivered no model ({type(error).__name__})",
            value=name,
            remedy="Check the name and the network (is HF_HUB_OFFLINE set?), log in with "
            "`hf auth login` if the model is gated, or download it elsewhere and give its folder.",
        ) from error
    return Path(found)
