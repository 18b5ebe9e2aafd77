"""The order of several datasets together: blends and epochs of a given make-up, decided on keys.

The datasets share one numbering: :attr:`~energon_fn.order.plan.Plan.first` says where each begins
in it, so that a key stays ``(epoch, index)``. An order is a tree of
:class:`~energon_fn.order.plan.Plan`, :class:`Blend` and :class:`Rounds`; the functions below take
any of them.

Every lane draws from its own share of every dataset, and which dataset comes when is a function of
the position, as everything here. This is how datasets are spread evenly: think of the j-th sample
of dataset i as lying at time ``(j + phase_i) / weight_i``, and take the samples in the order of
their times. So at any time every dataset has come as often as it should, give or take one sample,
and how many came before some time is a division. The lanes' phases are staggered, so that this
holds for all of them together, too.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate
from math import lcm
from typing import Any, TypeAlias, cast

import numpy as np

from energon_fn import seeds
from energon_fn.order import plan
from energon_fn.order.plan import Key, Plan

State: TypeAlias = Any
"""Plain data: ints and tuples of them."""

UNIT = 1 << 32
"""Phases are counted in so many parts of a sample."""
FAR = 1 << 24
"""In a blend's next epoch its parts begin so many of their epochs later."""
STEPS = 1024
"""How many picks are computed at a time."""


@dataclass(frozen=True)
class Blend:
    """Draw from the parts for ever, each as often as its weight says; all of them repeat.

    A weight is a number or a function of how many samples the blend gave before, over all lanes.
    random: draw independently, rather than spread each part evenly.
    """

    parts: tuple[Order, ...]
    weights: tuple[Fraction | Callable[[int], float], ...]
    lanes: int
    seed: int
    random: bool = False

    def __len__(self) -> int:
        return sum(map(len, self.parts))


@dataclass(frozen=True)
class Rounds:
    """Rounds that have each part as often as its repetitions say; all of the parts repeat."""

    parts: tuple[Plan | Blend, ...]
    repetitions: tuple[Fraction, ...]
    lanes: int
    seed: int
    repeat: bool = False

    def __len__(self) -> int:
        """Samples of the first round."""
        return sum(_until(self, 1))


Order: TypeAlias = Plan | Blend | Rounds


def keys(order: Order, lane: int, state: State = None) -> Iterator[tuple[Key, State]]:
    """The keys of one lane from ``state`` on (None: the beginning), each with the state after it.

    >>> a = Plan(runs=(2,), shuffle=True, repeat=True, span=None)
    >>> b = Plan(runs=(9,), shuffle=True, repeat=True, span=None, first=2)
    >>> mixed = Rounds((a, b), (Fraction(3), Fraction(1, 3)), lanes=1, seed=0)
    >>> [key for key, state in keys(mixed, lane=0)]
    [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (0, 3), (2, 0), (2, 1), (0, 4)]
    """
    match order:
        case Plan():
            return plan.keys(order, lane, state)
        case Rounds():
            return _round_keys(order, lane, state)
        case Blend() if is_even(order):
            return _even_keys(order, lane, state)
        case Blend():
            return _drawn_keys(order, lane, state)


def beginning(order: Order, epoch: int) -> State:
    """The state in front of an epoch. That of a blend does not end; the next is another order."""
    if isinstance(order, Blend) and not is_even(order):
        return epoch, 0, (0,) * len(order.parts)
    return epoch, 0


def is_even(blend: Blend) -> bool:
    """Whether the parts are spread evenly: the state then needs no counts."""
    return not blend.random and not any(map(callable, blend.weights))


def lane_size(order: Order, epoch: int, lane: int) -> int:
    """How many samples the lane gets in that epoch. Raises TypeError for a blend: it has none."""
    match order:
        case Plan():
            return plan.lane_size(order, epoch, lane)
        case Rounds():
            return sum(_sizes(order, epoch, lane))
        case Blend():
            raise TypeError("a blend by weights has no end, so no number of samples")


def lane_count(order: Plan | Blend, lane: int, count: int) -> int:
    """How many of an order's first ``count`` samples are that lane's; all repeat."""
    if isinstance(order, Plan):
        return plan.lane_count(order, lane, count)
    return count // order.lanes + (lane < count % order.lanes)


def state_after(order: Order, lane: int, count: int) -> State:
    """The state of a repeating order's lane after ``count`` keys, without making them.

    >>> from itertools import islice
    >>> parts = tuple(Plan((5,), 2, shuffle=True, repeat=True, first=n) for n in (0, 5))
    >>> mixed = Blend(parts, (Fraction(3), Fraction(1, 2)), lanes=2, seed=0, random=True)
    >>> [state for _, state in islice(keys(mixed, lane=1), 7)][-1] == state_after(mixed, 1, 7)
    True
    """
    match order:
        case Plan():
            return plan.state_after(order, lane, count)
        case Rounds():

            def total(epoch: int) -> int:
                return sum(_before(order, epoch, lane))

            far = 1
            while total(far) < count:
                far *= 2
            epoch = max(bisect_left(range(far), count, key=total) - 1, 0)
            return epoch, count - total(epoch)
        case Blend() if is_even(order):
            return 0, count
        case Blend():
            counts = [0] * len(order.parts)
            picks = _draws(order, lane, 0)
            for _ in range(count):
                counts[next(picks)] += 1
            return 0, count, tuple(counts)


def drawn(order: Order, lane: int, state: State) -> list[int]:
    """How many samples of each dataset (the tree's leaves, in order) the lane gave until ``state``.

    Those of a blend count from the beginning of its epoch.

    >>> parts = tuple(Plan((5,), shuffle=True, repeat=True, first=n) for n in (0, 5))
    >>> mixed = Blend(parts, (Fraction(3), Fraction(1)), lanes=1, seed=0)
    >>> drawn(mixed, 0, state_after(mixed, 0, 400))
    [300, 100]
    """
    if state is None:
        return [0] * len(leaves(order))
    match order:
        case Plan():
            epoch, done = state
            return [plan.lane_total(order, epoch, lane) + done]
        case Rounds():
            epoch, done = state
            counts = _round_counts(order, epoch, lane, done)
        case Blend() if is_even(order):
            counts = _taken(_whole(order), _phases(order, lane, state[0]), state[1])
        case Blend():
            counts = list(state[2])
    each = (
        drawn(part, lane, state_after(part, lane, count))
        for part, count in zip(order.parts, counts, strict=True)
    )
    return [count for counts in each for count in counts]


def count(order: Order, lane: int, state: State) -> int:
    """How many samples the lane gave until ``state``: the sum of :func:`drawn`, but quicker.

    >>> count(Plan((5,), shuffle=True, repeat=True), 0, (2, 3))
    13
    """
    if isinstance(order, Blend):
        return 0 if state is None else int(state[1])
    return sum(drawn(order, lane, state))


def leaves(order: Order) -> list[Plan]:
    """The plans of the single datasets, in their order."""
    if isinstance(order, Plan):
        return [order]
    return [leaf for part in order.parts for leaf in leaves(part)]


def describe(order: Order, names: Sequence[str]) -> str:
    """The tree in a line; ``names`` are those of the leaves, in their order.

    >>> parts = tuple(Plan((5,), shuffle=True, repeat=True, first=n) for n in (0, 5))
    >>> describe(Rounds(parts, (Fraction(2), Fraction(1, 3)), lanes=1, seed=0), ["a", "b"])
    'blend_epochized(2 x a, 1/3 x b)'
    """
    left = iter(names)

    def shown(order: Order) -> str:
        if isinstance(order, Plan):
            return next(left)
        amounts = order.weights if isinstance(order, Blend) else order.repetitions
        parts = ", ".join(
            f"{getattr(amount, '__qualname__', amount)} x {shown(part)}"
            for amount, part in zip(amounts, order.parts, strict=True)
        )
        random = ", random" if isinstance(order, Blend) and order.random else ""
        return f"{'blend' if isinstance(order, Blend) else 'blend_epochized'}({parts}{random})"

    return shown(order)


# ------------------------------------------------------------------------------------ three orders


def _even_keys(blend: Blend, lane: int, state: State) -> Iterator[tuple[Key, State]]:
    epoch, count = state or (0, 0)
    weights, phases = _whole(blend), _phases(blend, lane, epoch)
    parts = _parts(blend.parts, lane, _taken(weights, phases, count), epoch)
    for pick in _spread(weights, phases, count):
        key, _ = next(parts[pick])
        count += 1
        yield key, (epoch, count)


def _drawn_keys(blend: Blend, lane: int, state: State) -> Iterator[tuple[Key, State]]:
    epoch, count, taken = state or beginning(blend, 0)
    counts = list(taken)
    parts = _parts(blend.parts, lane, counts, epoch)
    for pick in _draws(blend, lane, count, epoch):
        key, _ = next(parts[pick])
        count += 1
        counts[pick] += 1
        yield key, (epoch, count, tuple(counts))


def _round_keys(rounds: Rounds, lane: int, state: State) -> Iterator[tuple[Key, State]]:
    epoch, done = state or (0, 0)
    while True:
        sizes, phases = _sizes(rounds, epoch, lane), _phases(rounds, lane, epoch)
        parts = _parts(rounds.parts, lane, _round_counts(rounds, epoch, lane, done))
        picks = _spread(sizes, phases, done)
        for _ in range(sum(sizes) - done):
            key, _ = next(parts[next(picks)])
            done += 1
            yield key, (epoch, done)
        if not rounds.repeat:
            return
        epoch, done = epoch + 1, 0


def _round_counts(rounds: Rounds, epoch: int, lane: int, done: int) -> list[int]:
    """How often the lane has taken from each part when it has given ``done`` of the epoch."""
    before = _before(rounds, epoch, lane)
    sizes = _sizes(rounds, epoch, lane)
    within = _taken(sizes, _phases(rounds, lane, epoch), done)
    return [a + b for a, b in zip(before, within, strict=True)]


def _parts(
    orders: Sequence[Order], lane: int, counts: Sequence[int], epoch: int = 0
) -> list[Iterator[Any]]:
    """Each part's keys, from where so many of them have been taken in a blend's epoch."""
    pairs = zip(orders, counts, strict=True)
    return [_started(order, lane, count, epoch) for order, count in pairs]


def _started(order: Order, lane: int, count: int, epoch: int) -> Iterator[tuple[Key, State]]:
    # A generator: where it begins is computed when it is first asked.
    at, *rest = state_after(order, lane, count)
    far = FAR if isinstance(order, Plan) else 1  # the plans inside are moved, once
    yield from keys(order, lane, (at + epoch * far, *rest))


def _until(rounds: Rounds, epoch: int) -> list[int]:
    """How many samples of each part all rounds before that one have, over all lanes."""
    pairs = zip(rounds.parts, rounds.repetitions, strict=True)
    return [int(epoch * times * len(part)) for part, times in pairs]


def _before(rounds: Rounds, epoch: int, lane: int) -> list[int]:
    """How many of them are that lane's."""
    pairs = zip(rounds.parts, _until(rounds, epoch), strict=True)
    return [lane_count(part, lane, count) for part, count in pairs]


def _sizes(rounds: Rounds, epoch: int, lane: int) -> list[int]:
    """How many samples of each part are the lane's in that round."""
    pairs = zip(_before(rounds, epoch, lane), _before(rounds, epoch + 1, lane), strict=True)
    return [after - before for before, after in pairs]


# ------------------------------------------------------------------------- which part comes when


def _whole(blend: Blend) -> list[int]:
    """The weights as whole numbers in the same ratio."""
    weights = cast("tuple[Fraction, ...]", blend.weights)
    common = lcm(*(weight.denominator for weight in weights))
    return [int(weight * common) for weight in weights]


def _phases(order: Blend | Rounds, lane: int, epoch: int = 0) -> list[int]:
    """Where in its first step each part begins, in parts of UNIT; staggered over the lanes."""
    shift = UNIT * lane // order.lanes
    own = _place(order)
    return [
        (seeds.number(order.seed, "phase", own, epoch, n) + shift) % UNIT
        for n in range(len(order.parts))
    ]


def _place(order: Order) -> tuple[int, int]:
    """What tells an order from the others in its tree: where it begins, and how deep it goes."""
    depth = 0
    while not isinstance(order, Plan):
        order, depth = order.parts[0], depth + 1
    return order.first, depth


def _chunk_counts(weights: Sequence[int], phases: Sequence[int], chunk: int) -> list[int]:
    """How often each part comes before the given chunk of time: ``ceil(weight * time - phase)``."""
    unit = UNIT * sum(weights)
    time = chunk * _step(weights) * UNIT
    return [
        max(-((phase * sum(weights) - time * weight) // unit), 0)
        for weight, phase in zip(weights, phases, strict=True)
    ]


def _step(weights: Sequence[int]) -> int:
    return max(STEPS, 4 * len(weights))


def _find(weights: Sequence[int], phases: Sequence[int], done: int) -> int:
    """The chunk of time that the pick number ``done`` lies in."""
    chunk = max((done - len(weights)) // _step(weights), 0)
    while sum(_chunk_counts(weights, phases, chunk + 1)) <= done:
        chunk += 1
    return chunk


def _picks(weights: Sequence[int], phases: Sequence[int], chunk: int) -> list[int]:
    """The picks in a chunk of time, in their order."""
    low = np.array(_chunk_counts(weights, phases, chunk))
    high = np.array(_chunk_counts(weights, phases, chunk + 1))
    counts = high - low
    number = np.repeat(np.arange(len(weights)), counts)
    nth = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    # Times count from the chunk's beginning, where floats have all their precision.
    start = chunk * _step(weights)
    behind = [
        float(Fraction(int(n)) + Fraction(phase, UNIT) - Fraction(weight * start, sum(weights)))
        for n, phase, weight in zip(low, phases, weights, strict=True)
    ]
    largest = max(weights)  # the weights themselves may be too large for floats
    speeds = np.array([weight / largest for weight in weights])
    times = (np.array(behind)[number] + nth) / speeds[number]
    return cast("list[int]", number[np.argsort(times, kind="stable")].tolist())


def _spread(weights: Sequence[int], phases: Sequence[int], done: int) -> Iterator[int]:
    """Which part comes, from the pick number ``done`` on."""
    if not any(weights):
        return
    chunk = _find(weights, phases, done)
    skip = done - sum(_chunk_counts(weights, phases, chunk))
    while True:
        yield from _picks(weights, phases, chunk)[skip:]
        chunk, skip = chunk + 1, 0


def _taken(weights: Sequence[int], phases: Sequence[int], done: int) -> list[int]:
    """How often each part is among the first ``done`` picks."""
    if not any(weights):
        return [0] * len(weights)
    chunk = _find(weights, phases, done)
    counts = _chunk_counts(weights, phases, chunk)
    for pick in _picks(weights, phases, chunk)[: done - sum(counts)]:
        counts[pick] += 1
    return counts


def _draws(blend: Blend, lane: int, done: int, epoch: int = 0) -> Iterator[int]:
    """Which part comes, where weights change or draws are random.

    A number between 0 and 1 belongs to every pick, and an interval of them to every part. The
    numbers are random, or multiples of the golden ratio, which fill every interval evenly.
    """
    golden = 0x9E3779B97F4A7C15
    own = _place(blend)
    phase = seeds.number(blend.seed, "phase", own, epoch, lane)
    while True:
        now = done * blend.lanes + lane
        weights = [float(w(now)) if callable(w) else float(w) for w in blend.weights]
        if not (min(weights) >= 0 and 0 < sum(weights) < float("inf")):
            raise ValueError(
                f"the weights of a blend after {now} samples are {weights}; they must be 0 or "
                "more, and one of them above 0"
            )
        number = seeds.number(blend.seed, "draw", own, epoch, lane, done) if blend.random else phase
        at = (number + (0 if blend.random else done * golden)) % 2**64 / 2**64 * sum(weights)
        yield min(bisect_right(list(accumulate(weights)), at), len(weights) - 1)
        done += 1
