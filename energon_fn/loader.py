"""The loader: has a dataset's lanes run, here or in workers, and delivers their batches in turn.

A batch comes with its lane's state. The loader keeps the last state of each lane in the order of
their turns; that is all there is to know to go on from here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator
from contextlib import suppress
from copy import copy
from dataclasses import replace
from itertools import chain
from multiprocessing import get_all_start_methods
from time import perf_counter
from typing import Any, Generic, Never, Self, TypeVar, Unpack

import torch
import torch.distributed as distributed

from energon_fn import checkpoint
from energon_fn.arguments import LoaderOptions, check_names
from energon_fn.caching import CachePool
from energon_fn.errors import FatalSampleError, SkipSample, StateError, logger
from energon_fn.lanes import WorkerConfig, in_notebook, whole
from energon_fn.look.report import Report, make_report
from energon_fn.look.values import counted
from energon_fn.order.mixing import beginning, lane_size
from energon_fn.pipeline import Dataset, steps
from energon_fn.processes.turns import Delivery, Local
from energon_fn.processes.workers import Pool, PoolOptions
from energon_fn.samples import pin_memory
from energon_fn.streams import State

NEWS_EVERY = 0.2
"""Seconds in which what was counted is asked for once: with each of many small batches is dear."""
T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Loader(Generic[T_co]):
    """Iterates over a dataset's batches on this rank. Made by :func:`get_loader`.

    An iteration ends with the epoch (or virtual epoch). One that follows a ``break`` finishes the
    epoch behind the last batch that was delivered; one that follows an epoch's end is the next.
    """

    def __init__(self, dataset: Dataset[T_co], options: PoolOptions):
        self.dataset = dataset
        self._options = options
        self._runner: Local | Pool | None = None
        self._restored = 0  # how often
        self._pins = False
        self._sums: defaultdict[str, float] = defaultdict(float)
        self._heard = 0.0  # when what was counted was last added to the sums
        self._begin(epoch=0)

    def _begin(self, epoch: int) -> None:
        self._epoch = epoch
        self._delivered = 0  # batches of this epoch, or virtual epoch
        # Lanes that have not ended, by turn, with their states.
        self._lanes: dict[int, State] = dict.fromkeys(self.dataset.worker_config.rank_lanes)
        self._started = False

    def __enter__(self) -> Self:
        """``with get_loader(...) as loader:`` ends the workers behind the block."""
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        config = self.dataset.worker_config
        workers, lanes = counted(config.num_workers, "worker"), counted(config.lane_count, "lane")
        return f"Loader({self.dataset!r}, {workers}, {lanes})"

    def __len__(self) -> int:
        return self.dataset.batches(self._epoch)

    def __iter__(self) -> Iterator[T_co]:
        length, virtual = self.dataset.length, self.dataset.virtual
        if self._delivered == length:  # the last iteration was left at its last batch
            self._delivered = 0
            if not virtual:
                self._begin(self._epoch + 1)
        restored, epoch = self._restored, self._epoch
        self._pins = torch.accelerator.is_available()
        while self._delivered != length:
            waiting, asked = "waited" if self._started else "starting", perf_counter()
            delivery = self._next()
            given = perf_counter()
            self._sums[waiting] += given - asked
            if not delivery:
                if virtual and not self._delivered and self._epoch == epoch:
                    self._begin(epoch + 1)  # the last iteration ended just where the data does
                    continue
                break
            self._delivered += 1
            self._sums["batches"] += 1
            box = [delivery.batch]
            del delivery  # who waits keeps nothing, see stages
            yield box.pop()
            self._sums["used"] += perf_counter() - given
            if self._restored != restored:
                raise StateError(
                    "the loader's state was restored during this iteration, which cannot go on: "
                    "begin a new one"
                )
        if not (virtual and self._delivered == length):
            self._begin(self._epoch + 1)

    def seek(self, n: int, *, exact: bool = True) -> None:
        """Go to global batch ``n``, counted from the very beginning over all ranks.

        exact: go through all that comes before, since functions may skip samples. ``exact=False``
        takes the plan's word for it, which is immediate and right if no sample is left out.
        """
        if n < 0:
            raise ValueError(f"cannot seek to batch {n}: it must be 0 or more")
        config, count = self.dataset.worker_config, self.dataset.order.lanes
        given = {lane: (n - lane + count - 1) // count for lane in config.rank_lanes}
        self._restored += 1
        self._begin(epoch=0)
        if exact:
            for _ in range(sum(given.values())):
                if not self._next():
                    self._begin(epoch=0)
                    raise ValueError(
                        f"cannot seek to batch {n}: the first epoch ends before it. The loader is "
                        "at its beginning"
                    )
        else:
            by_turn = sorted(given, key=lambda lane: (given[lane], lane))
            self._lanes = {lane: self.dataset.lane_state(lane, given[lane]) for lane in by_turn}
        delivered = n // config.world_size
        self._delivered = delivered % (self.dataset.length or delivered + 1)

    def drawn(self) -> dict[str, int]:
        """How many samples of each dataset went into what this rank's loader delivered.

        They count from the beginning of the run, in validation from that of the epoch, and those of
        a blend from where data or weights were last changed (``accept``); samples
        that were skipped, or wait in a packing buffer, are among them.
        """
        order, states = self.dataset.order, {}
        epoch = self._epoch if self.dataset.shuffles else 0
        for lane in self.dataset.worker_config.rank_lanes:
            ended = lane not in self._lanes
            at = (epoch, lane_size(order, epoch, lane)) if ended else beginning(order, epoch)
            states[lane] = self._lanes.get(lane) or (None, 0, at)
        return self.dataset.drawn(states)

    def report(self) -> Report:
        """What happened so far, in all iterations: see :class:`~energon_fn.look.report.Report`."""
        config, threads = self.dataset.worker_config, self.dataset.threads
        self._hear()
        stages = chain.from_iterable(steps(self.dataset).values())
        return make_report(stages, self._sums, self.drawn(), config.num_workers, threads)

    def restore_sample(self, key: Any) -> Any:
        """The very sample or batch whose ``__restore_key__`` is ``key``, made again here.

        See :meth:`energon_fn.Dataset.restore_sample`.
        """
        return self.dataset.restore_sample(key)

    def state_dict(self) -> dict[str, Any]:
        """Where this rank's loader is: behind the last batch that was delivered.

        Plain data that ``json`` and ``torch.save`` carry, see :mod:`energon_fn.checkpoint`. It may
        be taken at any time, also inside of the loop; batches made ahead do not count.
        """
        return {
            "version": checkpoint.VERSION,
            "fingerprint": self.dataset.fingerprint,
            "world_size": self.dataset.worker_config.world_size,
            "epoch": self._epoch,
            "delivered": self._delivered,
            "lanes": {
                str(lane): checkpoint.listed(self._lanes.get(lane, checkpoint.ENDED))
                for lane in self.dataset.worker_config.rank_lanes
            },
        }

    def load_state_dict(self, state: dict[str, Any], *, accept: Collection[str] = ()) -> None:
        """Go to where the loader was that gave ``state``: the next iteration goes on from there.

        state: this rank's, or one with the lanes of more (:func:`energon_fn.checkpoint.merge`).
        accept: names in the fingerprint in which the state may differ, such as ``"dataset"`` when
        data was appended, or ``"replay"``. Then the next epoch begins, since the rest of this one
        cannot be told.

        Raises :class:`~energon_fn.StateError` if the state does not fit.
        """
        checkpoint.check_version(state)
        config, fingerprint = self.dataset.worker_config, self.dataset.fingerprint
        accept = {accept} if isinstance(accept, str) else {*accept}
        if unknown := accept - {*fingerprint, *state["fingerprint"], "replay"}:
            raise ValueError(
                f"there is no {', '.join(map(repr, unknown))} to accept; there are: "
                f"{', '.join([*fingerprint, 'replay'])}"
            )
        differing = checkpoint.differences(state, fingerprint, accept)
        checkpoint.check_lanes(state, [str(lane) for lane in config.rank_lanes])
        lanes = {int(lane): checkpoint.tupled(of) for lane, of in state["lanes"].items()}
        self._restored += 1
        if differing or "replay" in accept:
            epochs = [checkpoint.plan_epoch(at) for at in lanes.values()]
            self._begin(1 + max(state["epoch"], *epochs))
            changed = ", ".join(differing or ["replay"])
            logger.warning(f"{changed} changed: going on with epoch {self._epoch}")
        else:
            self._begin(state["epoch"])
            left = [lane for lane in config.rank_lanes if lanes[lane] != checkpoint.ENDED]
            # It is the turn of the lane that has given least.
            left.sort(key=lambda lane: (checkpoint.batches(lanes[lane]), lane))
            self._lanes = {lane: lanes[lane] for lane in left}
        if self.dataset.virtual or self._epoch == state["epoch"]:
            delivered = state["delivered"] * state["world_size"] // config.world_size
            # With fewer ranks it may be more than an iteration's length: then the next is due.
            self._delivered = min(delivered, self.dataset.length or delivered)

    save_state_rank = state_dict
    restore_state_rank = load_state_dict

    def save_state_global(self, global_dst_rank: int = 0) -> dict[str, Any] | None:
        """The merged state of all ranks on rank ``global_dst_rank``, None on the others.

        All ranks must call it at the same step. Without torch.distributed it is this rank's state.

        global_dst_rank: counted over all processes, also where there is a ``data_parallel_group``.
        Other groups, which load what its group loads, may call it too: they get None.
        """
        if not (distributed.is_available() and distributed.is_initialized()):
            return self.state_dict()
        config = self.dataset.worker_config
        group = config.data_parallel_group
        if not 0 <= global_dst_rank < distributed.get_world_size():
            raise ValueError(
                f"global_dst_rank is {global_dst_rank}; there are {distributed.get_world_size()} "
                "processes, counted from 0"
            )
        if global_dst_rank not in distributed.get_process_group_ranks(group):
            return None
        states: list[Any] | None = None
        if distributed.get_rank() == global_dst_rank:
            states = [None] * distributed.get_world_size(group)
        distributed.gather_object(self.state_dict(), states, dst=global_dst_rank, group=group)
        if states is None:
            return None
        # Ranks with the same WorkerConfig.rank load the same, and have the same state.
        whole = checkpoint.merge(s for n, s in enumerate(states) if s not in states[:n])
        if missing := config.lane_count - len(whole["lanes"]):
            raise StateError(
                f"{missing} of {config.lane_count} lanes are on none of the {len(states)} ranks "
                f"that save: world_size is {config.world_size} in their WorkerConfig, whose "
                "data_parallel_group must be the group that rank and world_size are counted in"
            )
        return whole

    def restore_state_global(
        self,
        state: dict[str, Any] | None,
        *,
        src_rank: int | None = None,
        accept: Collection[str] = (),
    ) -> None:
        """Go to where all ranks were when ``state`` was saved by :meth:`save_state_global`.

        state: given on all ranks; or on rank ``src_rank`` only, from where the others get it.
        src_rank: counted within the ``data_parallel_group`` where there is one; each group must
        be given the state.
        """
        if src_rank is not None and distributed.is_available() and distributed.is_initialized():
            shared = [state]
            group = self.dataset.worker_config.data_parallel_group
            ranks = distributed.get_process_group_ranks(group)
            if not 0 <= src_rank < len(ranks):
                raise ValueError(
                    f"src_rank is {src_rank}; there are {len(ranks)} ranks, counted from 0"
                )
            distributed.broadcast_object_list(shared, src=ranks[src_rank], group=group)
            state = shared[0]
        if state is None:
            raise StateError("there is no state: give it on every rank, or say on which (src_rank)")
        self.load_state_dict(state, accept=accept)

    def _next(self) -> Delivery | None:
        """The next batch of any lane, or None when all lanes have ended."""
        runner = self._runner = self._runner or self._make_runner()
        if not self._started:
            runner.start(self._epoch, self._lanes)
            self._started = True
        while self._lanes:
            skipped = False
            try:
                delivery = runner.receive()
                ends = delivery.state is None and len(self._lanes) == 1
                if ends or perf_counter() > self._heard + NEWS_EVERY:
                    self._hear()
                    self._check_failures()
                if self._pins and delivery.state is not None:
                    with suppress(SkipSample):  # which a batch's own way of pinning may raise
                        skipped = True
                        delivery = replace(delivery, batch=pin_memory(delivery.batch))
                        skipped = False
            except BaseException:
                self.close()  # the next iteration starts anew, behind the last batch
                raise
            del self._lanes[delivery.lane]
            if delivery.state is not None:
                self._lanes[delivery.lane] = delivery.state  # its next turn is after all others'
                if not skipped:
                    return delivery
        return None

    def _hear(self) -> None:
        """Add up what was counted since the last time."""
        self._heard = perf_counter()
        if self._runner is not None:
            for name, amount in self._runner.news().items():
                self._sums[name] += amount

    def _check_failures(self) -> None:
        """Raise :class:`~energon_fn.FatalSampleError` if more failed than the config accepts."""
        config, sums = self.dataset.worker_config, self._sums
        if config.max_failures is None and config.max_failure_rate is None:
            return
        failed = int(sum(n for name, n in sums.items() if name.endswith("/failed")))
        loaded = int(sums["load/in"])
        most, rate = config.max_failures, config.max_failure_rate
        if most is not None and failed > most:
            limit = f"max_failures={most} accepts"
        elif rate is not None and failed > rate * max(loaded, 1000):
            limit = f"max_failure_rate={rate} accepts (of 1,000 at least)"
        else:
            return
        raise FatalSampleError(
            f"{failed:,} failures with {loaded:,} samples on this rank are more than {limit}. The "
            "log tells which; global_error_handler=quarantine(FILE) writes them down."
        )

    def _make_runner(self) -> Local | Pool:
        streams, config = self.dataset.lane_stream, self.dataset.worker_config
        workers = min(config.num_workers, len(config.rank_lanes))
        if not workers:
            return Local(streams)
        return Pool(streams, workers, self._options, self.dataset.cache_pool.close)

    def close(self) -> None:
        """End the worker processes; iterating starts them again. They also end with the loader."""
        if self._runner is not None:
            self._hear()
            self._runner.close()
            self.dataset.cache_pool.close()
        self._runner, self._started = None, False


def get_loader(
    dataset: Dataset[T],
    *,
    worker_config: WorkerConfig | None = None,
    prefetch_factor: int = 2,
    max_worker_restarts: int = 3,
    multiprocessing_context: str | None = None,
    watchdog_timeout_seconds: float | None = 60,
    fail_on_timeout: bool = False,
    cache_pool: CachePool | None = None,
    threads: int | None = None,
    **unknown: Never,
) -> Loader[T]:
    """A loader for this rank: ``for batch in get_loader(dataset): ...``.

    worker_config: None takes the dataset's; another must have the same lanes and seed.
    prefetch_factor: batches that each worker makes ahead of the one being used; small ones, up to
    16 or 256 kB together, count as one.
    max_worker_restarts: a worker that dies is started again where it was, so often in all; then
    :class:`~energon_fn.WorkerError` is raised.
    multiprocessing_context: ``"fork"`` or ``"spawn"``; None takes Python's default.
    watchdog_timeout_seconds: a worker that has not got on for so long is told of, with the sample,
    the stage and the Python stack it is in, and started again; None: never.
    fail_on_timeout: raise :class:`~energon_fn.WorkerError` instead of starting it again.
    cache_pool: where cookers keep media until it is needed, see :mod:`energon_fn.caching`; None:
    it is read when it is needed.
    threads: threads in each process (workers, or this one without any) that read and decode samples
    before their turn; what is delivered is the same. None: 4 in a notebook without workers, else 0.
    """
    check_names(get_loader, unknown, also=())
    if not isinstance(dataset, Dataset):
        raise TypeError(
            f"get_loader takes a dataset, not {dataset!r}: get_loader(get_train_dataset(...))"
        )
    prefetch_factor = whole("prefetch_factor", prefetch_factor, 1)
    max_worker_restarts = whole("max_worker_restarts", max_worker_restarts, 0)
    watchdog = watchdog_timeout_seconds
    if watchdog is not None and not (isinstance(watchdog, int | float) and watchdog > 0):
        raise ValueError(
            f"watchdog_timeout_seconds is {watchdog!r}; it must be above 0, or None to switch it "
            "off"
        )
    if multiprocessing_context not in (None, *(methods := get_all_start_methods())):
        raise ValueError(
            f"multiprocessing_context is {multiprocessing_context!r}; there are: "
            f"{', '.join(methods)}, None for Python's default"
        )
    if not (cache_pool is None or hasattr(cache_pool, "get_lazy")):
        raise TypeError(f"cache_pool is {cache_pool!r}; give a FileStoreCachePool, say")
    if worker_config is not None:
        ours = dataset.worker_config
        for name in ("lane_count", "seed_offset"):
            if getattr(ours, name) != getattr(worker_config, name):
                raise ValueError(
                    f"the dataset was made with {name} {getattr(ours, name)}, the loader's "
                    f"worker_config has {getattr(worker_config, name)}: give both the same"
                )
        dataset = replace(dataset, worker_config=worker_config)
    if threads is None:
        threads = 4 if in_notebook() and not dataset.worker_config.num_workers else 0
    dataset = replace(dataset, threads=whole("threads", threads, 0, ", 0 for none"))
    if cache_pool is not None:
        dataset = replace(dataset, cache_pool=copy(cache_pool))  # one of its own to close
    options = PoolOptions(
        prefetch=prefetch_factor,
        restarts=max_worker_restarts,
        context=multiprocessing_context,
        watchdog=watchdog_timeout_seconds,
        fail_on_timeout=fail_on_timeout,
    )
    return Loader(dataset, options)


def get_savable_loader(
    dataset: Dataset[T],
    *,
    checkpoint_every_sec: float | None = None,
    checkpoint_every_min_n_samples: int | None = None,
    n_checkpoints: int | None = None,
    gc_collect_every_n_steps: int | None = None,
    watchdog_initial_timeout_seconds: float | None = None,
    **options: Unpack[LoaderOptions],
) -> Loader[T]:
    """:func:`get_loader`, by its published name: the state of every loader can be saved.

    What it takes besides is not needed, since each batch comes with its state, and the watchdog
    counts the steps that are made.
    """
    check_names(get_savable_loader, options, also=LoaderOptions.__annotations__)
    return get_loader(dataset, **options)
