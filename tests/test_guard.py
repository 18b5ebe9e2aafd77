"""A user's functions in a pipeline: a failure costs one item, and numbers depend on the place."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from toolz import compose_left

from energon_fn import position, seeds
from energon_fn.errors import (
    DatasetError,
    FatalSampleError,
    SkipSample,
    log_exception,
    reraise_exception,
)
from energon_fn.guard import describe, guarded, sources_of
from energon_fn.samples import SourceInfo, TextSample
from energon_fn.stages import batch, encode_sample, pack
from energon_fn.streams import Stream, resumable


class Handled(list[Any]):
    """A handler that keeps what it was given."""

    def __call__(self, error: Exception, item: Any, sources: Any) -> None:
        self.append((error, item, sources))


def source(shard: str, index: int = 0) -> SourceInfo:
    return SourceInfo("/data/pets", index, shard, (f"{index:04}.jpg",))


def text(key: str, shard: str = "a.tar") -> TextSample:
    return TextSample(__key__=key, __sources__=(source(shard),), text="a rose")


def act(what: str) -> str:
    if what == "fail":
        raise ValueError("bad pixel")
    if what == "skip":
        raise SkipSample
    return what


def act_and_count(what: str) -> Iterator[Any]:
    """The outputs of ``act``, one before and one after."""
    yield "before"
    yield act(what)
    yield "after"


# --- what is reported -------------------------------------------------------------------------


def test_the_handler_gets_error_item_and_sources() -> None:
    handled = Handled()
    error = ValueError("bad pixel")

    def fail(item: Any) -> Any:
        raise error

    call = guarded(fail, "batch", handler=handled)
    samples = [text("1", "a.tar"), text("2", "b.tar")]
    with pytest.raises(SkipSample):
        call(samples)
    with pytest.raises(SkipSample):
        call("no sample at all")
    (first, item, sources), (_, other, nothing) = handled
    assert first is error
    assert item is samples
    assert sources == (source("a.tar"), source("b.tar"))
    assert (other, nothing) == ("no sample at all", None)


@dataclass
class TextBatch:
    __key__: list[str]
    __sources__: tuple[SourceInfo, ...]


@dataclass
class OtherNamesBatch:
    __keys__: list[str]


@pytest.mark.parametrize(
    ("item", "shown"),
    [
        (text("0007"), "sample 0007 from /data/pets/a.tar"),
        ({"__key__": "0007", "__sources__": (source("b.tar"),)}, "0007 from /data/pets/b.tar"),
        ({"__key__": "0007"}, "sample 0007"),
        (SimpleNamespace(__key__="own"), "sample own"),
        ([text("1"), text("2")], "samples 1, 2 from /data/pets/a.tar"),
        ([text("1"), text("2", "b.tar")], "samples 1, 2 from /data/pets/a.tar, /data/pets/b.tar"),
        (TextBatch(["1", "2"], (source("c.tar"),)), "samples 1, 2 from /data/pets/c.tar"),
        (OtherNamesBatch(["1", "2"]), "samples 1, 2"),
        (torch.zeros(2), "sample (no key)"),
        ([text(str(n)) for n in range(20)], "samples 0, 1, 2, 3, 4, 5, 6, 7, ... from"),
    ],
)
def test_a_failure_notes_stage_keys_and_shards(item: Any, shown: str) -> None:
    handled = Handled()

    def fail(item: Any) -> Any:
        raise KeyError("width")

    with pytest.raises(SkipSample):
        guarded(fail, "encode_sample", handler=handled)(item)
    (note,) = handled[0][0].__notes__
    assert note.startswith("in encode_sample of sample")
    assert shown in note
    assert describe(item) in note


def test_sources_of_what_has_none() -> None:
    assert sources_of([]) is None
    assert sources_of({"__sources__": None}) is None
    assert sources_of([text("1"), {"__key__": "2"}]) == (source("a.tar"),)


def test_the_default_handler_logs_and_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    def fail_on_two(sample: TextSample) -> str:
        return act("fail" if sample.__key__ == "2" else sample.__key__)

    call = guarded(fail_on_two, "encode_sample")
    assert list(encode_sample(call)([text("1"), text("2"), text("3")])) == ["1", "3"]
    (record,) = caplog.records
    assert "in encode_sample of sample 2 from /data/pets/a.tar" in record.getMessage()


def test_what_the_handler_raises_ends_the_run() -> None:
    with pytest.raises(ValueError, match="bad pixel") as caught:
        list(encode_sample(guarded(act, "x", handler=reraise_exception))(["ok", "fail"]))
    assert caught.value.__notes__ == ["in x of sample (no key)"]

    class Stop(Exception):
        pass

    def stop(error: Exception, item: Any, sources: Any) -> None:
        raise Stop from error

    for function in (act, act_and_count):
        with pytest.raises(Stop):
            list(encode_sample(guarded(function, "x", handler=stop))(["fail"]))


# --- what is not an ordinary failure ----------------------------------------------------------


@pytest.mark.parametrize(
    "kind",
    [
        ImportError,
        MemoryError,
        ModuleNotFoundError,
        NameError,
        NotImplementedError,
        RecursionError,
        SyntaxError,
        SystemError,
        UnboundLocalError,
    ],
)
@pytest.mark.parametrize("generator", [False, True])
def test_programming_errors_are_raised_at_once(kind: type[Exception], generator: bool) -> None:
    check_raised_at_once(kind("no other sample cures it"), generator)


@pytest.mark.parametrize("kind", [DatasetError, FatalSampleError])
@pytest.mark.parametrize("generator", [False, True])
def test_errors_of_the_dataset_are_raised_at_once(kind: type[Exception], generator: bool) -> None:
    check_raised_at_once(kind("a.tar is not there"), generator)


def check_raised_at_once(error: Exception, generator: bool) -> None:
    def fail(item: Any) -> Any:
        raise error

    def fail_late(item: Any) -> Iterator[Any]:
        yield "first"
        raise error

    handled = Handled()
    found: list[Any] = []
    call = guarded(fail_late if generator else fail, "cook", handler=handled)
    with pytest.raises(type(error)) as caught:
        found.extend(encode_sample(call)([text("0007")]))
    assert found == (["first"] if generator else [])
    assert caught.value is error
    assert "in cook of sample 0007" in error.__notes__[0]
    assert handled == []


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_is_no_failure(kind: type[BaseException]) -> None:
    handled = Handled()

    def interrupt(item: Any) -> Any:
        raise kind

    with pytest.raises(kind):
        list(encode_sample(guarded(interrupt, "x", handler=handled))([1]))
    assert handled == []


# --- how many failures are too many -----------------------------------------------------------


@given(
    st.lists(st.sampled_from(["ok", "fail", "skip"]), max_size=40),
    st.integers(1, 6),
    st.booleans(),
)
@example(whats=["fail", "ok", "fail"], tolerance=2, generator=True)
@example(whats=["fail", "ok", "fail"], tolerance=2, generator=False)
@example(whats=["fail", "skip", "fail", "ok"], tolerance=2, generator=True)
def test_failures_in_a_row_are_counted(whats: list[str], tolerance: int, generator: bool) -> None:
    """A success begins a new count; a skip is neither a failure nor a success."""
    expected: list[str] = []
    failures = in_a_row = 0
    for what in whats:
        if generator:
            expected.append("before")
        if what == "ok":
            expected += ["ok", "after"] if generator else ["ok"]
            in_a_row = 0
        if what == "fail":
            failures, in_a_row = failures + 1, in_a_row + 1
            if in_a_row == tolerance:
                break

    handled, found = Handled(), []
    function = act_and_count if generator else act
    call = guarded(function, "encode_sample", handler=handled, tolerance=tolerance)
    too_many = in_a_row == tolerance
    with pytest.raises(FatalSampleError) if too_many else nullcontext() as caught:
        for output in encode_sample(call)(whats):
            found.append(output)
    if caught is not None:
        assert caught.value.__cause__ is handled[-1][0]
        for part in (f"encode_sample failed {tolerance} times in a row", "ValueError: bad pixel"):
            assert part in str(caught.value)
    assert found == expected
    assert len(handled) == failures


def test_each_function_counts_its_own_failures() -> None:
    handled = Handled()
    first, second = (guarded(act, name, handler=handled, tolerance=3) for name in ("one", "two"))
    for call in (first, second, first, second):
        with pytest.raises(SkipSample):
            call("fail")
    with pytest.raises(FatalSampleError, match="one failed 3 times"):
        first("fail")


def test_a_hundred_in_a_row_end_the_run_by_default() -> None:
    pulled = []

    def items() -> Iterator[Any]:
        for n in range(1000):
            pulled.append(n)
            yield text(str(n))

    def fail(item: Any) -> Any:
        raise ValueError("bad pixel")

    call = guarded(fail, "decode", handler=lambda *error: None)
    with pytest.raises(FatalSampleError, match=r"100 times.*sample 99 from /data/pets/a\.tar"):
        list(encode_sample(call)(items()))
    assert len(pulled) == 100


# --- seeding ------------------------------------------------------------------------------------


def drawn(item: Any) -> tuple[Any, ...]:
    return random.random(), np.random.randint(10**9), torch.randint(10**9, ()).item()


def drawn_thrice(item: Any) -> Iterator[Any]:
    for _ in range(3):
        yield drawn(item)


def run(
    function: Callable[[Any], Any],
    places: list[Any],
    seed: int | None = 0,
    stage: str = "encode_sample",
    between: Callable[[], Any] = lambda: None,
) -> list[Any]:
    def items() -> Iterator[Any]:
        for place in places:
            position.at(place)
            yield place

    outputs = []
    for output in encode_sample(guarded(function, stage, seed=seed))(items()):
        outputs.append(output)
        between()
    return outputs


def disturb() -> None:
    """What other lanes and stages do meanwhile."""
    position.at("elsewhere")
    seeds.reseed(7, "batch")
    drawn(None)


@pytest.fixture(autouse=True)
def _tidy() -> Iterator[None]:
    with seeds.untouched():
        yield
    position.at(None)


@pytest.mark.parametrize("function", [drawn, drawn_thrice])
def test_the_same_place_gives_the_same_numbers_whatever_runs_between(function: Any) -> None:
    places = [(0, 0), (0, 1), (1, 0)]
    first = run(function, places)
    assert run(function, places) == first
    assert run(function, places, between=disturb) == first
    each = len(first) // len(places)
    assert run(function, places[1:]) == first[each:]
    assert run(function, places[::-1])[-each:] == first[:each]


@pytest.mark.parametrize("function", [drawn, drawn_thrice])
def test_place_stage_and_seed_change_the_numbers(function: Any) -> None:
    runs = [
        run(function, [(0, 0), (0, 1), (1, 0)]),
        run(function, [(0, 0)], seed=1),
        run(function, [(0, 0)], stage="postencode_sample"),
    ]
    numbers = [number for outputs in runs for output in outputs for number in output]
    assert len(set(numbers)) == len(numbers)


def test_without_a_seed_the_generators_are_left_alone() -> None:
    random.seed(3)
    expected = [random.random() for _ in range(2)]
    random.seed(3)
    outputs = run(lambda item: random.random(), [(0, 0), (0, 0)], seed=None)
    assert outputs == expected


def test_a_function_that_fails_or_skips_changes_no_other_items_numbers() -> None:
    def sometimes(item: Any) -> Any:
        act({(0, 1): "fail", (0, 2): "skip"}.get(item, "ok"))
        return drawn(item)

    places = [(0, n) for n in range(5)]
    every = run(drawn, places)
    assert run(sometimes, places) == [every[0], every[3], every[4]]


# Streams: many functions, each random, in many runs and lanes.


def numbers(first: int, state: Any) -> Iterator[tuple[int, int]]:
    for n in range(state or first, first + 30):
        position.at(n)
        yield n, n + 1


def copies(item: Any) -> Iterator[Any]:
    for copy in range(len(str(item)) % 3 + 1):
        yield item, copy, random.randrange(10**6)


def single(item: Any) -> Any:
    if random.random() < 0.2:
        raise SkipSample
    return item, random.randrange(10**6)


def quarters(buffer: list[Any]) -> list[list[Any]]:
    random.shuffle(buffer)
    return [buffer[at::4] for at in range(4)]


def lane(first: int, lifts: list[tuple[str, int]]) -> Stream[Any]:
    def own(function: Callable[[Any], Any], name: str) -> Callable[[Any], Any]:
        return guarded(function, name, seed=0, handler=reraise_exception)

    def chain(kind: str, size: int) -> list[Any]:
        return {
            "single": [encode_sample(own(single, "single"))],
            "copies": [encode_sample(own(copies, "copies"))],
            "batch": [batch(size, own(single, "batch")), encode_sample(own(copies, "encode"))],
            "pack": [
                pack(
                    own(quarters, "select"),
                    own(single, "join"),
                    buffer_size=4 * size,
                    postencode=own(single, "postencode"),
                )
            ],
        }[kind]

    stream: Stream[Any] = partial(numbers, first)
    for kind, size in lifts:
        stream = resumable(compose_left(*chain(kind, size)), stream)
    return stream


chains = st.lists(
    st.tuples(st.sampled_from(["single", "copies", "batch", "pack"]), st.integers(1, 3)),
    min_size=1,
    max_size=3,
)


@given(chains, st.data())
def test_streams_go_on_with_the_same_random_numbers(lifts: Any, data: st.DataObject) -> None:
    stream = lane(0, lifts)
    whole = list(stream(None))
    if whole:
        k = data.draw(st.integers(1, len(whole)))
        disturb()
        assert list(stream(whole[k - 1][1])) == whole[k:]


@given(chains, chains)
def test_lanes_that_run_in_turn_do_not_disturb_each_other(lifts: Any, others: Any) -> None:
    alone = list(lane(0, lifts)(None))
    other = lane(500, others)(None)
    together = []
    for output in lane(0, lifts)(None):
        together.append(output)
        next(other, None)
    assert together == alone


def test_log_exception_is_the_default_handler(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(SkipSample):
        guarded(act, "x")("fail")
    by_default = [record.getMessage() for record in caplog.records]
    caplog.clear()
    with pytest.raises(SkipSample):
        guarded(act, "x", handler=log_exception)("fail")
    assert [record.getMessage() for record in caplog.records] == by_default
