"""Words that several commands take, and how their help looks."""

from __future__ import annotations

#: typer's rich_markup_mode. Its boxes leave a text 18 of 80 columns, and lose words in brackets
PLAIN_HELP: None = None

_PRECISIONS = {
    "fp32": "float32",
    "f32": "float32",
    "fp16": "float16",
    "f16": "float16",
    "half": "float16",
    "bf16": "bfloat16",
}


def precision_name(given: str | None) -> str | None:
    """torch's name of a precision for the short one; anything else as it is, to be checked later.

    A callback of typer's options.
    """
    return _PRECISIONS.get(given, given) if given else given
