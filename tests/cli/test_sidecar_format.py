"""Sidecars of other versions: read as what they mean, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hcma_fast.cli.generate.sidecar import read_sidecar
from hcma_fast.config import AlignmentSettings
from hcma_fast.errors import InputError
from hcma_fast.layout import Layout
from hcma_fast.runtime.request import Request
from hcma_fast.sampling.savings import Savings

#: as the version before requests wrote it
OLD: dict[str, Any] = {
    "format": 1,
    "image": "a-dog-3.png",
    "image_sha256": "0" * 64,
    "prompt": "a dog",
    "negative_prompt": "cat",
    "layout": {"phrases": ["dog"], "boxes": [[0.1, 0.1, 0.5, 0.9]]},
    "seed": 3,
    "num_inference_steps": 20,
    "settings": {
        "eta0": 2.0,
        "window": [0.2, 0.7],
        "lambda_global": 1.0,
        "lambda_local": 0.5,
        "normalized": False,
        "grounding_beta": 0.3,
        "guidance_scale": 4.0,
    },
    "savings": {"align_every": 2},
    "model": "tiny",
    "aligner": None,
    "preset": "tiny",
    "image_size": 64,
    "backend": "eager",
    "device": "cpu",
    "batch_size": 1,
    "weights_hash": "1" * 64,
    "engine_hash": None,
    "versions": {},
    "losses": {"loss_global": 0.5, "loss_local": [0.25]},
}


def written(path: Path, values: dict[str, Any]) -> Path:
    path.write_text(json.dumps(values))
    return path


def test_an_older_sidecar_means_what_it_meant(tmp_path: Path) -> None:
    found = read_sidecar(written(tmp_path / "a.json", OLD))
    settings = AlignmentSettings(
        eta0=2, window=(0.2, 0.7), lambda_local=0.5, grounding_beta=0.3, guidance_scale=4
    )
    assert found.request == Request(
        "a dog",
        Layout(["dog"], [(0.1, 0.1, 0.5, 0.9)]),
        seed=3,
        negative_prompt="cat",
        sampler="plms",
        num_inference_steps=20,
        settings=settings,
        savings=Savings(align_every=2),
    )
    assert found.origin.weights_hash == "1" * 64 and found.origin.cuda_graphs is False
    assert read_sidecar(written(tmp_path / "b.json", found.as_json())) == found
    # a setting that it does not have is the package's default, as it was then
    few = {**OLD, "settings": {"eta0": 2.0}}
    assert read_sidecar(written(tmp_path / "c.json", few)).request.settings.given == dict(
        AlignmentSettings(eta0=2.0)
    )


def test_another_format_and_half_a_sidecar_are_refused(tmp_path: Path) -> None:
    for change, words in (
        ({"format": 0}, "built by an older version"),
        ({"format": 2}, "built by a newer version"),
        ({"format": 2, "request": {}}, "built by a newer version"),
        ({"format": "x"}, "not a sidecar"),
        ({"seed": -1}, "not a sidecar.*seed"),
        ({"sampler": "magic"}, "not a sidecar.*sampler"),
        ({"settings": 3}, "not a sidecar.*settings"),
        ({"settings": {"eta0": -1}}, "not a sidecar.*eta0"),
        ({"unknown": 1}, "not a sidecar.*unknown"),
    ):
        with pytest.raises(InputError, match=words):
            read_sidecar(written(tmp_path / "a.json", {**OLD, **change}))
    for name in ("prompt", "negative_prompt", "layout", "seed", "num_inference_steps", "settings"):
        half = {key: value for key, value in OLD.items() if key != name}
        with pytest.raises(InputError, match=f"not a sidecar of hcma-fast: {name} is missing"):
            read_sidecar(written(tmp_path / "a.json", half))
