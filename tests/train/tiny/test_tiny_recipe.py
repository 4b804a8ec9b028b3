"""The parts of `tiny` as the training commands build them: sizes, shapes, and that they fit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from hcma_fast.config import TOKEN_LENGTH
from hcma_fast.models.aligner import Aligner, AlignStep
from hcma_fast.models.text import tokenize
from hcma_fast.train.aligner.settings import architecture
from hcma_fast.train.data.emoji_scenes import (
    BACKGROUNDS,
    CATEGORY_NAMES,
    FIRST,
    render_scene,
    sample_scene,
)
from hcma_fast.train.data.emoji_scenes2 import SECOND
from hcma_fast.train.tiny.latents import Batch
from hcma_fast.train.tiny.text import WIDTH, make_text_encoder, make_tokenizer
from hcma_fast.train.tiny.unet import align_some, make_unet
from hcma_fast.train.tiny.vae import make_vae, psnr, to_tensor

#: a busy machine is no fault of the code
untimed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

CAPTIONS = [text for i in range(200) for text in sample_scene("train", i).captions]
TOKENIZER = make_tokenizer([*CAPTIONS, *CATEGORY_NAMES])
END = TOKENIZER.eos_token_id


def millions(module: nn.Module) -> float:
    return sum(parameter.numel() for parameter in module.parameters()) / 1e6


def round_trip(text: str) -> str:
    (ids,) = TOKENIZER([text]).input_ids
    assert ids[0] == TOKENIZER.bos_token_id and ids.index(END) == len(ids) - 1
    return str(TOKENIZER.decode(ids, skip_special_tokens=True))


def letters(text: str) -> str:
    """What CLIP's tokenizers keep of a text: neither case nor white space."""
    return "".join(text.lower().split())


@untimed
@given(st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=60))
def test_tokenizer_round_trips_ascii(text: str) -> None:
    assert letters(round_trip(text)) == letters(text)


@untimed
@given(st.text(st.characters(min_codepoint=0xA1, max_codepoint=0x1FAFF, codec="utf-8"), max_size=9))
def test_tokenizer_has_tokens_for_any_text(text: str) -> None:
    # its end token is also CLIP's unknown token: an unknown letter would show as an early end
    round_trip(text)


def test_tokenizer_is_small_and_knows_the_captions() -> None:
    assert len(TOKENIZER) <= 1024 + 2 and TOKENIZER.model_max_length == TOKEN_LENGTH
    for caption in CAPTIONS:
        ids = tokenize(TOKENIZER, [caption])[0].tolist()
        assert TOKENIZER.decode(ids, skip_special_tokens=True).replace(" ,", ",") == caption
    # a word of the captions is one token, so that the small encoder need not spell
    words = {word for phrase in (*CATEGORY_NAMES, *BACKGROUNDS) for word in phrase.split()}
    pieces = {word: len(TOKENIZER([word]).input_ids[0]) - 2 for word in words}
    assert {word for word, count in pieces.items() if count > 1} == set()


def test_tokenizer_is_deterministic() -> None:
    assert make_tokenizer([*CAPTIONS, *CATEGORY_NAMES]).get_vocab() == TOKENIZER.get_vocab()


def test_sizes_are_those_of_the_issue() -> None:
    unet, vae, text = make_unet(), make_vae(), make_text_encoder(TOKENIZER)
    assert 3 < millions(unet) < 6
    assert vae.config.latent_channels == unet.config.in_channels == unet.config.out_channels == 4
    assert unet.config.attention_type == "gated"
    assert unet.config.cross_attention_dim == text.config.hidden_size == WIDTH
    assert text.config.max_position_embeddings == TOKEN_LENGTH
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    assert vae.config.sample_size == factor * unet.config.sample_size
    # two bytes a weight in fp16, and 40 MB for all parts; the aligner has its share of 10
    assert 2 * (millions(unet) + millions(vae) + millions(text)) < 30


def test_the_second_editions_vae_has_the_same_latents_from_twice_the_side() -> None:
    first, second = make_vae(FIRST), make_vae(SECOND)
    assert first.config.latent_channels == second.config.latent_channels
    for edition, vae, size in ((FIRST, first, 0.65), (SECOND, second, 4.2)):
        assert vae.config.sample_size == edition.image_size
        factor = 2 ** (len(vae.config.block_out_channels) - 1)
        assert edition.image_size // factor == make_unet().config.sample_size
        assert abs(millions(vae) - size) < 0.05


def test_aligner_fits_the_other_parts() -> None:
    aligner = Aligner(architecture("tiny"))
    assert aligner.config.latent_size == make_unet().config.sample_size
    assert (aligner.config.grid, aligner.config.text_width) == (8, WIDTH)
    assert 0.9 < millions(aligner) < 1.1


def test_gates_start_open() -> None:
    gates = [p for n, p in make_unet().named_parameters() if n.endswith(("_attn", "_dense"))]
    assert gates and all(torch.tanh(gate) > 0.5 for gate in gates)


@torch.no_grad()
def test_vae_shapes_and_psnr() -> None:
    torch.manual_seed(0)
    scenes = [sample_scene("val", i) for i in range(3)]
    images = np.stack([np.asarray(render_scene(s, "val", i)) for i, s in enumerate(scenes)])
    batch = to_tensor(images)
    assert batch.shape == (3, 3, 64, 64) and batch.dtype == torch.float32
    assert batch.min() >= -1 and batch.max() <= 1
    restored = ((batch.permute(0, 2, 3, 1) + 1) * 127.5).round().byte().numpy()
    np.testing.assert_array_equal(restored, images)

    vae = make_vae().eval()
    mean = vae.encode(batch).latent_dist.mean
    assert mean.shape == (3, 4, 16, 16)
    output = vae.decode(mean).sample.clamp(-1, 1)
    errors = ((output - batch) / 2).square().mean(dim=(1, 2, 3))
    assert psnr(vae, images) == pytest.approx(float((-10 * errors.log10()).mean()), rel=1e-4)


@torch.no_grad()
def test_unet_takes_a_layout_and_a_caption() -> None:
    torch.manual_seed(0)
    unet, text = make_unet().eval(), make_text_encoder(TOKENIZER).eval()
    output = text(input_ids=tokenize(TOKENIZER, ["a dog at night", "dog"]))
    gligen = {
        "boxes": torch.tensor([[[0.1, 0.1, 0.6, 0.6]]]),
        "positive_embeddings": output.pooler_output[1:, None],
        "masks": torch.ones(1, 1),
    }
    z, hidden = torch.randn(1, 4, 16, 16), output.last_hidden_state[:1]
    grounded = unet(z, torch.tensor([500]), hidden, cross_attention_kwargs={"gligen": gligen})
    plain = unet(z, torch.tensor([500]), hidden)
    assert grounded.sample.shape == z.shape
    assert (grounded.sample - plain.sample).abs().max() > 1e-4


@torch.no_grad()
def test_stage_2_aligns_the_chosen_examples_alone() -> None:
    torch.manual_seed(0)
    aligner = Aligner(architecture("tiny"))
    z, width = torch.randn(3, 4, 16, 16), aligner.config.text_width
    mask = torch.zeros(3, 30)
    mask[:, 0] = 1
    boxes = torch.zeros(3, 30, 4)
    boxes[:, 0] = torch.tensor([0.1, 0.2, 0.7, 0.8])
    batch = Batch(
        z0=z,
        hidden=torch.zeros(3, TOKEN_LENGTH, width),
        caption=torch.randn(3, width),
        labels=torch.randn(3, 30, width),
        boxes=boxes,
        mask=mask,
    )
    align, times = AlignStep(aligner), torch.tensor([100, 900, 500])
    chosen = np.array([False, True, False])
    moved = align_some(align, z, batch, times, chosen, seed=1)
    assert torch.equal(moved[[0, 2]], z[[0, 2]]) and not torch.equal(moved[1], z[1])
    assert torch.equal(align_some(align, z, batch, times, chosen, seed=1), moved)
    assert torch.equal(align_some(align, z, batch, times, ~(chosen | True), seed=1), z)
