"""Where this process is in its work: the one record that streams, stages and functions share.

Streams say which item is at hand, so that random numbers can be a function of it
(:mod:`energon_fn.seeds`), guards say what is being called, so that a worker that hangs can be asked
what it hangs in.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from energon_fn.meters import Meters


@dataclass
class Position:
    """The item at hand, and what is done with it."""

    where: object = None
    """The item's place in its stream, plain data."""
    order: Any = None
    """The state of the order behind the last sample that was loaded."""
    calls: int = 0
    """Random functions called for it so far."""
    sample_index: int = 0
    """Number of the sample, counted over all lanes in their order."""
    batch_index: int = 0
    """Number of the batch being made, counted over all lanes in their order."""
    stage: str = ""
    """What is being done."""
    item: Any = None
    """What it is done to."""
    failure: str = ""
    """The last one there was of a user's function."""
    elsewhere: int = 0
    """Nanoseconds that another thread spent on it, for what is done now."""
    meters: Meters = field(default_factory=Meters)
    """Where it is counted, and what else there is to report."""


here = Position()


@contextmanager
def apart() -> Iterator[None]:
    """Count what is done inside of it for nobody.

    >>> before = here.meters.counts["packs"]
    >>> with apart():
    ...     count("packs", 1)
    >>> here.meters.counts["packs"] == before
    True
    """
    meters, here.meters = here.meters, Meters()
    try:
        yield
    finally:
        here.meters = meters


def at(where: object) -> None:
    """Say which item is at hand."""
    here.where, here.calls = where, 0


def doing(stage: str, item: Any) -> None:
    """Say what is done to it."""
    here.stage, here.item = stage, item


def count(what: str, amount: float) -> None:
    """Add to what there is to report."""
    here.meters.counts[what] += amount
