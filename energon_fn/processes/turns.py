"""The turns of lanes: each gives a batch, with the state that goes with it, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from energon_fn import position, seeds
from energon_fn.meters import Meters
from energon_fn.streams import State, Stream

Streams = Callable[[int, int], Stream[Any]]
"""``(lane, epoch) -> stream``; it must pickle where workers are spawned and not forked."""


@dataclass(frozen=True)
class Delivery:
    """A lane's next batch and its state after it. At the lane's end both are None."""

    lane: int
    batch: Any = None
    state: State = None


def deliveries(
    streams: Streams, epoch: int, lanes: dict[int, State], meters: Meters | None = None
) -> Iterator[Delivery]:
    """The batches of the lanes in turn, the first lane first; of a lane that ends, its end, once.

    meters: where it is counted, if the caller wants to see it.

    >>> def count(lane, epoch):
    ...     return lambda state: ((n, n + 1) for n in range(state or 0, lane + 1))
    >>> [(d.lane, d.batch) for d in deliveries(count, epoch=0, lanes={0: None, 1: None})]
    [(0, 0), (1, 0), (0, None), (1, 1), (1, None)]
    """
    here = position.here
    here.meters = meters = Meters() if meters is None else meters
    running = {lane: streams(lane, epoch)(state) for lane, state in lanes.items()}
    while running:
        for lane, stream in list(running.items()):
            here.meters = meters  # in this process others may have run meanwhile
            start = perf_counter()
            item = next(stream, None)
            meters.counts["busy"] += perf_counter() - start
            if item is None:
                del running[lane]
            box = [Delivery(lane, *(item or (None, None)))]
            del item  # who waits keeps nothing, see stages
            yield box.pop()


class Local:
    """Runs the lanes in this process; like a :class:`Pool` of no workers."""

    def __init__(self, streams: Streams):
        self._streams, self._meters = streams, Meters()

    def start(self, epoch: int, lanes: dict[int, State]) -> None:
        self._turns = deliveries(self._streams, epoch, lanes, self._meters)

    def news(self) -> Mapping[str, float]:
        """By how much what is summed up has grown since the last time."""
        return self._meters.news()

    def receive(self) -> Delivery:
        with seeds.untouched():  # this process has random numbers of its own
            return next(self._turns)

    def close(self) -> None:
        """Nothing to end."""
