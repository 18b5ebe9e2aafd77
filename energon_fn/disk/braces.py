"""Names of shards in braces: ``shard_{000..099}.tar`` stands for a hundred of them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import zip_longest

from energon_fn.errors import DatasetError


def expand_braces(pattern: str) -> list[str]:
    r"""What a brace pattern stands for, in the order written; ``\{`` is a brace of the name.

    >>> expand_braces("shard_{008..010}.{a,b}.tar")[:3]
    ['shard_008.a.tar', 'shard_008.b.tar', 'shard_009.a.tar']
    """
    if not re.search(r"[{}\\]", pattern):
        return [pattern]
    from braceexpand import braceexpand

    try:
        return list(braceexpand(pattern))
    except ValueError as error:
        raise DatasetError(
            f"braces do not match in {pattern!r}: {error}. Write \\{{ for one that is part of a "
            "name."
        ) from error


def escape_braces(name: str) -> str:
    r"""The pattern that stands for this name alone.

    >>> print(escape_braces("a{b"))
    a\{b
    """
    return re.sub(r"([{}\\])", r"\\\1", name)


def collapse_braces(names: Iterable[str]) -> list[str]:
    """Write runs of consecutive numbers as one pattern; :func:`expand_braces` undoes it.

    >>> collapse_braces(["s_08.tar", "s_09.tar", "s_10.tar", "x.tar"])
    ['s_{08..10}.tar', 'x.tar']
    """
    runs: list[tuple[list[str], list[str], int]] = []  # first, last, the place that counts up
    for name in names:
        pieces = re.split(r"([0-9]+)", name)  # numbers at the odd places
        first, last, place = runs[-1] if runs else ([], [], 0)
        counting = _counting(last, pieces)
        if counting and place in (0, counting):
            runs[-1] = (first, pieces, counting)
        else:
            runs.append((pieces, pieces, 0))
    patterns = []
    for first, last, place in runs:
        pieces = [escape_braces(piece) for piece in first]
        if place:
            pieces[place] = f"{{{first[place]}..{last[place]}}}"
        patterns.append("".join(pieces))
    return patterns


def _counting(before: list[str], after: list[str]) -> int:
    """The one place where a number is one more than before, equally wide; 0 if there is none."""
    changed = [i for i, (a, b) in enumerate(zip_longest(before, after)) if a != b]
    if len(changed) != 1 or changed[0] % 2 == 0:
        return 0
    a, b = before[changed[0]], after[changed[0]]
    return changed[0] if len(a) == len(b) and int(a) + 1 == int(b) else 0
