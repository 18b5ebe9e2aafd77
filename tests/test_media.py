"""Media metadata: what is known of a file without decoding it, where it is kept, who reads it."""

from __future__ import annotations

import io
import json
import logging
import multiprocessing
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import threading
import wave
from collections.abc import Mapping
from contextlib import closing, suppress
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from conftest import jpeg, write_tar
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from processes import run

from energon_fn.disk import files, media
from energon_fn.disk.media import AVMetadata, ImageMetadata, media_metadata, read_media_metadata
from energon_fn.disk.prepare import prepare_dataset, write_media_metadata
from energon_fn.errors import DatasetError, SampleError

RATIO = [("train", 1)]


def picture(
    kind: str, size: tuple[int, int] = (20, 10), mode: str = "RGB", **options: Any
) -> bytes:
    file = io.BytesIO()
    Image.new(mode, size).save(file, kind, **options)
    return file.getvalue()


def sound(frames: int = 4000, rate: int = 8000, channels: int = 2) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setnchannels(channels)
        writer.setsampwidth(2)
        writer.setframerate(rate)
        writer.writeframes(bytes(2 * channels * frames))
    return file.getvalue()


def video(kind: str, frames: int = 30, fps: int = 15, sound_codec: str | None = None) -> bytes:
    """64 x 48 pixels, and a second of silence if there is a codec for it."""
    av = pytest.importorskip("av")
    file = io.BytesIO()
    with av.open(file, "w", format=kind) as container:
        pictures = container.add_stream("mpeg4", rate=fps)
        pictures.width, pictures.height, pictures.pix_fmt = 64, 48, "yuv420p"
        audio = container.add_stream(sound_codec, rate=44100) if sound_codec else None
        for i in range(frames):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), i, np.uint8))
            container.mux(pictures.encode(frame))
        container.mux(pictures.encode())
        if audio is not None:
            container.mux(audio.encode(silence(audio.layout)))
            container.mux(audio.encode())
    return file.getvalue()


def silence(layout: Any) -> Any:
    av = pytest.importorskip("av")
    shape = (len(layout.channels), 44100)
    frame = av.AudioFrame.from_ndarray(np.zeros(shape, np.float32), "fltp", layout.name)
    frame.sample_rate, frame.pts = 44100, 0
    return frame


def image(width: int, height: int, format: str, mode: str = "RGB") -> ImageMetadata:
    return ImageMetadata(width=width, height=height, format=format, mode=mode)


def assert_close(found: object, expected: AVMetadata, relative: float) -> None:
    assert isinstance(found, AVMetadata)
    known = {name: value for name, value in vars(found).items() if value is not None}
    wanted = {name: value for name, value in vars(expected).items() if value is not None}
    assert known == pytest.approx(wanted, rel=relative)


SMALL = image(20, 10, "PNG")

# ------------------------------------------------------------------------------------- of one file


@given(
    st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "AVIF"]),
    st.tuples(st.integers(1, 300), st.integers(1, 300)),
    st.sampled_from(["RGB", "L", "RGBA", "P", "CMYK", "1", "I;16"]),
)
@settings(max_examples=60)
def test_it_is_what_the_picture_is(kind: str, size: tuple[int, int], mode: str) -> None:
    try:
        data = picture(kind, size, mode)
    except (OSError, ValueError, KeyError):  # not every format has every mode
        return
    with Image.open(io.BytesIO(data)) as opened:
        opened.load()
        expected = image(*size, kind, opened.mode)
    assert media_metadata(data, "anything") == expected
    assert media_metadata(io.BytesIO(data), "x.jpg", "extension") == expected
    assert media_metadata(data, "x", "x") == expected


class Counting(io.BytesIO):
    """A file that knows how much of it was read."""

    count = 0

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        self.count += len(data)
        return data


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "TIFF"])
def test_only_the_header_is_read(kind: str) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (400, 500, 3), dtype=np.uint8)
    file = Counting()
    Image.fromarray(noise).save(file, kind)
    file.seek(0)
    file.count = 0
    found = media_metadata(file, "a", "header")
    assert isinstance(found, ImageMetadata)
    assert (found.width, found.height) == (500, 400)
    assert file.count < len(file.getvalue()) / 20


def test_orientation_is_left_to_who_decodes() -> None:
    turned = Image.new("RGB", (20, 10))
    exif = turned.getexif()
    exif[0x0112] = 6
    file = io.BytesIO()
    turned.save(file, "JPEG", exif=exif)
    assert media_metadata(file.getvalue(), "a.jpg") == image(20, 10, "JPEG")


PNG, WAV = picture("PNG"), sound()


@pytest.mark.parametrize(
    ("name", "how", "found"),
    [
        ("a.png", "extension", True),
        ("a/b.C.PNG", "extension", True),
        ("a.jpg", "extension", True),  # what it is its content says
        ("a.mp4", "extension", True),
        ("a.png.txt", "extension", False),
        ("png", "extension", False),
        (".png", "extension", False),
        ("a.txt", "header", True),
        ("a", "header", True),
        ("a.txt", "*.txt", True),
        ("a/b/c.txt", "a/*.txt", True),
        ("x/a/b.txt", "a/*.txt", False),
        ("a.TXT", "*.jpg , *.txt", True),
        ("a.txt", "*.TXT", True),
        ("a.txt", "*.png", False),
        ("a.txt", "a", False),
        ("[1].png", "[[]1].*", True),
    ],
)
def test_filters(name: str, how: str, found: bool) -> None:
    assert media.is_wanted(name, how) == found or how == "header"
    assert media_metadata(PNG, name, how) == (SMALL if found else None)


@pytest.mark.parametrize(
    "data",
    [
        b"", b"hello", b'{"a": 1}', b"BM is how this text begins, and then goes on and on",
        "UTF-16 begins with FF FE".encode("utf-16"), b"%PDF-1.4", b"\0" * 100, b"\xff" * 100,
        b"RIFF\0\0\0\0CDXA", b"\0\0\1\0\0\0", b"<svg/>", b"PK\3\4", b"\x1f\x8b\x08",
        np.arange(100, dtype=">i4").tobytes(),
    ],
)  # fmt: skip
def test_other_files_have_none_by_header(data: bytes) -> None:
    assert media_metadata(data, "a.png", "header") is None


@pytest.mark.parametrize("how", ["extension", "*.jpg", "header"])
@pytest.mark.parametrize("end", [3, 30, 100, 300])
def test_a_header_cut_short(end: int, how: str) -> None:
    with pytest.raises(SampleError, match=r"^a/1\.jpg: "):
        media_metadata(jpeg()[:end], "a/1.jpg", how)


@pytest.mark.filterwarnings("ignore")  # Pillow has opinions on damage
@given(
    st.sampled_from(
        [picture(kind) for kind in ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "ICO")]
    ),
    st.integers(0, 300),
    st.binary(max_size=40),
)
def test_damage_is_metadata_none_or_an_error_of_the_sample(
    data: bytes, at: int, other: bytes
) -> None:
    for damaged in (data[:at] + other, data[:at] + other + data[at + len(other) :]):
        with suppress(SampleError, DatasetError):
            assert isinstance(media_metadata(damaged, "a"), ImageMetadata | AVMetadata | None)


@pytest.mark.parametrize("data", [b"", b"no picture", b"<html>"])
def test_what_has_a_pictures_name_and_is_none(data: bytes) -> None:
    for how in ("extension", "*.png"):
        with pytest.raises(SampleError, match=r"a\.png: it is no picture that Pillow knows"):
            media_metadata(data, "a.png", how)
    with pytest.raises(SampleError, match=r"a\.bin: neither a known header nor a known ending"):
        media_metadata(data, "a.bin", "*.bin")


def test_without_pyav_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(DatasetError, match=r"a.wav is audio.*`pip install energon_fn\[av\]`.*glob"):
        media_metadata(WAV, "a.wav")
    assert media_metadata(PNG, "a.png") == SMALL


def test_sound() -> None:
    pytest.importorskip("av")
    expected = AVMetadata(
        audio_duration=0.5, audio_channels=2, audio_sample_rate=8000, audio_num_samples=4000
    )
    assert media_metadata(WAV, "a", "header") == expected
    assert media_metadata(WAV, "a.jpg", "extension") == expected
    one = media_metadata(sound(12345, 44100, 1), "a.wav", "extension")
    assert_close(one, AVMetadata(
        audio_duration=12345 / 44100, audio_channels=1, audio_sample_rate=44100,
        audio_num_samples=12345,
    ), 1e-6)  # fmt: skip
    empty = media_metadata(sound(0), "a.wav")
    assert empty == AVMetadata(audio_channels=2, audio_sample_rate=8000, audio_num_samples=0)


@pytest.mark.parametrize("kind", ["mp4", "mov", "avi", "matroska"])
def test_video(kind: str) -> None:
    found = media_metadata(video(kind), "a", "header")
    assert_close(found, AVMetadata(
        video_duration=2.0, video_num_frames=30, video_fps=15.0, video_width=64, video_height=48,
    ), 0.005)  # fmt: skip


def test_video_with_sound() -> None:
    found = media_metadata(video("mp4", 10, 5, "aac"), "a.mp4", "extension")
    assert_close(found, AVMetadata(
        video_duration=2.0, video_num_frames=10, video_fps=5.0, video_width=64, video_height=48,
        audio_duration=1.0, audio_channels=2, audio_sample_rate=44100, audio_num_samples=44100,
    ), 0.05)  # fmt: skip


@pytest.mark.parametrize("cut", [20, 200])
def test_a_video_cut_short(cut: int) -> None:
    with pytest.raises(SampleError, match=r"^a\.mp4: Invalid data"):
        media_metadata(video("mp4")[:cut], "a.mp4", "extension")


@pytest.mark.parametrize(
    ("kind", "options"),
    [("mp3", {"write_xing": "0"}), ("mp3", {"write_xing": "1"}), ("adts", {})],
)
def test_a_length_that_is_not_told_is_not_guessed(kind: str, options: dict[str, str]) -> None:
    """Streams of changing bit rate: loud, then silent."""
    av = pytest.importorskip("av")
    codec = "libmp3lame" if kind == "mp3" else "aac"
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV has no {codec}")
    file = io.BytesIO()
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, (1, 44100)).astype(np.float32)
    with av.open(file, "w", format=kind, options=options) as container:
        stream = container.add_stream(codec, rate=44100, layout="mono")
        stream.codec_context.options = {"q": "2"}
        stream.codec_context.flags |= 2  # constant quality
        for second in range(8):
            loud = noise if second < 2 else 0 * noise
            frame = av.AudioFrame.from_ndarray(loud, "fltp", "mono")
            frame.sample_rate, frame.pts = 44100, 44100 * second
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    found = media_metadata(file.getvalue(), "a", "header")
    assert isinstance(found, AVMetadata)
    assert found.audio_duration == pytest.approx(8.0, abs=0.1)
    assert found.audio_num_samples == pytest.approx(8 * 44100, abs=4410)


def test_a_cover_is_no_video() -> None:
    av = pytest.importorskip("av")
    if "libmp3lame" not in av.codecs_available:
        pytest.skip("this PyAV writes no MP3")
    file = io.BytesIO()
    with av.open(file, "w", format="mp3", options={"id3v2_version": "0"}) as container:
        stream = container.add_stream("libmp3lame", rate=44100)
        container.mux(stream.encode(silence(stream.layout)))
        container.mux(stream.encode())
    cover = b"\0image/jpeg\0\x03\0" + jpeg()
    frame = b"APIC" + len(cover).to_bytes(4, "big") + bytes(2) + cover
    size = bytes(len(frame) >> shift & 127 for shift in (21, 14, 7, 0))
    found = media_metadata(b"ID3\3\0\0" + size + frame + file.getvalue(), "a.mp3")
    assert isinstance(found, AVMetadata)
    assert found.video_width is None
    assert found.audio_duration == pytest.approx(1.0, abs=0.1)


# --------------------------------------------------------------------------------- open_piece, ...


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(-40, 40), st.integers(0, 40))))
def test_a_piece_is_a_file(steps: list[tuple[int, int, int]]) -> None:
    data = Path(__file__).read_bytes()[100:130]
    with files.open_piece(__file__, 100, 30) as piece:
        whole = io.BytesIO(data)
        for whence, offset, size in steps:
            target = (0, whole.tell(), 30)[whence] + offset
            if target >= 0:
                assert piece.seek(offset, whence) == whole.seek(target)
            assert piece.read(size) == whole.read(size)
            assert piece.tell() == whole.tell()


# ------------------------------------------------------------------------------- prepared datasets


def index_of(folder: Path) -> str:
    return str(folder / ".nv-meta" / "index.sqlite")


def table(folder: Path, name: str) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(index_of(folder))) as db:
        return db.execute(f"SELECT * FROM {name}").fetchall()


def kept(folder: Path) -> dict[str, Any]:
    """All that is kept, as it is read."""
    names = [row[0] for row in table(folder, "media_metadata")]
    return {name: read_media_metadata(index_of(folder), name) for name in names}


def two_shards(folder: Path, second: str = "sub/b.tar.gz") -> list[str]:
    write_tar(folder / "a.tar", [
        ("x/1", {"png": PNG, "txt": b"text"}),
        ("x/2", {"left.png": PNG, "right.jpg": jpeg(0, (30, 20)), "json": b"{}"}),
    ])  # fmt: skip
    write_tar(folder / second, [
        ("3", {"JPG": jpeg(1, (7, 9)), "gif": picture("GIF", mode="P"), "bin": PNG}),
    ])  # fmt: skip
    return ["a.tar", second]


BY_EXTENSION = {
    "x/1.png": SMALL,
    "x/2.left.png": SMALL,
    "x/2.right.jpg": image(30, 20, "JPEG"),
    "3.JPG": image(7, 9, "JPEG"),
    "3.gif": image(20, 10, "GIF", "P"),
}


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    ("how", "names"),
    [
        ("extension", {*BY_EXTENSION}),
        ("header", {*BY_EXTENSION, "3.bin"}),
        ("x/*.png", {"x/1.png", "x/2.left.png"}),
        ("*.jpg,*.bin", {"x/2.right.jpg", "3.JPG", "3.bin"}),
        ("*.webp", set()),
    ],
)
def test_prepared_with_it(tmp_path: Path, how: str, names: set[str], workers: int) -> None:
    shards = two_shards(tmp_path)
    prepare_dataset(tmp_path, shards, split_parts_ratio=RATIO, media_filter=how, workers=workers)
    assert kept(tmp_path) == {name: BY_EXTENSION.get(name, SMALL) for name in names}
    assert read_media_metadata(index_of(tmp_path), "x/1.txt") is None
    assert read_media_metadata(index_of(tmp_path), "x/1") is None
    assert media.filters_of(index_of(tmp_path)) == (how,)
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith(".tmp")]


def test_prepared_without_it_says_how_to_add_it(tmp_path: Path) -> None:
    shards = two_shards(tmp_path)
    remedy = rf"has no media metadata.*`energon-fn prepare-media {tmp_path} --media-metadata-by-ext"
    with pytest.raises(DatasetError, match="does not exist, so there is no media metadata"):
        read_media_metadata(index_of(tmp_path), "x/1.png")
    prepare_dataset(tmp_path, shards, split_parts_ratio=RATIO)
    with pytest.raises(DatasetError, match=remedy):
        read_media_metadata(index_of(tmp_path), "x/1.png")
    # And it is there at once when that was done, in this process too.
    assert write_media_metadata(tmp_path, "extension") == 5
    assert kept(tmp_path) == BY_EXTENSION


def test_added_later_it_is_the_same(tmp_path: Path) -> None:
    for name in ("with", "later"):
        shards = two_shards(tmp_path / name)
    prepare_dataset(tmp_path / "with", shards, split_parts_ratio=RATIO, media_filter="header")
    later = tmp_path / "later"
    prepare_dataset(later, shards, split_parts_ratio=RATIO)
    before = {path: path.read_bytes() for path in later.rglob("*") if path.is_file()}
    steps: list[int] = []

    def progress(items: Any, length: int) -> Any:
        for n, item in enumerate(items, 1):
            steps.append(length - n)
            yield item

    assert write_media_metadata(later, "header", workers=2, progress_fn=progress) == 6
    assert steps == [1, 0]
    assert kept(later) == kept(tmp_path / "with")
    for name in ("samples", "sample_parts", "media_metadata"):
        assert table(later, name) == table(tmp_path / "with", name)
    changed = {path.name for path, data in before.items() if path.read_bytes() != data}
    assert changed == {"index.sqlite"}


def test_preparing_again_makes_it_again(tmp_path: Path) -> None:
    shards = two_shards(tmp_path)
    prepare_dataset(tmp_path, shards, split_parts_ratio=RATIO, media_filter="*.png")
    write_tar(tmp_path / "a.tar", [("x/9", {"png": picture("PNG", (1, 2))})])
    prepare_dataset(tmp_path, shards, tar_index_only=True)
    assert kept(tmp_path) == {"x/9.png": image(1, 2, "PNG")}
    prepare_dataset(tmp_path, shards, split_parts_ratio=RATIO, media_filter="*.jpg")
    assert kept(tmp_path) == {"3.JPG": image(7, 9, "JPEG")}
    assert write_media_metadata(tmp_path, "header") == 4
    assert media.filters_of(index_of(tmp_path)) == ("header",)
    prepare_dataset(tmp_path, shards, split_parts_ratio=RATIO)
    assert set(kept(tmp_path)) == {"x/9.png", "3.JPG", "3.gif", "3.bin"}


def test_all_filters_that_an_index_was_made_with(tmp_path: Path) -> None:
    """The published `prepare-media` adds to what is there."""
    shards = two_shards(tmp_path)
    prepare_dataset(tmp_path, shards, split_parts_ratio=RATIO, media_filter="*.gif")
    with closing(sqlite3.connect(index_of(tmp_path))) as db:
        row = "INSERT INTO media_filters (strategy, patterns) VALUES ('GLOB', '*.jpg,*.txt')"
        db.execute(row)
        db.commit()
    write_tar(tmp_path / "a.tar", [("1", {"jpg": PNG, "png": PNG, "left.gif": PNG})])
    prepare_dataset(tmp_path, shards, tar_index_only=True)
    assert media.filters_of(index_of(tmp_path)) == ("*.gif", "*.jpg,*.txt")
    assert set(kept(tmp_path)) == {"1.jpg", "1.left.gif", "3.JPG", "3.gif"}


@pytest.mark.parametrize("workers", [1, 2])
def test_broken_files_are_told_of_and_left_out(
    tmp_path: Path, workers: int, capfd: pytest.CaptureFixture[str]
) -> None:
    write_tar(tmp_path / "a.tar", [("1", {"png": PNG}), ("2", {"jpg": jpeg()[:99], "txt": b""})])
    write_tar(tmp_path / "b.tar", [("3", {"png": b"?"}), ("4", {"jpg": jpeg()})])
    handler = logging.StreamHandler(sys.stderr)  # that of worker processes too
    logging.getLogger("energon_fn").addHandler(handler)
    try:
        names = ["a.tar", "b.tar"]
        prepare_dataset(
            tmp_path, names, split_parts_ratio=RATIO, media_filter="extension", workers=workers
        )
    finally:
        logging.getLogger("energon_fn").removeHandler(handler)
    told = sorted(capfd.readouterr().err.splitlines())
    assert [line.partition(": left out of the media metadata: ")[::2] for line in told] == [
        (f"{tmp_path}/a.tar", "2.jpg: Truncated File Read"),
        (f"{tmp_path}/b.tar", "3.png: it is no picture that Pillow knows"),
    ]
    assert set(kept(tmp_path)) == {"1.png", "4.jpg"}


def test_sound_without_pyav_ends_it_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    write_tar(tmp_path / "a.tar", [("1", {"wav": WAV, "png": PNG})])
    with pytest.raises(DatasetError, match=r"1\.wav is audio or video"):
        prepare_dataset(tmp_path, ["a.tar"], split_parts_ratio=RATIO, media_filter="extension")
    assert os.listdir(tmp_path) == ["a.tar"]
    prepare_dataset(tmp_path, ["a.tar"], split_parts_ratio=RATIO, media_filter="*.png")
    assert kept(tmp_path) == {"1.png": SMALL}


def test_a_shard_that_changed_keeps_the_index(tmp_path: Path) -> None:
    shards = two_shards(tmp_path)
    prepare_dataset(tmp_path, shards, split_parts_ratio=RATIO)
    before = Path(index_of(tmp_path)).read_bytes()
    write_tar(tmp_path / "a.tar", [("new", {"png": PNG})])
    with pytest.raises(DatasetError, match=r"a\.tar changed since it was indexed"):
        write_media_metadata(tmp_path, "extension", workers=1)
    assert Path(index_of(tmp_path)).read_bytes() == before
    assert {path.name for path in (tmp_path / ".nv-meta").iterdir()} == {
        "index.sqlite", "index.uuid", ".info.json", "split.yaml",
    }  # fmt: skip


def test_an_index_of_an_older_release(tmp_path: Path) -> None:
    prepare_dataset(tmp_path, two_shards(tmp_path), split_parts_ratio=RATIO)
    with closing(sqlite3.connect(index_of(tmp_path))) as db:
        db.execute("DROP TABLE sample_parts")
    with pytest.raises(DatasetError, match=r"an older release made it.*`energon-fn prepare "):
        write_media_metadata(tmp_path, "extension")
    assert media.filters_of(index_of(tmp_path)) == ()


def test_what_newer_and_foreign_releases_wrote(tmp_path: Path) -> None:
    prepare_dataset(
        tmp_path, two_shards(tmp_path), split_parts_ratio=RATIO, media_filter="extension"
    )
    with closing(sqlite3.connect(index_of(tmp_path))) as db:
        for name, kind, text in (
            ("more", "image", '{"width":1,"height":2,"format":"A","mode":"B","depth":3}'),
            ("type", "mesh", "{}"),
            ("less", "image", '{"width":1}'),
            ("list", "av", "[1]"),
            ("text", "av", "{"),
        ):
            db.execute("INSERT INTO media_metadata VALUES (?, ?, ?)", (name, kind, text))
        db.commit()
    assert read_media_metadata(index_of(tmp_path), "more") == image(1, 2, "A", "B")
    for name in ("type", "less", "list", "text"):
        with pytest.raises(DatasetError, match=f"metadata of '{name}' is not understood"):
            read_media_metadata(index_of(tmp_path), name)


def test_threads_and_forks_read(tmp_path: Path) -> None:
    prepare_dataset(
        tmp_path, two_shards(tmp_path), split_parts_ratio=RATIO, media_filter="extension"
    )
    index = index_of(tmp_path)
    wrong: list[object] = []

    def read() -> None:
        for name in [*BY_EXTENSION] * 50:
            found = read_media_metadata(index, name)
            if found != BY_EXTENSION[name]:
                wrong.append(found)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(read_media_metadata, (index, "3.JPG")) == BY_EXTENSION["3.JPG"]
    for thread in threads:
        thread.join()
    assert wrong == []


# ------------------------------------------------------------------------------------- plain files


def fill(folder: Path, contents: Mapping[str, bytes]) -> None:
    for name, data in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def test_a_folder_of_files(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    contents = {"a.png": PNG, "b/c d.JPG": jpeg(), "b/.e.gif": picture("GIF"), "b/f.txt": PNG,
                "b.png/g.png": PNG, "h.jpg": b"broken"}  # fmt: skip
    fill(folder, contents)
    fill(tmp_path / "elsewhere", {"i.png": PNG})
    (folder / "one").symlink_to("../elsewhere")
    (folder / "two").symlink_to("../elsewhere")
    (folder / "b" / "up").symlink_to("..")  # no end
    (folder / "j.png").symlink_to("a.png")
    (folder / "nowhere.png").symlink_to("nothing")
    os.mkfifo(folder / "pipe.png")

    names = {"a.png", "b/c d.JPG", "b/.e.gif", "b.png/g.png", "one/i.png", "two/i.png", "j.png"}
    assert write_media_metadata(folder, "extension", workers=2) == len(names)
    assert set(kept(folder)) == names
    assert kept(folder)["b/c d.JPG"] == image(24, 16, "JPEG")
    assert os.listdir(folder / ".nv-meta") == ["index.sqlite"]

    # Again: what went is gone, what changed is as it is, what else is in .nv-meta is no matter.
    (folder / "a.png").write_bytes(picture("PNG", (3, 4)))
    (folder / "b" / "c d.JPG").unlink()
    (folder / ".nv-meta" / "k.png").write_bytes(PNG)
    assert write_media_metadata(folder, "*.png,b/*", workers=1) == len(names)
    assert kept(folder)["a.png"] == kept(folder)["j.png"] == image(3, 4, "PNG")
    assert set(kept(folder)) == names - {"b/c d.JPG"} | {"b/f.txt"}


def test_files_that_cannot_be_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fill(tmp_path, {"a.png": PNG, "b.png": PNG})
    listed = files.list_files(tmp_path, ".nv-meta")
    monkeypatch.setattr(files, "list_files", lambda *_: listed)
    (tmp_path / "a.png").unlink()
    assert write_media_metadata(tmp_path, "extension", workers=1) == 1
    assert f"left out of the media metadata: {tmp_path}/a.png does not exist" in caplog.text


def test_many_files_in_several_processes(tmp_path: Path) -> None:
    sizes = {f"{n // 100}/{n}.bmp": (n + 1, 2) for n in range(300)}
    fill(tmp_path, {name: picture("BMP", size) for name, size in sizes.items()})
    seen: list[int] = []

    def progress(items: Any, length: int) -> Any:
        for item in items:
            seen.append(length)
            yield item

    assert write_media_metadata(tmp_path, "header", workers=2, progress_fn=progress) == 300
    assert kept(tmp_path) == {name: image(*size, "BMP") for name, size in sizes.items()}
    assert seen == [300] * 300


def test_folders_without_media(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="nowhere is not a folder"):
        write_media_metadata(tmp_path / "nowhere", "extension")
    fill(tmp_path, {"a.txt": b""})
    with pytest.raises(DatasetError, match="no media files: none below it is wanted by 'exten"):
        write_media_metadata(tmp_path, "extension")
    with pytest.raises(ValueError, match="has no pattern"):
        write_media_metadata(tmp_path, ",")
    assert os.listdir(tmp_path) == ["a.txt"]
    assert write_media_metadata(tmp_path, "header") == 0
    assert kept(tmp_path) == {}


# ------------------------------------------------------------------------------------ the commands


def test_prepare_commands(tmp_path: Path) -> None:
    two_shards(tmp_path)
    write_tar(tmp_path / "c.tar", [("9", {"jpg": jpeg()[:99]})])
    options = ("--non-interactive", "--split-ratio", "1,0,0", "--sample-type", "CrudeWebdataset")
    result = run("prepare", tmp_path, *options, "--media-metadata-by-extension")
    assert result.status == 0, result
    assert result.err == (
        f"warning: {tmp_path}/c.tar: left out of the media metadata: 9.jpg: Truncated File Read\n"
    )
    assert "media        5 files by extension" in result.out
    assert kept(tmp_path) == BY_EXTENSION

    result = run("prepare-media", tmp_path, "--media-metadata-by-glob", "*.bin,*.png")
    assert (result.status, result.err) == (0, "")
    assert result.out == (f"{tmp_path}: the metadata of 3 media files is in {index_of(tmp_path)}\n")
    assert "media        3 files by '*.bin,*.png'" in run("info", tmp_path).out
    result = run("prepare", tmp_path, "--tar-index-only")
    assert "media        3 files by '*.bin,*.png'" in result.out


def test_prepare_media_command_on_files(tmp_path: Path) -> None:
    fill(tmp_path, {"a.png": PNG, "b/c.jpg": jpeg()})
    result = run("prepare-media", tmp_path, "--media-metadata-by-header", "--num-workers", "2")
    assert (result.status, result.err) == (0, "")
    assert kept(tmp_path) == {"a.png": SMALL, "b/c.jpg": image(24, 16, "JPEG")}


@pytest.mark.parametrize(
    "words",
    [
        ["prepare-media", "."],
        ["prepare-media", ".", "--media-metadata-by-header", "--media-metadata-by-extension"],
        ["prepare", ".", "--media-metadata-by-header", "--media-metadata-by-glob", "*"],
    ],
)
def test_exactly_one_filter(words: list[str]) -> None:
    result = run(*words)
    assert result.status == 2
    assert "--media-metadata-by-header" in result.err.splitlines()[-1]


def test_the_assistant_repeats_the_options(tmp_path: Path) -> None:
    two_shards(tmp_path)
    result = run("prepare", tmp_path, "--media-metadata-by-glob", "*.png, *.jpg", stdin="\ncrude\n")
    assert result.status == 0, result
    assert "--media-metadata-by-glob '*.png, *.jpg'" in result.out.splitlines()[-1]


# ---------------------------------------------------------------------------- the published package

# Runs in the other Python: prepares what it is told to, then reads what both have prepared.
THEIR_SCRIPT = """
import contextlib, dataclasses, io, json, sys
from importlib.metadata import entry_points
from megatron.energon.cache.file_store import SystemFileStore, WebdatasetFileStore
from megatron.energon.epathlib import EPath
from megatron.energon.media import AVMetadata, ImageMetadata

commands, folders = json.load(sys.stdin)
out = io.StringIO()
with contextlib.redirect_stdout(out):
    energon, = entry_points(group="console_scripts", name="energon")
    for command in commands:
        sys.argv = ["energon", *command]
        try:
            energon.load()()
        except SystemExit as end:
            assert not end.code, (command, end.code)
kinds = ImageMetadata, AVMetadata
fields = [[field.name for field in dataclasses.fields(kind)] for kind in kinds]
found = []
for kind, folder, names in folders:
    store = SystemFileStore(folder) if kind == "files" else WebdatasetFileStore(EPath(folder))
    found.append({name: dataclasses.asdict(store.get_media_metadata(name)) for name in names})
print(json.dumps([out.getvalue(), fields, found]))
"""
HOWS = ["extension", "header"]


class Both(NamedTuple):
    root: Path
    """OURS_OR_THEIRS/HOW has shards that were prepared, .../files a folder of plain files."""
    help: str
    fields: list[list[str]]
    read: dict[str, dict[str, Any]]
    """What they read of what we prepared, by the folder's name."""


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory, published_python: str) -> Both:
    root = tmp_path_factory.mktemp("both")
    ours, theirs = root / "ours", root / "theirs"
    fill(ours / "files", {"a.png": PNG, "b/c.JPG": jpeg(), "b/.d.gif": PNG, "e.txt": PNG})
    names = two_shards(ours / "header", "b.tar")  # they pass over .tar.gz
    parts = {kind.lower(): picture(kind) for kind in ("WEBP", "TIFF", "BMP", "AVIF")}
    parts |= {"jp2": picture("JPEG2000"), "PNG": PNG, "a.png": picture("PNG", mode="I;16")}
    parts |= {"ppm": picture("PPM"), "tga": picture("TGA"), "txt": jpeg(), "pdf": b"%PDF-1.4 "}
    theirs_has_av = subprocess.run([published_python, "-c", "import av"], capture_output=True)
    if find_spec("av") and not theirs_has_av.returncode:
        parts |= {"wav": WAV, "mp4": video("mp4"), "mov": video("mov"), "avi": video("avi")}
    write_tar(ours / "header" / "c.tar", [("5", parts)])
    shutil.copytree(ours / "header", ours / "extension")
    shutil.copytree(ours, theirs)

    commands = [["prepare-media", "--help"]]
    files = ["prepare-media", str(theirs / "files"), "--media-metadata-by-extension"]
    commands.append([*files, "--num-workers", "1", "--no-progress"])
    for how in HOWS:
        options = ["--non-interactive", "--split-ratio", "1,0,0", "--no-progress"]
        options += ["--sample-type", "CrudeWebdataset", f"--media-metadata-by-{how}"]
        commands.append(["prepare", str(theirs / how), "--num-workers", "1", *options])
        prepare_dataset(
            ours / how, [*names, "c.tar"], split_parts_ratio=RATIO, media_filter=how,
            shuffle_seed=None, workers=1,
        )  # fmt: skip
    write_media_metadata(ours / "files", "extension")
    folders = [(name, str(ours / name), [*kept(ours / name)]) for name in ("files", *HOWS)]
    ran = subprocess.run(
        [published_python, "-W", "ignore", "-c", THEIR_SCRIPT],
        input=json.dumps([commands, folders]), capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-3000:]
    help, fields, read = json.loads(ran.stdout.splitlines()[-1])
    return Both(root, help, fields, dict(zip(("files", *HOWS), read, strict=True)))


def test_the_types_have_the_published_fields(both: Both) -> None:
    assert both.fields == [
        [field.name for field in fields(kind)] for kind in (ImageMetadata, AVMetadata)
    ]


@pytest.mark.parametrize("name", ["files", *HOWS])
def test_they_read_what_we_keep(both: Both, name: str) -> None:
    ours = kept(both.root / "ours" / name)
    assert both.read[name] == {key: vars(value) for key, value in ours.items()}
    assert len(ours) == 3 if name == "files" else len(ours) > 11


@pytest.mark.parametrize("name", ["files", *HOWS])
def test_both_keep_the_same(both: Both, name: str) -> None:
    """Of files that both understand: their command ends at what Pillow cannot read."""
    ours, theirs = both.root / "ours" / name, both.root / "theirs" / name
    assert sorted(table(ours, "media_metadata")) == sorted(table(theirs, "media_metadata"))
    assert kept(ours) == kept(theirs)
    filters = [[row[1:3] for row in table(one, "media_filters")] for one in (ours, theirs)]
    assert filters[0] == filters[1]
    assert media.filters_of(index_of(theirs)) == media.filters_of(index_of(ours))
    columns = "SELECT m.name, c.* FROM sqlite_master m JOIN pragma_table_info(m.name) c"
    schemas = []
    for folder in (ours, theirs):
        with closing(sqlite3.connect(index_of(folder))) as db:
            schemas.append(sorted(db.execute(columns)))
    assert schemas[0] == schemas[1]
    if name == "files":
        assert os.listdir(ours / ".nv-meta") == os.listdir(theirs / ".nv-meta")


def test_options_are_the_published_ones(both: Both) -> None:
    def options(text: str) -> set[str]:
        return set(re.findall(r"--[a-z][a-z-]+", text))

    # --tmp-path is for folders that are not on local disks.
    assert options(both.help) - {"--tmp-path"} == options(run("prepare-media", "--help").out)
