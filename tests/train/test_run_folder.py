"""A run deletes its own files only: the old states, and what it did not finish."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from hcma_fast.train.denoiser.export import _is_half_export
from hcma_fast.train.loop.run_folder import Provenance, RunFolder, RunState

PROVENANCE = Provenance(cache="", vae_sha256="", text_sha256="", architecture={}, training={})


def test_a_users_copies_of_states_stay_and_are_not_resumed_from(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, "aligner", PROVENANCE, main=True, keep=2)
    mine = ["step-00000001-best.pt", "step-99.pt", "step-mine.pt", ".thesis.part", ".a.b.part"]
    for name in mine:
        (folder.states / name).write_bytes(b"mine")
    (folder.states / ".folder.7.part").mkdir()
    (folder.states / ".step-00000009.pt.7.part").write_bytes(b"half")
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1)
    for step in range(1, 5):
        folder.save(RunState(step=step), model, optimizer, None)
    with folder.logging(4, tensorboard=False):
        pass
    assert folder.newest() == folder.states / "step-00000004.pt"
    assert {path.name for path in folder.states.iterdir()} == {
        *("step-00000003.pt", "step-00000004.pt", ".folder.7.part"),
        *mine,
    }


def test_half_an_export_is_known_by_all_that_is_in_it(tmp_path: Path) -> None:
    half = tmp_path / ".denoiser.7.part"
    for name in ("unet", "vae", "aligner", "tokenizer"):
        (half / name).mkdir(parents=True)
    (half / "hcma.json").touch()
    assert _is_half_export(half)
    (half / "thesis.tex").touch()
    assert not _is_half_export(half) and not _is_half_export(half / "thesis.tex")
