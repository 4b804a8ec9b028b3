"""The aligner and its step on the latent (Eq. 6 to 8), and its files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from hcma_fast.config import AlignerConfig, RegionMode
from hcma_fast.errors import SettingsError, WeightsError
from hcma_fast.losses import local_mean
from hcma_fast.models.aligner import Aligner, AlignStep
from hcma_fast.models.regions import cell_coverage

B, M, GRID, TEXT = 3, 4, 4, 8
SMALL = AlignerConfig(
    latent_size=8, patch_size=2, token_width=12, width=16, depth=2, heads=2, text_width=TEXT
)


def make(region: RegionMode = "coverage+fourier", timed: bool = False) -> Aligner:
    torch.manual_seed(0)
    update = {"region": region, "time_conditioning": "adaln" if timed else "none"}
    aligner = Aligner(SMALL.model_copy(update=update)).double().eval().requires_grad_(False)
    if aligner.region_head.gate is not None:
        # the last layer starts at 0, which would hide every fault of the gate
        nn.init.normal_(aligner.region_head.gate[-1].weight, std=0.3)
    return aligner


def inputs(aligner: Aligner, eta: float = 0.3) -> dict[str, Tensor]:
    """Float64 inputs of the step: image 0 has no box, image 1 two, image 2 all of them."""
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    corners = torch.rand(B, M, 2, 2, generator=generator, dtype=torch.float64)
    boxes = torch.cat([corners.amin(-2), corners.amax(-2)], dim=-1)
    mask = (torch.arange(M) < torch.tensor([0, 2, M])[:, None]).double()
    return {
        "z": random(B, 4, 8, 8),
        "caption_embedding": random(B, TEXT),
        "label_embeddings": random(B, M, TEXT),
        "regions": aligner.region_map(boxes, mask),
        "region_mask": mask,
        "eta": torch.full((B,), eta, dtype=torch.float64),
        "lambdas": torch.tensor([[0.7, 1.3], [1.1, 0.4], [0.2, 0.9]], dtype=torch.float64),
    }


def objective(aligner: Aligner, x: dict[str, Tensor], z: Tensor) -> Tensor:
    """lambda1 Omega^G + lambda2 Omega^L per image, written out once more."""
    names = ("caption_embedding", "label_embeddings", "regions", "region_mask")
    loss_global, loss_local = aligner.losses(z, *(x[name] for name in names), x.get("timestep"))
    mean = local_mean(loss_local, x["region_mask"])
    return x["lambdas"][:, 0] * loss_global + x["lambdas"][:, 1] * mean


@pytest.mark.parametrize("region", ["coverage+fourier", "coverage", "fourier"])
def test_step_is_eta_times_the_gradient(region: RegionMode) -> None:
    aligner = make(region)
    x = inputs(aligner)
    z = x["z"].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(objective(aligner, x, z).sum(), z)
    aligned, loss_global, loss_local = AlignStep(aligner)(**x)
    torch.testing.assert_close(aligned, x["z"] - 0.3 * gradient, rtol=1e-12, atol=1e-12)
    assert loss_global.shape == (B,) and loss_local.shape == (B, M)
    assert not loss_local[0].any() and (loss_local[2] > 0).all()
    assert gradient.flatten(1).norm(dim=1).min() > 1e-6


def test_gradient_against_finite_differences() -> None:
    aligner = make()
    x = inputs(aligner, eta=1.0)
    moved = x["z"] - AlignStep(aligner)(**x)[0]
    direction = torch.randn(B, 4, 8, 8, generator=torch.Generator().manual_seed(2)).double()
    h = 1e-6
    above = objective(aligner, x, x["z"] + h * direction)
    below = objective(aligner, x, x["z"] - h * direction)
    slope = (moved * direction).flatten(1).sum(1)
    torch.testing.assert_close(slope, (above - below) / (2 * h), rtol=1e-6, atol=1e-9)


def test_a_small_step_lowers_the_losses() -> None:
    aligner = make()
    x = inputs(aligner, eta=1e-3)
    aligned = AlignStep(aligner)(**x)[0]
    assert (objective(aligner, x, aligned) < objective(aligner, x, x["z"])).all()


@pytest.mark.parametrize("normalized", [False, True])
def test_an_image_does_not_depend_on_its_batch(normalized: bool) -> None:
    aligner = make()
    step, x = AlignStep(aligner, normalized=normalized), inputs(aligner)
    whole = step(**x)
    for k in range(B):
        one = {name: v[k : k + 1] for name, v in x.items()}
        for together, alone in zip(whole, step(**one), strict=True):
            torch.testing.assert_close(alone[0], together[k], rtol=1e-11, atol=1e-12)


def test_eta_zero_returns_the_latent_itself() -> None:
    aligner = make()
    for normalized in (False, True):
        x = inputs(aligner, eta=0.0)
        assert torch.equal(AlignStep(aligner, normalized=normalized)(**x)[0], x["z"])
    mixed = inputs(aligner) | {"eta": torch.tensor([0.0, 0.3, 0.0]).double()}
    aligned = AlignStep(aligner)(**mixed)[0]
    assert [torch.equal(aligned[k], mixed["z"][k]) for k in range(B)] == [True, False, True]


def test_normalized_step_is_a_share_of_the_latents_norm() -> None:
    aligner = make()
    x = inputs(aligner, eta=0.05)
    step = x["z"] - AlignStep(aligner, normalized=True)(**x)[0]
    plain = x["z"] - AlignStep(aligner)(**x)[0]
    shares = step.flatten(1).norm(dim=1) / x["z"].flatten(1).norm(dim=1)
    torch.testing.assert_close(shares, torch.full((B,), 0.05).double(), rtol=1e-6, atol=0)
    cosine = torch.cosine_similarity(step.flatten(1), plain.flatten(1))
    torch.testing.assert_close(cosine, torch.ones(B).double())


def test_no_box_and_no_caption_weight_leave_the_latent() -> None:
    aligner = make()
    x = inputs(aligner) | {"lambdas": torch.tensor([0.0, 1.0]).double().expand(B, 2)}
    for normalized in (False, True):
        aligned = AlignStep(aligner, normalized=normalized)(**x)[0]
        assert torch.equal(aligned[0], x["z"][0]) and not torch.equal(aligned[1], x["z"][1])


def test_extreme_inputs_stay_finite() -> None:
    aligner = make().float()
    x = {name: value.float() for name, value in inputs(aligner.double()).items()}
    aligner.float()
    tiny = torch.tensor([0.5, 0.5, 0.5 + 6e-8, 0.5 + 6e-8]).expand(B, M, 4)
    x["regions"] = aligner.region_map(tiny, x["region_mask"])
    assert x["regions"][1, 0].sum() > 0
    x["caption_embedding"][0] = 0
    x["label_embeddings"][1] = 0
    x["z"][2] = 0
    for normalized in (False, True):
        assert all(out.isfinite().all() for out in AlignStep(aligner, normalized=normalized)(**x))


def test_region_modes() -> None:
    mask = torch.tensor([[1.0, 1.0, 0.0]]).double()
    boxes = torch.tensor([[[0, 0, 0.5, 0.6], [0.3, 0.3, 0.31, 0.31], [0, 0, 1, 1]]]).double()
    cover = cell_coverage(boxes, GRID, GRID)
    coverage = make("coverage").region_map(boxes, mask)
    torch.testing.assert_close(coverage, cover * mask[..., None], rtol=0, atol=0)
    both, fourier = (make(mode).region_map(boxes, mask) for mode in ("coverage+fourier", "fourier"))
    assert both.shape == fourier.shape == (1, 3, GRID**2)
    # the gates have the same weights, so the modes factor
    torch.testing.assert_close(both, cover * fourier)
    assert not both[:, 2].any() and not fourier[:, 2].any()
    assert (fourier[:, :2] > 0).all() and fourier.max() < 2


def test_the_gate_starts_open_and_neutral() -> None:
    boxes = torch.tensor([[[0.1, 0.2, 0.7, 0.6]]])
    fresh = Aligner(SMALL)
    torch.testing.assert_close(
        fresh.region_map(boxes, torch.ones(1, 1)), cell_coverage(boxes, GRID, GRID)
    )


def test_time_conditioned_step() -> None:
    aligner = make(timed=True)
    for block in aligner.vit.blocks:
        nn.init.normal_(block.modulation.weight, std=0.3)  # type: ignore[union-attr, arg-type]
    x = inputs(aligner) | {"timestep": torch.tensor([981, 500, 1])}
    aligned = AlignStep(aligner)(**x)[0]
    z = x["z"].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(objective(aligner, x, z).sum(), z)
    torch.testing.assert_close(aligned, x["z"] - 0.3 * gradient, rtol=1e-12, atol=1e-12)
    other = AlignStep(aligner)(**(x | {"timestep": torch.tensor([981, 500, 900])}))[0]
    assert torch.equal(other[:2], aligned[:2]) and not torch.allclose(other[2], aligned[2])


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_files_round_trip(tmp_path: Path, dtype: torch.dtype | None) -> None:
    aligner = make("fourier", timed=True).float()
    aligner.save_pretrained(tmp_path / "aligner", dtype)
    assert sorted(p.name for p in (tmp_path / "aligner").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    back = Aligner.from_pretrained(tmp_path / "aligner")
    assert back.config == aligner.config and not back.training
    for name, value in back.state_dict().items():
        expected = aligner.state_dict()[name].to(dtype or torch.float32).float()
        assert value.dtype == torch.float32 and torch.equal(value, expected)
    stored = load_file(tmp_path / "aligner" / "model.safetensors")
    assert {value.dtype for value in stored.values()} == {dtype or torch.float32}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", None),
        ("config.json", b"{"),
        ("config.json", b"\xff"),
        ("config.json", b"[]"),
        ("config.json", b'{"width": 30, "heads": 4}'),
        ("config.json", b'{"depth": 1}'),
        ("model.safetensors", None),
        ("model.safetensors", b""),
        ("model.safetensors", b"\x80\x04pickle" * 9),
    ],
)
def test_damaged_files(tmp_path: Path, name: str, content: bytes | None) -> None:
    make().float().save_pretrained(tmp_path)
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(WeightsError, match="aligner") as caught:
        Aligner.from_pretrained(tmp_path)
    assert caught.value.value == str(tmp_path) and caught.value.remedy


def test_config_is_checked() -> None:
    with pytest.raises(SettingsError, match="multiple of patch_size"):
        AlignerConfig(latent_size=30, patch_size=4)
    with pytest.raises(SettingsError, match="multiple of heads"):
        AlignerConfig(width=30, heads=8)
    assert AlignerConfig().grid == 16
