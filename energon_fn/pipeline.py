"""The way from keys to batches: sources, an order and the stages, put together.

:func:`lifts` is the table that maps a task encoder's methods to stages; the rest of the library
knows stages only, or only streams.
"""

from __future__ import annotations

import itertools
import os
from bisect import bisect_right
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from inspect import isgeneratorfunction
from time import perf_counter, perf_counter_ns
from typing import Any, Generic, TypeVar, cast

from toolz import pipe

from energon_fn import position, seeds, stages
from energon_fn.caching import CachePool, NoCachePool
from energon_fn.checkpoint import tupled
from energon_fn.collation import collate
from energon_fn.disk.source import Samples, Source
from energon_fn.errors import SkipSample, StateError
from energon_fn.guard import bookkeeping, guarded
from energon_fn.lanes import WorkerConfig
from energon_fn.look.values import counted, seen
from energon_fn.order import mixing
from energon_fn.order.mixing import Order
from energon_fn.order.plan import Key
from energon_fn.stores import DecodeFileStore, FileStore, cooker_arguments, primary_store
from energon_fn.streams import State, Stream, ahead, holding, resumable
from energon_fn.task_encoder import TaskEncoder, marks_of, method_of

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
Decoder = Callable[[dict[str, Any]], dict[str, Any]]
Lift = Callable[[Stream[Any]], Stream[Any]]
Guard = Callable[..., Callable[..., Any]]
"""What wraps the user's functions, called as :func:`guarded`."""
NO_CACHE = NoCachePool()
WILL_NEED = 64
"""Samples that the system is told of before they are read, if they are large."""


@dataclass(frozen=True)
class Dataset(Generic[T_co]):
    """What :func:`~energon_fn.get_train_dataset` and its kind give.

    It is plain data and pickles; nothing is read before it is iterated by
    :func:`~energon_fn.get_loader`.
    """

    sources: tuple[Samples, ...]
    """The single datasets, one behind the other in the order's numbering."""
    aux: tuple[Mapping[str, FileStore], ...]
    """The stores that each source's cookers get."""
    order: Order
    task_encoder: TaskEncoder[Any, Any, Any, T_co]
    worker_config: WorkerConfig
    decoder: Decoder | None
    batch_size: int | None
    batch_drop_last: bool
    packing_buffer_size: int | None
    length: int | None
    """Batches that one iteration over this rank's lanes gives at most; None: no limit."""
    virtual: bool
    """The next iteration goes on where the last one ended (a virtual epoch)."""
    threads: int = 0
    """Threads of each process that read and decode ahead."""
    cache_pool: CachePool = NO_CACHE
    """What cookers keep media in that is needed later."""

    @cached_property
    def starts(self) -> list[int]:
        """The index of each source's first sample and, last, the number of samples."""
        return [0, *itertools.accumulate(map(len, self.sources))]

    def place(self, index: int) -> tuple[int, int]:
        """Which source the ``index``-th sample is in, and which of its samples it is."""
        n = bisect_right(self.starts, index) - 1
        return n, index - self.starts[n]

    def lane_stream(self, lane: int, epoch: int = 0, guarded: Guard = guarded) -> Stream[T_co]:
        """The stream of one lane: ``state -> Iterator[(batch, state after it)]``.

        epoch: where the plan begins if the state is None. Without a shuffle every epoch is the
        first one, so that validation is always the same, augmentations included.
        The state is that of the stages, how many batches the lane has given, and what it has drawn
        for them (:meth:`drawn`). A batch's ``__restore_key__`` is where it came from, see
        :meth:`restore_sample`.
        """
        epoch = epoch if self.shuffles else 0

        def keys(state: State) -> Iterator[tuple[Key, State]]:
            return mixing.keys(self.order, lane, state or mixing.beginning(self.order, epoch))

        staged: Stream[T_co] = pipe(keys, *self._reading, *lifts(self, lane, epoch, guarded))
        lanes = self.order.lanes

        def stream(state: State = None) -> Iterator[tuple[T_co, State]]:
            inner, given, *rest = state or (None, 0)
            here, drawn = position.here, rest[0] if rest else None
            here.batch_index, here.order = given * lanes + lane, drawn
            for batch, after in staged(inner):
                mark(batch, ("batch", epoch, lane, (inner, given)))
                inner, given, drawn, index = after, given + 1, here.order, here.sample_index
                box, here.item = [batch], None
                del batch  # who waits keeps nothing, see stages
                yield box.pop(), (inner, given, drawn)
                # Other lanes ran meanwhile.
                here.batch_index, here.sample_index = given * lanes + lane, index
                here.order = drawn

        return stream

    def lane_state(self, lane: int, given: int) -> State:
        """The state of a lane that has given so many batches, if each sample made one item.

        Raises TypeError where the plan does not tell: the dataset ends, packs, groups or has
        functions that are generators.
        """
        if not self.repeats or self._multiplies():
            raise TypeError(
                "the plan alone does not tell where a batch begins: the dataset does not repeat, "
                "or it packs, groups or multiplies samples. Seek with exact=True, which goes "
                "through all that comes before."
            )
        count = given * (self.batch_size or 1)
        at = mixing.state_after(self.order, lane, count) if count else None  # as streams begin
        state: State = (at, 0, None)
        return (state if self.batch_size is None else (state, 0, None)), given, at

    def drawn(self, states: Mapping[int, State]) -> dict[str, int]:
        """How many samples of each dataset some lanes have drawn for the batches they gave.

        states: by lane. Skipped samples count, and those that wait in a packing buffer; those of a
        concatenation count together.
        """
        counts = [
            mixing.drawn(self.order, lane, state and state[2]) for lane, state in states.items()
        ]
        named: dict[str, int] = {}
        for inside, *of_lanes in zip(self._inside(), *counts, strict=True):
            path = " + ".join(self.sources[n].path for n in inside)
            # The same folder may be there again, for another part of it, say.
            names = (f"{path} ({n})" if n > 1 else path for n in itertools.count(1))
            named[next(name for name in names if name not in named)] = sum(of_lanes)
        return named

    def _inside(self) -> list[list[int]]:
        """Which sources are in each leaf of the order."""
        leaves = [range(leaf.first, leaf.first + len(leaf)) for leaf in mixing.leaves(self.order)]
        full = [n for n, source in enumerate(self.sources) if len(source)]
        return [[n for n in full if self.starts[n] in at] for at in leaves]

    def restore_sample(self, key: Any) -> Any:
        """The very sample or batch whose ``__restore_key__`` is ``key``, made again.

        Augmentations are the same, whatever loads it. For a batch, what it was made of is loaded
        again, a whole packing buffer if need be.

        Raises :class:`~energon_fn.StateError` if nothing of that key is made here.
        """
        with seeds.untouched(), position.apart():
            match tupled(key):
                case ("batch", int() as epoch, int() as lane, (_, int()) as state):
                    items = self.lane_stream(lane, epoch)(state)
                case ("sample", int() as epoch, int() as index, int() as number) if (
                    0 <= index < self.starts[-1]
                ):
                    make = lifts(replace(self, threads=0), 0, 0)[0]
                    one = make(lambda state: iter([((epoch, index), None)]))
                    items = itertools.islice(one(None), number, None)
                case _:
                    items = iter(())
            for item, _ in items:
                if bookkeeping(item, "__restore_key__") in (None, tupled(key)):
                    return item
                break
        raise StateError(
            f"no sample or batch of this dataset has the restore key {key!r}. Give the "
            "__restore_key__ of one that was made with the same arguments."
        )

    @property
    def _reading(self) -> list[Lift]:
        """What has samples read before their turn: by threads, decoded too, or by the system."""
        if not self.threads:
            large = [isinstance(source, Source) and source.is_large for source in self.sources]

            def advise(key: Key) -> Key:
                n, index = self.place(key[1])
                if large[n]:
                    cast(Source, self.sources[n]).will_need(index)
                return key

            return [partial(ahead, advise, depth=WILL_NEED)] if any(large) else []

        def begin(key: Key) -> tuple[Key, Future[Any]]:
            return key, executor(self.threads, os.getpid()).submit(read, self, key)

        config = self.worker_config
        lanes = -(-len(config.rank_lanes) // max(config.num_workers, 1))  # of this process
        depth = max(2 * self.threads // lanes, 1)
        return [partial(ahead, begin, depth=depth, leave=lambda begun: begun[1].cancel())]

    @property
    def repeats(self) -> bool:
        """Whether the order goes on for ever."""
        return isinstance(self.order, mixing.Blend) or self.order.repeat

    @property
    def shuffles(self) -> bool:
        """Whether epochs differ. Without a shuffle every epoch is the first one."""
        return mixing.leaves(self.order)[0].shuffle

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What a saved state depends on, as plain data: order, sizes and stages, not user code."""
        leaf = mixing.leaves(self.order)[0]
        names = ("preencode_sample", "encode_sample", "postencode_sample", "batch_group_criterion")
        return {
            "lanes": self.order.lanes,
            "seed_offset": self.order.seed,
            "dataset": "; ".join(source.identity for source in self.sources),
            "blend": mixing.describe(self.order, [str(inside) for inside in self._inside()]),
            "shuffle": leaf.shuffle and (leaf.span or False),
            "repeat": self.repeats,
            "max_samples_per_sequence": leaf.sequence,
            "shuffle_buffer_size": leaf.window,
            "batch_size": self.batch_size,
            "batch_drop_last": self.batch_drop_last,
            "packing_buffer_size": self.packing_buffer_size,
            "stages": [name for name in names if method_of(self.task_encoder, name)],
        }

    def __repr__(self) -> str:
        paths = {source.path for source in self.sources}
        of = seen(paths.pop()) if len(paths) == 1 else f"{len(self.sources)} datasets"
        batches = f", batches of {self.batch_size}" if self.batch_size else ""
        return f"Dataset({counted(self.starts[-1], 'sample')} of {of}{batches})"

    def __len__(self) -> int:
        """Batches of one iteration on this rank, if no function skips or multiplies samples."""
        return self.batches(epoch=0)

    def batches(self, epoch: int) -> int:
        """Batches of one iteration in that epoch: the ranks' shares go round with the epochs."""
        known = None
        if not (self.repeats or self._multiplies()):
            known = self._count(epoch if self.shuffles else 0)
        counts = [count for count in (self.length, known) if count is not None]
        if not counts:
            raise TypeError(
                "the number of batches is not known: the dataset repeats for ever, or it packs, "
                "groups or multiplies samples. virtual_epoch_length sets it in training."
            )
        return min(counts)

    def _multiplies(self) -> bool:
        """Whether the number of samples does not tell the number of batches."""
        encoder = self.task_encoder
        functions: list[Any] = [method_of(encoder, name) for name in MULTIPLYING]
        functions += [cooker.cook for cooker in getattr(encoder, "cookers", ())]
        return (
            self.packing_buffer_size is not None
            or method_of(encoder, "batch_group_criterion") is not None
            or any(isgeneratorfunction(function) for function in functions)
        )

    def _count(self, epoch: int) -> int:
        rounded = 0 if self.batch_drop_last else (self.batch_size or 1) - 1
        sizes = (
            mixing.lane_size(self.order, epoch, lane) for lane in self.worker_config.rank_lanes
        )
        return sum((size + rounded) // (self.batch_size or 1) for size in sizes)


MULTIPLYING = (
    "cook_crude_sample",
    "preencode_sample",
    "encode_sample",
    "postencode_sample",
    "batch",
    "encode_batch",
)
"""The methods that make more or fewer items where they are generators."""


def steps(dataset: Dataset[Any]) -> dict[str, list[str]]:
    """The functions that are called, in the data's order, by what they make together.

    Methods that would only pass on what they are given are left out.
    """

    def own(*names: str) -> list[str]:
        return [name for name in names if method_of(dataset.task_encoder, name) is not None]

    cooks = ["cook"] if getattr(dataset.task_encoder, "cookers", ()) else []
    found = {"load": ["load", "decode", *cooks]}
    found["encode"] = own("preencode_sample", "encode_sample")
    if dataset.packing_buffer_size is None:
        found["encode"] += own("postencode_sample")
    else:
        select, join = "select_samples_to_pack", "pack_selected_samples"
        found["pack"] = [select, *own("postencode_sample"), join]
    if group := own("batch_group_criterion"):
        found["group"] = group
    if group or dataset.batch_size is not None:
        found["batch"] = ["batch", *own("encode_batch")]
    return found


def lifts(dataset: Dataset[Any], lane: int, epoch: int, guarded: Guard = guarded) -> list[Lift]:
    """The dataset's stages from keys to batches, each lifted to work on streams.

    This is the table that maps the task encoder's methods to stages. Where they draw random
    numbers, those of single samples depend on the sample; from packing on, on the place in the
    stream, and so on the lane and the epoch in which it begins.
    """
    encoder, config = dataset.task_encoder, dataset.worker_config
    # An endless dataset of which nothing comes out would hang for ever.
    longest = (dataset.batch_size or 0) + (dataset.packing_buffer_size or 0)
    patience = 2 * len(dataset.order) + longest + 1000 if dataset.repeats else None

    def lift(*chain: Callable[[Any], Iterable[Any]], name: str) -> Lift:
        return partial(resumable, lambda items: pipe(items, *chain), name=name, patience=patience)

    of_sample, of_lane = config.seed_offset, seeds.number(config.seed_offset, lane, epoch)

    def guard(
        fn: Callable[..., Any],
        name: str,
        marks: tuple[bool, int | None] = (False, None),
        seed: int = of_sample,
    ) -> Callable[..., Any]:
        draws, tolerance = marks
        return guarded(
            fn,
            name,
            seed=seed if draws else None,
            handler=config.global_error_handler,
            tolerance=tolerance or config.failure_tolerance,
        )

    def own(name: str, seed: int) -> Any:
        """The user's method, guarded and seeded, or None where it is the default."""
        method = method_of(encoder, name)
        return method and guard(method, name, marks_of(encoder, name), seed)

    def each(seed: int, *names: str) -> list[Any]:
        stage = stages.encode_batch if names == ("encode_batch",) else stages.encode_sample
        return [stage(fn) for name in names if (fn := own(name, seed)) is not None]

    def cooked(cooker: stages.Cooker) -> stages.Cooker:
        cook, marks = cooker.cook, marks_of(cooker, "cook")
        name = "cook_crude_sample"
        method = method_of(encoder, name)
        if method is not None:
            marks = marks_of(encoder, name)
        arguments = cache(lambda n: arguments_of(dataset, cooker, n))

        def call(sample: Any) -> Any:
            n, _ = dataset.place(sample["__restore_key__"][2])
            given = arguments(n)(sample)
            if method is None:
                return cook(sample, **given)
            return method(sample, cooker=cooker, aux=given)

        return stages.Cooker(guard(call, "cook", marks), cooker.has_subflavors)

    cookers = [cooked(cooker) for cooker in getattr(encoder, "cookers", ())]
    lifted = [
        lift(
            partial(load, dataset, lane, guard),
            *([stages.cook(cookers)] if cookers else []),
            *each(of_sample, *steps(dataset)["encode"]),
            numbered,
            name="encode_sample",
        )
    ]
    if dataset.packing_buffer_size is not None:
        pack = partial(
            stages.pack,
            own("select_samples_to_pack", of_lane),
            own("pack_selected_samples", of_lane),
            buffer_size=dataset.packing_buffer_size,
            postencode=own("postencode_sample", of_lane),
        )
        lifted.append(
            partial(
                resumable,
                lambda items, held: pack(held=held)(items),
                name="pack",
                patience=patience,
                gives_back=True,
            )
        )

    make = own("batch", of_lane) or guard(collate, "batch")
    if (criterion := own("batch_group_criterion", of_lane)) is not None:
        group = stages.group(_key_of, dataset.batch_size, drop_last=dataset.batch_drop_last)
        lifted += [
            lift(stages.encode_sample(partial(_keyed, criterion)), name="batch_group_criterion"),
            partial(holding, group, name="batch_group_criterion", patience=patience),
            lift(
                stages.encode_batch(partial(_of_group, make)),
                *each(of_lane, "encode_batch"),
                name="batch",
            ),
        ]
    elif dataset.batch_size is not None:
        batch = stages.batch(dataset.batch_size, make, drop_last=dataset.batch_drop_last)
        lifted.append(lift(batch, *each(of_lane, "encode_batch"), name="batch"))
    return lifted


def arguments_of(
    dataset: Dataset[Any], cooker: stages.Cooker, n: int
) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """What a cooker is given besides a sample of the ``n``-th source: stores, decoded, and cache.

    Raises :class:`~energon_fn.DatasetError` if it does not take all that there is.
    """

    def decoding(store: FileStore) -> FileStore:
        decode = dataset.decoder
        return store if decode is None else DecodeFileStore(store, decoder=decode)

    aux = {name: decoding(store) for name, store in dataset.aux[n].items()}
    needs_primary, _ = stages.needs_of(cooker.cook)
    primary = decoding(primary_store(dataset.sources[n])) if needs_primary else None
    return cooker_arguments(cooker.cook, aux, primary, dataset.cache_pool)


def load(
    dataset: Dataset[Any],
    lane: int,
    guard: Callable[[Callable[[Any], Any], str], Callable[[Any], Any]],
    keys: Iterable[Any],
) -> Iterator[Any]:
    """The samples of the keys, as they are at hand in the order of a lane: read, then made.

    keys: or, where threads read ahead, pairs of a key and the future of what :func:`read` gives.
    """
    here, lanes, threads = position.here, dataset.order.lanes, dataset.threads
    meter, counts = here.meters["load"], here.meters.counts
    made: Any = None

    def taken(raw: dict[str, Any]) -> Any:
        if isinstance(made, Exception | SkipSample):
            raise made
        return made

    @cache
    def make(n: int) -> Callable[[Any], Any]:
        of_source = partial(dataset.sources[n].make, decode=dataset.decoder)
        return guard(taken if threads else of_source, "decode")

    count = None
    for key in keys:
        if threads:
            key, future = key
        if count is None:  # here.where is the order's state after this key
            count = max(mixing.count(dataset.order, lane, here.where) - 1, 0)
        here.sample_index, here.order = count * lanes + lane, here.where
        count += 1
        here.stage, here.item = "load", key
        calls = meter.calls = meter.calls + 1
        if threads:
            asked = perf_counter()
            n, raw, made, loading, here.elsewhere = future.result()
            counts["waiting"] += perf_counter() - asked
            counts["bytes"] += meter.took(loading) * bytes_in(raw)
        elif calls >= meter.due:
            start = perf_counter_ns()
            n, raw = raw_sample(dataset, key)
            counts["bytes"] += meter.took(perf_counter_ns() - start) * bytes_in(raw)
        else:
            n, raw = raw_sample(dataset, key)
        here.where, here.calls = key, 0
        try:
            sample = make(n)(raw)
        except SkipSample:
            continue
        finally:
            here.elsewhere = 0
        yield sample


def bytes_in(raw: Mapping[str, Any]) -> int:
    """How many bytes the parts of a raw sample have, in a join those of all.

    >>> bytes_in({"__key__": "7", "txt": b"a rose", "jpg": b"..."})
    9
    """
    joined = raw.get("__parts__", ())
    return sum([len(part) for part in raw.values() if type(part) is bytes]) + sum(
        bytes_in(one) for one in joined if one is not None
    )


def raw_sample(dataset: Dataset[Any], key: Key) -> tuple[int, dict[str, Any]]:
    """The number of the source, and the raw sample, of a key."""
    n, index = dataset.place(key[1])
    raw = dataset.sources[n].load(index)
    raw["__restore_key__"] = ("sample", *key, 0)
    return n, raw


def read(dataset: Dataset[Any], key: Key) -> tuple[int, dict[str, Any], Any, int, int]:
    """:func:`raw_sample`, and the sample made of it or why it could not be: for a thread.

    With the nanoseconds that the two took.
    """
    start = perf_counter_ns()
    n, raw = raw_sample(dataset, key)
    loaded = perf_counter_ns()
    try:
        made = dataset.sources[n].make(raw, dataset.decoder)
    except (Exception, SkipSample) as error:
        made = error
    return n, raw, made, loaded - start, perf_counter_ns() - loaded


@cache
def executor(threads: int, process: int) -> ThreadPoolExecutor:
    """The threads of a process; its number is given, since a fork has none of its parent's."""
    return ThreadPoolExecutor(threads, "energon_fn")


def numbered(samples: Iterable[T]) -> Iterator[T]:
    """The samples, with the number of each among those of its key in its restore key."""
    last, number = None, 0
    for sample in samples:
        if isinstance(sample, dict):
            key = sample.get("__restore_key__")
        else:
            key = getattr(sample, "__restore_key__", None)
        if key:
            if key == last:
                number += 1
                mark(sample, (*key[:3], number))
            else:
                last, number = key, 0
        yield sample


def mark(item: Any, key: tuple[Any, ...]) -> None:
    """Set the restore key of a sample or batch that has one."""
    if isinstance(item, dict):
        if "__restore_key__" in item:
            item["__restore_key__"] = key
    elif hasattr(item, "__restore_key__"):
        object.__setattr__(item, "__restore_key__", key)  # of a frozen dataclass too


# A group's members travel with their key and size, so that grouping them again asks no user.
def _keyed(criterion: Callable[[T], tuple[Any, Any]], sample: T) -> tuple[Any, Any, T]:
    match criterion(sample):
        case (Hashable() as key, size) if size is None or hasattr(size, "__index__"):
            return key, size, sample
        case wrong:
            raise TypeError(
                f"batch_group_criterion returned {wrong!r}; it must return (key, batch size or "
                "None), the key being a value that can be a dict's key"
            )


def _key_of(keyed: tuple[Any, Any, Any]) -> tuple[Any, Any]:
    return keyed[:2]


def _of_group(make: Callable[[list[Any]], T], group: list[tuple[Any, Any, Any]]) -> T:
    return make([sample for _, _, sample in group])
