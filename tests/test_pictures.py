"""Pictures: the same as webdataset by every decoder; small ones from large JPEGs quickly."""

from __future__ import annotations

import io
import pickle
import sys
import warnings
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from webdataset import autodecode

from energon_fn.decoding import decode_part, decoder
from energon_fn.errors import SampleError
from energon_fn.pictures import BACKENDS, IMAGE_OPTIONS, picture_decoder

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 7, 4), dtype=np.uint8)
SHOWN = [option for option in IMAGE_OPTIONS if "pil" in option]
ARRAYS = [option for option in IMAGE_OPTIONS if "pil" not in option]


def encoded(picture: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def files() -> dict[str, bytes]:
    """A file of every sort that people have: name -> bytes."""
    rgba = Image.fromarray(PIXELS)
    rgb, gray = rgba.convert("RGB"), rgba.convert("L")
    palette = rgb.quantize(16)
    sideways = Image.Exif()
    sideways[0x0112] = 6
    values = np.random.default_rng(1)
    deep = Image.fromarray(values.integers(0, 65536, (5, 7), dtype=np.uint16))
    unit = Image.fromarray(values.random((5, 7), dtype=np.float32))
    return {
        "rgb.jpg": encoded(rgb, "JPEG"),
        "gray.jpeg": encoded(gray, "JPEG"),
        "cmyk.jpg": encoded(rgb.convert("CMYK"), "JPEG"),
        "exif.jpg": encoded(rgb, "JPEG", exif=sideways),
        "progressive.jpg": encoded(rgb, "JPEG", progressive=True),
        "rgb.png": encoded(rgb, "PNG"),
        "rgb_key.png": encoded(rgb, "PNG", transparency=tuple(PIXELS[0, 0, :3].tolist())),
        "rgba.png": encoded(rgba, "PNG"),
        "gray.png": encoded(gray, "PNG"),
        "gray_alpha.png": encoded(rgba.convert("LA"), "PNG"),
        "palette.png": encoded(palette, "PNG"),
        "palette_key.png": encoded(palette, "PNG", transparency=3),
        "one_bit.png": encoded(rgb.convert("1"), "PNG"),
        "sixteen_bit.png": encoded(deep, "PNG"),
        "float.tif": encoded(unit, "TIFF"),
        "rgba.tiff": encoded(rgba, "TIFF"),
        "rgba.webp": encoded(rgba, "WEBP", lossless=True),
        "film.gif": encoded(rgb, "GIF", save_all=True, append_images=[rgb.rotate(180)]),
        "gray.gif": encoded(gray, "GIF"),
        "rgb.bmp": encoded(rgb, "BMP"),
        "rgb.ppm": encoded(rgb, "PPM"),
        "gray.pgm": encoded(gray, "PPM"),
        "bit.pbm": encoded(rgb.convert("1"), "PPM"),
        "gray.pnm": encoded(gray, "PPM"),
        "rgb.jp2": encoded(rgb, "JPEG2000"),
        "one_pixel.png": encoded(rgb.crop((0, 0, 1, 1)), "PNG"),
    }


FILES = files()


def test_image_options_are_those_of_webdataset() -> None:
    assert set(IMAGE_OPTIONS) == set(autodecode.imagespecs)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("option", IMAGE_OPTIONS)
def test_pictures_are_what_webdataset_makes_of_them(option: str, name: str) -> None:
    theirs = autodecode.imagehandler(option)(name.split(".")[1], FILES[name])
    ours = decode_part(name, FILES[name], image=option)
    assert type(ours) is type(theirs)
    if isinstance(theirs, Image.Image):
        assert (ours.mode, ours.size) == (theirs.mode, theirs.size)
        assert ours.tobytes() == theirs.tobytes()
    else:
        assert ours.dtype == theirs.dtype
        assert ours.shape == theirs.shape
        assert np.array_equal(np.asarray(ours), np.asarray(theirs))


@given(
    hnp.arrays(np.uint8, st.tuples(*3 * [st.integers(1, 9)]).map(lambda s: (*s[:2], 4))),
    st.sampled_from(list(IMAGE_OPTIONS)),
)
@settings(deadline=None, max_examples=150)
def test_a_lossless_picture_comes_back_pixel_by_pixel(
    pixels: np.ndarray[Any, np.dtype[np.uint8]], option: str
) -> None:
    mode, _, _ = IMAGE_OPTIONS[option]
    pixels = pixels[:, :, 0] if mode == "L" else pixels[:, :, : len(mode)]
    value = decode_part("png", encoded(Image.fromarray(pixels, mode), "PNG"), image=option)
    if isinstance(value, Image.Image):
        assert value.mode == mode
        assert np.array_equal(np.asarray(value), pixels)
        return
    expected = pixels if option.endswith("8") else pixels.astype(np.float32) / 255
    if option.startswith("torch"):
        assert value.is_contiguous()
        expected = expected if mode == "L" else expected.transpose(2, 0, 1)
    else:
        assert value.flags.c_contiguous
    assert str(value.dtype).removeprefix("torch.") == str(expected.dtype)
    assert np.array_equal(np.asarray(value), expected)


@pytest.mark.parametrize("option", ARRAYS)
def test_arrays_and_tensors_may_be_written_to(option: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns about tensors over read-only memory
        value = decode_part("png", FILES["rgba.png"], image=option)
        again = decode_part("png", FILES["rgba.png"], image=option)
    value[...] = 0
    assert again.max() > 0
    assert np.array_equal(again, decode_part("png", FILES["rgba.png"], image=option))


def test_torchrgb_is_the_default_also_under_another_default_dtype() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        value = decode_part("jpg", FILES["rgb.jpg"])
    finally:
        torch.set_default_dtype(torch.float32)
    assert value.dtype == torch.float32
    assert value.shape == (3, 5, 7)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("option", ["pill", "pil", "pilrgba"])
def test_pil_pictures_are_loaded_and_hold_no_file(name: str, option: str) -> None:
    picture = decode_part(name, FILES[name], image=option)
    assert type(picture) is Image.Image  # the lazy ones are subclasses that own a file
    assert getattr(picture, "fp", None) is None
    assert pickle.loads(pickle.dumps(picture)).tobytes() == picture.tobytes()


def test_the_bytes_say_which_picture_it_is() -> None:
    """Pictures from the web often bear the wrong name."""
    assert torch.equal(decode_part("jpg", FILES["rgba.png"]), decode_part("png", FILES["rgba.png"]))


@pytest.mark.parametrize("name", FILES)
def test_a_picture_cut_short_is_a_sample_error(name: str) -> None:
    data = FILES[name]
    for end in (0, 1, 10, len(data) // 2):
        with pytest.raises(SampleError, match=rf"part '{name}' \({end} bytes\)"):
            decode_part(name, data[:end])


@pytest.mark.parametrize("option", ["torchrgb", "rgb8", "pil"])
@pytest.mark.parametrize("action", ["default", "error", "ignore"])
def test_bombs_are_errors_where_pillow_only_warns_too(
    monkeypatch: pytest.MonkeyPatch, option: str, action: Any
) -> None:
    data = FILES["rgb.png"]  # 35 pixels
    for limit, fine in ((35, True), (None, True), (34, False), (18, False), (10, False)):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with warnings.catch_warnings():
            warnings.simplefilter(action)
            if fine:
                decode_part("png", data, image=option)
            else:
                with pytest.raises(SampleError, match=r"(35|7 x 5) pixels.*MAX_IMAGE_PIXELS"):
                    decode_part("png", data, image=option)


def test_postscript_dressed_up_as_a_picture_does_not_reach_ghostscript(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from PIL import EpsImagePlugin

    def run(*args: Any, **kwargs: Any) -> None:
        raise SystemExit("Ghostscript was called")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", run)
    data = encoded(Image.fromarray(PIXELS[:, :, :3]), "EPS")
    with pytest.raises(SystemExit):  # so the file is one that Pillow would run
        Image.open(io.BytesIO(data)).load()
    with pytest.raises(SampleError, match="damaged or no picture"):
        decode_part("jpg", data)


@pytest.mark.parametrize(
    ("option", "hint"), [("torchrbg", "'torchrgb'"), ("PIL", ""), ("pilRGB", "'pil"), (7, "")]
)
def test_an_unknown_option_is_refused_at_once_with_the_known_ones(option: Any, hint: str) -> None:
    with pytest.raises(ValueError, match=f"unknown image option {option!r}.*{hint}") as caught:
        decoder(option)
    assert all(known in str(caught.value) for known in IMAGE_OPTIONS)


# --- at a reduced size ----------------------------------------------------------------------------


def photo(size: tuple[int, int], seed: int = 0) -> Image.Image:
    """Something like a photo: much that is large, less that is small, down to single pixels."""
    random = np.random.default_rng(seed)
    shape = size[1], size[0], 3
    pixels = np.zeros(shape, np.float32)
    detail = 4
    while detail < 2 * max(size):
        spots = random.normal(size=(detail, detail, 3)).astype(np.float32)
        for band in range(3):
            plane = Image.fromarray(spots[:, :, band]).resize(size, Image.Resampling.BICUBIC)
            pixels[:, :, band] += np.asarray(plane) / detail
        detail *= 2
    pixels = (pixels - pixels.min()) / np.ptp(pixels) * 255
    return Image.fromarray(pixels.astype(np.uint8))


SIDES = st.integers(1, 130)


@given(SIDES, SIDES, SIDES, SIDES, st.sampled_from(["rgb8", "torchrgb8", "l8", "pil"]))
@settings(max_examples=60)
def test_no_side_becomes_smaller_than_min_size(
    width: int, height: int, least_width: int, least_height: int, option: str
) -> None:
    data = encoded(Image.effect_noise((width, height), 99).convert("RGB"), "JPEG")
    picture = decode_part("jpg", data, image=option)
    reduced = decoder(option, min_size=(least_width, least_height))({"jpg": data})["jpg"]
    largest = min(width // least_width, height // least_height)
    scale = max(scale for scale in (1, 2, 4, 8) if scale <= max(largest, 1))
    if option == "pil":
        picture, reduced = np.asarray(picture), np.asarray(reduced)
    shape = reduced.shape[1:] if option == "torchrgb8" else reduced.shape[:2]
    assert shape == (-(-height // scale), -(-width // scale))
    if scale == 1:
        assert np.array_equal(reduced, picture)
    else:
        assert shape[0] >= least_height
        assert shape[1] >= least_width


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("seed", range(3))
def test_a_reduced_photo_differs_little_from_one_that_is_made_small_afterwards(
    subsampling: str, seed: int
) -> None:
    data = encoded(photo((700, 500), seed), "JPEG", quality=90, subsampling=subsampling)
    for least, target in ((125, (175, 125)), (110, (154, 110)), (100, (140, 100))):
        made_small = [
            np.asarray(decoder("pil", min_size=size)({"jpg": data})["jpg"].resize(target), np.int32)
            for size in (least, None)
        ]
        difference = made_small[0] - made_small[1]
        assert 0 < np.abs(difference).mean() < 1.5  # of 255; it is around 0.5
        assert 10 * np.log10(255**2 / np.square(difference).mean()) > 40  # dB; it is around 50


@pytest.mark.parametrize("option", IMAGE_OPTIONS)
def test_min_size_is_for_all_that_are_jpegs_and_for_nothing_else(option: str) -> None:
    large = photo((64, 40))
    decode = decoder(option, min_size=20)
    two = encoded(large, "MPO", save_all=True, append_images=[large.rotate(180)])
    for data in (
        encoded(large, "JPEG"),
        encoded(large, "JPEG", progressive=True),
        encoded(large.convert("L"), "JPEG"),
        encoded(large.convert("CMYK"), "JPEG"),
        two,
    ):
        reduced = decode({"bin.jpg": data})["bin.jpg"]
        full = decode_part("jpg", data, image=option)
        assert type(reduced) is type(full)
        if isinstance(full, Image.Image):
            assert (reduced.size, reduced.mode) == ((32, 20), full.mode)
        else:
            assert reduced.dtype == full.dtype
            assert sorted(reduced.shape)[-2:] == [20, 32]
    for kind in ("PNG", "WEBP"):
        data = encoded(large, kind, lossless=True)
        reduced, full = decode({"jpg": data})["jpg"], decode_part("jpg", data, image=option)
        assert np.array_equal(np.asarray(reduced), np.asarray(full))


def test_min_size_does_not_lift_the_limit_nor_hide_damage(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(photo((64, 40)), "JPEG")
    decode = decoder(min_size=5)
    for end in (10, len(data) // 2, len(data) - 40):
        with pytest.raises(SampleError, match=r"[Tt]runcated|damaged"):
            decode({"jpg": data[:end]})
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    with pytest.raises(SampleError, match="64 x 40 pixels are more than the limit"):
        decode({"jpg": data})


@pytest.mark.parametrize("size", [0, -1, True, 2.5, "224", (224,), (224, 0), (1, 2, 3), [4, 4]])
def test_a_min_size_that_is_none_is_refused_at_once(size: Any) -> None:
    with pytest.raises(ValueError, match=r"min_size is .*both sides"):
        decoder(min_size=size)


# --- other decoders -------------------------------------------------------------------------------


def needs(backend: str) -> None:
    try:
        BACKENDS[backend](False)
    except ImportError as error:
        pytest.skip(f"{backend} is not installed: {error}")


@pytest.fixture(params=list(BACKENDS))
def backend(request: pytest.FixtureRequest) -> str:
    needs(request.param)
    return str(request.param)


@pytest.mark.parametrize("option", ARRAYS)
def test_backends_give_what_pillow_gives(backend: str, option: str) -> None:
    step = 1 if option.endswith("8") else 1 / 255
    decode = decoder(option, backend=backend)
    for name, data in FILES.items():
        expected, value = decode_part(name, data, image=option), decode({name: data})[name]
        assert type(value) is type(expected)
        assert (value.dtype, value.shape) == (expected.dtype, expected.shape)
        difference = np.asarray(value, np.float64) - np.asarray(expected, np.float64)
        assert np.abs(difference).max() <= 2 * step  # 0 where both have the same libjpeg-turbo
        if isinstance(value, torch.Tensor):
            assert value.is_contiguous()
        else:
            assert value.flags.c_contiguous
        value[...] = 0  # may be written to


@pytest.mark.parametrize(("option", "mode"), [("rgb8", "RGB"), ("torchrgb", "RGB"), ("l8", "L")])
def test_backends_read_the_jpegs_that_have_the_colours_asked_for(
    backend: str, option: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: Any) -> None:
        raise SystemExit("Pillow was to decode it")

    decode = decoder(option, backend=backend)
    right = encoded(photo((40, 30)).convert(mode), "JPEG")
    wrong = encoded(photo((40, 30)).convert("L" if mode == "RGB" else "RGB"), "JPEG")
    monkeypatch.setattr(JpegImageFile, "load", load)
    decode({"jpg": right})
    with pytest.raises(SystemExit):
        decode({"jpg": wrong})


def test_simplejpeg_reduces_to_the_same_size_as_pillow() -> None:
    needs("simplejpeg")
    for size in ((640, 480), (449, 300), (448, 301), (97, 455), (64, 64)):
        data = encoded(photo(size), "JPEG")
        for least in (16, 32, 100, 224, (30, 90)):
            ours, theirs = (
                decoder("rgb8", min_size=least, backend=backend)({"jpg": data})["jpg"]
                for backend in ("simplejpeg", "pillow")
            )
            assert ours.shape == theirs.shape
            assert np.abs(ours.astype(np.int32) - theirs).max() <= 2


def test_damage_is_told_in_the_same_words_by_all(backend: str) -> None:
    data = encoded(photo((60, 50)), "JPEG")
    damaged = [data[:end] for end in (1, 10, 300, len(data) // 2, len(data) - 30, len(data) - 1)]
    damaged += [data[:400] + bytes(200) + data[600:], b"\xff\xd8\xff" + bytes(99), b"<html>"]
    for part in damaged:
        told = []
        for decode in (decoder("rgb8"), decoder("rgb8", backend=backend)):
            try:
                told.append(decode({"__key__": "a/7", "x.jpg": part})["x.jpg"].tolist())
            except SampleError as error:
                told.append(str(error))
        assert told[0] == told[1]
        assert isinstance(told[0], list) or "part 'x.jpg'" in told[0]
        assert isinstance(told[0], list) or "sample 'a/7'" in told[0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backend_that_is_missing_is_told_at_once(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, backend, None)
    monkeypatch.setitem(sys.modules, f"{backend}.io", None)
    get = {"simplejpeg": r"energon-fn\[fast\]"}.get(backend, backend)
    with pytest.raises(ImportError, match=f"backend='{backend}' needs .*`pip install {get}`"):
        decoder(backend=backend)


def test_a_torchvision_that_does_not_fit_torch_is_told_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake = ModuleType("torchvision.io")
    fake.ImageReadMode = fake.decode_jpeg = object  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchvision", ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.io", fake)
    monkeypatch.setattr(torch.ops, "image", ModuleType("image"), raising=False)
    with pytest.raises(ImportError, match="do not fit this torch"):
        decoder(backend="torchvision")


def test_backends_that_do_not_go_with_other_options_are_refused_at_once() -> None:
    with pytest.raises(ValueError, match=r"unknown backend 'jpeg'\. Known: pillow, simplejpeg"):
        decoder(backend="jpeg")
    with pytest.raises(ValueError, match=r"no PIL images.*'pilrgb'"):
        decoder("pilrgb", backend="simplejpeg")
    with pytest.raises(ValueError, match=r"reduced size.*leave out min_size"):
        decoder(backend="torchvision", min_size=224)


def test_a_decoder_of_pictures_alone() -> None:
    decode = picture_decoder("rgb8", min_size=4)
    pixels: NDArray[np.uint8] = decode(FILES["rgb.png"])
    assert np.array_equal(pixels, PIXELS[:, :, :3])
    with pytest.raises(ValueError, match="damaged or no picture"):
        decode(b"")
