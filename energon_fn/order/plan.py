"""The plan: which sample when, decided before a byte is read.

A *key* is ``(epoch, index)``: the ``index``-th sample of the dataset in its ``epoch``-th round. The
keys of an epoch are shared out over *lanes*; a lane's stream of keys is a pure function of the
plan and the lane, so its state is two ints, and any position can be computed without what came
before it. This file orders one dataset; :mod:`energon_fn.order.mixing` mixes several.

Training: the dataset is cut into sequences of neighbouring samples, the sequences are permuted,
each lane gets an equal run of the result, and the run is mixed within windows of
``shuffle_buffer_size``. Validation: blocks of ``block`` samples are dealt to the lanes like cards,
so the lanes taken in turn give the dataset's own order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import repeat
from weakref import WeakValueDictionary

import numpy as np
import numpy.typing as npt

from energon_fn import seeds

Key = tuple[int, int]
State = tuple[int, int]
Ints = npt.NDArray[np.int64]

CHUNK = 512  # keys computed at a time where no window says otherwise


@dataclass(frozen=True)
class Plan:
    """What is to be visited, and in which order.

    runs: lengths of the dataset's runs of neighbouring samples (its shards, say).
    shuffle: permute the sequences (training) or keep the dataset's order (validation).
    repeat: go on with the next epoch for ever, or end after one.
    sequence: cut the runs into sequences of at most so many samples (None: whole runs).
    window: mix the samples of a lane over so many neighbours (None or 1: not at all).
    block: how many samples a lane takes at a time when nothing is shuffled.
    span: permute the sequences of so many rounds through the dataset together (None: not at all).
    first: the index of the dataset's first sample, where several share one numbering.
    """

    runs: tuple[int, ...]
    lanes: int = 1
    seed: int = 0
    shuffle: bool = False
    repeat: bool = False
    sequence: int | None = None
    window: int | None = None
    block: int = 1
    span: int | None = 1
    first: int = 0

    def __len__(self) -> int:
        return self._size

    @cached_property
    def _size(self) -> int:
        return sum(self.runs)

    @property
    def total(self) -> int:
        """Samples of an epoch of the order: of ``span`` rounds through the dataset."""
        return self._size * ((self.shuffle and self.span) or 1)


def keys(plan: Plan, lane: int, state: State | None = None) -> Iterator[tuple[Key, State]]:
    """The keys of one lane from ``state`` on (None: the beginning), each with the state after it.

    >>> plan = Plan(runs=(3, 2), lanes=2)
    >>> [key for key, state in keys(plan, lane=0)]
    [(0, 0), (0, 2), (0, 4)]
    >>> [key for key, state in keys(plan, lane=0, state=(0, 1))]
    [(0, 2), (0, 4)]
    """
    epoch, done = state or (0, 0)
    size, first = len(plan), plan.first
    span = plan.total // max(size, 1)
    while True:
        sequences = _sequences(plan, epoch) if plan.shuffle else None
        while done < lane_size(plan, epoch, lane):
            chunk, skip = _chunk(plan, epoch, lane, done, sequences)
            for low in range(skip, len(chunk), 64):  # few at a time: many lanes wait at once
                rounds, indices = np.divmod(chunk[low : low + 64], size)
                rounds, indices = rounds + epoch * span, indices + first
                made = zip(rounds.tolist(), indices.tolist(), strict=True)
                first_state, done = done + 1, done + len(indices)
                yield from zip(made, zip(repeat(epoch), range(first_state, done + 1)), strict=True)
        if not plan.repeat or not size:
            return
        epoch, done = epoch + 1, 0


def lane_size(plan: Plan, epoch: int, lane: int) -> int:
    """How many samples the lane gets in that epoch; over all lanes it is every sample once.

    >>> [lane_size(Plan(runs=(5,), lanes=2, shuffle=True), epoch=0, lane=l) for l in range(2)]
    [3, 2]
    """
    if plan.shuffle:
        return _lane_part(plan, epoch, lane, plan.total)
    rounds, rest = divmod(len(plan), plan.lanes * plan.block)
    lane = _dealt(plan, epoch, lane)
    return rounds * plan.block + min(max(rest - lane * plan.block, 0), plan.block)


def state_after(plan: Plan, lane: int, count: int) -> State:
    """The state of a repeating plan's lane after ``count`` keys, without making them.

    >>> from itertools import islice
    >>> plan = Plan(runs=(5,), lanes=2, shuffle=True, repeat=True)
    >>> [state for _, state in islice(keys(plan, lane=1), 7)][-1] == state_after(plan, 1, 7)
    True
    """
    if not count:
        return 0, 0
    # After as many epochs as there are lanes the shares have gone round, and begin anew.
    rounds, before = divmod(count - 1, lane_total(plan, plan.lanes, lane))
    epoch, count = rounds * plan.lanes, before + 1
    while count > (size := lane_size(plan, epoch, lane)):
        epoch, count = epoch + 1, count - size
    return epoch, count


def lane_total(plan: Plan, epochs: int, lane: int) -> int:
    """How many samples the lane gets in the first ``epochs`` epochs.

    >>> [lane_total(Plan(runs=(5,), lanes=2), epochs=1000, lane=l) for l in range(2)]
    [2500, 2500]
    """
    if plan.shuffle:
        return lane_count(plan, lane, epochs * plan.total)
    rounds, rest = divmod(epochs, plan.lanes)  # the deal begins anew
    sizes = [lane_size(plan, epoch, lane) for epoch in range(min(epochs, plan.lanes))]
    return rounds * sum(sizes) + sum(sizes[:rest])


def lane_count(plan: Plan, lane: int, count: int) -> int:
    """How many of the first ``count`` samples of a shuffled, repeating plan are that lane's.

    Over all lanes it is ``count``, whether or not that is a whole number of epochs.

    >>> plan = Plan(runs=(5,), lanes=2, shuffle=True, repeat=True)
    >>> [(lane_count(plan, 0, n), lane_count(plan, 1, n)) for n in (4, 5, 7, 10)]
    [(2, 2), (3, 2), (4, 3), (5, 5)]
    """
    epochs, part = divmod(count, plan.total)
    whole, rest = divmod(epochs, plan.lanes)
    each, larger = divmod(plan.total, plan.lanes)

    def turns(until: int) -> int:  # how many of them have one sample more
        return until // plan.lanes * larger + min(until % plan.lanes, larger)

    before = whole * plan.total + rest * each + turns(lane + rest) - turns(lane)
    return before + _lane_part(plan, epochs, lane, part)


def _lane_part(plan: Plan, epoch: int, lane: int, part: int) -> int:
    """How many of the first ``part`` samples of an epoch are the lane's: they are dealt out."""
    each, rest = divmod(part, plan.lanes)
    return each + (_turn(plan, epoch, lane) < rest)


def _turn(plan: Plan, epoch: int, lane: int) -> int:
    # Turns go round with the epochs: with fewer samples than lanes, everybody gets some in time.
    return (lane + epoch) % plan.lanes


def _share(plan: Plan, epoch: int, lane: int) -> int:
    """Where the lane's share of the permuted epoch begins."""
    each, rest = divmod(plan.total, plan.lanes)
    turn = _turn(plan, epoch, lane)
    return turn * each + min(turn, rest)


def _dealt(plan: Plan, epoch: int, lane: int) -> int:
    """The lane's place in a round of blocks; an epoch's deal goes on where the last one's ended."""
    blocks = -(-len(plan) // plan.block)
    return (lane - epoch * blocks) % plan.lanes


def _chunk(
    plan: Plan, epoch: int, lane: int, position: int, sequences: Ints | None
) -> tuple[Ints, int]:
    """Indices of a stretch of the lane's epoch that holds ``position``, and where in it that is."""
    size = lane_size(plan, epoch, lane)
    window = plan.window or 1
    if not plan.shuffle or window < 2:
        places = np.arange(position, min(position + CHUNK, size))
        return _visit(plan, epoch, lane, places, sequences), 0
    # Two passes over windows that overlap by half: a sample can go up to 1.5 windows far, and
    # every place is open to a whole window of samples. Both passes are functions of the position.
    half = window // 2
    number = (position + window - half) // window
    start, stop = max(number * window - window + half, 0), min(number * window + half, size)
    middle = start + seeds.permutation(
        stop - start, plan.seed, plan.first, "pass 2", epoch, lane, number
    )
    first, last = start // window, (stop - 1) // window
    mixed = [
        n * window
        + seeds.permutation(
            min(window, size - n * window), plan.seed, plan.first, "pass 1", epoch, lane, n
        )
        for n in range(first, last + 1)
    ]
    places = np.concatenate(mixed)[middle - first * window]
    return _visit(plan, epoch, lane, places, sequences), position - start


def _visit(plan: Plan, epoch: int, lane: int, places: Ints, sequences: Ints | None) -> Ints:
    """What is at the given places of the lane's epoch: indices, round after round of the span."""
    if sequences is None:
        rounds = places // plan.block * plan.lanes + _dealt(plan, epoch, lane)
        return rounds * plan.block + places % plan.block
    starts: Ints = sequences[0]
    ends: Ints = sequences[1]
    places = places + _share(plan, epoch, lane)
    number = np.searchsorted(ends, places, side="right")
    return starts[number] + places - ends[number]


# Lanes of one process that are in the same epoch share its sequences, as long as one needs them.
_in_use: WeakValueDictionary[tuple[Plan, int], Ints] = WeakValueDictionary()
_last: deque[Ints] = deque(maxlen=4)  # many short streams ask for the same ones, on a resume


def _sequences(plan: Plan, epoch: int) -> Ints:
    """The permuted sequences of an epoch: what is just behind each, and the place just behind."""
    found = _in_use.get((plan, epoch))
    if found is not None:
        return found
    lengths = np.tile(np.asarray(plan.runs, dtype=np.int64), plan.span or 1)
    cut = plan.sequence or max((*plan.runs, 1))
    pieces = -(-lengths // cut)
    first = np.repeat(np.cumsum(lengths) - lengths, pieces)
    nth = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    size = np.minimum(np.repeat(lengths, pieces) - nth * cut, cut)
    order = np.arange(len(size))
    if plan.span is not None:
        order = seeds.permutation(len(size), plan.seed, plan.first, "sequences", epoch)
    stops = (first + nth * cut + size)[order]
    found = _in_use[plan, epoch] = np.stack([stops, np.cumsum(size[order])])
    _last.append(found)
    return found
