"""JSON that is not trusted: what is ambiguous, or no file, is refused and never waited for."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hcma_fast.errors import InputError
from hcma_fast.strict_json import parse_json, read_regular

_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@given(_VALUES)
def test_what_json_writes_is_read(value: object) -> None:
    assert parse_json(json.dumps(value).encode()) == value


def test_what_is_ambiguous_or_hostile_is_refused() -> None:
    for content, word in (
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff", "not JSON"),
        (b'{"a": 1, "a": 1}', "key twice"),
        (b'[{"b": {"a": 1, "c": 2, "a": 3}}]', "key twice"),
        (b"NaN", "finite"),
        (b'{"a": [-Infinity]}', "finite"),
        (b"[1e999]", "finite"),
        (b"9" * 5000, "not JSON"),
        (b"[" * 10**5, "nested too deeply"),
        (b'{"a":' * 10**5, "nested too deeply"),
    ):
        with pytest.raises(InputError, match=word):
            parse_json(content)


@given(st.binary(max_size=40))
def test_junk_is_a_value_or_an_error(content: bytes) -> None:
    with contextlib.suppress(InputError):
        parse_json(content)


def test_only_regular_files_of_a_limited_size_are_read(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"12345")
    assert read_regular(path, 5) == b"12345"
    with pytest.raises(InputError, match="larger than 4"):
        read_regular(path, 4)
    with path.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(InputError, match="larger"):
        read_regular(path, 10)
    os.mkfifo(tmp_path / "pipe")
    for other in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        with pytest.raises((InputError, OSError)):
            read_regular(other, 10)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        with pytest.raises(OSError, match="socket"):
            read_regular(tmp_path / "socket", 10)
    with pytest.raises(FileNotFoundError):
        read_regular(tmp_path / "missing", 10)
