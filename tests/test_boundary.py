"""The Python API fed with junk: an HcmaError or success, never a raw exception."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from hcma_fast import HCMAPipeline, Layout
from hcma_fast.config import AlignerConfig, AlignmentSettings
from hcma_fast.errors import HcmaError
from hcma_fast.models.checkpoint.folder import Components
from hcma_fast.runtime.generator import BatchGenerator
from hcma_fast.runtime.request import Request, Result
from hcma_fast.sampling.savings import Savings

CAT = Layout(["cat"], [[0.1, 0.1, 0.7, 0.9]])


class Faulty:
    """No words for itself, no length, and not a number, whatever it says."""

    def __repr__(self) -> str:
        raise RuntimeError("no words")

    def item(self) -> int:
        raise RuntimeError("no item")


def deep(levels: int) -> list[Any]:
    """A list in a list in a list."""
    found: list[Any] = []
    for _ in range(levels):
        found = [found]
    return found


#: chosen by number: hypothesis shows the elements of a list, and some of these have no words
HOSTILE: list[Any] = [
    *(10**5_000, -(10**400), "x" * 5_000, "a\0b", "\ud800", "\x1b]0;t\x07", " \n", Faulty()),
    *(np.int64(3), np.float32("nan"), np.bool_(True), np.array([]), np.ones((2, 2)), object()),
    *(torch.ones(1), torch.zeros(0), torch.ones(2, 2), np.array(["a"], object), deep(10_000)),
    *(int, len, range(3), CAT, Savings(), math, Path("x"), ...),
]
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 80),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=12),
    st.binary(max_size=6),
    st.complex_numbers(),
    st.integers(0, len(HOSTILE) - 1).map(lambda number: HOSTILE[number]),
)
#: flat, for speed: what is deep is among the hostile
junk = st.one_of(
    scalars,
    st.lists(scalars, max_size=3),
    st.lists(st.lists(scalars, max_size=2), max_size=2),
    st.dictionaries(st.one_of(st.text(max_size=6), st.integers()), scalars, max_size=2),
)
#: what a box or a number nearly is
unit = st.one_of(st.floats(-0.2, 1.2), st.floats(), st.integers(-1, 2), scalars)
boxes = st.one_of(junk, st.lists(st.lists(unit, min_size=3, max_size=5), max_size=3))
phrases = st.one_of(junk, st.lists(st.one_of(st.text(max_size=9), scalars), max_size=3))
texts = st.one_of(st.text(max_size=30), junk)


def tried(call: Callable[[], object]) -> None:
    """The call succeeds, or raises an HcmaError whose message is one printable line."""
    try:
        call()
    except HcmaError as error:
        refused = error
    else:
        return
    message = str(refused)
    assert refused.remedy and message.isprintable() and len(message) <= 500


def junk_cases(examples: int) -> Callable[[Any], Any]:
    """The same junk in every run, and no shrinking of what passes."""

    def decorate(test: Any) -> Any:
        checks = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
        checks += [HealthCheck.data_too_large, HealthCheck.large_base_example]
        configured = settings(
            max_examples=examples,
            deadline=None,
            database=None,
            suppress_health_check=checks,
            phases=[Phase.generate],
        )
        return configured(seed(20)(test))

    return decorate


@junk_cases(600)
@given(phrases, boxes, unit, unit)
def test_layouts(names: Any, places: Any, width: Any, height: Any) -> None:
    tried(lambda: Layout(names, places))
    tried(lambda: Layout.from_xywh(names, places))
    tried(lambda: Layout.from_pixels(names, places, width, height))
    tried(lambda: CAT.model_copy(update={"boxes": places}))
    tried(lambda: CAT.model_copy(update={"phrases": names}))
    tried(lambda: CAT.model_copy(update=names))


@junk_cases(300)
@given(texts, junk, junk, unit)
def test_layouts_from_text_files_and_coco(
    text: Any, annotation: Any, names: Any, size: Any
) -> None:
    tried(lambda: Layout.from_json(text))
    tried(lambda: Layout.parse_box(text))
    tried(lambda: Layout.parse_box(f"dog:{text!s:.20}" if isinstance(text, str) else text))
    tried(lambda: Layout.from_file(text))
    tried(lambda: Layout.from_coco(annotation, names, size, 10))
    tried(lambda: Layout.from_coco([annotation], names, 10, size))
    entry = {"bbox": annotation, "category_id": size, "iscrowd": names}
    tried(lambda: Layout.from_coco([entry], {1: "dog"}, 10, 10))


SETTINGS = [
    (kind, name)
    for kind in (AlignmentSettings, Savings, AlignerConfig)
    for name in (*kind.model_fields, "x")
]


@junk_cases(600)
@given(st.sampled_from(SETTINGS), st.sampled_from(SETTINGS), st.one_of(unit, junk), unit, junk)
def test_settings(one: Any, other: Any, first: Any, second: Any, update: Any) -> None:
    kind, name = one
    values = {other[1]: second, name: first}
    tried(lambda: kind(**values))
    tried(lambda: kind(**{name: first}))
    tried(lambda: kind().model_copy(update=values))
    tried(lambda: kind().model_copy(update=update))


@pytest.fixture(scope="module")
def pipe(random_components: Components) -> HCMAPipeline:
    return HCMAPipeline.from_components(random_components)


ARGUMENTS: dict[str, st.SearchStrategy[Any]] = {
    "prompt": texts,
    "layout": st.one_of(junk, st.just(CAT), st.just([CAT])),
    "num_inference_steps": unit,
    "guidance_scale": unit,
    "negative_prompt": texts,
    "grounding_beta": unit,
    "eta0": unit,
    "lambda_global": unit,
    "lambda_local": unit,
    "align_window": st.one_of(junk, st.tuples(unit, unit)),
    "savings": st.one_of(junk, st.just(Savings())),
    "seed": st.one_of(junk, st.lists(st.integers(), max_size=2)),
    "latents": st.one_of(junk, st.just(torch.ones(1, 4, 8, 8, dtype=torch.float16))),
    # what a callback itself raises is the caller's
    "callback_on_step_end": st.one_of(
        junk.filter(lambda found: not callable(found)), junk.map(lambda found: lambda *_: found)
    ),
    "output_type": st.one_of(junk, st.just("np")),
}


def few_steps(values: dict[str, Any]) -> dict[str, Any]:
    """Valid numbers of steps are small: these tests are about the others."""
    steps = values.get("num_inference_steps")
    many = isinstance(steps, int | float) and 20 < steps < 1000
    return values | {"num_inference_steps": 3} if many else values


def one_of_them(fields: dict[str, st.SearchStrategy[Any]]) -> st.SearchStrategy[tuple[str, Any]]:
    """A name and a value for it. One at a time: the first of several would hide the others."""
    return st.one_of(*(st.tuples(st.just(name), values) for name, values in fields.items()))


@junk_cases(200)
@given(one_of_them(ARGUMENTS))
def test_calls_of_the_pipeline(pipe: HCMAPipeline, wrong: tuple[str, Any]) -> None:
    fine = {"prompt": "a cat", "layout": CAT, "num_inference_steps": 2, "output_type": "latent"}
    tried(lambda: pipe(**few_steps({**fine, wrong[0]: wrong[1]})))


FIELDS = {name: ARGUMENTS[name] for name in ("prompt", "layout", "seed", "negative_prompt")}
FIELDS |= {"num_inference_steps": unit, "settings": junk, "savings": ARGUMENTS["savings"]}


@junk_cases(150)
@given(one_of_them(FIELDS), junk)
def test_requests(pipe: HCMAPipeline, wrong: tuple[str, Any], several: Any) -> None:
    fine = {"prompt": "a cat", "layout": CAT, "num_inference_steps": 2}

    def one() -> list[Result]:
        request = Request(**few_steps({**fine, wrong[0]: wrong[1]}))
        return list(BatchGenerator(pipe).generate([request]))

    tried(one)
    tried(lambda: list(BatchGenerator(pipe).generate(several)))
    tried(lambda: BatchGenerator(pipe, max_batch=several))


@junk_cases(200)
@given(junk, junk, junk)
def test_loading(first: Any, second: Any, third: Any) -> None:
    # what looks like the name of a model on the hub would be asked for there
    hub = isinstance(first, str) and ("/" in first or first == "tiny")
    tried(lambda: HCMAPipeline.from_pretrained("x" if hub else first))
    tried(lambda: HCMAPipeline.from_pretrained("x", backend=second, device=third))
    tried(lambda: HCMAPipeline.from_pretrained("x", precision=third, grad_backend=second))
    tried(lambda: HCMAPipeline.from_pretrained("tiny", aligner=third if third is not None else "x"))
