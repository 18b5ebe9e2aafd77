"""Bytes of a part -> value, decided by the part's name.

The last dot-piece of the name decides (``detail.json`` -> json), in any case of letters. Options
and results for pictures are those of ``webdataset.imagehandler``
(https://webdataset.github.io/webdataset/api/webdataset/autodecode.html); :data:`IMAGE_OPTIONS` and
:data:`KINDS` are both the documentation and what runs.

Data is not code: pickles are refused, arrays of objects too, ``torch.load`` runs with
``weights_only``, and Pillow may only use its own pure decoders (its EPS reader, say, would start
Ghostscript on any file that begins like one, whatever the file is called).
"""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache, lru_cache, partial
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from energon_fn.errors import SampleError

Decode = Callable[[bytes], Any]

# --- pictures -------------------------------------------------------------------------------------

PICTURES = "jpg jpeg jpe jfif png apng ppm pgm pbm pnm webp bmp gif tif tiff jp2 j2k"
"""Extensions that are pictures. What the bytes are is seen from the bytes."""


@cache
def _formats() -> tuple[str, ...]:
    """Pillow's readers that may see the data: those of this build, the frequent ones first."""
    Image.init()
    wanted = ("JPEG", "PNG", "WEBP", "PPM", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000")
    return tuple(name for name in wanted if name in Image.OPEN)


def _open(data: bytes) -> Image.Image:
    """The picture, header read, pixels not yet."""
    remedy = "Set PIL.Image.MAX_IMAGE_PIXELS if you trust the data."
    try:
        picture = Image.open(io.BytesIO(data), formats=_formats())
    except UnidentifiedImageError as exc:
        raise ValueError(f"damaged or no picture: it begins with {data[:8]!r}") from exc
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as exc:
        raise ValueError(f"{exc} {remedy}") from exc
    # Up to twice the limit Pillow only warns: a picture is within the limit or it is an error.
    width, height = picture.size
    if Image.MAX_IMAGE_PIXELS is not None and width * height > Image.MAX_IMAGE_PIXELS:
        raise ValueError(
            f"{width} x {height} pixels are more than the limit of {Image.MAX_IMAGE_PIXELS}. "
            + remedy
        )
    return picture


def _array8(picture: Image.Image) -> NDArray[np.uint8]:
    return np.array(picture)  # a copy: asarray would be read-only


def _array(picture: Image.Image) -> NDArray[np.float32]:
    scaled: NDArray[np.float32] = np.divide(np.asarray(picture), np.float32(255), dtype=np.float32)
    return scaled


# Plane by plane: Pillow splits bands faster than NumPy or torch turn HWC into CHW.
def _tensor8(picture: Image.Image) -> torch.Tensor:
    if picture.mode == "L":
        return torch.from_numpy(_array8(picture))
    planes = np.empty((len(picture.mode), picture.height, picture.width), np.uint8)
    for plane, band in zip(planes, picture.split(), strict=True):
        plane[...] = np.asarray(band)
    return torch.from_numpy(planes)


def _tensor(picture: Image.Image) -> torch.Tensor:
    if picture.mode == "L":
        return torch.from_numpy(_array(picture))
    planes = np.empty((len(picture.mode), picture.height, picture.width), np.float32)
    for plane, band in zip(planes, picture.split(), strict=True):
        np.divide(np.asarray(band), np.float32(255), out=plane)
    return torch.from_numpy(planes)


def _same(picture: Image.Image) -> Image.Image:
    return picture


IMAGE_OPTIONS: dict[str, tuple[str, Callable[[Image.Image], Any], str]] = {
    "l8": ("L", _array8, "uint8 array (H, W), 0..255"),
    "rgb8": ("RGB", _array8, "uint8 array (H, W, 3), 0..255"),
    "rgba8": ("RGBA", _array8, "uint8 array (H, W, 4), 0..255"),
    "l": ("L", _array, "float32 array (H, W), 0..1"),
    "rgb": ("RGB", _array, "float32 array (H, W, 3), 0..1"),
    "rgba": ("RGBA", _array, "float32 array (H, W, 4), 0..1"),
    "torchl8": ("L", _tensor8, "uint8 tensor (H, W), 0..255"),
    "torchrgb8": ("RGB", _tensor8, "uint8 tensor (3, H, W), 0..255"),
    "torchrgba8": ("RGBA", _tensor8, "uint8 tensor (4, H, W), 0..255"),
    "torchl": ("L", _tensor, "float32 tensor (H, W), 0..1"),
    "torchrgb": ("RGB", _tensor, "float32 tensor (3, H, W), 0..1"),
    "torch": ("RGB", _tensor, "the same as torchrgb"),
    "torchrgba": ("RGBA", _tensor, "float32 tensor (4, H, W), 0..1"),
    "pill": ("L", _same, "PIL image, mode L"),
    "pil": ("RGB", _same, "PIL image, mode RGB"),
    "pilrgb": ("RGB", _same, "PIL image, mode RGB"),
    "pilrgba": ("RGBA", _same, "PIL image, mode RGBA"),
}
"""Option -> (mode that Pillow converts to, what is made of it, what comes out).

Orientation (EXIF) is not applied, of an animation the first frame counts, and 16-bit pictures go
through Pillow's conversion to 8 bits, which clips: all as webdataset has it.
"""


def _picture(option: str, data: bytes) -> Any:
    mode, make, _ = IMAGE_OPTIONS[option]
    picture = _open(data)
    picture.load()  # here, and not inside NumPy, what is broken comes to light
    # convert() copies even when the mode is right already, which only PIL results need: it makes
    # a plain image that holds no file and pickles small.
    if picture.mode != mode or make is _same:
        picture = picture.convert(mode)
    return make(picture)


# --- everything else ------------------------------------------------------------------------------


def _text(data: bytes) -> str:
    return data.decode("utf-8")


def _json(data: bytes) -> Any:
    return json.loads(data)


def _jsonl(data: bytes) -> list[Any]:
    values = []
    for number, line in enumerate(data.split(b"\n"), 1):
        if line.strip():
            try:
                values.append(json.loads(line))
            except ValueError as exc:
                what = str(exc)
                if isinstance(exc, json.JSONDecodeError):  # it counts lines from this one
                    what = f"{exc.msg} at column {exc.colno}"
                raise ValueError(f"line {number}: {what}") from exc
    return values


def _int(data: bytes) -> int:
    return int(data)


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
    ("txt text transcript", "str, strict UTF-8", _text),
    ("json jsn", "what the JSON says", _json),
    ("jsonl", "list, one value per line that is not blank", _jsonl),
    ("cls cls2 count index inx id", "int", _int),
    ("npy", "array (no objects)", _npy),
    ("npz", "dict of arrays (no objects)", _npz),
    ("pth pt", "tensors on the CPU: torch.load(weights_only=True)", _pth),
    ("ten tb", "list of arrays: webdataset.tenbin", _ten),
    ("pkl pickle pyd pyc dill joblib", "refused: SampleError", _refuse),
)
"""(extensions, what comes out, decoder) of everything but pictures."""

_DECODERS = {extension: decode for names, _, decode in KINDS for extension in names.split()}
_PICTURES = frozenset(PICTURES.split())


def _gunzip(decode: Decode, data: bytes) -> Any:
    return decode(gzip.decompress(data))


@lru_cache(maxsize=4096)  # bounded: file names with many dots make many part names
def _decode_for(name: str, image: str) -> Decode:
    """The decoder of parts of this name."""
    rest, _, extension = name.lower().rpartition(".")
    zipped = extension == "gz"
    if zipped:
        extension = rest.rpartition(".")[2]
    decode: Decode = (
        partial(_picture, image)
        if extension in _PICTURES
        else _DECODERS.get(extension, bytes)  # bytes(b) is b
    )
    return partial(_gunzip, decode) if zipped else decode


# --- the interface --------------------------------------------------------------------------------


def _error(name: str, data: bytes, sample: Mapping[str, Any], exc: Exception) -> SampleError:
    of = f" of sample {sample['__key__']!r}" if "__key__" in sample else ""
    shards = {s.shard_name for s in sample.get("__sources__") or () if hasattr(s, "shard_name")}
    of += f" in shard {', '.join(map(repr, sorted(shards)))}" if shards else ""
    what = " ".join(str(exc).split())[:300] or "it gave no reason"
    if not isinstance(exc, (ValueError, OSError)):  # these speak for themselves
        what = f"{type(exc).__name__}: {what}"
    return SampleError(f"cannot decode part {name!r} ({len(data)} bytes){of}: {what}")


@dataclass(frozen=True)
class Decoder:
    """What :func:`decoder` gives. An object and not a function: it may be a class's attribute."""

    image: str | None

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        if self.image is None:
            return sample
        decoded = {}
        for name, data in sample.items():
            if name.startswith("__") or not isinstance(data, (bytes, bytearray, memoryview)):
                decoded[name] = data
                continue
            data = bytes(data)  # free for bytes
            try:
                decoded[name] = _decode_for(name, self.image)(data)
            except ImportError:  # a package is missing: not this sample's fault
                raise
            except Exception as exc:
                raise _error(name, data, sample, exc) from exc
        return decoded


def decoder(image: str | None = "torchrgb") -> Decoder:
    """Make a function that decodes every part of a raw sample, into a new dict.

    ``image`` is one of :data:`IMAGE_OPTIONS`; ``None`` leaves all parts, not only pictures, as
    bytes. Keys that begin with ``__`` and values that are not bytes (decoded already) pass through.
    The function pickles. It raises :class:`~energon_fn.errors.SampleError` naming part, sample and
    shard for what cannot be decoded; an unknown option is a ``ValueError`` here.

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
    """
    if image is not None and image not in IMAGE_OPTIONS:
        close = get_close_matches(str(image), IMAGE_OPTIONS, n=1)
        hint = f", did you mean {close[0]!r}?" if close else "."
        raise ValueError(
            f"unknown image option {image!r}{hint} Known: {', '.join(IMAGE_OPTIONS)}; None for "
            "bytes"
        )
    return Decoder(image)


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
