from __future__ import annotations

import gzip
import multiprocessing
import os
import pickle
import shutil
import signal
import sqlite3
import subprocess
import tarfile
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from test_tars import LONG, Entry, by_hand, cache, numbered, write_tar

from energon_fn.disk import files, index, tars
from energon_fn.disk.index import (
    BLOCK,
    Index,
    cached_index,
    has_parts,
    opened,
    write_index,
    write_media,
)
from energon_fn.disk.tars import ShardIndex, idx_bytes, index_shard, index_shards
from energon_fn.errors import DatasetError

__all__ = ["cache"]  # a fixture, used by its name


# ------------------------------------------------------------------------------------ write_index


def rows(path: Path, table: str) -> list[tuple[object, ...]]:
    with sqlite3.connect(path) as db:
        return sorted(db.execute(f"SELECT * FROM {table}").fetchall())


def odd_folder(folder: Path) -> list[str]:
    """Shards with about everything that a tar may hold, all keys different."""
    write_tar(folder / "a.tar", [("0.jpg", b"x" * 2002), ("0.txt", b"hi"), ("1.jpg", b"y"), *
                                 [("1.txt", b"")]])  # fmt: skip
    write_tar(folder / "dots.tar", [
        (".hidden", b"1"), ("nodot", b"2"), ("o.jpg", b"1"), ("nodot2", b"5"), ("o.txt", b"2"),
        (".h.txt", b"1"), ("x/.h.txt", b"1"), ("__meta.json", b"1"), ("__meta__/c.txt", b"1"),
        ("c2.", b"1"), ("c2.txt", b"1"), ("c3/.a.b.txt", b"1"), ("c4.d/.h.txt", b"1"),
        ("c5.d/e", b"1"), ("c6..txt", b"1"), ("/abs/c8.txt", b"1"), ("../c9.txt", b"1"),
        ("sp ace.txt", b"1"), ("t.txt", b"1"), ("end", b"e" * 600),
    ])  # fmt: skip
    write_tar(folder / "sub/b.tar", [
        ("d", None), ("d/0.jpg", b"1"), ("d/0.txt", b"2"), ("d/e/0.jpg", b"3"), ("d.x/k.txt", b"b"),
        ("./w.detail.json", b"{}"), ("K.JPG", b"q"), ("last", None),
    ])  # fmt: skip
    write_tar(folder / "sub/g.tar", [(LONG + ".jpg", b"1"), (LONG + ".txt", b"2"), ("z.jpg", b"")])
    write_tar(folder / "sub-p/p.tar", [(LONG + "p.jpg", b"1"), ("ü.txt", b"2")], tarfile.PAX_FORMAT)
    write_tar(folder / "u.tar", [("s" * 60 + "/" + "t" * 60 + ".txt", b"1")], tarfile.USTAR_FORMAT)
    write_tar(folder / "links.tar", [("l0.jpg", b"1"), ("l0.txt", None)], links=True)
    write_tar(folder / "twice.tar", [("w2.jpg", b"1"), ("w2.jpg", b"22")])
    return files.list_tars(folder)


def test_the_index_is_what_megatron_energon_makes(tmp_path: Path, published_python: str) -> None:
    folder = tmp_path / "set"
    names = odd_folder(folder)
    command = [
        os.path.join(os.path.dirname(published_python), "energon"), "prepare", str(folder),
        "--non-interactive", "--split-ratio", "8,1,1", "--sample-type", "CaptioningSample",
        "--field-map", '{"image":"jpg","caption":"txt"}',
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    theirs = folder / ".nv-meta" / "index.sqlite"

    ours = tmp_path / "index.sqlite"
    shards = list(index_shards(folder, names))
    assert write_index(ours, shards).duplicates == ()

    assert rows(ours, "samples") == rows(theirs, "samples")
    assert rows(ours, "sample_parts") == rows(theirs, "sample_parts")
    columns = "SELECT m.name, c.* FROM sqlite_master m JOIN pragma_table_info(m.name) c"
    indices = "SELECT m.name, c.* FROM sqlite_master m JOIN pragma_index_info(m.name) c"
    for query in (columns, indices):
        with sqlite3.connect(ours) as db, sqlite3.connect(theirs) as other:
            assert sorted(db.execute(query)) == sorted(other.execute(query))
    for shard in shards:
        assert (folder / (shard.name + ".idx")).read_bytes() == idx_bytes(shard)
    # And their index is read as ours is.
    for path in (str(ours), str(theirs)):
        assert has_parts(path)
        reader = Index(path, str(folder), tuple(names))
        for i, shard in enumerate(shards):
            for j, key in enumerate(shard.keys):
                assert reader.parts(i, j) == (key, shard.parts[j])
                assert reader.find(key) == (i, j)


def test_the_summary_counts(tmp_path: Path) -> None:
    shards = [
        ShardIndex("b.tar", ["x", "y"], [0, 512, 1024], [(("jpg", 0, 1),), (("txt", 1, 1),)]),
        ShardIndex("a.tar", [], [0], []),
    ]
    summary = write_index(tmp_path / "i", iter(shards))
    assert list(summary.counts.items()) == [("b.tar", 2), ("a.tar", 0)]
    assert summary.part_names == ("jpg", "txt")
    assert rows(tmp_path / "i", "samples") == [(0, "x", 0, 0, 512), (0, "y", 1, 512, 512)]
    assert os.listdir(tmp_path) == ["i"]


def test_duplicate_keys_are_data_and_nothing_is_written(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("a.x", b""), ("b.x", b""), ("a.y", b"")])
    write_tar(tmp_path / "b.tar", [("c.x", b""), ("b.x", b""), ("b.y", b"")])
    (tmp_path / "out").mkdir()
    shards = index_shards(tmp_path, ["a.tar", "b.tar"])
    summary = write_index(tmp_path / "out" / "i", shards)
    assert summary.duplicates == (("a", "a.tar"), ("b", "b.tar"))
    assert summary.counts == {"a.tar": 3, "b.tar": 2}
    assert os.listdir(tmp_path / "out") == []


def test_writing_holds_one_shard_at_a_time(tmp_path: Path) -> None:
    alive: weakref.WeakSet[ShardIndex] = weakref.WeakSet()
    most = 0

    class Tracked(ShardIndex):
        __hash__ = object.__hash__

    def shards() -> Iterator[ShardIndex]:
        nonlocal most
        for i in range(20):
            shard = Tracked(str(i), [f"{i}"], [0, 1], [()])
            alive.add(shard)
            most = max(most, len(alive))
            yield shard

    write_index(tmp_path / "i", shards())
    assert most <= 2


# ------------------------------------------------------------------------------------------ Index


@pytest.fixture
def dataset(tmp_path: Path) -> tuple[Index, list[list[Entry]]]:
    """Two shards of a little more than one and two blocks."""
    contents = [numbered(BLOCK + 3, "a"), numbered(2 * BLOCK + 1, "b")]
    names = ("0.tar", "sub/1.tar")
    for name, entries in zip(names, contents, strict=True):
        write_tar(tmp_path / "set" / name, entries)
    write_index(tmp_path / "index.sqlite", index_shards(tmp_path / "set", names))
    return Index(str(tmp_path / "index.sqlite"), str(tmp_path / "set"), names), contents


def whole(reader: Index, contents: list[list[Entry]]) -> bool:
    """Every sample, in an order that visits the blocks again and again."""
    expected = [by_hand(entries) for entries in contents]
    places = [(i, j) for i, samples in enumerate(expected) for j in range(len(samples))]
    for shard, sample in places[::7] + places[::-1]:
        key, parts = reader.parts(shard, sample)
        path = os.path.join(reader.root, reader.shards[shard])
        read = [(name, files.read_at(path, at, size)) for name, at, size in parts]
        if (key, read) != expected[shard][sample] or reader.find(key) != (shard, sample):
            return False
    return True


def test_every_sample_is_found(dataset: tuple[Index, list[list[Entry]]]) -> None:
    assert whole(*dataset)
    assert dataset[0].find("no such key") is None


def test_blocks_are_forgotten_and_read_again(
    dataset: tuple[Index, list[list[Entry]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "_KEPT_BLOCKS", 2)
    assert whole(*dataset)
    assert len(dataset[0]._blocks) == 2


def test_one_query_serves_a_block(dataset: tuple[Index, list[list[Entry]]]) -> None:
    reader, _ = dataset
    reader.parts(1, 0)
    statements: list[str] = []
    with opened(reader.path) as db:
        db.set_trace_callback(statements.append)
    for i in range(BLOCK):
        reader.parts(1, i)
    assert statements == []


@pytest.mark.parametrize("sample", [BLOCK + 3, 5 * BLOCK])
def test_a_sample_that_is_not_there(dataset: tuple[Index, list[list[Entry]]], sample: int) -> None:
    with pytest.raises(DatasetError, match=rf"has no sample {sample} of 0\.tar.*energon-fn prep"):
        dataset[0].parts(0, sample)


def test_it_pickles_as_its_arguments(dataset: tuple[Index, list[list[Entry]]]) -> None:
    reader, contents = dataset
    assert whole(reader, contents)
    data = pickle.dumps(reader)
    assert len(data) < 500
    assert whole(pickle.loads(data), contents)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes_read(dataset: tuple[Index, list[list[Entry]]], method: str) -> None:
    reader, _ = dataset
    expected = reader.parts(1, 5)
    with multiprocessing.get_context(method).Pool(1) as pool:
        assert pool.apply(reader.parts, (1, 5)) == expected
        assert pool.apply(reader.find, (expected[0],)) == (1, 5)
    assert reader.find(expected[0]) == (1, 5)


def test_threads_read_while_others_fork(dataset: tuple[Index, list[list[Entry]]]) -> None:
    reader, contents = dataset
    results: list[bool] = []
    threads = [
        threading.Thread(target=lambda: results.append(whole(reader, contents))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    children = []
    for _ in range(10):
        child = os.fork()
        if not child:
            reader._blocks.clear()
            os._exit(reader.parts(1, 200)[0] != "b0200")
        children.append(child)
    for thread in threads:
        thread.join()
    assert results == [True] * 4
    assert {os.waitpid(child, 0)[1] for child in children} == {0}


def test_sqlite_is_used_under_the_lock_that_a_fork_waits_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: set[str] = set()

    class Watched(sqlite3.Connection):
        pass

    def watch(name: str) -> Callable[..., object]:
        def method(self: Watched, *args: Any) -> object:
            used.add(name)
            assert index._lock.locked(), name
            return getattr(sqlite3.Connection, name)(self, *args)

        return method

    names = {"execute", "executemany", "executescript", "close"}
    for name in names:
        setattr(Watched, name, watch(name))

    def connect(*args: Any, **options: Any) -> sqlite3.Connection:
        assert index._lock.locked()
        return sqlite3_connect(*args, **options, factory=Watched)

    def walk(*args: Any) -> Iterator[ShardIndex]:
        for shard in index_shards(*args):
            assert not index._lock.locked()  # walking forks, which waits for it
            yield shard

    sqlite3_connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", connect)
    monkeypatch.setattr(index, "_KEPT_OPEN", 1)
    monkeypatch.setattr(index, "index_shards", walk)
    root, shards = tmp_path / "set", ["0.tar", "1.tar"]
    for name in shards:
        write_tar(root / name, numbered(2, name[0]))
    assert all_keys(root, shards[:1]) == [["00000", "00001"]]
    assert all_keys(root, shards) == [["00000", "00001"], ["10000", "10001"]]
    path = tmp_path / "i"
    assert write_index(path, walk(root, shards)).counts == {"0.tar": 2, "1.tar": 2}
    media = (("0.jpg", "ImageMetadata", "{}"),)
    assert write_media(tmp_path / "m", iter([media]), [("GLOB", "*")], str(path)) == 1
    assert has_parts(path)
    assert used == names


def test_a_process_forked_while_a_thread_opens_datasets_reads(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", numbered(2))
    path, _ = cached_index(tmp_path, ["a.tar"])
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            write_tar(tmp_path / "a.tar", numbered(2))
            cached_index(tmp_path, ["a.tar"])
            has_parts(path)

    thread = threading.Thread(target=work)
    thread.start()
    ends = []
    for _ in range(100):
        child = os.fork()
        if not child:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends one that hangs
            signal.alarm(5)
            os._exit(not has_parts(path))
        ends.append(os.waitpid(child, 0)[1])
        if ends[-1]:
            break
    stop.set()
    thread.join()
    assert set(ends) == {0}


def test_few_index_files_are_open_at_once_and_few_blocks_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "_KEPT_OPEN", 5)
    monkeypatch.setattr(index, "_KEPT_BLOCKS", 7)
    readers = []
    for i in range(20):
        write_tar(tmp_path / f"{i}.tar", numbered(1, f"{i}-"))
        write_index(tmp_path / f"{i}", [index_shard(tmp_path / f"{i}.tar")])
        readers.append(Index(str(tmp_path / f"{i}"), str(tmp_path), (f"{i}.tar",)))
    for _ in range(2):
        for i, reader in enumerate(readers):
            assert reader.parts(0, 0)[0] == f"{i}-0000"
            found = [os.readlink(f"/proc/self/fd/{fd}") for fd in _descriptors()]
            assert sum(Path(one).parent == tmp_path and one[-4:] != ".tar" for one in found) <= 5
            assert sum(len(one._blocks) for one in readers) <= 7
    assert readers[3].find("3-0000") == (0, 0)


def _descriptors() -> list[str]:
    return [fd for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}")]


def test_an_index_that_was_replaced_is_not_taken_for_the_one_that_was_opened(
    dataset: tuple[Index, list[list[Entry]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, _ = dataset
    assert reader.find("a0001") == (0, 1)
    write_index(reader.path, [ShardIndex("0.tar", ["a0001"], [0, 512], [(("jpg", 0, 1),)])])
    assert reader.find("a0001") == (0, 1)  # it is still open
    monkeypatch.setattr(index, "_connections", {})
    with pytest.raises(DatasetError, match=r"index\.sqlite was replaced since it was opened"):
        reader.find("a0001")
    assert Index(reader.path, reader.root, ("0.tar",)).find("a0001") == (0, 0)


def test_a_cached_index_that_others_use_or_make_too_is_opened_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tar(tmp_path / "set" / "a.tar", numbered(2))
    path, _ = cached_index(tmp_path / "set", ["a.tar"])
    reader = Index(path, str(tmp_path / "set"), ("a.tar",))
    assert reader.find("0001") == (0, 1)
    shutil.copy(path, tmp_path / "copy")
    os.replace(tmp_path / "copy", path)
    os.utime(path, (1, 1))
    monkeypatch.setattr(index, "_connections", {})
    assert reader.find("0001") == (0, 1)


def test_a_damaged_index_is_read_when_it_was_made_again(tmp_path: Path) -> None:
    write_tar(tmp_path / "set" / "a.tar", numbered(2))
    path, counts = cached_index(tmp_path / "set", ["a.tar"])
    index._connections.clear()
    Path(path).write_bytes(b"garbage" * 1000)
    with pytest.raises(DatasetError, match="remove it"):
        cached_index(tmp_path / "set", ["a.tar"])
    Path(path).unlink()
    assert cached_index(tmp_path / "set", ["a.tar"]) == (path, counts)


@pytest.mark.parametrize("again", [False, True])
def test_no_old_place_is_read_in_a_new_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: bool
) -> None:
    monkeypatch.setattr(files, "MAX_OPEN", 1)
    path = str(write_tar(tmp_path / "a.tar", numbered(3 * BLOCK)))
    write_index(tmp_path / "i", [index_shard(path)])
    reader = Index(str(tmp_path / "i"), str(tmp_path), ("a.tar",))

    def read(index: Index) -> bytes:
        _, ((_, offset, size), *_) = index.parts(0, 5)
        return files.read_at(path, offset, size)

    assert read(reader) == b"jpg5"
    write_tar(tmp_path / "b.tar", numbered(1))
    files.read_at(tmp_path / "b.tar", 0, 1)  # which closes the other one
    write_tar(tmp_path / "a.tar", [("x", b"x"), *numbered(3 * BLOCK)])
    if again:  # somebody opens it as it is now
        write_index(tmp_path / "i2", [index_shard(path)])
        assert read(Index(str(tmp_path / "i2"), str(tmp_path), ("a.tar",))) == b"jpg5"
    with pytest.raises(DatasetError, match=r"a\.tar changed since it was indexed"):
        read(reader)


def test_an_index_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "i").write_bytes(b"not a database, and longer than its header" * 100)
    with pytest.raises(DatasetError, match=r"/i: the index cannot be used"):
        Index(str(tmp_path / "i"), "", ()).find("a")
    with pytest.raises(DatasetError, match="gone does not exist: check the path"):
        Index(str(tmp_path / "gone"), "", ()).find("a")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "change", ["cut", "grown", "moved", "another key", "another size", "zeros", "garbage"]
)
def test_a_shard_that_changed_is_noticed(tmp_path: Path, change: str, packed: bool) -> None:
    name = "a.tgz" if packed else "a.tar"
    old = numbered(3)
    path = write_tar(tmp_path / name, old)
    write_index(tmp_path / "i", [index_shard(path)])
    reader = Index(str(tmp_path / "i"), str(tmp_path), (name,))
    reader.parts(0, 0)

    new = {
        "cut": old[:-2],
        "grown": [*old, ("0003.jpg", b"")],
        "moved": [("x", b"x"), *old],
        "another key": [("1000.jpg", b"jpg0"), *old[1:]],
        "another size": [("0000.jpg", b"jpg00"), *old[1:]],
    }.get(change, old)
    write_tar(path, new)
    if change in ("zeros", "garbage"):
        data = (b"\0" if change == "zeros" else b"\xff") * 1024
        path.write_bytes(gzip.compress(data * 9) if packed else data * 9)
    reader._blocks.clear()
    message = rf"{name} changed since it was indexed.*Prepare the dataset again.*{tmp_path}"
    with pytest.raises(DatasetError, match=message):
        reader.parts(0, 0)


@pytest.mark.parametrize("extra", [-20 * 512 + 4 * 512, 0, 100 * 10240])
def test_the_padding_behind_a_tar_may_be_of_any_size(tmp_path: Path, extra: int) -> None:
    path = write_tar(tmp_path / "a.tar", numbered(2))
    data = path.read_bytes()
    write_index(tmp_path / "i", [index_shard(path)])
    end = index_shard(path).offsets[-1]
    path.write_bytes((data + bytes(max(extra, 0)))[: None if extra >= 0 else end])
    assert Index(str(tmp_path / "i"), str(tmp_path), ("a.tar",)).parts(0, 1)[0] == "0001"


def test_a_missing_shard_is_named(dataset: tuple[Index, list[list[Entry]]]) -> None:
    reader, _ = dataset
    os.unlink(os.path.join(reader.root, "sub/1.tar"))
    assert reader.parts(0, 0)[0] == "a0000"
    with pytest.raises(DatasetError, match=r"sub/1\.tar does not exist: check the path"):
        reader.parts(1, 0)


def test_older_indices_have_no_parts(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "i") as db:
        db.execute("CREATE TABLE samples (tar_file_id, sample_key, sample_index)")
    assert not has_parts(tmp_path / "i")
    assert not has_parts(tmp_path / "none")


# ----------------------------------------------------------------------------------- cached_index


@pytest.fixture
def walked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the shards that are walked from now on."""
    names: list[str] = []
    walk = index_shard

    def recording(path: str, name: str | None = None) -> ShardIndex:
        names.append(os.path.basename(path))
        return walk(path, name)

    monkeypatch.setattr(tars, "index_shard", recording)
    monkeypatch.setattr(threading, "active_count", lambda: 2)  # threads, so that this list is seen
    return names


def all_keys(root: Path, names: list[str]) -> list[list[str]]:
    path, counts = cached_index(root, names)
    assert list(counts) == names
    reader = Index(path, str(root), tuple(names))
    return [
        [reader.parts(i, j)[0] for j in range(count)] for i, count in enumerate(counts.values())
    ]


def test_only_what_changed_is_walked_again(tmp_path: Path, walked: list[str], cache: Path) -> None:
    root, names = tmp_path / "set", ["a.tar", "b.tar", "c.tar"]
    for name in names:
        write_tar(root / name, numbered(BLOCK + 2, name[0]))
    expected = [[f"{n[0]}{i:04d}" for i in range(BLOCK + 2)] for n in names]
    assert all_keys(root, names) == expected
    assert sorted(walked) == names
    assert all_keys(root, names) == expected
    assert len(walked) == 3

    write_tar(root / "b.tar", numbered(1, "b"))
    write_tar(root / "aa.tar", numbered(2, "aa"))
    walked.clear()
    assert all_keys(root, ["a.tar", "aa.tar", "b.tar", "c.tar"]) == [
        expected[0], ["aa0000", "aa0001"], ["b0000"], expected[2],
    ]  # fmt: skip
    assert sorted(walked) == ["aa.tar", "b.tar"]

    (root / "a.tar").unlink()
    walked.clear()
    assert all_keys(root, ["c.tar", "b.tar"]) == [expected[2], ["b0000"]]
    assert walked == []
    assert len(list(cache.iterdir())) == 3


def test_a_changed_time_is_a_change(tmp_path: Path, walked: list[str]) -> None:
    write_tar(tmp_path / "a.tar", numbered(1, "a"))
    assert all_keys(tmp_path, ["a.tar"]) == [["a0000"]]
    write_tar(tmp_path / "a.tar", numbered(1, "b"))
    os.utime(tmp_path / "a.tar", ns=(1, 1))
    assert all_keys(tmp_path, ["a.tar"]) == [["b0000"]]
    assert walked == ["a.tar", "a.tar"]


def test_another_way_to_the_same_folder_has_the_same_index(
    tmp_path: Path, walked: list[str]
) -> None:
    write_tar(tmp_path / "set" / "a.tar", numbered(1))
    (tmp_path / "link").symlink_to(tmp_path / "set")
    assert cached_index(tmp_path / "set", ["a.tar"]) == cached_index(tmp_path / "link", ["a.tar"])
    assert walked == ["a.tar"]


def test_duplicate_keys_are_there_and_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a.tar", "b.tar"):
        write_tar(tmp_path / name, numbered(2))
    assert all_keys(tmp_path, ["a.tar", "b.tar"]) == [["0000", "0001"]] * 2
    assert "the key '0000' occurs more than once" in caplog.text
    path, _ = cached_index(tmp_path, ["a.tar", "b.tar"])
    assert Index(path, str(tmp_path), ("a.tar", "b.tar")).find_all("0001") == [(0, 1), (1, 1)]


def test_indices_of_other_times_go_after_a_month(tmp_path: Path, cache: Path) -> None:
    root = tmp_path / "set"
    for n in (1, 2, 3):
        write_tar(root / "a.tar", numbered(n))
        path, _ = cached_index(root, ["a.tar"])
        if n == 1:
            os.utime(path, (0, 0))
    write_tar(tmp_path / "other" / "a.tar", numbered(1))
    other, _ = cached_index(tmp_path / "other", ["a.tar"])
    os.utime(other, (0, 0))
    write_tar(root / "a.tar", numbered(4))
    cached_index(root, ["a.tar"])
    assert len(list(cache.iterdir())) == 4  # without the first, with the other dataset's


def test_several_processes_make_it_at_once(tmp_path: Path, cache: Path) -> None:
    names = [f"{i}.tar" for i in range(4)]
    for name in names:
        write_tar(tmp_path / "set" / name, numbered(50, name[0]))
    with multiprocessing.get_context("fork").Pool(4) as pool:
        jobs = [pool.apply_async(cached_index, (tmp_path / "set", names)) for _ in range(4)]
        found = [job.get() for job in jobs]
    assert len({path for path, _ in found}) == 1
    assert [path.name for path in cache.iterdir()] == [os.path.basename(found[0][0])]
    assert all_keys(tmp_path / "set", names)[3][49] == "30049"


def test_a_damaged_shard_leaves_no_index(tmp_path: Path, cache: Path) -> None:
    write_tar(tmp_path / "a.tar", numbered(1))
    (tmp_path / "b.tar").write_bytes(b"?" * 5000)
    with pytest.raises(DatasetError, match=r"b\.tar: "):
        cached_index(tmp_path, ["a.tar", "b.tar"])
    assert list(cache.iterdir()) == []


def test_without_a_cache_folder_a_temporary_one_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("ENERGON_FN_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    write_tar(tmp_path / "a.tar", numbered(1))
    path, counts = cached_index(tmp_path, ["a.tar"])
    assert counts == {"a.tar": 1}
    assert Path(path).is_relative_to(tmp_path / "tmp")
    shutil.rmtree(tmp_path / "tmp")


def test_an_index_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"none/i: the index cannot be used: unable to open"):
        write_index(tmp_path / "none" / "i", [])
