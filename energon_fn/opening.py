"""From a recipe to opened datasets and the tree that says how they are mixed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any, TypeAlias

from energon_fn.compose import (
    Blend,
    Bound,
    Concat,
    Epochized,
    Join,
    Recipe,
    Subset,
    Using,
    Weight,
    share,
)
from energon_fn.disk.joined import open_joined
from energon_fn.disk.jsonl import is_jsonl, open_jsonl
from energon_fn.disk.metadata import DATASET_YAML, SPLIT_YAML
from energon_fn.disk.source import Samples, open_source
from energon_fn.errors import DatasetError
from energon_fn.metadataset import is_metadataset, read_metadataset
from energon_fn.stores import FileStore, open_store


@dataclass(frozen=True)
class Mixed:
    """Trees put together; ``how`` is the name of the function that did it."""

    how: str
    parts: tuple[Tree, ...]
    amounts: tuple[Weight | Fraction, ...] = ()
    random: bool = False


Tree: TypeAlias = int | Mixed
"""A number is that of a source."""


@dataclass(frozen=True)
class Opened:
    """The single datasets of a recipe, in its order, and how they are mixed."""

    sources: tuple[Samples, ...]
    aux: tuple[Mapping[str, FileStore], ...]
    """The stores that each source's cookers get."""
    tree: Tree


@dataclass(frozen=True)
class _Context:
    """What has been said further outside."""

    split_part: str
    dataset_config: str
    split_config: str
    trust: bool
    make: bool
    subflavors: Mapping[str, Any] = field(default_factory=dict)
    aux: Mapping[str, str] = field(default_factory=dict)
    subsets: tuple[tuple[Bound, Bound], ...] = ()
    files: tuple[str, ...] = ()
    """The metadatasets that are being read."""
    where: str = ""


def open_recipe(
    recipe: Recipe,
    split_part: str = "train",
    *,
    dataset_config: str = DATASET_YAML,
    split_config: str = SPLIT_YAML,
    trust_dataset_code: bool = False,
    make: bool = True,
) -> Opened:
    """Open all datasets of a recipe, or of what a path leads to; the rest as :func:`open_source`.

    make: False if only keys and counts are wanted: joiners are not looked at either.

    Raises :class:`~energon_fn.DatasetError` for what does not exist or does not fit together.

    >>> open_recipe("/no/such/folder")
    Traceback (most recent call last):
        ...
    energon_fn.errors.DatasetError: no shard matches '/no/such/folder'...
    """
    sources: list[Samples] = []
    aux: list[Mapping[str, FileStore]] = []

    def opened(recipe: Recipe, context: _Context) -> Tree:
        match recipe:
            case Using():
                return opened(recipe.inner, _within(context, recipe))
            case Subset():
                subsets = (*context.subsets, (recipe.start, recipe.stop))
                return opened(recipe.inner, replace(context, subsets=subsets))
            case Blend():
                parts, amounts = zip(*recipe.parts, strict=True)
                return several("blend", parts, context, amounts, recipe.random)
            case Epochized():
                parts, amounts = zip(*recipe.parts, strict=True)
                return several("blend_epochized", parts, context, amounts)
            case Concat():
                return several("concat", recipe.parts, context)
            case Join():
                return leaf(_join(recipe, context), replace(context, subflavors={}))
            case str() | os.PathLike():
                path = os.path.abspath(recipe) if _is_local(recipe) else os.fspath(recipe)
                if path.endswith((".yaml", ".yml")) and not os.path.exists(path):
                    raise DatasetError(f"{_at(context)}{path} does not exist: check the path")
                if is_metadataset(path):
                    if path in context.files:
                        chain = " -> ".join([*context.files, path])
                        raise DatasetError(f"a metadataset leads to itself: {chain}")
                    inside = replace(context, files=(*context.files, path))
                    return opened(read_metadataset(path, context.split_part), inside)
                return leaf(_open_path(path, context), context)
            case _ if hasattr(recipe, "load"):
                return leaf(recipe, context)
            case _:
                raise TypeError(
                    f"path is {recipe!r}; it must be one string or pathlib.Path: a folder, a file, "
                    "or a pattern of files; or a recipe: blend([(path, weight), ...]), say"
                )

    def several(
        how: str, parts: Any, context: _Context, amounts: Any = (), random: bool = False
    ) -> Tree:
        for start, stop in context.subsets:
            if isinstance(start, int) or isinstance(stop, int):
                raise DatasetError(
                    f"{_at(context)}the subset from {start} to {stop} is around a {how} of several "
                    "datasets: give percentages, or a subset to each of them"
                )
        return Mixed(how, tuple(opened(part, context) for part in parts), amounts, random)

    def leaf(samples: Samples, context: _Context) -> int:
        sources.append(_subset(samples, context).tagged(context.subflavors))
        try:
            aux.append({name: open_store(url) for name, url in context.aux.items()})
        except DatasetError as error:
            raise DatasetError(f"{_at(context)}{error}") from error.__cause__
        return len(sources) - 1

    context = _Context(split_part, dataset_config, split_config, trust_dataset_code, make)
    tree = opened(recipe, context)
    return Opened(tuple(sources), tuple(aux), tree)


def _within(context: _Context, using: Using) -> _Context:
    return replace(
        context,
        split_part=using.split_part or context.split_part,
        dataset_config=using.dataset_config or context.dataset_config,
        split_config=using.split_config or context.split_config,
        subflavors={**context.subflavors, **using.subflavors},
        aux={**context.aux, **using.aux},
        where=using.where or context.where,
    )


def _open_path(path: str, context: _Context) -> Samples:
    try:
        if is_jsonl(path):
            if (context.dataset_config, context.split_config) != (DATASET_YAML, SPLIT_YAML):
                raise DatasetError(
                    f"{path}: a file of JSON lines has neither dataset_config nor split_config: "
                    "leave them out"
                )
            return open_jsonl(path, context.split_part)
        return open_source(
            path,
            context.split_part,
            dataset_config=context.dataset_config,
            split_config=context.split_config,
            trust_dataset_code=context.trust,
            make=context.make,
        )
    except DatasetError as error:
        raise DatasetError(f"{_at(context)}{error}") from error.__cause__


def _join(join: Join, context: _Context) -> Samples:
    parts = []
    for part in join.parts:
        # A subset around a join is one of its matches.
        inner = open_recipe(
            Using(part, subflavors=context.subflavors, where=context.where),
            context.split_part,
            dataset_config=context.dataset_config,
            split_config=context.split_config,
            trust_dataset_code=context.trust,
            make=context.make,
        )
        if len(inner.sources) != 1:
            raise DatasetError(
                f"{_at(context)}a part of a join leads to {len(inner.sources)} datasets that are "
                "mixed: join single datasets, and blend the joins"
            )
        parts.append(inner.sources[0])
    try:
        return open_joined(
            parts,
            join.nonmatch,
            join.joiner,
            join.names,
            join.index,
            trust_dataset_code=context.trust,
            make=context.make,
        )
    except DatasetError as error:
        raise DatasetError(f"{_at(context)}{error}") from error.__cause__


def _subset(samples: Samples, context: _Context) -> Samples:
    """The samples that are left by all subsets around them, the innermost first."""
    absolute = [pair for pair in context.subsets if any(isinstance(b, int) for b in pair)]
    if len(absolute) > 1:
        raise DatasetError(
            f"{_at(context)}{samples.path} is within two subsets by numbers of samples, "
            f"{' and '.join(map(str, absolute))}: make one of them percentages"
        )
    if not context.subsets:
        return samples
    # Shares multiply and are rounded once, in floating point, as megatron-energon does.
    low, high, size = 0.0, 1.0, len(samples)
    first, last = 0, size
    for start, stop in reversed(context.subsets):
        if isinstance(start, int) or isinstance(stop, int):
            first = int(start) if isinstance(start, int) else int(share(start) * size)
            last = (
                size
                if stop == "end"
                else stop
                if isinstance(stop, int)
                else int(share(stop) * size)
            )
            if not first <= last <= size:
                raise DatasetError(
                    f"{_at(context)}the subset from {start} to {stop} is not within "
                    f"{samples.path}, which has {size} samples: 'end' stands for its end"
                )
        else:
            low, high = low + share(start) * (high - low), low + share(stop) * (high - low)
    within = last - first
    return samples.cut(first + int(low * within), first + int(high * within))


def _is_local(path: str | os.PathLike[str]) -> bool:
    return "://" not in os.fspath(path)


def _at(context: _Context) -> str:
    return f"{context.where}: " if context.where else ""
