"""Datasets made of datasets: recipes, that say how before anything is opened.

A recipe is plain data and nests: a path, or one of the functions below around recipes. Every place
that takes a path takes a recipe too. The same can be written as a metadataset in YAML, see
:mod:`energon_fn.recipes.metadataset`.

>>> from toolz import pipe
>>> coco = pipe("data/coco", subset("0%", "80%"))
>>> recipe = blend([(coco, 5), (blend_epochized([("data/a", 2), ("data/b", 0.5)]), 1)])

A recipe's order is decided by :mod:`energon_fn.order.mixing`, on keys.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Literal, TypeAlias, get_args

from energon_fn.disk.source import Samples

Weight: TypeAlias = float | Callable[[int], float]
Bound: TypeAlias = int | str
NonMatch: TypeAlias = Literal["error", "skip", "none"]


@dataclass(frozen=True)
class Blend:
    """Made by :func:`blend`."""

    parts: tuple[tuple[Recipe, Weight], ...]
    random: bool = False


@dataclass(frozen=True)
class Epochized:
    """Made by :func:`blend_epochized` and :func:`repeat`."""

    parts: tuple[tuple[Recipe, Fraction], ...]


@dataclass(frozen=True)
class Concat:
    """Made by :func:`concat`."""

    parts: tuple[Recipe, ...]


@dataclass(frozen=True)
class Join:
    """Made by :func:`join`."""

    parts: tuple[Recipe, ...]
    names: tuple[str, ...] | None
    """Keyword arguments of the joiner; None: the parts are given in their order."""
    nonmatch: tuple[NonMatch, ...]
    joiner: Any
    """The sample type, or the YAML's two names of it, which are resolved when it is opened."""
    index: str | None = None
    """Where the table of matches is kept; None: in the cache folder."""


@dataclass(frozen=True)
class Subset:
    """Made by :func:`subset`."""

    inner: Recipe
    start: Bound
    stop: Bound


@dataclass(frozen=True)
class Using:
    """Made by :func:`using`."""

    inner: Recipe
    split_part: str | None = None
    dataset_config: str | None = None
    split_config: str | None = None
    subflavors: Mapping[str, Any] = field(default_factory=dict)
    aux: Mapping[str, str] = field(default_factory=dict)
    where: str = ""
    """The file and line this was written in, for messages."""


Recipe: TypeAlias = (
    str | os.PathLike[str] | Samples | Blend | Epochized | Concat | Join | Subset | Using
)


def using(
    inner: Recipe,
    *,
    split_part: str | None = None,
    dataset_config: str | None = None,
    split_config: str | None = None,
    subflavors: Mapping[str, Any] | None = None,
    aux: Mapping[str, str] | None = None,
) -> Using:
    """Say how the datasets in a recipe are to be opened; what is said further inside wins.

    subflavors: entries of the samples' ``__subflavors__``, merged with those further inside; they
    go before those in a dataset's own ``dataset.yaml``.
    aux: stores that cookers get as keyword arguments: names, and paths of prepared datasets or
    ``filesystem://`` folders.

    >>> using("data/coyo", split_part="val").split_part
    'val'
    """
    return Using(inner, split_part, dataset_config, split_config, subflavors or {}, aux or {})


def within(outer: Using, inner: Using) -> Using:
    """What is said inside of both: the inner one's own, and of the outer one what that leaves open.

    >>> within(using("a", split_part="val", subflavors={"x": 1}), using("b", subflavors={"y": 2}))
    Using(inner='b', split_part='val', ..., subflavors={'x': 1, 'y': 2}, aux={}, where='')
    """
    return Using(
        inner.inner,
        split_part=inner.split_part or outer.split_part,
        dataset_config=inner.dataset_config or outer.dataset_config,
        split_config=inner.split_config or outer.split_config,
        subflavors={**outer.subflavors, **inner.subflavors},
        aux={**outer.aux, **inner.aux},
        where=inner.where or outer.where,
    )


def blend(parts: Iterable[tuple[Recipe, Weight]], *, random: bool = False) -> Blend:
    """Draw from several datasets for ever, each as often as its weight says.

    A dataset that ends begins anew; validation takes one after the other, each once. A weight may
    be a function of the number of samples that the blend has given so far, over all lanes.
    random: draw independently, rather than spread each dataset as evenly as can be.

    Raises ValueError for a weight that is not above 0.

    >>> blend([("data/a", 3), ("data/b", 0)])
    Traceback (most recent call last):
        ...
    ValueError: the weight of 'data/b' is 0; it must be above 0. Leave out what is not wanted
    """
    pairs = _pairs("blend", "weight", parts)
    for part, weight in pairs:
        if not callable(weight) and not 0 < weight < float("inf"):
            raise ValueError(
                f"the weight of {part!r} is {weight!r}; it must be above 0. Leave out what is not "
                "wanted"
            )
    return Blend(_some("blend", pairs), random)


def blend_epochized(parts: Iterable[tuple[Recipe, float | Fraction]]) -> Epochized:
    """Mix several datasets; one epoch has each as often as its number of repetitions says.

    The counts are exact over all lanes together: of 10 samples 0.25 times are 2 in one epoch and
    3 in the next, and the next epoch goes on where the last one stopped. Validation takes each
    once.

    Raises ValueError for repetitions that are not above 0.

    >>> blend_epochized([("data/a", 2), ("data/b", 0.7)]).parts[1]
    ('data/b', Fraction(7, 10))
    """
    pairs = _pairs("blend_epochized", "repetitions", parts)
    for part, times in pairs:
        if not 0 < times < float("inf"):
            raise ValueError(f"the repetitions of {part!r} are {times}; they must be above 0")
    exact = tuple((part, Fraction(str(times))) for part, times in pairs)
    return Epochized(_some("blend_epochized", exact))


def repeat(times: float | Fraction) -> Callable[[Recipe], Epochized]:
    """Let one epoch have the dataset that often.

    >>> repeat(3)("data/a")
    Epochized(parts=(('data/a', Fraction(3, 1)),))
    """
    return lambda inner: blend_epochized([(inner, times)])


def concat(parts: Iterable[Recipe]) -> Concat:
    """Put datasets one behind the other; training shuffles them as one.

    >>> concat(["data/a", "data/b"])
    Concat(parts=('data/a', 'data/b'))
    """
    return Concat(_some("concat", _listed("concat", parts)))


def join(
    parts: Iterable[Recipe] | Mapping[str, Recipe],
    joiner: Any,
    *,
    nonmatch: NonMatch | Mapping[str | int, NonMatch] = "error",
) -> Join:
    """Make one sample of the samples that have the same key in several datasets.

    The first dataset is the primary one: its samples, in its order. parts: a list, or a dict whose
    names are the joiner's arguments.
    joiner: a sample type, or a class with ``from_joined``, which is given one sample of each part.
    nonmatch: what becomes of a sample of the primary one that another part does not have: an
    "error", "skip" it, or give "none" (None) for it; one for all, or by the part's name or number.

    >>> from energon_fn import CaptioningSample
    >>> join(["data/images", "data/texts"], CaptioningSample, nonmatch={1: "skip"}).nonmatch
    ('error', 'skip')
    """
    names = tuple(parts) if isinstance(parts, Mapping) else None
    members = _listed("join", parts.values() if isinstance(parts, Mapping) else parts)
    places = names or range(len(members))
    modes: list[NonMatch] = [
        nonmatch if isinstance(nonmatch, str) else nonmatch.get(place, "error") for place in places
    ]
    unknown = [] if isinstance(nonmatch, str) else [key for key in nonmatch if key not in places]
    for wrong in [mode for mode in modes if mode not in get_args(NonMatch)] + unknown:
        raise ValueError(
            f"nonmatch has {wrong!r}; it is one of {', '.join(get_args(NonMatch))}, or a dict from "
            f"{', '.join(map(repr, places))} to them"
        )
    return Join(_some("join", members), names, tuple(modes), joiner)


def subset(start: Bound, stop: Bound) -> Callable[[Recipe], Subset]:
    """Take the samples from ``start`` to ``stop`` (excluded) of every dataset in a recipe.

    Either is a percentage ("12.5%") or, around one dataset only, a number of samples; ``stop`` may
    be "end". A subset around a subset takes its part of what the inner one left.

    Raises ValueError for anything else, and for a range without samples.

    >>> subset("0%", "80%")("data/a")
    Subset(inner='data/a', start='0%', stop='80%')
    """
    for bound in (start, stop):
        _check_bound(bound)
    if isinstance(start, int) and isinstance(stop, int):
        empty = start >= stop
    else:
        empty = isinstance(start, str) and isinstance(stop, str) and share(start) >= share(stop)
    if empty:
        raise ValueError(f"the range from {start} to {stop} holds no samples")
    return lambda inner: Subset(inner, start, stop)


def share(bound: str) -> float:
    """A percentage as a share of 1.

    >>> share("12.5%"), share("end")
    (0.125, 1.0)
    """
    return 1.0 if bound == "end" else float(bound[:-1]) / 100


def _check_bound(bound: object) -> None:
    problem = (
        f"the bound {bound!r} is none: write a percentage from '0%' to '100%', a number of samples,"
        " or 'end'"
    )
    if isinstance(bound, str) and bound != "end":
        try:
            within = bound.endswith("%") and 0 <= share(bound) <= 1
        except ValueError:
            within = False
        if not within:
            raise ValueError(problem)
    elif bound != "end" and not (type(bound) is int and bound >= 0):
        raise ValueError(problem)


def _pairs(name: str, amount: str, parts: Any) -> tuple[tuple[Any, Any], ...]:
    """The pairs of datasets and numbers, or functions. Raises TypeError for anything else."""
    given = parts if isinstance(parts, list | tuple) or hasattr(parts, "__next__") else [parts]
    pairs = tuple(given)
    for pair in pairs:
        if not (
            isinstance(pair, tuple | list)
            and len(pair) == 2
            and not isinstance(pair[0], int | float)
            and (callable(pair[1]) or isinstance(pair[1], int | float | Fraction))
        ):
            raise TypeError(
                f"{name} was given {pair!r}; it takes a list of pairs: {name}([(dataset, {amount}),"
                " ...])"
            )
    return tuple((part, number) for part, number in pairs)


def _listed(name: str, parts: Any) -> tuple[Any, ...]:
    """The datasets of a list. Raises TypeError for a single one."""
    if isinstance(parts, str) or hasattr(parts, "load") or not isinstance(parts, Iterable):
        raise TypeError(
            f"{name} was given {parts!r}; it takes a list of datasets: {name}([dataset, ...]"
            + (", joiner)" if name == "join" else ")")
        )
    return tuple(parts)


def _some(name: str, parts: Any) -> Any:
    if not parts:
        raise ValueError(f"{name} was given no datasets; it needs one or more")
    return parts
