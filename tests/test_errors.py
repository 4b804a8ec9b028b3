"""Every error says what, with which value, and what to do; each kind has its exit code."""

from __future__ import annotations

import inspect
import pickle

import pytest

from hcma_fast import errors
from hcma_fast.errors import MESSAGE_LETTERS, HcmaError
from hcma_fast.program import command_option

KINDS = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if kind is not HcmaError]


def test_exit_codes_of_the_design() -> None:
    codes = {kind.__name__: kind.exit_code for kind in KINDS if issubclass(kind, HcmaError)}
    assert codes == {
        "UsageError": 2,
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


def test_messages_are_one_short_line_without_control_characters() -> None:
    error = HcmaError("bad \x1b[31mkey\x07 \u202e\ud800\nnext", value="\x9b", remedy="Fix\tit.")
    shown = r"bad \x1b[31mkey\x07 \u202e\ud800 next (got '\x9b'). Fix it."
    assert str(error) == shown
    long = HcmaError("w" * 10**6, value="v" * 10**6, remedy="r" * 10**6)
    assert len(str(long)) <= MESSAGE_LETTERS and str(long).startswith("www")
    kept = HcmaError("w" * 10**6, value="v" * 10**6, remedy="Do this.")
    assert len(str(kept)) <= MESSAGE_LETTERS and str(kept).endswith("vvv'). Do this.")
    deep: list[object] = []
    for _ in range(10**5):
        deep = [deep]
    for value in (deep, 10**5000):
        assert f"a value of the type {type(value).__name__}" in str(
            HcmaError("bad", value=value, remedy="Give another.")
        )


def test_arguments_are_named_in_the_words_of_the_asker() -> None:
    error = HcmaError(
        "{eta0} is bad", remedy="Use {backend=eager}, {seed=3} or leave out {device}."
    )
    assert str(error) == 'eta0 is bad. Use backend="eager", seed=3 or leave out device.'
    assert error.message(command_option) == (
        "--eta0 is bad. Use --backend eager, --seed 3 or leave out --device."
    )
    # JSON in a remedy is no argument
    example = HcmaError("bad", remedy='Write {"phrases": []}.')
    assert example.message(command_option) == 'bad. Write {"phrases": []}.'
