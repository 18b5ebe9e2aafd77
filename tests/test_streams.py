"""The law of streams, at every k, over random pipelines."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from toolz import pipe

from energon_fn import FatalSampleError, SkipSample
from energon_fn.stages import batch, encode_sample, group, pack
from energon_fn.streams import Stream, holding, resumable


def numbers(stop: int, state: Any) -> Iterator[tuple[list[int], int]]:
    for n in range(state or 0, stop):
        yield [n], n + 1


def skip_or_multiply(most: int, item: list[int]) -> Iterator[list[int]]:
    copies = item[0] % (most + 1)
    if not copies:
        raise SkipSample
    for copy in range(copies):
        yield [*item, copy]


def add_one(item: list[int]) -> list[int]:
    if item[0] % 5 == 3:
        raise SkipSample
    return [n + 1 for n in item]


def halves(buffer: list[Any]) -> list[list[Any]]:
    return [buffer[1::2], buffer[::2]]


def flat(items: list[list[int]]) -> list[int]:
    return [n for item in items for n in item]


def modulo(n: int, item: list[int]) -> tuple[int, int]:
    return sum(item) % n, 1 + sum(item) % 3


lifts = st.lists(
    st.one_of(
        st.just(lambda up: resumable(encode_sample(add_one), up)),
        st.integers(1, 3).map(
            lambda n: lambda up: resumable(encode_sample(partial(skip_or_multiply, n)), up)
        ),
        st.integers(1, 7).map(
            lambda n: lambda up: resumable(pack(halves, flat, buffer_size=n), up)
        ),
        st.tuples(st.integers(1, 5), st.booleans()).map(
            lambda a: lambda up: resumable(batch(a[0], flat, drop_last=a[1]), up)
        ),
        st.integers(1, 5).map(
            lambda n: (
                lambda up: resumable(
                    lambda items: pipe(
                        items, batch(n, flat), encode_sample(partial(skip_or_multiply, 2))
                    ),
                    up,
                )
            )
        ),
        st.integers(1, 3).map(
            lambda n: (
                lambda up: resumable(encode_sample(flat), holding(group(partial(modulo, n)), up))
            )
        ),
    ),
    max_size=4,
)


@given(st.integers(0, 40), lifts)
def test_going_on_from_every_state_gives_the_rest(stop: int, lifts: list[Any]) -> None:
    stream: Stream[Any] = pipe(partial(numbers, stop), *lifts)
    whole = list(stream(None))
    for k, (_, state) in enumerate(whole, 1):
        assert list(stream(state)) == whole[k:]


@given(st.integers(0, 40), lifts)
def test_states_are_plain_data(stop: int, lifts: list[Any]) -> None:
    def plain(state: Any) -> bool:
        return isinstance(state, int | str | None) or (
            isinstance(state, tuple) and all(map(plain, state))
        )

    stream: Stream[Any] = pipe(partial(numbers, stop), *lifts)
    assert all(plain(state) for _, state in stream(None))


def test_a_lifted_stage_gives_what_the_stage_gives() -> None:
    stream = resumable(batch(3, flat), partial(numbers, 8))
    assert [value for value, _ in stream(None)] == [[0, 1, 2], [3, 4, 5], [6, 7]]


def test_a_stream_pulls_no_further_than_its_output_needs() -> None:
    pulled: list[int] = []

    def counted(state: Any) -> Iterator[tuple[list[int], int]]:
        for item, after in numbers(100, state):
            pulled.append(item[0])
            yield item, after

    stream = resumable(batch(3, flat), resumable(encode_sample(add_one), counted))(None)
    next(stream)
    assert pulled == [0, 1, 2]
    next(stream)
    assert pulled == [0, 1, 2, 3, 4, 5, 6]  # 3 is skipped


def test_nothing_ever_coming_out_is_an_error_not_a_hang() -> None:
    def never(item: list[int]) -> list[int]:
        raise SkipSample

    stream = resumable(encode_sample(never), partial(numbers, 10**9), patience=50)
    with pytest.raises(FatalSampleError, match="nothing came of 50 items"):
        next(stream(None))
