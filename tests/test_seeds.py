"""Random numbers as functions of their position: the same for ever, and random enough."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections import Counter
from itertools import permutations, product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from energon_fn import position
from energon_fn.position import at
from energon_fn.seeds import number, permutation, reseed, untouched

plain: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3).map(tuple),
    max_leaves=4,
)


def draw() -> tuple[Any, ...]:
    """Numbers of every global generator that is seeded."""
    return (
        random.random(),
        random.randrange(10**9),
        np.random.rand(),
        np.random.randint(10**9),
        torch.rand(()).item(),
        torch.randint(10**9, ()).item(),
    )


# --- number -----------------------------------------------------------------------------------


def test_numbers_never_change() -> None:
    """Another number here means that nobody's run can be resumed: do not adapt this test."""
    assert number() == 5694367389426422167
    assert number(0) == 5263075011782779848
    assert number("shuffle", 0, 7) == 2891156479658887383
    assert number(("a", 1), None, -3) == 108051006580438671


def test_numbers_are_the_same_in_another_process() -> None:
    program = "from energon_fn.seeds import number; print(number('shuffle', (0, 'a'), None))"
    result = subprocess.run(
        [sys.executable, "-c", program],
        env={"PYTHONHASHSEED": "12345", "PYTHONPATH": os.pathsep.join(sys.path)},
        check=True,
        capture_output=True,
        text=True,
    )
    assert int(result.stdout) == number("shuffle", (0, "a"), None)


@given(st.lists(plain, max_size=4), st.lists(plain, max_size=4))
def test_numbers_are_equal_for_equal_things_only(one: list[Any], other: list[Any]) -> None:
    assert 0 <= number(*one) < 2**64
    assert (number(*one) == number(*other)) == (repr(one) == repr(other))


def test_numbers_use_all_their_bits_evenly() -> None:
    drawn = [number("bits", n) for n in range(2000)]
    for bit in range(64):
        assert 850 < sum(value >> bit & 1 for value in drawn) < 1150  # 1000, give or take 6 sigma


# --- permutation ------------------------------------------------------------------------------


def test_permutations_never_change() -> None:
    """Another order here means that nobody's run can be resumed: do not adapt this test."""
    assert permutation(0, 1).tolist() == []
    assert permutation(1).tolist() == [0]
    assert permutation(10, "x", 0).tolist() == [3, 0, 4, 2, 6, 8, 9, 7, 1, 5]
    assert permutation(10, "x", 1).tolist() == [6, 8, 7, 5, 2, 3, 1, 4, 0, 9]
    assert permutation(13, 7, "sequences", 2).tolist() == [
        *(5, 8, 11, 2, 0, 10, 1, 12, 3, 7, 9, 4, 6)
    ]
    assert permutation(1000, "x").tolist()[:8] == [693, 312, 983, 225, 976, 641, 440, 193]


def split_mix(state: int, count: int) -> list[int]:
    """SplitMix64 as it was published, on Python's integers."""
    numbers, mask = [], 2**64 - 1
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & mask
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        numbers.append(z ^ (z >> 31))
    return numbers


def test_the_reference_above_is_split_mix() -> None:
    assert split_mix(1234567, 3) == [  # the values that other implementations are tested with
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]


@given(st.integers(0, 200), plain)
def test_a_permutation_sorts_the_numbers_of_the_published_generator(n: int, what: Any) -> None:
    order = permutation(n, what)
    numbers = split_mix(number(what), n)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(n))
    assert [numbers[i] for i in order] == sorted(numbers)


@pytest.mark.parametrize(
    ("n", "draws", "most"), [(2, 4000, 10.8), (3, 6000, 20.5), (4, 7200, 49.7)]
)
def test_every_order_is_as_likely(n: int, draws: int, most: float) -> None:
    counts = Counter(tuple(permutation(n, "uniform", i).tolist()) for i in range(draws))
    orders = list(permutations(range(n)))
    expected = draws / len(orders)
    # Chi-square, at its 99.9 % quantile; the draws are the same in every run.
    assert sum((counts[order] - expected) ** 2 / expected for order in orders) < most


def test_every_item_is_as_likely_at_every_place() -> None:
    n, draws = 20, 2000
    counts = np.zeros((n, n))
    for i in range(draws):
        counts[np.arange(n), permutation(n, i)] += 1
    expected = draws / n
    assert ((counts - expected) ** 2 / expected).sum() < 443  # 361 degrees of freedom, 99.8 %


def test_permutations_and_the_global_generators_leave_each_other_alone() -> None:
    def seeded(between: bool) -> tuple[Any, ...]:
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)
        if between:
            orders.append(permutation(100, "x").tolist())
        return draw()

    orders = [permutation(100, "x").tolist()]
    with untouched():
        reseed(0, "what follows")
        assert seeded(between=False) == seeded(between=True)
    assert orders[0] == orders[1]


# --- reseed and untouched ---------------------------------------------------------------------


def test_seeded_numbers_never_change() -> None:
    """Another number here means that augmentations change on a resume: do not adapt this test.

    The generators themselves are those of Python, NumPy and torch, who keep them stable.
    """
    with untouched():
        at((0, 5))
        reseed(3, "encode_sample")
        assert random.random() == 0.30259401413147824
        assert np.random.randint(10**6) == 875169
        assert torch.randint(10**6, ()).item() == 742625


def test_position_stage_and_seed_each_change_the_numbers() -> None:
    def drawn(seed: int, what: str, where: Any) -> tuple[Any, ...]:
        at(where)
        reseed(seed, what)
        return draw()

    places = list(product((0, 1), ("encode_sample", "batch"), ((0, 1), (1, 0), ((0, 1), 0), None)))
    with untouched():
        first = [drawn(*place) for place in places]
        again = [drawn(*place) for place in reversed(places)]
    assert first == again[::-1]
    for numbers in zip(*first, strict=True):
        assert len(set(numbers)) == len(places)


def test_calls_at_one_position_differ_and_are_counted_from_it() -> None:
    def three() -> list[tuple[Any, ...]]:
        at("here")
        drawn = []
        for _ in range(3):
            reseed(0, "encode_sample")
            drawn.append(draw())
        return drawn

    with untouched():
        first = three()
        at("elsewhere")
        reseed(0, "encode_sample")
        again = three()
    assert first == again
    assert len(set(first)) == 3


def test_here_is_where_at_was() -> None:
    at(("a", 1))
    assert position.here.where == ("a", 1)
    at(None)
    assert position.here.where is None


@pytest.mark.parametrize("raises", [False, True])
def test_untouched_puts_every_generator_back(raises: bool) -> None:
    def expected() -> tuple[Any, ...]:
        random.seed(5)
        np.random.seed(5)
        torch.manual_seed(5)
        return draw()

    untouched_numbers = expected()
    expected()
    second = draw()
    expected()
    try:
        with untouched():
            reseed(0, "encode_sample")
            draw()
            if raises:
                raise KeyError("in between")
    except KeyError:
        assert raises
    assert draw() == second != untouched_numbers
