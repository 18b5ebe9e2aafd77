"""The demo: a small captioned picture dataset that is drawn on the spot."""

from __future__ import annotations

import io
import json
import math
import os
import random
from collections.abc import Iterable
from typing import Any

from PIL import Image, ImageDraw

from .files import write_atomic

Point = tuple[float, float]
Color = tuple[int, int, int]

# --- the vocabulary -------------------------------------------------------------------------------

COLORS: dict[str, Color] = {
    "red": (222, 64, 60),
    "orange": (243, 140, 46),
    "yellow": (250, 204, 60),
    "green": (70, 163, 92),
    "teal": (32, 148, 150),
    "blue": (56, 108, 204),
    "purple": (132, 84, 178),
    "pink": (238, 120, 160),
    "white": (252, 252, 250),
    "black": (44, 46, 54),
}
BACKGROUNDS: dict[str, Color] = {
    "sand": (236, 218, 184),
    "sky": (186, 220, 242),
    "mint": (198, 232, 210),
    "lavender": (218, 208, 238),
    "peach": (250, 214, 196),
    "grey": (212, 214, 220),
    "navy": (40, 56, 96),
    "forest": (38, 78, 66),
}
NUMBERS = {1: "a", 2: "two", 3: "three"}
SIZES = {"small": 0.13, "": 0.19, "large": 0.27}  # radius over the shorter side of the picture


def _corners(count: int, radii: Iterable[float] = (1.0,), turn: float = -90.0) -> list[Point]:
    """Points around the origin, the first at the top, their radii taken in turn."""
    cycle = list(radii)
    angles = [math.radians(turn + 360 * i / count) for i in range(count)]
    return [
        (cycle[i % len(cycle)] * math.cos(a), cycle[i % len(cycle)] * math.sin(a))
        for i, a in enumerate(angles)
    ]


def _heart() -> list[Point]:
    turns = [math.tau * i / 64 for i in range(64)]
    return [
        (
            math.sin(t) ** 3,
            -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 16,
        )
        for t in turns
    ]


def _moon() -> list[Point]:
    outer = [math.radians(50 + 260 * i / 48) for i in range(49)]
    tip_x, tip_y = math.cos(outer[0]), math.sin(outer[0])
    # The inner edge is an arc through both tips, around a point right of the middle.
    middle = 0.42
    radius = math.hypot(tip_x - middle, tip_y)
    start = math.atan2(tip_y, tip_x - middle)
    inner = [start + (math.tau - 2 * start) * i / 48 for i in range(49)]
    return [
        *((math.cos(a), math.sin(a)) for a in outer),
        *((middle + radius * math.cos(a), radius * math.sin(a)) for a in reversed(inner)),
    ]


SHAPES: dict[str, list[Point]] = {
    "circle": _corners(72),
    "square": _corners(4, turn=45),
    "triangle": _corners(3),
    "diamond": _corners(4, (1.0, 0.62)),
    "hexagon": _corners(6),
    "star": _corners(10, (1.0, 0.46)),
    "heart": _heart(),
    "moon": _moon(),
}
"""Outlines within the unit circle, y downwards."""

# --- one sample -----------------------------------------------------------------------------------


def _scene(rng: random.Random) -> tuple[dict[str, Any], list[tuple[list[Point], Color]]]:
    """What is on the picture, as the json part says it, and the outlines to draw."""
    width, height = (16 * rng.randint(10, 20) for _ in range(2))
    background = rng.choice(list(BACKGROUNDS))
    light = sum(BACKGROUNDS[background]) > 384
    # White on sand and black on navy are hard to see.
    colors = [color for color in COLORS if color != ("white" if light else "black")]
    kinds: list[tuple[str, str, str]] = []
    shapes: list[dict[str, Any]] = []
    outlines: list[tuple[list[Point], Color]] = []
    taken: list[tuple[float, float, float]] = []
    for _ in range(rng.randint(1, 3)):
        kind = rng.choice(list(SIZES)), rng.choice(colors), rng.choice(list(SHAPES))
        if any(kind[1:] == other[1:] for other in kinds):
            continue
        kinds.append(kind)
        size, color, shape = kind
        for _ in range(rng.choice((1, 1, 2, 3))):
            radius = SIZES[size] * min(width, height) * rng.uniform(0.9, 1.1)
            place = _free_place(rng, width, height, radius, taken)
            if place is None:
                break
            x, y = place
            taken.append((x, y, radius))
            turn = math.radians(rng.uniform(-14, 14))
            sin, cos = radius * math.sin(turn), radius * math.cos(turn)
            outline = [
                (x + px * cos - py * sin, y + px * sin + py * cos) for px, py in SHAPES[shape]
            ]
            outlines.append((outline, COLORS[color]))
            xs, ys = zip(*outline, strict=True)
            box = [round(v, 1) for v in (min(xs), min(ys), max(xs), max(ys))]
            shapes.append({"shape": shape, "color": color, "size": size or "medium", "box": box})
    scene = {"width": width, "height": height, "background": background, "shapes": shapes}
    return scene, outlines


def _free_place(
    rng: random.Random,
    width: int,
    height: int,
    radius: float,
    taken: list[tuple[float, float, float]],
) -> Point | None:
    """A place for a circle inside the picture and clear of all others, if one is soon found."""
    edge = radius + 6
    for _ in range(60):
        x, y = rng.uniform(edge, width - edge), rng.uniform(edge, height - edge)
        if all(math.hypot(x - a, y - b) > radius + r + 4 for a, b, r in taken):
            return x, y
    return None


def _caption(scene: dict[str, Any]) -> str:
    """What the scene shows, in words."""
    counts: dict[str, int] = {}
    for shape in scene["shapes"]:
        size = "" if shape["size"] == "medium" else f"{shape['size']} "
        name = f"{size}{shape['color']} {shape['shape']}"
        counts[name] = counts.get(name, 0) + 1
    things = []
    for name, count in counts.items():
        number = "an" if count == 1 and name[0] in "aeiou" else NUMBERS[count]
        things.append(f"{number} {name}{'s' * (count > 1)}")
    listed = " and ".join([", ".join(things[:-1])] * (len(things) > 1) + things[-1:])
    return f"{listed} on a {scene['background']} background"


def _draw(scene: dict[str, Any], outlines: list[tuple[list[Point], Color]]) -> Image.Image:
    """The picture: drawn twice as large, for smooth edges."""
    size = scene["width"], scene["height"]
    base = BACKGROUNDS[scene["background"]]
    top, bottom = (Image.new("RGB", size, _shade(base, by)) for by in (14, -14))
    picture = Image.composite(bottom, top, Image.linear_gradient("L").resize(size))
    picture = picture.resize((2 * size[0], 2 * size[1]), Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(picture)
    for outline, _ in outlines:
        draw.polygon([(2 * x + 6, 2 * y + 8) for x, y in outline], _shade(base, -34))
    for outline, color in outlines:
        draw.polygon([(2 * x, 2 * y) for x, y in outline], color)
    return picture.reduce(2)


def _shade(color: Color, by: int) -> Color:
    red, green, blue = (min(255, max(0, value + by)) for value in color)
    return red, green, blue


def _sample(seed: int, index: int) -> dict[str, Any]:
    """The raw sample; it depends on the seed and its number alone."""
    scene, outlines = _scene(random.Random(f"{seed}/{index}"))
    file = io.BytesIO()
    _draw(scene, outlines).save(file, "JPEG", quality=90)
    return {
        "__key__": f"{index:06d}",
        "jpg": file.getvalue(),
        "json": json.dumps(scene).encode(),
        "txt": _caption(scene).encode(),
    }


# --- the dataset ----------------------------------------------------------------------------------


def build_demo(
    folder: str | os.PathLike[str], samples: int = 384, shards: int = 6, seed: int = 0
) -> list[str]:
    """Write a captioned picture dataset of coloured shapes and return its shards' names.

    The WebDataset shards ``shard_000.tar`` ... in ``folder`` hold, per sample, a ``jpg`` of
    160 to 320 pixels a side, a ``txt`` that says what it shows, and a ``json`` with ``width``,
    ``height``, ``background`` and the ``shapes`` (shape, color, size, box as x0, y0, x1, y1 in
    pixels). The same arguments give the same bytes, with the same version of Pillow.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     build_demo(folder, samples=4, shards=2)
    ['shard_000.tar', 'shard_001.tar']
    """
    from webdataset import TarWriter

    if not 1 <= shards <= samples:
        raise ValueError(
            f"need at least one shard and a sample for each, got {samples} samples and {shards} "
            "shards"
        )
    os.makedirs(folder, exist_ok=True)
    names = [f"shard_{number:03d}.tar" for number in range(shards)]
    for number, name in enumerate(names):
        file = io.BytesIO()
        with TarWriter(file, encoder=False, mtime=0) as tar:
            for index in range(samples * number // shards, samples * (number + 1) // shards):
                tar.write(_sample(seed, index))
        write_atomic(os.path.join(folder, name), file.getvalue())
    return names
