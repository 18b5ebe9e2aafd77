"""Lint: it finds every bad sample, says where it is, and does not stumble over it itself."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
from conftest import jpeg, shards, write_tar
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import check_ctrl_c, run, run_on_terminal, start

from energon_fn import open_source
from energon_fn.disk.prepare import prepare_dataset, write_dataset_yaml
from energon_fn.failures.lint import BadSample, lint, open_shards

JPEG = jpeg()
BROKEN: dict[str, tuple[dict[str, bytes], str]] = {
    "truncated": ({"jpg": JPEG[:-90], "txt": b""}, "cannot decode part 'jpg'"),
    "no_picture": ({"jpg": b"hello", "txt": b""}, "damaged or no picture"),
    "no_utf8": ({"jpg": JPEG, "txt": b"caf\xe9"}, "cannot decode part 'txt'"),
    "no_part": ({"jpg": JPEG}, "no value for 'caption'"),
}
GOOD = {"jpg": JPEG, "txt": b"a cat", "json": b"broken, but not used"}


def prepared(folder: Path, *names: str) -> Path:
    prepare_dataset(
        folder, names, split_parts_ratio=[("train", 1), ("val", 1)], shuffle_seed=None, workers=1
    )
    write_dataset_yaml(folder, "CaptioningSample", {"image": "jpg", "caption": "txt"})
    return folder


@pytest.fixture
def cats(tmp_path: Path) -> Path:
    """Two shards; the first has one sample of each kind of broken ones, among good ones."""
    bad = [sample for key, (parts, _) in BROKEN.items()
           for sample in ((key, parts), (f"good_{key}", GOOD))]  # fmt: skip
    write_tar(tmp_path / "sub/a.tar", [("first", GOOD), *bad])
    write_tar(tmp_path / "sub/b.tar", [(f"b{n}", GOOD) for n in range(40)])
    return prepared(tmp_path, "sub/a.tar", "sub/b.tar")


@pytest.mark.parametrize("workers", [0, 2])
def test_every_bad_sample_is_named_in_order(workers: int, cats: Path) -> None:
    checked: list[int] = []
    found = list(lint(open_source(cats), workers=workers, progress=checked.append))
    assert [(bad.shard, bad.key) for bad in found] == [("sub/a.tar", key) for key in BROKEN]
    for bad in found:
        assert bad.key is not None
        assert BROKEN[bad.key][1] in bad.error
    assert sum(checked) == len(open_source(cats)) == 9
    assert list(lint(open_source(cats, "val"), workers=workers)) == []


def test_image_decode_is_used(cats: Path) -> None:
    assert [bad.key for bad in lint(open_source(cats), None, workers=0)] == ["no_part"]
    with pytest.raises(ValueError, match="torchrbg"):
        next(lint(open_source(cats), "torchrbg"))


def test_excluded_samples_are_left_out(cats: Path) -> None:
    split = cats / ".nv-meta/split.yaml"
    out = "[sub/a.tar/no_utf8, sub/a.tar/no_part]"
    split.write_text(split.read_text().replace("exclude: []", f"exclude: {out}"))
    keys = [bad.key for bad in lint(open_source(cats), workers=0)]
    assert keys == ["truncated", "no_picture"]


@given(
    st.lists(
        st.lists(st.booleans(), min_size=1, max_size=70), min_size=1, max_size=4
    )
)  # fmt: skip
@settings(max_examples=25)
def test_it_finds_exactly_the_bad_ones(good: list[list[bool]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        flags = [flag for shard in good for flag in shard]
        shards(Path(folder), list(map(len, good)), lambda n: {"json": b"{}" if flags[n] else b"{"})
        found = [bad.key for bad in lint(open_source(folder), workers=0)]
    assert found == [f"{n:05d}" for n, flag in enumerate(flags) if not flag]


def test_what_is_lost_is_said_once_for_a_shard(tmp_path: Path) -> None:
    names = shards(tmp_path, [70, 70, 70, 70], lambda n: GOOD)
    prepare_dataset(tmp_path, names, split_parts_ratio=[("train", 1)], workers=1, shuffle_seed=None)
    write_dataset_yaml(tmp_path, None)
    source = open_source(tmp_path)
    (tmp_path / names[0]).unlink()
    data = (tmp_path / names[1]).read_bytes()
    (tmp_path / names[1]).write_bytes(data[: len(data) // 2])
    write_tar(tmp_path / names[2], [("other", {"txt": b"other"})])
    # The json of the last shard is broken, and in a crude dataset every part is used.
    found = list(lint(source, workers=0))
    assert [(bad.shard, bad.key) for bad in found[:3]] == [(name, None) for name in names[:3]]
    assert "does not exist" in found[0].error
    assert "changed since it was indexed" in found[1].error
    assert "changed since it was indexed" in found[2].error
    assert [bad.key for bad in found[3:]] == [f"{n:05d}" for n in range(210, 280)]

    result = run("lint", tmp_path)
    assert result.status == 1
    assert [line.split(":")[0] for line in result.out.splitlines()[:3]] == names[:3]
    assert result.out.endswith("280 samples in 4 shards: 70 bad samples and 3 unreadable shards\n")


def test_shards_of_unprepared_datasets_are_opened_one_by_one(tmp_path: Path) -> None:
    write_tar(tmp_path / "sub/good.tar", [("a", {"json": b"{}"}), ("b", {"json": b"{"})])
    data = (tmp_path / "sub/good.tar").read_bytes()
    (tmp_path / "sub/cut.tar").write_bytes(data[:700])
    (tmp_path / "none.tar").write_bytes(b"no tar at all" * 100)
    bad_shards = [found for found in open_shards(tmp_path) if isinstance(found, BadSample)]
    assert [bad.shard for bad in bad_shards] == ["none.tar", "sub/cut.tar"]

    result = run("lint", tmp_path)
    assert result.status == 1
    assert result.err == ""
    first, second, third, summary = result.out.splitlines()
    assert first.startswith(f"none.tar: {tmp_path}/none.tar: ")
    assert second.startswith(f"sub/cut.tar: {tmp_path}/sub/cut.tar: ")
    assert "unexpected end of data" in second
    assert third.startswith("sub/good.tar b: cannot decode part 'json'")
    assert summary == "2 samples in 3 shards: 1 bad sample and 2 unreadable shards"


def test_the_command_reports_and_fails(cats: Path) -> None:
    result = run("lint", cats)
    assert result.status == 1
    *lines, summary = result.out.splitlines()
    assert [line.split(":")[0] for line in lines] == [f"sub/a.tar {key}" for key in BROKEN]
    for line, (_, said) in zip(lines, BROKEN.values(), strict=True):
        assert said in line
    assert summary == "49 samples in 2 shards: 4 bad samples"
    assert result.err == ""

    fine = run("lint", cats, "--split-part", "val", "--num-workers", "1")
    assert (fine.status, fine.err) == (0, "")
    assert fine.out == "40 samples in 1 shard: all can be read and decoded\n"


def test_a_sample_loader_is_run_only_if_trusted(cats: Path) -> None:
    write_dataset_yaml(cats, "CaptioningSample", parts=["jpg", "txt"])
    loader = cats / ".nv-meta/sample_loader.py"
    loader.write_text(
        "def sample_loader(raw):\n"
        "    if raw['__key__'] == 'b7':\n"
        "        raise KeyError('seven')\n"
        "    return dict(image=raw['jpg'], caption='')\n"
        "def part_filter(part):\n"
        "    return part == 'jpg'\n"
    )
    refused = run("lint", cats, "--split-part", "val")
    assert refused.status == 2
    assert "--trust" in refused.err
    trusted = run("lint", cats, "--split-part", "val", "--trust")
    assert trusted.status == 1
    assert trusted.out.splitlines()[0] == "sub/b.tar b7: KeyError: 'seven'"


def test_progress_is_for_terminals(cats: Path) -> None:
    shown = run_on_terminal(["lint", cats], columns=60)
    assert shown.status == 1
    pieces = shown.out.replace("\r", "\n").splitlines()
    bars = [piece for piece in pieces if piece.startswith("lint:")]
    assert bars
    assert max(map(len, bars)) <= 60
    lines = [piece for piece in pieces if piece.startswith("sub/")]
    assert len(lines) == len(BROKEN)  # each on a line of its own, not behind a bar
    assert pieces[-1].strip().endswith("4 bad samples")


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("many")
    picture = {"jpg": jpeg(size=(640, 480)), "json": json.dumps({"n": 1}).encode()}
    shards(folder, [2500], lambda n: picture)
    return folder


@pytest.mark.parametrize("whole_group", [True, False])
def test_ctrl_c_leaves_nothing_behind(whole_group: bool, many: Path) -> None:
    process = start("lint", many, "--num-workers", "2")
    check_ctrl_c(process, whole_group)


def test_a_worker_that_dies_is_an_error(cats: Path) -> None:
    write_dataset_yaml(cats, "CaptioningSample", parts=["jpg", "txt"])
    (cats / ".nv-meta/sample_loader.py").write_text(
        "import os, signal\n"
        "def sample_loader(raw):\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "def part_filter(part):\n"
        "    return True\n"
    )
    result = run("lint", cats, "--trust", "--num-workers", "1")
    assert result.status == 2
    assert result.err.startswith("error: a process that checks samples has died")
