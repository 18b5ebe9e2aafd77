"""Contact sheets: what is where on them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageChops, ImageFont

from energon_fn import contact_sheet
from energon_fn.look import sheet as sheets
from energon_fn.look.sheet import FRAME, MAT, PAGE

RED = (255, 0, 0)
PIXELS = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)


def boxes_of(sheet: Image.Image, color: tuple[int, int, int]) -> list[tuple[int, int, int, int]]:
    """Where the colour is: one box of its columns per row of cells."""
    found = np.all(np.asarray(sheet) == color, axis=2)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], found.any(1).astype(int), [0]])))
    return [
        (int(columns[0]), int(top), int(columns[-1]) + 1, int(bottom))
        for top, bottom in zip(edges[::2], edges[1::2], strict=True)
        for columns in [np.flatnonzero(found[top:bottom].any(0))]
    ]


@pytest.mark.parametrize(
    ("size", "fitted"), [((100, 50), (224, 112)), ((500, 1000), (112, 224)), ((7, 7), (224, 224))]
)
def test_a_picture_fits_its_cell_keeps_its_aspect_and_is_centred(
    size: tuple[int, int], fitted: tuple[int, int]
) -> None:
    sheet = contact_sheet([Image.new("RGB", size, RED)], [""])
    [(left, top, right, bottom)] = boxes_of(sheet, RED)
    assert (right - left, bottom - top) == fitted
    assert abs((left + right) - sheet.width) <= 1
    assert abs((top + bottom) - sheet.height) <= 1


@given(st.integers(1, 30), st.integers(1, 9), st.sampled_from([32, 50, 96]))
@settings(deadline=None, max_examples=25)
def test_every_picture_is_there_once_row_by_row(count: int, columns: int, cell: int) -> None:
    colors = [(255, 8 * i, 7) for i in range(count)]
    pictures = [Image.new("RGB", (3, 3), color) for color in colors]
    sheet = contact_sheet(
        pictures, [f"number {i}" for i in range(count)], columns=columns, cell=cell
    )
    places = []
    for color in colors:
        [(left, top, right, bottom)] = boxes_of(sheet, color)
        assert (right - left, bottom - top) == (cell, cell)
        places.append((top, left))
    assert places == sorted(places)
    assert len({top for top, _ in places}) == -(-count // columns)
    assert len({left for _, left in places}) == min(count, columns)


def test_all_kinds_of_pictures_show_the_same() -> None:
    chw = torch.from_numpy(PIXELS).permute(2, 0, 1)
    kinds: list[Any] = [
        Image.fromarray(PIXELS),
        Image.fromarray(PIXELS).convert("RGBA"),
        PIXELS,
        PIXELS[:, :, :].astype(np.float64) / 255,
        chw,
        chw.contiguous(),
        chw.float() / 255,
        (chw.float() / 255).requires_grad_(),
        torch.cat([chw, torch.full((1, 6, 9), 255, dtype=torch.uint8)]),
    ]
    expected = contact_sheet([Image.fromarray(PIXELS)], ["x"]).tobytes()
    for kind in kinds:
        assert contact_sheet([kind], ["x"]).tobytes() == expected
    gray = PIXELS[:, :, :1]
    expected = contact_sheet([Image.fromarray(gray[:, :, 0])], ["x"]).tobytes()
    for kind in (gray, gray[:, :, 0], torch.from_numpy(gray[:, :, 0]), chw[:1], chw[:1] / 255):
        assert contact_sheet([kind], ["x"]).tobytes() == expected


@pytest.mark.parametrize(
    ("value", "is_one"),
    [
        (torch.zeros(3, 4, 4), True),
        (torch.zeros(1, 4, 9, dtype=torch.bfloat16), True),
        (torch.zeros(4, 4, 9, dtype=torch.uint8), True),
        (torch.zeros(4, 9, dtype=torch.uint8), True),
        (np.zeros((4, 9, 3), np.uint8), True),
        (np.zeros((4, 9, 1)), True),
        (Image.new("P", (1, 1)), True),
        (torch.zeros(3, 3, 9), False),
        (torch.zeros(2, 9, 9), False),
        (torch.zeros(9, 9, 3), False),
        (np.zeros((3, 9, 9)), False),
        (torch.zeros(3, 9, 9, dtype=torch.int64), False),
        (torch.zeros(9, 9), False),
        (torch.zeros(3, 9, 9, device="meta"), False),
        (b"\xff\xd8", False),
    ],
)
def test_what_looks_like_a_picture(value: Any, is_one: bool) -> None:
    assert sheets.is_picture(value) is is_one
    assert (sheets.picture_of(value) is not None) is is_one


def test_floats_outside_0_to_1_are_clipped_and_nan_is_black() -> None:
    values = torch.tensor([-5.0, 7.0, torch.nan, torch.inf]).expand(3, 1, 4)
    clipped = torch.tensor([0.0, 1.0, 0.0, 1.0]).expand(3, 1, 4)
    assert contact_sheet([values], [""]).tobytes() == contact_sheet([clipped], [""]).tobytes()


def test_what_is_transparent_shows_white() -> None:
    glass = Image.new("RGBA", (9, 9), (255, 0, 0, 0))
    white = Image.new("RGB", (9, 9), "white")
    assert contact_sheet([glass], [""]).tobytes() == contact_sheet([white], [""]).tobytes()


def test_pictures_are_left_as_they_are() -> None:
    array, tensor = PIXELS.copy(), torch.from_numpy(PIXELS.copy()).permute(2, 0, 1) / 255
    before = tensor.clone()
    contact_sheet([array, tensor], ["", ""])
    assert np.array_equal(array, PIXELS)
    assert torch.equal(tensor, before)


def test_a_missing_picture_is_an_empty_cell_with_its_caption() -> None:
    sheet = contact_sheet([None, Image.new("RGB", (9, 9), RED)], ["lost", "red"])
    [(left, top, right, bottom)] = boxes_of(sheet, RED)
    gap = sheet.width - right
    empty = sheet.crop((gap, top, gap + right - left, bottom))
    assert empty.getcolors() == [(empty.width * empty.height, MAT)]
    below = sheet.crop((gap, bottom, left - gap, sheet.height))
    assert len(below.getcolors(9999) or ()) > 3  # text, with smooth edges


TEXTS = (
    st.text()
    | st.text("abc –é", max_size=400)
    | st.sampled_from(
        [
            "中文字符" * 30,
            "عربى हिन्दी 한국어 🎉👨‍👩‍👧",
            "\ud800 \udfff",
            "W" * 500,
            "line\nline\ttab\x00\x07",
            "a\u0301" * 90,
        ]
    )
)


@given(st.lists(TEXTS, min_size=1, max_size=6), st.sampled_from([32, 64, 224]))
@settings(deadline=None, max_examples=60)
def test_any_text_stays_inside_its_card(captions: list[str], cell: int) -> None:
    sheet = contact_sheet([None] * len(captions), captions, columns=3, cell=cell)
    bare = contact_sheet([None] * len(captions), [""] * len(captions), columns=3, cell=cell)
    assert sheet.width == bare.width
    pixels = np.asarray(sheet)
    gap = cell // 14
    for column in range(min(3, len(captions)) + 1):  # between the cards there is white paper
        left = column * (cell + gap)
        assert np.all(pixels[:, left + (column > 0) : left + gap - 1] == PAGE)
    assert np.all(pixels[-gap + 1 :] == PAGE)


@given(TEXTS, st.integers(20, 400))
@settings(deadline=None)
def test_wrapped_lines_fit_and_say_the_text_as_far_as_it_goes(text: str, width: int) -> None:
    font = ImageFont.load_default(14)
    assert isinstance(font, ImageFont.FreeTypeFont)
    lines = list(sheets._wrap(text, font, width))
    words = "".join(sheets._drawable(text).split())
    assert len(lines) <= sheets.MAX_LINES
    assert all(line == line.strip() != "" for line in lines)
    assert all(font.getlength(line) <= width for line in lines if len(line.rstrip("…")) > 1)
    said = "".join("".join(lines).split())
    assert said == words or (said.endswith("…") and words.startswith(said[:-1]))


def test_lines_break_between_words() -> None:
    font = ImageFont.load_default(14)
    assert isinstance(font, ImageFont.FreeTypeFont)
    width = int(font.getlength("two red circles and")) + 1
    text = "two red circles and a blue square on a sand background"
    assert list(sheets._wrap(text, font, width)) == [
        "two red circles and",
        "a blue square on a",
        "sand background",
    ]
    *_, last = sheets._wrap(text + " beside the sea", font, width)
    assert last.endswith("…")


def test_letters_that_the_font_lacks_lose_their_accents() -> None:
    assert sheets._drawable("Übergröße, naïve café — «été»") == "Ubergrosse, naive cafe - «ete»"
    assert sheets._drawable("中 日") == "中 日"
    assert sheets._drawable("a\x00\ud800\u200db") == "ab"


def test_a_row_is_as_high_as_its_longest_caption_needs() -> None:
    heights = [
        contact_sheet([None], [text]).height for text in ("", "one", "one " * 12, "x " * 999)
    ]
    assert heights == sorted(set(heights))
    assert contact_sheet([None] * 2, ["", "x " * 999]).height == heights[-1]


def test_hundreds_of_pictures() -> None:
    picture = torch.zeros(3, 20, 30)
    sheet = contact_sheet(
        [picture] * 300, [f"caption {i}" for i in range(300)], columns=10, cell=64
    )
    assert sheet.mode == "RGB"
    assert sheet.height > 30 * 64
    assert sheet.getpixel((sheet.width - 64 // 14, sheet.height - 64 // 14)) == FRAME


def test_it_is_deterministic_and_does_not_share_memory() -> None:
    one, two = (contact_sheet([PIXELS], ["same"]) for _ in range(2))
    assert ImageChops.difference(one, two).getbbox() is None
    assert one is not two


@pytest.mark.parametrize(
    ("pictures", "captions", "options", "error", "says"),
    [
        ([], [], {}, ValueError, "at least one picture"),
        ([None], [], {}, ValueError, "got 1 pictures and 0 captions"),
        ([None], ["a"], {"columns": 0}, ValueError, "columns=0"),
        ([None], ["a"], {"cell": 3}, ValueError, "cell=3"),
        ([None, "jpg"], ["a", "b"], {}, TypeError, "picture 1 is a str"),
        ([torch.zeros(5, 4, 4)], ["a"], {}, ValueError, r"picture 0 has the shape \(4, 4, 5\)"),
        ([torch.zeros(4)], ["a"], {}, ValueError, "picture 0 has the shape"),
        ([np.zeros((0, 4, 3))], ["a"], {}, ValueError, "picture 0 has the shape"),
        ([np.zeros((4, 4), np.int64)], ["a"], {}, ValueError, "picture 0 is of int64"),
    ],
)
def test_what_cannot_be_shown_is_named(
    pictures: Any, captions: Any, options: Any, error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        contact_sheet(pictures, captions, **options)
