"""The demo dataset: what its words say is on its pictures."""

from __future__ import annotations

import io
import json
import re
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest
import webdataset
from PIL import Image

from energon_fn.demo import BACKGROUNDS, COLORS, SHAPES, build_demo

Sample = dict[str, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("demo")
    build_demo(place, samples=96, shards=4)
    return place


@pytest.fixture(scope="module")
def samples(folder: Path) -> list[Sample]:
    shards = [str(path) for path in sorted(folder.iterdir())]
    return list(webdataset.WebDataset(shards, shardshuffle=False))


def test_webdataset_reads_it(folder: Path, samples: list[Sample]) -> None:
    assert [path.name for path in sorted(folder.iterdir())] == [
        f"shard_{i:03d}.tar" for i in range(4)
    ]  # and nothing temporary
    assert [sample["__key__"] for sample in samples] == [f"{i:06d}" for i in range(96)]
    for sample in samples:
        assert {name for name in sample if name[:2] != "__"} == {"jpg", "txt", "json"}


def test_pictures_vary_in_size_and_are_as_large_as_they_say(samples: list[Sample]) -> None:
    sizes = set()
    for sample in samples:
        picture = Image.open(io.BytesIO(sample["jpg"]))
        scene = json.loads(sample["json"])
        assert picture.size == (scene["width"], scene["height"])
        assert picture.mode == "RGB"
        assert all(160 <= side <= 320 for side in picture.size)
        sizes.add(picture.size)
    assert len(sizes) > 40


def test_captions_count_what_is_there(samples: list[Sample]) -> None:
    numbers = {"a": 1, "an": 1, "two": 2, "three": 3}
    for sample in samples:
        caption, scene = sample["txt"].decode(), json.loads(sample["json"])
        things, background = caption.split(" on a ")
        assert background == f"{scene['background']} background"
        said: dict[tuple[str, str, str], int] = {}
        for thing in re.split(", | and ", things):
            number, *size, color, shape = thing.split()
            count = numbers[number]
            assert (number == "an") == (count == 1 and (size or [color])[0][0] in "aeiou")
            assert shape.endswith("s") == (count > 1)
            said[size[0] if size else "medium", color, shape.removesuffix("s")] = count
        there: dict[tuple[str, str, str], int] = {}
        for shape in scene["shapes"]:
            name = shape["size"], shape["color"], shape["shape"]
            there[name] = there.get(name, 0) + 1
        assert said == there


def test_shapes_lie_apart_inside_the_picture_and_are_of_their_colour(
    samples: list[Sample],
) -> None:
    for sample in samples:
        picture = Image.open(io.BytesIO(sample["jpg"]))
        scene = json.loads(sample["json"])
        corner = picture.getpixel((2, 2))
        assert _near(corner, BACKGROUNDS[scene["background"]], 30)
        assert scene["shapes"]
        for shape in scene["shapes"]:
            left, top, right, bottom = shape["box"]
            assert 0 < left < right < picture.width
            assert 0 < top < bottom < picture.height
            x, y = (left + right) / 2, (top + bottom) / 2
            if shape["shape"] == "moon":  # hollow in the middle, for any small turn
                x = left + 0.2 * (right - left)
            pixel = picture.getpixel((round(x), round(y)))
            assert _near(pixel, COLORS[shape["color"]], 24), (sample["txt"], shape)


def _near(pixel: Any, color: tuple[int, int, int], distance: int) -> bool:
    return all(abs(a - b) <= distance for a, b in zip(pixel, color, strict=True))


def test_the_vocabulary_is_used(samples: list[Sample]) -> None:
    words = set(" ".join(sample["txt"].decode() for sample in samples).split())
    assert set(BACKGROUNDS) | set(COLORS) <= words
    assert all(shape in words or f"{shape}s" in words for shape in SHAPES)


def test_the_same_arguments_give_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    names = build_demo(tmp_path / "new" / "folder", samples=96, shards=4)
    for name in names:
        assert (tmp_path / "new" / "folder" / name).read_bytes() == (folder / name).read_bytes()
    build_demo(tmp_path / "other", samples=96, shards=4, seed=1)
    for name in names:
        assert (tmp_path / "other" / name).read_bytes() != (folder / name).read_bytes()


def test_a_sample_depends_on_its_number_and_the_seed_alone(
    tmp_path: Path, samples: list[Sample]
) -> None:
    names = build_demo(tmp_path, samples=7, shards=3)
    read: list[tuple[str, bytes]] = []
    counts = []
    for name in names:
        with tarfile.open(tmp_path / name) as tar:
            files = [(m.name, tar.extractfile(m)) for m in tar]
            read += [(key, file.read()) for key, file in files if file]
            counts.append(len(files) // 3)
    assert sum(counts) == 7
    assert max(counts) - min(counts) <= 1
    expected = [
        (f"{s['__key__']}.{part}", s[part]) for s in samples[:7] for part in ("jpg", "json", "txt")
    ]
    assert sorted(read) == expected


def test_building_again_replaces_it(tmp_path: Path) -> None:
    build_demo(tmp_path, samples=2, shards=1, seed=5)
    build_demo(tmp_path, samples=2, shards=1)
    assert [path.name for path in tmp_path.iterdir()] == ["shard_000.tar"]
    fresh = tmp_path / "fresh"
    build_demo(fresh, samples=2, shards=1)
    name = "shard_000.tar"
    assert (tmp_path / name).read_bytes() == (fresh / name).read_bytes()


@pytest.mark.parametrize(("samples", "shards"), [(0, 1), (3, 0), (3, 4)])
def test_wrong_numbers_are_refused_before_anything_is_written(
    tmp_path: Path, samples: int, shards: int
) -> None:
    with pytest.raises(ValueError, match=f"got {samples} samples and {shards} shards"):
        build_demo(tmp_path / "d", samples=samples, shards=shards)
    assert not (tmp_path / "d").exists()


def test_it_is_built_in_no_time(tmp_path: Path) -> None:
    start = time.process_time()
    assert len(build_demo(tmp_path)) == 6
    assert time.process_time() - start < 3
