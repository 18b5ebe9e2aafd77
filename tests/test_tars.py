from __future__ import annotations

import gzip
import io
import multiprocessing
import os
import tarfile
import threading
from itertools import groupby
from pathlib import Path

import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from webdataset.tariterators import base_plus_ext

from energon_fn.disk import files
from energon_fn.disk.tars import ShardIndex, idx_bytes, index_shard, index_shards, split_name
from energon_fn.errors import DatasetError

LONG = "long" * 60
Entry = tuple[str, bytes | None]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(files, "_open_shards", {})
    monkeypatch.setattr(files, "_unpacked", {})
    monkeypatch.setenv("ENERGON_FN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_tar(
    path: Path, entries: list[Entry], form: int = tarfile.GNU_FORMAT, links: bool = False
) -> Path:
    """Files with their content; None makes a folder (or a link to the first file)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w", format=form) as tar:
        for name, data in entries:
            info = tarfile.TarInfo(name)
            if data is None:
                info.type = tarfile.LNKTYPE if links else tarfile.DIRTYPE
                info.linkname = entries[0][0] if links else ""
            info.size = len(data or b"")
            tar.addfile(info, io.BytesIO(data or b""))
    return path


def numbered(n: int, prefix: str = "") -> list[Entry]:
    return [(f"{prefix}{i:04d}.{part}", f"{part}{i}".encode()) for i in range(n)
            for part in ("jpg", "txt")]  # fmt: skip


def by_hand(entries: list[Entry]) -> list[tuple[str, list[tuple[str, bytes]]]]:
    """The samples of a tar: runs of files with the same key."""
    parts = [(*found, data) for name, data in entries
             if data is not None and (found := split_name(name))]  # fmt: skip
    return [
        (key, [(name, data) for _, name, data in run])
        for key, run in groupby(parts, lambda part: part[0])
    ]


# ------------------------------------------------------------------------------------ index_shard

simple = st.text("ab0_-é ", min_size=1, max_size=4)
tricky = st.text("ab._/é-", min_size=1, max_size=12)
file_names = st.one_of(
    tricky,
    st.builds("{}.{}".format, simple, simple),
    st.builds("{}/{}.{}.{}".format, simple, simple, simple, simple),
    st.builds((LONG + "{}.{}").format, simple, simple),
)
tars = st.lists(st.tuples(file_names, st.none() | st.binary(max_size=1500)), max_size=12)
formats = st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])


@given(tricky)
def test_names_are_split_as_webdataset_does(name: str) -> None:
    expected = base_plus_ext(name)
    assert split_name(name) == (None if expected[0] is None else expected)


@pytest.mark.parametrize("name", ["__meta__", "__meta__.json/a.txt", "__x__/0001.txt"])
def test_meta_files_are_in_no_sample(name: str) -> None:
    skipped = name != "__meta__.json/a.txt"  # that folder is not called __like_this__
    assert (split_name(name) is None) == skipped


@settings(deadline=None)
@given(tars, formats, st.booleans())
def test_samples_are_runs_of_files_with_one_key(
    tmp_path_factory: pytest.TempPathFactory, entries: list[Entry], form: int, packed: bool
) -> None:
    # A folder's name has a slash at its end; tarfile takes it away from files too.
    entries = [(name.rstrip("/") or "x", data) for name, data in entries]
    path = tmp_path_factory.mktemp("t") / ("a.tgz" if packed else "a.tar")
    write_tar(path, entries, form)
    stream = gzip.decompress(path.read_bytes()) if packed else path.read_bytes()

    shard = index_shard(path, "sub/a.tar")

    expected = by_hand(entries)
    assert shard.name == "sub/a.tar"
    assert shard.keys == [key for key, _ in expected]
    assert [
        [(name, stream[offset : offset + size]) for name, offset, size in parts]
        for parts in shard.parts
    ] == [parts for _, parts in expected]
    # From offset to offset, the shard is cut into tars that hold just the sample (and what lies
    # between it and the next one that belongs to none).
    for i, (key, parts) in enumerate(expected):
        piece = io.BytesIO(stream[shard.offsets[i] : shard.offsets[i + 1]])
        names = [member.name for member in tarfile.TarFile(fileobj=piece) if member.isreg()]
        assert names[0] == f"{key}.{parts[0][0]}"
        assert [n for n in names if split_name(n)] == [f"{key}.{part}" for part, _ in parts]
    assert not any(stream[shard.offsets[-1] :])


def test_what_webdataset_writes_and_reads(tmp_path: Path) -> None:
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as tar:
        for i in range(20):
            tar.write({"__key__": f"d{i % 3}/{i}", "txt": "t" * i, "x.json": {"i": i}})
    shard = index_shard(tmp_path / "a.tar")
    data = (tmp_path / "a.tar").read_bytes()
    read = webdataset.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False)
    assert [
        {"__key__": key, **{part: data[at : at + size] for part, at, size in parts}}
        for key, parts in zip(shard.keys, shard.parts, strict=True)
    ] == [{k: v for k, v in s.items() if k not in ("__url__", "__local_path__")} for s in read]


def test_contents_of_uncompressed_shards_are_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open(tmp_path / "a.tar", "wb") as file, tarfile.open(fileobj=file, mode="w") as tar:
        for i in range(10):
            info = tarfile.TarInfo(f"{i}.bin")
            info.size = 2**30
            file.write(info.tobuf())
            file.seek(2**30, os.SEEK_CUR)
            tar.offset = file.tell()

    def bytes_read() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    before = bytes_read()
    assert len(index_shard(tmp_path / "a.tar")) == 10
    assert bytes_read() - before < 2**22  # of 10 GiB


def test_offsets_as_megatron_energon_writes_them() -> None:
    shard = ShardIndex("a.tar", ["a", "b"], [512, 2**33, 2**33 + 1024], [(), ()])
    assert idx_bytes(shard) == b"".join(n.to_bytes(8, "little") for n in shard.offsets)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: d[:3000], "unexpected end of data; the last whole sample is '0000'"),
        (lambda d: d[: 4 * 1024 + 100], "cut short .*; the last whole sample is '0000'"),
        (lambda d: d[: 6 * 1024], "cut short .*append 1024 zero bytes.*sample is '0001'"),
        (lambda d: d[:4096] + b"\xff" * 512 + d[4608:], "byte 4096 is not a tar header"),
        (lambda d: d[:600], "unexpected end of data; no sample is whole"),
        (lambda d: b"no tar at all" * 100, "invalid header; no sample is whole"),
        (lambda d: b"", "empty file; no sample is whole"),
    ],
)
def test_a_damaged_shard_is_named_with_the_last_good_sample(
    tmp_path: Path, damage: object, message: str
) -> None:
    path = write_tar(tmp_path / "a.tar", numbered(3))
    path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]
    with pytest.raises(DatasetError, match=rf"a\.tar: .*{message}.*again"):
        index_shard(path)


@pytest.mark.parametrize("size", [10, 100, -5])
def test_a_damaged_compressed_shard_is_named(tmp_path: Path, size: int) -> None:
    path = write_tar(tmp_path / "a.tgz", numbered(3))
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(DatasetError, match=r"a\.tgz.*again"):
        index_shard(path)


def test_a_sparse_file_has_no_bytes_to_read(tmp_path: Path) -> None:
    info = tarfile.TarInfo("a.bin")
    info.type = tarfile.GNUTYPE_SPARSE
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        tar.addfile(info)
    with pytest.raises(DatasetError, match=r"a\.bin is a sparse file"):
        index_shard(tmp_path / "a.tar")


def test_a_name_that_is_not_utf8(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [(os.fsdecode(b"caf\xe9.txt"), b"")])
    with pytest.raises(DatasetError, match=r"a\.tar: a file name near .* is not UTF-8"):
        index_shard(tmp_path / "a.tar")


def test_links_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_tar(tmp_path / "a.tar", [("0.jpg", b"1"), ("0.txt", None), ("1", None)], links=True)
    assert index_shard(tmp_path / "a.tar").parts == [(("jpg", 512, 1),)]
    assert "a.tar: 1 links are not read" in caplog.text


def test_concatenated_tars_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in "ab":
        write_tar(tmp_path / f"{name}.tar", [(f"{name}.txt", b"")])
    (tmp_path / "c.tar").write_bytes(
        (tmp_path / "a.tar").read_bytes() + (tmp_path / "b.tar").read_bytes()
    )
    assert index_shard(tmp_path / "c.tar").keys == ["a"]
    assert "c.tar has data behind its end-of-archive marker at byte 512" in caplog.text


@pytest.mark.parametrize("threads", [1, 2])
def test_many_shards_come_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    before = multiprocessing.active_children()
    names = [f"{i}.tar" for i in range(9)]
    for i, name in enumerate(names):
        write_tar(tmp_path / name, numbered(i, name))
    expected = [index_shard(tmp_path / name) for name in names]
    monkeypatch.setattr(threading, "active_count", lambda: threads)
    assert list(index_shards(tmp_path, names, workers=2)) == expected
    assert list(index_shards(tmp_path, names, workers=1)) == expected
    (tmp_path / "4.tar").unlink()
    with pytest.raises(DatasetError, match=r"4\.tar does not exist"):
        list(index_shards(tmp_path, names, workers=2))
    assert set(multiprocessing.active_children()) <= set(before)


def test_samples_that_run_into_one_another_are_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = ["a.txt", "a.cls", "a.txt", "a.cls", "b.txt"]
    write_tar(tmp_path / "a.tar", [(name, b"1") for name in names])
    index_shard(tmp_path / "a.tar")
    assert "a.tar: 2 files have the name of another one of their sample, 'a.txt'" in caplog.text
