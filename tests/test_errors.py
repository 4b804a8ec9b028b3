"""Every error says what, with which value, and what to do; each kind has its exit code."""

from __future__ import annotations

import inspect
import pickle

import pytest

from hcma_fast import errors
from hcma_fast.errors import HcmaError, InputError, Remedy, printable

KINDS = [
    kind
    for _, kind in inspect.getmembers(errors, inspect.isclass)
    if issubclass(kind, HcmaError) and kind is not HcmaError
]


def test_exit_codes_of_the_design() -> None:
    codes = {kind.__name__: kind.exit_code for kind in KINDS}
    assert codes == {
        "UsageError": 2,
        "SettingsError": 2,
        "DivergenceError": 2,
        "InputError": 3,
        "WeightsError": 3,
        "OutputError": 3,
        "BackendError": 4,
        "DeviceMemoryError": 5,
        "EngineError": 6,
    }


@pytest.mark.parametrize("kind", KINDS)
def test_message(kind: type[HcmaError]) -> None:
    error = kind("the box is empty", value=(0, "a\nb"), remedy="Give it an area.")
    assert str(error) == r"the box is empty (got (0, 'a\nb')). Give it an area."
    assert (error.what, error.value, error.remedy) == (
        "the box is empty",
        (0, "a\nb"),
        "Give it an area.",
    )
    assert str(kind("no value", remedy="Give one.")) == "no value. Give one."
    # False and 0 are values, None means that there is none
    assert "(got 0)" in str(kind("zero", value=0, remedy="Give more."))


@pytest.mark.parametrize("kind", KINDS)
def test_a_remedy_is_required(kind: type[HcmaError]) -> None:
    with pytest.raises(TypeError, match="remedy"):
        kind("something is wrong")  # type: ignore[call-arg]


def test_input_errors_are_value_errors() -> None:
    assert issubclass(errors.InputError, ValueError)


@pytest.mark.parametrize("kind", KINDS)
def test_errors_cross_processes(kind: type[HcmaError]) -> None:
    error = kind("too large", value=7, remedy="Give less.")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert (str(copy), copy.value, copy.remedy) == (str(error), 7, "Give less.")
    assert copy.request is None


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_says_where_and_of_which_request_and_stays_of_its_kind(
    kind: type[HcmaError],
) -> None:
    error = kind("too large", value=7, remedy="Give less.")
    named = pickle.loads(pickle.dumps(error.of_request(4)))
    assert type(named) is kind and named.request == 4
    assert str(named) == "request 4: too large (got 7). Give less."
    assert str(error.at("line 3")) == "line 3: too large (got 7). Give less."
    assert str(error) == "too large (got 7). Give less." and error.request is None


def test_each_audience_reads_its_own_remedy_and_python_reads_the_first() -> None:
    remedy = Remedy("Pass aligner=.", command="Give --aligner.")
    error = InputError("no aligner", value="x", remedy=remedy)
    assert str(error) == error.message() == "no aligner (got 'x'). Pass aligner=."
    assert error.remedy == "Pass aligner=."
    # on its way through other processes and places too
    for copy in (error, pickle.loads(pickle.dumps(error)), error.at("line 3"), error.of_request(1)):
        assert copy.message("command").endswith("no aligner (got 'x'). Give --aligner.")
        assert copy.message("http").endswith("Pass aligner=.")


class _Faulty:
    def __repr__(self) -> str:
        raise RuntimeError("no words")


def test_a_message_is_one_short_line_of_printable_characters_with_its_remedy() -> None:
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    values = [
        "x" * 5_000,
        "\x1b[31m",
        "a\nb\r\x00\x85",
        "\ud800",
        10**5_000,
        deep,
        _Faulty(),
        b"\x1b",
    ]
    for value in values:
        for what in ("short", "long " * 2_000, "a\x1b]0;title\x07 b", "two\nlines\tand a tab"):
            text = str(InputError(what, value=value, remedy="Give less."))
            assert len(text) <= 500 and text.isprintable(), (what[:9], type(value))
            assert text.startswith(what[:1]) and text.endswith("). Give less.")
    assert str(InputError("a\x1b b\n c", remedy="X.")) == r"a\x1b b c. X."
    # both ends of a long value are left
    path = f"/home/{'a' * 5_000}/model.bin"
    shown = str(InputError("bad", value=path, remedy="X."))
    assert "'/home/aaa" in shown and "aaa/model.bin'" in shown


def test_text_for_a_terminal_is_one_printable_line_of_500_letters() -> None:
    assert printable("two\nlines\x1b[31m") == r"two lines\x1b[31m"
    shown = printable("a" * 400 + "b" * 400)
    assert len(shown) == 500 and shown.startswith("aaa") and shown.endswith("bbb")
