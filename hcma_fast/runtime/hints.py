"""Warnings about requests that run, and probably do not do what was meant; each is given once."""

from __future__ import annotations

import json
import logging
import re
import threading
from collections.abc import Iterable, Sequence
from functools import lru_cache

from transformers import CLIPTokenizer

from hcma_fast.layout import Layout

_log = logging.getLogger("hcma_fast")
_WORD = re.compile(r"[^\W\d_]+")
_END = "</w>"
#: a larger one is CLIP's, or stands for a language
_CLOSED_VOCABULARY = 5_000
_MOST_WORDS = 20
_ARTICLES = {"a", "an", "the"}
_SHORTEST_PLURAL, _LONGEST_ENDING = 3, 2
_SHOWN_LETTERS = 80


class _Told:
    """What this process has been told already."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.things: set[str] = set()

    def add(self, thing: str) -> bool:
        """Whether it is new."""
        with self._lock:
            new = thing not in self.things
            self.things.add(thing)
        return new


told = _Told()


def give_hints(
    tokenizer: CLIPTokenizer, preset: str, prompts: Sequence[str], layouts: Sequence[Layout]
) -> None:
    """Warn of empty prompts, phrases that their prompt does not mention, and unknown words.

    Each warning is given once in a process, that of unknown words once for each word, up to 20.
    Only `tiny` has a vocabulary of its own, and so unknown words.
    """
    if any(not prompt.strip() for prompt in prompts) and told.add("prompt"):
        _log.warning("The prompt is empty: the image follows the boxes alone, if there are any.")
    pairs = (
        (prompt, phrase)
        for prompt, layout in zip(prompts, layouts, strict=True)
        for phrase in layout.phrases
    )
    for prompt, phrase in pairs:
        if prompt.strip() and not mentions(prompt, phrase):
            if told.add("phrase"):
                _log.warning(
                    "The prompt does not mention the phrase %s of a box: %s. Boxes work best for "
                    "what the prompt names.",
                    _short(phrase),
                    _short(prompt),
                )
            break
    known = vocabulary(tokenizer) if preset == "tiny" else ()
    if known:
        phrases = (phrase for layout in layouts for phrase in layout.phrases)
        _warn_of_unknown([*prompts, *phrases], tokenizer, preset, known)


def _warn_of_unknown(
    texts: Iterable[str], tokenizer: CLIPTokenizer, preset: str, known: Sequence[str]
) -> None:
    words = dict.fromkeys(word for text in texts for word in _WORD.findall(text.lower()))
    candidates = [word for word in words if word not in known and f"word {word}" not in told.things]
    unknown = [word for word in candidates if len(tokenizer.tokenize(word)) != 1]
    new = [word for word in unknown if told.add(f"word {word}")]
    count = sum(thing.startswith("word ") for thing in told.things)
    if not new or count - len(new) >= _MOST_WORDS:
        return
    first = told.add("vocabulary")
    _log.warning(
        "The model %s does not know these words, and cannot draw them: %s.%s",
        preset,
        ", ".join(_short(word) for word in new[:_MOST_WORDS]),
        f" Its vocabulary: {', '.join(known)}." if first else "",
    )


def mentions(prompt: str, phrase: str) -> bool:
    """Whether every word of ``phrase`` is in ``prompt``, in either number: dog, dogs."""
    text, wanted = prompt.casefold(), phrase.casefold()
    # some scripts have no spaces between words
    if not wanted.isascii() and wanted.strip() in text:
        return True
    words = _WORD.findall(text)
    return all(
        any(_same_word(part, word) for word in words)
        for part in _WORD.findall(wanted)
        if part not in _ARTICLES
    )


def _same_word(one: str, other: str) -> bool:
    short, long = sorted((one, other), key=len)
    plural = len(short) >= _SHORTEST_PLURAL and len(long) - len(short) <= _LONGEST_ENDING
    return one == other or (plural and long.startswith(short))


@lru_cache(maxsize=4)
def vocabulary(tokenizer: CLIPTokenizer) -> tuple[str, ...]:
    """The words of a tokenizer, sorted: its tokens that end a word and are part of no longer one.

    Empty for a tokenizer of a whole language, whose words are too many to list.
    """
    if len(tokenizer) > _CLOSED_VOCABULARY:
        return ()
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"])
    parts = {part for pair in pairs for part in pair}
    words = {word for word in model["vocab"] if word.endswith(_END) and word not in parts}
    return tuple(sorted(word.removesuffix(_END) for word in words if len(word) > len(_END) + 1))


def _short(text: str) -> str:
    shown = repr(text)
    return shown if len(shown) <= _SHOWN_LETTERS else f"{shown[: _SHOWN_LETTERS - 4]}...'"
