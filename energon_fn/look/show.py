"""``show``: a batch or samples on one picture, to be looked at."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from itertools import islice
from numbers import Number
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from energon_fn.look.inside import batch_size, pictures_by_field, samples_in, spread
from energon_fn.look.sheet import (
    MAT,
    Picture,
    contact_sheet,
    fit,
    headed,
    is_picture,
    picture_of,
    text_page,
)
from energon_fn.look.values import describe, fields_of, told

BOXES = {
    "block_boxes": "red",
    "lines_boxes": "orange",
    "words_boxes": "blue",
    "chars_boxes": "green",
}
"""The fields of ``OCRSample`` and ``VQAOCRSample`` that are drawn, and in which colour.

They are (n, 4) or (n, 5): x, y, width, height in pixels, and a confidence, see
https://nvidia.github.io/Megatron-Energon/basic/data_prep.html."""

IN_A_NOTEBOOK = 24
"""Samples of a batch that a notebook shows of itself."""


def show(
    data: Any, *, columns: int | None = None, cell: int | None = None, limit: int = 64
) -> Image.Image:
    """Draw a batch or samples on a contact sheet: each sample's pictures with its texts below.

    data: a batch; a sample; or an iterable of either, of which no more is taken than is shown: of
        a loader, say, which goes on behind that. Batches and samples are dicts, dataclasses,
        namedtuples or objects with fields. What has a list of keys is a batch, and without keys
        what has pictures or texts in a list or in one tensor.
    columns, cell: of the sheet, ``cell`` in pixels; by default it is about 950 pixels wide.
    limit: how many samples are shown at most.

    In a batch the n-th picture goes with the n-th text. Where there is no picture, the text has the
    cell. Tensors are told by type, shape and range. Boxes of OCR samples are drawn, and of videos
    some frames. Pictures in floats outside 0..1 are scaled, all of a field alike, and the heading
    says so. Nothing is loaded: a ``Lazy`` stays as it is. Raises ValueError if there is no sample.

    >>> samples = [{"image": torch.rand(3, 8, 8), "text": text} for text in ("a cat", "a dog")]
    >>> show(samples, cell=100).mode
    'RGB'
    """
    samples = list(islice(samples_in(data), limit))
    if not samples:
        raise ValueError(f"nothing to show: there are no samples in the {type(data).__name__}")
    columns = columns or _columns(len(samples))
    cell = cell or min(560, 896 // columns)
    fields = None if is_picture(data) else fields_of(data)
    heading = []
    if fields:
        head, keys, parts = told(data)
        heading = [" ".join([head, *keys]), *parts]
    total = batch_size(fields) if fields else len(data) if isinstance(data, list) else None
    if (total or 0) > limit:
        heading.append(f"the first {limit} of {total}")

    pictures = [pictures_by_field(sample) for sample in samples]
    ranges = _ranges(pictures)
    heading += [
        f"{name}: scaled from {low:.3g}..{high:.3g} to be seen"
        for name, (low, high) in ranges.items()
    ]
    cells, captions, drawn = [], [], set[str]()
    for sample, own in zip(samples, pictures, strict=True):
        texts, others = _words(sample, own)
        caption = ""
        if own:
            images = _images(own, ranges)
            in_cell = _mosaic(images, cell)
            if len(images) == 1:
                drawn |= _draw_boxes(in_cell, in_cell.width / images[0].width, sample)
            if (count := sum(map(len, own.values()))) > len(images):
                texts.append(f"{len(images)} of {count} pictures")
            caption = " · ".join(texts + ([] if fields else others))  # the heading tells these
        else:
            in_cell = text_page(texts + others, cell)
        cells.append(in_cell)
        captions.append(caption or str(sample.get("__key__", "")))
    if drawn:
        legend = (f"{name} {colour}" for name, colour in BOXES.items() if name in drawn)
        heading.append(f"drawn: {', '.join(legend)}")
    sheet = contact_sheet(cells, captions, columns=columns, cell=cell)
    return headed(sheet, heading, cell // 14) if heading else sheet


def png(data: Any) -> bytes | None:
    """What a notebook shows of a batch or sample: a PNG file; None where there is no picture."""
    try:
        if not any(map(pictures_by_field, islice(samples_in(data), IN_A_NOTEBOOK))):
            return None
        file = io.BytesIO()
        show(data, limit=IN_A_NOTEBOOK).save(file, "PNG")
        return file.getvalue()
    except Exception:  # then its text has to do: looking at values must not fail
        return None


def _columns(count: int) -> int:
    return min(count, 4) if count <= 12 else 6 if count <= 36 else 8


def _images(
    pictures: Mapping[str, Sequence[Picture]], ranges: Mapping[str, tuple[float, float]]
) -> list[Image.Image]:
    """A sample's pictures, or some of them where they are many."""
    flat = [(one, ranges.get(name)) for name, many in pictures.items() for one in many]
    return [_scaled(*flat[i]) for i in spread(len(flat))]


def _ranges(found: Sequence[Mapping[str, Sequence[Picture]]]) -> dict[str, tuple[float, float]]:
    """From the least to the greatest number of the fields whose pictures are floats beyond 0..1."""
    ranges: dict[str, tuple[float, float]] = {}
    for own in found:
        for name, pictures in own.items():
            for i in spread(len(pictures)):
                low, high = _extent(pictures[i])
                before = ranges.get(name, (low, high))
                ranges[name] = min(before[0], low), max(before[1], high)
    # What a resize adds at edges, a little above 1, is cut off: that needs no other brightness.
    return {name: ends for name, ends in ranges.items() if ends[0] < -0.1 or ends[1] > 1.1}


def _extent(picture: Picture) -> tuple[float, float]:
    if isinstance(picture, torch.Tensor) and picture.is_floating_point():
        picture = picture.detach().float().cpu().numpy()
    if not isinstance(picture, np.ndarray) or picture.dtype.kind != "f":
        return 0, 1
    finite = picture[np.isfinite(picture)]
    return (float(finite.min()), float(finite.max())) if finite.size else (0, 1)


def _scaled(picture: Picture, ends: tuple[float, float] | None) -> Image.Image:
    if ends is not None and _extent(picture) != (0, 1):
        assert not isinstance(picture, Image.Image)
        picture = picture.float() if isinstance(picture, torch.Tensor) else picture
        picture = (picture - ends[0]) / max(ends[1] - ends[0], 1e-9)
    image = picture_of(picture)
    assert image is not None
    return image


def _words(sample: Mapping[str, Any], pictures: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """A sample's texts and single numbers, and in a few words what else it has.

    Boxes are drawn, and their texts are pieces of the whole text.
    """
    texts: list[str] = []
    others: list[str] = []
    for name, value in sample.items():
        if name.startswith("__") or value is None or name.replace("_text", "_boxes") in BOXES:
            continue
        label = f"{name}: " if name else ""
        if isinstance(value, str):
            texts.append(value)
        elif isinstance(value, Number) or (_is_tensor(value) and not value.shape):
            texts.append(label + describe(value.tolist() if _is_tensor(value) else value, 40))
        elif isinstance(value, list | tuple) and any(isinstance(one, str) for one in value):
            texts += [one for one in value if isinstance(one, str)]
        elif name not in pictures:
            others.append(label + describe(value, 80))
    return texts, others


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor | np.ndarray)


def _mosaic(images: Sequence[Image.Image], cell: int) -> Image.Image:
    """The pictures in a square of ``cell`` pixels, or one as it fits there."""
    if len(images) == 1:
        return fit(images[0], cell)
    across = next(n for n in range(2, len(images) + 2) if n * n >= len(images))
    side = cell // across
    mosaic = Image.new("RGB", (cell, side * -(-len(images) // across)), MAT)
    for i, image in enumerate(images):
        small = fit(image, side - 2)
        left, top = i % across * side, i // across * side
        mosaic.paste(small, (left + (side - small.width) // 2, top + (side - small.height) // 2))
    return mosaic


def _draw_boxes(image: Image.Image, scale: float, sample: Mapping[str, Any]) -> set[str]:
    """Draw a sample's boxes on its picture, ``scale`` as large; the fields that had some."""
    draw, drawn = ImageDraw.Draw(image), set()
    for name, colour in BOXES.items():
        boxes = sample.get(name)
        boxes = torch.as_tensor(boxes) if isinstance(boxes, list | np.ndarray) else boxes
        if not isinstance(boxes, torch.Tensor) or boxes.ndim != 2 or boxes.shape[1] not in (4, 5):
            continue
        for x, y, width, height in (boxes[:, :4].detach().float() * scale).tolist():
            if width > 0 and height > 0:  # others fill up a batch
                draw.rectangle((x, y, x + width, y + height), outline=colour)
                drawn.add(name)
    return drawn
