"""Mixed orders: every position exact, every count exact, every dataset spread evenly."""

import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from itertools import islice, pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from energon_fn.order.mixing import (
    STEPS,
    Blend,
    Order,
    Rounds,
    beginning,
    drawn,
    keys,
    lane_count,
    lane_size,
    leaves,
    state_after,
)
from energon_fn.order.plan import Plan


def rising(step: int) -> float:
    return step / 10


def falling(step: int) -> float:
    return 1 / (step + 1)


amounts = st.fractions(Fraction(1, 9), 4, max_denominator=9)
weights: st.SearchStrategy[Any] = amounts | st.sampled_from([falling])


@st.composite
def orders(draw: Callable[..., Any], repeat: bool = True) -> Order:
    lanes, seed = draw(st.integers(1, 4)), draw(st.integers(0, 3))
    first = 0

    def leaf() -> Plan:
        nonlocal first
        runs = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
        window = draw(st.none() | st.integers(2, 9))
        plan = Plan(runs, lanes, seed, True, True, 3, window, first=first)
        first += len(plan)
        return plan

    def blend(depth: int) -> Blend:
        inner = [tree(depth - 1) for _ in range(draw(st.integers(1, 3)))]
        amount = tuple(draw(weights) for _ in inner)
        return Blend(tuple(inner), amount, lanes, seed, draw(st.booleans()))

    def rounds(depth: int, repeat: bool = True) -> Rounds:
        inner = [
            blend(depth - 1) if depth > 1 and draw(st.booleans()) else leaf()
            for _ in range(draw(st.integers(1, 3)))
        ]
        return Rounds(tuple(inner), tuple(draw(amounts) for _ in inner), lanes, seed, repeat)

    def tree(depth: int) -> Order:
        kind = draw(st.sampled_from("lbr")) if depth else "l"
        return blend(depth) if kind == "b" else rounds(depth) if kind == "r" else leaf()

    return tree(2) if repeat else rounds(2, repeat=False)


@settings(max_examples=60)
@given(orders(), st.data())
def test_every_state_goes_on_exactly(order: Order, data: st.DataObject) -> None:
    lane = data.draw(st.integers(0, order.lanes - 1))
    # A nested order of which the lane has nothing for many rounds would take its time.
    whole = list(islice(keys(order, lane), 25))
    for done, (_, state) in enumerate(whole, 1):
        assert list(islice(keys(order, lane, state), 25 - done)) == whole[done:]
        assert state_after(order, lane, done) == state
        assert sum(drawn(order, lane, state)) == done


@given(orders(), st.data())
def test_what_was_drawn_is_what_came(order: Order, data: st.DataObject) -> None:
    lane = data.draw(st.integers(0, order.lanes - 1))
    came, state = Counter[int](), None
    starts = [leaf.first for leaf in leaves(order)]
    for (_, index), state in islice(keys(order, lane), data.draw(st.integers(0, 200))):  # noqa: B007
        came[max(n for n, start in enumerate(starts) if start <= index)] += 1
    assert drawn(order, lane, state) == [came[n] for n in range(len(starts))]


@given(orders(repeat=False), st.integers(0, 4))
def test_a_round_has_every_part_exactly_as_often_as_said(rounds: Rounds, epoch: int) -> None:
    lanes = [
        [key for key, _ in keys(rounds, lane, beginning(rounds, epoch))]
        for lane in range(rounds.lanes)
    ]
    assert [len(lane) for lane in lanes] == [
        lane_size(rounds, epoch, lane) for lane in range(rounds.lanes)
    ]
    came = Counter(key for lane in lanes for key in lane)
    assert set(came.values()) <= {1}
    for part, times in zip(rounds.parts, rounds.repetitions, strict=True):
        inside = [leaf for leaf in leaves(part)]
        low, high = inside[0].first, inside[-1].first + len(inside[-1])
        wanted = int((epoch + 1) * times * len(part)) - int(epoch * times * len(part))
        assert sum(low <= index < high for _, index in came) == wanted
        if isinstance(part, Plan) and times.denominator == 1:  # whole rounds through the dataset
            assert Counter(index for _, index in came if low <= index < high) == {
                index: times for index in range(low, high)
            }


@given(orders(), st.integers(0, 300))
def test_any_number_of_samples_is_dealt_to_the_lanes(order: Order, count: int) -> None:
    if not isinstance(order, Rounds):
        assert sum(lane_count(order, lane, count) for lane in range(order.lanes)) == count


def blend_of(*given: Any, lanes: int = 1, random: bool = False, seed: int = 0) -> Blend:
    parts = tuple(
        Plan((7,), lanes, shuffle=True, repeat=True, window=7, first=7 * n)
        for n in range(len(given))
    )
    return Blend(parts, given, lanes, seed, random)


@settings(max_examples=50)
@given(st.lists(amounts, min_size=1, max_size=6), st.integers(1, 5), st.integers(1, 3000))
def test_parts_are_spread_evenly(shares: list[Fraction], lanes: int, count: int) -> None:
    blend = blend_of(*shares, lanes=lanes)
    for lane in range(lanes):
        counts = drawn(blend, lane, (0, count))
        for share, came in zip(shares, counts, strict=True):
            assert abs(came - count * share / sum(shares)) <= 1 + len(shares) * share / sum(shares)


@settings(max_examples=20)
@given(st.lists(amounts, min_size=1, max_size=9), st.integers(0, 9))
def test_positions_around_the_ends_of_chunks_are_exact(shares: list[Fraction], seed: int) -> None:
    blend = blend_of(*shares, lanes=3, seed=seed)
    whole = [key for key, _ in islice(keys(blend, 2), 2 * STEPS + 40)]
    for end in (STEPS, 2 * STEPS):
        for done in range(end - 12, end + 12):
            assert next(keys(blend, 2, (0, done)))[0] == whole[done]


def test_lanes_together_are_spread_evenly_too() -> None:
    blend = blend_of(Fraction(1), Fraction(9), lanes=10)
    for count in range(1, 40):  # each step of all lanes has one sample of the rare part
        rare = sum(drawn(blend, lane, (0, count))[0] for lane in range(10))
        assert abs(rare - count) <= 1


def test_random_draws_have_the_right_shares_and_no_pattern() -> None:
    blend = blend_of(Fraction(3), Fraction(1), random=True)
    picks = [index // 7 for (_, index), _ in islice(keys(blend, 0), 4000)]
    assert abs(picks.count(1) - 1000) < 5 * (4000 * 3 / 16) ** 0.5
    pairs = sum(a == b == 1 for a, b in pairwise(picks))
    assert abs(pairs - 250) < 100  # independent: a quarter of a quarter
    assert picks != [
        i // 7 for (_, i), _ in islice(keys(blend_of(*blend.weights, random=True, seed=1), 0), 4000)
    ]


def test_a_curriculum_goes_by_all_lanes_samples() -> None:
    blend = blend_of(lambda step: step < 300, lambda step: step >= 300, lanes=3)
    for lane in range(3):
        picks = [index // 7 for (_, index), _ in islice(keys(blend, lane), 200)]
        assert picks == [0] * 100 + [1] * 100


def test_a_curriculum_may_rise_from_nothing() -> None:
    blend = blend_of(Fraction(1), rising)
    picks = [index // 7 for (_, index), _ in islice(keys(blend, 0), 400)]
    assert picks[0] == 0
    assert 30 < picks[:100].count(1) < 90 < picks[300:].count(1)


def test_weights_that_turn_out_wrong_are_named() -> None:
    with pytest.raises(ValueError, match=r"after 2 samples are \[0\.0, 0\.0\]"):
        list(islice(keys(blend_of(lambda step: step < 2, lambda step: 0), 0), 5))
    with pytest.raises(TypeError, match="no end"):
        lane_size(blend_of(Fraction(1)), 0, 0)


def test_a_blends_next_epoch_is_another_order() -> None:
    for random in (False, True):
        blend = blend_of(Fraction(1), Fraction(2), random=random)
        first, second = (
            [key for key, _ in islice(keys(blend, 0, beginning(blend, epoch)), 30)]
            for epoch in (0, 1)
        )
        assert not {*first} & {*second}
        assert [index for _, index in first] != [index for _, index in second]


@pytest.mark.parametrize("random", [False, True])
def test_a_blend_that_is_there_twice_goes_its_own_way_each_time(random: bool) -> None:
    """Drawn alike, what is rare in both would always come together."""

    def picks(seed: int) -> list[list[int]]:
        parts = [blend_of(Fraction(1), Fraction(4), random=random, seed=seed) for _ in range(2)]
        moved = tuple(replace(plan, first=plan.first + 14) for plan in leaves(parts[1]))
        both = Blend((parts[0], replace(parts[1], parts=moved)), (Fraction(1),) * 2, 1, seed)
        found: list[list[int]] = [[], []]
        for (_, index), _ in islice(keys(both, 0), 40):
            found[index // 14].append(index // 7 % 2)
        return found

    alike = [first == second for first, second in map(picks, range(20))]
    assert not any(alike) if random else sum(alike) < 10  # of five ways to be spread evenly


def test_a_curriculum_that_is_there_twice_goes_its_own_way_each_time() -> None:
    def picks(first: int) -> list[int]:
        parts = [Plan((7,), shuffle=True, repeat=True, first=first + 7 * n) for n in range(2)]
        blend = Blend(tuple(parts), (lambda step: 1, lambda step: 2), 1, 0)
        return [(index - first) // 7 for (_, index), _ in islice(keys(blend, 0), 40)]

    assert len({tuple(picks(14 * n)) for n in range(9)}) > 1


def far_orders() -> dict[str, Order]:
    a, b = (Plan((7, 5), 8, shuffle=True, repeat=True, first=12 * n) for n in range(2))
    amounts = Fraction(1), Fraction(1, 3)
    return {
        "plan": a,
        "windowed": replace(a, window=5, sequence=2),
        "in order": Plan((7, 5), 8, repeat=True, block=2),
        "rounds": Rounds((a, b), amounts, 8, 0, repeat=True),
        "rounds of a blend": Rounds((Blend((a, b), amounts, 8, 0),), (Fraction(2),), 8, 0, True),
        "blend": Blend((a, b), amounts, 8, 0),
        "blend of rounds": Blend((Rounds((a,), (Fraction(1, 5),), 8, 0, True), b), amounts, 8, 0),
    }


def calls_of(function: Callable[[], object], most: float = float("inf")) -> int:
    """How many Python functions were called on the way. Raises for more than ``most``."""
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls > most:
            raise AssertionError(f"more than {most} calls")

    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(None)
    return calls


@pytest.mark.parametrize("name", far_orders())
def test_a_place_far_in_is_exact_and_no_longer_way_than_one_near(name: str) -> None:
    order, lane, steps = far_orders()[name], 3, 40

    def look_around(count: int) -> None:
        state = state_after(order, lane, count)
        counts = drawn(order, lane, state)
        assert sum(counts) == count
        found = list(islice(keys(order, lane, state), steps))
        for n, (_, after) in enumerate(found, 1):
            assert after == state_after(order, lane, count + n)
        came = Counter((index // 12, index // 12 * 12) for (_, index), _ in found)
        more = drawn(order, lane, found[-1][1])
        assert [b - a for a, b in zip(counts, more, strict=True)] == [
            came[n, leaf.first] for n, leaf in enumerate(leaves(order))
        ]

    near = calls_of(lambda: look_around(20))
    calls_of(lambda: look_around(10**6 + 1), most=4 * near)


def test_many_parts_and_long_ways_cost_little() -> None:
    blend = blend_of(*(Fraction(n + 1) for n in range(300)), lanes=2)
    far = 10**12
    counts = drawn(blend, 1, (0, far))
    assert sum(counts) == far
    ahead = [key for key, _ in islice(keys(blend, 1, (0, far)), 500)]
    assert len({index // 7 for _, index in ahead}) > 100
