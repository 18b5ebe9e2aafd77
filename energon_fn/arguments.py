"""What :func:`~energon_fn.get_train_dataset` and its kind take: for type checkers, and by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from difflib import get_close_matches
from inspect import signature
from typing import Any, Protocol, TypedDict, TypeVar

from energon_fn.caching import CachePool
from energon_fn.lanes import WorkerConfig
from energon_fn.pipeline import Decoder

T_co = TypeVar("T_co", covariant=True)


class EncodesBatch(Protocol[T_co]):
    """What tells the type of batches. :class:`~energon_fn.DefaultTaskEncoder` is of this type."""

    def encode_batch(self, batch_data: Any, /) -> T_co | Iterator[T_co]: ...


class EncodesSample(Protocol[T_co]):
    """What tells the type of samples where they are not batched."""

    def encode_sample(self, sample: Any, /) -> T_co | Iterator[T_co]: ...


class Common(TypedDict, total=False):
    """What training and validation have in common; see :func:`get_dataset`."""

    split_part: str
    batch_drop_last: bool
    packing_buffer_size: int | None
    worker_config: WorkerConfig | None
    image_decode: str
    min_size: int | tuple[int, int] | None
    auto_decode: bool
    decoder: Decoder | None
    dataset_config: str
    split_config: str
    trust_dataset_code: bool


class Train(Common, total=False):
    """What is for training besides."""

    shuffle_buffer_size: int | None
    max_samples_per_sequence: int | None
    virtual_epoch_length: int
    shuffle_over_epochs_multiplier: int | None
    repeat: bool


class Val(Common, total=False):
    """What is for validation besides."""

    limit: int | None


class Every(Train, Val, total=False):
    """What :func:`get_dataset` has."""

    shuffle: bool


class LoaderOptions(TypedDict, total=False):
    """What :func:`~energon_fn.get_loader` has, by its published name too."""

    worker_config: WorkerConfig | None
    prefetch_factor: int
    max_worker_restarts: int
    multiprocessing_context: str | None
    watchdog_timeout_seconds: float | None
    fail_on_timeout: bool
    cache_pool: CachePool | None
    threads: int | None


def check_names(function: Callable[..., Any], given: Iterable[str], also: Iterable[str]) -> None:
    """Raise TypeError for a name that is no argument of ``function``.

    also: names that it takes besides those of its signature.

    >>> def loader(dataset, *, threads=0, **unknown):
    ...     check_names(loader, unknown, also=())
    >>> loader("a", thread=2)
    Traceback (most recent call last):
        ...
    TypeError: loader() has no argument 'thread'; did you mean threads?
    >>> loader("a", num_workers=2)
    Traceback (most recent call last):
        ...
    TypeError: loader() has no argument 'num_workers': give get_train_dataset ...
    """
    parameters = signature(function).parameters.values()
    named = [one.name for one in parameters if one.kind is not one.VAR_KEYWORD]
    known = {*named, *also}
    for name in set(given) - known:
        near = get_close_matches(name, known, 1)
        hint = f"; did you mean {near[0]}?" if near else f"; it has {', '.join(sorted(known))}"
        if "worker" in name:
            hint = (
                ": give get_train_dataset and its kind "
                "worker_config=WorkerConfig(rank=0, world_size=1, num_workers=2), say"
            )
        raise TypeError(f"{function.__name__}() has no argument {name!r}{hint}")
