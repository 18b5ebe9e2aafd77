from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import random
import sqlite3
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import combinations_with_replacement, groupby
from pathlib import Path
from typing import Any

import pytest
import webdataset
from conftest import write_members
from hypothesis import given, settings
from hypothesis import strategies as st

from energon_fn.disk import files, index
from energon_fn.disk.index import write_index
from energon_fn.disk.source import NEAR, Segment, Source, open_source
from energon_fn.disk.tars import index_shards, split_name
from energon_fn.errors import DatasetError
from energon_fn.samples import CaptioningSample, SourceInfo

File = tuple[str, bytes]
CRUDE = "__module__: megatron.energon\n__class__: CrudeWebdataset\n"
CAPTIONING = """sample_type:
  __module__: megatron.energon
  __class__: CaptioningSample
field_map:
  image: jpg
  caption: txt
subflavors:
  source: cats
"""


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(files, "_open_shards", {})
    monkeypatch.setattr(files, "_unpacked", {})
    monkeypatch.setenv("ENERGON_FN_CACHE", str(folder))
    return folder


def numbered(prefix: str, n: int) -> list[File]:
    return [(f"{prefix}{i:03d}.{part}", f"{part} {prefix}{i}".encode()) for i in range(n)
            for part in ("jpg", "txt")]  # fmt: skip


def by_hand(shards: dict[str, list[File]]) -> list[dict[str, Any]]:
    """The samples of some shards, grouped without the library: key, shard and parts."""
    return [
        {"__key__": key, "shard": shard, **{split_name(name)[1]: data for name, data in run}}  # type: ignore[index]
        for shard, content in shards.items()
        for key, run in groupby(filter(lambda f: split_name(f[0]), content),
                                key=lambda f: split_name(f[0])[0])  # type: ignore[index]
    ]  # fmt: skip


def loaded(source: Source) -> list[dict[str, Any]]:
    raws = [source.load(i) for i in range(len(source))]
    return [
        {"shard": raw["__sources__"][0].shard_name}
        | {name: value for name, value in raw.items() if name == "__key__" or name[:2] != "__"}
        for raw in raws
    ]


def keys(source: Source) -> list[str]:
    return [source.key(i) for i in range(len(source))]


def prepare(
    folder: Path,
    shards: dict[str, list[File]],
    split: str = "split_parts: {train: ['{a,b,c}.tar']}",
    dataset: str = CRUDE,
) -> Path:
    """A dataset as `prepare` leaves it, written by hand."""
    for name, content in shards.items():
        write_members(folder / name, content)
    meta = folder / ".nv-meta"
    meta.mkdir(exist_ok=True)
    counts = write_index(meta / "index.sqlite", index_shards(folder, list(shards))).counts
    (meta / ".info.json").write_text(
        json.dumps({"energon_version": "7.4.1", "shard_counts": counts})
    )
    (meta / "split.yaml").write_text(split)
    (meta / "dataset.yaml").write_text(dataset)
    return folder


THREE = {f"{name}.tar": numbered(name, n) for name, n in (("a", 4), ("b", 1), ("c", 3))}


# ------------------------------------------------------------------------------------- unprepared


def test_a_plain_folder_needs_no_preparation(tmp_path: Path) -> None:
    sizes = {"b.tar": 3, "c.tar.gz": 2, "sub/a.tgz": 2}
    shards = {name: numbered(Path(name).name[0], n) for name, n in sizes.items()}
    for name, content in shards.items():
        write_members(tmp_path / name, content)
    source = open_source(tmp_path)
    assert loaded(source) == by_hand(shards)
    assert source.path == str(tmp_path)
    assert source.shards == tuple(shards)
    assert source.segments == (Segment(0, 0, 3), Segment(1, 0, 2), Segment(2, 0, 2))
    assert source.sample_type is None
    raw = source.load(4)
    assert source.to_sample(raw) is raw
    assert raw == {
        "__key__": "c001",
        "__restore_key__": (),
        "__subflavors__": {},
        "__sources__": (SourceInfo(str(tmp_path), 4, "c.tar.gz", ("c001.jpg", "c001.txt")),),
        "jpg": b"jpg c1",
        "txt": b"txt c1",
    }


@pytest.mark.parametrize(
    ("pattern", "shards"),
    [("{c,a}.tar", "ca"), ("*.tar", "abc"), ("[bc].tar", "bc"), ("{c,*}.t*", "cab")],
)
def test_patterns_need_no_preparation(tmp_path: Path, pattern: str, shards: str) -> None:
    for name, content in THREE.items():
        write_members(tmp_path / name, content)
    source = open_source(tmp_path / pattern)
    assert loaded(source) == by_hand({f"{name}.tar": THREE[f"{name}.tar"] for name in shards})
    assert source.path == str(tmp_path)


def test_a_pattern_over_folders(tmp_path: Path) -> None:
    shards = {"y/s.tar": numbered("a", 1), "x/s.tar": numbered("b", 1)}
    for name, content in shards.items():
        write_members(tmp_path / name, content)
    assert loaded(open_source(tmp_path / "{y,x}" / "s.tar")) == by_hand(shards)


def test_a_relative_path_stays_right_when_the_process_goes_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_members(tmp_path / "a.tar", numbered("a", 1))
    monkeypatch.chdir(tmp_path)
    source = open_source("a.tar")
    monkeypatch.chdir("/")
    assert source.load(0)["txt"] == b"txt a0"


def test_an_unprepared_set_is_all_train(tmp_path: Path) -> None:
    write_members(tmp_path / "a.tar", numbered("a", 1))
    with pytest.raises(DatasetError, match=r"no split part 'val'.*energon-fn prepare .*\"train\""):
        open_source(tmp_path, "val")
    with pytest.raises(DatasetError, match=r"no \.nv-meta folder with crude\.yaml"):
        open_source(tmp_path, dataset_config="crude.yaml")


@pytest.mark.parametrize("name", ["", "none", "none/{0..3}.tar", "*.tar", "a.txt"])
def test_what_is_no_dataset(tmp_path: Path, name: str) -> None:
    (tmp_path / "a.txt").touch()
    with pytest.raises(DatasetError, match=r"(?i)check the path|not a shard"):
        open_source(tmp_path / name)


def test_an_unprepared_set_may_change_between_openings(tmp_path: Path) -> None:
    for content in (numbered("a", 3), numbered("b", 5), numbered("c", 2)):
        write_members(tmp_path / "new", content)
        os.replace(tmp_path / "new", tmp_path / "0.tar")
        assert loaded(open_source(tmp_path)) == by_hand({"0.tar": content})


def test_a_source_outlives_the_next_index(tmp_path: Path) -> None:
    write_members(tmp_path / "b.tar", numbered("b", 3))
    old = pickle.dumps(open_source(tmp_path))
    write_members(tmp_path / "a.tar", numbered("a", 3))
    assert keys(open_source(tmp_path))[0] == "a000"
    assert loaded(pickle.loads(old)) == by_hand({"b.tar": numbered("b", 3)})


def test_shards_without_samples_and_duplicate_keys(tmp_path: Path) -> None:
    shards = {"a.tar": numbered("k", 2), "b.tar": [("readme", b"")], "c.tar": numbered("k", 3)}
    for name, content in shards.items():
        write_members(tmp_path / name, content)
    source = open_source(tmp_path)
    assert loaded(source) == by_hand(shards)
    assert source.segments == (Segment(0, 0, 2), Segment(2, 0, 3))
    assert source.find("k001") == 1


# --------------------------------------------------------------------------------------- prepared


def test_the_split_says_which_shards_and_in_which_order(tmp_path: Path) -> None:
    split = "split_parts: {train: ['{c,a}.tar'], val: [b.tar], none: [], twice: [b.tar, b.tar]}"
    prepare(tmp_path, THREE, split)
    train = open_source(tmp_path)
    assert loaded(train) == by_hand({n: THREE[n] for n in ("c.tar", "a.tar")})
    assert train.segments == (Segment(2, 0, 3), Segment(0, 0, 4))
    assert keys(open_source(tmp_path, "val")) == ["b000"]
    assert keys(open_source(tmp_path, "twice")) == ["b000", "b000"]
    assert len(open_source(tmp_path, "none")) == 0
    with pytest.raises(DatasetError, match="no split part 'test'; there are: train, val, none"):
        open_source(tmp_path, "test")


def test_excluded_shards_and_samples_are_cut_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shards = THREE | {"sub/d.tar": numbered("x/y/", 3)}
    split = """
split_parts: {train: ['{a,b,c}.tar', sub/d.tar]}
exclude: ['{b,z}.tar', 'a.tar/a{000..001}', a.tar/a003, sub/d.tar/x/y/001, c.tar/a002]
"""
    source = open_source(prepare(tmp_path, shards, split))
    assert source.segments == (
        Segment(0, 2, 3), Segment(2, 0, 3), Segment(3, 0, 1), Segment(3, 2, 3),
    )  # fmt: skip
    assert keys(source) == ["a002", "c000", "c001", "c002", "x/y/000", "x/y/002"]
    assert source.keys() == keys(source)
    for start, stop in combinations_with_replacement(range(7), 2):
        cut = source.cut(start, stop)
        assert cut.keys() == keys(source)[start:stop]
        assert [cut.find(key) for key in keys(cut)] == list(range(stop - start))
        assert all(cut.runs)
    assert [source.find(key) for key in keys(source)] == list(range(6))
    for key in ("a000", "b000", "x/y/001", "none"):
        assert source.find(key) is None
    assert "the excluded sample c.tar/a002 does not exist" in caplog.text


def test_the_sample_type_and_what_it_reads(tmp_path: Path) -> None:
    content = [("0.png", b"p"), ("0.jpg", b"j"), ("0.json", b"{}"), ("0.txt", b"t")]
    source = open_source(
        prepare(tmp_path, {"a.tar": content}, "split_parts: {train: [a.tar]}", CAPTIONING)
    )
    raw = source.load(0)
    assert {name for name in raw if name[:2] != "__"} == {"jpg", "txt"}
    assert raw["__sources__"] == (SourceInfo(str(tmp_path), 0, "a.tar", ("0.jpg", "0.txt")),)
    assert raw["__subflavors__"] == {"source": "cats"}
    raw["__subflavors__"]["source"] = "changed by the user"
    assert source.load(0)["__subflavors__"] == {"source": "cats"}
    assert source.sample_type is CaptioningSample
    sample = source.to_sample(source.load(0))
    assert (sample.image, sample.caption, sample.__key__) == (b"j", b"t", "0")


def test_opening_a_prepared_set_touches_no_shard(tmp_path: Path) -> None:
    prepare(tmp_path, THREE)
    for name in THREE:
        os.unlink(tmp_path / name)
    source = open_source(tmp_path)
    assert len(source) == 8
    with pytest.raises(DatasetError, match=r"b\.tar does not exist: check the path"):
        source.load(4)


def test_a_shard_that_was_not_indexed_is_named(tmp_path: Path) -> None:
    prepare(tmp_path, THREE, "split_parts: {train: ['{a,d}.tar']}")
    with pytest.raises(DatasetError, match=r"split\.yaml: the shard 'd\.tar' .*energon-fn prepare"):
        open_source(tmp_path)


def test_a_changed_shard_is_noticed(tmp_path: Path) -> None:
    source = open_source(prepare(tmp_path, THREE))
    write_members(tmp_path / "c.tar", numbered("c", 4))
    assert source.load(0)["__key__"] == "a000"
    with pytest.raises(DatasetError, match=rf"c\.tar changed since .* prepare {tmp_path}"):
        source.load(5)


def test_counts_that_do_not_fit_the_index(tmp_path: Path) -> None:
    prepare(tmp_path, THREE)
    info = tmp_path / ".nv-meta" / ".info.json"
    info.write_text(info.read_text().replace('"b.tar": 1', '"b.tar": 2'))
    for reading in (loaded, Source.keys):
        with pytest.raises(DatasetError, match=r"no sample 1 of b\.tar: .* prepare"):
            reading(open_source(tmp_path))
    (tmp_path / ".nv-meta" / "index.sqlite").unlink()
    with pytest.raises(DatasetError, match=r"b\.tar has 1 samples and had 2 when .* prepare"):
        open_source(tmp_path)


@pytest.mark.parametrize("old", ["missing", "without parts"])
def test_sets_prepared_by_older_releases(tmp_path: Path, old: str) -> None:
    """They have counts in YAML, and no index of the parts."""
    prepare(tmp_path, THREE, "split_parts: {train: ['{c,a}.tar']}\nexclude: [a.tar/a001]")
    meta = tmp_path / ".nv-meta"
    (meta / "index.sqlite").unlink()
    if old == "without parts":
        write_index(meta / "index.sqlite", [])
        with sqlite3.connect(meta / "index.sqlite") as db:
            db.execute("DROP TABLE sample_parts")
    (meta / ".info.json").unlink()
    (meta / ".info.yaml").write_text("shard_counts: {c.tar: 3, a.tar: 4, b.tar: 1}")
    before = sorted(os.listdir(meta))
    source = open_source(tmp_path)
    assert keys(source) == ["c000", "c001", "c002", "a000", "a002", "a003"]
    assert source.load(4)["txt"] == b"txt a2"
    assert sorted(os.listdir(meta)) == before


def test_what_megatron_energon_prepared_is_read_in_its_order(
    tmp_path: Path, published_python: str
) -> None:
    shards = {f"{d}{i}.tar": numbered(f"{d}{i}_", 5) for d in ("", "sub/") for i in (10, 9, 8)}
    for name, content in shards.items():
        write_members(tmp_path / name, content)
    command = [
        os.path.join(os.path.dirname(published_python), "energon"), "prepare", str(tmp_path),
        "--non-interactive", "--split-ratio", "1,1,0", "--sample-type", "CaptioningSample",
        "--field-map", '{"image":"jpg","caption":"txt"}', "--exclude", "sub/9.tar",
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    split = tmp_path / ".nv-meta" / "split.yaml"
    split.write_text(split.read_text().replace("exclude: []", "exclude: ['9.tar/9_{001..002}']"))
    listing = (
        "import sys\n"
        "from megatron.energon import WorkerConfig, get_loader, get_val_dataset\n"
        "config = WorkerConfig(rank=0, world_size=1, num_workers=0)\n"
        "for part in ('train', 'val'):\n"
        "    dataset = get_val_dataset(sys.argv[1], split_part=part, worker_config=config,\n"
        "                              batch_size=1, auto_decode=False)\n"
        "    for batch in get_loader(dataset):\n"
        "        print(part, batch.__key__[0], batch.caption[0])\n"
    )
    theirs = subprocess.run([published_python, "-W", "ignore", "-c", listing, str(tmp_path)],
                            check=True, capture_output=True, text=True).stdout  # fmt: skip
    ours = []
    for part in ("train", "val"):
        source = open_source(tmp_path, part)
        samples = [source.to_sample(source.load(i)) for i in range(len(source))]
        ours += [f"{part} {sample.__key__} {sample.caption}" for sample in samples]
    assert theirs.splitlines() == ours
    assert len(ours) > 15
    assert not any("9_001" in line for line in ours)


# ------------------------------------------------------------------------------------ any dataset

names = st.text("ab0-é", min_size=1, max_size=3)
parts = st.sampled_from(["jpg", "txt", "detail.json", "x"])
tar_files = st.lists(
    st.tuples(
        st.one_of(
            st.builds("{}.{}".format, names, parts),
            st.builds("{}/{}.{}".format, names, names, parts),
            st.builds("{}/{}".format, names, names),
        ),
        st.sampled_from([0, 1, 100, 511, 512, 513, 3000, NEAR - 1, NEAR + 1000]).map(os.urandom),
    ),
    max_size=12,
)


@settings(deadline=None, max_examples=60)
@given(tar_files, tar_files, st.sampled_from([{"jpg", "txt"}, {"detail.json"}, None, set[str]()]))
def test_loading_is_grouping_by_hand(
    tmp_path_factory: pytest.TempPathFactory,
    first: list[File],
    second: list[File],
    wanted: set[str] | None,
) -> None:
    folder = tmp_path_factory.mktemp("t")
    shards = {"a.tar": first, "b/b.tgz": second}
    for name, content in shards.items():
        write_members(folder / name, content)
    source = open_source(folder)
    if wanted is not None:
        source = replace(source, part_filter=wanted.__contains__)
    always = {"__key__", "shard"}
    expected = [
        {k: v for k, v in sample.items() if wanted is None or k in wanted | always}
        for sample in by_hand(shards)
    ]
    assert loaded(source) == expected
    backwards = [source.load(i)["__key__"] for i in reversed(range(len(source)))]
    assert backwards == [sample["__key__"] for sample in expected][::-1]


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_segments_tile_exactly_what_is_not_excluded(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    sizes = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    order = data.draw(st.permutations(range(len(sizes))))
    part = order[: data.draw(st.integers(0, len(order)))]
    every = [(shard, i) for shard in range(len(sizes)) for i in range(sizes[shard])]
    excluded = data.draw(st.sets(st.sampled_from(every)))
    dropped = data.draw(st.sets(st.sampled_from(range(len(sizes)))))
    names = [f"{s}.tar/s{s}_{i:03d}" for s, i in excluded] + [f"{s}.tar" for s in dropped]

    folder = prepare(
        tmp_path_factory.mktemp("t"),
        {f"{s}.tar": numbered(f"s{s}_", n) for s, n in enumerate(sizes)},
        json.dumps({"split_parts": {"val": [f"{s}.tar" for s in part]}, "exclude": names}),
    )
    source = open_source(folder, "val")

    tiled = [(s, i) for s, start, stop in source.segments for i in range(start, stop)]
    expected = [
        (s, i) for s in part if s not in dropped for i in range(sizes[s]) if (s, i) not in excluded
    ]
    assert tiled == expected
    assert len(source) == len(expected)
    assert all(start < stop for _, start, stop in source.segments)
    assert keys(source) == [f"s{s}_{i:03d}" for s, i in expected]
    for shard, i in every:
        found = source.find(f"s{shard}_{i:03d}")
        assert found == (expected.index((shard, i)) if (shard, i) in expected else None)


def test_positions_that_are_not_there(tmp_path: Path) -> None:
    source = open_source(prepare(tmp_path, THREE))
    for i in (-1, 8, 10**9):
        with pytest.raises(IndexError, match=f"no sample {i}: .* has 8"):
            source.load(i)


def test_only_wanted_parts_are_read_and_neighbours_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = [("0.a", b"1"), ("0.big", b"2" * 3 * NEAR), ("0.b", b"3"), ("0.c", b"4" * 600)]
    write_members(tmp_path / "a.tar", content)
    source = open_source(tmp_path)
    source.load(0)
    reads: list[int] = []
    read_at = files.read_at

    def recording(path: str, offset: int, size: int) -> bytes:
        reads.append(size)
        return read_at(path, offset, size)

    monkeypatch.setattr(files, "read_at", recording)
    wanted = replace(source, part_filter={"a", "b", "c"}.__contains__)
    raw = wanted.load(0)
    assert [raw[name] for name in "abc"] == [b"1", b"3", b"4" * 600]
    assert reads == [1, 1, 600]
    reads.clear()
    close = replace(source, part_filter={"b", "c"}.__contains__).load(0)
    assert [close[name] for name in "bc"] == [b"3", b"4" * 600]
    assert reads == [1024 + 600]
    reads.clear()
    nothing = replace(source, part_filter=lambda name: False).load(0)
    assert (reads, nothing["__sources__"][0].file_names) == ([], ())


def test_the_last_of_equal_parts_counts(tmp_path: Path) -> None:
    write_members(tmp_path / "a.tar", [("0.txt", b"old"), ("0.jpg", b"j"), ("0.txt", b"new")])
    raw = open_source(tmp_path).load(0)
    assert (raw["txt"], raw["jpg"]) == (b"new", b"j")


def test_what_webdataset_writes(tmp_path: Path) -> None:
    with webdataset.ShardWriter(str(tmp_path / "%02d.tar"), maxcount=7, verbose=False) as writer:
        for i in range(20):
            writer.write({"__key__": f"d/{i:02d}", "txt": f"text {i}", "cls": i})
    source = open_source(tmp_path / "{00..02}.tar")
    assert [(raw["__key__"], raw["txt"], raw["cls"]) for raw in loaded(source)] == [
        (f"d/{i:02d}", f"text {i}".encode(), f"{i}".encode()) for i in range(20)
    ]


def test_pickles_small_and_without_what_was_read(tmp_path: Path) -> None:
    source = open_source(prepare(tmp_path, THREE, dataset=CAPTIONING))
    fresh = len(pickle.dumps(source))
    expected = loaded(source)
    assert len(pickle.dumps(source)) == fresh < 2000
    copy = pickle.loads(pickle.dumps(source))
    assert copy == source
    assert loaded(copy) == expected
    assert copy.shards is copy.index.shards


@pytest.mark.parametrize("prepared", [True, False])
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes_load(tmp_path: Path, method: str, prepared: bool) -> None:
    if prepared:
        prepare(tmp_path, THREE)
    else:
        write_members(tmp_path / "a.tgz", numbered("a", 8))
    source = open_source(tmp_path)
    expected = [source.load(i) for i in range(8)]
    with multiprocessing.get_context(method).Pool(2) as pool:
        assert pool.map(source.load, range(8)) == expected
    assert [source.load(i) for i in range(8)] == expected


def test_threads_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "_KEPT_BLOCKS", 2)
    monkeypatch.setattr(files, "MAX_OPEN", 2)
    shards = {f"{name}.tar": numbered(name, 150) for name in "abcd"}
    for name, content in shards.items():
        write_members(tmp_path / name, content)
    source = open_source(tmp_path)
    order = random.Random(0).sample(range(600), 600)
    with ThreadPoolExecutor(8) as pool:
        samples = dict(zip(order, pool.map(source.load, order), strict=True))
    expected = by_hand(shards)
    for i, sample in enumerate(expected):
        assert {name: samples[i][name] for name in ("__key__", "jpg", "txt")} == {
            name: sample[name] for name in ("__key__", "jpg", "txt")
        }


def test_no_part_takes_the_place_of_bookkeeping(tmp_path: Path) -> None:
    names = ("__key__", "__sources__", "__restore_key__", "__subflavors__", "txt")
    write_members(tmp_path / "0.tar", [(f"7.{name}", b"evil") for name in names])
    source = open_source(tmp_path)
    raw = source.load(0)
    assert (raw["__key__"], raw["txt"]) == ("7", b"evil")
    assert (raw["__restore_key__"], raw["__subflavors__"]) == ((), {})
    assert raw["__sources__"] == (SourceInfo(str(tmp_path), 0, "0.tar", ("7.txt",)),)


def test_a_source_is_told_in_a_line(tmp_path: Path) -> None:
    for shard in range(3):
        write_members(tmp_path / f"{shard}.tar", [(f"{shard}{n}.txt", b"a rose") for n in range(2)])
    found = repr(open_source(tmp_path).cut(1, 4))
    assert found == f"Source(3 samples of {tmp_path}, train, 2 shards)"
