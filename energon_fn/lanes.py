"""Lanes: who runs which stream.

A *lane* is one independent stream over its own share of the data. How many lanes there are is part
of the experiment, like the seed; ranks and workers only share them out. Rank r of W drives the
lanes r, r + W, r + 2W, ..., in turn; a lane that has ended still takes its turns, with nothing to
deliver. So what is delivered, and in which order, does not depend on how many workers there are.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import Any, SupportsIndex

import torch

from energon_fn.errors import ErrorHandler, log_exception, logger


def whole(name: str, number: Any, least: int | None = None, otherwise: str = "") -> int:
    """A whole number, also one of NumPy's, as the int that orders and seeds are computed from.

    Raises ValueError for anything else, and for what is below ``least``.

    >>> whole("batch_size", 2.5, least=1, otherwise=", or None to switch it off")
    Traceback (most recent call last):
        ...
    ValueError: batch_size is 2.5; it must be 1 or more, a whole number, or None to switch it off
    """
    if isinstance(number, SupportsIndex) and (least is None or number.__index__() >= least):
        return int(number.__index__())
    bound = "" if least is None else f"{least} or more, "
    raise ValueError(f"{name} is {number!r}; it must be {bound}a whole number{otherwise}")


def in_notebook() -> bool:
    """Whether this is a notebook's kernel, where threads serve better than processes."""
    return "ipykernel" in sys.modules and getattr(sys.modules["__main__"], "__file__", None) is None


@dataclass(frozen=True, kw_only=True)
class WorkerConfig:
    """Which part of the work is done here, and how.

    rank, world_size: this process among those that train on different data.
    num_workers: processes that load for this rank; 0 loads in the training process itself.
    data_parallel_group: the torch.distributed group that rank and world size are counted in.
    seed_offset: another number gives another order and other augmentations.
    lanes: number of independent streams over all ranks, a multiple of the world size; None takes as
    many as there are workers in all.
    global_error_handler: what happens to samples that fail, see :mod:`energon_fn.errors`;
    :func:`~energon_fn.quarantine` writes them down.
    failure_tolerance: how many failures in a row of one function end the run.
    max_failures, max_failure_rate: how many samples may fail on this rank since its loader was
    made, and what share of those loaded (looked at from 1,000 samples on); None: any number.

    >>> WorkerConfig(rank=1, world_size=2, num_workers=2).rank_lanes
    (1, 3)
    """

    rank: int
    world_size: int
    num_workers: int
    data_parallel_group: Any = None
    seed_offset: int = 0
    lanes: int | None = None
    global_error_handler: ErrorHandler = log_exception
    failure_tolerance: int = 100
    max_failures: int | None = None
    max_failure_rate: float | None = None

    def __post_init__(self) -> None:
        least = {"world_size": 1, "num_workers": 0, "failure_tolerance": 1, "max_failures": 0}
        for name in (*least, "rank", "seed_offset", "lanes"):
            given = getattr(self, name)
            if given is not None or name not in ("lanes", "max_failures"):
                object.__setattr__(self, name, whole(name, given, least.get(name)))
        rate = self.max_failure_rate
        if rate is not None and not (isinstance(rate, int | float) and 0 <= rate <= 1):
            raise ValueError(f"max_failure_rate is {rate!r}; it must be a share, 0 to 1")
        if not callable(self.global_error_handler):
            raise TypeError(
                f"global_error_handler is {self.global_error_handler!r}; give a function such as "
                "log_exception, reraise_exception or quarantine(FILE)"
            )
        if not 0 <= self.rank < self.world_size:
            raise ValueError(
                f"rank is {self.rank}; with world_size {self.world_size} it must be "
                f"0 to {self.world_size - 1}"
            )
        if self.lanes is not None and (self.lanes < 1 or self.lanes % self.world_size):
            below = max(self.lanes // self.world_size, 1) * self.world_size
            raise ValueError(
                f"lanes is {self.lanes}; it must be a multiple of world_size {self.world_size}, so "
                f"that all ranks get as many batches: {below} or {below + self.world_size}, say"
            )

    @classmethod
    def default_worker_config(
        cls,
        num_workers: int = 4,
        data_parallel_group: Any = None,
        *,
        lanes: int | None = None,
    ) -> WorkerConfig:
        """The configuration of this process: rank and world size by torch.distributed, if in use.

        >>> WorkerConfig.default_worker_config(num_workers=0).world_size
        1
        """
        distributed = torch.distributed
        if not (distributed.is_available() and distributed.is_initialized()):
            if int(os.environ.get("WORLD_SIZE", 1)) > 1:
                logger.warning(
                    "this is one of several ranks (WORLD_SIZE is set), but torch.distributed is "
                    "not initialized yet, so each rank takes itself for the only one and all load "
                    "the same data: call torch.distributed.init_process_group first"
                )
            return cls(rank=0, world_size=1, num_workers=num_workers, lanes=lanes)
        return cls(
            rank=distributed.get_rank(data_parallel_group),
            world_size=distributed.get_world_size(data_parallel_group),
            num_workers=num_workers,
            data_parallel_group=data_parallel_group,
            lanes=lanes,
        )

    @property
    def lane_count(self) -> int:
        """How many lanes there are over all ranks."""
        return self.lanes or self.world_size * max(self.num_workers, 1)

    @property
    def rank_lanes(self) -> tuple[int, ...]:
        """The lanes of this rank, in the order of their turns."""
        return tuple(range(self.rank, self.lane_count, self.world_size))

    def __getstate__(self) -> dict[str, Any]:
        # A process group cannot travel to a worker, and is not needed there.
        return {**self.__dict__, "data_parallel_group": None}

    def __copy__(self) -> WorkerConfig:
        return self  # it does not change, and has its group

    def __deepcopy__(self, memo: object) -> WorkerConfig:
        return self


default_worker_config = WorkerConfig.default_worker_config
"""The same as a function."""
