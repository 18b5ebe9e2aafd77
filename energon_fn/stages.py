"""The stages: pure transformers from an iterator to an iterator.

Each works on any iterable - a list in a notebook, a webdataset pipeline, a Hugging Face dataset -
and composes with :func:`toolz.pipe`:

>>> from toolz import pipe
>>> pipe(range(10), encode_sample(lambda n: n * n), batch(4, collate=sum), list)
[14, 126, 145]

A stage pulls exactly what it needs for the item that it emits, keeps no state outside of
the generator, and pickles if the functions in it do. Where a user's function is called:

* it may return a value, or be a generator that yields none to many;
* :class:`~energon_fn.SkipSample` raised in it drops the sample, group or batch at hand.

A generator that waits keeps what its variables hold. So that a hundred streams which wait for their
turns do not keep a batch each, batches and what they are made of are popped from a list as they
are handed on.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, wraps
from inspect import signature
from itertools import islice
from types import GeneratorType
from typing import Any, Concatenate, Generic, ParamSpec, Protocol, TypeVar, cast, overload

from energon_fn.collation import collate as default_collate
from energon_fn.decoding import decoder
from energon_fn.errors import DatasetError, SkipSample
from energon_fn.samples import CrudeSample

T = TypeVar("T", bound=Any)  # any type; so bound, it is Any to a checker where nothing tells it
U = TypeVar("U")
P = ParamSpec("P")
F = TypeVar("F", bound=Callable[..., Any])


class Stage(Generic[T, U]):
    """A stage with its arguments, waiting for its items: call it with an iterable."""

    def __init__(
        self,
        name: Callable[..., Stage[T, U]],
        transform: Callable[..., Iterable[U]],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ):
        self._parts = name, transform, args, kwargs

    def __call__(self, items: Iterable[T]) -> Iterable[U]:
        _, transform, args, kwargs = self._parts
        return transform(items, *args, **kwargs)

    def __repr__(self) -> str:
        name, _, args, kwargs = self._parts
        return _shown(name, args, kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        name, _, args, kwargs = self._parts
        return _make, (name, args, kwargs)


def _shown(name: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    def word(thing: Any) -> str:
        if isinstance(thing, partial):
            return _shown(partial, (thing.func, *thing.args), thing.keywords)
        return str(getattr(thing, "__name__", repr(thing)))

    words = [*map(word, args), *(f"{key}={word(value)}" for key, value in kwargs.items())]
    return f"{word(name)}({', '.join(words)})"


def _make(name: Callable[..., Stage[T, U]], args: Any, kwargs: Any) -> Stage[T, U]:
    return name(*args, **kwargs)


def stage(
    transform: Callable[Concatenate[Iterable[T], P], Iterable[U]],
) -> Callable[P, Callable[[Iterable[T]], Iterable[U]]]:
    """Make ``transform(items, *args)`` a stage: called with ``args``, it waits for its items.

    >>> @stage
    ... def every(items, n):
    ...     yield from islice(items, 0, None, n)
    >>> every(3)
    every(3)
    >>> list(every(3)(range(10)))
    [0, 3, 6, 9]
    """

    whole = signature(transform)
    own = whole.replace(parameters=list(whole.parameters.values())[1:])  # all but the items

    @wraps(transform)
    def make(*args: P.args, **kwargs: P.kwargs) -> Stage[T, U]:
        try:
            own.bind(*args, **kwargs)
        except TypeError as error:  # said here, where it was written, not at the first item
            name = transform.__name__
            raise TypeError(f"{name}: {error}. It is called {name}(...)(items)") from None
        return Stage(make, transform, args, dict(kwargs))

    make.__dict__["__signature__"] = own
    return make


class OfEach(Protocol):
    """The type of a stage whose function takes single items and gives one, or yields many."""

    @overload
    def __call__(self, fn: Callable[[T], Iterator[U]]) -> Callable[[Iterable[T]], Iterable[U]]: ...
    @overload
    def __call__(self, fn: Callable[[T], U]) -> Callable[[Iterable[T]], Iterable[U]]: ...


class OfLists(Protocol):
    """The type of a stage whose function takes lists of items and gives one, or yields many."""

    @overload
    def __call__(
        self, batch_size: int, *, drop_last: bool = False
    ) -> Callable[[Iterable[Any]], Iterable[Any]]: ...
    @overload
    def __call__(
        self, batch_size: int, collate: Callable[[list[T]], Iterator[U]], *, drop_last: bool = False
    ) -> Callable[[Iterable[T]], Iterable[U]]: ...
    @overload
    def __call__(
        self, batch_size: int, collate: Callable[[list[T]], U], *, drop_last: bool = False
    ) -> Callable[[Iterable[T]], Iterable[U]]: ...


# To tell one from many takes an overload.
_stage_of_each = cast(Callable[[Callable[..., Any]], OfEach], stage)
_stage_of_lists = cast(Callable[[Callable[..., Any]], OfLists], stage)


def _check(name: str, size: int, least: int = 1) -> None:
    if size < least:
        raise ValueError(f"{name} is {size}; it must be {least} or more")


def apply(fn: Callable[[T], U | Iterator[U]], item: T) -> Iterator[U]:
    """The outputs of a user's function for one item: none, one, or many.

    >>> list(apply(lambda n: n + 1, 1)), list(apply(lambda n: (m for m in range(n)), 3))
    ([2], [0, 1, 2])
    """
    return _apply([item], fn)


def _apply(box: list[Any], fn: Callable[[T], U | Iterator[U]]) -> Iterator[U]:
    skipped = SkipSample  # when Python ends, globals may go before a generator is closed
    try:
        box.append(fn(box.pop()))
        if isinstance(box[0], GeneratorType):
            yield from box.pop()
        else:
            yield box.pop()
    except skipped:
        return


def _each(items: Iterable[T], fn: Callable[[T], U | Iterator[U]]) -> Iterator[U]:
    # apply() written out: this loop is the one that runs for every sample, and may keep one.
    skipped = SkipSample
    for item in items:
        try:
            result = fn(item)
            if isinstance(result, GeneratorType):
                yield from result
            else:
                yield cast(U, result)
        except skipped:
            continue


def decode(image: str | None = "torchrgb", **options: Any) -> Stage[dict[str, Any], dict[str, Any]]:
    """Decode the parts of raw samples by their names; see :class:`~energon_fn.SampleDecoder`.

    image: how images come out, one of webdataset's names; None leaves all parts as bytes.
    options: the decoder's, ``min_size`` say.

    >>> list(decode()([{"__key__": "7", "txt": b"a rose", "cls": b"3", "raw": b"?"}]))
    [{'__key__': '7', 'txt': 'a rose', 'cls': 3, 'raw': b'?'}]
    """
    fn = decoder(image, **options)  # a wrong option is said here, not at the first sample
    return Stage(decode, lambda items, *_, **__: _each(items, fn), (image,), options)


@_stage_of_each
def encode_sample(items: Iterable[T], fn: Callable[[T], U | Iterator[U]]) -> Iterator[U]:
    """Transform single samples, say augment the image and tokenize the text.

    >>> def words(text):
    ...     yield from text.split()
    >>> list(encode_sample(words)(["a rose", "is a rose"]))
    ['a', 'rose', 'is', 'a', 'rose']
    """
    return _each(items, fn)


@_stage_of_each
def preencode_sample(items: Iterable[T], fn: Callable[[T], U | Iterator[U]]) -> Iterator[U]:
    """The part of :func:`encode_sample` that runs before packing, on every sample.

    >>> list(preencode_sample(len)(["a rose", "a"]))
    [6, 1]
    """
    return _each(items, fn)


@_stage_of_each
def postencode_sample(items: Iterable[T], fn: Callable[[T], U | Iterator[U]]) -> Iterator[U]:
    """The part of :func:`encode_sample` for selected samples; :func:`pack` takes it, too.

    >>> list(postencode_sample(str.upper)(["a rose"]))
    ['A ROSE']
    """
    return _each(items, fn)


@_stage_of_each
def encode_batch(items: Iterable[T], fn: Callable[[T], U | Iterator[U]]) -> Iterator[U]:
    """Transform whole batches, say tokenize all texts at once.

    >>> list(encode_batch(sum)([[1, 2], [3]]))
    [3, 3]
    """
    items = iter(items)
    while box := list(islice(items, 1)):
        yield from _apply(box, fn)


@dataclass(frozen=True)
class Cooker:
    """A function that makes a sample of a crude one, and which crude samples it takes.

    has_subflavors: it takes the samples whose ``__subflavors__`` have these entries; None: all.
    """

    cook: Callable[..., Any]
    has_subflavors: Mapping[str, Any] | None = None

    def takes(self, sample: Mapping[str, Any]) -> bool:
        """Whether this cooker is for that sample.

        >>> ocr = Cooker(dict, has_subflavors={"kind": "ocr"})
        >>> ocr.takes({"__subflavors__": {"kind": "ocr", "year": 2024}}), ocr.takes({})
        (True, False)
        """
        subflavors = sample.get("__subflavors__") or {}
        wanted = (self.has_subflavors or {}).items()
        return all(name in subflavors and subflavors[name] == value for name, value in wanted)


@overload
def cooker(
    fn: None = None, *, need_cache: bool = False, need_primary: bool = False
) -> Callable[[F], F]: ...
@overload
def cooker(fn: F, *, need_cache: bool = False, need_primary: bool = False) -> F: ...
def cooker(
    fn: F | None = None, *, need_cache: bool = False, need_primary: bool = False
) -> F | Callable[[F], F]:
    """Say what a cooker is given besides the sample and the dataset's auxiliary stores.

    need_cache: the cache pool, as ``cache``, see :mod:`energon_fn.caching`.
    need_primary: the files of the dataset that the sample is of, as ``primary``, see
    :class:`~energon_fn.stores.PrimaryFileStore`.

    >>> @cooker(need_primary=True)
    ... def seconds(sample, primary):
    ...     return primary.get_media_metadata(".wav").audio_duration
    >>> needs_of(seconds)
    (True, False)
    """

    def mark(fn: F) -> F:
        fn.__dict__.update(_needs=(need_primary, need_cache))
        return fn

    return mark if fn is None else mark(fn)


def needs_of(cook: Callable[..., Any]) -> tuple[bool, bool]:
    """Whether a cooker needs the primary dataset, and the cache pool: what ``@cooker`` said."""
    while isinstance(cook, partial):
        cook = cook.func
    needs: tuple[bool, bool] = getattr(cook, "_needs", (False, False))
    return needs


def find_cooker(sample: Mapping[str, Any], cookers: Sequence[Cooker]) -> Cooker:
    """The first cooker that takes the crude sample.

    Raises :class:`~energon_fn.DatasetError` if there is none.
    """
    for cooker in cookers:
        if cooker.takes(sample):
            return cooker
    raise DatasetError(
        f"no cooker takes the crude sample {sample.get('__key__')} with subflavors "
        f"{sample.get('__subflavors__')}: the cookers ask for "
        f"{[cooker.has_subflavors for cooker in cookers]}. Add a cooker for it to the task "
        "encoder's `cookers`, or give the dataset a sample type and field map in dataset.yaml."
    )


@stage
def cook(items: Iterable[Any], cookers: Sequence[Cooker]) -> Iterator[Any]:
    """Make samples of the crude ones among the items; others pass, plain dicts too.

    >>> crude = CrudeSample({"__key__": "7", "txt": "a rose"})
    >>> list(cook([Cooker(lambda sample: sample["txt"].upper())])([crude, "other"]))
    ['A ROSE', 'other']
    """
    for item in items:
        if isinstance(item, CrudeSample):
            yield from apply(find_cooker(item, cookers).cook, item)
        else:
            yield item


@stage
def limit(items: Iterable[T], length: int) -> Iterator[T]:
    """The first ``length`` items.

    >>> list(limit(2)("abc"))
    ['a', 'b']
    """
    _check("limit's length", length, least=0)
    return islice(items, length)


@stage
def shuffle(items: Iterable[T], buffer_size: int, seed: int = 0) -> Iterator[T]:
    """Hold ``buffer_size`` items and emit a random one of them each time.

    The order depends on ``seed`` alone. Datasets shuffle on keys instead, where the buffer holds no
    samples (:mod:`energon_fn.order.plan`); this one is for iterables whose future is not known.

    >>> sorted(shuffle(3, seed=1)(range(6)))
    [0, 1, 2, 3, 4, 5]
    """
    _check("shuffle's buffer_size", buffer_size)
    chance = random.Random(seed)
    items = iter(items)
    buffer = list(islice(items, buffer_size))
    for item in items:
        place = chance.randrange(buffer_size)
        buffer[place], item = item, buffer[place]
        yield item
    chance.shuffle(buffer)
    yield from buffer


class PackedSamplesOutput(list[list[T]]):
    """Groups of samples to pack, and samples that are given back to the buffer.

    A function that selects samples may return it in place of a list of lists: those in ``pushback``
    come first in the next buffer, in this order. They must be among the samples it was given, and
    as they were. Source: docs/source/advanced/packing.md of Megatron-Energon.

    >>> output = PackedSamplesOutput(packs=[[3, 5], [8]], pushback=[1])
    >>> output, output.packs, output.pushback
    ([[3, 5], [8]], [[3, 5], [8]], [1])
    """

    def __init__(self, packs: Iterable[list[T]], pushback: Iterable[T] = ()):
        super().__init__(packs)
        self.pushback: list[T] = list(pushback)

    @property
    def packs(self) -> list[list[T]]:
        """The groups: this very list."""
        return self


@stage
def pack(
    items: Iterable[T],
    select: Callable[[list[T]], Iterable[list[T]]],
    join: Callable[[list[T]], U | Iterator[U]],
    *,
    buffer_size: int,
    postencode: Callable[[T], T | Iterator[T]] | None = None,
    held: list[T] | None = None,
) -> Iterator[U]:
    """Collect ``buffer_size`` items, select groups of them, and join each group to one item.

    select: list of items -> groups (lists), returned or yielded; items in no group are dropped.
    A :class:`PackedSamplesOutput` can give items back to the buffer: it is filled up behind them.
    :mod:`energon_fn.packing` has functions that select.
    join: group -> packed item. postencode: runs on each selected item before the join.
    held: the list in which items that are given back wait, if the caller wants to see it.
    The last buffers hold what remains, until all are selected, dropped, or given back once more.

    Raises ValueError if a full buffer is given back whole, since nothing would ever come.

    >>> def up_to_ten(lengths):
    ...     group, groups = [], []
    ...     for n in sorted(lengths):
    ...         if sum(group) + n > 10:
    ...             groups.append(group)
    ...             group = []
    ...         group.append(n)
    ...     return [*groups, group]
    >>> list(pack(up_to_ten, tuple, buffer_size=4)([1, 9, 2, 8, 5, 5]))
    [(1, 2), (8,), (9,), (5, 5)]
    """
    _check("pack's buffer_size", buffer_size)
    items = iter(items)
    held = [] if held is None else held
    while buffer := [*held, *islice(items, buffer_size - len(held))]:
        held.clear()
        for chosen in _selected(select, buffer, held):
            if postencode is not None:
                chosen = list(_each(chosen, postencode))
            if chosen:
                yield from apply(join, chosen)
        if len(held) == len(buffer):
            if len(held) < buffer_size:  # no more comes, and these do not go together
                return
            raise ValueError(
                f"the function that selects samples to pack gave back all {buffer_size} of a full "
                "buffer: it must select or drop some. Or let buffer_size be larger"
            )
        buffer = []  # let go of these before others fill it


def _selected(
    select: Callable[[list[T]], Iterable[list[T]]], buffer: list[T], held: list[T]
) -> Iterator[list[T]]:
    """The groups; what is given back is in ``held`` before the first comes."""
    skipped = SkipSample
    try:
        groups = select(list(buffer))
        if groups is None:
            raise TypeError(
                "the function that selects samples to pack returned None: return the groups, a "
                "list of lists, or yield them"
            )
        if isinstance(groups, PackedSamplesOutput) and groups.pushback:
            held.extend(groups.pushback)
            if Counter(map(id, held)) - Counter(map(id, buffer)):
                raise ValueError(
                    "the function that selects samples to pack gave back something that was not in "
                    "its buffer, or the same sample twice: give back the very objects it was given"
                )
        for group in groups:
            if not isinstance(group, list | tuple):
                raise TypeError(
                    f"the function that selects samples to pack gave a {type(group).__name__} "
                    "where a group of samples is due: return a list of lists"
                )
            yield list(group)
    except skipped:
        return


@_stage_of_lists
def batch(
    items: Iterable[T],
    batch_size: int,
    collate: Callable[[list[T]], U | Iterator[U]] = default_collate,
    *,
    drop_last: bool = False,
) -> Iterator[U]:
    """Collate ``batch_size`` items at a time; the last batch may be short, or is dropped.

    collate: list of items -> batch; by default tensors are padded and stacked, others listed.

    >>> list(batch(2, list)("abc")), list(batch(2, list, drop_last=True)("abc"))
    ([['a', 'b'], ['c']], [['a', 'b']])
    """
    _check("batch_size", batch_size)
    items = iter(items)
    least = batch_size if drop_last else 1
    while len(group := list(islice(items, batch_size))) >= least:
        box = [group]
        del group
        yield from _apply(box, collate)


@stage
def group(
    items: Iterable[T],
    criterion: Callable[[T], tuple[Hashable, int | None]],
    batch_size: int | None = None,
    *,
    drop_last: bool = False,
) -> Iterator[list[T]]:
    """Collect items that share a key to lists: ``criterion(item) -> (key, size)``.

    A list is emitted when it has ``size`` items (None: ``batch_size``), in the end also the short
    ones, unless they are dropped. Collate with :func:`encode_batch` or any function of lists.

    >>> list(group(lambda n: (n % 2, 2))(range(6)))
    [[0, 2], [1, 3], [4], [5]]
    """
    groups: dict[Hashable, list[T]] = {}
    for item in items:
        try:
            key, size = criterion(item)
        except SkipSample:
            continue
        size = batch_size if size is None else size
        if size is None:
            raise ValueError(
                f"no batch size for the group {key!r}: the criterion gave none and there is no "
                "common one. Return (key, size), or set batch_size."
            )
        _check(f"the batch size of group {key!r}", size)
        members = groups.setdefault(key, [])
        members.append(item)
        full = len(members) >= size
        del members
        if full:
            yield groups.pop(key)
    if not drop_last:
        yield from groups.values()


class Epochs(Generic[T]):
    """Items cut to epochs: each iteration gives the next ``length`` of them."""

    def __init__(self, items: Iterable[T], length: int):
        self._items, self._length = iter(items), length

    def __iter__(self) -> Iterator[T]:
        return islice(self._items, self._length)

    def __len__(self) -> int:
        return self._length


@stage
def epochize(items: Iterable[T], length: int) -> Epochs[T]:
    """Cut an endless stream to virtual epochs of ``length`` items.

    Each iteration over the result goes on where the last one ended.

    >>> epochs = epochize(2)(range(5))
    >>> [list(epochs), list(epochs), list(epochs)]
    [[0, 1], [2, 3], [4]]
    """
    _check("epochize's length", length)
    return Epochs(items, length)
