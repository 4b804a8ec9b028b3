"""Warnings about requests that run, and probably do not do what was meant: each once."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import CLIPTokenizer

from hcma_fast import HCMAPipeline, Layout
from hcma_fast.config import PRESETS
from hcma_fast.models.checkpoint.tokenizer import load_tokenizer
from hcma_fast.runtime import hints
from hcma_fast.runtime.generator import BatchGenerator, Request
from hcma_fast.runtime.hints import give_hints, mentions, vocabulary
from hcma_fast.train.data.emoji_scenes import BACKGROUNDS, CATEGORY_NAMES, sample_scene

DOG = Layout(["dog"], [[0.1, 0.1, 0.5, 0.9]])


@pytest.fixture(autouse=True)
def said(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """Nothing has been said yet in this process."""
    before, hints.told.things = hints.told.things, set()
    with caplog.at_level(logging.WARNING, "hcma_fast"):
        yield caplog
    hints.told.things = before


@pytest.fixture(scope="module")
def tiny() -> CLIPTokenizer:
    return load_tokenizer(PRESETS["tiny"] / "tokenizer")


def test_the_vocabulary_is_what_tiny_was_trained_on(tiny: CLIPTokenizer) -> None:
    words = set(vocabulary(tiny))
    named = " ".join((*CATEGORY_NAMES, *BACKGROUNDS)).split()
    # a and at are tokens that longer words share
    assert set(named) - words == {"a", "at"}
    captions = " ".join(c for i in range(500) for c in sample_scene("train", i).captions)
    assert words <= set(captions.split()) | set(named)
    assert {"ht", "ight", "ure"}.isdisjoint(words)


def test_unknown_words_are_told_once_each_and_the_vocabulary_once(
    tiny: CLIPTokenizer, said: pytest.LogCaptureFixture
) -> None:
    castle = Layout(["castle"], [[0.1, 0.1, 0.5, 0.9]])
    give_hints(tiny, "tiny", ["a Zebra at night"] * 2, [Layout.empty()] * 2)
    assert said.messages == []
    for _ in range(2):
        give_hints(tiny, "tiny", ["a dragon by the castle"], [castle])
        give_hints(tiny, "tiny", ["a dragon and a knight"], [Layout.empty()])
    first, second = said.messages
    assert "'dragon', 'by', 'castle'." in first and "airplane, airplanes" in first
    assert "zebras." in first
    assert second.endswith("cannot draw them: 'knight'.")
    give_hints(tiny, "sd14", ["a wizard"], [Layout.empty()])
    for number in range(40):
        give_hints(tiny, "tiny", [f"a {'q' * (number + 2)}"], [Layout.empty()])
    assert len(said.messages) == 18  # 20 words


def test_phrases_that_the_prompt_does_not_mention(said: pytest.LogCaptureFixture) -> None:
    for prompt, phrase in [
        *(
            ("two dogs", "dog"),
            ("a dog", "the dogs"),
            ("Stop signs", "stop sign"),
            ("buses", "bus"),
        ),
        *(("草原上的狗", "狗"), ("a CAT", "cat"), ("x", "!?"), ("a sports ball", "a ball")),
    ]:
        assert mentions(prompt, phrase), (prompt, phrase)
    for prompt, phrase in [
        *(("a carrot", "car"), ("a cat", "dog"), ("a sign", "stop sign"), ("草原", "狗")),
        *(("an apple", "a pear"), ("catalogue", "cat")),
    ]:
        assert not mentions(prompt, phrase), (prompt, phrase)


def test_the_pipeline_and_the_generator_warn_once(
    random_checkpoint: Path, said: pytest.LogCaptureFixture
) -> None:
    pipe = HCMAPipeline.from_pretrained(random_checkpoint)
    for _ in range(2):
        pipe(["", "a cat"], DOG, num_inference_steps=2, output_type="latent")
    empty, phrase = said.messages
    assert "prompt is empty" in empty
    assert "'dog'" in phrase and "'a cat'" in phrase
    hints.told.things.clear()
    requests = [Request("a cat", DOG, num_inference_steps=2) for _ in range(2)]
    list(BatchGenerator(pipe).generate(requests))
    assert len(said.messages) == 3 and said.messages[2] == phrase
