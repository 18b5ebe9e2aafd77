"""A split of a metadataset, drawn as a tree with the number of samples at each line."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import replace
from fractions import Fraction
from typing import NamedTuple, cast

from energon_fn.cli.terminal import columns, seen_from
from energon_fn.disk.fields import is_ours
from energon_fn.disk.joined import Joined
from energon_fn.disk.source import Samples
from energon_fn.look.values import counted, describe, one_line
from energon_fn.recipes.compose import Blend, Concat, Epochized, Join, Subset, Using
from energon_fn.recipes.opening import Opened
from energon_fn.recipes.outline import Node


class _Line(NamedTuple):
    size: int | None
    """Samples there are; None where more is said about the node above."""
    depth: int
    label: str
    """What the node around it says of this one, such as its weight."""
    text: str


class _Tree(NamedTuple):
    lines: list[_Line]
    size: int
    epoch: Fraction | None
    """Samples of one epoch; None: it has no end."""


def draw(split: str, node: Node, opened: Opened, folder: str) -> None:
    """Print the tree of a split; paths in ``folder`` are shown as seen from there.

    opened: the datasets that the nodes lead to. They may have been opened without ``make``.
    """
    node = replace(node, files=node.files[1:])  # the first is the metadataset that this is of
    tree = _tree(node, iter(opened.sources), Using("", split_part=split), folder)
    datasets = counted(len(opened.sources), "dataset")
    print(f"  {one_line(split)}: {counted(tree.size, 'sample')}, {datasets}")
    widest = max(len(f"{line.size:,}") for line in tree.lines if line.size is not None)
    for size, depth, label, text in tree.lines:
        start = f"    {'' if size is None else f'{size:,}':>{widest}}  {'  ' * depth}{label}"
        print(
            textwrap.fill(
                one_line(text),
                max(columns() - 1, len(start) + 20),
                initial_indent=start,
                subsequent_indent=" " * (len(start) + 2),
                break_long_words=False,  # paths are to be copied
                break_on_hyphens=False,
            )
        )


def _tree(
    node: Node,
    found: Iterator[Samples],
    outer: Using,
    folder: str,
    depth: int = 0,
    label: str = "",
    nonmatch: str = "error",
) -> _Tree:
    """found: the datasets that are left, of which those of the node are taken."""
    recipe, samples = node.recipe, None
    if not isinstance(recipe, Blend | Epochized | Concat):
        samples = next(found)
        found = iter(samples.parts if isinstance(samples, Joined) else ())
    inside = [
        _tree(one, found, node.said, folder, depth + 1, *more)
        for one, more in zip(node.inside, _said_of_parts(node), strict=True)
    ]
    size = sum(one.size for one in inside) if samples is None else len(samples)
    epoch = _epoch(node, [one.epoch for one in inside]) if samples is None else Fraction(size)
    what = [_name(node, epoch, folder), *_options(node, outer)]
    if nonmatch != "error":
        what.append(f"nonmatch: {nonmatch}")
    files = "".join(f"{seen_from(folder, file)}: " for file in node.files)
    lines = [_Line(size, depth, label, files + ", ".join(what))]
    lines += (_Line(None, depth, " " * len(label), f"  {note}") for note in _notes(node, folder))
    return _Tree([*lines, *(line for one in inside for line in one.lines)], size, epoch)


def _said_of_parts(node: Node) -> Iterable[tuple[str, str]]:
    """The label of each node inside, and what becomes of samples that it lacks in a join."""
    match node.recipe:
        case Blend(parts):
            total = sum(weight for _, weight in parts if not callable(weight))
            texts = ["scheduled" if callable(weight) else f"{100 * weight / total:.1f} %"
                     for _, weight in parts]  # fmt: skip
        case Epochized(parts):
            texts = [f"{float(times):g} x" for _, times in parts]
        case Join(parts, names, nonmatch):
            labels = [f"{one_line(name)}: " for name in names or ()]
            return zip(labels or [""] * len(parts), nonmatch, strict=True)
        case _:
            return [("", "error") for _ in node.inside]
    widest = max(map(len, texts))
    return [(f"{text:>{widest}}  ", "error") for text in texts]


def _epoch(node: Node, epochs: list[Fraction | None]) -> Fraction | None:
    if isinstance(node.recipe, Blend) or None in epochs:
        return None
    sizes = cast("list[Fraction]", epochs)
    if isinstance(node.recipe, Epochized):
        times = [times for _, times in node.recipe.parts]
        return sum((n * size for n, size in zip(times, sizes, strict=True)), Fraction())
    return sum(sizes, Fraction())


def _name(node: Node, epoch: Fraction | None, folder: str) -> str:
    match node.recipe:
        case Blend():
            return "blend"
        case Epochized():
            return "blend_epochized" + ("" if epoch is None else f", {float(epoch):,.15g} an epoch")
        case Concat():
            return "concat"
        case Join(joiner=joiner):
            module, name = joiner["__module__"], joiner["__class__"]
            return f"join for {name if is_ours(module) else f'{module}.{name}'}"
        case path:
            return seen_from(folder, str(path))


def _options(node: Node, outer: Using) -> Iterator[str]:
    """What is said of a node and not further outside, in the words of the yaml."""
    for name in ("split_part", "dataset_config", "split_config"):
        value = getattr(node.said, name)
        if value != getattr(outer, name):
            yield f"{name}: {value}"
    for one in node.own:
        if isinstance(one, Subset):
            yield f"subset: {one.start} to {one.stop}"


def _notes(node: Node, folder: str) -> Iterator[str]:
    for using in node.own:
        if isinstance(using, Using):
            if using.subflavors:
                yield f"subflavors: {describe(dict(using.subflavors), 10_000)}"
            for name, url in using.aux.items():
                scheme, sign, path = url.rpartition("://")
                yield f"aux {name}: {scheme}{sign}{seen_from(folder, path)}"
