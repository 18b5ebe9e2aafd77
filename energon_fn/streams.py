"""Streams: iterators that can go on from where they were.

A *stream* is a function ``state -> Iterator[(value, state_after)]``, the state being plain data and
``None`` the beginning. The law that holds everything together:

    for every k, ``stream(state_k)`` yields what ``stream(None)`` yields after its k-th item.

Two lifts turn stages, which know nothing of states, into streams: :func:`resumable` for stages that
empty themselves now and then, :func:`holding` for those that always keep something back. Both
stay lazy: what a stage pulls for an item is pulled for that item. :func:`ahead` has reads begin
earlier than that.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from energon_fn import position
from energon_fn.errors import FatalSampleError, StateError
from energon_fn.samples import key_of

T = TypeVar("T")
U = TypeVar("U")
State = Any
"""Plain data: ints, strings, None and tuples of them."""
Stream = Callable[[State], Iterator[tuple[T, State]]]
Stage = Callable[[Iterator[T]], Iterable[U]]


def resumable(
    stage: Callable[..., Iterable[U]],
    upstream: Stream[T],
    *,
    name: str = "a stage",
    patience: int | None = None,
    gives_back: bool = False,
) -> Stream[U]:
    """Lift a stage that holds nothing whenever it pulls after it has emitted.

    Per-item stages (map, filter, one to many), ``batch`` and ``pack`` are of this kind: they pull a
    run of items, emit what comes of them, and start anew. The state is ``(where the run began,
    how many of its outputs were delivered, the last one's key if it has one)``; going on replays
    that one run. Lift stages one by one: one to many and then ``batch``, say, piped together, are
    not of this kind, since ``batch`` then pulls while the other still holds something.

    gives_back: the stage is called as ``stage(items, held)`` and may leave items in the list
    ``held`` for its next run, as ``pack`` does with samples that are given back. While there are
    any, the state has a fourth part: the states in front of the items that were held when the run
    began, some 60 bytes each. Going on, each is made again from its own. Such items must be
    objects of their own, and left as they came.

    Raises :class:`~energon_fn.StateError` if the replay does not come to the same key, naming the
    stage ``name``, and :class:`~energon_fn.FatalSampleError` after ``patience`` items without an
    output.

    >>> def numbers(state):
    ...     for n in range(state or 0, 7):
    ...         yield n, n + 1
    >>> def pairs(items):
    ...     for first in items:
    ...         yield (first, next(items, None))
    >>> stream = resumable(pairs, numbers)
    >>> values, states = zip(*stream(None))
    >>> values
    ((0, 1), (2, 3), (4, 5), (6, None))
    >>> states[1]
    (2, 1, None)
    >>> [value for value, state in stream(states[1])]
    [(4, 5), (6, None)]
    """

    def stream(state: State = None) -> Iterator[tuple[U, State]]:
        run, drop, expected, *rest = state or (None, 0, None)
        before: tuple[State, ...] = rest[0] if rest else ()
        held = [_made_again(upstream, origin, name) for origin in before]
        origins = dict(zip(map(id, held), before, strict=True))
        last = place = run
        emitted, pulled = 0, 0
        items = upstream(run)
        here = position.here

        def pull() -> Iterator[T]:
            nonlocal run, before, origins, last, place, drop, emitted, pulled
            while True:
                if emitted < drop and (emitted or pulled == patience):
                    raise _diverged(name, expected, "no more")
                if emitted:  # a new run begins
                    run, drop, emitted, pulled = last, 0, 0, 0
                    if gives_back:
                        before = tuple(origins[id(item)] for item in held)
                        origins = dict(zip(map(id, held), before, strict=True))
                elif pulled == patience:
                    last_one = f" The last failure: {here.failure}." if here.failure else ""
                    raise FatalSampleError(
                        f"nothing came of {pulled} items in a row: all of them were skipped, or no "
                        f"batch could be filled.{last_one} See the log for failures, and the "
                        "functions that raise SkipSample."
                    )
                pulled += 1
                item = next(items, None)
                if item is None:
                    if before:  # a run of held items alone has a place of its own, too
                        place = last, len(before)
                        position.at(place)
                    return
                if gives_back:
                    origins[id(item[0])] = last
                last = place = item[1]
                here.where, here.calls = place, 0
                box = [item[0]]
                del item
                yield box.pop()

        for output in stage(pull(), held) if gives_back else stage(pull()):
            emitted += 1
            if emitted > drop:
                key, box = key_of(output), [output]
                del output  # who waits keeps nothing, see stages
                yield box.pop(), (run, emitted, key, before) if before else (run, emitted, key)
            elif emitted == drop and expected != key_of(output):
                raise _diverged(name, expected, key_of(output))
            # Others ran meanwhile, and there may be more of this run.
            here.where, here.calls = (place, emitted), 0
        if emitted < drop:
            raise _diverged(name, expected, "no more")

    return stream


def holding(
    stage: Stage[T, list[T]],
    upstream: Stream[T],
    *,
    name: str = "a stage",
    patience: int | None = None,
) -> Stream[list[T]]:
    """Lift a stage that sorts its items into lists and may keep some back for ever.

    The state is ``(upstream's state, the states in front of the items held)``: going on, each held
    item is made again from its own state and handed to the stage first, in the old order. Every
    item that comes in must be an object of its own and go out in one list.

    Raises as :func:`resumable` does; ``patience`` is how many items may be held.

    >>> def numbers(state):
    ...     for n in range(state or 0, 9):
    ...         yield [n], n + 1
    >>> def by_parity(items):
    ...     bins = [], []
    ...     for item in items:
    ...         bins[item[0] % 2].append(item)
    ...         if item[0] % 3 == 2:
    ...             yield bins[item[0] % 2][:]
    ...             bins[item[0] % 2].clear()
    >>> stream = holding(by_parity, numbers)
    >>> values, states = zip(*stream(None))
    >>> values
    ([[0], [2]], [[1], [3], [5]], [[4], [6], [8]])
    >>> states[1]
    (6, (4,))
    >>> [value for value, state in stream(states[1])]
    [[[4], [6], [8]]]
    """

    def stream(state: State = None) -> Iterator[tuple[list[T], State]]:
        last, before = state or (None, ())
        held: dict[int, State] = {}

        def pull() -> Iterator[T]:
            nonlocal last
            for origin in before:
                item = _made_again(upstream, origin, name)
                held[id(item)] = origin
                yield item
            for item, after in upstream(last):
                if len(held) == patience:
                    raise FatalSampleError(
                        f"{name} holds {patience} samples and none of its groups gets full: do its "
                        "keys compare as equal, and are there few enough of them?"
                    )
                held[id(item)], last = last, after
                position.at(after)
                yield item

        for output in stage(pull()):
            for item in output:
                del held[id(item)]
            box = [output]
            del output, item
            yield box.pop(), (last, tuple(held.values()))

    return stream


def ahead(
    begin: Callable[[T], U],
    upstream: Stream[T],
    *,
    depth: int,
    leave: Callable[[U], object] = lambda begun: None,
) -> Stream[U]:
    """Begin something for each item up to ``depth`` items before it is asked for: a read, say.

    What was begun comes out in the items' order, each with the state that its item has, so nothing
    of the reading ahead is seen in states. The way ahead grows with every item, so that asking for
    one item begins one. ``leave`` is called with what was begun and will not be asked for.

    >>> begun = []
    >>> def numbers(state):
    ...     return ((n, n + 1) for n in range(state or 0, 9))
    >>> stream = ahead(lambda n: begun.append(n) or f"<{n}>", numbers, depth=2)(None)
    >>> [next(stream) for _ in range(4)], begun
    ([('<0>', 1), ('<1>', 2), ('<2>', 3), ('<3>', 4)], [0, 1, 2, 3, 4, 5])
    """

    def stream(state: State = None) -> Iterator[tuple[U, State]]:
        begun: deque[tuple[U, State]] = deque()
        far = 0
        try:
            for item, after in upstream(state):
                begun.append((begin(item), after))
                if len(begun) > far:
                    yield begun.popleft()
                    far = min(far + 1, depth)
            while begun:
                yield begun.popleft()
        finally:
            for early, _ in begun:
                leave(early)

    return stream


def _made_again(upstream: Stream[T], origin: State, name: str) -> T:
    """The item that comes behind that state."""
    found = next(upstream(origin), None)
    if found is None:
        raise _diverged(name, "of a held sample", "no more")
    return found[0]


def _diverged(name: str, expected: object, got: object) -> StateError:
    return StateError(
        f"replay diverged in {name}: expected key {expected}, got {got}. A function of that stage "
        "does not give the same for the same samples: it draws random numbers elsewhere than from "
        "random, NumPy or torch, keeps something between samples, or was changed. Mend it, or "
        'begin the next epoch with load_state_dict(state, accept=["replay"]).'
    )
