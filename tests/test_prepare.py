"""Preparing: what is written, how shards are shared out, what a failure leaves."""

from __future__ import annotations

import json
import logging
import multiprocessing
import random
import sqlite3
import struct
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import write_members
from hypothesis import given
from hypothesis import strategies as st

from energon_fn.disk.metadata import read_dataset_config, read_info, read_split_config
from energon_fn.disk.prepare import (
    BaseWebdatasetFactory,
    explain_duplicates,
    guess_field_map,
    prepare_dataset,
    split_by_patterns,
    split_by_ratio,
    write_dataset_yaml,
    write_media_metadata,
)
from energon_fn.errors import DatasetError
from energon_fn.samples import SAMPLE_TYPES, OCRSample

RATIO = [("train", 2), ("val", 1), ("test", 0)]


def three_shards(folder: Path) -> list[str]:
    names = ["s_0.tar", "s_1.tar", "s_2.tar"]
    for n, name in enumerate(names):
        write_members(folder / name, [
            (f"{n}/{key}.{part}", f"{n}{key}{part}".encode())
            for key in ("a", "b") for part in ("txt", "detail.json")
        ])  # fmt: skip
    return names


def content(folder: Path) -> dict[str, bytes]:
    """Every file below the folder."""
    return {p.relative_to(folder).as_posix(): p.read_bytes()
            for p in folder.rglob("*") if p.is_file()}  # fmt: skip


def rows(folder: Path, table: str) -> set[tuple[Any, ...]]:
    database = sqlite3.connect(folder / ".nv-meta" / "index.sqlite")
    try:
        return set(database.execute(f"SELECT * FROM {table}"))
    finally:
        database.close()


# -------------------------------------------------------------------------------- what is written


@pytest.mark.parametrize("workers", [1, 2])
def test_all_files(tmp_path: Path, workers: int) -> None:
    names = three_shards(tmp_path)
    found = prepare_dataset(
        tmp_path, names, split_parts_ratio=RATIO, shuffle_seed=None, workers=workers
    )
    assert found == ({"txt", "detail.json"}, [])

    meta = tmp_path / ".nv-meta"
    assert set(content(tmp_path)) == {
        *names, "s_0.tar.idx", "s_1.tar.idx", "s_2.tar.idx", ".nv-meta/.info.json",
        ".nv-meta/index.sqlite", ".nv-meta/index.uuid", ".nv-meta/split.yaml",
    }  # fmt: skip
    # As megatron-energon writes them, byte for byte.
    assert (meta / "split.yaml").read_text() == (
        "split_parts:\n  train:\n  - s_{0..1}.tar\n  val:\n  - s_2.tar\n  test: []\nexclude: []\n"
    )
    assert (meta / ".info.json").read_text() == (
        '{\n  "energon_version": "7.4.1",\n  "shard_counts": {\n    "s_0.tar": 2,\n'
        '    "s_1.tar": 2,\n    "s_2.tar": 2\n  }\n}'
    )
    assert str(uuid.UUID((meta / "index.uuid").read_text(), version=4)) == (
        (meta / "index.uuid").read_text()
    )
    assert (tmp_path / "s_1.tar.idx").read_bytes() == struct.pack("<3Q", 0, 2048, 4096)
    assert (1, "1/b", 1, 2048, 2048) in rows(tmp_path, "samples")
    assert (2, 0, "detail.json", 1536, len("2adetail.json")) in rows(tmp_path, "sample_parts")
    assert len(rows(tmp_path, "samples")) == 6


def test_published_name(tmp_path: Path) -> None:
    names = three_shards(tmp_path)
    found_types, duplicates = BaseWebdatasetFactory.prepare_dataset(
        tmp_path, names, split_parts_ratio=RATIO, split_parts_patterns=None,
        tar_index_only=False, shuffle_seed=None, workers=2,
    )  # fmt: skip
    assert found_types == {"txt", "detail.json"}
    assert duplicates == []


def test_compressed_shards_and_folders(tmp_path: Path) -> None:
    names = ["deep/er/a.tar.gz", "b.tgz", "c.tar"]
    for i, name in enumerate(names):
        write_members(tmp_path / name, [(f"{i}/x.txt", b"text"), (f"{i}/y.jpg", b"picture")])
    parts, _ = prepare_dataset(tmp_path, names, split_parts_ratio=[("val", 1)])
    assert parts == {"txt", "jpg"}
    assert read_info(tmp_path) == dict.fromkeys(names, 2)
    assert [p.name for p in tmp_path.rglob("*.idx")] == ["c.tar.idx"]
    assert (0, 1, "jpg", 1536, 7) in rows(tmp_path, "sample_parts")  # decompressed offsets


def test_braces_in_shards(tmp_path: Path) -> None:
    three_shards(tmp_path)
    prepare_dataset(tmp_path, ["s_{2..1}.tar"], split_parts_ratio=[("val", 1)], shuffle_seed=None)
    assert list(read_info(tmp_path)) == ["s_2.tar", "s_1.tar"]
    write_members(tmp_path / "odd{1,2}.tar", [("a.txt", b"")])
    prepare_dataset(tmp_path, ["odd{1,2}.tar"], split_parts_ratio=[("val", 1)])
    assert (
        read_split_config(tmp_path).shards("val") == ("odd{1,2}.tar",) == tuple(read_info(tmp_path))
    )


def test_progress(tmp_path: Path) -> None:
    seen = []

    def progress(items: Iterable[Any], length: int | None = None) -> Iterator[Any]:
        for n, item in enumerate(items, 1):
            seen.append((n, length))
            yield item

    names = three_shards(tmp_path)
    prepare_dataset(tmp_path, names, split_parts_ratio=RATIO, progress_fn=progress)
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_index_only(tmp_path: Path) -> None:
    names = three_shards(tmp_path)
    prepare_dataset(tmp_path, names, split_parts_ratio=RATIO)
    split = tmp_path / ".nv-meta" / "split.yaml"
    split.write_text("split_parts: {mine: [s_0.tar]}")
    (tmp_path / "s_0.tar.idx").unlink()
    write_members(tmp_path / "s_1.tar", [("new.txt", b"")])
    old_uuid = (tmp_path / ".nv-meta" / "index.uuid").read_text()

    prepare_dataset(tmp_path, names, tar_index_only=True)
    assert split.read_text() == "split_parts: {mine: [s_0.tar]}"
    assert (tmp_path / "s_0.tar.idx").exists()
    assert (tmp_path / "s_1.tar.idx").read_bytes() == struct.pack("<2Q", 0, 512)
    assert read_info(tmp_path)["s_1.tar"] == 1
    assert (1, "new", 0, 0, 512) in rows(tmp_path, "samples")
    assert (tmp_path / ".nv-meta" / "index.uuid").read_text() != old_uuid


# ------------------------------------------------------------------------------------- what fails


def cut_short(folder: Path) -> None:
    data = (folder / "s_1.tar").read_bytes()
    (folder / "s_1.tar").write_bytes(data[:2600])


BROKEN = {
    "cut short": (cut_short, r"s_1\.tar.*cut short|s_1\.tar.*unexpected end"),
    "not a tar": (lambda d: (d / "s_2.tar").write_bytes(b"hello" * 300), r"s_2\.tar"),
    "missing": (lambda d: (d / "s_2.tar").unlink(), r"s_2\.tar does not exist"),
    "empty": (lambda d: write_members(d / "s_2.tar", []), r"s_2\.tar has no samples.*exclude it"),
}


@pytest.mark.parametrize("what", BROKEN)
@pytest.mark.parametrize("prepared", [False, True])
def test_a_broken_shard_leaves_everything(tmp_path: Path, what: str, prepared: bool) -> None:
    spoil, message = BROKEN[what]
    names = three_shards(tmp_path)
    if prepared:
        prepare_dataset(tmp_path, names, split_parts_ratio=[("mine", 1)], workers=1)
    write_members(tmp_path / "s_0.tar", [("changed.txt", b"so its .idx would change")])
    spoil(tmp_path)
    before = content(tmp_path)
    with pytest.raises(DatasetError, match=message):
        prepare_dataset(tmp_path, names, split_parts_ratio=RATIO, workers=1)
    assert content(tmp_path) == before
    assert (tmp_path / ".nv-meta").exists() == prepared


@pytest.mark.parametrize("after", [0, 1, 3])
def test_an_interrupt_leaves_everything(tmp_path: Path, after: int) -> None:
    names = three_shards(tmp_path)
    prepare_dataset(tmp_path, names, split_parts_ratio=[("mine", 1)], workers=1)
    write_members(tmp_path / "s_0.tar", [("changed.txt", b"so its .idx would change")])
    before = content(tmp_path)

    def interrupted(items: Iterable[Any], length: int) -> Iterator[Any]:
        for n, item in enumerate(items):
            if n == after:
                raise KeyboardInterrupt
            yield item
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare_dataset(
            tmp_path, names, split_parts_ratio=RATIO, progress_fn=interrupted, workers=1
        )
    assert content(tmp_path) == before


def test_duplicate_keys(tmp_path: Path, caplog: Any) -> None:
    names = three_shards(tmp_path)
    prepare_dataset(tmp_path, names, split_parts_ratio=[("mine", 1)])
    write_members(tmp_path / "s_1.tar", [("0/a.txt", b""), ("x.txt", b""), ("0/a.jpg", b"")])
    before = content(tmp_path)
    with caplog.at_level(logging.ERROR):
        found = prepare_dataset(tmp_path, names, split_parts_ratio=RATIO)
    assert found == ({"txt", "jpg", "detail.json"}, [("0/a", 3)])
    assert content(tmp_path) == before
    assert "nothing was written" in caplog.text
    assert explain_duplicates(found[1]) in caplog.text
    many = explain_duplicates([(f"k{n}", 2) for n in range(9)])
    assert many.startswith("9 keys occur more than once: 'k0' (2 samples), ")
    assert "'k5'" not in many


@pytest.mark.parametrize(("shards", "options", "message"), [
    (["s_0.tar"], {}, "split_parts_ratio or split_parts_patterns is needed"),
    (["s_0.tar"], {"split_parts_ratio": RATIO, "split_parts_patterns": [("a", "s")]}, "not both"),
    ([], {"split_parts_ratio": RATIO}, "no shards to prepare"),
    (["s_0.tar", "./s_0.tar"], {"split_parts_ratio": RATIO}, r"'s_0\.tar' is listed 2 times"),
    (["../s_0.tar"], {"split_parts_ratio": RATIO}, "must be relative"),
    (["/s_0.tar"], {"split_parts_ratio": RATIO}, "must be relative"),
    (["s_0.zip"], {"split_parts_ratio": RATIO}, r"'s_0\.zip' is not a shard's name"),
    (["s_{0..1.tar"], {"split_parts_ratio": RATIO}, "braces do not match"),
    (["s_0.tar"], {"split_parts_ratio": [("train", 0), ("val", 0)]}, "not all 0"),
    (["s_0.tar"], {"split_parts_ratio": [("train", 2), ("val", -1)]}, "numbers >= 0"),
    (["s_0.tar"], {"split_parts_ratio": []}, "numbers >= 0"),
    (["s_0.tar"], {"split_parts_ratio": [("train", float("nan"))]}, "not made of numbers"),
    (["s_0.tar"], {"split_parts_ratio": [("train", "much")]}, "not made of numbers"),
    (["s_0.tar"], {"split_parts_patterns": [("train", "(")]}, r"'\(' is not a regular expression"),
    (["s_0.tar"], {"split_parts_patterns": [("train", "0")]}, r"no shard .*'s_0\.tar'"),
    (["s_0.tar"], {"split_parts_ratio": RATIO, "workers": 0}, "workers must be 1 or more"),
])  # fmt: skip
def test_wrong_arguments(
    tmp_path: Path, shards: list[str], options: dict[str, Any], message: str
) -> None:
    three_shards(tmp_path)
    before = content(tmp_path)
    with pytest.raises(DatasetError, match=message):
        prepare_dataset(tmp_path, shards, **options)
    assert content(tmp_path) == before


def test_where_nothing_can_be_written_nothing_is_begun(tmp_path: Path) -> None:
    names = three_shards(tmp_path)
    (tmp_path / ".nv-meta").touch()
    for begin in (
        lambda: prepare_dataset(tmp_path, names, split_parts_ratio=RATIO, workers=2),
        lambda: write_media_metadata(tmp_path, "*", workers=2),
    ):
        with pytest.raises(DatasetError, match=r"nv-meta cannot be made.*copy or link"):
            begin()
    (tmp_path / ".nv-meta").unlink()
    assert multiprocessing.active_children() == []


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="nowhere is not a folder"):
        prepare_dataset(tmp_path / "nowhere", ["a.tar"], split_parts_ratio=RATIO)


# ----------------------------------------------------------------------------------------- splits


@given(
    st.integers(0, 60),
    st.lists(st.floats(0, 100) | st.integers(0, 100), min_size=1, max_size=4).filter(any),
    st.none() | st.integers(0, 99),
)
def test_every_shard_is_in_exactly_one_part(
    count: int, shares: list[float], seed: int | None
) -> None:
    shards = [f"{n}.tar" for n in range(count)]
    parts = split_by_ratio(shards, [(str(i), share) for i, share in enumerate(shares)], seed)
    order = [shard for part in parts.values() for shard in part]
    if seed is not None:
        random.Random(seed).shuffle(shards)
    assert order == shards
    for part, share in zip(parts.values(), shares, strict=True):
        assert abs(len(part) - count * share / sum(shares)) < 1 + 1e-6
        assert share or not part


@pytest.mark.parametrize(("count", "ratio", "seed", "ends"), [
    # What megatron-energon 7.4.1 does, found by running it
    (10, (8, 1, 1), None, "01234567 8 9"),
    (10, (8, 1, 1), 42, "73285694 0 1"),
    (10, (8, 1, 1), 0, "78153420 9 6"),
    (3, (8, 1, 1), None, "01  2"),
    (1, (8, 1, 1), None, "  0"),
    (2, (1, 1, 1), None, " 0 1"),
    (7, (0.5, 0.25, 0.25), None, "012 34 56"),
    (5, (1, 1, 1), None, "0 12 34"),
    (6, (0.95, 0.05, 0), None, "01234 5 "),
    (10, (0.35, 0.35, 0.3), None, "012 3456 789"),
    (10, (0.7, 0.2, 0.1), None, "0123456 78 9"),
    # Here its floats lose shard 9
    (10, (7, 2, 1), None, "0123456 78 9"),
])  # fmt: skip
def test_the_split_is_that_of_the_published(
    count: int, ratio: tuple[float, ...], seed: int | None, ends: str
) -> None:
    named = list(zip(("train", "val", "test"), ratio, strict=True))
    parts = split_by_ratio([str(n) for n in range(count)], named, seed)
    assert ["".join(part) for part in parts.values()] == ends.split(" ")


def test_a_part_named_twice_gets_both_shares() -> None:
    assert split_by_ratio("abcd", [("a", 1), ("b", 1), ("a", 2)]) == {
        "a": ("a", "c", "d"), "b": ("b",),
    }  # fmt: skip
    assert split_by_patterns("abcd", [("x", "[ab]"), ("y", "a"), ("x", "[bc]")]) == {
        "x": ("a", "b", "c"), "y": ("a",),
    }  # fmt: skip


@pytest.mark.parametrize(("pattern", "found"), [
    ("s_0{0..2}.*", [0, 1, 2]),
    ("s_{03,07}.tar", [3, 7]),
    ("s_0[0-3]", [0, 1, 2, 3]),
    (".*5", [5]),
    (r"s_\d{2}\.tar$", list(range(10))),
    (r"s_0\d\.tar", list(range(10))),
])  # fmt: skip
def test_patterns(pattern: str, found: list[int]) -> None:
    shards = [f"s_{n:02d}.tar" for n in range(10)]
    expected = {"train": tuple(shards[n] for n in found)}
    assert split_by_patterns(shards, [("train", pattern)]) == expected


def test_a_pattern_without_shards_is_mentioned(caplog: Any) -> None:
    parts = split_by_patterns(["a.tar"], [("train", "a"), ("val", "b")])
    assert parts == {"train": ("a.tar",), "val": ()}
    assert "'val'" in caplog.text
    assert "'b'" in caplog.text


# ------------------------------------------------------------------------------------ sample types


@pytest.mark.parametrize(("sample_type", "parts", "example", "expected"), [
    ("CaptioningSample", "png jpg txt", {}, {"image": "jpg,png", "caption": "txt"}),
    ("CaptioningSample", "img.jpg caption.txt txt", {},
     {"image": "img.jpg", "caption": "caption.txt"}),
    ("CaptioningSample", "a.jpg b.jpg json", {"json": {"text": ""}}, {"caption": "json[text]"}),
    ("CaptioningSample", "jpg json", {"json": b'{"caption": 1, "text": 2}'},
     {"image": "jpg", "caption": "json[caption]"}),
    ("CaptioningSample", "jpg json", {"json": b"broken"}, {"image": "jpg"}),
    ("ImageClassificationSample", "webp cls", {}, {"image": "webp", "label": "cls"}),
    ("ImageClassificationSample", "jpg label label_name.txt", {},
     {"image": "jpg", "label": "label", "label_name": "label_name.txt"}),
    ("VQASample", "jpg x.json", {"x.json": {"question": "?", "answers": []}},
     {"image": "jpg", "context": "x.json[question]", "answers": "x.json[answers]"}),
    ("VidQASample", "mp4 txt", {}, {"video": "mp4", "context": "txt"}),
    ("TextSample", "md", {}, {}),
    ("CrudeWebdataset", "jpg", {}, {}),
])  # fmt: skip
def test_guesses(
    sample_type: str, parts: str, example: dict[str, Any], expected: dict[str, str]
) -> None:
    assert guess_field_map(sample_type, set(parts.split()), example) == expected


@pytest.mark.parametrize("name", [n for n in SAMPLE_TYPES if n != "CrudeSample"])
def test_a_guess_can_be_written(tmp_path: Path, name: str) -> None:
    parts = {"jpg", "txt", "cls", "mp4", "sequence.json", "images.json", "texts.json", "text.txt"}
    written = write_dataset_yaml(tmp_path, name, guess_field_map(name, parts))
    assert written == [tmp_path / ".nv-meta" / "dataset.yaml"]
    assert read_dataset_config(tmp_path).sample_type is SAMPLE_TYPES[name]


def test_crude_yaml(tmp_path: Path) -> None:
    for name in ("CrudeWebdataset", None):
        written = write_dataset_yaml(tmp_path, name, name="crude.yaml")
        assert written[0].read_text() == (
            "__module__: megatron.energon\n__class__: CrudeWebdataset\n"
        )


def test_sample_loader_template(tmp_path: Path) -> None:
    loader, config = write_dataset_yaml(tmp_path, "OCRSample", parts={"jpg", "gt.txt", 'a"b'})
    assert config.read_text() == (
        "sample_type:\n  __module__: megatron.energon\n  __class__: OCRSample\n"
        "sample_loader: sample_loader.py:sample_loader\npart_filter: sample_loader.py:part_filter\n"
    )
    text = loader.read_text()
    text = text.replace('image=raw["FIXME"]', 'image=raw["jpg"]')
    loader.write_text(text.replace(' text=raw["FIXME"]', ' text=raw["gt.txt"]'))

    read = read_dataset_config(tmp_path, trust_dataset_code=True)
    raw = {"__key__": "k", "jpg": "pixels", "gt.txt": "words"}
    made = OCRSample(__key__="k", image="pixels", text="words")  # type: ignore[arg-type]
    assert read.to_sample(raw) == made
    assert [p for p in ("jpg", "gt.txt", 'a"b', "txt") if read.part_filter(p)] == [
        "jpg", "gt.txt", 'a"b',
    ]  # fmt: skip

    # What the user has filled in is not written over.
    filled_in = loader.read_text()
    assert write_dataset_yaml(tmp_path, "OCRSample") == [config]
    assert loader.read_text() == filled_in


def test_json_of_info_is_plain(tmp_path: Path) -> None:
    write_members(tmp_path / "ä ö.tar", [("a.txt", b"")])
    prepare_dataset(tmp_path, ["ä ö.tar"], split_parts_ratio=[("val", 1)])
    content = json.loads((tmp_path / ".nv-meta" / ".info.json").read_bytes())
    assert content["shard_counts"] == {"ä ö.tar": 1}
    assert read_split_config(tmp_path).shards("val") == ("ä ö.tar",)
