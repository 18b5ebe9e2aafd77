"""Contact sheets: many pictures with their texts, on one picture."""

from __future__ import annotations

import unicodedata
from bisect import bisect
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, ImageOps

Picture = Image.Image | torch.Tensor | NDArray[Any]

PAGE = (255, 255, 255)
FRAME = (214, 217, 222)
MAT = (245, 246, 248)  # behind the picture, where it does not fill its cell
INK = (50, 54, 62)
MAX_LINES = 3

# Letters and signs that no Unicode rule leads back to what the font has: dashes, for one.
_PLAIN = dict.fromkeys((0x2010, 0x2011, 0x2012, 0x2013, 0x2014, 0x2212), "-") | str.maketrans(
    {"ß": "ss", "æ": "ae", "Æ": "AE", "œ": "oe", "Œ": "OE", "ø": "o", "Ø": "O", "ł": "l", "Ł": "L"}
)


def contact_sheet(
    pictures: Sequence[Picture | None],
    captions: Sequence[str] | None = None,
    *,
    columns: int = 4,
    cell: int = 224,
) -> Image.Image:
    """Lay pictures out in rows, each whole in a square of ``cell`` pixels, its caption below.

    A picture is a PIL image, a tensor (C, H, W) or (H, W), or an array (H, W, C) or (H, W); uint8,
    or float in 0..1; C is 1, 3 or 4. ``None`` leaves its cell empty. Captions wrap to at most three
    lines and end in an ellipsis where they do not fit. Pillow's built-in font has no accents, they
    are left out, and no other scripts than Latin, these show as boxes. Returns an RGB image.
    A batch of pictures in one tensor will do, too.

    >>> sheet = contact_sheet([Image.new("RGB", (64, 32), "teal"), None], ["a teal field", "?"])
    >>> sheet.mode, sheet.width > 2 * 224
    ('RGB', True)
    """
    captions = [""] * len(pictures) if captions is None else captions
    if len(pictures) == 0 or len(pictures) != len(captions):
        raise ValueError(
            "a contact sheet needs at least one picture and a caption for each, got "
            f"{len(pictures)} pictures and {len(captions)} captions"
        )
    if columns < 1 or cell < 32:
        raise ValueError(f"need columns >= 1 and cell >= 32, got columns={columns}, cell={cell}")
    columns = min(columns, len(pictures))
    gap, padding, size = cell // 14, cell // 24, max(11, cell // 16)
    line_height = round(size * 1.35)
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)  # as it is whenever a size is asked for

    lines = [list(_wrap(caption, font, cell - 2 * padding)) for caption in captions]
    rows = [range(i, min(i + columns, len(lines))) for i in range(0, len(lines), columns)]
    longest = [max(len(lines[i]) for i in row) for row in rows]
    heights = [cell + (n * line_height + 2 * padding if n else 0) for n in longest]
    width = gap + columns * (cell + gap)
    sheet = Image.new("RGB", (width, gap + sum(heights) + gap * len(rows)), PAGE)
    draw = ImageDraw.Draw(sheet)
    top = gap
    for row, height in zip(rows, heights, strict=True):
        for left, i in zip(range(gap, width, cell + gap), row, strict=False):
            draw.rectangle((left - 1, top - 1, left + cell, top + height), PAGE, FRAME)
            draw.rectangle((left, top, left + cell - 1, top + cell - 1), MAT)
            picture = pictures[i]
            if picture is not None:
                fitted = _fit(_as_image(picture, i), cell)
                corner = (cell - fitted.width) // 2, (cell - fitted.height) // 2
                sheet.paste(fitted, (left + corner[0], top + corner[1]))
            for number, line in enumerate(lines[i]):
                place = (left + padding, top + cell + padding + number * line_height)
                draw.text(place, line, INK, font)
        top += height + gap
    return sheet


def _as_image(picture: Any, number: int) -> Image.Image:
    """As an RGB image; what is transparent shows white."""
    if isinstance(picture, torch.Tensor):
        picture = picture.detach().cpu()
        picture = picture.float() if picture.is_floating_point() else picture  # bfloat16 too
        picture = picture.numpy()
        picture = picture.transpose(1, 2, 0) if picture.ndim == 3 else picture
    if isinstance(picture, np.ndarray):
        picture = _array_image(picture, number)
    if not isinstance(picture, Image.Image):
        raise TypeError(
            f"picture {number} is a {type(picture).__name__}: must be a PIL image, a tensor, an "
            "array or None"
        )
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, PAGE), picture)
    rgb: Image.Image = picture.convert("RGB")
    return rgb


def _array_image(array: NDArray[Any], number: int) -> Image.Image:
    """From an array (H, W, C) or (H, W)."""
    shape, channels = array.shape, array.shape[2] if array.ndim == 3 else 1
    if array.ndim not in (2, 3) or channels not in (1, 3, 4) or 0 in shape:
        raise ValueError(
            f"picture {number} has the shape {shape}, as (H, W, C): must be (H, W) or (H, W, C) "
            "with C = 1, 3 or 4, a tensor (C, H, W)"
        )
    if array.dtype.kind == "f":
        array = np.rint(np.nan_to_num(array).clip(0, 1) * 255).astype(np.uint8)
    if array.dtype != np.uint8:
        raise ValueError(f"picture {number} is of {array.dtype}: must be uint8, or float in 0..1")
    return Image.fromarray(array[:, :, 0] if array.ndim == 3 and channels == 1 else array)


def _fit(picture: Image.Image, cell: int) -> Image.Image:
    """As large as fits. Where that is much larger, the pixels stay squares."""
    tiny = 3 * max(picture.size) <= cell
    method = Image.Resampling.NEAREST if tiny else Image.Resampling.LANCZOS
    return ImageOps.contain(picture, (cell, cell), method)


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> Iterator[str]:
    """The lines of a caption: broken between words, and inside one that is longer than a line."""

    def fitting(line: str) -> int:
        """How many of its characters fit."""
        return bisect(range(len(line)), False, key=lambda n: font.getlength(line[: n + 1]) > width)

    rest = " ".join(_drawable(text[:1000]).split())  # more than that never fits
    for number in range(1, MAX_LINES + 1):
        end = max(1, fitting(rest))
        if end >= len(rest):
            if rest:
                yield rest
            return
        if number == MAX_LINES:
            while end > 1 and font.getlength(rest[:end].rstrip() + "…") > width:
                end -= 1
            yield rest[:end].rstrip() + "…"
            return
        space = rest.rfind(" ", 0, end + 1)
        end = space if space > 0 else end
        yield rest[:end].rstrip()
        rest = rest[end:].lstrip()


def _drawable(text: str) -> str:
    """In letters that the font has, as far as it goes: without accents, say."""
    plain = unicodedata.normalize("NFKD", text.translate(_PLAIN))
    return "".join(
        char
        for char in plain
        if char.isspace() or (char.isprintable() and not unicodedata.combining(char))
    )
