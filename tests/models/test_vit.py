"""The ViT: patches without a convolution, positions for other grids, modulation by time."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hcma_fast.config import AlignerConfig
from hcma_fast.errors import UsageError
from hcma_fast.models.vit import LatentViT, timestep_features

SMALL = AlignerConfig(
    latent_size=8, patch_size=2, token_width=12, width=16, depth=2, heads=2, text_width=8
)
TIMED = SMALL.model_copy(update={"time_conditioning": "adaln"})


def make(config: AlignerConfig = SMALL) -> LatentViT:
    torch.manual_seed(0)
    return LatentViT(config).eval()


def latents(height: int = 8, width: int = 8) -> torch.Tensor:
    return torch.randn(3, 4, height, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("size", [(8, 8), (4, 12)])
@torch.no_grad()
def test_patchify_and_project_equal_a_convolution(size: tuple[int, int]) -> None:
    vit, z = make(), latents(*size)
    kernel = vit.project.weight.view(12, 4, 2, 2)
    convolved = F.conv2d(z, kernel, vit.project.bias, stride=2).flatten(2).transpose(1, 2)
    torch.testing.assert_close(vit.project(vit.patchify(z)), convolved, rtol=1e-5, atol=1e-5)
    assert not any(isinstance(module, nn.Conv2d) for module in vit.modules())


@torch.no_grad()
def test_shapes() -> None:
    image, cells = make()(latents())
    assert image.shape == (3, 16) and cells.shape == (3, 16, 16)
    image, cells = make()(latents(4, 12))
    assert image.shape == (3, 16) and cells.shape == (3, 2 * 6, 16)


def test_positions_are_learned_for_one_grid_and_resampled_for_others() -> None:
    vit = make()
    assert vit.positions_for(4, 4) is vit.positions
    other = vit.positions_for(2, 6)
    assert other.shape == (1, 1 + 2 * 6, 16)
    torch.testing.assert_close(other[:, 0], vit.positions[:, 0], rtol=0, atol=0)
    with torch.no_grad():
        # a slope along the columns stays one when it is resampled: rows first, then columns
        vit.positions[:, 1:] = torch.arange(4.0).repeat(4)[None, :, None]
    rows = vit.positions_for(3, 8)[0, 1:, 0].view(3, 8)
    torch.testing.assert_close(rows[0], rows[2])
    assert (rows[0].diff() > -0.05).all() and rows[0, -1] - rows[0, 0] > 2.5


@torch.no_grad()
def test_positions_and_global_token_matter() -> None:
    vit, z = make(), latents()
    image, cells = vit(z)
    nn.init.normal_(vit.positions)
    moved_image, moved_cells = vit(z)
    assert (moved_image - image).abs().max() > 1e-3
    assert (moved_cells - cells).abs().max() > 1e-3
    # every cell reaches the global feature through attention
    changed = z.clone()
    changed[:, :, -1, -1] += 1
    assert (vit(changed)[0] - moved_image).abs().max() > 1e-5


@torch.no_grad()
def test_time_modulation_starts_as_identity_blocks() -> None:
    vit, z = make(TIMED), latents()
    tokens = torch.cat([vit.cls.expand(3, -1, -1), vit.embed(vit.project(vit.patchify(z)))], dim=1)
    expected = vit.norm(tokens + vit.positions)
    image, cells = vit(z, torch.tensor([1, 500, 981]))
    torch.testing.assert_close(image, expected[:, 0])
    torch.testing.assert_close(cells, expected[:, 1:])


@torch.no_grad()
def test_trained_time_modulation_reads_each_images_time() -> None:
    vit = make(TIMED)
    for block in vit.blocks:
        assert isinstance(block.modulation, nn.Linear)
        nn.init.normal_(block.modulation.weight, std=0.5)
    z = latents()[:1].expand(2, -1, -1, -1)
    early, late = vit(z, torch.tensor([981, 1]))[0]
    assert (early - late).abs().max() > 1e-3
    torch.testing.assert_close(vit(z[:1], torch.tensor([981]))[0][0], early)


def test_time_conditioning_without_a_time_is_an_error() -> None:
    with pytest.raises(UsageError, match="timestep") as caught:
        make(TIMED)(latents())
    assert caught.value.remedy


def test_timestep_features_are_diffusers() -> None:
    from diffusers.models.embeddings import get_timestep_embedding

    times = torch.tensor([0, 1, 981])
    expected = get_timestep_embedding(times, 64, flip_sin_to_cos=True, downscale_freq_shift=0)
    torch.testing.assert_close(timestep_features(times, 64), expected, rtol=1e-5, atol=1e-5)
