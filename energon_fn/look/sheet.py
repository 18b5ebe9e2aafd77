"""Contact sheets: many pictures with their texts, on one picture.

A picture is a PIL image, a tensor (C, H, W) or (H, W), or an array (H, W, C) or (H, W).
"""

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
MAX_LINES = 3  # of a caption; more where the cells are large

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
    or float in 0..1; C is 1, 3 or 4. ``None`` leaves its cell empty. A batch of pictures in one
    tensor will do, too. Captions wrap to three lines, or a few more in large cells, and end in an
    ellipsis where they do not fit. Pillow's built-in font has no accents, they are left out, and no
    other scripts than Latin, these show as boxes. Returns an RGB image.

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
    gap, padding = cell // 14, cell // 24
    font, line_height = _font(cell)
    most = max(MAX_LINES, cell // 64)
    lines = [list(_wrap(caption, font, cell - 2 * padding, most)) for caption in captions]
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
                fitted = fit(_as_image(picture, i), cell)
                corner = (cell - fitted.width) // 2, (cell - fitted.height) // 2
                sheet.paste(fitted, (left + corner[0], top + corner[1]))
            for number, line in enumerate(lines[i]):
                place = (left + padding, top + cell + padding + number * line_height)
                draw.text(place, line, INK, font)
        top += height + gap
    return sheet


def headed(sheet: Image.Image, lines: Sequence[str], margin: int) -> Image.Image:
    """The sheet with lines of text above it, each cut where the sheet ends.

    >>> headed(Image.new("RGB", (300, 9)), ["12 samples"], margin=5).width
    300
    """
    font, line_height = _font(224)
    top = margin + line_height * len(lines)
    page = Image.new("RGB", (sheet.width, top + sheet.height), PAGE)
    page.paste(sheet, (0, top))
    draw = ImageDraw.Draw(page)
    for number, line in enumerate(lines):
        for words in _wrap(line, font, sheet.width - 2 * margin, 1):
            draw.text((margin, margin + number * line_height), words, INK, font)
    return page


def text_page(paragraphs: Sequence[str], cell: int) -> Image.Image:
    """A square of ``cell`` pixels full of text, for a sample that has no picture.

    >>> text_page(["a poem", "of two paragraphs"], 224).size
    (224, 224)
    """
    font, line_height = _font(cell)
    page = Image.new("RGB", (cell, cell), MAT)
    draw = ImageDraw.Draw(page)
    top = padding = cell // 24
    for paragraph in paragraphs:
        room = (cell - padding - top) // line_height
        for line in _wrap(paragraph, font, cell - 2 * padding, room):
            draw.text((padding, top), line, INK, font)
            top += line_height
        top += line_height // 3
    return page


def _font(cell: int) -> tuple[ImageFont.FreeTypeFont, int]:
    """The font that fits such cells, and the height of a line."""
    size = min(max(11, cell // 16), 16)
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)  # as it is whenever a size is asked for
    return font, round(size * 1.35)


def is_picture(value: Any) -> bool:
    """Whether it looks like a picture: a PIL image, or a tensor or array of fitting shape and type.

    Floats have three dimensions: those of two are seldom pictures.

    >>> is_picture(torch.ones(3, 8, 16)), is_picture(torch.ones(8, 16)), is_picture("a cat")
    (True, False, False)
    """
    if isinstance(value, torch.Tensor) and not value.is_meta:
        shape, is_float = tuple(value.shape), value.is_floating_point()
        shape = (*shape[1:], shape[0]) if len(shape) == 3 else shape
        is_byte = value.dtype == torch.uint8
    elif isinstance(value, np.ndarray):
        shape, is_float, is_byte = value.shape, value.dtype.kind == "f", value.dtype == np.uint8
    else:
        return isinstance(value, Image.Image)
    if len(shape) == 3:
        return (is_float or is_byte) and shape[2] in (1, 3, 4) and min(shape[:2]) >= 4
    return is_byte and len(shape) == 2 and min(shape) >= 4


def picture_of(value: Any) -> Image.Image | None:
    """The value as an RGB image, if it looks like a picture; floats are taken to be in 0..1.

    >>> picture_of(torch.ones(3, 8, 16)).size, picture_of("a cat")
    ((16, 8), None)
    """
    return _as_image(value, 0) if is_picture(value) else None


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


def fit(picture: Image.Image, cell: int) -> Image.Image:
    """As large as fits a square of ``cell`` pixels. Where that is much, pixels stay squares."""
    tiny = 3 * max(picture.size) <= cell
    method = Image.Resampling.NEAREST if tiny else Image.Resampling.LANCZOS
    return ImageOps.contain(picture, (cell, cell), method)


def _wrap(
    text: str, font: ImageFont.FreeTypeFont, width: int, max_lines: int = MAX_LINES
) -> Iterator[str]:
    """The lines of a caption: broken between words, and inside one that is longer than a line."""

    def fitting(line: str) -> int:
        """How many of its characters fit."""
        return bisect(range(len(line)), False, key=lambda n: font.getlength(line[: n + 1]) > width)

    rest = " ".join(_drawable(text[: 300 * max(max_lines, 1)]).split())  # more never fits
    for number in range(1, max_lines + 1):
        end = max(1, fitting(rest))
        if end >= len(rest):
            if rest:
                yield rest
            return
        if number == max_lines:
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
