"""``toolz.pipe`` as a type checker and an IDE understand it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, overload

import toolz

A = TypeVar("A")
B = TypeVar("B")
C = TypeVar("C")
D = TypeVar("D")
E = TypeVar("E")
F = TypeVar("F")
G = TypeVar("G")


@overload
def pipe(data: A, f: Callable[[A], B], /) -> B: ...
@overload
def pipe(data: A, f: Callable[[A], B], g: Callable[[B], C], /) -> C: ...
@overload
def pipe(data: A, f: Callable[[A], B], g: Callable[[B], C], h: Callable[[C], D], /) -> D: ...
@overload
def pipe(
    data: A,
    f: Callable[[A], B],
    g: Callable[[B], C],
    h: Callable[[C], D],
    i: Callable[[D], E],
    /,
) -> E: ...
@overload
def pipe(
    data: A,
    f: Callable[[A], B],
    g: Callable[[B], C],
    h: Callable[[C], D],
    i: Callable[[D], E],
    j: Callable[[E], F],
    /,
) -> F: ...
@overload
def pipe(
    data: A,
    f: Callable[[A], B],
    g: Callable[[B], C],
    h: Callable[[C], D],
    i: Callable[[D], E],
    j: Callable[[E], F],
    k: Callable[[F], G],
    /,
) -> G: ...
@overload
def pipe(data: Any, /, *functions: Callable[[Any], Any]) -> Any: ...
def pipe(data: Any, /, *functions: Callable[[Any], Any]) -> Any:
    """Give ``data`` to the first function, what that gives to the next, and so on.

    It is :func:`toolz.pipe` with types: what comes out of up to six functions is known.

    >>> from energon_fn import batch, encode_sample
    >>> pipe(range(5), encode_sample(lambda n: n * n), batch(2, list), list)
    [[0, 1], [4, 9], [16]]
    """
    return toolz.pipe(data, *functions)
