"""Meters: counts are exact, times are right on average though not every call is timed."""

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from energon_fn.meters import SLOW, STRIDE, Meter, Meters, duration, percentile, step, steps_of


@given(st.integers(0, 10**13))
def test_a_step_holds_durations_that_differ_little(ns: int) -> None:
    assert abs(duration(step(ns)) - ns) <= ns / 16


@given(st.integers(0, 10**13))
def test_a_longer_duration_has_no_lower_step(ns: int) -> None:
    assert 0 <= step(ns + 1) - step(ns) <= 1


@given(st.lists(st.integers(1, 10**9), min_size=1), st.sampled_from([0.5, 0.95, 1.0]))
def test_percentiles_are_those_of_the_durations(durations: list[int], share: float) -> None:
    found = percentile(share, [(step(ns), 1) for ns in durations])
    assert found == pytest.approx(
        np.percentile(durations, 100 * share, method="inverted_cdf"), rel=0.07
    )


def run(durations: list[int]) -> tuple[Meter, int]:
    """A meter of calls that take so long, and how many of them read the clock."""
    meter, clocks = Meter(), 0
    for ns in durations:
        meter.calls += 1
        if meter.calls >= meter.due:
            clocks += 1
            meter.took(ns)
    return meter, clocks


@given(st.integers(SLOW + 1, 10**9), st.integers(1, 100))
def test_each_slow_call_is_timed(ns: int, calls: int) -> None:
    meter, clocks = run([ns] * calls)
    assert (meter.ns, clocks) == (ns * calls, calls)


@given(st.integers(1, SLOW), st.integers(1, 500))
def test_of_quick_calls_a_part_is_timed_and_stands_for_all(ns: int, calls: int) -> None:
    meter, clocks = run([ns] * calls)
    assert clocks == 1 + (calls - 1) // STRIDE
    assert ns * (calls - STRIDE) < meter.ns <= ns * calls
    assert sum(meter.times.values()) == 1 + (clocks - 1) * STRIDE


@pytest.mark.parametrize("slow", [0.02, 0.5])
def test_the_sum_is_right_where_some_calls_are_slow(slow: float) -> None:
    chance = random.Random(1)
    durations = [10**6 if chance.random() < slow else 2_000 for _ in range(100_000)]
    meter, clocks = run(durations)
    assert clocks < len(durations)
    assert meter.ns == pytest.approx(sum(durations), rel=0.05)


def test_periods_of_batches_are_not_met_always_at_the_same_place() -> None:
    durations = ([15_000] + [1_000] * 31) * 1000
    assert run(durations)[0].ns == pytest.approx(sum(durations), rel=0.05)


@given(st.lists(st.tuples(st.sampled_from(["a", "b"]), st.integers(1, 10**8)), max_size=50))
def test_news_add_up_to_all_there_is(calls: list[tuple[str, int]]) -> None:
    meters, sums = Meters(), dict[str, float]()
    for name, ns in calls:
        meters[name].calls += 1
        meters[name].took(ns)
        meters.counts["packs"] += 1
        if ns % 3 == 0:
            for what, new in meters.news().items():
                sums[what] = sums.get(what, 0) + new
    for what, new in meters.news().items():
        sums[what] = sums.get(what, 0) + new
    assert meters.news() == {}
    assert sums.get("packs", 0) == meters.calls == len(calls)
    for name in ("a", "b"):
        mine = [ns for at, ns in calls if at == name]
        assert sums.get(f"{name}/ns", 0) == sum(mine)
        assert sorted(steps_of(name, sums)) == sorted(meters[name].times.items())
