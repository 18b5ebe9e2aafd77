"""The loader: runs a dataset's lanes in worker processes and delivers their batches in turn.

A worker sends ``(lane, batch, state)``; the loader keeps the last state of each lane and whose turn
is next. That is all there is to know to go on from here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, IterableDataset, _utils, get_worker_info

from energon_fn import seeds
from energon_fn.datasets import Dataset
from energon_fn.lanes import WorkerConfig, take_turns, worker_slots
from energon_fn.streams import State

T = TypeVar("T")


@dataclass(frozen=True)
class Delivery:
    """What a worker sends at a lane's turn: a batch and the lane's state after it."""

    lane: int
    batch: Any = None
    state: State = None

    def pin_memory(self) -> Delivery:
        # The state must arrive as it was sent: torch would turn its tuples into lists.
        return replace(self, batch=_utils.pin_memory.pin_memory(self.batch))  # type: ignore[no-untyped-call]


ENDED = Delivery(lane=-1)
"""What is sent at the turn of a lane that has ended, or of none."""


@dataclass(frozen=True)
class Worker(IterableDataset[Delivery]):
    """The turns of one worker of a rank: each of its lanes in order, again and again."""

    dataset: Dataset[Any]
    lanes: tuple[int, ...]
    states: dict[int, State]
    epoch: int

    def __iter__(self) -> Iterator[Delivery]:
        info = get_worker_info()
        workers, worker = (info.num_workers, info.id) if info else (1, 0)
        slots = worker_slots(self.lanes, workers, worker)
        streams = [None if lane is None else self.deliveries(lane) for lane in slots]
        for _, delivery in take_turns(streams):
            yield delivery or ENDED

    def deliveries(self, lane: int) -> Iterator[Delivery]:
        stream = self.dataset.stream(lane, self.epoch)(self.states.get(lane))
        while True:
            if get_worker_info() is None:  # the training process has random numbers of its own
                with seeds.untouched():
                    item = next(stream, None)
            else:
                item = next(stream, None)
            if item is None:
                return
            yield Delivery(lane, *item)


class Loader(Generic[T]):
    """Iterates over a dataset's batches on this rank. Made by :func:`get_loader`.

    An iteration ends with the epoch (or virtual epoch). One that follows a ``break`` finishes the
    epoch behind the last batch that was delivered; one that follows an epoch's end is the next.
    """

    def __init__(self, dataset: Dataset[T], prefetch_factor: int):
        self.dataset = dataset
        self._prefetch_factor = prefetch_factor
        self._begin(epoch=0)

    def _begin(self, epoch: int) -> None:
        self._epoch = epoch
        self._delivered = 0  # batches of this epoch, or virtual epoch
        self._lanes = self.dataset.worker_config.rank_lanes  # the one whose turn it is comes first
        self._states: dict[int, State] = {}
        self._running: Iterator[Delivery] | None = None

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[T]:
        length, virtual = self.dataset.length, self.dataset.virtual
        if self._delivered == length:  # the last iteration got all, and was left at its last batch
            self._delivered = 0
            if not virtual:
                self._begin(self._epoch + 1)
        while self._delivered != length:
            delivery = self._next()
            if delivery is None:
                break
            self._delivered += 1
            yield delivery.batch
        if not (virtual and self._delivered == length):
            self._begin(self._epoch + 1)

    def _next(self) -> Delivery | None:
        """The next batch of any lane, or None when all have ended."""
        if self._running is None:
            self._running = iter(self._workers())
        try:
            for delivery in self._running:
                if delivery.lane != ENDED.lane:
                    turn = self._lanes.index(delivery.lane) + 1
                    self._lanes = self._lanes[turn:] + self._lanes[:turn]
                    self._states[delivery.lane] = delivery.state
                    return delivery
        except BaseException:
            self._running = None  # the next iteration starts anew, behind the last batch
            raise
        return None

    def _workers(self) -> DataLoader[Delivery]:
        config = self.dataset.worker_config
        # Without a shuffle every epoch is the same, augmentations included.
        epoch = self._epoch if self.dataset.plan.shuffle else 0
        return DataLoader(
            Worker(self.dataset, self._lanes, self._states, epoch),
            batch_size=None,
            collate_fn=as_is,
            num_workers=config.num_workers,
            prefetch_factor=self._prefetch_factor if config.num_workers else None,
            pin_memory=torch.accelerator.is_available(),
            generator=torch.Generator(),  # not the user's: it would draw from that
        )


def as_is(delivery: Any) -> Any:
    """What the worker made is what is sent: no collating here."""
    return delivery


def get_loader(
    dataset: Dataset[T], *, worker_config: WorkerConfig | None = None, prefetch_factor: int = 2
) -> Loader[T]:
    """A loader for this rank: ``for batch in get_loader(dataset): ...``.

    worker_config: None takes the dataset's; another must have the same lanes and seed.
    prefetch_factor: batches that each worker makes ahead of the one being used.
    """
    if prefetch_factor < 1:
        raise ValueError(f"prefetch_factor is {prefetch_factor}; it must be 1 or more")
    if worker_config is not None:
        ours = dataset.worker_config
        for name in ("lane_count", "seed_offset"):
            if getattr(ours, name) != getattr(worker_config, name):
                raise ValueError(
                    f"the dataset was made with {name} {getattr(ours, name)}, the loader's "
                    f"worker_config has {getattr(worker_config, name)}: give both the same"
                )
        dataset = replace(dataset, worker_config=worker_config)
    return Loader(dataset, prefetch_factor)
