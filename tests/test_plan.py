"""The plan: every sample once, from any position, mixed as asked."""

from dataclasses import replace
from itertools import islice, pairwise

from hypothesis import given
from hypothesis import strategies as st

from energon_fn.order.plan import Plan, keys, lane_count, lane_size

plans = st.builds(
    Plan,
    runs=st.lists(st.integers(0, 30), min_size=1, max_size=6).map(tuple),
    lanes=st.integers(1, 6),
    seed=st.integers(0, 5),
    shuffle=st.booleans(),
    sequence=st.none() | st.integers(1, 9),
    window=st.none() | st.integers(1, 40),
    block=st.integers(1, 5),
    span=st.none() | st.integers(1, 3),
    first=st.integers(0, 100),
)


@given(plans, st.integers(0, 9) | st.integers(10**6, 10**6 + 9))
def test_every_sample_once_over_all_lanes(plan: Plan, epoch: int) -> None:
    lanes = [[key for key, _ in keys(plan, lane, (epoch, 0))] for lane in range(plan.lanes)]
    assert [len(lane) for lane in lanes] == [
        lane_size(plan, epoch, lane) for lane in range(plan.lanes)
    ]
    span = (plan.span or 1) if plan.shuffle else 1
    assert sorted(key for lane in lanes for key in lane) == [
        (round_, plan.first + index)
        for round_ in range(epoch * span, epoch * span + span)
        for index in range(len(plan))
    ]


@given(plans, st.data())
def test_every_state_goes_on_exactly(plan: Plan, data: st.DataObject) -> None:
    lane = data.draw(st.integers(0, plan.lanes - 1))
    whole = list(keys(plan, lane))
    for done, (_, state) in enumerate(whole, 1):
        assert list(keys(plan, lane, state)) == whole[done:]


@given(plans.filter(len), st.data())
def test_repeating_goes_through_epochs(plan: Plan, data: st.DataObject) -> None:
    endless, lane = replace(plan, repeat=True), data.draw(st.integers(0, plan.lanes - 1))
    epochs = [[k for k, _ in keys(plan, lane, (epoch, 0))] for epoch in range(2 * plan.lanes)]
    expected = [key for epoch in epochs for key in epoch]
    stream = list(islice(keys(endless, lane), len(expected)))
    assert [key for key, _ in stream] == expected
    for done, (_, state) in enumerate(stream[:-1], 1):
        assert next(keys(endless, lane, state)) == stream[done]


@given(plans.filter(len), st.integers(0, 500), st.data())
def test_any_number_of_samples_is_dealt_to_the_lanes(
    plan: Plan, count: int, data: st.DataObject
) -> None:
    endless = replace(plan, shuffle=True, repeat=True)
    counts = [lane_count(endless, lane, count) for lane in range(plan.lanes)]
    assert sum(counts) == count
    more = [lane_count(endless, lane, count + 1) for lane in range(plan.lanes)]
    assert sorted(b - a for a, b in zip(counts, more, strict=True)) == [0] * (plan.lanes - 1) + [1]
    epochs = data.draw(st.integers(0, 5))
    for lane in range(plan.lanes):
        assert lane_count(endless, lane, epochs * endless.total) == sum(
            lane_size(endless, epoch, lane) for epoch in range(epochs)
        )


def test_without_a_span_the_sequences_keep_their_order() -> None:
    plan = Plan(runs=(7, 4), lanes=2, shuffle=True, span=None)
    assert [index for (_, index), _ in keys(plan, 0)] == [0, 1, 2, 3, 4, 5]


def test_a_span_mixes_several_rounds() -> None:
    plan = Plan(runs=(10,) * 10, shuffle=True, span=3)
    order = [round_ for (round_, _), _ in keys(plan, 0)]
    assert order != sorted(order)


def test_lanes_in_turn_give_the_datasets_order() -> None:
    plan = Plan(runs=(7, 4), lanes=3, block=2)
    lanes = [[index for (_, index), _ in keys(plan, lane)] for lane in range(3)]
    blocks = [lane[at : at + 2] for at in (0, 2) for lane in lanes]
    assert [index for block in blocks for index in block] == list(range(11))


def test_fewer_samples_than_lanes_come_to_every_lane_in_time() -> None:
    plan = Plan(runs=(2,), lanes=5, shuffle=True, repeat=True)
    for lane in range(5):
        assert {index for (_, index), _ in islice(keys(plan, lane), 20)} == {0, 1}


def test_sequences_stay_together_and_are_permuted() -> None:
    plan = Plan(runs=(40, 37), shuffle=True, sequence=8)
    order = [index for (_, index), _ in keys(plan, 0)]
    steps = [b - a for a, b in pairwise(order)]
    assert steps.count(1) >= 77 - 10  # ten sequences: 5 + 5, in each of which neighbours follow
    assert order != sorted(order)


def test_epochs_seeds_and_windows_change_the_order() -> None:
    def order(epoch: int = 0, **changes: int) -> list[int]:
        plan = Plan(runs=(60,), shuffle=True, **{"sequence": 5, "window": 10, **changes})
        return [index for (_, index), _ in keys(plan, 0, (epoch, 0))]

    orders = [order(), order(epoch=1), order(seed=1), order(window=20), order(sequence=6)]
    assert len({tuple(o) for o in orders}) == len(orders)
    assert order() == order()


def test_the_window_bounds_how_far_a_sample_goes_and_mixes_well() -> None:
    plan = Plan(runs=(4000,), shuffle=True, window=100)  # one run: only the window mixes
    order = [index for (_, index), _ in keys(plan, 0)]
    far = [abs(place - index) for place, index in enumerate(order)]
    assert max(far) < 150
    assert sum(far) / len(far) > 25  # a single window's mean is a third of it at most
    crossing = sum(place // 100 != index // 100 for place, index in enumerate(order))
    assert crossing > len(order) / 3  # windows do not stay among themselves
