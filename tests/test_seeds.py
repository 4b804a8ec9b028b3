"""Seeds of 64 bits: all of them count, and small ones give what torch gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hcma_fast.config import MAX_SEED
from hcma_fast.errors import InputError
from hcma_fast.runtime.requests import noise_from_seeds, spread_seeds
from hcma_fast.seeds import seed_torch, seeded_generator
from hcma_fast.train.aligner.objective import draw_noised
from hcma_fast.train.data.latent_cache import Batch

LARGE = (2**32, 2**32 + 7, 2**62 + 7, 2**63, MAX_SEED)


def test_seeds_below_32_bits_draw_what_torch_draws() -> None:
    for seed in (0, 7, 2**31, 2**32 - 1):
        expected = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(noise_from_seeds([seed], (4, 8, 8))[0], expected)
    # and what it drew when these seeds were first published
    first = noise_from_seeds([7], (3,))[0]
    torch.testing.assert_close(first, torch.tensor([-0.1468, 0.7861, 0.9468]), atol=1e-4, rtol=0)


def test_larger_seeds_follow_the_twisters_rule_for_keys() -> None:
    for seed in LARGE:
        key = np.array([seed % 2**32, seed >> 32], np.uint32)
        words = np.frombuffer(np.random.RandomState(key).bytes(4 * 2_000), "<u4").astype(np.int64)
        generator = seeded_generator(seed)
        # more than the 624 words of a state
        drawn = torch.empty(2_000, dtype=torch.int32).random_(generator=generator)
        assert drawn.tolist() == (words % 2**31).tolist()
        assert generator.initial_seed() == seed


def test_every_bit_of_a_seed_counts() -> None:
    seeds = [7, *(7 ^ 1 << bit for bit in range(64))]
    noise = noise_from_seeds(seeds, (4, 4, 4))
    for row, seed in enumerate(seeds):
        others = noise[torch.arange(len(seeds)) != row]
        assert (others - noise[row]).abs().flatten(1).amax(1).min() > 0.1, seed
    assert abs(float(noise.mean())) < 0.05 and abs(float(noise.std()) - 1) < 0.05
    assert torch.equal(noise, noise_from_seeds(seeds, (4, 4, 4)))


def test_torchs_own_generator_takes_them_too() -> None:
    with torch.random.fork_rng([]):
        drawn = []
        for seed in (7, *LARGE):
            seed_torch(seed)
            drawn.append(torch.randn(16))
            assert torch.equal(drawn[-1], torch.randn(16, generator=seeded_generator(seed)))
        torch.manual_seed(7)
        assert torch.equal(drawn[0], torch.randn(16))
    assert len({tuple(values.tolist()) for values in drawn}) == len(drawn)


def test_the_noise_of_training_sees_all_bits() -> None:
    ones = torch.ones(2, 4, 4, 4)
    rest = {name: torch.zeros(2, 1) for name in Batch.__dataclass_fields__}
    batch = Batch(**{**rest, "mean": ones, "std": ones})
    drawn = [draw_noised(batch, 1.0, seed) for seed in (7, 7 + 2**32, 7 + 2**62)]
    for i, one in enumerate(drawn):
        for other in drawn[:i]:
            assert (one.noise - other.noise).abs().max() > 0.1
            assert (one.z - other.z).abs().max() > 0.1


def test_seeds_may_be_numpys_and_count_up() -> None:
    three = (3, np.int64(3), np.uint8(3), np.float32(3), np.array(3), np.array([3]), 3.0)
    for seed in (*three, torch.tensor(3), torch.tensor([3])):
        found = spread_seeds(seed, 2)
        assert found == [3, 4] and {type(value) for value in found} == {int}
    for seed in ([5, 3], (np.int64(5), 3.0), np.array([5, 3]), torch.tensor([5, 3])):
        found = spread_seeds(seed, 2)
        assert found == [5, 3] and {type(value) for value in found} == {int}
    assert spread_seeds(MAX_SEED - 1, 2) == [MAX_SEED - 1, MAX_SEED]
    assert spread_seeds(np.uint64(MAX_SEED), 1) == [MAX_SEED]


def test_what_is_no_seed_is_refused() -> None:
    wrong = [
        -1,
        2**64,
        10**400,
        True,
        np.bool_(True),
        0.5,
        np.nan,
        "3",
        b"3",
        [True],
        ["3"],
        [None],
    ]
    wrong += [[], [1, 2], np.array([1.5]), np.array([[1], [2]]), {}, object(), 1j]  # type: ignore[list-item]
    for seed in wrong:
        with pytest.raises(InputError, match="one seed, whole numbers"):
            spread_seeds(seed, 1)
    with pytest.raises(InputError, match="2 seeds"):
        spread_seeds(MAX_SEED, 2)
    for number in (-1, 2**64):
        with pytest.raises(InputError, match="between 0"):
            seeded_generator(number)
