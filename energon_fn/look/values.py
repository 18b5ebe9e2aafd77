"""Values in a few words: types, shapes, ranges, short texts, sizes.

What is shown comes from data, so control characters never come through as they are.
"""

from __future__ import annotations

import dataclasses
import json
import os
import unicodedata
from collections.abc import Iterable, Mapping, Sequence, Set
from itertools import islice
from typing import Any

import numpy as np
import torch
from PIL import Image

WIDTH = 100
"""Columns of a line of what :func:`brief` gives."""
MAX_FIELDS = 20
"""Fields that it tells of."""
MAX_NUMBERS = 2**23
"""Numbers of a tensor that are looked at for their range: some milliseconds' worth."""


def one_line(text: str) -> str:
    """The text without line breaks and other characters that move the cursor or change colours.

    >>> one_line("two\\nlines \\x1b[31m")
    'two lines \\ufffd[31m'
    """
    spaced = " ".join(text.split())
    return "".join(char if _harmless(char) else "\ufffd" for char in spaced)


def _harmless(char: str) -> bool:
    # Cc: control, Cs: lone surrogates; the rest turns the direction of writing.
    return unicodedata.category(char) not in ("Cc", "Cs") and not (
        "\u202a" <= char <= "\u202e" or "\u2066" <= char <= "\u2069"
    )


def shorten(text: str, width: int) -> str:
    """The text on one line of at most ``width`` columns, an ellipsis where it was cut.

    >>> shorten("a pink circle on a navy background", 16)
    'a pink circle o…'
    >>> shorten("日本語", 5), shorten("日本語", 6)
    ('日本…', '日本語')
    """
    text = one_line(text[: 4 * max(width, 0) + 16])  # no use in looking at all of a book
    used, fits = 0, 0
    for place, char in enumerate(text):
        used += _char_width(char)
        if used > width:
            return text[:fits] + "…"
        if used < width:
            fits = place + 1
    return text


def _char_width(char: str) -> int:
    if unicodedata.combining(char):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


def seen(path: str) -> str:
    """The path as it is seen from the current folder, if it is in there.

    >>> seen(os.path.abspath("data/cats")), seen("/somewhere/else")
    ('data/cats', '/somewhere/else')
    """
    near = os.path.relpath(path)
    return path if near.startswith("..") else near


def counted(count: int, thing: str) -> str:
    """A number of things.

    >>> counted(1, "sample"), counted(1200, "sample")
    ('1 sample', '1,200 samples')
    """
    return f"{count:,} {thing}{'s' * (count != 1)}"


def size(count: int) -> str:
    """A number of bytes in a readable unit.

    >>> size(999), size(52_300), size(1_500_000_000)
    ('999 bytes', '52 kB', '1.5 GB')
    """
    if count < 1000:
        return f"{count} byte" + "s" * (count != 1)
    power = next((n for n in range(1, 5) if count < 999.5 * 1000**n), 5)
    value = count / 1000**power
    return f"{value:.{1 if value < 9.95 else 0}f} {' kMGTP'[power]}B"


def fields_of(value: Any) -> dict[str, Any] | None:
    """The fields by name of what has some: a dict, a dataclass or namedtuple, any other object.

    None for what is one value, or is there to be iterated over. A declared field that is not set is
    left out.

    >>> fields_of({"image": None}), fields_of([1, 2]), fields_of("a cat")
    ({'image': None}, None, None)
    """
    if isinstance(value, Mapping):
        return {str(name): value[name] for name in value}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return dict(zip(value._fields, value, strict=True))
    if isinstance(value, torch.Tensor | np.ndarray | Image.Image | type):
        return None
    own = dict(getattr(value, "__dict__", {}))
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value)]
        return {name: getattr(value, name) for name in names if hasattr(value, name)} | own
    return own if own and not isinstance(value, Iterable) and not callable(value) else None


def brief(item: Any) -> str:
    """The type, the keys and, for each field, what :func:`describe` says: one line, or a few.

    It is quick for a large batch, too, and raises nothing: it may be asked for in an error message
    or a debugger. Bookkeeping fields other than the keys are left out.

    >>> brief({"__key__": "cats/7", "image": torch.ones(3, 8, 8), "text": "a cat"})
    "dict('cats/7', image: float32 (3, 8, 8) 1, text: 'a cat')"
    """
    head, keys, fields = told(item)
    line, lines = (f"{head}({gap.join(keys + fields)})" for gap in (", ", ",\n  "))
    return line if _columns(line) <= WIDTH else lines


def told(item: Any) -> tuple[str, list[str], list[str]]:
    """The same piece by piece: the type's name, the keys if there are any, the fields.

    >>> told({"__key__": ["a", "b"], "text": ["a cat", "a dog"], "image": None})
    ('dict', ["'a' .. 'b' (2)"], ['text: ["a cat", "a dog"]', 'None: image'])
    """
    try:
        fields = fields_of(item) or {}
    except Exception:  # a property of the user's may do anything
        fields = {}
    keys = _keys(fields.get("__key__", fields.get("__keys__")))
    parts = []
    data = [(name, value) for name, value in fields.items() if not name.startswith("__")]
    for name, value in data[:MAX_FIELDS]:
        if value is not None:
            start = shorten(name, WIDTH // 3) + ": "
            parts.append(start + _described(value, WIDTH - 4 - _columns(start), quoted=True))
    if missing := [name for name, value in data[:MAX_FIELDS] if value is None]:
        parts.append(shorten(f"None: {', '.join(missing)}", WIDTH - 4))
    if len(data) > MAX_FIELDS:
        parts.append(f"and {len(data) - MAX_FIELDS} more")
    return type(item).__name__, keys, parts


def _columns(text: str) -> int:
    return sum(map(_char_width, text))


def _keys(keys: Any) -> list[str]:
    """One key, or the first and the last one and how many there are; nothing if there are none."""
    if isinstance(keys, list | tuple):
        ends = [_described(key, WIDTH // 3, quoted=True) for key in (*keys[:1], *keys[1:][-1:])]
        return [" .. ".join(ends) + (f" ({len(keys)})" if len(keys) > 1 else "")] if ends else []
    return [] if keys is None else [_described(keys, 2 * WIDTH // 3, quoted=True)]


def describe(value: Any, width: int) -> str:
    """What a part or field holds, on one line of at most ``width`` columns.

    Never the numbers of a tensor, but their range; ``~`` says that it is that of a sample of them.

    >>> describe(torch.linspace(0, 1, 12).reshape(3, 2, 2), 60)
    'float32 (3, 2, 2) 0..1'
    >>> describe("a cat", 60), describe(b"...", 60), describe([1, 2], 60), describe(None, 60)
    ('a cat', '3 bytes', '[1, 2]', 'None')
    """
    return _described(value, width, quoted=False)


def _described(value: Any, width: int, quoted: bool) -> str:
    if isinstance(value, str) and value:
        return f"'{shorten(value, width - 2)}'" if quoted else shorten(value, width)
    try:
        return shorten(_text(value, width, 0), width)
    except Exception:  # from the value's own methods
        return shorten(f"<{type(value).__name__}>", width)


def _text(value: Any, width: int, depth: int) -> str:
    if isinstance(value, str):
        return f"'{shorten(value, width)}'" if value else '""'
    if isinstance(value, bytes | bytearray):
        return size(len(value))
    if isinstance(value, Image.Image):
        return f"picture {value.mode} {value.width} x {value.height}"
    if isinstance(value, torch.Tensor | np.ndarray):
        name = str(value.dtype).removeprefix("torch.")
        return f"{name} {tuple(value.shape)} {_range(value)}".rstrip()
    is_mapping = isinstance(value, Mapping)
    is_list = isinstance(value, Sequence | Set) and not isinstance(value, range | memoryview)
    if not (is_mapping or is_list or dataclasses.is_dataclass(value)) or depth > 3:
        return repr(value) if depth <= 3 else f"<{type(value).__name__}>"
    plain = _json(value, width) if is_mapping or is_list else ""
    if plain and (is_mapping or len(plain) <= width):
        return plain
    fields = fields_of(value)
    if fields is None:
        inside = [_text(one, width, depth + 1) for one in islice(value, 4)]
        return f"{len(value)} values: {', '.join(inside)}{', …' if len(value) > 4 else ''}"
    inside = [f"{name}: {_text(fields[name], width, depth + 1)}" for name in islice(fields, 4)]
    more = ", …" if len(fields) > 4 else ""
    start = f"{len(fields)} entries: " if is_mapping else f"{type(value).__name__}: "
    return f"{start}{', '.join(inside)}{more}"


def _json(value: Any, width: int) -> str:
    """As JSON, no more than is needed to fill the line; empty if it is none (tensors, say)."""
    text = ""
    try:
        for piece in json.JSONEncoder(ensure_ascii=False).iterencode(value):
            text += piece
            if len(text) > width:
                break
    except (TypeError, ValueError):
        return ""
    return text


def _range(values: Any) -> str:
    """From the least to the greatest number of a tensor or array; empty where there is no order."""
    mark = nan = ""
    try:
        values = values.detach() if isinstance(values, torch.Tensor) else values
        while np.prod(values.shape) > MAX_NUMBERS:
            outer = next(axis for axis, length in enumerate(values.shape) if length > 1)
            values = values[(slice(None),) * outer + (slice(None, None, 2),)]
            mark = "~"
        ends = [values.min().item(), values.max().item()]
        if ends[0] != ends[0]:
            values, nan = values[values == values], " and nan"
            ends = [values.min().item(), values.max().item()]
        texts = [str(end) if isinstance(end, int) else f"{float(end) + 0.0:.3g}" for end in ends]
    except Exception:  # no numbers, no order among them, no data at all
        return nan.removeprefix(" and ")
    return mark + "..".join(dict.fromkeys(texts)) + nan
