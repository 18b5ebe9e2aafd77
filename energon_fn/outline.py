"""What a recipe or metadataset is made of, as a tree, and the indexes that its joins need."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from energon_fn.compose import Blend, Concat, Epochized, Join, Recipe, Subset, Using
from energon_fn.disk import files
from energon_fn.disk.joined import Joined
from energon_fn.disk.source import Samples
from energon_fn.errors import DatasetError
from energon_fn.metadataset import is_metadataset, read_metadataset, splits_of
from energon_fn.opening import Opened, open_recipe


@dataclass(frozen=True)
class Node:
    """A dataset, or several that are put together, and what is said about it."""

    recipe: Recipe
    """A path or opened samples; or a Blend, Epochized, Concat or Join."""
    inside: tuple[Node, ...]
    """What it is made of, in its order; nothing for a single dataset."""
    own: tuple[Using | Subset, ...]
    """What stands right around it, the outermost first."""
    said: Using
    """All that is said about it there and further outside; what is further inside wins."""
    files: tuple[str, ...]
    """The metadatasets that lead from the node around it to this one."""

    def __iter__(self) -> Iterator[Node]:
        """It and all nodes in it, each before what is inside of it."""
        yield self
        for node in self.inside:
            yield from node


def outline(recipe: Recipe, split_part: str = "train") -> Node:
    """What a recipe is made of, metadatasets that paths lead to included; no dataset is opened.

    Raises :class:`~energon_fn.DatasetError` for what is wrong in a metadataset.

    >>> from energon_fn import blend, using
    >>> tree = outline(blend([("/data/a", 5), (using("/data/b", split_part="val"), 2)]))
    >>> [(node.recipe, node.said.split_part) for node in tree.inside]
    [('/data/a', 'train'), ('/data/b', 'val')]
    """

    def node(
        recipe: Recipe,
        said: Using,
        own: tuple[Using | Subset, ...] = (),
        files: tuple[str, ...] = (),
        chain: tuple[str, ...] = (),
    ) -> Node:
        inside: Iterable[Recipe] = ()
        match recipe:
            case Using():
                return node(recipe.inner, _within(said, recipe), (*own, recipe), files, chain)
            case Subset():
                return node(recipe.inner, said, (*own, recipe), files, chain)
            case Blend() | Epochized():
                inside = (part for part, _ in recipe.parts)
            case Concat() | Join():
                inside = recipe.parts
            case str() | os.PathLike() if is_metadataset(recipe):
                path = os.path.abspath(recipe)
                chain = (*chain, path)
                if path in chain[:-1]:
                    raise DatasetError(f"a metadataset leads to itself: {' -> '.join(chain)}")
                found = read_metadataset(path, said.split_part or split_part)
                return node(found, said, own, (*files, path), chain)
        parts = tuple(node(part, said, chain=chain) for part in inside)
        return Node(recipe, parts, own, said, files)

    return node(recipe, Using(recipe, split_part=split_part))


def _within(outer: Using, inner: Using) -> Using:
    return replace(
        inner,
        split_part=inner.split_part or outer.split_part,
        dataset_config=inner.dataset_config or outer.dataset_config,
        split_config=inner.split_config or outer.split_config,
        subflavors={**outer.subflavors, **inner.subflavors},
        aux={**outer.aux, **inner.aux},
    )


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
