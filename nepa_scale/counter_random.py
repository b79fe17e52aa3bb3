"""Randomness without state: every draw is a hash of what it is for.

A run's masks, drop paths, crops and orders are pure functions of (seed, epoch, sample, purpose). They are hence the
same on any number of ranks and workers, for any micro-batch, under recomputation and after a restart, and no generator
state has to be saved. The hash is the finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014, section 5), applied
once for each word that is folded in.
"""

from __future__ import annotations

import zlib
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _finalise(value: int) -> int:
    value = ((value ^ (value >> 30)) * _MULTIPLIERS[0]) & _MASK
    value = ((value ^ (value >> 27)) * _MULTIPLIERS[1]) & _MASK
    return value ^ (value >> 31)


def hash_words(*words: int | str) -> int:
    """A 64-bit unsigned hash of whole numbers and short names, in order."""
    state = 0
    for word in words:
        number = zlib.crc32(word.encode()) if isinstance(word, str) else word
        state = _finalise((state + _GAMMA + number) & _MASK)
    return state


def hash_array(values: NDArray[np.int64], *words: int | str) -> NDArray[np.int64]:
    """`hash_words(*words, value)` of each value, int64 [N], as signed numbers, int64 [N]."""
    state = values.view(np.uint64) + np.uint64((hash_words(*words) + _GAMMA) & _MASK)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(_MULTIPLIERS[0])
    state = (state ^ (state >> np.uint64(27))) * np.uint64(_MULTIPLIERS[1])
    return (state ^ (state >> np.uint64(31))).view(np.int64)


def hash_uniform(*words: int | str) -> float:
    """A number in [0, 1), from 53 bits of `hash_words`."""
    return (hash_words(*words) >> 11) * 2.0**-53


def uniform(keys: Tensor, *words: int | str, count: int = 1) -> Tensor:
    """`count` numbers in [0, 1) for each key, float32 [B, count]; `keys` is int64 [B], `words` name the purpose.

    Runs on the device of `keys`, and gives the same numbers on each: int64 arithmetic wraps everywhere.
    """
    state = (keys + _signed(hash_words(*words))).unsqueeze(1)
    state = _finalise_tensor(state + _signed(_GAMMA))
    counter = torch.arange(count, device=keys.device, dtype=torch.int64).unsqueeze(0)
    bits = _finalise_tensor(state + (counter + 1) * _signed(_GAMMA))
    return _shift(bits, 40).to(torch.float32) * 2.0**-24


def uniform_each(keys: Tensor, purposes: tuple[tuple[int | str, ...], ...]) -> Tensor:
    """What `uniform` gives for each purpose (its words) and key, float32 [purposes, B], in one go."""
    apart = keys + _offsets(purposes, keys.device).unsqueeze(1)
    return uniform(apart.flatten()).view(len(purposes), -1)


@lru_cache(maxsize=16)
def _offsets(purposes: tuple[tuple[int | str, ...], ...], device: torch.device) -> Tensor:
    """int64 [purposes], kept: to copy them to a device at each use would wait for it."""
    with torch.inference_mode(False):
        return torch.tensor([_signed(hash_words(*words)) for words in purposes], dtype=torch.int64, device=device)


def _shift(value: Tensor, bits: int) -> Tensor:
    """Logical right shift; torch's is arithmetic."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _finalise_tensor(value: Tensor) -> Tensor:
    value = (value ^ _shift(value, 30)) * _signed(_MULTIPLIERS[0])
    value = (value ^ _shift(value, 27)) * _signed(_MULTIPLIERS[1])
    return value ^ _shift(value, 31)
