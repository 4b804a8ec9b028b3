"""Single numbers of any kind that users pass: Python's, numpy's, and arrays or tensors of one."""

from __future__ import annotations

import math
import operator
from typing import SupportsIndex


def plain(value: object) -> object:
    """The Python number in a numpy number, or in an array or tensor of one element.

    Anything else, a Python number included, is returned as it is.
    """
    item = getattr(value, "item", None)
    if not callable(item):
        return value
    try:
        return item()
    except Exception:  # more than one element, or what only looks like an array
        return value


def plain_pair(value: object) -> object:
    """A pair of numbers, from a list, a tuple or an array, with :func:`plain` numbers in it."""
    tolist = getattr(value, "tolist", None)
    found = tolist() if callable(tolist) else value
    return tuple(plain(part) for part in found) if isinstance(found, list | tuple) else found


def whole_number(value: object) -> int:
    """A whole number as a Python int; 3.0 is one.

    Raises:
        ValueError: it is none, or a truth value.
    """
    number = plain(value)
    if isinstance(number, float) and number.is_integer():
        return int(number)
    if isinstance(number, SupportsIndex) and not isinstance(number, bool):
        try:
            return int(operator.index(number))
        except TypeError as error:  # an array of several numbers
            raise ValueError("not a single number") from error
    raise ValueError("not a whole number")


def real_number(value: object) -> float:
    """A finite number as a Python float.

    Raises:
        ValueError: it is none, or a truth value.
    """
    number = plain(value)
    if isinstance(number, int | float) and not isinstance(number, bool):
        try:
            found = float(number)
        except OverflowError as error:
            raise ValueError("too large") from error
        if math.isfinite(found):
            return found
    raise ValueError("not a finite number")
