"""Engine folders whose manifest was edited, with a hash that fits or not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hcma_fast.export.key import key_of
from hcma_fast.export.manifest import MANIFEST_FILE, canonical_hash


def edit(folder: Path, change: Callable[[dict[str, Any]], object], *, reseal: bool) -> None:
    """Apply ``change`` to the manifest's values; ``reseal`` makes key and engine hash fit again."""
    path = folder / MANIFEST_FILE
    values = json.loads(path.read_text())
    change(values)
    if reseal:
        values["key"] = key_of(values["key_parts"])
        values["engine_hash"] = canonical_hash(values)
    path.write_text(json.dumps(values))
