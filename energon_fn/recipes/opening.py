"""From a recipe to opened datasets, the tree that says how they are mixed, and joins' indexes."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TypeAlias, cast

from energon_fn.disk import files
from energon_fn.disk.joined import Joined, open_joined
from energon_fn.disk.jsonl import is_jsonl, open_jsonl
from energon_fn.disk.metadata import DATASET_YAML, SPLIT_YAML
from energon_fn.disk.source import Samples, open_source
from energon_fn.errors import DatasetError
from energon_fn.recipes.compose import (
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
from energon_fn.recipes.metadataset import splits_of
from energon_fn.recipes.outline import Node, outline
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
    said = Using(recipe, split_part, dataset_config, split_config)
    return _open(outline(said), trust_dataset_code, make)


def _open(node: Node, trust: bool, make: bool) -> Opened:
    sources: list[Samples] = []
    aux: list[Mapping[str, FileStore]] = []

    def opened(node: Node, around: tuple[Subset, ...]) -> Tree:
        around = (*around, *(one for one in node.own if isinstance(one, Subset)))
        match node.recipe:
            case Blend(pairs, random):
                return several("blend", node, around, [weight for _, weight in pairs], random)
            case Epochized(pairs):
                return several("blend_epochized", node, around, [times for _, times in pairs])
            case Concat():
                return several("concat", node, around)
        parts = [_single(part, trust, make) for part in node.inside]  # of a join
        with _told(node.said):
            samples = _samples(node, parts, trust, make)
            sources.append(_cut(samples, around))
            aux.append({name: open_store(url) for name, url in node.said.aux.items()})
        return len(sources) - 1

    def several(
        how: str,
        node: Node,
        around: tuple[Subset, ...],
        amounts: Sequence[Weight | Fraction] = (),
        random: bool = False,
    ) -> Mixed:
        for one in around:
            if isinstance(one.start, int) or isinstance(one.stop, int):
                with _told(node.said):
                    raise DatasetError(
                        f"the subset from {one.start} to {one.stop} is around a {how} of several "
                        "datasets: give percentages, or a subset to each of them"
                    )
        parts = tuple(opened(part, around) for part in node.inside)
        return Mixed(how, parts, tuple(amounts), random)

    tree = opened(node, ())
    return Opened(tuple(sources), tuple(aux), tree)


def _samples(node: Node, parts: Sequence[Samples], trust: bool, make: bool) -> Samples:
    """The samples of a single dataset, or of a join of parts, with their subflavors."""
    said, recipe = node.said, node.recipe
    split_part, dataset_config, split_config = (
        said.split_part or "train",
        said.dataset_config or DATASET_YAML,
        said.split_config or SPLIT_YAML,
    )
    if isinstance(recipe, Join):
        return open_joined(
            parts,
            recipe.nonmatch,
            recipe.joiner,
            recipe.names,
            recipe.index,
            trust_dataset_code=trust,
            make=make,
        )
    if not isinstance(recipe, str | os.PathLike):
        return cast(Samples, recipe).tagged(said.subflavors)
    path = os.fspath(recipe)
    path = path if "://" in path else os.path.abspath(path)
    if not is_jsonl(path):
        return open_source(
            path,
            split_part,
            dataset_config=dataset_config,
            split_config=split_config,
            trust_dataset_code=trust,
            make=make,
        ).tagged(said.subflavors)
    if (dataset_config, split_config) != (DATASET_YAML, SPLIT_YAML):
        raise DatasetError(
            f"{path}: a file of JSON lines has neither dataset_config nor split_config: leave them "
            "out"
        )
    return open_jsonl(path, split_part, said.subflavors)


def _single(part: Node, trust: bool, make: bool) -> Samples:
    """A part of a join; what is said of the join is said of its parts."""
    for node in part:
        if aux := {name: None for one in node.own if isinstance(one, Using) for name in one.aux}:
            with _told(node.said):
                raise DatasetError(
                    f"aux ({', '.join(aux)}) is given to a part of a join: cookers get what is "
                    "joined, and the stores that are given to the join. Give it to that: "
                    "using(join(...), aux=...), or `aux` beside `join` in a metadataset"
                )
    opened = _open(part, trust, make)
    with _told(part.said):
        if len(opened.sources) != 1:
            raise DatasetError(
                f"a part of a join leads to {len(opened.sources)} datasets that are mixed: join "
                "single datasets, and blend the joins"
            )
    return opened.sources[0]


def _cut(samples: Samples, around: Sequence[Subset]) -> Samples:
    """The samples that are left by all subsets around them, the innermost first."""
    absolute = [one for one in around if isinstance(one.start, int) or isinstance(one.stop, int)]
    if len(absolute) > 1:
        raise DatasetError(
            f"{samples.path} is within two subsets by numbers of samples, "
            f"{' and '.join(f'({one.start}, {one.stop})' for one in absolute)}: make one of them "
            "percentages"
        )
    if not around:
        return samples
    size = len(samples)

    def place(bound: Bound) -> int:
        return bound if isinstance(bound, int) else int(share(bound) * size)

    first, last = 0, size
    for one in absolute:
        first, last = place(one.start), place(one.stop)
        if not first <= last <= size:
            raise DatasetError(
                f"the subset from {one.start} to {one.stop} is not within {samples.path}, which "
                f"has {size} samples: 'end' stands for its end"
            )
    # Shares multiply and are rounded once, in floating point, as megatron-energon does.
    low, high = 0.0, 1.0
    for one in reversed(around):
        if isinstance(one.start, str) and isinstance(one.stop, str):
            low, high = low + share(one.start) * (high - low), low + share(one.stop) * (high - low)
    within = last - first
    return samples.cut(first + int(low * within), first + int(high * within))


@contextmanager
def _told(said: Using) -> Iterator[None]:
    """Put in front of what is wrong where it was written."""
    try:
        yield
    except DatasetError as error:
        if not said.where:
            raise
        raise DatasetError(f"{said.where}: {error}") from error.__cause__


# ----------------------------------------------------------------------------- the joins' indexes


@dataclass(frozen=True)
class Prepared:
    """What :func:`prepare_metadataset` found and did."""

    splits: Mapping[str, Opened]
    """The datasets of each split, which can be counted; samples cannot be made of them."""
    made: tuple[str, ...]
    """The files with indexes of joins that were made now ..."""
    kept: tuple[str, ...]
    """... and those that were there ..."""
    removed: tuple[str, ...]
    """... and those beside the metadataset that it no longer uses."""


def prepare_metadataset(path: str | os.PathLike[str], *, anew: bool = False) -> Prepared:
    """Make the index of each join in a metadataset, and remove those that are out of date.

    An index says which samples are joined. It needs neither the joiner nor other code, and is made
    when a join is first opened, at the latest; here, before many processes do that at once.

    anew: make those again that are there, too.

    Raises :class:`~energon_fn.DatasetError` for what does not exist or does not fit together.
    """
    path, splits = os.path.abspath(path), splits_of(path)
    removed = _remove(path, ()) if anew else ()
    joins = [node.recipe for split in splits for node in outline(path, split)]
    folders = {Path(one.index).parent for one in joins if isinstance(one, Join) and one.index}
    before = {table for folder in {*folders, files.cache_folder()} for table in _tables(folder)}
    opened = {split: open_recipe(path, split, make=False) for split in splits}
    used = dict.fromkeys(
        join.table for one in opened.values() for source in one.sources for join in _joins(source)
    )
    return Prepared(
        opened,
        tuple(table for table in used if table not in before),
        tuple(table for table in used if table in before),
        tuple(table for table in (*removed, *_remove(path, used)) if table not in used),
    )


def _joins(samples: Samples) -> Iterator[Joined]:
    if isinstance(samples, Joined):
        yield samples
        for part in samples.parts:
            yield from _joins(part)


def _tables(folder: Path) -> list[str]:
    return [str(table) for table in folder.glob("*.npy")]


def _remove(path: str, used: Iterable[str]) -> tuple[str, ...]:
    """Remove the indexes beside a metadataset, but for the used ones; other files are not ours."""
    removed = []
    for table in sorted({*_tables(Path(f"{path}.cache"))}.difference(used)):
        if re.search(r"-[0-9a-f]{16}\.npy$", table):
            with suppress(OSError):
                os.unlink(table)
                removed.append(table)
    return tuple(removed)
