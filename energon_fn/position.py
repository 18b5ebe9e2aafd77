"""Where this process is in its work: the one record that streams, stages and functions share.

Streams say which item is at hand, so that random numbers can be a function of it
(:mod:`energon_fn.seeds`), guards say what is being called, so that a worker that hangs can be asked
what it hangs in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass
class Position:
    """The item at hand, and what is done with it."""

    where: object = None
    """The item's place in its stream, plain data."""
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
    steps: int = 0
    """Things done so far: while this grows, nothing hangs."""


here = Position()


def at(where: object) -> None:
    """Say which item is at hand."""
    here.where, here.calls = where, 0


def doing(stage: str, item: Any) -> None:
    """Say what is done to it."""
    here.stage, here.item = stage, item
    here.steps += 1
