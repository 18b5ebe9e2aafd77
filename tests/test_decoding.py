"""Decoding: the same as webdataset where that is safe, clear errors where something is broken."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import subprocess
import sys
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
from energon_fn.decoding import KINDS, RECORDINGS, SampleDecoder, decode_part, decoder
from energon_fn.errors import SampleError
from energon_fn.pictures import IMAGE_OPTIONS, PICTURES

EXTENSIONS = [e for row in KINDS for e in row[0].split()] + PICTURES.split() + ["gz", "bin"]


def file_of(save: Any) -> bytes:
    """The bytes that ``save`` writes to a file."""
    file = io.BytesIO()
    save(file)
    return file.getvalue()


def encoded(kind: str, mode: str = "RGB") -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (5, 7, 4), dtype=np.uint8)
    return file_of(lambda file: Image.fromarray(noise).convert(mode).save(file, kind))


FILES = {
    "rgb.jpg": encoded("JPEG"),
    "rgba.png": encoded("PNG", "RGBA"),
    "gray.gif": encoded("GIF", "L"),
    "rgb.webp": encoded("WEBP"),
}


# --- values ---------------------------------------------------------------------------------------

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


def of_json(parse: Any, data: bytes) -> str:
    """What comes out, or the error; text, as NaN is not NaN and 1 is 1.0."""
    try:
        return repr(parse(data))
    except (ValueError, SampleError) as error:
        return repr(getattr(error, "__cause__", None) or error)


def is_the_same(data: bytes) -> bool:
    """Whether JSON comes out as json has it, with orjson and without."""
    expected = of_json(json.loads, data)
    with pytest.MonkeyPatch.context() as patch:
        got = [of_json(lambda data: decode_part("json", data), data)]
        patch.setattr(decoding, "_orjson", None)
        got.append(of_json(lambda data: decode_part("json", data), data))
    return got == [expected, expected]


def test_orjson_is_used_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    orjson = pytest.importorskip("orjson")
    assert decoding._orjson is orjson.loads
    monkeypatch.setattr(decoding, "_orjson", bytes.hex)
    assert decode_part("json", b"[1]") == "5b315d"
    assert decode_part("jsonl", b"[1]\n[2]") == ["5b315d", "5b325d"]


ODD_JSON = [
    *(b"NaN", b"Infinity", b"-Infinity", b"[NaN, 1e999, -1e999, 1e-999]", b"-0", b"-0.0", b"0e9"),
    *(b"18446744073709551615", b"18446744073709551616", b"-9223372036854775809", b"1" * 5000),
    *(b'{"a": 1, "b": 2, "a": 3}', b'{"": 1}', b'{"a": {"a": 1, "a": {}}}', b"[]", b"{}", b'""'),
    *(rb'"\ud800"', rb'"\udc00\ud800"', rb'"\ud83d\ude00"', rb'"\u0000"', b'"\x7f"', rb'"\/"'),
    *(b"\xef\xbb\xbf[1]", b" \t\r\n[1] \n\r\t", b"[1]\n", b"\x0c[1]", b"[1]\x0b", b"\xc2\xa0[1]"),
    *(b"1\x00", b"\x001", b"1\x00\n\x00", b"[1]\x00", b"", b" ", b"[1][2]", b"[1,]", b"{,}", b"01"),
    *(
        b"1.",
        b".5",
        b"+1",
        b"tru",
        b"'a'",
        b'"\n"',
        b'"\xed\xa0\x80"',
        b'"\xff"',
        b"2.5e-324",
        b"1e23",
    ),
    *(json.dumps(["\u2028", "é", 1e22]).encode(form) for form in ("utf-16", "utf-32", "utf-16-be")),
    *(
        b"0." + b"3" * 40,
        b"1234567890123456789e0",
        b'"' + b"9" * 30 + b'"',
        b"[" * 300 + b"]" * 300,
    ),
]


@pytest.mark.parametrize("data", ODD_JSON)
def test_odd_json_is_what_json_makes_of_it(data: bytes) -> None:
    assert is_the_same(data)


DIGITS = st.text("0123456789", min_size=1, max_size=24).map(lambda digits: str(int(digits)))
NUMBERS = st.tuples(st.sampled_from(["", "-"]), DIGITS, st.sampled_from(["", ".5", "e3", "E-2"]))


@given(st.lists(NUMBERS.map("".join) | st.floats().map(json.dumps), max_size=6), st.integers(0, 9))
def test_numbers_of_any_length_are_what_json_makes_of_them(numbers: list[str], blanks: int) -> None:
    assert is_the_same(b" " * blanks + f"[{', '.join(numbers)}]".encode())


def test_no_long_number_is_overlooked_wherever_it_stands() -> None:
    for place in range(20):
        for digits in range(17, 23):
            data = b" " * place + b"[%d]" % (10**digits - 1)
            assert decode_part("json", data) == [10**digits - 1]


@given(
    JSON,
    st.booleans(),
    st.sampled_from(["utf-8", "utf-8", "utf-8-sig", "utf-16", "utf-32-le"]),
    st.sampled_from([b"", b" ", b"\n", b"\r\n"]),
    st.lists(st.tuples(st.integers(0, 99), st.integers(0, 255)), max_size=2),
)
def test_json_written_any_way_and_damaged_is_what_json_makes_of_it(
    value: Any, ascii_only: bool, form: str, end: bytes, flips: list[tuple[int, int]]
) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only)
    data = bytearray(text.encode(form, "surrogatepass") + end)
    for place, byte in flips:
        if place < len(data):
            data[place] = byte
    assert is_the_same(bytes(data))


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
    arrays: list[Any] = [np.arange(6, dtype=np.float32).reshape(2, 3), np.zeros((0,), np.int64)]
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


@pytest.mark.parametrize("name", ["bin", "ogg", "noext", "json.bin", "jpgx", "msg", "mp", "cbor"])
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


OPTIONS: list[dict[str, Any]] = [
    *({"image_decode": option} for option in [*IMAGE_OPTIONS, None]),
    {"min_size": 2, "av_decode": None, "guess_content": True},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_decoders_pickle_and_are_equal_by_their_options(options: dict[str, Any]) -> None:
    sample = {"__key__": "k", "png": FILES["rgba.png"]}
    decode = decoder(**options)
    decode(sample)
    data = pickle.dumps(decode)
    assert len(data) < 300  # no caches in it
    again = pickle.loads(data)
    assert str(again(sample)["png"])[:20] == str(decode(sample)["png"])[:20]
    assert again == decode == decoder(**options) != decoder("l8", min_size=9)


def test_a_decoder_may_be_an_attribute_of_a_class() -> None:
    class Encoder:
        decoder = SampleDecoder(image_decode="pilrgb")

    assert Encoder().decoder({"cls": b"3"}) == {"cls": 3}


def test_a_part_name_is_thought_about_once() -> None:
    decode = decoder()
    for _ in range(50):
        decode({"__key__": "k", "txt": b"a", "detail.json": b"{}"})
    assert decode._decode_for.cache_info().misses == 2  # type: ignore[attr-defined]
    for n in range(9999):
        decode({f"{n}.txt": b"a"})
    assert decode._decode_for.cache_info().currsize < 9999  # type: ignore[attr-defined]


def test_keys_with_two_underscores_are_no_parts() -> None:
    sample = {"__key__": b"k", "__x.json": b"{", "__x.jpg": bytearray(b"?")}
    assert decoder(guess_content=True)(sample) == sample


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("bin", FILES["rgb.jpg"], torch.Tensor),
        ("txt", FILES["rgba.png"], torch.Tensor),
        ("", FILES["gray.gif"], torch.Tensor),
        ("jpg", FILES["rgb.webp"], torch.Tensor),
        ("txt", b"RIFF or not", str),
        ("bin", b"\xff\xd8", bytes),
        ("json", b"[]", list),
    ],
)
def test_guess_content_goes_by_what_pictures_begin_with(
    name: str, data: bytes, expected: type
) -> None:
    assert isinstance(decoder(guess_content=True)({name: data})[name], expected)
    if name in ("bin", ""):
        assert decoder()({name: data})[name] == data


@pytest.mark.parametrize("extension", RECORDINGS.split())
def test_recordings_are_bytes_where_that_is_asked_for(extension: str) -> None:
    decode = decoder(av_decode=None)
    assert decode({extension: b"x", f"a.{extension}": b"y"}) == {
        extension: b"x",
        f"a.{extension}": b"y",
    }


def test_an_unknown_av_decode_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match=r"av_decode 'avdecoder'.*'AVDecoder', 'torch', 'pyav'"):
        decoder(av_decode="avdecoder")


def test_many_threads_decode_the_same_as_one() -> None:
    decode = decoder("rgb8")
    samples = [{"__key__": n, "x." + n: data} for n, data in FILES.items()] * 4
    with ThreadPoolExecutor(8) as threads:
        for sample, there in zip(samples, threads.map(decode, samples), strict=True):
            assert str(there) == str(decode(sample))


def test_the_import_is_cheap() -> None:
    code = (
        "import sys, energon_fn.decoding, energon_fn.demo, energon_fn.look;"
        "print([m for m in ('webdataset', 'torchvision', 'av', 'simplejpeg') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
