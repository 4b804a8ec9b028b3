"""CLIP's tokenizer from its files: a vocabulary, merges, and which words are special."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

from transformers import AddedToken, CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from hcma_fast.config import TOKEN_LENGTH
from hcma_fast.errors import WeightsError
from hcma_fast.models.checkpoint.configs import (
    OTHER_CONFIGS,
    TOKENIZER_CLASSES,
    check_class,
    check_keys,
)
from hcma_fast.models.checkpoint.json_files import (
    CONFIG_BYTES,
    VOCABULARY_BYTES,
    first_line,
    read_object,
    read_text,
    shorten,
)

_CLIP_MARKS = ("<|startoftext|>", "<|endoftext|>")
_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_MODEL_KEYS = {
    *("type", "vocab", "merges", "unk_token", "continuing_subword_prefix", "end_of_word_suffix"),
    *("dropout", "fuse_unk", "byte_fallback", "ignore_merges"),
}


def load_tokenizer(folder: Path) -> CLIPTokenizer:
    """CLIP's tokenizer from tokenizer.json, or vocab.json and merges.txt.

    Every id comes from the vocabulary or the added tokens: normalizer, splitting and template are
    CLIP's own, whatever the files say.

    Raises:
        WeightsError: neither is there, or they are damaged.
    """
    try:
        return _make(folder)
    except WeightsError:
        raise
    except Exception as error:  # tokenizers raises plain Exception
        raise _damaged(folder, first_line(error)) from error


def clip_tokenizer() -> CLIPTokenizer:
    """CLIP's own, for models that come without: its vocabulary is in the package."""
    text = (files("hcma_fast") / "assets/clip/merges.txt").read_text(encoding="utf-8")
    merges = [tuple(line.split(" ")) for line in text.rstrip("\n").split("\n")]
    letters = list(bytes_to_unicode().values())
    words = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, merges)]
    vocabulary = {word: i for i, word in enumerate([*words, *_CLIP_MARKS])}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=TOKEN_LENGTH)


def _make(folder: Path) -> CLIPTokenizer:
    path = folder / "tokenizer_config.json"
    config = _read(path)
    check_class(path, "tokenizer", config.get("tokenizer_class"), TOKENIZER_CLASSES)
    if config.get("padding_side") not in (None, "right"):
        raise _damaged(folder, "padding_side must be right")
    words = {**_read(folder / "special_tokens_map.json"), **config}
    data = _read(folder / "tokenizer.json", VOCABULARY_BYTES)
    if data:
        model = data["model"]
        check_keys(folder / "tokenizer.json", model, _MODEL_KEYS)
        vocabulary, merges = model["vocab"], model["merges"]
    else:
        vocabulary = read_object(folder / "vocab.json", VOCABULARY_BYTES)
        # not splitlines: it would split at letters of the merges, too
        lines = read_text(folder / "merges.txt", VOCABULARY_BYTES).replace("\r", "").split("\n")
        merges = [line for line in lines if line and not line.startswith("#version")]
    if sorted(vocabulary.values()) != list(range(len(vocabulary))) or not vocabulary:
        raise _damaged(folder, "the ids of its vocabulary are not 0, 1, 2 and so on, each once")
    added = _added_tokens(folder, data, config)
    tokens = {name: _content(words[name]) for name in _SPECIAL if words.get(name) is not None}
    tokenizer = CLIPTokenizer(
        vocab=vocabulary,
        merges=[tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in merges],
        model_max_length=TOKEN_LENGTH,
        **{name: added.get(content, (0, content))[1] for name, content in tokens.items()},
    )
    more = {content: place for content, place in added.items() if content not in vocabulary}
    tokenizer.add_tokens([token for _, token in sorted(more.values(), key=lambda place: place[0])])
    for content, (number, _) in added.items():
        if tokenizer.convert_tokens_to_ids(content) != number:
            raise _damaged(folder, f"the id of the added token {shorten(content)} is {number}")
    return tokenizer


def _added_tokens(
    folder: Path, data: dict[str, Any], config: dict[str, Any]
) -> dict[str, tuple[int, AddedToken]]:
    """Id and flags of each token that is named outside the vocabulary, by its content."""
    found = {
        content: (int(number), AddedToken(content))
        for content, number in _read(folder / "added_tokens.json").items()
    }
    decoder = config.get("added_tokens_decoder") or {}
    entries = [
        *((entry["id"], entry) for entry in data.get("added_tokens") or []),
        *decoder.items(),
    ]
    for number, entry in entries:
        flags = {flag: bool(entry[flag]) for flag in _FLAGS if flag in entry}
        found[entry["content"]] = (int(number), AddedToken(entry["content"], **flags))
    return found


def _content(token: object) -> str:
    """The text of a special token, which is a string or has its flags beside it."""
    content = token.get("content") if isinstance(token, dict) else token
    if not isinstance(content, str):
        raise TypeError(f"a special token is {shorten(content)}")
    return content


def _read(path: Path, limit: int = CONFIG_BYTES) -> dict[str, Any]:
    """A JSON object with allowed keys alone; {} where there is no such file."""
    if not path.exists() and not path.is_symlink():
        return {}
    config = read_object(path, limit)
    if path.name in OTHER_CONFIGS:
        check_keys(path, config, OTHER_CONFIGS[path.name])
    return config


def _damaged(folder: Path, problem: str) -> WeightsError:
    return WeightsError(
        f"cannot load the tokenizer: {problem}",
        value=str(folder),
        remedy="It needs tokenizer.json, or vocab.json and merges.txt, of a CLIP tokenizer.",
    )
