"""What each stage of this process does, counted and timed, at a cost that does not show.

Calls are counted one by one. Slow ones are all timed; of quick ones every 31st is, for itself and
those before it, since reading the clock for each would cost more than a percent. Everything is a
sum, so that the counts of workers are added up to those of a loader.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from threading import Lock

SLOW = 200_000
"""Nanoseconds above which each call is timed: that takes up to 1,000 of them."""
STRIDE = 31
"""Of others, every so many: a prime number, lest it keeps step with batches."""


class Meter:
    """The counts of one stage. A call is counted first, then done, and timed if it is ``due``."""

    __slots__ = (
        "calls",
        "due",
        "failed",
        "items",
        "lost",
        "made",
        "ns",
        "skipped",
        "timed",
        "times",
    )

    def __init__(self) -> None:
        self.calls = 0
        self.items = 0
        """Samples in the lists that the calls got, if they got lists."""
        self.lost = 0
        """Calls that did not return an output: they failed, skipped, or are generators ..."""
        self.made = 0
        """... and how many those yielded."""
        self.skipped = 0
        self.failed = 0
        self.due = 1
        """The number of the next call to be timed."""
        self.timed = 0
        """The number of the last one that was."""
        self.ns = 0
        """Nanoseconds of all calls."""
        self.times: defaultdict[int, int] = defaultdict(int)
        """How many calls there were of each :func:`step` of durations."""

    def took(self, ns: int) -> int:
        """A call took so many nanoseconds, and so, for all we know, did those not timed before it.

        Gives back for how many calls it stands.

        >>> meter = Meter()
        >>> for duration in (300_000, 200):
        ...     meter.calls += 1
        ...     number = meter.took(duration)
        >>> meter.ns, meter.due
        (300200, 33)
        """
        calls = self.calls
        number, self.timed = calls - self.timed, calls
        self.ns += number * ns
        self.times[step(ns)] += number
        self.due = calls + (1 if ns > SLOW else STRIDE)
        return number

    def sums(self, name: str) -> Iterator[tuple[str, float]]:
        """All there is, by name."""
        yield f"{name}/in", self.items or self.calls
        yield f"{name}/out", self.calls - self.lost + self.made
        yield f"{name}/skipped", self.skipped
        yield f"{name}/failed", self.failed
        yield f"{name}/calls", self.calls
        yield f"{name}/ns", self.ns
        for at, number in list(self.times.items()):
            yield f"{name}/ns/{at}", number


class Meters(defaultdict[str, Meter]):
    """The meters of a run of streams, by stage."""

    def __init__(self) -> None:
        super().__init__(Meter)
        self.counts: defaultdict[str, float] = defaultdict(float)
        """Other sums: packs and their fill, bytes read, seconds in which something was done."""
        self._told: dict[str, float] = {}
        self._telling = Lock()

    @property
    def calls(self) -> int:
        """Of all stages together: while it grows, nothing hangs."""
        return sum(meter.calls + meter.made for meter in list(self.values()))

    def news(self) -> dict[str, float]:
        """By how much each sum has grown since this was last asked, by any thread.

        >>> meters = Meters()
        >>> meters.counts["packs"] += 2
        >>> meters.news(), meters.news()
        ({'packs': 2.0}, {})
        """
        with self._telling:
            told = self._told
            self._told = sums = dict(self.counts)
            for name, meter in list(self.items()):
                sums.update(meter.sums(name))
        return {name: new for name, now in sums.items() if (new := now - told.get(name, 0))}


def step(ns: int) -> int:
    """The number of a duration on a scale with eight steps an octave.

    >>> step(7), step(1000), step(1_000_000)
    (7, 63, 143)
    """
    below = max(ns.bit_length() - 4, 0)
    return 8 * below + (ns >> below)


def duration(step: int) -> float:
    """The nanoseconds in the middle of a step, 6 % from its ends.

    >>> duration(63)
    992.0
    """
    below = max(step // 8 - 1, 0)
    return (step - 8 * below + 0.5 * (below > 0)) * (1 << below)


def percentile(share: float, steps: Iterable[tuple[int, float]]) -> float:
    """The duration, in nanoseconds, that this share of calls does not exceed.

    steps: numbers of steps, and how many calls each has.

    >>> percentile(0.95, [(63, 94), (143, 6)]) / 1e6
    1.015808
    """
    steps = sorted(steps)
    left = share * sum(number for _, number in steps)
    for at, number in steps:
        left -= number
        if left <= 0:
            return duration(at)
    return 0.0


def steps_of(name: str, sums: Mapping[str, float]) -> list[tuple[int, float]]:
    """The durations of a stage among sums."""
    start = f"{name}/ns/"
    return [(int(key.removeprefix(start)), n) for key, n in sums.items() if key.startswith(start)]
