"""Bytes of a picture -> array, tensor or PIL image.

Options and results are those of ``webdataset.imagehandler``
(https://webdataset.github.io/webdataset/api/webdataset/autodecode.html); :data:`IMAGE_OPTIONS` is
both the documentation and what runs.

Data is not code: Pillow may only use its own pure decoders (its EPS reader, say, would start
Ghostscript on any file that begins like one, whatever the file is called).
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

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


Pixels = Image.Image | NDArray[np.uint8]
"""A decoded picture: Pillow's, or a backend's array, (H, W, 3) or (H, W)."""


def _array8(picture: Pixels) -> NDArray[np.uint8]:
    # Pillow's is copied: asarray would be read-only.
    return picture if isinstance(picture, np.ndarray) else np.array(picture)


def _array(picture: Pixels) -> NDArray[np.float32]:
    scaled: NDArray[np.float32] = np.divide(np.asarray(picture), np.float32(255), dtype=np.float32)
    return scaled


def _matrix8(picture: Pixels) -> torch.Tensor:
    return torch.from_numpy(_array8(picture))


def _matrix(picture: Pixels) -> torch.Tensor:
    return torch.from_numpy(_array(picture))


def _planes(picture: Pixels) -> tuple[tuple[int, ...], Iterable[NDArray[np.uint8]]]:
    """(bands, H, W), and the bands one by one."""
    if isinstance(picture, np.ndarray):
        planes = np.moveaxis(picture, 2, 0)
        return planes.shape, planes
    # Pillow takes a band out of its pixels faster than NumPy or torch turn HWC into CHW.
    size = picture.height, picture.width
    raw = (picture.tobytes("raw", band) for band in picture.mode)
    each = (np.frombuffer(plane, np.uint8).reshape(size) for plane in raw)
    return (len(picture.mode), *size), each


def _tensor8(picture: Pixels) -> torch.Tensor:
    shape, planes = _planes(picture)
    tensor = np.empty(shape, np.uint8)
    for target, plane in zip(tensor, planes, strict=True):
        target[...] = plane
    return torch.from_numpy(tensor)


def _tensor(picture: Pixels) -> torch.Tensor:
    shape, planes = _planes(picture)
    tensor = np.empty(shape, np.float32)
    for target, plane in zip(tensor, planes, strict=True):
        np.divide(plane, np.float32(255), out=target)
    return torch.from_numpy(tensor)


def _same(picture: Pixels) -> Pixels:
    return picture


IMAGE_OPTIONS: dict[str, tuple[str, Callable[[Pixels], Any], str]] = {
    "l8": ("L", _array8, "uint8 array (H, W), 0..255"),
    "rgb8": ("RGB", _array8, "uint8 array (H, W, 3), 0..255"),
    "rgba8": ("RGBA", _array8, "uint8 array (H, W, 4), 0..255"),
    "l": ("L", _array, "float32 array (H, W), 0..1"),
    "rgb": ("RGB", _array, "float32 array (H, W, 3), 0..1"),
    "rgba": ("RGBA", _array, "float32 array (H, W, 4), 0..1"),
    "torchl8": ("L", _matrix8, "uint8 tensor (H, W), 0..255"),
    "torchrgb8": ("RGB", _tensor8, "uint8 tensor (3, H, W), 0..255"),
    "torchrgba8": ("RGBA", _tensor8, "uint8 tensor (4, H, W), 0..255"),
    "torchl": ("L", _matrix, "float32 tensor (H, W), 0..1"),
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

# --- JPEGs by other packages ----------------------------------------------------------------------

ReadJpeg = Callable[[bytes, int, int], NDArray[np.uint8]]
"""``(data, width, height)`` -> (H, W, 3) or (H, W); width and height are to be those given."""


def _simplejpeg(gray: bool) -> ReadJpeg:
    from simplejpeg import decode_jpeg

    space = "GRAY" if gray else "RGB"

    def read(data: bytes, width: int, height: int) -> NDArray[np.uint8]:
        pixels: NDArray[np.uint8] = decode_jpeg(data, space, min_width=width, min_height=height)
        return pixels[:, :, 0] if gray else pixels

    return read


def _torchvision(gray: bool) -> ReadJpeg:
    try:
        from torchvision.io import ImageReadMode, decode_jpeg
    except RuntimeError as exc:  # it is made for another torch
        raise ImportError(str(exc)) from exc
    if not hasattr(torch.ops.image, "decode_jpeg"):
        raise ImportError("its operators do not fit this torch")
    mode = ImageReadMode.GRAY if gray else ImageReadMode.RGB

    def read(data: bytes, width: int, height: int) -> NDArray[np.uint8]:
        tensor = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode)
        pixels: NDArray[np.uint8] = tensor.permute(1, 2, 0).numpy()
        return pixels[:, :, 0] if gray else pixels

    return read


BACKENDS: dict[str, Callable[[bool], ReadJpeg]] = {
    "simplejpeg": _simplejpeg,
    "torchvision": _torchvision,
}
"""What reads JPEGs besides Pillow: name -> maker of the function for gray ones or for colour."""


def _reader(backend: str, gray: bool) -> ReadJpeg:
    try:
        return BACKENDS[backend](gray)
    except ImportError as exc:
        get = "energon-fn[fast]" if backend == "simplejpeg" else backend
        raise ImportError(
            f"backend={backend!r} needs the package {backend}: `pip install {get}` ({exc})"
        ) from exc


# --- the interface --------------------------------------------------------------------------------


def picture_decoder(
    option: str, *, min_size: int | tuple[int, int] | None = None, backend: str = "pillow"
) -> Callable[[bytes], Any]:
    """Make a function from a picture's bytes to what ``option`` says, see :data:`IMAGE_OPTIONS`.

    min_size, backend: see :func:`energon_fn.decoder`. What is unknown or does not go together is a
    ValueError, a missing package an ImportError; the function raises any Exception for bytes that
    are no picture or a damaged one.

    >>> picture_decoder("rgb8")(b"P6 2 1 255 " + bytes([255, 0, 0, 0, 0, 255])).tolist()
    [[[255, 0, 0], [0, 0, 255]]]
    """
    if option not in IMAGE_OPTIONS:
        close = get_close_matches(str(option), IMAGE_OPTIONS, n=1)
        hint = f", did you mean {close[0]!r}?" if close else "."
        raise ValueError(
            f"unknown image option {option!r}{hint} Known: {', '.join(IMAGE_OPTIONS)}; None for "
            "bytes"
        )
    mode, make, _ = IMAGE_OPTIONS[option]
    size = (min_size, min_size) if isinstance(min_size, int) else min_size
    if size is not None and not (
        isinstance(size, tuple) and len(size) == 2 and all(type(n) is int and n > 0 for n in size)
    ):
        raise ValueError(
            f"min_size is {min_size!r}: give the pixels that both sides need, 224 say, or (width, "
            "height)"
        )
    read_jpeg = None
    if backend != "pillow":
        if backend not in BACKENDS:
            raise ValueError(f"unknown backend {backend!r}. Known: pillow, {', '.join(BACKENDS)}")
        if make is _same:
            raise ValueError(
                f"backend={backend!r} makes arrays and tensors and no PIL images: leave it out, or "
                f"ask for another image option than {option!r}"
            )
        if backend == "torchvision" and size is not None:
            raise ValueError(
                "torchvision does not decode at a reduced size: leave out min_size or "
                "backend='torchvision'"
            )
        read_jpeg = _reader(backend, mode == "L")

    def decode(data: bytes) -> Any:
        picture = _open(data)
        if size is not None and picture.width >= 2 * size[0] and picture.height >= 2 * size[1]:
            picture.draft(None, size)  # does nothing to what is no JPEG
        if read_jpeg is not None and picture.mode == mode and isinstance(picture, JpegImageFile):
            try:
                return make(read_jpeg(data, *picture.size))
            except (ValueError, RuntimeError):
                pass  # Pillow reads it, or says what is wrong with it
        picture.load()  # here, and not inside NumPy, what is broken comes to light
        if picture.mode != mode:
            picture = picture.convert(mode)
        elif make is _same:
            # A plain image, which holds no file and pickles small, on the same pixels: convert()
            # would copy them, which takes half as long again as decoding a large photo.
            picture = picture._new(picture.im)
        return make(picture)

    return decode
