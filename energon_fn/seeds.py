"""Randomness as a function of position.

Every random number is computed from *(seed, what for, where)*, never drawn from a generator that
runs along. So it does not matter who computes it, in which order, or how often: a sample that is
loaded again after a resume, or by another worker, meets the same numbers.

Where is kept in :mod:`energon_fn.position`; a user's function is seeded from it by :func:`reseed`.
"""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import blake2b
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from energon_fn.position import here


def number(*what: object) -> int:
    """A 64-bit number that depends on ``what`` alone.

    ``what`` is plain data: ints, strings, tuples of them. Equal on every machine and in every run.

    >>> number("shuffle", 0, 7) == number("shuffle", 0, 7)
    True
    >>> number("shuffle", 0, 7) == number("shuffle", 0, 8)
    False
    """
    return int.from_bytes(blake2b(repr(what).encode(), digest_size=8).digest(), "little")


def permutation(n: int, *what: object) -> npt.NDArray[np.int64]:
    """A permutation of ``range(n)`` that depends on ``n`` and ``what`` alone (int64, shape (n,)).

    It sorts the numbers of a counter-based generator (SplitMix64, Steele et al. 2014), so it
    does not change with the version of NumPy.

    >>> sorted(permutation(5, "seed", 1).tolist())
    [0, 1, 2, 3, 4]
    """
    x = np.arange(1, n + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    x += np.uint64(number(*what))
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return np.argsort(x, kind="stable")


_before: list[tuple[Callable[[Any], object], Any]] | None = None  # of the generators, once reseeded
_mine = threading.RLock()


def _renew() -> None:
    global _mine
    _mine = threading.RLock()  # a fork has none of the threads that could hold it


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)


@contextmanager
def untouched() -> Iterator[None]:
    """Leave the global random generators, when all is done, as :func:`reseed` found them.

    One thread at a time can be inside: generators and position are one for the whole process.

    >>> random.seed(1); a = random.random(); random.seed(1)
    >>> with untouched():
    ...     reseed(0, "encode_sample")
    >>> random.random() == a
    True
    """
    global _before
    with _mine:
        outer, _before = _before, []
        try:
            yield
        finally:
            before, _before = _before, outer
            for restore, state in before:
                restore(state)


def reseed(seed: int, what: str) -> None:
    """Seed ``random``, NumPy's and torch's global CPU generators for the next call of ``what``.

    The seed is a function of ``seed``, ``what``, the position, and how many calls there were at
    this position.

    >>> from energon_fn.position import at
    >>> at(("epoch", 0, "sample", 5)); reseed(0, "encode_sample"); a = random.random()
    >>> at(("epoch", 0, "sample", 6)); reseed(0, "encode_sample"); b = random.random()
    >>> at(("epoch", 0, "sample", 5)); reseed(0, "encode_sample"); c = random.random()
    >>> (a == c, a == b)
    (True, False)
    """
    if _before == []:  # saving takes longer than seeding: only where it is needed
        _before.append((random.setstate, random.getstate()))
        _before.append((np.random.set_state, np.random.get_state()))
        _before.append((torch.set_rng_state, torch.get_rng_state()))
    x = number(seed, what, here.where, here.calls)
    here.calls += 1
    random.seed(x)
    np.random.seed(x & 0xFFFFFFFF)
    torch.default_generator.manual_seed(x)
