from __future__ import annotations

import gzip
import os
import re
import resource
import shutil
import signal
import threading
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from energon_fn.disk import files, index
from energon_fn.disk.index import has_parts
from energon_fn.errors import DatasetError


@pytest.fixture(autouse=True)
def _nothing_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_open_shards", {})
    monkeypatch.setattr(files, "_unpacked", {})


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_read_at_is_the_slice_of_the_file(tmp_path: Path) -> None:
    data = os.urandom(5000)
    for name, content in (("a.tar", data), ("a.tar.gz", gzip.compress(data))):
        (tmp_path / name).write_bytes(content)
        path = str(tmp_path / name)
        assert files.stream_size(path) == len(data)
        for offset, size in ((0, 0), (0, 5000), (4999, 1), (17, 1234), (5000, 0)):
            assert files.read_at(path, offset, size) == data[offset : offset + size]


def test_read_at_goes_on_after_short_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.tar").write_bytes(bytes(range(256)) * 10)
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, size, offset: pread(fd, min(size, 100), offset))
    assert files.read_at(tmp_path / "a.tar", 5, 1000) == (bytes(range(256)) * 10)[5:1005]


def test_reading_past_the_end_names_file_place_and_remedy(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"x" * 100)
    message = r"a\.tar ends before byte 110 .*20 bytes at 90.*prepare"
    with pytest.raises(DatasetError, match=message):
        files.read_at(tmp_path / "a.tar", 90, 20)


@pytest.mark.parametrize("read", [files.read_bytes, files.size_mtime, files.stream_size])
def test_a_missing_file_is_named(tmp_path: Path, read: object) -> None:
    with pytest.raises(DatasetError, match=r"gone\.tar does not exist: check the path"):
        read(tmp_path / "gone.tar")  # type: ignore[operator]


def test_broken_gzip_is_named(tmp_path: Path) -> None:
    whole = gzip.compress(os.urandom(5000))
    for name, data in (("cut.tgz", whole[:3000]), ("no.tgz", b"no gzip at all")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DatasetError, match=f"{name} is not whole gzip data.*again"):
            files.read_at(tmp_path / name, 0, 1)


def test_few_descriptors_are_open_for_many_shards(tmp_path: Path) -> None:
    before = descriptors()
    for i in range(3 * files.MAX_OPEN):
        (tmp_path / f"{i}.tar").write_bytes(str(i).encode())
        assert files.read_at(tmp_path / f"{i}.tar", 0, len(str(i))) == str(i).encode()
        assert descriptors() - before <= files.MAX_OPEN
    assert descriptors() - before == files.MAX_OPEN
    files._open_shards.clear()
    assert descriptors() == before


def test_a_compressed_shard_is_decompressed_once_and_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.tgz").write_bytes(gzip.compress(b"0123456789"))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    assert files.read_at(tmp_path / "a.tgz", 3, 4) == b"3456"
    assert os.listdir(tmp_path / "tmp") == []
    with monkeypatch.context() as patch:
        patch.setattr(gzip, "GzipFile", None)
        assert files.read_at(tmp_path / "a.tgz", 0, 2) == b"01"


def test_decompressed_shards_make_room_for_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.tgz", "b.tgz"):
        (tmp_path / name).write_bytes(gzip.compress(b"0123456789"))
    assert files.read_at(tmp_path / "a.tgz", 3, 4) == b"3456"
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=0))
    assert files.read_at(tmp_path / "b.tgz", 3, 4) == b"3456"
    assert list(files._unpacked) == [str(tmp_path / "b.tgz")]


def test_a_replaced_file_is_noticed_when_its_size_is_asked(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(b"old")
    assert files.read_at(path, 0, 3) == b"old"
    files.write_atomic(path, b"newer")
    assert files.stream_size(path) == 5
    assert files.read_at(path, 0, 5) == b"newer"


def test_a_shard_that_was_replaced_while_it_was_closed_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "MAX_OPEN", 1)
    path, other = tmp_path / "a.tar", tmp_path / "b.tar"
    path.write_bytes(b"old")
    other.write_bytes(b"other")
    for _ in range(2):
        assert (files.read_at(path, 0, 3), files.read_at(other, 0, 3)) == (b"old", b"oth")
    files.write_atomic(path, b"newer")
    for _ in range(2):
        with pytest.raises(DatasetError, match=r"a\.tar changed since it was indexed.*prepare"):
            files.read_at(path, 0, 3)
    assert files.let_go_if_replaced(path)
    assert not files.let_go_if_replaced(path)
    for _ in range(2):
        assert (files.read_at(path, 0, 3), files.read_at(other, 0, 3)) == (b"new", b"oth")


def test_what_was_open_once_is_remembered_of_so_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_stamps", {})
    monkeypatch.setattr(files, "_KEPT_STAMPS", 3)
    for i in range(5):
        (tmp_path / f"{i}.tar").write_bytes(b"0123")
        files.read_at(tmp_path / f"{i}.tar", 0, 1)
    assert list(files._stamps) == [str(tmp_path / f"{i}.tar") for i in (2, 3, 4)]


def test_too_many_open_files_have_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "_connections", {})  # or else one that is open would be closed
    names = ("a.tar", "b.tgz", "index")
    for name in names:
        (tmp_path / name).write_bytes(gzip.compress(b"0123"))
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    held, told = [], []
    resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors() + 50, before[1]))
    try:
        with suppress(OSError):
            while True:
                held.append(os.open(os.devnull, os.O_RDONLY))
        for name in names:
            with pytest.raises(DatasetError) as found:
                (has_parts if name == "index" else files.stream_size)(tmp_path / name)
            told.append(str(found.value))
        os.close(held.pop())  # room for the shard, and none for what is decompressed
        with pytest.raises(DatasetError) as found:
            files.stream_size(tmp_path / "b.tgz")
        told.append(str(found.value))
    finally:
        for fd in held:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    for name, message in zip((*names, "b.tgz"), told, strict=True):
        assert re.search(rf"{name} cannot be opened: this process has as many .*ulimit -n", message)


def test_others_read_and_fork_while_a_shard_is_decompressed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.tgz").write_bytes(gzip.compress(b"0123456789"))
    (tmp_path / "b.tar").write_bytes(b"0123456789")
    copy, ends = shutil.copyfileobj, list[object]()

    def others() -> None:
        ends.append(files.read_at(tmp_path / "b.tar", 1, 2))
        child = os.fork()
        if not child:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends one that hangs
            signal.alarm(5)
            monkeypatch.setattr(shutil, "copyfileobj", copy)
            os._exit(files.read_at(tmp_path / "a.tgz", 3, 4) != b"3456")
        ends.append(os.waitpid(child, 0)[1])

    def slow(*args: Any) -> None:
        thread = threading.Thread(target=others, daemon=True)
        thread.start()
        thread.join(20)
        copy(*args)

    monkeypatch.setattr(shutil, "copyfileobj", slow)
    assert files.read_at(tmp_path / "a.tgz", 3, 4) == b"3456"
    assert ends == [b"12", 0]
    assert files._opening == {}


def test_many_threads_read_while_shards_are_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "MAX_OPEN", 2)
    paths = [tmp_path / f"{i}.tar" for i in range(8)]
    for i, path in enumerate(paths):
        path.write_bytes(bytes([i]) * 1000)
    wrong: list[object] = []

    def read(offset: int) -> None:
        try:
            for n in range(400):
                i = (n * 7 + offset) % 8
                if files.read_at(paths[i], offset, 100) != bytes([i]) * 100:
                    wrong.append((i, offset))
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=read, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_fork_reads_on(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"0123456789")
    assert files.read_at(tmp_path / "a.tar", 0, 1) == b"0"
    child = os.fork()
    if not child:
        os._exit(files.read_at(tmp_path / "a.tar", 1, 4) != b"1234")
    assert files.read_at(tmp_path / "a.tar", 5, 4) == b"5678"
    assert os.waitpid(child, 0)[1] == 0


def test_write_atomic_keeps_the_old_file_when_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a"
    files.write_atomic(path, b"old")

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DatasetError, match="/a cannot be used: No space left"):
        files.write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


def test_list_tars_goes_folder_by_folder_like_megatron_energon(tmp_path: Path) -> None:
    names = ["S.tar", "f.tar.gz", "s10.tar", "s2.tar", "sub/a.tar", "sub-a/a.tgz", "sub.tar"]
    others = [".hidden/a.tar", ".h.tar", "a.tar.idx", "sub/a.txt"]
    for name in names + others:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert files.list_tars(tmp_path) == names


def test_list_tars_follows_links_but_not_in_circles(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.tar").touch()
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "set")
    assert files.list_tars(tmp_path / "set") == ["link/a.tar"]


def test_all_links_to_one_folder_are_followed(tmp_path: Path) -> None:
    (tmp_path / "set" / "b").mkdir(parents=True)
    (tmp_path / "set" / "b" / "1.tar").touch()
    for name in ("a", "c"):
        (tmp_path / "set" / name).symlink_to("b")
    names = ["a/1.tar", "b/1.tar", "c/1.tar"]
    assert files.list_tars(tmp_path / "set") == names
    assert files.list_files(tmp_path / "set", ".nv-meta") == names


def test_a_link_to_no_shard_is_listed_so_that_opening_it_tells(tmp_path: Path) -> None:
    (tmp_path / "a.tar").symlink_to("gone.tar")
    assert files.list_tars(tmp_path) == ["a.tar"]


def test_list_tars_of_no_folder(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="none does not exist"):
        files.list_tars(tmp_path / "none")


def test_expand_orders_braces_as_written_and_globs_by_name(tmp_path: Path) -> None:
    for name in ("x_08.tar", "x_09.tar", "x_10.tar", "y.tar", "y.tar.idx", "z/y.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()

    def names(pattern: str) -> list[str]:
        found = files.expand(f"{tmp_path}/{pattern}")
        return [os.path.relpath(name, tmp_path) for name in found]

    assert names("x_{10..08}.tar") == ["x_10.tar", "x_09.tar", "x_08.tar"]
    assert names("{y,x_*}.tar") == ["y.tar", "x_08.tar", "x_09.tar", "x_10.tar"]
    assert names("**/y*") == ["y.tar", "z/y.tar"]
    assert names("{y,y*}.tar") == ["y.tar"]
    assert names("y.tar") == ["y.tar"]


def test_expand_takes_a_name_that_looks_like_a_pattern(tmp_path: Path) -> None:
    (tmp_path / "a[1]{x}.tar").touch()
    assert files.expand(tmp_path / "a[1]{x}.tar") == [str(tmp_path / "a[1]{x}.tar")]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("x_{0..2}.tar", "no shard matches '.*x_1.tar' .from '.*x_{0..2}.tar'.: check the path"),
        ("w*.tar", "no shard matches '.*w.*.tar': check the path"),
        ("a.txt", "a.txt is not a shard: those end in .tar, .tar.gz, .tgz"),
        ("x_{0", "braces do not match in '.*x_{0'"),
    ],
)
def test_expand_names_what_is_wrong(tmp_path: Path, pattern: str, message: str) -> None:
    for name in ("x_0.tar", "a.txt"):
        (tmp_path / name).touch()
    with pytest.raises(DatasetError, match=message):
        files.expand(tmp_path / pattern)


def test_the_cache_folder_is_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("ENERGON_FN_CACHE", str(tmp_path / "own"))
    assert files.cache_folder() == tmp_path / "own"
    monkeypatch.delenv("ENERGON_FN_CACHE")
    assert files.cache_folder() == tmp_path / "xdg" / "energon_fn"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert files.cache_folder() == tmp_path / "home" / ".cache" / "energon_fn"
    assert files.cache_folder().is_dir()


def test_a_cache_folder_that_cannot_be_had_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("ENERGON_FN_CACHE", str(tmp_path / "file" / "folder"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    folder = files.cache_folder()
    assert folder.parent == tmp_path / "tmp"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert files.cache_folder() == folder
    folder.chmod(0o777)  # others may have written here
    assert files.cache_folder() != folder
