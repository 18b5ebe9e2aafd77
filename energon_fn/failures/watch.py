"""Watching a dataset's functions at work: what each gives, how long it takes, of what it fails."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from copy import copy, deepcopy
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import partial
from time import perf_counter
from types import GeneratorType
from typing import Any

from energon_fn import position
from energon_fn.errors import SkipSample
from energon_fn.guard import OF_LISTS, guarded
from energon_fn.pipeline import Dataset
from energon_fn.samples import CrudeSample
from energon_fn.stages import find_cooker
from energon_fn.task_encoder import method_of

NEVER = 2**62  # failures in a row that end the run


@dataclass(frozen=True, eq=False)
class Step:
    """What a function made of a sample, or why it did not."""

    stage: str
    """``"load"``, ``"decode"``, ``"sample"`` (made of the decoded parts), ``"cook"``,
    ``"encode_sample"``, ..."""
    function: str
    """Its name, and where it is."""
    values: tuple[Any, ...]
    """What it gave: one value, of a generator none to many. They are copies."""
    seconds: float
    error: Exception | None = None
    """Of what it failed."""
    skipped: bool = False
    """It raised :class:`~energon_fn.SkipSample`."""


@dataclass
class _Call:
    """A step that is being made."""

    stage: str
    function: str = ""
    members: list[Any] = field(default_factory=list)
    """What it is given, if it is of several samples."""
    values: list[Any] = field(default_factory=list)
    seconds: float = 0.0
    error: Exception | None = None
    skipped: bool = False

    @contextmanager
    def running(self) -> Iterator[None]:
        start = perf_counter()
        try:
            yield
        except SkipSample:
            self.skipped = True
            raise
        except Exception as error:
            self.error = error
            raise
        finally:
            self.seconds += perf_counter() - start


class Watch:
    """Guards the functions of a dataset as :func:`guarded` does, and keeps what they give.

    It stands for ``guarded`` in :func:`energon_fn.pipeline.lifts`, for a dataset without threads.
    Nothing is told to the dataset's error handler.

    only: the stages that are watched; None: all.
    """

    def __init__(self, dataset: Dataset[Any], only: Collection[str] | None = None):
        decode = dataset.decoder
        watched = decode if decode is None or only else partial(self._decode, decode)
        self.dataset = replace(dataset, decoder=watched)
        """The dataset to be run."""
        self.calls: list[_Call] = []
        self._only = only
        self._since = perf_counter()
        self._decoding = 0.0  # seconds of decoders, and of copying what they gave

    @property
    def steps(self) -> tuple[Step, ...]:
        return tuple(
            Step(call.stage, call.function, tuple(call.values), call.seconds, call.error,
                 call.skipped)
            for call in self.calls
        )  # fmt: skip

    def outside(self, error: Exception) -> None:
        """What ended the run, if it was none of the functions."""
        if not self._has(error):
            stage = position.here.stage
            stage = "cook" if stage == "decode" else stage  # where a cooker is looked for
            self.calls.append(_Call(stage, error=error))

    def _has(self, error: Exception) -> bool:
        return any(call.error is error for call in self.calls)

    def __call__(
        self, fn: Callable[[Any], Any], stage: str, *, seed: int | None, **_: Any
    ) -> Callable[[Any], Any]:
        def watched(item: Any) -> Any:
            if stage == "decode":
                return self._make(fn, item)
            call = _Call(stage, self._name(fn, stage, item))
            if stage in OF_LISTS:
                call.members = snapshot([*item])
            self.calls.append(call)
            with call.running():
                result = fn(item)
            if isinstance(result, GeneratorType):
                return self._outputs(call, result)
            call.values.append(snapshot(result))
            self._since = perf_counter()
            return result

        def failed(error: Exception, item: Any, sources: Any) -> None:
            if self.calls and not self._has(error):  # it gave None
                self.calls[-1].error = error

        called = watched if self._only is None or stage in self._only else fn
        return guarded(called, stage, seed=seed, handler=failed, tolerance=NEVER)

    def _outputs(self, call: _Call, results: Iterator[Any]) -> Iterator[Any]:
        end = object()
        while True:
            with call.running():
                result = next(results, end)
            if result is end:
                return
            call.values.append(snapshot(result))
            yield result

    def _make(self, make: Callable[[Any], Any], raw: dict[str, Any]) -> Any:
        """From raw parts to a sample: three steps, of which the decoder's is made by itself."""
        source = self.dataset.sources[self.dataset.place(raw["__restore_key__"][2])[0]]
        loaded = _Call("load", type(source).__name__, values=[snapshot(raw)])
        loaded.seconds = perf_counter() - self._since
        self.calls.append(loaded)
        sample_type = getattr(source, "sample_type", None)
        self._decoding = 0.0
        call = _Call("sample", sample_type.__name__ if sample_type else "")
        try:
            with call.running():
                sample = make(raw)
        except (Exception, SkipSample) as error:
            if self.calls[-1].error is not error:
                self.calls.append(call)
            raise
        call.seconds -= self._decoding
        if not isinstance(sample, CrudeSample):  # which is what the decoder gave
            call.function = call.function or type(sample).__name__
            call.values.append(snapshot(sample))
            self.calls.append(call)
        self._since = perf_counter()
        return sample

    def _decode(self, decode: Callable[[Any], Any], raw: dict[str, Any]) -> Any:
        if position.here.stage != "decode":  # a file that a cooker asked for
            return decode(raw)
        start = perf_counter()
        call = _Call("decode", _name(decode))
        self.calls.append(call)
        with call.running():
            decoded = decode(raw)
        call.values.append(snapshot(decoded))
        self._decoding += perf_counter() - start
        return decoded

    def _name(self, fn: Callable[..., Any], stage: str, item: Any) -> str:
        if stage == "cook":
            encoder = self.dataset.task_encoder
            method = method_of(encoder, "cook_crude_sample")
            fn = method or find_cooker(item, encoder.cookers).cook
        return _name(fn)


def _name(fn: Any) -> str:
    """The name of a function, and the file and line it is in.

    >>> _name(snapshot)
    'snapshot (watch.py:...)'
    """
    while isinstance(fn, partial):
        fn = fn.func
    name = getattr(fn, "__qualname__", type(fn).__name__).rpartition("<locals>.")[2]
    code = getattr(getattr(fn, "__func__", fn), "__code__", None)
    if code is None:
        return str(name)
    return f"{name} ({os.path.basename(code.co_filename)}:{code.co_firstlineno})"


def snapshot(value: Any) -> Any:
    """A copy that is not changed by what later functions do, as far as it can be copied."""
    try:
        return deepcopy(value)
    except Exception:  # there is something in it that is not to be copied: an open file, say
        pass
    if type(value) in (list, tuple):
        return type(value)(map(snapshot, value))
    copied: Any
    if isinstance(value, dict):
        copied = copy(value)
        copied.update((name, snapshot(one)) for name, one in value.items())
        return copied
    if not is_dataclass(value):
        return value
    copied = copy(value)
    for one in fields(value):
        if hasattr(value, one.name):
            object.__setattr__(copied, one.name, snapshot(getattr(value, one.name)))
    return copied
