"""The law of streams, at every k, over random pipelines."""

from collections.abc import Iterator
from functools import partial
from itertools import islice
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from toolz import pipe

from energon_fn import FatalSampleError, SkipSample, StateError, position
from energon_fn.stages import PackedSamplesOutput, batch, encode_sample, group, pack
from energon_fn.streams import Stream, ahead, holding, resumable


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


def thirds_back(buffer: list[Any]) -> Any:
    """Every third is given back, depending on what it is; but never the first."""
    chosen = [item for n, item in enumerate(buffer) if not n or sum(item) % 3]
    back = [item for n, item in enumerate(buffer) if n and not sum(item) % 3]
    return PackedSamplesOutput(packs=[chosen[:2], chosen[2:]], pushback=back[::-1])


def waiting_for(size: int, buffer: list[Any]) -> Any:
    """Groups of ``size`` of one parity; what is over waits, but not in a buffer of its own kind."""
    kinds = [[item for item in buffer if sum(item) % 2 == parity] for parity in (0, 1)]
    groups = [kind[n : n + size] for kind in kinds for n in range(0, len(kind) - size + 1, size)]
    taken = [id(item) for group in groups for item in group]
    back = [item for item in buffer if id(item) not in taken]
    if not groups and len(buffer) > size:
        groups, back = [back[:1]], back[1:]
    return PackedSamplesOutput(groups, back)


def packing(up: Stream[Any], select: Any, size: int) -> Stream[Any]:
    def stage(items: Any, held: Any) -> Any:
        return pack(select, flat, buffer_size=size, held=held)(items)

    return resumable(stage, up, gives_back=True)


lifts = st.lists(
    st.one_of(
        st.just(lambda up: resumable(encode_sample(add_one), up)),
        st.integers(1, 3).map(
            lambda n: lambda up: resumable(encode_sample(partial(skip_or_multiply, n)), up)
        ),
        st.integers(1, 7).map(
            lambda n: lambda up: resumable(pack(halves, flat, buffer_size=n), up)
        ),
        st.integers(1, 7).map(lambda n: lambda up: packing(up, thirds_back, n)),
        st.integers(1, 5).map(lambda n: lambda up: packing(up, partial(waiting_for, n), n + 2)),
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


def noted(pulled: list[int], state: Any) -> Iterator[tuple[list[int], int]]:
    """A hundred numbers, with a note of each that is pulled."""
    for item, after in numbers(100, state):
        pulled.append(item[0])
        yield item, after


def test_a_stream_pulls_no_further_than_its_output_needs() -> None:
    pulled: list[int] = []
    counted = partial(noted, pulled)
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


# --- samples that are given back -------------------------------------------------------------


def plain_packs(select: Any, size: int, stop: int) -> list[Any]:
    return list(pack(select, flat, buffer_size=size)([n] for n in range(stop)))


@given(st.integers(0, 60), st.integers(3, 9), st.integers(1, 2))
def test_a_lifted_stage_that_gives_back_gives_what_the_stage_gives(
    stop: int, size: int, group: int
) -> None:
    for select in (thirds_back, partial(waiting_for, group), halves):
        found = list(packing(partial(numbers, stop), select, size)(None))
        assert [value for value, _ in found] == plain_packs(select, size, stop)


def test_nothing_changes_where_nothing_is_given_back() -> None:
    upstream = partial(numbers, 40)
    expected = list(resumable(pack(halves, flat, buffer_size=7), upstream)(None))
    assert list(packing(upstream, halves, 7)(None)) == expected
    assert {len(state) for _, state in expected} == {3}


def test_the_state_has_where_the_held_items_came_from_and_no_more() -> None:
    stream = packing(partial(numbers, 9), thirds_back, 4)
    whole = list(stream(None))
    assert [value for value, _ in whole] == [[0, 1], [2], [3, 4], [5], [6, 7], [8]]
    # 3 was given back when the second buffer, 3 to 6, was filled; 6 when the last one was.
    assert [state for _, state in whole] == [
        (None, 1, None),
        (None, 2, None),
        (4, 1, None, (3,)),
        (4, 2, None, (3,)),
        (7, 1, None, (6,)),
        (7, 2, None, (6,)),
    ]


def test_an_item_that_cannot_be_made_again_is_told() -> None:
    whole = list(packing(partial(numbers, 9), thirds_back, 4)(None))
    with pytest.raises(StateError, match="of a held sample, got no more"):
        next(packing(partial(numbers, 3), thirds_back, 4)(whole[2][1]))


def test_functions_are_called_in_places_of_their_own_that_a_resume_keeps() -> None:
    """Their random numbers depend on that; also where only held items are left."""

    def singly(buffer: list[Any]) -> Any:
        return PackedSamplesOutput([buffer[:1], buffer[1:2]], buffer[2:])

    def placed(group: list[Any]) -> list[Any]:
        return [*flat(group), repr(position.here.where)]

    def stage(items: Any, held: Any) -> Any:
        return pack(singly, placed, buffer_size=6, held=held)(items)

    for stop in range(20):
        stream = resumable(stage, partial(numbers, stop), gives_back=True)
        whole = list(stream(None))
        assert [value[0] for value, _ in whole] == list(range(stop))
        assert len({value[1] for value, _ in whole}) == stop
        for k, (_, state) in enumerate(whole, 1):
            position.at("elsewhere")
            assert list(stream(state)) == whole[k:]


def test_laziness_with_items_given_back() -> None:
    pulled: list[int] = []
    stream = packing(partial(noted, pulled), thirds_back, 4)
    assert [value for value, _ in islice(stream(None), 3)] == [[0, 1], [2], [3, 4]]
    assert pulled == [0, 1, 2, 3, 4, 5, 6]
    pulled.clear()
    assert next(stream((4, 1, None, (3,))))[0] == [5]
    assert pulled == [3, 4, 5, 6]


# --- what is begun ahead ---------------------------------------------------------------------


@given(st.integers(0, 40), st.integers(1, 9), lifts)
def test_beginning_ahead_changes_neither_items_nor_states(
    stop: int, depth: int, lifts: list[Any]
) -> None:
    def begun(state: Any) -> Iterator[Any]:
        return ahead(lambda item: [*item], partial(numbers, stop), depth=depth)(state)

    plain: Stream[Any] = pipe(partial(numbers, stop), *lifts)
    stream: Stream[Any] = pipe(begun, *lifts)
    whole = list(plain(None))
    assert list(stream(None)) == whole
    for k, (_, state) in enumerate(whole, 1):
        assert list(stream(state)) == whole[k:]


def test_the_way_ahead_grows_by_one_with_each_item_and_anew_after_a_resume() -> None:
    begun: list[int] = []
    stream = ahead(lambda item: begun.append(item[0]), partial(numbers, 100), depth=3)
    for state in (None, 40, 70):
        begun.clear()
        items = stream(state)
        counts = [len(begun) for _ in islice(items, 6)]
        assert counts == [1, 3, 5, 7, 8, 9]  # at first one for one, never more than 3 ahead
        assert begun == list(range(state or 0, (state or 0) + 9))


def test_what_was_begun_and_is_not_asked_for_is_left() -> None:
    left: list[int] = []
    stream = ahead(lambda item: item[0], partial(numbers, 100), depth=3, leave=left.append)
    items = stream(None)
    assert [item for item, _ in islice(items, 5)] == [0, 1, 2, 3, 4]
    assert not left
    items.close()  # type: ignore[attr-defined]
    assert left == [5, 6, 7]
    assert [item for item, _ in stream(97)] == [97, 98, 99]
    assert left == [5, 6, 7]  # all of these were asked for
