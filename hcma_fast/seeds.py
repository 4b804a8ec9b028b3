"""Random numbers from seeds of 64 bits."""

from __future__ import annotations

import functools

import numpy as np
import torch
from numpy.typing import NDArray

from hcma_fast.config import MAX_SEED
from hcma_fast.errors import BackendError, InputError

_CPU_BITS = 32
#: of the state of torch's CPU generator: the seed, and the 624 words of the Mersenne Twister, each
#: in 8 bytes (aten/src/ATen/CPUGeneratorImpl.cpp, CPUGeneratorImplStateLegacy)
_SEED_BYTES = slice(0, 8)
_WORD_BYTES = slice(24, 24 + 8 * 624)


def seeded_generator(seed: int, device: str | torch.device = "cpu") -> torch.Generator:
    """A generator of torch in which all 64 bits of ``seed`` count.

    On a CPU ``manual_seed`` uses the lowest 32 bits. So a larger seed is set by the Mersenne
    Twister's own rule for keys of several words (Matsumoto and Nishimura 1998, init_by_array), and
    a smaller one as ``manual_seed`` does.

    Args:
        seed: from 0 to 2**64 - 1.

    Raises:
        InputError: another seed.
        BackendError: this version of torch keeps another state, so such seeds cannot be set.
    """
    if not 0 <= seed <= MAX_SEED:
        raise InputError(
            "a seed must lie between 0 and 2**64 - 1",
            value=seed,
            remedy="Choose a smaller, positive one.",
        )
    generator = torch.Generator(device)
    if seed < 2**_CPU_BITS or generator.device.type != "cpu":
        return generator.manual_seed(seed)
    _check_state_layout()
    key = np.array([seed % 2**_CPU_BITS, seed >> _CPU_BITS], np.uint32)
    state = generator.manual_seed(0).get_state().numpy()
    state[_SEED_BYTES] = np.frombuffer(seed.to_bytes(8, "little"), np.uint8)
    state[_WORD_BYTES] = _twister_words(key).view(np.uint8)
    generator.set_state(torch.from_numpy(state))
    return generator


def seed_torch(seed: int) -> None:
    """``torch.manual_seed`` for the CPU and all GPUs, in which all 64 bits of ``seed`` count."""
    state = seeded_generator(seed).get_state()
    torch.manual_seed(seed)
    torch.set_rng_state(state)


def _twister_words(key: int | NDArray[np.uint32]) -> NDArray[np.uint64]:
    """The Mersenne Twister's 624 words after seeding with a number or a key."""
    words: NDArray[np.uint32] = np.random.RandomState(key).get_state(legacy=False)["state"]["key"]
    return words.astype(np.uint64)


@functools.cache
def _check_state_layout() -> None:
    """Compare torch's state for a seed with numpy's, which follows the same rule for it."""
    probe = 20_261_130
    state = torch.Generator().manual_seed(probe).get_state().numpy()
    seed = int.from_bytes(state[_SEED_BYTES].tobytes(), "little")
    words = state[_WORD_BYTES].copy().view(np.uint64)
    if seed != probe or not np.array_equal(words, _twister_words(probe)):
        raise BackendError(
            "this version of torch keeps the state of its generator in another layout",
            value=torch.__version__,
            remedy="Use a seed below 2**32, or torch 2.13.",
        )
