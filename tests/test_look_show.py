"""``show``: what is drawn of batches and samples, and where."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageChops

from energon_fn import Batch, Lazy, OCRSample, VQAOCRSample, edataclass, show
from energon_fn.av import AVDecoder
from energon_fn.look import show as showing
from energon_fn.look.inside import batch_size, pictures_in, samples_in
from energon_fn.look.show import png

COLORS = [(250, 8 * i, 7) for i in range(30)]


def plain(color: tuple[int, int, int], size: tuple[int, int] = (8, 8)) -> torch.Tensor:
    """A picture (3, h, w) of one colour, uint8."""
    return torch.tensor(color, dtype=torch.uint8)[:, None, None].expand(3, *size)


def place_of(image: Image.Image, color: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of what has the colour."""
    found = np.all(np.asarray(image) == color, axis=2)
    rows, columns = np.flatnonzero(found.any(1)), np.flatnonzero(found.any(0))
    assert len(rows), f"there is nothing of the colour {color}"
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


@edataclass
class PictureBatch(Batch):
    images: Any
    texts: list[str]


class Pair(NamedTuple):
    images: Any
    texts: list[str]


@dataclass
class Plain:
    images: Any
    texts: list[str]


class Attributes:
    def __init__(self, images: Any, texts: list[str]):
        self.images, self.texts = images, texts


@given(st.integers(1, 14))
@settings(deadline=None, max_examples=8)
def test_every_picture_of_a_batch_is_there_in_order(number: int) -> None:
    batch = {
        "__key__": [f"{i}" for i in range(number)],
        "image": torch.stack([plain(color) for color in COLORS[:number]]),
    }
    image = show(batch)
    places = [place_of(image, color) for color in COLORS[:number]]
    assert [(top, left) for left, top, _, _ in places] == sorted(
        (top, left) for left, top, _, _ in places
    )


def test_the_nth_picture_goes_with_the_nth_text(monkeypatch: pytest.MonkeyPatch) -> None:
    sheets: list[Any] = []
    monkeypatch.setattr(
        showing,
        "contact_sheet",
        lambda pictures, captions, **_: sheets.append((pictures, captions)) or pictures[0],
    )
    pictures = [plain(color, (8, 8 + i)) for i, color in enumerate(COLORS[:5])]
    texts = ["one", "two", "three", "four", "five"]
    keys = list("abcde")
    same = torch.stack([picture[:, :, :8] for picture in pictures])
    for batch in (
        PictureBatch(__key__=keys, images=same, texts=texts),
        PictureBatch(__key__=keys, images=pictures, texts=texts),
        {"images": same.float() / 255, "texts": texts},
        Pair(pictures, texts),
        Plain(same, texts),
        Attributes([Image.fromarray(p.permute(1, 2, 0).numpy()) for p in pictures], texts),
        [{"image": picture, "text": text} for picture, text in zip(pictures, texts, strict=True)],
        iter([Plain(same[:2], texts[:2]), Plain(same[2:], texts[2:])]),
    ):
        show(batch)
        drawn, captions = sheets.pop()
        assert captions == texts
        middles = [one.getpixel((one.width // 2, one.height // 2)) for one in drawn]
        assert middles == COLORS[:5]


def test_numbers_go_with_their_sample_and_tensors_are_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said: list[Any] = []
    monkeypatch.setattr(showing, "headed", lambda sheet, lines, _: said.append(lines) or sheet)
    monkeypatch.setattr(
        showing,
        "contact_sheet",
        lambda pictures, captions, **_: said.append(captions) or pictures[0],
    )
    images = torch.stack([plain(color) for color in COLORS[:2]])
    batch = {"__key__": ["a", "b"], "images": images, "label": torch.tensor([7, 9])}
    batch["tokens"] = torch.tensor([[1, 2, 3], [4, 5, 6]])
    show(batch)
    assert said.pop() == [
        "dict 'a' .. 'b' (2)",
        "images: uint8 (2, 3, 8, 8) 0..250",
        "label: int64 (2,) 7..9",
        "tokens: int64 (2, 3) 1..6",
    ]
    assert said.pop() == ["label: 7", "label: 9"]
    show([{"image": images[0], "tokens": torch.tensor([1, 2])}, {"__key__": "k", "i": images[1]}])
    assert said == [["tokens: int64 (2,) 1..2", "k"]]


def test_keys_tell_a_batch_and_lengths_where_there_are_none() -> None:
    frames = torch.rand(5, 3, 8, 8)
    for sample in (
        {"__key__": "a", "images": list(frames), "texts": ["x"] * 5},
        {"image": frames[0], "answers": ["yes", "no"], "weights": torch.ones(2)},
        {"video": frames, "question": "which?"},
        {"tokens": torch.arange(7)},
        {"__key__": ["a", "b"], "tokens": torch.arange(7)},  # a pack
    ):
        assert batch_size(sample) is None
        assert list(samples_in(sample)) == [sample]
    for batch in (
        {"__key__": list("abcde"), "tokens": torch.ones(5, 2)},
        {"images": frames},
        {"images": list(frames), "name": "shapes", "texts": ["x"] * 5},
        {"texts": ["x"] * 5},
    ):
        assert batch_size(batch) == 5
        assert len(list(samples_in(batch))) == 5
    loose = {"__key__": ["a", "b"], "texts": ["x", "y"], "images": frames}
    assert [list(sample) for sample in samples_in(loose)] == [
        ["__key__", "texts"], ["__key__", "texts"], ["images"],
    ]  # fmt: skip


@pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.bfloat16])
def test_normalised_floats_are_scaled_alike_and_it_is_said(
    kind: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(showing, "headed", lambda sheet, lines, _: said.extend(lines) or sheet)
    images = torch.tensor([-2.0, -1.0, 1.0, 2.0]).to(kind)[:, None, None, None].expand(4, 3, 8, 8)
    sheet = show({"images": images})
    assert "images: scaled from -2..2 to be seen" in said
    for gray in (0, 64, 191):
        place_of(sheet, (gray, gray, gray))
    said.clear()
    place_of(show({"images": images.clamp(0.25, 1.05)}), (64, 64, 64))
    assert not any("scaled" in line for line in said)


def test_boxes_are_drawn_where_they_are_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    words = torch.tensor([[20, 40, 60, 10], [0, 0, 0, 0]])
    sample = VQAOCRSample(
        __key__="a", image=torch.ones(3, 100, 200), context="?", text="word", words_boxes=words
    )
    bare = VQAOCRSample(__key__="a", image=torch.ones(3, 100, 200), context="?", text="word")
    cells = [show([one], cell=400) for one in (sample, bare)]
    left, top, right, bottom = place_of(cells[0], (0, 0, 255))
    assert (right - left, bottom - top) == (121, 21)  # twice as large, edges included
    assert left == 400 // 14 + 40
    with pytest.raises(AssertionError, match="nothing of the colour"):
        place_of(cells[1], (0, 0, 255))
    page = OCRSample(
        __key__="b",
        image=torch.ones(3, 100, 200),
        text="words",
        block_boxes=torch.tensor([[10.0, 10, 180, 80, 0.9]]),
        lines_boxes=torch.tensor([[20.0, 20, 100, 10]]),
        words_boxes=torch.tensor([20.0, 20, 100, 10]),  # of no known shape
    )
    said: list[str] = []
    monkeypatch.setattr(showing, "headed", lambda sheet, lines, _: said.extend(lines) or sheet)
    drawn = show(page)
    assert said[-1] == "drawn: block_boxes red, lines_boxes orange"
    outer, inner = place_of(drawn, (255, 0, 0)), place_of(drawn, (255, 165, 0))
    assert outer[0] < inner[0] < inner[2] < outer[2]
    with pytest.raises(AssertionError, match="nothing of the colour"):
        place_of(drawn, (0, 0, 255))
    with pytest.raises(AssertionError, match="nothing of the colour"):  # on which of the two?
        place_of(show({**vars(page), "image": [page.image] * 2}), (255, 0, 0))


def test_a_text_has_the_cell_where_there_is_no_picture() -> None:
    batch = {"__key__": ["a", "b"], "text": ["It was a dark night. " * 9, "x"], "n": torch.ones(2)}
    sheet = show(batch)
    ink = np.asarray(sheet.convert("L")) < 128
    left, right = ink[:, : sheet.width // 2], ink[:, sheet.width // 2 :]
    assert left.sum() > 3 * right.sum() > 0
    assert show([{"tokens": torch.arange(5)}]).width > 0


def test_no_more_is_taken_than_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []

    def endless() -> Iterator[dict[str, Any]]:
        for i in count():
            taken.append(i)
            yield {"image": plain(COLORS[i % 30]), "text": str(i)}

    show(endless(), limit=5)
    assert taken == [0, 1, 2, 3, 4]
    batch = {"images": torch.rand(30, 3, 8, 8), "texts": ["a"] * 30}
    assert show(batch, limit=8).height < show(batch).height
    said: list[Any] = []
    monkeypatch.setattr(showing, "headed", lambda sheet, lines, _: said.append(lines) or sheet)
    show(batch, limit=8)
    show(batch)
    show([batch["images"][0]] * 9, limit=8)
    assert (said[0][-1], said[2:]) == ("the first 8 of 30", [["the first 8 of 9"]])
    assert not any("the first" in line for line in said[1])


def test_a_sample_with_many_pictures_shows_some_in_one_cell() -> None:
    video = torch.stack([plain(color) for color in COLORS[:18]])
    sheet = show({"__key__": "a", "video": video, "context": "What is it?"})
    shown = [i for i in range(18) if np.all(np.asarray(sheet) == COLORS[i], axis=2).any()]
    assert shown == list(range(0, 18, 2))
    nested = {"clips": {"a": [video[:2], "text"], "b": Plain([Image.new("L", (4, 4))], [])}}
    assert len(list(pictures_in(nested))) == 3


def test_a_lazy_is_left_alone() -> None:
    def fetch() -> Any:
        raise AssertionError("who asked for it?")

    assert show([{"image": Lazy("a.jpg", fetch), "text": "a"}]).width > 0
    assert png({"image": Lazy("a.jpg", fetch)}) is None


def test_one_value_is_a_sample() -> None:
    picture = Image.new("RGB", (9, 9), COLORS[3])
    place_of(show(picture), COLORS[3])
    assert ImageChops.difference(show([picture]), show(picture)).getbbox() is None
    for value in ("a text", torch.arange(5), object(), 7):
        assert show(value).width > 0


@pytest.mark.parametrize("nothing", [[], iter(()), {"__key__": [], "texts": []}])
def test_where_there_is_nothing_to_show(nothing: Any) -> None:
    if isinstance(nothing, dict):
        assert list(samples_in(nothing)) == []
    with pytest.raises(ValueError, match=r"no samples in the (list|dict|tuple_iterator)"):
        show(nothing)


def test_a_notebook_shows_pictures_and_of_texts_nothing_but_texts() -> None:
    batch = PictureBatch(__key__=["a"], images=torch.rand(1, 3, 8, 8), texts=["a"])
    data = png(batch)
    assert data is not None
    with Image.open(io.BytesIO(data)) as picture:
        assert picture.format == "PNG"
    assert png({"__key__": ["a"], "texts": ["a"]}) is None


def test_a_notebook_shows_the_text_where_drawing_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **options: Any) -> Any:
        raise RuntimeError("no font")

    monkeypatch.setattr(showing, "contact_sheet", fail)
    assert png({"image": plain(COLORS[0])}) is None


def test_frames_of_a_video_are_shown() -> None:
    av = pytest.importorskip("av")
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for level in range(0, 200, 10):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), level, np.uint8))
            container.mux(list(stream.encode(frame)))
        container.mux(list(stream.encode()))
    levels = [float(frame.float().mean()) for frame in pictures_in(AVDecoder(file))]
    assert levels == pytest.approx([0, 20, 40, 60, 80, 110, 130, 150, 170], abs=8)
    assert list(pictures_in([AVDecoder(io.BytesIO(b"no video"))])) == []
