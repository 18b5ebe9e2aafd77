"""What is inside a batch or sample: samples, and pictures."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import is_dataclass
from typing import Any

import numpy as np
import torch

from energon_fn.look.sheet import Picture, is_picture
from energon_fn.look.values import fields_of

AT_MOST = 9
"""Pictures of one sample that are looked at: of more, so many at equal distances."""


def samples_in(data: Any) -> Iterator[dict[str, Any]]:
    """Each sample's fields, of a batch, a sample, one value or anything to be iterated over.

    >>> list(samples_in({"__key__": ["a", "b"], "text": ["a cat", "a dog"]}))
    [{'__key__': 'a', 'text': 'a cat'}, {'__key__': 'b', 'text': 'a dog'}]
    """
    if is_picture(data) or isinstance(data, str | bytes | torch.Tensor | np.ndarray):
        yield {"": data}
    elif (fields := fields_of(data)) is None and isinstance(data, Iterable):
        for one in data:
            yield from samples_in(one)
    elif fields is None:
        yield {"": data}
    elif (count := batch_size(fields)) is None:
        yield fields
    else:
        single = {name: value for name, value in fields.items() if _length(value) == count}
        for i in range(count):
            yield {name: value[i] for name, value in single.items()}
        rest = {name: value for name, value in fields.items() if name not in single}
        if pictures_by_field(rest):  # that are no sample's own
            yield rest


def batch_size(fields: Mapping[str, Any]) -> int | None:
    """The number of samples in a batch; None if these are the fields of a sample.

    The keys tell. Without keys a batch is what has pictures or texts in a list or in one tensor,
    and either another field of that length or no single text.
    """
    keys = fields.get("__key__", fields.get("__keys__"))
    data = [value for name, value in fields.items() if not name.startswith("__")]
    lengths = [_length(value) for value in data]
    if isinstance(keys, list | tuple):
        return len(keys) if len(keys) in lengths else None
    if keys is not None or any(map(is_picture, data)):
        return None
    has_text = any(isinstance(value, str) for value in data)
    for value, length in zip(data, lengths, strict=True):
        is_many = length and (is_picture(value[0]) or isinstance(value[0], str))
        if is_many and (lengths.count(length) > 1 or not has_text):
            return length
    return None


def _length(value: Any) -> int | None:
    if isinstance(value, torch.Tensor | np.ndarray):
        return len(value) if value.ndim else None
    return len(value) if isinstance(value, list | tuple) else None


def pictures_by_field(fields: Mapping[str, Any]) -> dict[str, list[Picture]]:
    """The pictures in each field that has some."""
    found = {name: list(pictures_in(value)) for name, value in fields.items()}
    return {name: pictures for name, pictures in found.items() if pictures}


def pictures_in(value: Any, depth: int = 4) -> Iterator[Picture]:
    """The pictures in a value, however deeply: in lists, dicts, dataclasses and videos.

    >>> len(list(pictures_in({"frames": torch.rand(5, 3, 8, 8), "text": "a cat"})))
    5
    """
    if is_picture(value):
        yield value
    elif hasattr(value, "get_video_clips"):
        yield from _frames(value)
    elif isinstance(value, torch.Tensor | np.ndarray):
        if value.ndim == 4 and len(value) and is_picture(value[0]):
            yield from value
    elif depth and _holds_values(value):
        inside: Any = value if (fields := fields_of(value)) is None else fields.values()
        for one in inside:
            yield from pictures_in(one, depth - 1)


def _holds_values(value: Any) -> bool:
    is_type = isinstance(value, type)
    return isinstance(value, Mapping | list | tuple) or (is_dataclass(value) and not is_type)


def _frames(decoder: Any) -> list[Picture]:
    """Some frames of what an ``AVDecoder`` is of; none of a sound, or where it is damaged."""
    try:
        count = decoder.get_video_duration(get_frame_count=True)[1] or 0
        clips, _ = decoder.get_video_clips([(i, i) for i in spread(count)], "frames")
        return [frame for clip in clips for frame in clip]
    except Exception:  # what the package that decodes raises
        return []


def spread(count: int) -> list[int]:
    """The numbers of so many, or of some at equal distances.

    >>> spread(3), spread(90)
    ([0, 1, 2], [0, 10, 20, 30, 40, 50, 60, 70, 80])
    """
    chosen = min(count, AT_MOST)
    return [i * count // chosen for i in range(chosen)]
