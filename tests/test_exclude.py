"""``exclude``: samples that failed get into split.yaml, where nothing else is touched."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml
from conftest import pet, prepare, write_tar
from hypothesis import given
from hypothesis import strategies as st

from energon_fn import DatasetError, exclude, open_source, write_dataset_yaml
from energon_fn.disk.metadata import SplitConfig, read_split_config, split_text
from energon_fn.failures.exclude import _with_entries
from energon_fn.failures.quarantine import Failure
from energon_fn.samples import SourceInfo

SPLIT = ".nv-meta/split.yaml"


def failure(folder: Path | str, *places: tuple[str, str], stage: str = "encode_sample") -> Failure:
    """Of the samples (shard, key), which the user has given other keys since."""
    sources = [SourceInfo(str(folder), 0, shard, (f"{key}.jpg",)) for shard, key in places]
    samples = [{"__key__": f"own {key}"} for _, key in places]
    return Failure.of(ValueError("bad"), samples, sources, stage)


def excluded(folder: Path) -> list[str]:
    return list(read_split_config(folder).exclude)


@pytest.fixture
def cats(tmp_path: Path) -> Path:
    """Two shards, one in a folder, with keys in folders and unusual ones."""
    folder = tmp_path / "cats"
    write_tar(folder / "sub/a.tar", [(f"x/{n}", pet(n)) for n in range(3)])
    write_tar(folder / "b.tar", [(key, pet(9)) for key in ("{1..2}", "a b", "#7", "ä: \\", "[")])
    prepare(folder, ["sub/a.tar", "b.tar"])
    write_dataset_yaml(folder, "CaptioningSample", {"image": "jpg", "caption": "txt"})
    return folder


def test_samples_are_added_once(cats: Path) -> None:
    before = open_source(cats).keys()
    failures = [failure(cats, ("sub/a.tar", "x/1")), failure(cats, ("b.tar", "a b"))]
    done = exclude(cats, [*failures, failures[0]])
    assert done.added == ("sub/a.tar/x/1", "b.tar/a b")
    assert (done.known, done.several, done.elsewhere) == (0, {}, {})
    left = [key for key in before if key not in ("x/1", "a b")]
    assert open_source(cats).keys() == left
    assert len(left) == len(before) - 2

    text = (cats / SPLIT).read_text()
    again = exclude(cats, iter(failures))
    assert (again.added, again.known) == ((), 2)
    assert (cats / SPLIT).read_text() == text


def test_every_key_can_be_excluded(cats: Path) -> None:
    source = open_source(cats)
    for raw in source:
        exclude(cats, [Failure.of(ValueError(), raw, raw["__sources__"], "decode")])
    assert len(open_source(cats)) == 0
    assert len(excluded(cats)) == len(source) == 8


def test_a_shard_that_cannot_be_read_is_excluded_whole(cats: Path) -> None:
    sources = (SourceInfo(str(cats), 0, "b.tar", ()),)
    lost = Failure.of(DatasetError("gone"), None, sources, "load")
    assert exclude(cats, [lost]).added == ("b.tar",)
    assert exclude(cats, [failure(cats, ("b.tar", "#7"))]).known == 1
    assert open_source(cats).keys() == ["x/0", "x/1", "x/2"]


def test_a_dry_run_writes_nothing(cats: Path) -> None:
    text = (cats / SPLIT).read_bytes()
    assert exclude(cats, [failure(cats, ("b.tar", "["))], dry_run=True).added == ("b.tar/[",)
    assert (cats / SPLIT).read_bytes() == text


def test_another_split_is_written_to(cats: Path) -> None:
    (cats / ".nv-meta/mine.yaml").write_text("split_parts: {train: [b.tar]}")
    exclude(cats, [failure(cats, ("b.tar", "["))], split_config="mine.yaml")
    assert excluded(cats) == []
    assert len(open_source(cats, split_config="mine.yaml")) == 4


def test_failures_of_several_samples_and_of_others_are_counted(cats: Path, tmp_path: Path) -> None:
    other = str(tmp_path / "dogs")
    several = [("b.tar", "["), ("sub/a.tar", "x/0")]
    joined = Failure.of(
        ValueError(), {"__key__": "1"},
        (SourceInfo(other, 0, "d.tar", ("1.txt",)), SourceInfo(str(cats), 0, "b.tar", ("#7.jpg",))),
        "decode",
    )  # fmt: skip
    done = exclude(
        tmp_path / "cats/../cats",
        [
            failure(cats, *several, stage="batch"),
            failure(cats, *several, stage="encode_batch"),
            failure(cats, *several, stage="batch"),
            failure(other, ("a.tar", "1")),
            Failure.of(ValueError(), 7, None, "encode_sample"),
            joined,
        ],
    )
    assert done.added == ("b.tar/#7",)  # the joined sample's part in here
    assert done.several == {"batch": 2, "encode_batch": 1}
    assert done.elsewhere == {other: 1, "": 1}


def test_where_there_is_nothing_to_add_to(cats: Path, tmp_path: Path) -> None:
    lines = tmp_path / "a.jsonl"
    lines.write_text("{}\n")
    meta = tmp_path / "meta.yaml"
    meta.write_text(
        "__module__: megatron.energon\n__class__: MetadatasetV2\nsplits: {train: {path: ./cats}}\n"
    )
    for path in (lines, meta):
        with pytest.raises(DatasetError, match="give a prepared folder"):
            exclude(path, [failure(cats, ("b.tar", "["))])
    with pytest.raises(DatasetError, match="energon-fn prepare"):
        exclude(tmp_path, [failure(cats, ("b.tar", "["))])


# ------------------------------------------------------------------------------------ split.yaml

PARTS = "split_parts:\n  train:\n  - ä_{0..3}.tar  # all\n"
WRITTEN = {
    "empty": (PARTS + "exclude: []\n", PARTS + "exclude:\n- s.tar/1\n- 's.tar/: #'\n"),
    "not there": (PARTS, PARTS + "exclude:\n- s.tar/1\n- 's.tar/: #'\n"),
    "a comment": (
        "# mine\nexclude: []  # none\n\n" + PARTS,
        "# mine\nexclude:  # none\n- s.tar/1\n- 's.tar/: #'\n\n" + PARTS,
    ),
    "a list": (
        "exclude:\n- ü.tar  # bad\n# the others\n" + PARTS,
        "exclude:\n- ü.tar  # bad\n- s.tar/1\n- 's.tar/: #'\n# the others\n" + PARTS,
    ),
    "an indented list": (
        PARTS + "exclude:\n    - 'ü.tar'\n    - b.tar",
        PARTS + "exclude:\n    - 'ü.tar'\n    - b.tar\n    - s.tar/1\n    - 's.tar/: #'\n",
    ),
    "in brackets": (
        "exclude: [a.tar, b.tar]  # two\n" + PARTS,
        "exclude: [a.tar, b.tar, s.tar/1, 's.tar/: #']  # two\n" + PARTS,
    ),
    "in lines and brackets": (
        "exclude: [\n  a.tar,\n  ]\n" + PARTS,
        "exclude: [\n  a.tar, s.tar/1, 's.tar/: #']\n" + PARTS,
    ),
    "all in brackets": (
        "{split_parts: {train: [a.tar]}, exclude: []}",
        "{split_parts: {train: [a.tar]}, exclude: [s.tar/1, 's.tar/: #']}",
    ),
}


@pytest.mark.parametrize("how", WRITTEN)
def test_all_else_stays_as_it_was_written(how: str) -> None:
    before, after = WRITTEN[how]
    assert _with_entries(before, ["s.tar/1", "s.tar/: #"], "split.yaml") == after


@pytest.mark.parametrize(
    "text",
    ["---\nsplit_parts: {}\n...\n", "a: &all []\nexclude: *all\n", "{split_parts: {}}"],
)
def test_what_cannot_be_edited_is_said_and_left(text: str, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"split\.yaml: nothing can be added(.|\n)*- s\.tar/1"):
        _with_entries(text, ["s.tar/1"], "split.yaml")


names = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Zl", "Zp"]), min_size=1)


@given(st.lists(names), st.lists(names, min_size=1), st.booleans())
def test_any_names_get_into_any_split(old: list[str], new: Sequence[str], flow: bool) -> None:
    text = split_text(SplitConfig({"train": ("a.tar",)}, tuple(old)))
    if flow:
        text = json.dumps(yaml.safe_load(text), indent=1, ensure_ascii=False)
    found = yaml.safe_load(_with_entries(text, new, "split.yaml"))
    assert found["exclude"][len(old) :] == list(new)
    assert found["exclude"][: len(old)] == yaml.safe_load(text)["exclude"]


THEIRS = """
import json, sys
from megatron.energon import (DefaultTaskEncoder, WorkerConfig, get_loader, get_val_dataset,
                              reraise_exception)
config = WorkerConfig(
    rank=0, world_size=1, num_workers=0, global_error_handler=reraise_exception)
dataset = get_val_dataset(sys.argv[1], split_part="train", batch_size=None, worker_config=config,
                          task_encoder=DefaultTaskEncoder())
print(json.dumps([sample.__key__ for sample in get_loader(dataset)]))
"""


def test_the_published_package_leaves_them_out_too(cats: Path, published_python: str) -> None:
    exclude(cats, [failure(cats, ("sub/a.tar", "x/1")), failure(cats, ("b.tar", "#7"))])
    exclude(cats, [failure(cats, ("b.tar", "{1..2}")), failure(cats, ("b.tar", "["))])
    found = subprocess.run(
        [published_python, "-c", THEIRS, str(cats)], capture_output=True, text=True, check=True
    )
    keys = [key.rpartition("/")[2] for key in json.loads(found.stdout.splitlines()[-1])]
    assert keys == ["0", "2", "a b", "ä: \\"]
    ours = open_source(cats).keys()
    assert [key.rpartition("/")[2] for key in ours] == keys
