"""What there is to say of a dataset's pipeline: sources, order, functions, and who runs them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from fractions import Fraction
from functools import partial
from inspect import isgeneratorfunction
from itertools import repeat
from typing import Any

from energon_fn.collation import collate
from energon_fn.decoding import SampleDecoder
from energon_fn.disk.joined import Joined
from energon_fn.disk.jsonl import Jsonl
from energon_fn.disk.source import Samples, Source
from energon_fn.loader import Loader
from energon_fn.look.drawing import Description, Part, Row
from energon_fn.look.values import counted, seen
from energon_fn.order import mixing
from energon_fn.order.mixing import Blend, Order
from energon_fn.order.plan import Plan
from energon_fn.packing import Packer
from energon_fn.pipeline import Dataset, steps
from energon_fn.task_encoder import marks_of, method_of


def describe(dataset: Dataset[Any] | Loader[Any]) -> Description:
    """What the pipeline of a dataset, or of a loader's dataset, is. Nothing is read for it.

    The sources with path, sample type and counts, and how they are mixed: by which weights, and
    which shares of all samples that makes. The order. All functions that are called, in the data's
    order. Lanes, ranks, workers, and how many batches an iteration has.

    Printed it is a text, at the end of a notebook's cell a drawing.

    >>> import tempfile, webdataset
    >>> from energon_fn import WorkerConfig, get_val_dataset
    >>> config = WorkerConfig(rank=0, world_size=1, num_workers=2)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with webdataset.TarWriter(f"{folder}/0.tar") as tar:
    ...         for n in range(5):
    ...             size = tar.write({"__key__": str(n), "txt": f"text {n}"})
    ...     dataset = get_val_dataset(
    ...         folder, batch_size=2, split_part="train", worker_config=config
    ...     )
    >>> print(describe(dataset))
    Dataset(5 samples of ..., batches of 2)
    sources
      ...
        crude, 5 samples, 1 shard of train
    order
      shuffle  no: as they are in the dataset
      repeat   no: every sample once
      seed     0
    stages
      load     each when it is due
      decode   SampleDecoder, torchrgb
      batch    collate, default, 2 samples, the last may be short
    running
      lanes    2
      workers  2 processes
      length   3 batches an iteration, if no function skips samples
    """
    if isinstance(dataset, Loader):
        dataset = dataset.dataset
    if not isinstance(dataset, Dataset):
        raise TypeError(
            f"describe takes a dataset or a loader, not {dataset!r}: "
            "describe(get_train_dataset(...))"
        )
    stages = _stages(dataset)
    config = dataset.worker_config
    return Description(
        title=repr(dataset),
        sources=_sources(dataset),
        order=tuple(_order(dataset)),
        stages=stages,
        running=tuple(_running(dataset, stages[-1][0])),
        lanes=config.lane_count,
        rank_lanes=config.rank_lanes,
    )


# ---------------------------------------------------------------------------------------- sources


def _sources(dataset: Dataset[Any]) -> Part:
    """The tree of the order. What has no samples is not in it, and comes last here."""
    starts, sources = dataset.starts, dataset.sources
    full = [n for n, source in enumerate(sources) if len(source)]

    def part(order: Order, share: float | None, amount: str = "") -> Part:
        if isinstance(order, Plan):
            if order is dataset.order:
                return chain(range(len(sources)), share, amount)
            behind = order.first + len(order)
            inside = [n for n in full if order.first <= starts[n] < behind]
            return chain(inside, share, amount)
        if isinstance(order, Blend):
            how, random = "blend", ("drawn at random",) * order.random
            amounts = [_weight(weight) for weight in order.weights]
        else:
            how, random = "blend_epochized", ()
            amounts = [f"{float(times):g} x" for times in order.repetitions]
        parts = map(part, order.parts, _shares(order, share), amounts)
        return Part(how, random, amount, share, tuple(parts))

    def chain(numbers: Sequence[int], share: float | None, amount: str) -> Part:
        if len(numbers) == 1:
            return _source(sources[numbers[0]], amount, share)
        whole = sum(len(sources[n]) for n in numbers) or 1
        shares = [share and share * len(sources[n]) / whole for n in numbers]
        parts = (_source(sources[n], "", own) for n, own in zip(numbers, shares, strict=True))
        return Part("concat", (), amount, share, tuple(parts))

    tree = part(dataset.order, 1.0)
    if isinstance(dataset.order, Plan):
        return tree
    empty = (_source(source, "", 0.0) for source in sources if not len(source))
    return replace(tree, parts=(*tree.parts, *empty))


def _shares(order: Blend | mixing.Rounds, share: float | None) -> list[float | None]:
    """Of all samples, those of each part of the order whose share is given; None: not fixed."""
    if isinstance(order, Blend):
        amounts = [weight for weight in order.weights if not callable(weight)]
        if share is None or len(amounts) < len(order.parts):
            return [None] * len(order.parts)
    else:
        pairs = zip(order.parts, order.repetitions, strict=True)
        amounts = [times * len(part) for part, times in pairs]
    return [share and share * float(amount / sum(amounts)) for amount in amounts]


def _weight(weight: Fraction | Callable[[int], float]) -> str:
    return name_of(weight) if callable(weight) else f"weight {float(weight):g}"


def _source(
    source: Samples, amount: str = "", share: float | None = None, nonmatch: str = "error"
) -> Part:
    name, count = seen(source.path), counted(len(source), "sample")
    parts: tuple[Part, ...] = ()
    match source:
        case Source():
            shards = len({segment.shard for segment in source.segments})
            kind = "crude" if source.sample_type is None else source.sample_type.__name__
            notes = [kind, count, f"{counted(shards, 'shard')} of {source.split_part}"]
        case Jsonl():
            notes = ["crude", count, counted(len(source.lines), "file")]
        case Joined():
            labels = source.names or ("",) * len(source.parts)
            name, notes = f"join for {name_of(source.joiner)}", [count]
            parts = tuple(map(_source, source.parts, labels, repeat(None), source.nonmatch))
        case _:
            notes = [count]
    if not parts:
        notes += [f"{name}: {value}" for name, value in source.subflavors.items()]
    if nonmatch != "error":
        notes.insert(0, f"nonmatch: {nonmatch}")
    return Part(name, tuple(notes), amount, share, parts, joined=bool(parts))


# ------------------------------------------------------------------------------------------ order


def _order(dataset: Dataset[Any]) -> Iterator[Row]:
    leaf = mixing.leaves(dataset.order)[0]
    if leaf.shuffle:
        what = f"pieces of {leaf.sequence}" if leaf.sequence else "whole shards"
        notes = [f"{what}{' in their order' if leaf.span is None else ''}"]
        if leaf.span not in (None, 1):
            notes[0] += f" of {leaf.span} rounds together"
        if (leaf.window or 1) > 1:
            notes.append(f"then a buffer of {leaf.window}")
        yield Row("shuffle", "", tuple(notes))
    else:
        yield Row("shuffle", "", ("no: as they are in the dataset",))
    if dataset.repeats:
        yield Row("repeat", "", ("for ever",))
    elif isinstance(dataset.order, Plan):
        yield Row("repeat", "", ("no: every sample once",))
    else:
        yield Row("repeat", "", (f"no: an epoch of {counted(len(dataset.order), 'sample')}",))
    yield Row("seed", "", (str(dataset.order.seed),))


# ----------------------------------------------------------------------------------------- stages


def _stages(dataset: Dataset[Any]) -> tuple[tuple[str, tuple[Row, ...]], ...]:
    """The functions, in the order of :func:`~energon_fn.pipeline.steps`, by what they make."""
    made = {"load": "samples", "encode": "samples", "pack": "packs", "group": "batches"}
    stages: dict[str, list[Row]] = {}
    for group, names in steps(dataset).items():
        rows = (row for name in names for row in _rows(dataset, name))
        stages.setdefault(made.get(group, "batches"), []).extend(rows)
    return tuple((name, tuple(rows)) for name, rows in stages.items())


def _rows(dataset: Dataset[Any], name: str) -> Iterator[Row]:
    encoder, decoder = dataset.task_encoder, dataset.decoder
    match name:
        case "load":
            threads = dataset.threads
            ahead = f"ahead, in {counted(threads, 'thread')}" if threads else "each when it is due"
            yield Row(name, "", (ahead,))
        case "decode":
            if isinstance(decoder, SampleDecoder):
                yield Row(name, type(decoder).__name__, tuple(_options(decoder)))
            elif decoder is None:
                yield Row(name, "", ("no: parts stay bytes",))
            else:
                yield Row(name, name_of(decoder))
        case "cook":
            whole = method_of(encoder, "cook_crude_sample")
            for cooker in encoder.cookers:
                fn, marks = cooker.cook, marks_of(cooker, "cook")
                if whole is not None:
                    fn, marks = whole, marks_of(encoder, "cook_crude_sample")
                takes = [f"{key}: {value}" for key, value in (cooker.has_subflavors or {}).items()]
                of = [f"of {', '.join(takes)}"] if takes else []
                via = [f"with {name_of(cooker.cook)}"] if whole is not None else []
                yield Row(name, name_of(fn), (*of, *via, *_told(fn, marks[0])))
        case _:
            method = method_of(encoder, name)
            notes = tuple(_arguments(dataset, name))
            if method is None:  # only batch has a default that does something
                yield Row(name, name_of(collate), ("default", *notes))
                return
            if isinstance(method, Packer):
                notes += (f"capacity {method.capacity}",)
            yield Row(name, name_of(method), (*_told(method, marks_of(encoder, name)[0]), *notes))


def _arguments(dataset: Dataset[Any], name: str) -> Iterator[str]:
    """What the dataset's arguments say of a stage."""
    size, dropped = dataset.batch_size, dataset.batch_drop_last
    grouped = method_of(dataset.task_encoder, "batch_group_criterion") is not None
    if name == "select_samples_to_pack":
        yield f"from buffers of {dataset.packing_buffer_size}"
    if name == "batch" and size is not None:
        yield counted(size, "sample") + (" unless the criterion says" if grouped else "")
    if name == "batch" and not dataset.repeats:
        yield "short ones dropped" if dropped else "the last may be short"


def _told(fn: Callable[..., Any], seeded: bool) -> Iterator[str]:
    """What is said of a user's function."""
    yield "seeded" if seeded else "stateless"
    if isgeneratorfunction(fn):
        yield "generator"


def _options(decoder: SampleDecoder) -> Iterator[str]:
    """How images come out, and what else is not the default."""
    yield decoder.image_decode or "no: parts stay bytes"
    for option in fields(decoder):
        value = getattr(decoder, option.name)
        if option.name != "image_decode" and value != option.default:
            yield f"{option.name} {value}"


def name_of(fn: Any) -> str:
    """The name of a function, or of another thing that is called.

    >>> name_of(name_of), name_of(partial(name_of, 1)), name_of(SampleDecoder("pil"))
    ('name_of', 'name_of', 'SampleDecoder')
    """
    while isinstance(fn, partial):
        fn = fn.func
    if isinstance(fn, Packer):
        return "best_fit" if fn.best else "knapsack"
    name = getattr(fn, "__qualname__", None) or type(fn).__qualname__
    return str(name).rpartition("<locals>.")[2]


# ---------------------------------------------------------------------------------------- running


def _running(dataset: Dataset[Any], made: str) -> Iterator[Row]:
    """made: the name of what comes out."""
    config = dataset.worker_config
    lanes = [f"{config.lane_count:,}"]
    if config.world_size > 1:
        own = config.rank_lanes
        shown = ", ".join(map(str, own[:4])) + (", ..." if len(own) > 4 else "")
        lanes.append(f"of which this rank has {len(own)}: {shown}")
    yield Row("lanes", "", tuple(lanes))
    if config.world_size > 1:
        yield Row("rank", "", (f"{config.rank} of {config.world_size:,}",))
    count = config.num_workers
    workers = [f"{count} processes" if count > 1 else "1 process" if count else "none: all is here"]
    if dataset.threads:
        each = " each" if count > 1 else ""
        workers.append(counted(dataset.threads, "thread") + each)
    yield Row("workers", "", tuple(workers))
    yield Row("length", "", tuple(_length(dataset, made)))


def _length(dataset: Dataset[Any], made: str) -> Iterator[str]:
    rank = " on each rank" if dataset.worker_config.world_size > 1 else ""
    try:
        count = len(dataset)
    except TypeError:
        if dataset.length is None and dataset.repeats:
            yield f"no end: {made} for ever"
        else:
            yield "not known before: functions may give none or many"
        return
    yield f"{count:,} {made} an iteration{rank}"
    if dataset.virtual:
        yield "the next goes on"
    elif dataset.length != count:
        yield "if no function skips samples"
