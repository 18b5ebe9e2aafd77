"""How values look on a terminal: short texts, sizes, small pictures.

What is shown comes from data, so control characters never reach the terminal as they are.
"""

from __future__ import annotations

import json
import os
import shutil
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps

HALF_BLOCK = "▀"


def columns() -> int:
    """The terminal's width in characters.

    >>> columns() >= 20
    True
    """
    return max(20, shutil.get_terminal_size().columns)


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


def counted(count: int, thing: str) -> str:
    """A number of things.

    >>> counted(1, "sample"), counted(1200, "sample")
    ('1 sample', '1,200 samples')
    """
    return f"{count:,} {thing}{'s' * (count != 1)}"


def seen_from(folder: str, path: str) -> str:
    """The path as it is seen from a folder that it is in; else as it is.

    >>> seen_from("/data", "/data/cats/0.tar"), seen_from("/data", "/home/cats")
    ('cats/0.tar', '/home/cats')
    """
    inner = os.path.relpath(path, folder)
    return path if inner.startswith("..") else inner


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


def describe(value: Any, width: int) -> str:
    """What a part or field holds, on one line of at most ``width`` columns.

    >>> describe(torch.linspace(0, 1, 12).reshape(3, 2, 2), 60)
    'float32 (3, 2, 2), 0..1'
    >>> describe("a cat", 60), describe(b"...", 60), describe([1, 2], 60), describe(None, 60)
    ('a cat', '3 bytes', '[1, 2]', 'None')
    """
    return shorten(_text(value, width), width)


def _text(value: Any, width: int) -> str:
    if isinstance(value, str):
        return value or '""'
    if isinstance(value, bytes | bytearray):
        return size(len(value))
    if isinstance(value, Image.Image):
        return f"picture {value.mode} {value.width} x {value.height}"
    if isinstance(value, torch.Tensor):
        name = str(value.dtype).removeprefix("torch.")
        return f"{name} {tuple(value.shape)}{_range(value.detach().cpu())}"
    if isinstance(value, np.ndarray):
        numbers = torch.from_numpy(value) if value.dtype.kind in "biuf" else None
        return f"{value.dtype} {value.shape}" + ("" if numbers is None else _range(numbers))
    if not isinstance(value, Mapping | Sequence):
        return repr(value)
    try:
        plain = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):  # tensors in a list, say
        plain = ""
    if plain and len(plain) <= width:
        return plain
    if isinstance(value, Mapping):
        return plain or f"{len(value)} entries: {', '.join(map(str, value))}"
    inside = ", ".join(_text(one, width) for one in value[:4])
    return f"{len(value)} values: {inside}{', …' if len(value) > 4 else ''}"


def _range(numbers: torch.Tensor) -> str:
    if not numbers.numel() or numbers.is_complex():
        return ""
    if numbers.numel() == 1:
        return f", {numbers.item():.3g}"
    values = numbers if numbers.is_floating_point() else numbers.long()
    return f", {values.min().item():.3g}..{values.max().item():.3g}"


def picture_of(value: Any) -> Image.Image | None:
    """The value as an RGB picture, if it is one: a PIL image, or a tensor (C, H, W) in 0..1.

    >>> picture_of(torch.ones(3, 8, 16)).size
    (16, 8)
    >>> picture_of("a cat") is None
    True
    """
    if isinstance(value, Image.Image):
        return value.convert("RGB")
    if not isinstance(value, torch.Tensor) or value.ndim != 3 or min(value.shape[1:]) < 4:
        return None
    if value.shape[0] not in (1, 3) or not value.is_floating_point():
        return None
    planes = value.detach().cpu().float().nan_to_num().clamp(0, 1).expand(3, -1, -1)
    pixels: NDArray[np.uint8] = (planes * 255).round().byte().permute(1, 2, 0).numpy()
    return Image.fromarray(pixels)


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
