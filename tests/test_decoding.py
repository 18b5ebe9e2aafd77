"""Decoding: the same as webdataset where that is safe, clear errors where something is broken."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from webdataset import autodecode, tenbin

from energon_fn import decoding
from energon_fn.decoding import (
    IMAGE_OPTIONS,
    KINDS,
    PICTURES,
    decode_part,
    decoder,
)
from energon_fn.errors import SampleError

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 7, 4), dtype=np.uint8)
EXTENSIONS = [e for row in KINDS for e in row[0].split()] + PICTURES.split() + ["gz", "bin"]


def file_of(save: Any) -> bytes:
    """The bytes that ``save`` writes to a file."""
    file = io.BytesIO()
    save(file)
    return file.getvalue()


def encoded(picture: Image.Image, kind: str, **options: Any) -> bytes:
    return file_of(lambda file: picture.save(file, kind, **options))


def pictures() -> dict[str, bytes]:
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


FILES = pictures()


# --- pictures -------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("option", [o for o in IMAGE_OPTIONS if "pil" not in o])
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


# --- other parts ----------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(st.text())
@settings(deadline=None)
def test_text_round_trip(text: str) -> None:
    if not any(0xD800 <= ord(c) < 0xE000 for c in text):
        for name in ("txt", "text", "transcript", "caption.txt"):
            assert decode_part(name, text.encode()) == text


@given(JSON)
@settings(deadline=None)
def test_json_round_trip(value: Any) -> None:
    for ascii_only in (True, False):
        text = json.dumps(value, ensure_ascii=ascii_only)
        data = text.encode("utf-8", "surrogatepass")
        assert decode_part("json", data) == value
        assert decode_part("json.gz", gzip.compress(data)) == value


@given(st.lists(JSON, max_size=5), st.sampled_from(["\n", "\r\n", "\n\n", " \n"]), st.booleans())
@settings(deadline=None)
def test_jsonl_round_trip(values: list[Any], newline: str, ends: bool) -> None:
    # U+2028 and the like are no ends of lines here: unlike str.splitlines has it.
    lines = [json.dumps(value, ensure_ascii=False) for value in values]
    data = (newline.join(lines) + newline * ends).encode("utf-8", "surrogatepass")
    assert decode_part("jsonl", data) == values


@given(st.integers())
@settings(deadline=None)
def test_int_round_trip(number: int) -> None:
    for name in ["cls", "cls2", "count", "index", "inx", "id"]:
        assert decode_part(name, b"%d\n" % number) == number


ARRAYS = hnp.arrays(
    st.one_of(
        hnp.boolean_dtypes(),
        hnp.integer_dtypes(),
        hnp.floating_dtypes(),
        hnp.complex_number_dtypes(),
    ),
    hnp.array_shapes(min_dims=0, min_side=0),
)


@given(ARRAYS, st.booleans())
@settings(deadline=None)
def test_npy_and_npz_round_trip(array: Any, fortran: bool) -> None:
    array = np.asarray(array, order="F" if fortran else "C")
    one = decode_part("npy", file_of(lambda file: np.save(file, array)))
    many = decode_part("emb.npz", file_of(lambda file: np.savez(file, a=array, b=array.T)))
    assert isinstance(many, dict)
    assert list(many) == ["a", "b"]
    for back, expected in ((one, array), (many["a"], array), (many["b"], array.T)):
        assert back.dtype == expected.dtype
        assert back.shape == expected.shape
        assert np.array_equal(back, expected, equal_nan=array.dtype.kind in "fc")
    one[...] = 0  # may be written to


def test_pth_and_pt_load_tensors_and_plain_containers() -> None:
    value: dict[str, Any] = {"a": torch.arange(6).view(2, 3), "b": [1, "x", (2.5, None)]}
    data = file_of(lambda file: torch.save(value, file))
    for name in ("pth", "x.pt"):
        back = decode_part(name, data)
        assert torch.equal(back["a"], value["a"])
        assert back["b"] == value["b"]


def test_ten_holds_arrays() -> None:
    arrays = [np.arange(6, dtype=np.float32).reshape(2, 3), np.zeros((0,), np.int64)]
    for name in ("ten", "x.tb"):
        back = decode_part(name, bytes(tenbin.encode_buffer(arrays)))
        assert [a.dtype for a in back] == [a.dtype for a in arrays]
        assert all(map(np.array_equal, back, arrays))


def good_parts() -> dict[str, bytes]:
    array = np.arange(6).reshape(2, 3)
    return {
        **dict.fromkeys(["txt", "text", "transcript"], "né".encode()),
        **dict.fromkeys(["cls", "cls2", "index", "inx", "id"], b" 12\n"),
        **dict.fromkeys(["json", "jsn"], b'\xef\xbb\xbf{"a": [1, NaN, "\xc3\xa9"]}'),
        "npy": file_of(lambda file: np.save(file, array)),
        "npz": file_of(lambda file: np.savez(file, a=array)),
        **dict.fromkeys(["pth"], file_of(lambda file: torch.save([1, "a"], file))),
        **dict.fromkeys(["ten", "tb"], bytes(tenbin.encode_buffer([array]))),
        "bin": b"\x00\xff",
        "": b"no extension",
        "csv": b"a,b",
    }


@pytest.mark.parametrize("extension", good_parts())
def test_parts_are_what_webdataset_makes_of_them(extension: str) -> None:
    data = good_parts()[extension]
    theirs = autodecode.Decoder([])
    for name in (extension, f"some.{extension}".rstrip("."), f"some.{extension}.gz"):
        part = gzip.compress(data) if name.endswith(".gz") else data
        expected = theirs({"__key__": "k", name: part})[name]
        assert repr(decode_part(name, part)) == repr(expected)


def test_gz_alone_and_gz_in_gz_are_decompressed_once_as_webdataset_does() -> None:
    once = gzip.compress(b"{}")
    for name, data, expected in (
        ("gz", once, b"{}"),
        ("json.gz.gz", gzip.compress(once), once),
        ("bin.gz", once, b"{}"),
    ):
        assert decode_part(name, data) == expected
        assert autodecode.Decoder([])({"__key__": "k", name: data})[name] == expected


@pytest.mark.parametrize("name", ["JSON", "a.JSON", "x.y.Json", "json"])
def test_only_the_last_piece_counts_in_any_case(name: str) -> None:
    assert decode_part(name, b"[1]") == [1]
    assert decode_part(f"json.txt.{name}", b"[1]") == [1]


@pytest.mark.parametrize("name", ["bin", "mp4", "noext", "json.bin", "jpgx", "msg", "mp", "cbor"])
def test_unknown_parts_stay_the_same_bytes(name: str) -> None:
    data = bytes(range(256))
    assert decode_part(name, data) is data


# --- data is not code -----------------------------------------------------------------------------


class Writes:
    """Pickles to something that leaves a file behind when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_nothing_in_a_part_is_run(tmp_path: Path) -> None:
    trace = tmp_path / "was_here"
    code = pickle.dumps(Writes(trace))
    pickle.loads(code)
    assert trace.exists()  # it would run
    trace.unlink()
    objects = np.array([Writes(trace)], dtype=object)
    attacks = {
        **dict.fromkeys(["pkl", "pickle", "pyd", "a.PKL"], code),
        "pkl.gz": gzip.compress(code),
        "npy": file_of(lambda file: np.save(file, objects, allow_pickle=True)),
        "npz": file_of(lambda file: np.savez(file, a=objects)),
        "x.pth": file_of(lambda file: torch.save(Writes(trace), file)),
        "pt": code,
    }
    for extension in EXTENSIONS:
        attacks.setdefault(f"any.{extension}", code)
    for name, data in attacks.items():
        if name == "any.bin":
            assert decode_part(name, data) == data
        else:
            with pytest.raises(SampleError, match=f"part '{name}'"):
                decode_part(name, data)
        assert not trace.exists(), name


def test_a_pickle_is_refused_with_the_remedy() -> None:
    with pytest.raises(SampleError, match=r"'meta.pkl'.*never loaded.*json.*auto_decode=False"):
        decode_part("meta.pkl", pickle.dumps(1))
    assert decoder(None)({"meta.pkl": b"x"}) == {"meta.pkl": b"x"}


# --- errors ---------------------------------------------------------------------------------------

BROKEN = [
    ("txt", b"ab\xff", "can't decode byte 0xff in position 2"),
    ("json", b'{"a": 1', "Expecting ',' delimiter: line 1 column 8"),
    ("json", b"", "Expecting value"),
    ("json", b'"\xff"', "can't decode byte 0xff"),
    ("json", b"[" * 200_000, "RecursionError"),
    ("jsonl", b"{}\n\n{]\n", "line 3: .* at column 2"),
    ("cls", b"1.5", "invalid literal for int"),
    ("cls", b"", "invalid literal for int"),
    ("npy", b"", "EOF"),
    ("npy", file_of(lambda file: np.save(file, np.zeros(99)))[:200], "expected 792 bytes got 72"),
    ("npz", b"\x93NUMPY", "not an npz"),
    ("npz", file_of(lambda file: np.savez(file, a=np.zeros(9)))[:-9], "BadZipFile"),
    ("pth", b"PK\x03\x04", "damaged"),
    ("pth", file_of(lambda file: torch.save(torch.zeros(9), file))[:-50], "damaged"),
    ("ten", b"~TenBin~", "struct|error|mismatch|requires"),
    ("json.gz", b"{}", "Not a gzipped file"),
    ("json.gz", gzip.compress(b"{}")[:-9], "ended before"),
    ("jpg", b"<html>", "begins with b'<html>'"),
]


@pytest.mark.parametrize(("extension", "data", "says"), BROKEN)
def test_broken_parts_name_part_sample_shard_and_reason_in_one_line(
    extension: str, data: bytes, says: str
) -> None:
    name = f"left.{extension}"
    sources = (SimpleNamespace(shard_name="s/shard_3.tar"),)
    sample = {"__key__": "dir/0007", "__sources__": sources, "txt": b"fine", name: data}
    with pytest.raises(SampleError, match=says) as caught:
        decoder()(sample)
    message = str(caught.value)
    assert message.startswith(
        f"cannot decode part {name!r} ({len(data)} bytes) of sample 'dir/0007' in shard "
        "'s/shard_3.tar': "
    )
    assert "\n" not in message
    assert len(message) < 500
    assert isinstance(caught.value.__cause__, Exception)


def test_an_array_that_claims_more_memory_than_there_is() -> None:
    header = file_of(
        lambda f: np.lib.format.write_array_header_1_0(
            f, {"descr": "<f8", "fortran_order": False, "shape": (1 << 50,)}
        )
    )
    with pytest.raises(SampleError, match="part 'npy'"):
        decode_part("npy", header + bytes(800))


@given(
    st.sampled_from(EXTENSIONS),
    st.binary(max_size=200) | st.sampled_from([*FILES.values(), *good_parts().values()]),
    st.lists(st.tuples(st.integers(0, 999), st.integers(0, 255)), max_size=4),
    st.integers(0, 4000),
)
@settings(deadline=None, max_examples=400)
def test_whatever_the_bytes_they_decode_or_are_a_sample_error(
    extension: str, data: bytes, flips: list[tuple[int, int]], end: int
) -> None:
    damaged = bytearray(data[:end])
    for place, value in flips:
        if place < len(damaged):
            damaged[place] = value
    errors = []
    try:
        decode_part(extension, bytes(damaged))
    except SampleError as error:
        errors.append(str(error))
    assert "\n" not in "".join(errors)


def test_a_missing_package_is_not_the_samples_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "webdataset.tenbin", None)
    with pytest.raises(ImportError):
        decode_part("ten", b"")


# --- samples --------------------------------------------------------------------------------------


def test_a_sample_is_decoded_into_a_new_dict_in_the_same_order() -> None:
    sources = (object(),)
    raw = {
        "__key__": "a/1",
        "__restore_key__": (1, 2),
        "__sources__": sources,
        "jpg": FILES["rgb.jpg"],
        "detail.json": b'{"a": 1}',
        "bin": b"?",
    }
    before = dict(raw)
    decoded = decoder("pil")(raw)
    assert raw == before
    assert list(decoded) == list(raw)
    assert decoded["__sources__"] is sources
    assert decoded["__restore_key__"] == (1, 2)
    assert decoded["jpg"].size == (7, 5)
    assert decoded["detail.json"] == {"a": 1}
    assert decoded["bin"] == b"?"


def test_values_that_are_not_bytes_are_decoded_already() -> None:
    picture = Image.new("RGB", (2, 2))
    sample = {"__key__": "k", "jpg": picture, "txt": "text", "json": {"a": 1}, "cls": None}
    assert decoder()(sample) == sample
    decoded = decoder()({"cls": memoryview(b"x12")[1:], "txt": bytearray(b"a")})
    assert decoded == {"cls": 12, "txt": "a"}


def test_none_leaves_everything_as_bytes() -> None:
    sample = {"__key__": "k", "jpg": b"broken", "txt": b"\xff", "pkl": b"x"}
    assert decoder(None)(sample) == sample
    assert decode_part("jpg", b"broken", image=None) == b"broken"


@pytest.mark.parametrize("option", [*IMAGE_OPTIONS, None])
def test_decoders_pickle(option: str | None) -> None:
    sample = {"__key__": "k", "png": FILES["rgba.png"]}
    decode = decoder(option)
    decode(sample)
    data = pickle.dumps(decode)
    assert len(data) < 200  # no caches in it
    assert str(pickle.loads(data)(sample)["png"])[:20] == str(decode(sample)["png"])[:20]


def test_a_part_name_is_looked_up_once() -> None:
    decoding._decode_for.cache_clear()
    decode = decoder()
    for _ in range(50):
        decode({"__key__": "k", "txt": b"a", "detail.json": b"{}"})
    assert decoding._decode_for.cache_info().misses == 2


def test_many_threads_decode_the_same_as_one() -> None:
    decode = decoder("rgb8")
    samples = [{"__key__": n, "x." + n: data} for n, data in FILES.items()] * 4
    with ThreadPoolExecutor(8) as threads:
        for sample, there in zip(samples, threads.map(decode, samples), strict=True):
            assert str(there) == str(decode(sample))


def test_the_import_is_cheap() -> None:
    code = (
        "import sys, energon_fn.decoding, energon_fn.demo, energon_fn.sheet;"
        "print([m for m in ('webdataset', 'torchvision') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
