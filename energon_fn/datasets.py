"""From a path, a task encoder and arguments to a dataset, with all that is wrong with them said."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from difflib import get_close_matches
from fractions import Fraction
from functools import partial
from inspect import signature
from itertools import accumulate
from typing import Any, TypeVar, Unpack, cast, overload

from energon_fn.arguments import Common, EncodesBatch, EncodesSample, Every, Train, Val, check_names
from energon_fn.decoding import decoder as make_decoder
from energon_fn.disk.source import Samples
from energon_fn.errors import DatasetError, logger
from energon_fn.lanes import WorkerConfig, default_worker_config, in_notebook, whole
from energon_fn.order.mixing import Blend, Order, Rounds, leaves
from energon_fn.order.plan import Plan
from energon_fn.pipeline import Dataset, Decoder, arguments_of
from energon_fn.recipes.compose import Recipe
from energon_fn.recipes.opening import Mixed, Opened, Tree, open_recipe
from energon_fn.stages import Cooker
from energon_fn.task_encoder import METHODS, DefaultTaskEncoder, method_of

T = TypeVar("T")

BUILDERS = (
    "build_batch",
    "build_cook_crude_sample",
    "build_encode_sample",
    "build_train_datasets",
    "build_val_datasets",
)
"""Methods of megatron-energon's task encoders that have no counterpart."""
DEFAULT_DECODER: Any = object()  # the task encoder's, or by image_decode; None means none


@overload
def get_train_dataset(
    path: Recipe, *, batch_size: int, task_encoder: EncodesBatch[T], **options: Unpack[Train]
) -> Dataset[T]: ...
@overload
def get_train_dataset(
    path: Recipe, *, batch_size: None, task_encoder: EncodesSample[T], **options: Unpack[Train]
) -> Dataset[T]: ...
@overload
def get_train_dataset(
    path: Recipe, *, batch_size: int | None, task_encoder: object = None, **options: Unpack[Train]
) -> Dataset[Any]: ...
def get_train_dataset(
    path: Recipe,
    *,
    batch_size: int | None,
    shuffle_buffer_size: int | None = None,
    max_samples_per_sequence: int | None = None,
    virtual_epoch_length: int = 0,
    shuffle_over_epochs_multiplier: int | None = 1,
    repeat: bool = True,
    split_part: str = "train",
    task_encoder: Any = None,
    **options: Any,
) -> Dataset[Any]:
    """The dataset for training: shuffled, and without an end unless ``repeat=False``.

    path: a prepared folder; a folder, a file, or a brace or glob pattern of tars; a file of JSON
    lines; a metadataset (YAML); or a recipe made of them, see :mod:`energon_fn.recipes.compose`.
    batch_size: samples of a batch; None: no batching (``batch``, ``encode_batch`` are not called).
    shuffle_buffer_size: mix over so many neighbouring samples; None: only sequences are shuffled.
    max_samples_per_sequence: cut shards to sequences of so many samples; None: whole shards.
    virtual_epoch_length: batches of one iteration on each rank; 0: no end, or the dataset's.
    shuffle_over_epochs_multiplier: shuffle the sequences of so many rounds through the dataset
    together; None: leave them in their order (the buffer shuffles all the same).
    The other options are those of :func:`get_dataset`.
    """
    check_names(get_train_dataset, options, also=Common.__annotations__)
    return get_dataset(
        path,
        split_part=split_part,
        batch_size=batch_size,
        shuffle=True,
        shuffle_buffer_size=shuffle_buffer_size,
        max_samples_per_sequence=max_samples_per_sequence,
        shuffle_over_epochs_multiplier=shuffle_over_epochs_multiplier,
        repeat=repeat,
        virtual_epoch_length=virtual_epoch_length,
        task_encoder=task_encoder,
        **options,
    )


@overload
def get_val_dataset(
    path: Recipe, *, batch_size: int, task_encoder: EncodesBatch[T], **options: Unpack[Val]
) -> Dataset[T]: ...
@overload
def get_val_dataset(
    path: Recipe, *, batch_size: None, task_encoder: EncodesSample[T], **options: Unpack[Val]
) -> Dataset[T]: ...
@overload
def get_val_dataset(
    path: Recipe, *, batch_size: int | None, task_encoder: object = None, **options: Unpack[Val]
) -> Dataset[Any]: ...
def get_val_dataset(
    path: Recipe,
    *,
    batch_size: int | None,
    limit: int | None = None,
    split_part: str = "val",
    task_encoder: Any = None,
    **options: Any,
) -> Dataset[Any]:
    """The dataset for validation: in the dataset's order, every sample once.

    limit: batches of one iteration on each rank at most; None: all.
    The other options are those of :func:`get_dataset`.
    """
    check_names(get_val_dataset, options, also=Common.__annotations__)
    return get_dataset(
        path,
        split_part=split_part,
        batch_size=batch_size,
        limit=limit,
        task_encoder=task_encoder,
        **options,
    )


@overload
def get_val_datasets(
    path: Recipe, *, batch_size: int, task_encoder: EncodesBatch[T], **options: Unpack[Val]
) -> list[tuple[Dataset[T], Samples]]: ...
@overload
def get_val_datasets(
    path: Recipe, *, batch_size: None, task_encoder: EncodesSample[T], **options: Unpack[Val]
) -> list[tuple[Dataset[T], Samples]]: ...
@overload
def get_val_datasets(
    path: Recipe, *, batch_size: int | None, task_encoder: object = None, **options: Unpack[Val]
) -> list[tuple[Dataset[Any], Samples]]: ...
def get_val_datasets(path: Recipe, **options: Any) -> list[tuple[Dataset[Any], Samples]]:
    """:func:`get_val_dataset` for each of the datasets at ``path``, with the source it reads."""
    also = (*signature(get_val_dataset).parameters, *Common.__annotations__)
    check_names(get_val_datasets, options, also)
    whole = get_val_dataset(path, **options)
    order = cast(Plan, whole.order)  # one after the other, so it is a single plan
    return [
        (
            replace(whole, sources=(source,), aux=(aux,), order=replace(order, runs=source.runs)),
            source,
        )
        for source, aux in zip(whole.sources, whole.aux, strict=True)
    ]


@overload
def get_dataset(
    path: Recipe, *, batch_size: int, task_encoder: EncodesBatch[T], **options: Unpack[Every]
) -> Dataset[T]: ...
@overload
def get_dataset(
    path: Recipe, *, batch_size: None, task_encoder: EncodesSample[T], **options: Unpack[Every]
) -> Dataset[T]: ...
@overload
def get_dataset(
    path: Recipe, *, batch_size: int | None, task_encoder: object = None, **options: Unpack[Every]
) -> Dataset[Any]: ...
def get_dataset(
    path: Recipe,
    *,
    batch_size: int | None,
    split_part: str = "train",
    shuffle: bool = False,
    shuffle_buffer_size: int | None = None,
    max_samples_per_sequence: int | None = None,
    shuffle_over_epochs_multiplier: int | None = 1,
    repeat: bool = False,
    virtual_epoch_length: int = 0,
    limit: int | None = None,
    batch_drop_last: bool = False,
    packing_buffer_size: int | None = None,
    task_encoder: Any = None,
    worker_config: WorkerConfig | None = None,
    image_decode: str = "torchrgb",
    min_size: int | tuple[int, int] | None = None,
    auto_decode: bool = True,
    decoder: Decoder | None = DEFAULT_DECODER,
    dataset_config: str = "dataset.yaml",
    split_config: str = "split.yaml",
    trust_dataset_code: bool = False,
) -> Dataset[Any]:
    """The dataset at ``path`` through ``task_encoder``; see the two functions above for the rest.

    batch_drop_last: drop the short batches at the end instead of delivering them.
    packing_buffer_size: samples that ``select_samples_to_pack`` selects from; None: no packing.
    task_encoder: None: the defaults of :class:`~energon_fn.DefaultTaskEncoder`.
    worker_config: None: :meth:`WorkerConfig.default_worker_config`; in a notebook the same four
    lanes without processes of their own.
    min_size: what JPEGs are scaled to while they are decoded, if they are larger by half, see
    :class:`~energon_fn.SampleDecoder`.
    image_decode: how images come out, one of webdataset's names; ``auto_decode=False`` or
    ``decoder=None`` give all parts as bytes; another decoder, also one that the task encoder has,
    is called with raw samples instead.
    dataset_config, split_config: the files in ``.nv-meta``.
    trust_dataset_code: run the code that the dataset's configuration names.

    Raises :class:`~energon_fn.DatasetError` for what is wrong with the dataset and ``ValueError``
    or ``TypeError`` for what is wrong with the arguments.
    """

    def size(name: str, given: int | None) -> int | None:
        return given if given is None else whole(name, given, 1, ", or None to switch it off")

    batch_size = size("batch_size", batch_size)
    shuffle_buffer_size = size("shuffle_buffer_size", shuffle_buffer_size)
    shuffle_over_epochs_multiplier = size(
        "shuffle_over_epochs_multiplier", shuffle_over_epochs_multiplier
    )
    max_samples_per_sequence = size("max_samples_per_sequence", max_samples_per_sequence)
    packing_buffer_size = size("packing_buffer_size", packing_buffer_size)
    limit = size("limit", limit)
    virtual_epoch_length = whole(
        "virtual_epoch_length", virtual_epoch_length, 0, otherwise=", 0 to switch it off"
    )
    if virtual_epoch_length and limit is not None:
        raise ValueError(
            f"virtual_epoch_length is {virtual_epoch_length} and limit is {limit}: give one of "
            "them, both say how many batches an iteration has"
        )
    encoder = DefaultTaskEncoder[Any, Any, Any, Any]() if task_encoder is None else task_encoder
    check_task_encoder(encoder, packing_buffer_size)
    config = worker_config
    if config is None:  # in a notebook threads do the work of the same lanes
        notebook = in_notebook()
        config = default_worker_config(0, lanes=4) if notebook else default_worker_config()
    if not isinstance(config, WorkerConfig):
        raise TypeError(
            f"worker_config is {config!r}; give a WorkerConfig, default_worker_config(4) say"
        )
    opened = open_recipe(
        path,
        split_part,
        dataset_config=dataset_config,
        split_config=split_config,
        trust_dataset_code=trust_dataset_code,
    )
    names = ", ".join(dict.fromkeys(source.path for source in opened.sources))
    if not any(map(len, opened.sources)):
        if repeat:
            raise DatasetError(
                f"{names}: the split part {split_part!r} has no samples, so repeating it never "
                "gives one. Prepare the dataset with another split, or ask for another split_part."
            )
        logger.warning(f"{names}: the split part {split_part!r} has no samples")
    if decoder is DEFAULT_DECODER:
        own = getattr(encoder, "decoder", None)
        if own is not None and min_size is not None:
            raise ValueError(
                f"min_size is {min_size}, but {type(encoder).__name__} has a decoder: say it there"
            )
        made = own or make_decoder(image_decode, min_size=min_size)
        decoder = made if auto_decode else None
    if not (decoder is None or callable(decoder)):
        raise TypeError(
            f"decoder is {decoder!r}; it must be a function from a raw sample to a decoded one, or "
            "None for bytes. How images come out is said by image_decode."
        )
    plan = partial(
        Plan,
        lanes=config.lane_count,
        seed=config.seed_offset,
        shuffle=shuffle,
        sequence=max_samples_per_sequence,
        window=shuffle_buffer_size,
        block=packing_buffer_size or batch_size or 1,
        span=shuffle_over_epochs_multiplier,
    )
    dataset = Dataset(
        sources=opened.sources,
        aux=opened.aux,
        order=order_of(opened, plan, shuffle, repeat),
        task_encoder=encoder,
        worker_config=config,
        decoder=decoder,
        batch_size=batch_size,
        batch_drop_last=batch_drop_last,
        packing_buffer_size=packing_buffer_size,
        length=virtual_epoch_length or limit,
        virtual=bool(virtual_epoch_length),
    )
    check_cookers(dataset)
    return dataset


def order_of(opened: Opened, plan: Callable[..., Plan], shuffle: bool, repeat: bool) -> Order:
    """The order of what was opened: mixed as its tree says, or, not shuffled, one after the other.

    plan: makes the plan of a single dataset from its runs and the index of its first sample.
    Raises ValueError for one epoch of a blend by weights, :class:`~energon_fn.DatasetError` for a
    part of it that has no samples.
    """
    sources = opened.sources
    starts = [0, *accumulate(map(len, sources))]

    def chain(numbers: Sequence[int], repeat: bool) -> Plan:
        runs = (run for n in numbers for run in sources[n].runs)
        return plan(runs=tuple(runs), first=starts[numbers[0]], repeat=repeat)

    def rounds(tree: Tree, times: Fraction) -> list[tuple[Plan | Blend, Fraction]]:
        """What is in an epoch of the tree, each part with its repetitions."""
        match tree:
            case Mixed("blend"):
                return [(blend(tree), times)]
            case Mixed("blend_epochized", parts, amounts):
                pairs = zip(parts, amounts, strict=True)
                return [one for part, n in pairs for one in rounds(part, times * Fraction(str(n)))]
            case Mixed("concat", parts) if not is_chain(tree):
                return [one for part in parts for one in rounds(part, times)]
        inside = chain(numbers(tree), True)
        return [(inside, times)] if len(inside) else []

    def blend(tree: Mixed) -> Blend:
        parts = tuple(mixed(part, True) for part in tree.parts)
        for part, inside in zip(tree.parts, parts, strict=True):
            if not any(map(len, leaves(inside))):
                paths = ", ".join(sources[n].path for n in numbers(part))
                raise DatasetError(
                    f"a part of a blend has no samples to draw: {paths}. Leave it out, or ask for "
                    "another split_part or subset."
                )
        weights = tuple(w if callable(w) else Fraction(str(w)) for w in tree.amounts)
        return Blend(parts, weights, parts[0].lanes, parts[0].seed, tree.random)

    def mixed(tree: Tree, repeat: bool) -> Order:
        if is_chain(tree):
            return chain(numbers(tree), repeat)
        if isinstance(tree, Mixed) and tree.how == "blend":
            if not repeat:
                raise ValueError(
                    "repeat=False asks for one epoch, but a blend by weights has none: say with "
                    "blend_epochized how often an epoch has each dataset, or set "
                    "virtual_epoch_length"
                )
            return blend(tree)
        pairs = rounds(tree, Fraction(1))
        if not pairs:
            return chain(numbers(tree), repeat)
        parts, times = zip(*pairs, strict=True)
        return Rounds(parts, times, parts[0].lanes, parts[0].seed, repeat)

    return mixed(opened.tree, repeat) if shuffle else chain(range(len(sources)), repeat)


def is_chain(tree: Tree) -> bool:
    """Whether it is one dataset, or several that are one behind the other and shuffled as one."""
    return isinstance(tree, int) or (tree.how == "concat" and all(map(is_chain, tree.parts)))


def numbers(tree: Tree) -> list[int]:
    """The numbers of the sources in a tree; they follow each other."""
    return [n for part in tree.parts for n in numbers(part)] if isinstance(tree, Mixed) else [tree]


def check_cookers(dataset: Dataset[Any]) -> None:
    """Raise for what is no cooker, and for one that does not take the stores it will be given."""
    for cooker in getattr(dataset.task_encoder, "cookers", ()):
        if not isinstance(cooker, Cooker):
            raise TypeError(f"cookers has {cooker!r}; write Cooker(function)")
    for n, source in enumerate(dataset.sources):
        if not source.is_crude:
            continue
        sample = {"__subflavors__": source.subflavors}
        for cooker in getattr(dataset.task_encoder, "cookers", ()):
            if cooker.takes(sample):
                arguments_of(dataset, cooker, n)
                break


def check_task_encoder(encoder: Any, packing_buffer_size: int | None) -> None:
    """Raise for methods that are missing, or that exclude each other."""
    if isinstance(encoder, type):
        raise TypeError(
            f"task_encoder is the class {encoder.__name__}; give an object: {encoder.__name__}()"
        )
    name = type(encoder).__name__
    has = {method for method in METHODS if method_of(encoder, method) is not None}
    if "select_samples_to_pack" in has and "pack_selected_samples" not in has:
        raise TypeError(f"{name} has select_samples_to_pack but no pack_selected_samples: write it")
    if packing_buffer_size is not None and "select_samples_to_pack" not in has:
        raise TypeError(
            f"packing_buffer_size is {packing_buffer_size} but {name} has no "
            "select_samples_to_pack: write it and pack_selected_samples, or leave "
            "packing_buffer_size out"
        )
    if packing_buffer_size is None and "select_samples_to_pack" in has:
        logger.warning(
            f"{name} has select_samples_to_pack, but packing_buffer_size is not given: nothing is "
            "packed"
        )
    for own in {each for base in type(encoder).__mro__ for each in vars(base)} - {*METHODS}:
        if not own.startswith("_") and (near := get_close_matches(own, METHODS, 1, 0.9)):
            logger.warning(f"{name} has {own}, which is never called: did you mean {near[0]}?")
        elif own == "pin_memory":
            logger.warning(f"{name} has pin_memory, which is never called: write it on its Batch")
        elif own in BUILDERS:
            logger.warning(
                f"{name} has {own}, which is never called: the stages are fixed here. Recipes "
                "(blend, join, ...) say how datasets are put together, other methods what is done"
            )
    if "encode_sample" in has and has & {"preencode_sample", "postencode_sample"}:
        raise TypeError(
            f"{name} has encode_sample (or the encoded_sample_type that it is to give) and also "
            "preencode_sample or postencode_sample, which are its two halves: write either the one "
            "or the others"
        )
