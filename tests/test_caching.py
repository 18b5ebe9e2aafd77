"""Lazies give what the store has, whatever happens; the disk is never too full, and clean after."""

from __future__ import annotations

import fcntl
import gc
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toolz import pipe

from energon_fn import CrudeSample, SkipSample, SourceInfo, TextSample, basic_sample_keys
from energon_fn.caching import CachePool, FileStoreCachePool, Lazy, NoCachePool, remove_leftovers
from energon_fn.decoding import decoder
from energon_fn.errors import DatasetError, SampleError
from energon_fn.processes.workers import Pool, PoolOptions
from energon_fn.stages import Cooker, batch, cook, cooker, pack
from energon_fn.stores import (
    DecodeFileStore,
    FileStore,
    PrimaryFileStore,
    SystemFileStore,
    cooker_arguments,
)

GIB = 2**30


def content(key: str) -> bytes:
    """Between 0 and 99 bytes that depend on the name."""
    chance = random.Random(key)
    return chance.randbytes(chance.randrange(100))


@dataclass(frozen=True, eq=False)
class Store(FileStore):
    """Has a file of any name, but not those that begin with "no"; waits for ``gate`` in threads."""

    gate: threading.Event = field(default_factory=threading.Event)
    reads: list[tuple[str, bool]] = field(default_factory=list)
    """Names, and whether a thread read them."""

    def read(self, key: str) -> tuple[bytes, SourceInfo]:
        in_thread = threading.current_thread() is not threading.main_thread()
        self.reads.append((key, in_thread))
        if in_thread:
            assert self.gate.wait(60)
        if key.startswith("no"):
            raise {"no skip": SkipSample, "no luck": ZeroDivisionError}.get(key, SampleError)(key)
        return content(key), SourceInfo("/store", key, "0.tar", (key,))

    def decode(self, key: str, data: bytes) -> Any:
        if key.startswith("broken"):
            raise ValueError(key)
        return key, data

    def get_path(self) -> str:
        return "/store"


def opened() -> Store:
    store = Store()
    store.gate.set()
    return store


@pytest.fixture
def parent(tmp_path: Path) -> Iterator[Path]:
    """A folder for pools that is clean in the end."""
    yield tmp_path / "cache"
    assert list((tmp_path / "cache").glob("*")) == []


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder with 20 files."""
    folder = tmp_path / "data"
    folder.mkdir()
    for n in range(20):
        (folder / str(n)).write_bytes(bytes([n] * 1000))
    return folder


def limited(parent: Path, size: float = GIB, **limits: Any) -> FileStoreCachePool:
    return FileStoreCachePool(parent_cache_dir=parent, max_cache_size_gbytes=size / GIB, **limits)


def files(parent: Path) -> list[int]:
    """Sizes of all cached files."""
    found = []
    for path in parent.glob("*/*"):
        if path.name != "lock":
            try:
                found.append(path.stat().st_size)
            except FileNotFoundError:
                continue
    return found


def eventually(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.002)


# --------------------------------------------------------------------------------- what lazies give


@pytest.fixture(params=["none", "files", "full"])
def pool(request: pytest.FixtureRequest, parent: Path) -> Iterator[CachePool]:
    pools: dict[str, CachePool] = {
        "none": NoCachePool(),
        "files": limited(parent, num_workers=2),
        "full": limited(parent, 1),  # nothing fits in
    }
    made = pools[request.param]
    yield made
    made.close()


def test_a_lazy_gives_what_the_store_gives(pool: CachePool) -> None:
    store = opened()
    lazies = {name: pool.get_lazy(store, name) for name in map(str, range(50))}
    for name, lazy in lazies.items():
        sample: dict[str, Any] = {"__key__": "me"}
        value = lazy.get(sample)
        assert value == store.get(name) == pool.get(store, name)
        assert lazy.get() is value
        text = TextSample(__key__="other", text="")
        assert lazy.get(text) is value
        assert [s.file_names for s in sample["__sources__"]] == [(name,)]
        assert text.__sources__ == sample["__sources__"]


def test_errors_are_raised_where_it_is_got(pool: CachePool) -> None:
    store = opened()
    for name, error in (
        ("no luck", ZeroDivisionError),
        ("no file", SampleError),
        ("no skip", SkipSample),
        ("broken", ValueError),
    ):
        lazies = [pool.get_lazy(store, name), pool.get_lazy(store, name)]
        for lazy in [*lazies, *lazies]:  # also when it is tried again
            with pytest.raises(error, match=name):
                lazy.get()
    assert pool.get_lazy(store, "7").get() == ("7", content("7"))  # the threads go on


def test_errors_of_the_threads_are_raised_where_it_is_got(parent: Path) -> None:
    pool, store = limited(parent, num_workers=1), opened()
    failing = {"no luck": ZeroDivisionError, "no file": SampleError, "no skip": SkipSample}
    lazies = {name: pool.get_lazy(store, name) for name in [*failing, "7"]}
    eventually(lambda: store.reads == [(name, True) for name in [*failing, "7"]])
    for name, error in failing.items():
        with pytest.raises(error, match=name):
            lazies[name].get()
    assert lazies["7"].get() == ("7", content("7"))
    pool.close()


def test_a_real_store_and_its_sources(pool: CachePool, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "7.json").write_text("[7]")
    (tmp_path / "data" / "broken.json").write_text("[7")
    store = PrimaryFileStore(
        DecodeFileStore(SystemFileStore(tmp_path / "data"), decoder=decoder()), "7"
    )
    sample: dict[str, Any] = {}
    assert pool.get_lazy(store, ".json").get(sample) == [7]
    assert sample["__sources__"][0].file_names == ("7.json",)
    with pytest.raises(SampleError, match=r"cannot decode part 'json'.*broken\.json"):
        pool.get_lazy(store, "broken.json").get()
    with pytest.raises(SampleError, match=r"has no file 'nothing\.json'"):
        pool.get_lazy(store, "nothing.json").get()


@dataclass
class Clip:
    frames: torch.Tensor
    name: str


VALUES: list[Any] = [
    b"", b"bytes", bytes(10**6), "text", None, 7, [1, {"a": "b"}],
    torch.arange(12).view(3, 4), torch.zeros(0), torch.arange(12).view(3, 4).T,
    np.arange(6.0).reshape(2, 3), {"image": torch.ones(3, 5), "text": "a rose", "raw": b"?"},
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=lambda value: repr(value)[:30])
def test_what_is_put_away_comes_back(pool: CachePool, value: Any) -> None:
    lazy = pool.to_cache(value, "it")
    sample: dict[str, Any] = {}
    assert repr(lazy.get(sample)) == repr(value)
    assert type(lazy.get()) is type(value)
    assert lazy.get() is lazy.get()
    assert sample == {}  # it was read for the sample already


def test_what_comes_back_is_of_its_type_and_may_be_changed(pool: CachePool) -> None:
    clip = pool.to_cache(Clip(torch.zeros(2, 3), "clip"), "it").get()
    assert isinstance(clip, Clip)
    clip.frames += 1
    assert clip.name == "clip"
    assert clip.frames.sum() == 6
    assert pool.to_cache(np.arange(3), "it").get().flags.writeable


def test_what_does_not_pickle_stays_in_memory(pool: CachePool) -> None:
    def function() -> None: ...

    assert pool.to_cache(function, "it").get() is function


# --------------------------------------------------------------------------- reading ahead, sharing


def test_files_are_fetched_by_threads_and_read_once(parent: Path) -> None:
    pool, store = limited(parent), opened()
    names = list(map(str, range(100)))
    lazies = [pool.get_lazy(store, name) for name in names]
    sizes = sorted(len(content(name)) for name in names)
    eventually(lambda: sorted(files(parent)) == sizes)
    assert [lazy.get() for lazy in lazies] == [(name, content(name)) for name in names]
    assert sorted(store.reads) == sorted((name, True) for name in names)
    eventually(lambda: files(parent) == [])
    pool.close()


def test_the_disk_has_the_bytes_as_they_were_read(parent: Path) -> None:
    pool, image = limited(parent), torch.arange(99.0)
    first = pool.to_cache(b"a rose", "bytes")
    second = pool.to_cache({"image": image, "text": "a lily"}, "dict")
    (folder,) = parent.iterdir()
    on_disk = [path.read_bytes() for path in sorted(folder.iterdir()) if path.name != "lock"]
    assert on_disk == [b"a rose", image.numpy().tobytes()]
    assert first.get() == b"a rose"
    assert second.get()["text"] == "a lily"
    pool.close()


def test_who_gets_what_is_not_there_yet_reads_it(parent: Path) -> None:
    pool, store = limited(parent, num_workers=1), Store()
    first, second, third = (pool.get_lazy(store, name) for name in "123")
    eventually(lambda: store.reads == [("1", True)])
    assert second.get() == ("2", content("2"))  # while the only thread is busy
    store.gate.set()
    assert first.get() == ("1", content("1"))  # waits for the thread
    assert third.get() == ("3", content("3"))
    reads = Counter(name for name, _ in store.reads)
    assert reads["1"] == reads["2"] == 1
    pool.close()


def test_what_is_being_read_by_who_got_it_is_not_fetched(parent: Path) -> None:
    class Slow(Store):
        def read(self, key: str) -> tuple[bytes, SourceInfo]:
            if threading.current_thread() is threading.main_thread():
                self.gate.set()
                eventually(lambda: ("3", True) in self.reads)  # the thread has gone past this one
            return super().read(key)

    pool, store = limited(parent, num_workers=1), Slow()
    lazies = [pool.get_lazy(store, "1")]
    eventually(lambda: store.reads)
    lazies += [pool.get_lazy(store, name) for name in "23"]
    assert lazies[1].get() == ("2", content("2"))
    assert store.reads == [("1", True), ("3", True), ("2", False)]
    lazies.clear()
    pool.close()


def test_what_others_wait_for_is_fetched_for_them(parent: Path) -> None:
    pool, store = limited(parent, num_workers=1), Store()
    blocked = pool.get_lazy(store, "blocks")
    eventually(lambda: store.reads)
    first, second = pool.get_lazy(store, "same"), pool.get_lazy(store, "same")
    assert first.get() == ("same", content("same"))
    store.gate.set()
    eventually(lambda: ("same", True) in store.reads)
    assert second.get() == ("same", content("same"))
    assert store.reads == [("blocks", True), ("same", False), ("same", True)]
    del blocked
    pool.close()


def test_what_several_ask_for_is_fetched_once(parent: Path) -> None:
    pool, store = limited(parent, num_workers=1), Store()
    blocked = pool.get_lazy(store, "blocks")
    eventually(lambda: store.reads)
    lazies = [pool.get_lazy(store, "same") for _ in range(5)]
    other = pool.get_lazy(opened(), "same")
    store.gate.set()
    eventually(lambda: len(files(parent)) == 3)
    assert [lazy.get() for lazy in lazies] == [("same", content("same"))] * 5
    assert store.reads == [("blocks", True), ("same", True)]
    del blocked, other
    eventually(lambda: files(parent) == [])
    pool.close()


def test_lazies_that_nobody_gets_leave_nothing(parent: Path) -> None:
    pool, store = limited(parent, 300, num_workers=2), opened()
    for _ in range(20):  # as when a buffer is filled again and again
        samples = [{"image": pool.get_lazy(store, str(n))} for n in range(50)]
        circle: list[Any] = [samples]
        circle.append(circle)
    del samples, circle
    gc.collect()
    eventually(lambda: files(parent) == [])
    assert pool.get_lazy(store, "7").get() == ("7", content("7"))
    pool.close()


# ------------------------------------------------------------------------------------------- limits


def watch(parent: Path, limit: int, most: int) -> tuple[Callable[[], None], list[list[int]]]:
    """Look at the disk all the time: whether there is ever more than is allowed."""
    wrong: list[list[int]] = []
    stop = threading.Event()

    def look() -> None:
        while not stop.is_set():
            sizes = files(parent)
            if sum(sizes) > limit or len(sizes) > most:
                wrong.append(sizes)

    thread = threading.Thread(target=look)
    thread.start()

    def end() -> None:
        stop.set()
        thread.join()

    return end, wrong


@pytest.mark.parametrize(("limit", "most"), [(250, 10**6), (10**6, 4), (250, 4)])
def test_the_limits_hold_under_load(parent: Path, limit: int, most: int) -> None:
    pool, store = limited(parent, limit, max_cache_count=most, num_workers=4), opened()
    end, wrong = watch(parent, limit, most)
    try:
        for start in range(0, 1000, 100):  # ten packing buffers, each larger than the cache
            buffer = [pool.get_lazy(store, str(n)) for n in range(start, start + 100)]
            chosen = random.Random(start).sample(range(100), 60)
            for n in chosen:
                assert buffer[n].get() == (str(start + n), content(str(start + n)))
            kept = pool.to_cache(b"x" * 40, "kept")
            assert kept.get() == b"x" * 40
    finally:
        end()
    assert wrong == []
    assert any(in_thread for _, in_thread in store.reads)
    pool.close()


def test_room_that_becomes_free_is_used(parent: Path) -> None:
    names = [str(n) for n in range(40) if len(content(str(n))) > 30]
    size = sum(len(content(name)) for name in names[:3])
    pool, store = limited(parent, size, num_workers=1), opened()
    lazies = [pool.get_lazy(store, name) for name in names[:6]]
    eventually(lambda: len(files(parent)) == 3)
    for n in range(3):
        assert lazies[n].get() == (names[n], content(names[n]))
    eventually(lambda: len(store.reads) >= 5 and files(parent))
    assert [lazy.get()[0] for lazy in lazies] == names[:6]
    assert Counter(name for name, _ in store.reads).most_common(1)[0][1] == 1  # none read twice
    pool.close()


@dataclass(frozen=True, eq=False)
class Zeros(FileStore):
    """Files of as many bytes as their names say."""

    reads: list[str] = field(default_factory=list)

    def read(self, key: str) -> tuple[bytes, SourceInfo]:
        self.reads.append(key)
        return bytes(int(key)), SourceInfo("/zeros", key, "", (key,))

    def get_path(self) -> str:
        return "/zeros"


def test_what_never_fits_is_not_waited_for(parent: Path) -> None:
    pool, store = limited(parent, 100, num_workers=1), Zeros()
    large, small = pool.get_lazy(store, "101"), pool.get_lazy(store, "100")
    eventually(lambda: files(parent) == [100])
    assert large.get() == bytes(101)
    assert small.get() == bytes(100)
    assert store.reads == ["101", "100", "101"]
    pool.close()


def test_what_nobody_wants_any_more_is_not_waited_for(parent: Path) -> None:
    pool, store = limited(parent, 100, num_workers=1), Zeros()
    held = [pool.get_lazy(store, "60"), pool.get_lazy(store, "61"), pool.get_lazy(store, "30")]
    eventually(lambda: store.reads == ["60", "61"] and files(parent) == [60])
    del held[1]  # for which there is no room, while there is for the next one
    eventually(lambda: sorted(files(parent)) == [30, 60])
    assert [lazy.get() for lazy in held] == [bytes(60), bytes(30)]
    assert store.reads == ["60", "61", "30"]
    pool.close()


def test_what_waits_for_room_can_be_had(parent: Path) -> None:
    pool, store = limited(parent, 100, num_workers=1), Zeros()
    held = [pool.get_lazy(store, name) for name in ("60", "61", "30")]
    eventually(lambda: store.reads == ["60", "61"] and files(parent) == [60])
    assert held[1].get() == bytes(61)
    eventually(lambda: sorted(files(parent)) == [30, 60])
    assert store.reads == ["60", "61", "30"]  # it was in memory, and is not read again
    held.clear()
    pool.close()


def test_what_is_put_away_without_room_stays_in_memory(
    parent: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pool = limited(parent, 10)
    lazies = [pool.to_cache(bytes([n] * 4), str(n)) for n in range(5)]
    assert files(parent) == [4, 4]
    assert [lazy.get() for lazy in lazies] == [bytes([n] * 4) for n in range(5)]
    assert caplog.text.count("there is no room for '2' (4 bytes), which stays in memory") == 1
    assert len(caplog.records) == 1  # told once
    assert pool.to_cache(b"1234567890", "again").get() == b"1234567890"
    pool.close()


steps = st.lists(
    st.tuples(st.sampled_from(["lazy", "lazy", "keep", "get", "drop"]), st.integers(0, 7)),
    max_size=40,
)


@settings(max_examples=60)
@given(steps, st.sampled_from([0.5, 60, 150, 10**6]), st.integers(1, 4), st.integers(1, 3))
def test_any_order_of_steps_gives_the_bytes_within_the_limits(
    tmp_path_factory: pytest.TempPathFactory,
    steps: list[tuple[str, int]],
    limit: float,
    most: int,
    threads: int,
) -> None:
    parent = tmp_path_factory.mktemp("cache")
    pool = limited(parent, limit, max_cache_count=most, num_workers=threads)
    store, held = opened(), list[tuple[Any, Lazy[Any]]]()
    for what, n in steps:
        if what == "lazy":
            held.append(((str(n), content(str(n))), pool.get_lazy(store, str(n))))
        elif what == "keep":
            held.append((content(str(n)), pool.to_cache(content(str(n)), str(n))))
        elif held:
            expected, lazy = held[n % len(held)]
            if what == "get":
                assert lazy.get() == expected
            else:
                del held[n % len(held)]
                del lazy
        sizes = files(parent)
        assert sum(sizes) <= limit
        assert len(sizes) <= most
    for expected, lazy in held:
        assert lazy.get() == expected
    eventually(lambda: files(parent) == [])
    pool.close()
    assert list(parent.iterdir()) == []


# ------------------------------------------------------------------------------- the end of a pool


def test_a_pool_that_goes_leaves_nothing(parent: Path) -> None:
    pool, store = limited(parent), opened()
    lazies = [pool.get_lazy(store, str(n)) for n in range(20)]
    eventually(lambda: len(files(parent)) == 20)
    del pool
    assert len(files(parent)) == 20  # the lazies keep it
    del lazies
    gc.collect()
    assert list(parent.iterdir()) == []


def test_closing_while_threads_write_leaves_nothing(parent: Path) -> None:
    for _ in range(30):
        pool, store = limited(parent, num_workers=4), opened()
        lazies = [pool.get_lazy(store, str(n)) for n in range(30)]
        pool.close()
        assert list(parent.iterdir()) == []
        assert [lazy.get() for lazy in lazies] == [store.get(str(n)) for n in range(30)]
    eventually(lambda: not [t for t in threading.enumerate() if t.name == "energon_fn cache"])
    assert list(parent.iterdir()) == []


def test_a_pool_that_was_closed_begins_anew(parent: Path) -> None:
    pool, store = limited(parent), opened()
    old = pool.to_cache(b"old", "old.txt")
    pool.close()
    pool.close()
    new = pool.get_lazy(store, "7")
    with pytest.raises(DatasetError, match=r"'old\.txt'.*is gone: the pool was closed"):
        old.get()
    assert new.get() == ("7", content("7"))
    pool.close()


def test_a_folder_that_somebody_removes_does_no_harm(
    parent: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pool, store = limited(parent, 1000), opened()
    lazies = [pool.get_lazy(store, str(n)) for n in range(10)]
    eventually(lambda: len(files(parent)) == 10)
    (folder,) = parent.iterdir()
    shutil.rmtree(folder)
    lazies += [pool.get_lazy(store, str(n)) for n in range(10, 30)]
    eventually(lambda: len(store.reads) == 30)
    assert pool._own is not None
    items = pool._own.items
    eventually(lambda: all(item.data is None for item in items.values()))  # no memory leaks
    assert [lazy.get() for lazy in lazies] == [(str(n), content(str(n))) for n in range(30)]
    assert pool.to_cache(b"a rose", "it").get() == b"a rose"
    assert "cannot be written: No such file or directory. Going on without it" in caplog.text
    folder.mkdir()
    kept = pool.to_cache(bytes(1000), "it")
    assert files(parent) == [1000]  # nor does room
    assert kept.get() == bytes(1000)
    pool.close()


def test_what_is_written_while_the_folder_is_removed_goes_too(
    parent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    removed = list[str]()

    def slow(folder: str, ignore_errors: bool) -> None:
        remove(folder, ignore_errors=True)
        if not removed:  # a thread was just about to write
            Path(folder).mkdir()
            Path(folder, "late").write_bytes(b"?")
        removed.append(folder)

    remove = shutil.rmtree
    pool = limited(parent)
    pool.to_cache(b"a rose", "it")
    monkeypatch.setattr(shutil, "rmtree", slow)
    del pool
    gc.collect()
    assert list(parent.iterdir()) == []


def test_a_new_folder_that_another_takes_for_a_leftover_is_left_to_it(
    parent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = list[Path]()

    def late(file: int, how: int) -> None:
        if not taken:  # another process looked just between making the folder and this
            (folder,) = parent.iterdir()
            shutil.rmtree(folder)
            taken.append(folder)
        lock(file, how)

    lock = fcntl.flock
    monkeypatch.setattr(fcntl, "flock", late)
    pool = limited(parent)
    kept = pool.to_cache(b"a rose", "it")
    (folder,) = parent.iterdir()
    assert [folder] != taken
    assert kept.get() == b"a rose"
    pool.close()


# Processes that make pools with files in them, and end in all the ways that are no murder.
SCRIPT = """
import os, signal, sys, time
from energon_fn.caching import FileStoreCachePool
from energon_fn.stores import SystemFileStore

children = {}
for how in ("end", "fail", "interrupt"):
    child = os.fork()
    if not child:
        break
    children[how] = child
else:
    for how, child in children.items():
        print(how, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    sys.exit()

pool = FileStoreCachePool(parent_cache_dir=sys.argv[1])
lazies = [pool.get_lazy(SystemFileStore(sys.argv[2]), str(n)) for n in range(20)]
kept = pool.to_cache(b"a rose", "it")
while len(os.listdir(pool._own.folder)) < 22:  # with the lock
    time.sleep(0.01)
if how == "fail":
    raise ValueError("an error of the user's")
if how == "interrupt":
    os.kill(os.getpid(), signal.SIGINT)
"""


def test_processes_that_end_leave_nothing(parent: Path, data: Path) -> None:
    ran = subprocess.run([sys.executable, "-c", SCRIPT, str(parent), str(data)],
                         capture_output=True, text=True, check=False)  # fmt: skip
    assert ran.stdout.split() == ["end", "0", "fail", "1", "interrupt", str(-signal.SIGINT)], ran
    assert "Exception ignored" not in ran.stderr
    assert list(parent.iterdir()) == []


def forked(function: Callable[[], object]) -> int:
    """Run the function in a process of its own, which ends without any clean-up."""
    child = os.fork()
    if not child:
        status = 1
        try:
            function()
            gc.collect()
            status = 0
        finally:
            os._exit(status)
    return child


def status_of(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_what_a_killed_process_leaves_is_removed_by_the_next_one(parent: Path, data: Path) -> None:
    def use_pool() -> None:
        pool = limited(parent)
        lazies = [pool.get_lazy(SystemFileStore(data), str(n)) for n in range(20)]
        time.sleep(100)
        assert lazies

    alive, *killed = [forked(use_pool) for _ in range(3)]
    eventually(lambda: len(files(parent)) == 60)
    for child in killed:
        os.kill(child, signal.SIGKILL)
        assert status_of(child) == -signal.SIGKILL
    assert len(list(parent.iterdir())) == 3
    pool = limited(parent)
    assert pool.to_cache(b"a rose", "it").get() == b"a rose"
    assert len(files(parent)) == 20  # of the one that lives
    os.kill(alive, signal.SIGKILL)
    assert status_of(alive) == -signal.SIGKILL
    pool.close()  # removes what is left by others, too
    assert list(parent.iterdir()) == []


def test_pools_that_start_together_let_each_other_be(parent: Path) -> None:
    """No live one loses its folder to another's clean-up, however they come and go."""

    def come_and_go() -> None:
        for _ in range(40):
            pool = limited(parent, num_workers=1)
            kept = pool.to_cache(b"a rose", "it")
            assert kept.get() == b"a rose"
            pool.close()

    children = [forked(come_and_go) for _ in range(4)]
    assert [status_of(child) for child in children] == [0] * 4
    assert list(parent.iterdir()) == []


def test_other_folders_are_let_be(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "energon_fn_pool_file").write_text("a file")
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "mine").write_text("mine")
    (tmp_path / "energon_fn_pool_link").symlink_to(tmp_path / "target")
    (tmp_path / "energon_fn_pool_evil").mkdir()
    (tmp_path / "energon_fn_pool_evil" / "lock").symlink_to(tmp_path / "target" / "new")
    limited(tmp_path).close()
    remove_leftovers(tmp_path)
    assert not (tmp_path / "target" / "new").exists()
    assert (tmp_path / "mine").exists()
    assert (tmp_path / "target" / "mine").exists()
    assert (tmp_path / "energon_fn_pool_file").exists()


def test_a_parent_that_is_a_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DatasetError, match=r"the cache pool cannot use .*/file.*parent_cache_dir"):
        limited(tmp_path / "file").to_cache(b"1", "1")


# --------------------------------------------------------------------------------- other processes


def test_a_pool_is_its_arguments(parent: Path) -> None:
    pool = FileStoreCachePool(
        parent_cache_dir=str(parent), num_workers=3, max_cache_size_gbytes=0.5, max_cache_count=7
    )
    assert not parent.exists()  # nothing is made before it is needed
    pool.to_cache(b"1", "1")
    data = pickle.dumps(pool)
    assert len(data) < 500
    again = pickle.loads(data)
    assert repr(again) == repr(pool)
    assert repr(pool) == (
        f"FileStoreCachePool(parent_cache_dir={str(parent)!r}, num_workers=3, "
        "max_cache_size_gbytes=0.5, max_cache_count=7)"
    )
    again.to_cache(b"2", "2")
    assert len(list(parent.iterdir())) == 2
    again.close()
    pool.close()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"num_workers": 0}, "num_workers is 0"),
        ({"max_cache_size_gbytes": -1}, "max_cache_size_gbytes is -1"),
        ({"max_cache_count": 0}, "max_cache_count is 0"),
        ({"method": "pickle"}, "method is 'pickle'; there is only 'raw'"),
    ],
)
def test_wrong_arguments_are_told_at_once(arguments: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        FileStoreCachePool(**arguments)


def test_a_lazy_pickles_as_its_value(pool: CachePool) -> None:
    store = opened()
    lazy = pool.get_lazy(store, "7")
    copy, kept = pickle.loads(pickle.dumps((lazy, pool.to_cache(b"a rose", "rose.txt"))))
    del lazy
    sample: dict[str, Any] = {}
    assert copy.get(sample) == ("7", content("7"))
    assert sample["__sources__"][0].file_names == ("7",)
    assert (kept.get(), kept.fname) == (b"a rose", "rose.txt")
    with pytest.raises(ZeroDivisionError):
        pickle.dumps(pool.get_lazy(store, "no luck"))


def test_a_fork_has_a_pool_of_its_own(parent: Path) -> None:
    pool, store = limited(parent, num_workers=1), Store()
    fetching, kept = pool.get_lazy(store, "1"), pool.to_cache(b"a rose", "it")
    eventually(lambda: store.reads)
    held = [fetching, kept]
    del fetching, kept

    def child() -> None:
        # The thread that fetches it is not here, and its locks are as they were.
        assert held[0].get() == ("1", content("1"))
        assert held[1].get() == b"a rose"
        held.clear()  # frees nothing of the parent's
        store.gate.set()
        mine = pool.get_lazy(store, "2")
        eventually(lambda: len(list(parent.iterdir())) == 2 and ("2", True) in store.reads)
        assert mine.get() == ("2", content("2"))
        pool.close()

    assert status_of(forked(child)) == 0
    assert held[1].get() == b"a rose"
    store.gate.set()
    assert held[0].get() == ("1", content("1"))
    pool.close()


def stream(pool: CachePool, data: str, lane: int, epoch: int) -> Any:
    """Endless batches with lazies in them, some of which are got."""
    store = SystemFileStore(data)

    def run(state: Any = None) -> Iterator[Any]:
        n = state or 0
        while True:
            lazies = [pool.get_lazy(store, str((n + i) % 20)) for i in range(5)]
            first = lazies[0].get()
            yield {"number": n, "first": first, "lazy": lazies[1]}, n + 1
            n += 1

    return run


def test_workers_have_pools_and_leave_nothing(parent: Path, data: Path) -> None:
    cache = limited(parent)
    workers = Pool(partial(stream, cache, str(data)), 2, PoolOptions())
    workers.start(0, {0: None, 1: None})
    lanes: dict[int, Any] = {0: None, 1: None}
    for turn in range(12):
        delivery = workers.receive()
        number = delivery.batch["number"]
        assert number == turn // 2
        assert delivery.batch["first"] == bytes([number % 20] * 1000)
        assert delivery.batch["lazy"].get() == bytes([(number + 1) % 20] * 1000)
        lanes.pop(delivery.lane)
        lanes[delivery.lane] = delivery.state
        workers._lanes = lanes
        if turn == 4:
            workers._workers[0].process.kill()
    assert parent.exists()
    workers.close()
    cache.close()
    assert list(parent.iterdir()) == []


# ------------------------------------------------------------------------------------ in a pipeline


@cooker(need_cache=True)
def cook_lazily(sample: Any, images: FileStore, cache: CachePool) -> TextSample:
    return TextSample(
        **basic_sample_keys(sample),
        text=cache.get_lazy(images, sample["txt"]),  # type: ignore[arg-type]
    )


def load(sample: Any) -> TextSample:
    return TextSample.derive_from(sample, text=sample.text.get(sample)[1].hex())


def by_three(samples: list[TextSample]) -> list[list[TextSample]]:
    chosen = [sample for sample in samples if int(sample.__key__) % 4]
    return [chosen[i : i + 3] for i in range(0, len(chosen), 3)]


def test_packing_reads_what_is_selected(parent: Path) -> None:
    crude = [CrudeSample(__key__=str(n), txt=f"{n % 30}.jpg") for n in range(200)]
    results = []
    pools: list[CachePool] = [NoCachePool(), limited(parent, 500, num_workers=3), limited(parent)]
    for cache in pools:
        store = opened()
        given = cooker_arguments(cook_lazily, {"images": store}, None, cache)({})
        packed = pipe(
            crude,
            cook([Cooker(partial(cook_lazily, **given))]),
            pack(by_three, list, buffer_size=40, postencode=load),
            batch(2, list),
            list,
        )
        results.append(
            [(s.__key__, s.text, s.__sources__) for group in packed for one in group for s in one]
        )
        eventually(lambda: files(parent) == [])
        cache.close()
    assert results[0] == results[1] == results[2]
    assert len(results[0]) == 150
    assert results[0][0][:2] == ("1", content("1.jpg").hex())
