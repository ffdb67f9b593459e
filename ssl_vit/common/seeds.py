"""Seeds: keys folded from (seed, step, sample), and uniform numbers by key.

Stateless, so no random state is ever saved: the same key gives the same numbers on any device, in
any process, with any number of workers.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def fold(*values: int) -> int:
    """Fold several integers, in order, into one 63-bit key.

    Each value goes through the finaliser of SplitMix64 (Steele et al. 2014, section 5).
    """
    key = 0
    for value in values:
        z = (key + value + 1) * _GOLDEN & _MASK
        z = (z ^ (z >> 30)) * _MIX[0] & _MASK
        z = (z ^ (z >> 27)) * _MIX[1] & _MASK
        key = z ^ (z >> 31)
    return key >> 1


def fold_keys(keys: Int64[Tensor, " b"], value: int) -> Int64[Tensor, " b"]:
    """``fold(key, value)`` of each key, on the keys' device: a second, independent draw from it."""
    mixed = torch.zeros_like(keys)
    for part in (keys, value):
        z = (mixed + part + 1) * _signed(_GOLDEN)
        z = (z ^ _shift(z, 30)) * _signed(_MIX[0])
        z = (z ^ _shift(z, 27)) * _signed(_MIX[1])
        mixed = z ^ _shift(z, 31)
    return _shift(mixed, 1)


def generator(key: int) -> np.random.Generator:
    """Numpy's generator as a function of ``key``: what :meth:`Method.draw` draws a sample from."""
    return np.random.Generator(np.random.PCG64(key))


def uniform(keys: Int64[Tensor, " b"], n: int) -> Float[Tensor, "b n"]:
    """Uniform numbers in [0, 1), ``n`` for each key: 24 random bits, equal on every device."""
    counter = torch.arange(1, n + 1, device=keys.device, dtype=torch.int64)
    z = keys[:, None] + counter * _signed(_GOLDEN)
    z = (z ^ _shift(z, 30)) * _signed(_MIX[0])
    z = (z ^ _shift(z, 27)) * _signed(_MIX[1])
    return _shift(z ^ _shift(z, 31), 40).to(torch.float32) * 2.0**-24


def seed_generators(key: int, device: torch.device) -> None:
    """Seed torch's own generators: of the CPU, and of a device that is none.

    ``torch.manual_seed`` seeds those of devices that are not used, too, and takes a hundred times
    as long where there are none, as it keeps for each how it was called.
    """
    if device.type == "cpu":
        torch.default_generator.manual_seed(key)
    else:
        torch.manual_seed(key)


@contextmanager
def seeded(key: int) -> Iterator[None]:
    """Context manager: seed Python's and numpy's global generators by ``key``, then restore them.

    For libraries that use them and take no generator.
    """
    before = random.getstate(), np.random.get_state()
    random.seed(key)
    np.random.seed(key & 0xFFFFFFFF)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])


def _signed(value: int) -> int:
    """Signed integer of a 64-bit pattern, for torch; products wrap like unsigned ones."""
    return value - (1 << 64) if value >> 63 else value


def _shift(z: Tensor, bits: int) -> Tensor:
    """Logical right shift: torch's own keeps the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)
