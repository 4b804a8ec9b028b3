"""Whatever a checkpoint's files hold, loading succeeds or raises an error of ours."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from diffusers import AutoencoderKL, UNet2DConditionModel
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import CLIPTextModel

from hcma_fast.errors import HcmaError
from hcma_fast.models.aligner import Aligner
from hcma_fast.models.checkpoint.folder import locate
from hcma_fast.models.checkpoint.info import read_info
from hcma_fast.models.checkpoint.parts import load_part
from hcma_fast.models.checkpoint.tokenizer import load_tokenizer

#: files, and what reads them after the folder was looked through
READERS: dict[str, Callable[[Path], object]] = {
    "unet/config.json": lambda folder: load_part(UNet2DConditionModel, folder / "unet"),
    "vae/config.json": lambda folder: load_part(AutoencoderKL, folder / "vae"),
    "vae/diffusion_pytorch_model.safetensors": lambda folder: load_part(
        AutoencoderKL, folder / "vae"
    ),
    "vae/diffusion_pytorch_model.safetensors.index.json": lambda folder: load_part(
        AutoencoderKL, folder / "vae"
    ),
    "text_encoder/config.json": lambda folder: load_part(CLIPTextModel, folder / "text_encoder"),
    "text_encoder/model.safetensors": lambda folder: load_part(
        CLIPTextModel, folder / "text_encoder"
    ),
    "text_encoder/generation_config.json": locate,
    "tokenizer/tokenizer.json": lambda folder: load_tokenizer(folder / "tokenizer"),
    "tokenizer/tokenizer_config.json": lambda folder: load_tokenizer(folder / "tokenizer"),
    "tokenizer/special_tokens_map.json": lambda folder: load_tokenizer(folder / "tokenizer"),
    "tokenizer/added_tokens.json": lambda folder: load_tokenizer(folder / "tokenizer"),
    "aligner/config.json": lambda folder: Aligner.from_pretrained(folder / "aligner"),
    "aligner/model.safetensors": lambda folder: Aligner.from_pretrained(folder / "aligner"),
    "scheduler/scheduler_config.json": locate,
    "model_index.json": locate,
    "hcma.json": read_info,
}
WORDS = (
    *("_class_name", "architectures", "auto_map", "attention_type", "use_gated_attention"),
    *("unet", "vae", "tokenizer", "diffusers", "AutoencoderKL", "gated", "weight_map", "model"),
    *("vocab", "merges", "id", "content", "dtype", "shape", "data_offsets", "F32", "__metadata__"),
)
HUGE = "a number of 5,001 digits"
"""Stands for one that Python does not print"""
NUMBERS = st.one_of(
    st.integers(-3, 9),
    st.sampled_from([2**31, 2**63, 10**30, -(2**70), HUGE]),
    st.floats(width=32),
)
TEXTS = st.one_of(st.sampled_from(WORDS), st.text(max_size=6), st.just("x" * 5000))
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in a JSON value, of long containers the first only."""
    if not isinstance(value, dict | list):
        return []
    keys = list(value)[:60] if isinstance(value, dict) else list(range(len(value)))[:5]
    return [(value, key) for key in keys] + [place for key in keys for place in places(value[key])]


def changed(content: bytes, draw: st.DataObject) -> bytes:
    """A JSON file with one value replaced or one key more."""
    data = json.loads(content)
    junk = draw.draw(JSON)
    if draw.draw(st.booleans()) and places(data):
        container, key = draw.draw(st.sampled_from(places(data)))
        container[key] = junk
    elif isinstance(data, dict):
        data[draw.draw(TEXTS)] = junk
    return dumps(data)


def dumps(data: object) -> bytes:
    return json.dumps(data).replace(f'"{HUGE}"', "1" + "0" * 5000).encode()


def damaged(name: str, content: bytes, draw: st.DataObject) -> bytes:
    """One of the ways in which a file is wrong."""
    way = draw.draw(st.sampled_from(["changed"] * 5 + ["json", "bytes", "cut", "deep"]))
    if way == "json":
        return dumps(draw.draw(JSON))
    if way == "bytes":
        return draw.draw(st.binary(max_size=40))
    if way == "cut":
        return content[: draw.draw(st.integers(0, len(content)))]
    if way == "deep":
        return draw.draw(st.sampled_from([b"[", b'{"a":'])) * draw.draw(st.integers(20, 50_000))
    if name.endswith(".json"):
        return changed(content, draw)
    size = struct.unpack("<Q", content[:8])[0]
    header = changed(content[8 : 8 + size], draw)
    length = draw.draw(st.sampled_from([len(header)] * 3 + [0, 2**40, 2**64 - 1]))
    return struct.pack("<Q", length) + header + content[8 + size :]


@pytest.fixture(scope="module")
def folder(random_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with all files of ``READERS``."""
    place = tmp_path_factory.mktemp("junk") / "checkpoint"
    shutil.copytree(random_checkpoint, place)
    for name in READERS:
        if not (place / name).exists():
            (place / name).parent.mkdir(exist_ok=True)
            (place / name).write_text("{}")
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    (place / "scheduler/scheduler_config.json").write_text(json.dumps(betas))
    locate(place)
    return place


@settings(max_examples=300, suppress_health_check=list(HealthCheck), database=None)
@given(draw=st.data())
def test_junk_in_any_file_is_an_error_of_ours(folder: Path, draw: st.DataObject) -> None:
    name = draw.draw(st.sampled_from(sorted(READERS)))
    path = folder / name
    before = path.read_bytes()
    path.write_bytes(damaged(name, before, draw))
    try:
        for read in (locate, READERS[name]):
            with suppress(HcmaError):
                read(folder)
    finally:
        path.write_bytes(before)
