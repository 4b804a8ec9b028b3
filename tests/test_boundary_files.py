"""Every file reader takes any bytes and any JSON: it succeeds, or raises an HcmaError."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hcma_fast.bench.quality.items import read_items
from hcma_fast.bench.speed.harness.report import read_results
from hcma_fast.cli.generate.lines import read_lines
from hcma_fast.cli.generate.sidecar import Origin, read_sidecar
from hcma_fast.errors import HcmaError
from hcma_fast.export.manifest import open_folder
from hcma_fast.layout import Layout
from hcma_fast.models.checkpoint.info import read_info
from hcma_fast.runtime.request import Request
from hcma_fast.train.data.coco import read_coco
from hcma_fast.train.data.latent_cache import read_header

#: words that the formats use: random text alone never gets past the first check
WORDS = (
    *("prompt", "phrases", "boxes", "seed", "id", "negative_prompt", "box_format", "box_units"),
    *("box_size", "gen_boxes", "name", "bounding_box", "nodes", "class_type", "inputs", "type"),
    *("widgets_values", "GLIGENTextBoxApply", "EmptyLatentImage", "CLIPTextEncode", "text", "x"),
    *("y", "width", "height", "conditioning_to", "xywh", "pixel", "mentions", "image", "layout"),
    *("images", "annotations", "categories", "image_id", "category_id", "bbox", "caption"),
    *("file_name", "iscrowd", "reports", "rows", "format", "target", "graphs", "files", "preset"),
    *Origin.model_fields,
    *Request.model_fields,
    "self",
)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([2**63, 2**64, -1, 10**39, 1e308, -0.0, "", "\ud800", "\x1b[31m", "a" * 5000]),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(WORDS),
    st.just([0.1, 0.1, 0.5, 0.9]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.one_of(st.sampled_from(WORDS), st.text(max_size=4)), inner, max_size=6),
    ),
    max_leaves=12,
)
ENCODINGS = st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32", "latin-1"])
FIXED = st.sampled_from(
    [
        b"[" * 10**5,
        b'{"a":' * 10**4,
        b"9" * 10**4,
        b"[(" * 500,
        b"[('a', [" + b"9" * 5000 + b",1,1,1])]",
        b'{"prompt": "a", "seed": 1e999}',
        b'{"prompt": "a", "prompt": "b"}',
        b"\xff\xfe",
        b"\x00",
        b"",
    ]
)
FILES = st.one_of(
    st.binary(max_size=60),
    FIXED,
    st.builds(
        lambda value, encoding: json.dumps(value).encode(encoding, errors="replace"),
        VALUES,
        ENCODINGS,
    ),
)


def requests(path: Path) -> None:
    for line in read_lines(path):
        line.jobs({})


def instances(path: Path) -> None:
    read_coco(path.parent, path, path.parent / "captions.json", skipped=[])


def captions(path: Path) -> None:
    known = path.parent / "instances.json"
    image = {"id": 1, "file_name": "a.png", "width": 4, "height": 4}
    known.write_text(json.dumps({"images": [image], "annotations": [], "categories": []}))
    read_coco(path.parent, known, path, skipped=[])


READERS: dict[str, Callable[[Path], Any]] = {
    "layout": Layout.from_file,
    "requests": requests,
    "sidecar": read_sidecar,
    "eval manifest": read_items,
    "COCO instances": instances,
    "COCO captions": captions,
    "results of bench": read_results,
}

#: those that look for a file of a given name in a folder
FOLDER_READERS: dict[str, Callable[[Path], Any]] = {
    "manifest.json": open_folder,
    "hcma.json": read_info,
    "cache.json": read_header,
}


@pytest.mark.parametrize("name", READERS)
@settings(
    max_examples=150,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(content=FILES)
def test_a_reader_succeeds_or_raises_an_error_of_ours(
    name: str, tmp_path: Path, content: bytes
) -> None:
    path = tmp_path / "file.json"
    path.write_bytes(content)
    with suppress(HcmaError):
        READERS[name](path)


@pytest.mark.parametrize("name", FOLDER_READERS)
@settings(
    max_examples=100,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(content=FILES)
def test_a_reader_of_a_folder_succeeds_or_raises_an_error_of_ours(
    name: str, tmp_path: Path, content: bytes
) -> None:
    (tmp_path / name).write_bytes(content)
    with suppress(HcmaError):
        FOLDER_READERS[name](tmp_path)


@pytest.mark.parametrize("name", FOLDER_READERS)
def test_no_reader_of_a_folder_waits_for_a_pipe(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(HcmaError):
        FOLDER_READERS[name](tmp_path)


@pytest.mark.parametrize("name", READERS)
def test_no_reader_waits_for_a_pipe_or_reads_a_device(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path, tmp_path / ("x" * 5000)):
        with pytest.raises(HcmaError):
            READERS[name](path)
