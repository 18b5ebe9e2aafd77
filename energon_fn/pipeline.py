"""The way from keys to batches: a source, a plan and the stages, put together.

:func:`lifts` is the table that maps a task encoder's methods to stages; the rest of the library
knows stages only, or only streams.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from inspect import isgeneratorfunction
from itertools import islice
from typing import Any, Generic, TypeVar, cast

from toolz import pipe

from energon_fn import plan, position, seeds, stages
from energon_fn.checkpoint import tupled
from energon_fn.collation import collate
from energon_fn.disk.source import Source
from energon_fn.errors import StateError
from energon_fn.guard import bookkeeping, guarded
from energon_fn.lanes import WorkerConfig
from energon_fn.samples import CrudeSample
from energon_fn.streams import State, Stream, holding, resumable
from energon_fn.task_encoder import TaskEncoder, marks_of, method_of

T = TypeVar("T")
Decoder = Callable[[dict[str, Any]], dict[str, Any]]
Lift = Callable[[Stream[Any]], Stream[Any]]


@dataclass(frozen=True)
class Dataset(Generic[T]):
    """What :func:`~energon_fn.get_train_dataset` and its kind give.

    It is plain data and pickles; nothing is read before it is iterated by
    :func:`~energon_fn.get_loader`.
    """

    source: Source
    plan: plan.Plan
    task_encoder: TaskEncoder[Any, Any, Any, T]
    worker_config: WorkerConfig
    decoder: Decoder | None
    batch_size: int | None
    batch_drop_last: bool
    packing_buffer_size: int | None
    length: int | None
    """Batches that one iteration over this rank's lanes gives at most; None: no limit."""
    virtual: bool
    """The next iteration goes on where the last one ended (a virtual epoch)."""

    def lane_stream(self, lane: int, epoch: int = 0) -> Stream[T]:
        """The stream of one lane: ``state -> Iterator[(batch, state after it)]``.

        epoch: where the plan begins if the state is None. Without a shuffle every epoch is the
        first one, so that validation is always the same, augmentations included.
        The state is that of the stages and how many batches the lane has given. A batch's
        ``__restore_key__`` is where it came from, see :meth:`restore_sample`.
        """
        epoch = epoch if self.plan.shuffle else 0

        def keys(state: State) -> Iterator[tuple[plan.Key, State]]:
            return plan.keys(self.plan, lane, state or (epoch, 0))

        staged: Stream[T] = pipe(keys, *lifts(self, lane, epoch))

        def stream(state: State = None) -> Iterator[tuple[T, State]]:
            inner, given = state or (None, 0)
            position.here.batch_index = given * self.plan.lanes + lane
            for batch, after in staged(inner):
                mark(batch, ("batch", epoch, lane, (inner, given)))
                inner, given = after, given + 1
                yield batch, (inner, given)
                position.here.batch_index = given * self.plan.lanes + lane

        return stream

    def lane_state(self, lane: int, given: int) -> State:
        """The state of a lane that has given so many batches, if each sample made one item.

        Raises TypeError where the plan does not tell: the dataset ends, packs, groups or has
        functions that are generators.
        """
        if not self.plan.repeat or self._count(0) is None:
            raise TypeError(
                "the plan alone does not tell where a batch begins: the dataset does not repeat, "
                "or it packs, groups or multiplies samples. Seek with exact=True, which goes "
                "through all that comes before."
            )
        count = given * (self.batch_size or 1)
        at = plan.state_after(self.plan, lane, count) if count else None  # as streams begin
        state: State = (at, 0, None)
        return (state if self.batch_size is None else (state, 0, None)), given

    def restore_sample(self, key: Any) -> Any:
        """The very sample or batch whose ``__restore_key__`` is ``key``, made again.

        Augmentations are the same, whatever loads it. For a batch, what it was made of is loaded
        again, a whole packing buffer if need be.

        Raises :class:`~energon_fn.StateError` if nothing of that key is made here.
        """
        with seeds.untouched():
            match tupled(key):
                case ("batch", int() as epoch, int() as lane, (_, int()) as state):
                    items = self.lane_stream(lane, epoch)(state)
                case ("sample", int() as epoch, int() as index, int() as number) if (
                    0 <= index < len(self.source)
                ):
                    one = lifts(self, 0, 0)[0](lambda state: iter([((epoch, index), (0, 1))]))
                    items = islice(one(None), number, None)
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
    def fingerprint(self) -> dict[str, Any]:
        """What a saved state depends on, as plain data: order, sizes and stages, not user code."""
        source = self.source
        names = ("preencode_sample", "encode_sample", "postencode_sample", "batch_group_criterion")
        return {
            "lanes": self.plan.lanes,
            "seed_offset": self.plan.seed,
            "dataset": f"{len(source)} samples of {source.split_part!r} in {len(source.segments)} "
            f"segments of shards, {seeds.number(source.shards, source.segments):x}",
            "shuffle": self.plan.shuffle,
            "repeat": self.plan.repeat,
            "max_samples_per_sequence": self.plan.sequence,
            "shuffle_buffer_size": self.plan.window,
            "batch_size": self.batch_size,
            "batch_drop_last": self.batch_drop_last,
            "packing_buffer_size": self.packing_buffer_size,
            "stages": [name for name in names if method_of(self.task_encoder, name)],
        }

    def __len__(self) -> int:
        """Batches of one iteration on this rank, if no function skips or multiplies samples."""
        return self.batches(epoch=0)

    def batches(self, epoch: int) -> int:
        """Batches of one iteration in that epoch: the ranks' shares go round with the epochs."""
        known = None if self.plan.repeat else self._count(epoch if self.plan.shuffle else 0)
        counts = [count for count in (self.length, known) if count is not None]
        if not counts:
            raise TypeError(
                "the number of batches is not known: the dataset repeats for ever, or it packs, "
                "groups or multiplies samples. virtual_epoch_length sets it in training."
            )
        return min(counts)

    def _count(self, epoch: int) -> int | None:
        encoder = self.task_encoder
        functions: list[Any] = [method_of(encoder, name) for name in MULTIPLYING]
        functions += [cooker.cook for cooker in getattr(encoder, "cookers", ())]
        if (
            self.packing_buffer_size
            or method_of(encoder, "batch_group_criterion")
            or any(isgeneratorfunction(function) for function in functions)
        ):
            return None
        rounded = 0 if self.batch_drop_last else (self.batch_size or 1) - 1
        sizes = (plan.lane_size(self.plan, epoch, lane) for lane in self.worker_config.rank_lanes)
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


def lifts(dataset: Dataset[Any], lane: int, epoch: int) -> list[Lift]:
    """The dataset's stages from keys to batches, each lifted to work on streams.

    This is the table that maps the task encoder's methods to stages. Where they draw random
    numbers, those of single samples depend on the sample; from packing on, on the place in the
    stream, and so on the lane and the epoch in which it begins.
    """
    encoder, config = dataset.task_encoder, dataset.worker_config
    # An endless dataset of which nothing comes out would hang for ever.
    longest = (dataset.batch_size or 0) + (dataset.packing_buffer_size or 0)
    patience = 2 * len(dataset.plan) + longest + 1000 if dataset.plan.repeat else None

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
        return [stages.encode_sample(fn) for name in names if (fn := own(name, seed)) is not None]

    def cooked(cooker: stages.Cooker) -> stages.Cooker:
        cook, marks = cooker.cook, marks_of(cooker, "cook")
        name = "cook_crude_sample"
        if (method := method_of(encoder, name)) is not None:
            cook, marks = partial(method, cooker=cooker, aux={}), marks_of(encoder, name)
        return stages.Cooker(guard(cook, "cook", marks), cooker.has_subflavors)

    encoding = ["preencode_sample", "encode_sample"]
    if dataset.packing_buffer_size is None:
        encoding.append("postencode_sample")
    cookers = [cooked(cooker) for cooker in getattr(encoder, "cookers", ())]
    lifted = [
        lift(
            partial(load, dataset, lane),
            stages.encode_sample(guard(partial(decoded, dataset), "decode")),
            *([stages.cook(cookers)] if cookers else []),
            *each(of_sample, *encoding),
            numbered,
            name="encode_sample",
        )
    ]
    if dataset.packing_buffer_size is not None:
        pack = stages.pack(
            own("select_samples_to_pack", of_lane),
            own("pack_selected_samples", of_lane),
            buffer_size=dataset.packing_buffer_size,
            postencode=own("postencode_sample", of_lane),
        )
        lifted.append(lift(pack, name="pack"))

    make = own("batch", of_lane) or guard(collate, "batch")
    if (criterion := own("batch_group_criterion", of_lane)) is not None:
        group = stages.group(_key_of, dataset.batch_size, drop_last=dataset.batch_drop_last)
        lifted += [
            lift(stages.encode_sample(partial(_keyed, criterion)), name="batch_group_criterion"),
            partial(holding, group, name="batch_group_criterion", patience=patience),
            lift(
                stages.encode_sample(partial(_of_group, make)),
                *each(of_lane, "encode_batch"),
                name="batch",
            ),
        ]
    elif dataset.batch_size is not None:
        batch = stages.batch(dataset.batch_size, make, drop_last=dataset.batch_drop_last)
        lifted.append(lift(batch, *each(of_lane, "encode_batch"), name="batch"))
    return lifted


def load(dataset: Dataset[Any], lane: int, keys: Iterable[plan.Key]) -> Iterator[dict[str, Any]]:
    """The raw samples of the keys, as they are at hand in the plan of a lane."""
    source, lanes, here = dataset.source, dataset.plan.lanes, position.here
    longest = len(dataset.plan) // lanes + dataset.plan.block  # no lane has more in an epoch
    for key in keys:
        epoch, done = cast(plan.State, here.where)  # the plan's state after this key
        here.sample_index = (epoch * longest + done - 1) * lanes + lane
        position.doing("load", key)
        raw = source.load(key[1])
        raw["__restore_key__"] = ("sample", *key, 0)
        position.at(key)
        yield raw


def numbered(samples: Iterable[T]) -> Iterator[T]:
    """The samples, with the number of each among those of its key in its restore key."""
    last, number = None, 0
    for sample in samples:
        key = bookkeeping(sample, "__restore_key__")
        if key:
            number = number + 1 if key[1:3] == last else 0
            last = key[1:3]
            if number:
                mark(sample, (*key[:3], number))
        yield sample


def mark(item: Any, key: tuple[Any, ...]) -> None:
    """Set the restore key of a sample or batch that has one."""
    if isinstance(item, dict):
        if "__restore_key__" in item:
            item["__restore_key__"] = key
    elif hasattr(item, "__restore_key__"):
        object.__setattr__(item, "__restore_key__", key)  # of a frozen dataclass too


def decoded(dataset: Dataset[Any], raw: dict[str, Any]) -> Any:
    """The sample of the dataset's type, or the crude sample, of a raw one."""
    parts = raw if dataset.decoder is None else dataset.decoder(raw)
    return (
        CrudeSample(parts)
        if dataset.source.sample_type is None
        else dataset.source.to_sample(parts)
    )


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
