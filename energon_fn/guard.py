"""User functions as the pipelines call them: seeded, with failures handled and counted.

The stages themselves know one exception, :class:`SkipSample`. :func:`guarded` wraps a user's
function so that every other failure is reported and becomes a skip.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from itertools import count
from time import perf_counter_ns
from traceback import extract_tb
from types import GeneratorType
from typing import Any, TypeVar

from energon_fn import position, seeds
from energon_fn.errors import (
    PROGRAMMING_ERRORS,
    DatasetError,
    ErrorHandler,
    FatalSampleError,
    SkipSample,
    log_exception,
)
from energon_fn.meters import Meter
from energon_fn.samples import SourceInfo

T = TypeVar("T")
U = TypeVar("U")


SELECTS = "select_samples_to_pack"
"""The function that gives several groups of samples."""
MAY_BE_NONE = (SELECTS, "batch_group_criterion")
"""Functions whose results are no samples; who calls them checks them."""
OF_LISTS = (SELECTS, "pack_selected_samples", "batch")
"""Functions of several samples."""


def guarded(
    fn: Callable[[T], U],
    stage: str,
    *,
    seed: int | None = None,
    handler: ErrorHandler = log_exception,
    tolerance: int = 100,
) -> Callable[[T], U | Iterator[U]]:
    """``fn`` for one item, or a list of items, whose failure costs only these items.

    stage: the name in messages. seed: seed the global random generators for each call (None: leave
    them alone). handler: gets ``(exception, item, sources)``; returning drops the item.
    tolerance: after so many failures in a row :class:`FatalSampleError` is raised.

    Errors that no other item would cure (``ImportError``, ``NameError``, ..., a missing shard) are
    raised at once. If ``fn`` is a generator function, its outputs up to the failure are kept.

    >>> reciprocal = guarded(lambda x: 1 / x, "encode_sample", handler=lambda *error: None)
    >>> reciprocal(4)
    0.25
    >>> try:
    ...     reciprocal(0)
    ... except SkipSample:
    ...     print("skipped")
    skipped
    """
    failures, here = 0, position.here
    meter = here.meters[stage]
    if stage in OF_LISTS:
        fn = _counting(fn, meter, stage == SELECTS)

    def fail(error: Exception, item: T) -> None:
        nonlocal failures
        note = f"in {stage} of {describe(item)}"
        error.add_note(note)
        here.failure = f"{type(error).__name__}: {error} {note}"
        if isinstance(error, (*PROGRAMMING_ERRORS, DatasetError, FatalSampleError)):
            raise error
        meter.failed += 1
        handler(error, item, sources_of(item))
        failures += 1
        if failures >= tolerance:
            raise FatalSampleError(
                f"{stage} failed {failures} times in a row, the last time with "
                f"{type(error).__name__}: {error} (in {describe(item)}{_place(error)}). Mend the "
                "function or the data; failure_tolerance sets how many failures in a row are "
                "accepted."
            ) from error

    def call(item: T) -> U | Iterator[U]:
        nonlocal failures
        here.stage, here.item = stage, item  # position.doing, written out: for every sample
        calls = meter.calls = meter.calls + 1
        start = perf_counter_ns() if calls >= meter.due else 0
        if seed is not None:
            seeds.reseed(seed, stage)
        try:
            result = fn(item)
        except SkipSample:
            if start:
                meter.took(perf_counter_ns() - start + here.elsewhere)
            meter.skipped += 1
            meter.lost += 1
            raise
        except Exception as error:
            meter.lost += 1
            failed = perf_counter_ns()
            if start:
                meter.took(failed - start + here.elsewhere)
            try:
                fail(error, item)
            finally:  # what is done about it is part of the stage's work
                meter.ns += perf_counter_ns() - failed
            raise SkipSample from None
        if isinstance(result, GeneratorType):
            meter.lost += 1
            return outputs(result, item)
        if start:
            meter.took(perf_counter_ns() - start + here.elsewhere)
        if result is None and stage not in MAY_BE_NONE:
            meter.lost += 1
            nothing = TypeError(f"{stage} returned None: return the result, or raise SkipSample")
            fail(nothing, item)
            raise SkipSample
        failures = 0
        return result

    def outputs(results: Iterator[U], item: T) -> Iterator[U]:
        # Others run between two outputs: put position and seeds back before each.
        nonlocal failures
        where, spent = position.here.where, 0
        try:
            for n in count():
                position.at((where, n))
                position.doing(stage, item)
                start = perf_counter_ns()
                if seed is not None:
                    seeds.reseed(seed, stage)
                try:
                    result = next(results)
                except StopIteration:
                    failures = 0
                    return
                except SkipSample:
                    meter.skipped += 1
                    raise
                except Exception as error:
                    fail(error, item)
                    return
                finally:
                    spent += perf_counter_ns() - start
                meter.made += 1
                yield result
        finally:
            meter.took(spent)

    return call


def _counting(fn: Callable[[T], U], meter: Meter, gives_several: bool) -> Callable[[T], U]:
    """``fn`` of lists: their items are counted, and those of the list that it gives."""

    def call(items: T) -> U:
        meter.items += len(members(items))
        result = fn(items)
        if gives_several and isinstance(result, list | tuple):
            meter.lost += 1
            meter.made += len(result)
        return result

    return call


def _place(error: Exception) -> str:
    """Where it was raised, if that was in code of the user's."""
    frames = extract_tb(error.__traceback__)
    if not frames or os.path.dirname(__file__) in frames[-1].filename:
        return ""
    return f", at {frames[-1].filename}:{frames[-1].lineno}"


def members(item: Any) -> list[Any]:
    return item if isinstance(item, list) else [item]


def bookkeeping(sample: Any, name: str) -> Any:
    """A sample's ``__key__`` and the like, whether it is a dict or an object; else None."""
    return sample.get(name) if isinstance(sample, dict) else getattr(sample, name, None)


def sources_of(item: Any) -> tuple[Any, ...] | None:
    """Where a sample, or the samples of a list, came from."""
    found = [bookkeeping(sample, "__sources__") or () for sample in members(item)]
    return tuple(source for sources in found for source in sources) or None


def describe(item: Any) -> str:
    """Keys and shards of a sample or a list of samples, for messages.

    >>> describe([{"__key__": "0001"}, {"__key__": "0002"}])
    'samples 0001, 0002'
    """
    found = [
        bookkeeping(sample, "__key__") or bookkeeping(sample, "__keys__") or "(no key)"
        for sample in members(item)
    ]
    keys = [key for one in found for key in members(one)]
    shards = dict.fromkeys(
        os.path.join(source.dataset_path.removesuffix(f"/{source.shard_name}"), source.shard_name)
        for source in sources_of(item) or ()
        if isinstance(source, SourceInfo)  # or whatever a user's batch has there
    )
    shown = ", ".join(str(key) for key in keys[:8]) + (", ..." if len(keys) > 8 else "")
    plural = "s" if len(keys) > 1 else ""
    return f"sample{plural} {shown}" + (f" from {', '.join(shards)}" if shards else "")
