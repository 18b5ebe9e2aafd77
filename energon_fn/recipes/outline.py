"""What a recipe or metadataset is made of, as a tree: nothing of its datasets is opened."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from energon_fn.errors import DatasetError
from energon_fn.recipes.compose import Blend, Concat, Epochized, Join, Recipe, Subset, Using, within
from energon_fn.recipes.metadataset import is_metadataset, read_metadataset


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

    Raises :class:`~energon_fn.DatasetError` for what is wrong in a metadataset, TypeError for what
    is no recipe.

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
                return node(recipe.inner, within(said, recipe), (*own, recipe), files, chain)
            case Subset():
                return node(recipe.inner, said, (*own, recipe), files, chain)
            case Blend() | Epochized():
                inside = (part for part, _ in recipe.parts)
            case Concat() | Join():
                inside = recipe.parts
            case str() | os.PathLike():
                path = os.fspath(recipe)
                if is_metadataset(path):
                    path = os.path.abspath(path)
                    chain = (*chain, path)
                    if path in chain[:-1]:
                        raise DatasetError(f"a metadataset leads to itself: {' -> '.join(chain)}")
                    found = read_metadataset(path, said.split_part or split_part)
                    return node(found, said, own, (*files, path), chain)
                if path.endswith((".yaml", ".yml")):
                    at = f"{said.where}: " if said.where else ""
                    problem = f"{path} does not exist: check the path"
                    if os.path.isfile(path):  # in .nv-meta
                        folder = os.path.dirname(os.path.dirname(os.path.abspath(path)))
                        problem = f"{path} is no metadataset: give the dataset's folder, {folder}"
                    raise DatasetError(at + problem)
            case _ if not hasattr(recipe, "load"):
                raise TypeError(
                    f"path is {recipe!r}; it must be one string or pathlib.Path: a folder, a file, "
                    "or a pattern of files; or a recipe: blend([(path, weight), ...]), say"
                )
        parts = tuple(node(part, said, chain=chain) for part in inside)
        return Node(recipe, parts, own, said, files)

    return node(recipe, Using(recipe, split_part=split_part))
