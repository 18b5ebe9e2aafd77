"""What a terminal shows: its width, paths as they are seen from a folder, small pictures."""

from __future__ import annotations

import os
import shutil
from typing import TextIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

HALF_BLOCK = "▀"


def columns() -> int:
    """The terminal's width in characters.

    >>> columns() >= 20
    True
    """
    return max(20, shutil.get_terminal_size().columns)


def seen_from(folder: str, path: str) -> str:
    """The path as it is seen from a folder that it is in; else as it is.

    >>> seen_from("/data", "/data/cats/0.tar"), seen_from("/data", "/home/cats")
    ('cats/0.tar', '/home/cats')
    """
    inner = os.path.relpath(path, folder)
    return path if inner.startswith("..") else inner


def can_draw(stream: TextIO) -> bool:
    """Whether pictures can be drawn there: a terminal with colours (NO_COLOR is respected).

    >>> import io
    >>> can_draw(io.StringIO())
    False
    """
    try:
        HALF_BLOCK.encode(stream.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def half_blocks(picture: Image.Image, width: int, height: int) -> list[str]:
    """Lines that draw the picture in 24-bit colours, at most ``width`` by ``height`` characters.

    A character is twice as high as wide, so it shows two pixels: the upper in the colour of the
    half block, the lower in that behind it.

    >>> half_blocks(Image.new("RGB", (20, 20), "red"), 2, 1)
    ['\\x1b[38;2;255;0;0;48;2;255;0;0m▀▀\\x1b[0m']
    """
    small = ImageOps.contain(picture.convert("RGB"), (width, 2 * height))
    pixels: NDArray[np.uint8] = np.asarray(small)
    if len(pixels) % 2:
        pixels = np.concatenate([pixels, pixels[-1:]])
    return [_line(*pair) for pair in pixels.reshape(-1, 2, *pixels.shape[1:]).tolist()]


def _line(upper: list[list[int]], lower: list[list[int]]) -> str:
    text, before = "", None
    for (r, g, b), (r2, g2, b2) in zip(upper, lower, strict=True):
        colours = f"\x1b[38;2;{r};{g};{b};48;2;{r2};{g2};{b2}m"
        text += (colours if colours != before else "") + HALF_BLOCK
        before = colours
    return text + "\x1b[0m"
