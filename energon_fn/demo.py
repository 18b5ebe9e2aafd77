"""The demo: a small captioned picture dataset that is drawn on the spot, and a run over it.

:class:`CaptioningTaskEncoder` is there to be copied: it augments and tokenizes single samples,
packs several into one sequence, and makes batches that a model can be trained on.
"""

from __future__ import annotations

import io
import json
import math
import os
import random
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch.nn.functional import interpolate, pad
from tqdm import tqdm

from energon_fn import (
    Batch,
    CaptioningSample,
    DatasetError,
    DefaultTaskEncoder,
    Sample,
    SkipSample,
    WorkerConfig,
    contact_sheet,
    edataclass,
    get_loader,
    get_train_dataset,
    open_source,
)
from energon_fn.disk.files import write_atomic
from energon_fn.disk.metadata import read_info
from energon_fn.disk.prepare import prepare_dataset, write_dataset_yaml

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


# --- the task encoder -----------------------------------------------------------------------------

PADDING, IMAGE, END, UNKNOWN = range(4)  # what a token can be besides a word


class WordTokenizer:
    """A tokenizer of whole words, to stand for a real one.

    >>> tokenizer = WordTokenizer(["cat", "a"])
    >>> tokenizer.encode("a black cat"), tokenizer.decode([4, 3, 5])
    ([4, 3, 5], 'a <unknown> cat')
    """

    def __init__(self, words: Iterable[str]):
        self.words = ["<padding>", "<image>", "<end>", "<unknown>", *sorted(set(words))]
        self.ids = {word: token for token, word in enumerate(self.words)}

    def encode(self, text: str) -> list[int]:
        return [self.ids.get(word, UNKNOWN) for word in text.replace(",", " ,").split()]

    def decode(self, tokens: Iterable[int]) -> str:
        return " ".join(self.words[token] for token in tokens).replace(" ,", ",")


@edataclass
class EncodedSample(Sample):
    """One captioned picture; or, packed, several of them in one sequence."""

    # (n, 3, size, size), float in 0..1
    images: torch.Tensor
    # (length,) int64: for each picture IMAGE, the words of its caption, END
    tokens: torch.Tensor
    # (length,) int64: which picture a token belongs to, counted from 1
    members: torch.Tensor


@edataclass
class RawBatch(Batch):
    """b sequences, padded to the same length."""

    # (n, 3, size, size): the pictures of all sequences, in the order of their IMAGE tokens
    images: torch.Tensor
    # (b, length) int64
    tokens: torch.Tensor
    # (b, length) int64, 0 for padding
    members: torch.Tensor


@edataclass
class CaptioningBatch(RawBatch):
    """What the model is given."""

    # (b, length, length) bool: whether token i may look at token j
    attention_mask: torch.Tensor


class CaptioningTaskEncoder(
    DefaultTaskEncoder[CaptioningSample, EncodedSample, RawBatch, CaptioningBatch]
):
    """From captioned pictures to batches of packed sequences of at most ``max_tokens``."""

    def __init__(self, tokenizer: WordTokenizer, image_size: int = 128, max_tokens: int = 64):
        super().__init__()
        self.tokenizer = tokenizer
        self.image_size = image_size
        self.max_tokens = max_tokens

    def encode_sample(self, sample: CaptioningSample) -> EncodedSample:
        """Augment the picture, tokenize the caption.

        Random numbers may come from torch, NumPy or ``random``: they are seeded for each sample.
        """
        image = (sample.image * random.uniform(0.9, 1.1)).clamp(0, 1)
        if random.random() < 0.5:
            image = image.flip(-1)
        image = fit(image, self.image_size)
        tokens = torch.tensor([IMAGE, *self.tokenizer.encode(sample.caption), END])
        if len(tokens) > self.max_tokens:
            raise SkipSample
        return EncodedSample.derive_from(
            sample, images=image[None], tokens=tokens, members=torch.ones_like(tokens)
        )

    def select_samples_to_pack(self, samples: list[EncodedSample]) -> list[list[EncodedSample]]:
        """Longest first, each to the first pack that has room for it."""
        packs: list[list[EncodedSample]] = []
        room: list[int] = []
        for sample in sorted(samples, key=lambda sample: len(sample.tokens), reverse=True):
            length = len(sample.tokens)
            place = next((i for i, free in enumerate(room) if free >= length), len(packs))
            if place == len(packs):
                packs.append([])
                room.append(self.max_tokens)
            packs[place].append(sample)
            room[place] -= length
        return packs

    def pack_selected_samples(self, samples: list[EncodedSample]) -> EncodedSample:
        """Put the samples one behind the other."""
        return EncodedSample.from_samples(
            samples,
            images=torch.cat([sample.images for sample in samples]),
            tokens=torch.cat([sample.tokens for sample in samples]),
            members=torch.cat([n * sample.members for n, sample in enumerate(samples, 1)]),
        )

    def batch(self, samples: list[EncodedSample]) -> RawBatch:
        """Pictures of one size are joined; sequences are padded to the longest, by default."""
        return self._batch(samples, result_type=RawBatch, actions={"images": torch.cat})

    def encode_batch(self, batch_data: RawBatch) -> CaptioningBatch:
        """Let each token look at what comes before it in its own sample."""
        members = batch_data.members
        same = members[:, :, None] == members[:, None, :]
        return CaptioningBatch.derive_from(
            batch_data,
            images=batch_data.images,
            tokens=batch_data.tokens,
            members=members,
            attention_mask=same.tril() & (members != 0)[:, None, :],
        )


def fit(image: torch.Tensor, size: int) -> torch.Tensor:
    """The whole picture (c, h, w) in the middle of a square, white where it does not fill it.

    >>> fit(torch.ones(3, 30, 60), 16).shape
    torch.Size([3, 16, 16])
    """
    scale = size / max(image.shape[1:])
    height, width = (max(1, round(scale * side)) for side in image.shape[1:])
    small = interpolate(image[None], (height, width), mode="bilinear", antialias=True)[0]
    left, top = (size - width) // 2, (size - height) // 2
    return pad(small, (left, size - width - left, top, size - height - top), value=1)


# --- the run --------------------------------------------------------------------------------------


def demo_tokenizer() -> WordTokenizer:
    """A tokenizer that knows every word of the demo's captions."""
    shapes = [*SHAPES, *(f"{shape}s" for shape in SHAPES)]
    others = ["an", "and", "on", "background", ","]
    return WordTokenizer([*NUMBERS.values(), *SIZES, *COLORS, *BACKGROUNDS, *shapes, *others])


def run_demo(folder: str | os.PathLike[str], workers: int = 2) -> None:
    """Build the demo dataset in ``folder``, run the task encoder over it, draw a batch.

    What is there from an earlier run is used again. Raises DatasetError if the folder holds
    anything else.
    """
    folder = Path(folder)
    if not is_demo(folder):
        make_demo(folder)
    print(f"{folder}: {len(open_source(folder))} captioned pictures to train on")

    tokenizer = demo_tokenizer()
    encoder = CaptioningTaskEncoder(tokenizer)
    dataset = get_train_dataset(
        folder,
        batch_size=4,
        shuffle_buffer_size=100,
        max_samples_per_sequence=100,
        packing_buffer_size=64,
        repeat=False,  # for training leave it out: the dataset then has no end
        task_encoder=encoder,
        worker_config=WorkerConfig(rank=0, world_size=1, num_workers=workers),
    )
    pictures = packs = used = 0
    first: CaptioningBatch | None = None
    start = time.perf_counter()
    with tqdm(total=dataset.starts[-1], unit=" samples", leave=False, disable=None) as bar:
        for batch in get_loader(dataset):
            first = first or batch
            pictures += len(batch.images)
            packs += len(batch.tokens)
            used += int((batch.members != 0).sum())
            bar.update(len(batch.images))
    took = time.perf_counter() - start
    assert first is not None
    print(
        f"  {pictures} samples in {took:.1f} s, {workers} workers: "
        f"{pictures / took:.0f} samples/s\n"
        f"  {packs} packs of at most {encoder.max_tokens} tokens, "
        f"{100 * used / (packs * encoder.max_tokens):.0f} % full"
    )
    for name in ("images", "tokens", "attention_mask"):
        print(f"  batch.{name:<14}  {tuple(getattr(first, name).shape)}")

    file = io.BytesIO()
    captions = list(captions_of(first, tokenizer))
    contact_sheet(list(first.images), captions, columns=5, cell=208).save(file, "PNG")
    picture = folder / "demo_batch.png"
    write_atomic(picture, file.getvalue())
    print(f"  {picture} shows this batch: its pictures, and the captions from its tokens")
    print(
        "\nLook at the dataset:\n"
        f"  energon-fn info {folder}\n"
        f"  energon-fn preview {folder}\n"
        f"  energon-fn lint {folder}\n"
        "\nStart your own task encoder from CaptioningTaskEncoder in\n"
        f"  {__file__}\n"
        "and your own dataset with\n"
        "  energon-fn prepare FOLDER"
    )


def is_demo(folder: Path) -> bool:
    """Whether the folder holds the finished demo. Raises DatasetError if it holds anything else."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    names = [f"shard_{number:03d}.tar" for number in range(6)]
    if (folder / ".nv-meta").is_dir() and list(read_info(folder)) == names:
        return True
    raise DatasetError(f"{folder} holds something else than the demo: name a new folder.")


def make_demo(folder: Path) -> None:
    """Build and prepare the demo dataset; the folder appears when all is done."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as place:
        names = build_demo(f"{place}/demo")
        parts = [("train", 8), ("val", 1), ("test", 1)]
        prepare_dataset(
            f"{place}/demo", names, split_parts_ratio=parts, shuffle_seed=None, workers=1
        )
        write_dataset_yaml(f"{place}/demo", "CaptioningSample", {"image": "jpg", "caption": "txt"})
        os.rename(f"{place}/demo", folder)


def captions_of(batch: RawBatch, tokenizer: WordTokenizer) -> Iterator[str]:
    """The caption of each picture of the batch, from its tokens."""
    for tokens, members in zip(batch.tokens, batch.members, strict=True):
        for number in range(1, int(members.max()) + 1):
            yield tokenizer.decode(tokens[members == number][1:-1].tolist())
