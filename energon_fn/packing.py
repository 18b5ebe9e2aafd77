"""Packing: which samples share a sequence, so that little of it is padding.

:func:`knapsack` and :func:`best_fit` make functions that select: they take a list of samples and
give a list of packs. A task encoder's ``select_samples_to_pack`` returns what they give, and
:func:`energon_fn.pack` takes them.

>>> from toolz import pipe
>>> from energon_fn import pack
>>> texts = ["a rose", "is", "a red rose", "rose"]
>>> select = knapsack(cost=len, capacity=10)
>>> select(texts)
[['a rose', 'rose'], ['is'], ['a red rose']]
>>> pipe(texts, pack(select, " + ".join, buffer_size=100), list)
['a rose + rose', 'is', 'a red rose']

Packs come in the order of their earliest sample, and the samples of a pack in the order in which
they were given: what was shuffled stays so, and batches do not go from long samples to short ones.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import compress
from math import lcm
from operator import le, mul, not_, truediv
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeAlias, get_args

import numpy as np

from energon_fn import position
from energon_fn.errors import FatalSampleError
from energon_fn.guard import describe
from energon_fn.stages import PackedSamplesOutput

if TYPE_CHECKING:
    from typing_extensions import TypeVar

    T = TypeVar("T", bound=Any, default=Any)  # Any where only a lambda tells it
else:
    from typing import TypeVar

    T = TypeVar("T")

Amount: TypeAlias = float | Sequence[float] | Mapping[str, float]
"""A number; or several, one for each budget, such as tokens and images."""
TooLong: TypeAlias = Literal["error", "skip", "pass"]
Vector: TypeAlias = tuple[int, ...]
"""An amount in units so small that it is whole: sums of such are exact."""


def knapsack(
    cost: Callable[[T], Amount],
    capacity: Amount,
    *,
    group_by: Callable[[T], Hashable] | None = None,
    too_long: TooLong | Callable[[T, Any], Iterable[T]] = "error",
    min_fill: float | None = None,
) -> Packer[T]:
    """Select by the greedy knapsack: fill one pack after another with the largest that still fits.

    It comes to the same packs as putting the samples, the largest first, each into the first pack
    that has room (first-fit decreasing). With one budget that takes at most 11/9 as many packs as
    the best packing, and one more (Dósa 2007). A thousand samples take some milliseconds.

    cost: what a sample takes up, not negative; called once for each. capacity: of a pack. Both are
    numbers, or several numbers in a tuple or dict, such as ``{"tokens": 4096, "images": 16}``, none
    of which is ever exceeded. Larger is then what has the larger sum of shares in the capacity.
    group_by: sample -> key; samples of different keys are never mixed.
    too_long: what becomes of a sample that no pack can hold: "error", "skip" it, "pass" it through
    as a pack of its own, or a function ``split(sample, capacity)`` that gives the parts to pack.
    min_fill: packs that are less full, by the budget of which they have used the most, are given
    back to the buffer (:class:`~energon_fn.PackedSamplesOutput`), where better company may come.
    Half of the packs, the fullest, go out in any case, and so do those with parts of a sample.

    Raises :class:`~energon_fn.FatalSampleError` for a sample that is too long, unless told
    otherwise, and for a part that still is; TypeError and ValueError for costs that are no amounts.

    >>> knapsack(cost=lambda n: n, capacity=10)([7, 5, 5, 2, 1])
    [[7, 2, 1], [5, 5]]
    >>> knapsack(cost=lambda n: (n, 1), capacity=(10, 2))([7, 5, 5, 2, 1])
    [[7, 2], [5, 5], [1]]
    >>> knapsack(len, 4, too_long=lambda text, most: [text[:most], text[most:]])(["tulip", "ivy"])
    [['tuli'], ['p', 'ivy']]
    >>> output = knapsack(len, 4, min_fill=0.8)(["ivy", "rose", "elm"])
    >>> output.packs, output.pushback
    ([['rose']], ['ivy', 'elm'])
    """
    return Packer(False, cost, capacity, group_by, too_long, min_fill)


def best_fit(
    cost: Callable[[T], Amount],
    capacity: Amount,
    *,
    group_by: Callable[[T], Hashable] | None = None,
    too_long: TooLong | Callable[[T, Any], Iterable[T]] = "error",
    min_fill: float | None = None,
) -> Packer[T]:
    """Select by best-fit decreasing: each sample, the largest first, goes where least room is left.

    The arguments are those of :func:`knapsack`. Which of the two comes to fewer packs depends on
    the samples; the difference is small.

    >>> best_fit(cost=lambda n: n, capacity=10)([6, 7, 4, 3])
    [[6, 4], [7, 3]]
    >>> best_fit(cost=lambda n: n, capacity=10)([5, 7, 2, 4, 2])
    [[5, 4], [7, 2], [2]]
    """
    return Packer(True, cost, capacity, group_by, too_long, min_fill)


@dataclass(frozen=True)
class Packer(Generic[T]):
    """Selects samples to pack; made by :func:`knapsack` and :func:`best_fit`.

    It is plain data, and pickles if its functions do.
    """

    best: bool
    """Put a sample where least room is left, rather than first."""
    cost: Callable[[T], Amount]
    capacity: Amount
    group_by: Callable[[T], Hashable] | None = None
    too_long: TooLong | Callable[[T, Any], Iterable[T]] = "error"
    min_fill: float | None = None

    def __post_init__(self) -> None:
        if not all(_numbers(self.capacity, self.capacity)):
            raise ValueError(f"capacity is {self.capacity!r}; it must be more than 0")
        if not callable(self.cost):
            raise TypeError(f"cost is {self.cost!r}; it must be a function of a sample")
        if not callable(self.too_long) and self.too_long not in get_args(TooLong):
            raise ValueError(
                f"too_long is {self.too_long!r}; it must be one of {', '.join(get_args(TooLong))}, "
                "or a function that splits a sample: split(sample, capacity) -> parts"
            )
        if self.min_fill is not None and not 0 < self.min_fill <= 1:
            raise ValueError(f"min_fill is {self.min_fill}; it must be a share: 0 < min_fill <= 1")

    def __call__(self, samples: Iterable[T]) -> PackedSamplesOutput[T]:
        """The packs: a list of lists that has, as ``pushback``, what is given back."""
        items, numbers, outsize = self._items(samples)
        *costs, capacity = _vectors([*numbers, _numbers(self.capacity, self.capacity)])
        groups: dict[Hashable, list[int]] = {}
        packs = []
        for n, item in enumerate(items):
            if n in outsize and self.too_long == "pass":
                packs.append([n])
            else:
                groups.setdefault(self.group_by and self.group_by(item), []).append(n)
        for members in groups.values():
            for pack in _decreasing([costs[n] for n in members], capacity, self.best):
                packs.append([members[n] for n in pack])
        packs.sort()  # by the first sample

        fills = [max(_shares([costs[n] for n in pack], capacity)) for pack in packs]
        half = max(len(packs) // 2, 1)  # goes out in any case: so it goes on, and at a good pace
        least = min([self.min_fill or 0, *sorted(fills, reverse=True)[:half]])
        goes = [
            fill >= least or not outsize.isdisjoint(pack)
            for fill, pack in zip(fills, packs, strict=True)
        ]
        position.count("packs", sum(goes))
        position.count("fill", sum(compress(fills, goes)))
        back = sorted(n for pack in compress(packs, map(not_, goes)) for n in pack)
        return PackedSamplesOutput(
            packs=([items[n] for n in pack] for pack in compress(packs, goes)),
            pushback=(items[n] for n in back),
        )

    def _items(self, samples: Iterable[T]) -> tuple[list[T], list[tuple[Fraction, ...]], set[int]]:
        """What to pack, what it costs, and the numbers of those that come of a sample too long."""
        limit = _numbers(self.capacity, self.capacity)
        items, costs, outsize = list[T](), list[tuple[Fraction, ...]](), set[int]()
        for sample in samples:
            parts = [(sample, self._cost(sample))]
            if not _fits(parts[0][1], limit):
                parts = [(part, self._cost(part)) for part in self._instead(sample)]
                outsize.update(range(len(items), len(items) + len(parts)))
                if self.too_long != "pass" and not all(_fits(cost, limit) for _, cost in parts):
                    raise FatalSampleError(
                        f"too_long has split {describe(sample)} to parts that cost "
                        f"{[self.cost(part) for part, _ in parts]}, the capacity being "
                        f"{self.capacity!r}: no part may cost more"
                    )
            for item, cost in parts:
                items.append(item)
                costs.append(cost)
        return items, costs, outsize

    def _cost(self, sample: T) -> tuple[Fraction, ...]:
        try:
            return _numbers(self.cost(sample), self.capacity)
        except Exception as error:
            error.add_note(f"as the cost of {describe(sample)}")
            raise

    def _instead(self, sample: T) -> Iterable[T]:
        """What is packed for a sample that is too long."""
        if callable(self.too_long):
            return self.too_long(sample, self.capacity)
        if self.too_long == "error":
            raise FatalSampleError(
                f"{describe(sample)} costs {self.cost(sample)!r}, more than the capacity "
                f"{self.capacity!r} of a pack: shorten it before, raise the capacity, or let "
                "too_long say what becomes of such samples"
            )
        return [sample] if self.too_long == "pass" else []


def fill_ratio(packs: Iterable[Iterable[T]], cost: Callable[[T], Amount], capacity: Amount) -> Any:
    """The mean share of the capacity that packs use; one for each budget, where there are several.

    >>> select = knapsack(cost=lambda n: n, capacity=10)
    >>> fill_ratio(select([7, 5, 5, 2]), select.cost, select.capacity)
    0.95
    >>> fill_ratio([["a rose"], ["is"]], lambda s: {"chars": len(s), "words": 1},
    ...            {"chars": 10, "words": 4})
    {'chars': 0.4, 'words': 0.25}
    """
    limit = _numbers(capacity, capacity)
    fills = [_shares([_numbers(cost(s), capacity) for s in pack], limit) for pack in packs]
    means = [float(sum(shares) / len(fills)) for shares in zip(*fills, strict=True)]
    means = means or [0.0] * len(limit)
    if isinstance(capacity, Mapping):
        return dict(zip(capacity, means, strict=True))
    return tuple(means) if isinstance(capacity, Sequence) else means[0]


def _decreasing(costs: list[Vector], capacity: Vector, best: bool) -> list[list[int]]:
    """Put the samples, the largest first, each into the first pack with room, or the best."""
    weights = [lcm(*capacity) // amount for amount in capacity]
    sizes = [sum(map(mul, cost, weights)) for cost in costs]
    size = sum(map(mul, capacity, weights))
    exact = np.int64 if size < 2**62 else object
    rooms = [np.full(len(costs), amount, exact) for amount in capacity]
    left = np.full(len(costs), size, exact)
    packs: list[list[int]] = []
    for n in sorted(range(len(costs)), key=sizes.__getitem__, reverse=True):
        # The packs so far, and an empty one behind them, which always has room.
        fits = np.ones(len(packs) + 1, bool)
        for room, amount in zip(rooms, costs[n], strict=True):
            fits &= room[: len(fits)] >= amount
        at = np.where(fits, left[: len(fits)], size + 1).argmin() if best else fits.argmax()
        if at == len(packs):
            packs.append([])
        packs[at].append(n)
        left[at] -= sizes[n]
        for room, amount in zip(rooms, costs[n], strict=True):
            room[at] -= amount
    return [sorted(pack) for pack in packs]


def _numbers(amount: Any, like: Amount) -> tuple[Fraction, ...]:
    """An amount's numbers, exactly; they must be as many, and named, as those of ``like``."""
    if isinstance(like, Mapping):
        if not isinstance(amount, Mapping) or amount.keys() != like.keys():
            raise TypeError(f"{amount!r} must be a dict with the same keys as the capacity {like}")
        return tuple(_number(amount[name]) for name in like)
    if isinstance(like, Sequence):
        if not isinstance(amount, Sequence) or len(amount) != len(like):
            raise TypeError(f"{amount!r} must have as many numbers as the capacity {like}")
        return tuple(map(_number, amount))
    return (_number(amount),)


def _number(value: Any) -> Any:
    if type(value) is int and value >= 0:
        return value
    try:
        number = Fraction(value.item() if hasattr(value, "item") else value)
    except (TypeError, ValueError, OverflowError):
        number = None
    if number is None or number < 0 or isinstance(value, str):
        raise ValueError(f"{value!r} is no amount: it must be a number, 0 or more")
    return number


def _vectors(amounts: list[tuple[Fraction, ...]]) -> list[Vector]:
    units = [lcm(*(number.denominator for number in of)) for of in zip(*amounts, strict=True)]
    return [tuple(int(a * unit) for a, unit in zip(of, units, strict=True)) for of in amounts]


def _fits(cost: Iterable[Any], room: Iterable[Any]) -> bool:
    return all(map(le, cost, room))


def _shares(costs: list[Any], capacity: tuple[Any, ...]) -> tuple[Any, ...]:
    used = map(sum, zip(*costs, strict=True)) if costs else [0] * len(capacity)
    return tuple(map(truediv, used, capacity))
