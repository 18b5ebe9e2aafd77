"""Media metadata: how large a picture and how long a recording is, kept where no file is opened.

The published megatron-energon 7 keeps it in two more tables of ``.nv-meta/index.sqlite`` (its
schema, as found by preparing datasets), and so do we::

    media_metadata(entry_key, metadata_type, metadata_json)
    media_filters(filter_id, strategy, patterns, created_at_utc)

``entry_key`` is a file's name in its tar (``0001.jpg``), or relative to its folder if it lies in no
tar. ``metadata_type`` is ``image`` or ``av``; the JSON has those fields that are known.

Of pictures only the header is read, by Pillow; of audio and video what the container says of its
streams, by PyAV (``pip install energon_fn[av]``). Nothing is decoded.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from functools import partial
from typing import IO, Any

from PIL import Image, UnidentifiedImageError
from toolz import merge, valfilter

from energon_fn.disk import files
from energon_fn.disk.index import Entry, Index, opened
from energon_fn.disk.tars import Media, ShardIndex, index_shard
from energon_fn.errors import DatasetError, SampleError, logger


@dataclass(frozen=True, kw_only=True)
class ImageMetadata:
    """What a picture's header says: size in pixels, and Pillow's names of format and mode."""

    width: int
    height: int
    format: str
    mode: str


@dataclass(frozen=True, kw_only=True)
class AVMetadata:
    """What there is to hear and see; None for what is not there or not known.

    Durations are in seconds. ``audio_num_samples`` is what plays in that time, per channel; a
    decoder may give some more. A cover picture is no video.
    """

    video_duration: float | None = None
    video_num_frames: int | None = None
    video_fps: float | None = None
    video_width: int | None = None
    video_height: int | None = None
    audio_duration: float | None = None
    audio_channels: int | None = None
    audio_sample_rate: int | None = None
    audio_num_samples: int | None = None


MediaMetadata = ImageMetadata | AVMetadata

FILTERS = EXTENSION, HEADER = "extension", "header"
"""The filters besides glob patterns."""

_IMAGE, _AV = "image", "av"
_TYPES: dict[str, type[ImageMetadata] | type[AVMetadata]] = {_IMAGE: ImageMetadata, _AV: AVMetadata}

# The published ones, found by asking it for every ending that mimetypes and Pillow know.
_ENDINGS = {
    **dict.fromkeys(
        (".bmp", ".gif", ".ico", ".j2k", ".jp2", ".jpeg", ".jpg", ".jpx", ".png", ".tif", ".tiff",
         ".webp"), _IMAGE,
    ),
    **dict.fromkeys(
        (".aac", ".avi", ".flac", ".m4a", ".m4v", ".mkv", ".mov", ".mp3", ".mp4", ".ogg", ".wav",
         ".webm"), _AV,
    ),
}  # fmt: skip

# ------------------------------------------------------------------------------------- of one file


def media_metadata(data: bytes | IO[bytes], name: str, how: str = HEADER) -> MediaMetadata | None:
    """The metadata of a file, or None if it is no media file by the filter.

    data: the content, or a file open at its beginning (only what is needed of it is read).
    how: which files are media: ``"extension"``, those with a usual ending; ``"header"``, those
    that begin as a known format does; or glob patterns separated by commas, of whole names, case
    ignored. What it is its first bytes say; its ending if they say nothing.

    Raises :class:`SampleError` for a media file that cannot be read, :class:`DatasetError` for
    audio and video without PyAV.

    >>> file = io.BytesIO()
    >>> Image.new("RGB", (20, 10)).save(file, "PNG")
    >>> media_metadata(file.getvalue(), "a.txt")
    ImageMetadata(width=20, height=10, format='PNG', mode='RGB')
    >>> media_metadata(file.getvalue(), "a.txt", "extension")
    >>> media_metadata(file.getvalue(), "b/a.png", "*.jpg, B/*")
    ImageMetadata(width=20, height=10, format='PNG', mode='RGB')
    """
    if not is_wanted(name, how):
        return None
    file = io.BytesIO(data) if isinstance(data, bytes) else data
    kind = kind_of(file.read(32))
    file.seek(0)
    if how == HEADER and kind is None:
        return None
    try:
        match kind or _ENDINGS.get(_ending(name)):
            case "image":
                return _image_metadata(file)
            case "av":
                return av_metadata(file)
        raise ValueError("neither a known header nor a known ending")
    except _NeedsPyAV:
        raise DatasetError(
            f"{name} is audio or video. Reading those needs PyAV: `pip install energon_fn[av]`. Or "
            "take pictures only: --media-metadata-by-glob '*.jpg,*.png'."
        ) from None
    except DatasetError:
        raise  # not the picture is wrong but the shard that it is in
    except UnidentifiedImageError as error:
        raise SampleError(f"{name}: it is no picture that Pillow knows") from error
    except Exception as error:  # Pillow raises any on broken files
        why = getattr(error, "strerror", None) or error  # not libav's number
        raise SampleError(f"{name}: {why}") from error


def is_wanted(name: str, how: str) -> bool:
    """Whether the filter wants a file of this name to be looked at.

    >>> is_wanted("a.JPG", "extension"), is_wanted("a.txt", "header"), is_wanted("a.jpg", "*.png")
    (True, True, False)
    """
    if how in FILTERS:
        return how == HEADER or _ending(name) in _ENDINGS
    return any(fnmatchcase(name.lower(), pattern) for pattern in _patterns(how))


def check_filter(how: str) -> None:
    """Raise ValueError for a filter that wants nothing.

    >>> check_filter(" , ")
    Traceback (most recent call last):
        ...
    ValueError: the media filter ' , ' has no pattern: give "extension", "header" or ...
    """
    if not _patterns(how):
        raise ValueError(
            f'the media filter {how!r} has no pattern: give "extension", "header" or glob patterns '
            'such as "*.jpg,*.png".'
        )


def _patterns(how: str) -> list[str]:
    return [pattern.strip().lower() for pattern in how.split(",") if pattern.strip()]


def _ending(name: str) -> str:
    return os.path.splitext(name)[1].lower()


_IMAGE_HEADS = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*",
                b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51")  # fmt: skip
_AV_HEADS = (b"ID3", b"fLaC", b"OggS", b"\x1aE\xdf\xa3", b"FLV\1", b"#!AMR", b"\0\0\1\xba",
             b"\0\0\1\xb3", b"0&\xb2u\x8ef\xcf\x11")  # fmt: skip
_IMAGE_BRANDS = (b"avif", b"avis", b"heic", b"heix", b"mif1", b"msf1")
_RIFF = {b"WEBP": _IMAGE, b"WAVE": _AV, b"AVI ": _AV}


def kind_of(head: bytes) -> str | None:
    """What begins like this; None if that is not known."""
    if head.startswith(_IMAGE_HEADS):
        return _IMAGE
    if head.startswith(_AV_HEADS):
        return _AV
    if head[:2] == b"BM" and head[6:10] == bytes(4):
        return _IMAGE
    if head[:4] == b"\0\0\1\0" and head[5:6] == b"\0" != head[4:5] and head[9:10] == b"\0":
        return _IMAGE  # ICO
    if head[:4] == b"RIFF":
        return _RIFF.get(head[8:12])
    if head[:4] == b"FORM" and head[8:12] in (b"AIFF", b"AIFC"):
        return _AV
    if head[4:8] == b"ftyp":
        return _IMAGE if head[8:12] in _IMAGE_BRANDS else _AV
    if head[4:8] in (b"moov", b"mdat", b"wide"):
        return _AV
    # MPEG audio of layers II and III, and ADTS: eleven bits, and no value that is reserved.
    if len(head) > 2 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0:
        layer = head[1] & 6
        mpeg = layer in (2, 4) and head[2] & 0xF0 != 0xF0 and head[2] & 0x0C != 0x0C
        return _AV if mpeg or head[1] & 0xF6 == 0xF0 else None
    return None


def _image_metadata(file: IO[bytes]) -> ImageMetadata:
    with Image.open(file) as image:
        return ImageMetadata(
            width=image.width, height=image.height, format=image.format or "", mode=image.mode
        )


class _NeedsPyAV(ImportError):
    pass


def open_recording(file: IO[bytes]) -> Any:
    """PyAV's container of audio or video; ImportError without PyAV, what it raises for others."""
    try:
        import av
    except ImportError as error:
        needs = "audio and video need PyAV: `pip install energon-fn[av]`"
        raise _NeedsPyAV(needs) from error
    excused: dict[str, Any] = {"metadata_errors": "ignore"}  # texts that are no UTF-8
    if int(av.__version__.split(".")[0]) >= 19:  # which excuses them itself
        excused.clear()
    return av.open(file, **excused)


def av_metadata(file: IO[bytes]) -> AVMetadata:
    """The metadata of audio or video; raises as :func:`open_recording` does."""
    with open_recording(file) as container:
        from av.stream import Disposition  # it is there

        cover = Disposition.attached_pic
        video: Any = next((s for s in container.streams.video if not s.disposition & cover), None)
        audio = next(iter(container.streams.audio), None)
        if video is None and audio is None:
            raise ValueError("there is neither audio nor video in it")
        found: dict[str, Any] = {}
        streams = [stream for stream in (video, audio) if stream is not None]
        lengths = {s.index: s.duration for s in streams if not _is_guess(s, container.format.name)}
        # Matroska, say, tells neither length nor number of frames: then all packets are gone over.
        unknown = [
            stream
            for stream in streams
            if lengths.get(stream.index) is None or (stream is video and not stream.frames)
        ]
        ends, counts = _go_over(container, unknown)
        lengths = merge(ends, valfilter(lambda length: length is not None, lengths))
        if video is not None:
            rate = video.average_rate
            found |= {
                "video_duration": _seconds(video, lengths),
                "video_num_frames": video.frames or counts.get(video.index),
                "video_fps": float(rate) if rate else None,
                "video_width": video.width,
                "video_height": video.height,
            }
        if audio is not None:
            duration = _seconds(audio, lengths)
            found |= {
                "audio_duration": duration,
                "audio_channels": audio.channels,
                "audio_sample_rate": audio.sample_rate,
                "audio_num_samples": round((duration or 0.0) * audio.sample_rate),
            }
        return AVMetadata(**found)


def _go_over(container: Any, streams: list[Any]) -> tuple[dict[int, int], dict[int, int]]:
    """Where each stream ends, in its own unit of time, and how many packets it has."""
    ends: dict[int, int] = {}
    counts: dict[int, int] = {}
    for packet in container.demux(streams) if streams else ():
        if packet.size:  # the last ones that PyAV gives are empty
            i = packet.stream.index
            counts[i] = counts.get(i, 0) + 1
            if packet.pts is not None:
                ends[i] = max(ends.get(i, 0), packet.pts + (packet.duration or 0))
    return ends, counts


def _is_guess(stream: Any, format_name: str) -> bool:
    """Whether the length is one that libav made of the bit rate: such files do not tell theirs.

    Only some MP3s do, which then also tell how much of the beginning is padding.
    """
    return format_name in ("aac", "amr", "mp3") and not stream.start_time


def _seconds(stream: Any, lengths: Mapping[int, int]) -> float | None:
    length = lengths.get(stream.index)
    return None if length is None else float(length * stream.time_base)


# ------------------------------------------------------------------------------------ of a dataset


def media_row(metadata: MediaMetadata, name: str) -> Media:
    """The row of ``media_metadata`` for a file.

    >>> media_row(AVMetadata(audio_duration=0.5, audio_channels=2), "a.wav")
    ('a.wav', 'av', '{"audio_duration":0.5,"audio_channels":2}')
    """
    known = {name: value for name, value in vars(metadata).items() if value is not None}
    kind = _IMAGE if isinstance(metadata, ImageMetadata) else _AV
    return name, kind, json.dumps(known, separators=(",", ":"))


def index_shard_with_media(filters: tuple[str, ...], path: str, name: str) -> ShardIndex:
    """:func:`tars.index_shard`, and the media metadata of the shard's files too."""
    shard = index_shard(path, name)
    samples = zip(shard.keys, shard.parts, strict=True)
    return replace(shard, media=_media_of_samples(path, samples, filters))


def media_of_shard(index: Index, shard: int, count: int, filters: tuple[str, ...]) -> list[Media]:
    """The media metadata of the files in an indexed shard, which has ``count`` samples."""
    path = os.path.join(index.root, index.shards[shard])
    samples = (index.parts(shard, i) for i in range(count))
    return _media_of_samples(path, samples, filters)


def _media_of_samples(path: str, samples: Iterable[Entry], filters: tuple[str, ...]) -> list[Media]:
    entries = (
        _entry(path, f"{key}.{part}", partial(files.open_piece, path, offset, size), filters)
        for key, parts in samples
        for part, offset, size in parts
    )
    return [entry for entry in entries if entry is not None]


def media_of_files(root: str, names: Sequence[str], filters: tuple[str, ...]) -> list[Media | None]:
    """The media metadata of files in a folder, None for each that has none."""
    return [_entry(root, name, partial(_open, os.path.join(root, name)), filters) for name in names]


def _open(path: str) -> IO[bytes]:
    try:
        return files.open_file(path)
    except DatasetError as error:  # a shard would be of matter, a file is one of many
        raise SampleError(str(error)) from error


def _entry(
    where: str, name: str, open_it: Callable[[], IO[bytes]], filters: tuple[str, ...]
) -> Media | None:
    """The row of a file by the first filter that takes it; a broken file is told of, and None."""
    for how in filters:
        if is_wanted(name, how):
            try:
                with open_it() as file:
                    found = media_metadata(file, name, how)
            except SampleError as error:
                logger.warning("%s: left out of the media metadata: %s", where, error)
                return None
            if found is not None:
                return media_row(found, name)
    return None


def filter_rows(filters: Iterable[str]) -> list[tuple[str, str]]:
    """Filters as they stand in ``media_filters``.

    >>> filter_rows(["header", "*.jpg,*.png"])
    [('HEADER', ''), ('GLOB', '*.jpg,*.png')]
    """
    return [(how.upper(), "") if how in FILTERS else ("GLOB", how) for how in filters]


def filters_of(database: str | os.PathLike[str]) -> tuple[str, ...]:
    """The filters that the media metadata in an index was made with; () if it has none.

    >>> filters_of("/no/such/index.sqlite")
    ()
    """
    try:
        with opened(os.fspath(database)) as db:
            rows = db.execute("SELECT strategy, patterns FROM media_filters ORDER BY filter_id")
            found = rows.fetchall()
    except DatasetError:
        return ()  # made without, or by an older release, or not there
    return tuple(
        patterns if strategy == "GLOB" else strategy.lower() for strategy, patterns in found
    )


def count(database: str) -> int:
    """Of how many files an index has media metadata."""
    with opened(database) as db:
        return int(db.execute("SELECT COUNT(*) FROM media_metadata").fetchone()[0])


def read_media_metadata(database: str, name: str) -> MediaMetadata | None:
    """The metadata of a file from an ``index.sqlite``; None if it is not a media file there.

    name: as in the tar (``0001.jpg``, ``folder/0001.left.png``), or relative to the folder if the
    index is one that `energon-fn prepare-media` made of files in no tar.

    Raises :class:`DatasetError` if the dataset was prepared without media metadata.

    >>> read_media_metadata("/cats/.nv-meta/index.sqlite", "0001.jpg")
    Traceback (most recent call last):
        ...
    energon_fn.errors.DatasetError: /cats/.nv-meta/index.sqlite does not exist, so there is no ...
    """
    query = "SELECT metadata_type, metadata_json FROM media_metadata WHERE entry_key = ?"
    try:
        with opened(database) as db:
            row = db.execute(query, (name,)).fetchone()
    except DatasetError as error:
        there = os.path.exists(database)
        if there and "no such table" not in str(error.__cause__):
            raise
        root = os.path.dirname(os.path.dirname(database))
        raise DatasetError(
            f"{database} {'has' if there else 'does not exist, so there is'} no media metadata. "
            f"Add it: `energon-fn prepare-media {root} --media-metadata-by-extension`."
        ) from None
    if row is None:
        return None
    try:
        kind = _TYPES[row[0]]
        known = {field.name for field in fields(kind)}
        return kind(**{key: value for key, value in json.loads(row[1]).items() if key in known})
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise DatasetError(
            f"{database}: the media metadata of {name!r} is not understood: {row[0]!r}, "
            f"{row[1]!r}. Prepare it again: `energon-fn prepare-media`."
        ) from error
