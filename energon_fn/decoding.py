"""Bytes of a part -> value, decided by the part's name.

The last dot-piece of the name decides (``detail.json`` -> json), in any case of letters.
:data:`KINDS` is both the documentation and what runs; pictures are read by
:mod:`energon_fn.pictures`, audio and video by :mod:`energon_fn.av`.

Data is not code: pickles are refused, arrays of objects too, ``torch.load`` runs with
``weights_only``.
"""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import KW_ONLY, dataclass, fields
from functools import cached_property, lru_cache, partial
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray

from energon_fn.av import AV_OPTIONS, decode_recording
from energon_fn.disk.media import kind_of
from energon_fn.errors import SampleError
from energon_fn.pictures import PICTURES, picture_decoder

Decode = Callable[[bytes], Any]

# --- by extension ---------------------------------------------------------------------------------

_ZEROS = bytes.maketrans(b"123456789", b"0" * 9)
_raw_decode = json.JSONDecoder().raw_decode
_orjson: Decode | None = None
with suppress(ImportError):
    import orjson

    _orjson = orjson.loads


def _json(data: bytes) -> Any:
    """``json.loads(data)``, which is asked only for what the quick ways do not take for certain."""
    try:
        if _orjson is None:
            text = data.decode()
            value, end = _raw_decode(text)
            if end == len(text) or not text[end:].strip(" \t\n\r"):
                return value
        # orjson makes floats of integers beyond 64 bits, which have 19 digits or more. So many in
        # a row show as two digits side by side in every ninth byte, which is quick to look for.
        elif data[::9].translate(_ZEROS).find(b"00") < 0 or b"0" * 19 not in data.translate(_ZEROS):
            return _orjson(data)
    except ValueError:
        pass
    return json.loads(data)


def _jsonl(data: bytes) -> list[Any]:
    values = []
    for number, line in enumerate(data.split(b"\n"), 1):
        if line.strip():
            try:
                values.append(_json(line))
            except ValueError as exc:
                what = str(exc)
                if isinstance(exc, json.JSONDecodeError):  # it counts lines from this one
                    what = f"{exc.msg} at column {exc.colno}"
                raise ValueError(f"line {number}: {what}") from exc
    return values


def _npy(data: bytes) -> NDArray[Any]:
    array: NDArray[Any] = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    return array


def _npz(data: bytes) -> dict[str, Any]:
    if data[:2] != b"PK":  # np.load would take a .npy too, and guess at a pickle otherwise
        raise ValueError(f"not an npz (zip) file, it begins with {data[:8]!r}")
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        return dict(arrays)


def _pth(data: bytes) -> Any:
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as exc:  # its messages are pages that recommend weights_only=False
        raise ValueError(
            f"torch.load(weights_only=True) failed with {type(exc).__name__}: the part is damaged "
            "or holds more than tensors, numbers, text, lists and dicts"
        ) from exc


def _ten(data: bytes) -> list[NDArray[Any]]:
    from webdataset.tenbin import decode_buffer  # slow to import, seldom used

    arrays: list[NDArray[Any]] = decode_buffer(data)
    return arrays


def _refuse(data: bytes) -> NoReturn:
    raise ValueError(
        "pickles are never loaded, they can run any code: store it as json, npy, npz or pth, leave "
        "the part out of what the dataset uses, or take all parts as bytes (auto_decode=False)"
    )


KINDS: tuple[tuple[str, str, Decode], ...] = (
    ("txt text transcript", "str, strict UTF-8", bytes.decode),
    ("json jsn", "what the JSON says", _json),
    ("jsonl", "list, one value per line that is not blank", _jsonl),
    ("cls cls2 count index inx id", "int", int),
    ("npy", "array (no objects)", _npy),
    ("npz", "dict of arrays (no objects)", _npz),
    ("pth pt", "tensors on the CPU: torch.load(weights_only=True)", _pth),
    ("ten tb", "list of arrays: webdataset.tenbin", _ten),
    ("pkl pickle pyd pyc dill joblib", "refused: SampleError", _refuse),
)
"""(extensions, what comes out, decoder) of everything but pictures."""

_DECODERS = {extension: decode for names, _, decode in KINDS for extension in names.split()}


def _gunzip(decode: Decode, data: bytes) -> Any:
    return decode(gzip.decompress(data))


# --- the interface --------------------------------------------------------------------------------

RECORDINGS = "mp4 avi mov webm mkv flv mp3 wav flac"
"""Extensions that are audio or video."""

_HEAD = 32
"""Bytes that say what a picture or recording is."""

_BYTES = frozenset((bytes, bytearray, memoryview))


def _by_content(picture: Decode, recording: Decode, by_name: Decode, data: bytes) -> Any:
    return {"image": picture, "av": recording}.get(kind_of(data[:_HEAD]) or "", by_name)(data)


def _error(name: str, sample: Mapping[str, Any], exc: Exception) -> SampleError:
    of = f" of sample {sample['__key__']!r}" if "__key__" in sample else ""
    shards = {s.shard_name for s in sample.get("__sources__") or () if hasattr(s, "shard_name")}
    of += f" in shard {', '.join(map(repr, sorted(shards)))}" if shards else ""
    what = " ".join(str(exc).split())[:300] or "it gave no reason"
    if not isinstance(exc, (ValueError, OSError)):  # these speak for themselves
        what = f"{type(exc).__name__}: {what}"
    size = len(bytes(sample[name]))
    return SampleError(f"cannot decode part {name!r} ({size} bytes){of}: {what}")


@dataclass(frozen=True)
class SampleDecoder:
    """A function that decodes every part of a raw sample, into a new dict.

    image_decode: one of :data:`IMAGE_OPTIONS`; None leaves all parts, not only pictures, as bytes.
    av_decode: what audio and video become: ``"AVDecoder"``, an :class:`~energon_fn.av.AVDecoder`
    that decodes what is asked of it; ``"torch"``, all of it as an :class:`~energon_fn.av.AVData`;
    ``"pyav"``, what ``av.open`` gives; None, bytes. PyAV, which decodes them, is an extra (``av``).
    video_decode_audio: with ``"torch"``, the sound of videos too.
    guess_content: where a part's bytes begin like a picture or recording, it is one whatever its
    name.
    min_size: the pixels that both sides of a picture need (a number, or width and height). JPEGs
    that have at least twice as many come out in 1/2, 1/4 or 1/8 of their size, never below
    ``min_size``: smaller than the file says, and much faster. It is libjpeg that scales, while it
    decodes. Photos made 96 to 224 pixels small from there differ by 1.3 of 255 on average from
    those decoded in full (PSNR 40 dB; the worst of ten, very fine-grained, by 4.8 and 29 dB), or
    by 0.4 (48 dB) if twice that size is asked for. All other pictures come out as ever.
    backend: what decodes JPEGs for arrays and tensors: ``"pillow"``; ``"simplejpeg"``, an extra
    (``fast``), quicker for large pictures and for arrays; ``"torchvision"``, without ``min_size``.
    Built on the same libjpeg-turbo they give the same pixels. What they cannot read, and JPEGs of
    other colours than those asked for, Pillow decodes all the same.

    Keys that begin with ``__`` and values that are not bytes (decoded already) pass through. The
    function pickles. It raises :class:`~energon_fn.errors.SampleError` naming part, sample and
    shard for what cannot be decoded. Options that are unknown or do not go together are a
    ValueError and a missing package is an ImportError at once.

    Documented in https://nvidia.github.io/Megatron-Energon/basic/data_decoding.html; ``min_size``,
    ``backend`` and the Nones are our own.

    >>> decode = decoder()
    >>> decode({"__key__": "a/1", "txt": b"a cat", "detail.json": b"[1, 2]", "bin": b"?"})
    {'__key__': 'a/1', 'txt': 'a cat', 'detail.json': [1, 2], 'bin': b'?'}
    >>> decode({"__key__": "a/1", "cls": b"cat"})
    Traceback (most recent call last):
        ...
    energon_fn.errors.SampleError: cannot decode part 'cls' (3 bytes) of sample 'a/1': invalid
    literal for int() with base 10: b'cat'
    >>> decoder("torchrbg")
    Traceback (most recent call last):
        ...
    ValueError: unknown image option 'torchrbg', did you mean 'torchrgb'? Known: l8, rgb8, ...

    A picture of 1200 x 900 that is to become 224 x 224:

    >>> from PIL import Image
    >>> file = io.BytesIO()
    >>> Image.new("RGB", (1200, 900)).save(file, "JPEG")
    >>> decoder(min_size=224)({"jpg": file.getvalue()})["jpg"].shape
    torch.Size([3, 225, 300])
    """

    image_decode: str | None = "torchrgb"
    _: KW_ONLY
    av_decode: str | None = "AVDecoder"
    video_decode_audio: bool = False
    guess_content: bool = False
    min_size: int | tuple[int, int] | None = None
    backend: str = "pillow"

    def __post_init__(self) -> None:
        if self.av_decode not in AV_OPTIONS:
            known = ", ".join(map(repr, AV_OPTIONS))
            raise ValueError(f"unknown av_decode {self.av_decode!r}. Known: {known}")
        self({})  # finds what is wrong with the options for pictures

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        if self.image_decode is None:
            return sample
        # For small samples this is most of the work: one loop, and only what is bytes is looked at.
        decode_for = self._decode_for
        decoded = dict(sample)
        try:
            for name, data in sample.items():
                if type(data) in _BYTES:
                    decoded[name] = decode_for(name)(bytes(data))
        except ImportError:  # a package is missing: not this sample's fault
            raise
        except Exception as exc:
            raise _error(name, sample, exc) from exc
        return decoded

    @cached_property
    def _decode_for(self) -> Callable[[str], Decode]:
        """Part name -> what decodes it. Each name is thought about once."""
        picture = picture_decoder(
            self.image_decode or "pil", min_size=self.min_size, backend=self.backend
        )
        recording: Decode = bytes  # bytes(b) is b
        if self.av_decode is not None:
            recording = partial(
                decode_recording,
                av_decode=self.av_decode,
                video_decode_audio=self.video_decode_audio,
            )
        decoders = _DECODERS | dict.fromkeys(PICTURES.split(), picture)
        decoders |= dict.fromkeys(RECORDINGS.split(), recording)

        def find(name: str) -> Decode:
            if name.startswith("__"):
                return bytes
            rest, _, extension = name.lower().rpartition(".")
            if extension == "gz":
                extension = rest.rpartition(".")[2]
                return partial(_gunzip, decoders.get(extension, bytes))
            decode = decoders.get(extension, bytes)
            if self.guess_content:
                return partial(_by_content, picture, recording, decode)
            return decode

        return lru_cache(maxsize=4096)(find)  # bounded: names with many dots make many part names

    def __getstate__(self) -> dict[str, Any]:
        return {own.name: getattr(self, own.name) for own in fields(self)}


decoder = SampleDecoder
"""Its name in pipelines. (It is a class so that a task encoder may have it as an attribute.)"""


def decode_part(name: str, data: bytes, *, image: str | None = "torchrgb") -> Any:
    """Decode one part by its name, see :func:`decoder`.

    >>> decode_part("detail.json", b'{"width": 3}')
    {'width': 3}
    >>> decode_part("left.ppm", b"P6 2 1 255 " + bytes([255, 0, 0, 0, 0, 255]))
    tensor([[[1., 0.]],
            [[0., 0.]],
            [[0., 1.]]])
    """
    return decoder(image)({name: data})[name]
