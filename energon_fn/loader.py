"""The loader: has a dataset's lanes run, here or in workers, and delivers their batches in turn.

A batch comes with its lane's state. The loader keeps the last state of each lane in the order of
their turns; that is all there is to know to go on from here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Generic, TypeVar

import torch

from energon_fn.datasets import Dataset
from energon_fn.lanes import WorkerConfig
from energon_fn.samples import pin_memory
from energon_fn.streams import State
from energon_fn.workers import Local, Pool

T = TypeVar("T")


class Loader(Generic[T]):
    """Iterates over a dataset's batches on this rank. Made by :func:`get_loader`.

    An iteration ends with the epoch (or virtual epoch). One that follows a ``break`` finishes the
    epoch behind the last batch that was delivered; one that follows an epoch's end is the next.
    """

    def __init__(
        self,
        dataset: Dataset[T],
        prefetch_factor: int,
        max_worker_restarts: int,
        multiprocessing_context: str | None,
    ):
        self.dataset = dataset
        self._options = prefetch_factor, max_worker_restarts, multiprocessing_context
        self._runner: Local | Pool | None = None
        self._begin(epoch=0)

    def _begin(self, epoch: int) -> None:
        self._epoch = epoch
        self._delivered = 0  # batches of this epoch, or virtual epoch
        # Lanes that have not ended, by turn, with their states.
        self._lanes: dict[int, State] = dict.fromkeys(self.dataset.worker_config.rank_lanes)
        self._started = False

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[T]:
        length, virtual = self.dataset.length, self.dataset.virtual
        if self._delivered == length:  # the last iteration was left at its last batch
            self._delivered = 0
            if not virtual:
                self._begin(self._epoch + 1)
        pinned = torch.accelerator.is_available()
        while self._delivered != length and self._advance():
            self._delivered += 1
            yield pin_memory(self._batch) if pinned else self._batch
        if not (virtual and self._delivered == length):
            self._begin(self._epoch + 1)

    def _advance(self) -> bool:
        """Receive the next batch of any lane; False when all lanes have ended."""
        runner = self._runner = self._runner or self._make_runner()
        if not self._started:
            runner.start(self._epoch, self._lanes)
            self._started = True
        while self._lanes:
            try:
                delivery = runner.receive()
            except BaseException:
                self.close()  # the next iteration starts anew, behind the last batch
                raise
            del self._lanes[delivery.lane]
            if delivery.state is not None:
                self._lanes[delivery.lane] = delivery.state  # its next turn is after all others'
                self._batch = delivery.batch
                return True
        return False

    def _make_runner(self) -> Local | Pool:
        workers = self.dataset.worker_config.num_workers
        prefetch, restarts, context = self._options
        if not workers:
            return Local(self.dataset.lane_stream)
        return Pool(
            self.dataset.lane_stream, workers, prefetch=prefetch, restarts=restarts, context=context
        )

    def close(self) -> None:
        """End the worker processes; iterating starts them again. They also end with the loader."""
        if self._runner is not None:
            self._runner.close()
        self._runner, self._started = None, False


def get_loader(
    dataset: Dataset[T],
    *,
    worker_config: WorkerConfig | None = None,
    prefetch_factor: int = 2,
    max_worker_restarts: int = 3,
    multiprocessing_context: str | None = None,
) -> Loader[T]:
    """A loader for this rank: ``for batch in get_loader(dataset): ...``.

    worker_config: None takes the dataset's; another must have the same lanes and seed.
    prefetch_factor: batches that each worker makes ahead of the one being used.
    max_worker_restarts: a worker that dies is started again where it was, so often in all; then
    :class:`~energon_fn.WorkerError` is raised.
    multiprocessing_context: ``"fork"`` or ``"spawn"``; None takes Python's default.
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
    return Loader(dataset, prefetch_factor, max_worker_restarts, multiprocessing_context)
