"""Shards written again so that no two have the same keys: nothing else of them changes."""

from __future__ import annotations

import io
import logging
import os
import stat
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import write_tar
from hypothesis import given
from hypothesis import strategies as st
from processes import run

from energon_fn.disk import prepare
from energon_fn.disk.duplicates import put_in_folder
from energon_fn.disk.index import Index
from energon_fn.disk.metadata import read_info
from energon_fn.disk.prepare import prepare_dataset
from energon_fn.disk.tars import index_shard
from energon_fn.errors import DatasetError

RATIO = [("train", 1)]
Member = tuple[Any, ...]


def members(path: Path) -> list[Member]:
    """Everything in a tar, in order."""
    found = []
    with tarfile.open(path) as tar:
        for one in tar:
            file = tar.extractfile(one) if one.isreg() else None
            found.append((one.name, one.type, one.linkname, one.mode, one.mtime, one.uid, one.uname,
                          file and file.read()))  # fmt: skip
    return found


def in_folder(folder: str, found: Sequence[Member]) -> list[Member]:
    hard = tarfile.LNKTYPE
    return [
        (f"{folder}/{name}", kind, f"{folder}/{link}" if kind == hard else link, *rest)
        for name, kind, link, *rest in found
    ]


NAMES = st.builds(
    "{}x{}y".format, st.sampled_from(["", "a/b.c/", "long/" * 60]), st.text("ab.ä/ \n", max_size=9)
)


@given(
    st.lists(st.tuples(NAMES, st.binary(max_size=1200), st.floats(0, 2e9)), max_size=5),
    st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
    st.sampled_from(["a.tar", "a.tar.gz", "a.tgz"]),
    st.sampled_from(["a.tar", "of/a long/" * 12 + "s.tar"]),
)
def test_only_names_change(
    contents: list[tuple[str, bytes, float]], form: int, name: str, folder: str
) -> None:
    with tempfile.TemporaryDirectory() as where:
        path = Path(where, name)
        with tarfile.open(path, "w" if name == "a.tar" else "w:gz", format=form) as tar:
            for key, data, mtime in contents:
                info = tarfile.TarInfo(key)
                info.size, info.mtime, info.mode, info.uid = len(data), mtime, 0o640, 7
                info.uname = "jo"
                tar.addfile(info, io.BytesIO(data))
        before = members(path)
        put_in_folder(path, folder)
        assert members(path) == in_folder(folder, before)
        index_shard(path)  # what has no samples is a tar, too
        assert os.listdir(where) == [name]


def test_folders_and_links(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", pax_headers={"comment": "of all"}) as tar:
        for name, kind, link in (
            ("d", tarfile.DIRTYPE, ""), ("d/a.jpg", tarfile.REGTYPE, ""),
            ("d/b.jpg", tarfile.LNKTYPE, "d/a.jpg"), ("d/c.jpg", tarfile.SYMTYPE, "a.jpg"),
            ("e.jpg", tarfile.LNKTYPE, "d/" + "long" * 40), ("README", tarfile.REGTYPE, ""),
        ):  # fmt: skip
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, link
            tar.addfile(info)
    before = members(path)
    put_in_folder(path, "x/a.tar")
    assert members(path) == in_folder("x/a.tar", before)
    with tarfile.open(path) as tar:
        assert tar.pax_headers["comment"] == "of all"


def test_permissions_stay_and_what_a_link_points_to(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    write_tar(tmp_path / "original.tar", [("1", {"txt": b"a"})])
    (tmp_path / "original.tar").chmod(0o604)
    original = (tmp_path / "original.tar").read_bytes()
    path = tmp_path / "set" / "a.tar"
    path.symlink_to("../original.tar")
    put_in_folder(path, "a.tar")
    assert (tmp_path / "original.tar").read_bytes() == original
    assert not path.is_symlink()
    assert stat.S_IMODE(path.stat().st_mode) == 0o604
    assert [name for name, *_ in members(path)] == ["a.tar/1.txt"]


def test_what_cannot_be_read_stays(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    write_tar(path, [("1", {"txt": b"a" * 9000})])
    path.write_bytes(path.read_bytes()[:3000])
    before = path.read_bytes()
    with pytest.raises(DatasetError, match=r"a\.tar: .*Copy or write the shard again"):
        put_in_folder(path, "a.tar")
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.tar"]


def three(folder: Path) -> list[str]:
    for n, name in enumerate(["a.tar", "b/c.tar", "d.tgz"]):
        write_tar(folder / name, [(f"{i}", {"txt": f"{n} {i}".encode()}) for i in range(2 + n)])
    return ["a.tar", "b/c.tar", "d.tgz"]


def texts(folder: Path) -> dict[str, str]:
    counts = read_info(folder)
    index = Index(str(folder / ".nv-meta" / "index.sqlite"), str(folder), tuple(counts))
    found = {}
    for shard, (name, count) in enumerate(counts.items()):
        for i in range(count):
            key, ((part, *_),) = index.parts(shard, i)
            with tarfile.open(folder / name) as tar:
                file = tar.extractfile(f"{key}.{part}")
                assert file is not None
                found[key] = file.read().decode()
    return found


FIXED = {
    "a.tar/0": "0 0", "a.tar/1": "0 1",
    "b/c.tar/0": "1 0", "b/c.tar/1": "1 1", "b/c.tar/2": "1 2",
    "d.tgz/0": "2 0", "d.tgz/1": "2 1", "d.tgz/2": "2 2", "d.tgz/3": "2 3",
}  # fmt: skip


@pytest.mark.parametrize("workers", [1, 2])
def test_prepared_with_it(tmp_path: Path, workers: int, caplog: pytest.LogCaptureFixture) -> None:
    shards = three(tmp_path)
    found = prepare_dataset(
        tmp_path, shards, split_parts_ratio=RATIO, fix_duplicates=True, workers=workers
    )
    assert found == ({"txt"}, [])
    assert texts(tmp_path) == FIXED
    assert "keys occur in several shards; writing 3 of them again" in caplog.text
    assert not [*tmp_path.rglob(".*.tmp")]


def test_where_keys_are_unique_nothing_is_written_again(tmp_path: Path) -> None:
    shards = three(tmp_path)
    prepare_dataset(tmp_path, shards, split_parts_ratio=RATIO, fix_duplicates=True)
    before = {name: (tmp_path / name).stat().st_ino for name in shards}
    prepare_dataset(tmp_path, shards, split_parts_ratio=RATIO, fix_duplicates=True)
    assert {name: (tmp_path / name).stat().st_ino for name in shards} == before


@pytest.mark.parametrize("done", [1, 2])
def test_interrupted_it_goes_on(tmp_path: Path, done: int, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = three(tmp_path)
    left = done

    def interrupted(path: Path, folder: str) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        put_in_folder(path, folder)

    monkeypatch.setattr(prepare, "put_in_folder", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare_dataset(tmp_path, shards, split_parts_ratio=RATIO, fix_duplicates=True)
    monkeypatch.setattr(prepare, "put_in_folder", put_in_folder)
    prepare_dataset(tmp_path, shards, split_parts_ratio=RATIO, fix_duplicates=True)
    # One shard's keys are no duplicates of the others' any more.
    expected = dict(FIXED)
    if done == 2:
        for i in range(4):
            expected[f"{i}"] = expected.pop(f"d.tgz/{i}")
    assert texts(tmp_path) == expected


def test_keys_that_come_again_in_a_shard_are_not_fixed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shards = three(tmp_path)
    write_tar(tmp_path / "a.tar", [(key, {"txt": b""}) for key in "010"])
    before = {name: (tmp_path / name).read_bytes() for name in shards}
    _, found = prepare_dataset(tmp_path, shards, split_parts_ratio=RATIO, fix_duplicates=True)
    assert dict(found) == {"0": 4, "1": 3, "2": 2}
    assert "nothing was written" in caplog.text
    assert "within a shard: a.tar" in caplog.text
    assert {name: (tmp_path / name).read_bytes() for name in shards} == before
    assert not (tmp_path / ".nv-meta").exists()


def test_the_command(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    three(tmp_path)
    options = ("--non-interactive", "--split-ratio", "1,0,0")
    result = run("prepare", tmp_path, *options)
    assert result.status == 2
    assert "--fix-duplicates" in result.err
    result = run("prepare", tmp_path, *options, "--fix-duplicates")
    assert result.status == 0, result
    assert result.err.startswith("warning: ")
    assert texts(tmp_path) == FIXED
