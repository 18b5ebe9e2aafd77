from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import write_tar
from hypothesis import given, settings
from hypothesis import strategies as st

from energon_fn.decoding import decoder
from energon_fn.disk import joined as module
from energon_fn.disk.fields import EntryError
from energon_fn.disk.joined import MODES, Joined, open_joined
from energon_fn.disk.prepare import prepare_dataset, write_dataset_yaml
from energon_fn.disk.source import Samples, Source, open_source
from energon_fn.errors import DatasetError
from energon_fn.samples import (
    CaptioningSample,
    CrudeSample,
    ImageSample,
    Sample,
    SourceInfo,
    TextSample,
    VQASample,
    edataclass,
)

DECODE = decoder("pilrgb")


@edataclass
class Pair(Sample):
    first: Any
    second: Any

    @staticmethod
    def from_joined(first: TextSample, second: TextSample | None) -> Pair:
        return Pair.derive_from(first, first=first.text, second=second and second.text)


def both(*samples: Any, **named: Any) -> dict[str, Any]:
    """A joiner that shows what it was given."""
    return {"__restore_key__": None, "given": samples, "named": named}


def crude(folder: Path, *shards: str, ending: str = "txt") -> Source:
    """A plain folder; a shard's samples are called by its letters."""
    for number, keys in enumerate(shards):
        text = f"{folder.name} {{}}"
        content = [(key, {ending: text.format(key).encode()}) for key in keys]
        write_tar(folder / f"{number}.tar", content)
    return open_source(folder)


def prepared(
    folder: Path, *shards: str, exclude: Sequence[str] = (), subflavors: str = "{}"
) -> Source:
    """A dataset of texts; a shard's samples are called by its letters."""
    names = [f"{number}.tar" for number in range(len(shards))]
    for name, keys in zip(names, shards, strict=True):
        text = f"{folder.name} {{}}"
        write_tar(folder / name, [(key, {"txt": text.format(key).encode()}) for key in keys])
    prepare_dataset(folder, names, split_parts_ratio=[("train", 1)], shuffle_seed=None, workers=1)
    write_dataset_yaml(folder, "TextSample", {"text": "txt"})
    meta = folder / ".nv-meta"
    with open(meta / "dataset.yaml", "a") as file:
        file.write(f"subflavors: {subflavors}\n")
    split = (meta / "split.yaml").read_text()
    assert "exclude: []" in split
    (meta / "split.yaml").write_text(split.replace("[]", json.dumps(exclude)))
    return open_source(folder)


def made(joined: Samples) -> list[Any]:
    return [joined.make(joined.load(i), DECODE) for i in range(len(joined))]


def pairs(joined: Samples) -> list[tuple[str, str | None]]:
    return [(sample.first, sample.second) for sample in made(joined)]


def keys(joined: Samples) -> list[str]:
    return [joined.key(i) for i in range(len(joined))]


# -------------------------------------------------------------------------------- what is joined


def test_the_documented_example(tmp_path: Path) -> None:
    parts = [
        crude(tmp_path / name, keys)
        for name, keys in (("ds1", "12356"), ("ds2", "13467"), ("ds3", "1230"))
    ]
    joined = open_joined(parts, ["error", "skip", "none"], both)
    rows = [
        [part and part["txt"] for part in joined.make(joined.load(i), DECODE)["given"]]
        for i in range(len(joined))
    ]
    assert rows == [
        ["ds1 1", "ds2 1", "ds3 1"],
        ["ds1 3", "ds2 3", "ds3 3"],
        ["ds1 6", "ds2 6", None],
    ]


def by_hand(parts: list[list[str]], modes: list[str]) -> list[list[int]] | None:
    """The rows of the table, the obvious way; None for an error."""
    places = [{key: place for place, key in enumerate(part)} for part in parts]
    rows = []
    for key in parts[0]:
        row = [place.get(key, -1) for place in places]
        missing = {mode for mode, at in zip(modes, row, strict=True) if at < 0}
        if "skip" in missing:
            continue
        if "error" in missing:
            return None
        rows.append(row)
    return rows


# An order of the keys, how many are left out, and where the second shard begins.
ORDERS = st.tuples(st.permutations("abcdef"), st.integers(0, 3), st.integers(0, 6))


@settings(max_examples=60)
@given(
    orders=st.lists(st.tuples(ORDERS, st.sampled_from(MODES)), min_size=1, max_size=3),
    bounds=st.tuples(st.integers(0, 7), st.integers(0, 7)),
)
def test_it_is_what_a_dict_would_find(
    orders: list[tuple[tuple[list[str], int, int], str]], bounds: tuple[int, int]
) -> None:
    modes = [mode for _, mode in orders]
    flat = [keys[less:] for (keys, less, _), _ in orders]
    shards = [[keys[:at], keys[at:]] for keys, ((_, _, at), _) in zip(flat, orders, strict=True)]
    expected = by_hand(flat, modes)
    with tempfile.TemporaryDirectory() as folder:
        sources = [
            crude(Path(folder, str(n)), *map("".join, part)) for n, part in enumerate(shards)
        ]
        if expected is None:
            with pytest.raises(DatasetError, match="no match in"):
                open_joined(sources, modes, both, index=f"{folder}/table")
            return
        joined = open_joined(sources, modes, both, index=f"{folder}/table")
        names = [flat[0][row[0]] for row in expected]
        assert len(joined) == len(expected)
        assert joined.keys() == keys(joined) == names
        assert [joined.find(key) for key in names] == list(range(len(names)))
        assert {joined.find(key) for key in "abcdefg"} - {None} == set(range(len(names)))
        for i, row in enumerate(expected):
            given = joined.make(joined.load(i), DECODE)["given"]
            assert [part and part["txt"] for part in given] == [
                None if at < 0 else f"{n} {flat[n][at]}" for n, at in enumerate(row)
            ]
        survivors = [sum(key in names for key in shard) for shard in shards[0]]
        assert joined.runs == tuple(count for count in survivors if count)

        start, stop = sorted(bounds)
        cut = pickle.loads(pickle.dumps(joined.cut(start, stop)))
        assert keys(cut) == cut.keys() == names[start:stop]
        assert sum(cut.runs) == len(cut)
        assert [cut.find(key) for key in names] == [
            i - start if start <= i < stop else None for i in range(len(names))
        ]
        assert keys(cut.cut(1, 3)) == names[start:stop][1:3]


def test_a_sample_that_one_dataset_skips_is_missed_by_none(tmp_path: Path) -> None:
    a, skips = crude(tmp_path / "a", "abcd"), crude(tmp_path / "b", "acd")
    lacks = crude(tmp_path / "c", "dca")
    for parts, modes in (
        ((a, skips, lacks), ("skip", "error")),
        ((a, lacks, skips), ("error", "skip")),
    ):
        assert keys(open_joined(parts, ["error", *modes], both)) == ["a", "c", "d"]


def test_what_is_loaded(tmp_path: Path) -> None:
    a = prepared(tmp_path / "a", "xy", subflavors="{from: a, only: a}")
    b = prepared(tmp_path / "b", "y", subflavors="{from: b}")
    joined = open_joined([a, b], ["error", "none"], Pair)
    assert joined.load(1) == {
        "__key__": "y",
        "__restore_key__": (),
        "__subflavors__": {"from": "a", "only": "a"},
        "__sources__": (
            SourceInfo(str(tmp_path / "a"), 1, "0.tar", ("y.txt",)),
            SourceInfo(str(tmp_path / "b"), 0, "0.tar", ("y.txt",)),
        ),
        "__parts__": (a.load(1), b.load(0)),
    }
    assert joined.load(0)["__parts__"] == (a.load(0), None)
    assert joined.load(0)["__sources__"] == a.load(0)["__sources__"]
    assert (joined.path, joined.split_part, joined.subflavors) == (a.path, "train", a.subflavors)
    for i in (-1, 2):
        with pytest.raises(IndexError, match=f"no sample {i}: .* has 2"):
            joined.load(i)
    tagged = joined.tagged({"from": "outside", "more": 1})
    first, second = tagged.load(1)["__parts__"]
    assert first["__subflavors__"] == {"from": "outside", "only": "a", "more": 1}
    assert second["__subflavors__"] == {"from": "outside", "more": 1}
    assert tagged.load(1)["__subflavors__"] == first["__subflavors__"] == tagged.subflavors


def test_excluded_samples_and_subsets_have_no_match(tmp_path: Path) -> None:
    a = prepared(tmp_path / "a", "abc", "def", exclude=["0.tar/b", "1.tar/f"])
    b = prepared(tmp_path / "b", "fed", "cba", exclude=["1.tar/a"])
    assert keys(open_joined([a, b], ["error", "skip"], Pair)) == ["c", "d", "e"]
    assert keys(open_joined([a, b.cut(0, 3)], ["error", "skip"], Pair)) == ["d", "e"]
    assert keys(open_joined([a.cut(1, 3), b], ["error", "error"], Pair)) == ["c", "d"]
    assert open_joined([a, b], ["error", "skip"], Pair).runs == (1, 2)
    assert open_joined([a, b], ["error", "none"], Pair).runs == (1, 1, 2)
    with pytest.raises(DatasetError, match=r"1 of 4 samples of .*: 'a'"):
        open_joined([a, b], ["error", "error"], Pair)


def test_a_join_is_joined(tmp_path: Path) -> None:
    a, b = prepared(tmp_path / "a", "wxyz"), prepared(tmp_path / "b", "xyz")
    c = prepared(tmp_path / "c", "zyxw")
    inner = open_joined([a, b], ["error", "skip"], Pair)
    outer = open_joined([inner.cut(1, 3), c], ["error", "error"], both)
    texts = [(pair.first, pair.second, c.text) for pair, c in (s["given"] for s in made(outer))]
    assert texts == [("a y", "b y", "c y"), ("a z", "b z", "c z")]
    assert [source.dataset_path[-1] for source in outer.load(0)["__sources__"]] == ["a", "b", "c"]
    turned = open_joined([c, inner], ["error", "none"], both)
    others = [(c.text, pair and pair.second) for c, pair in (s["given"] for s in made(turned))]
    assert others == [("c z", "b z"), ("c y", "b y"), ("c x", "b x"), ("c w", None)]


def test_keys_of_the_first_dataset_may_occur_twice(tmp_path: Path) -> None:
    a, b = crude(tmp_path / "a", "xy", "yx"), crude(tmp_path / "b", "y")
    joined = open_joined([a, b], ["error", "skip"], both)
    assert keys(joined) == ["y", "y"]
    assert joined.find("y") == 0
    assert joined.cut(1, 2).find("y") == 0


# ------------------------------------------------------------------------------------- joiners


def test_joiners_get_samples_in_order_or_by_name(tmp_path: Path) -> None:
    a, b = prepared(tmp_path / "a", "xy"), crude(tmp_path / "b", "y")
    in_order = made(open_joined([a, b], ["error", "none"], both))
    by_name = made(open_joined([a, b], ["error", "none"], both, names=["one", "two"]))
    assert [sample["named"] for sample in in_order] == [{}, {}]
    assert [sample["given"] for sample in by_name] == [(), ()]
    assert [tuple(sample["named"].values()) for sample in by_name] == [
        sample["given"] for sample in in_order
    ]
    assert [tuple(sample["named"]) for sample in by_name] == [("one", "two")] * 2
    (x, nothing), (y, other) = (sample["given"] for sample in in_order)
    assert isinstance(x, TextSample)
    assert (x.text, y.text, nothing) == ("a x", "a y", None)
    assert isinstance(other, CrudeSample)
    assert other == {**b.load(0), "txt": "b y"}  # decoded, as crude samples are
    undecoded = open_joined([a, b], ["error", "none"], both)
    assert undecoded.make(undecoded.load(1), None)["given"][1]["txt"] == b"b y"


def test_a_sample_type_of_ones_own(tmp_path: Path) -> None:
    a, b = prepared(tmp_path / "a", "xy", subflavors="{n: 1}"), prepared(tmp_path / "b", "y")
    for names in (None, ("first", "second")):
        joined = open_joined([a, b], ["error", "none"], Pair, names)
        one, two = made(joined)
        assert (one.first, one.second, two.second) == ("a x", None, "b y")
        assert (two.__key__, two.__subflavors__) == ("y", {"n": 1})
        assert two.__sources__ == a.load(1)["__sources__"]  # as derive_from(first) says


@dataclass(frozen=True)
class Bare:
    """Knows nothing of Sample, and its restore key is its own."""

    texts: tuple[str, ...]
    __restore_key__: tuple[Any, ...] = ("mine",)

    @classmethod
    def from_joined(cls, *samples: TextSample) -> Bare:
        return cls(tuple(sample.text for sample in samples))


@pytest.mark.parametrize("joiner", [Pair, Bare, both, TextSample])
def test_the_restore_key_is_that_of_the_raw_sample(tmp_path: Path, joiner: Any) -> None:
    a, b = prepared(tmp_path / "a", "xy"), prepared(tmp_path / "b", "y")
    joined = open_joined([a, b], ["error", "skip"], joiner)
    raw = joined.load(0)
    raw["__restore_key__"] = ("sample", 3, 0, 0)
    for _ in range(2):
        sample = joined.make(raw, DECODE)
        key = sample["__restore_key__"] if joiner is both else sample.__restore_key__
        assert key == ("sample", 3, 0, 0)


def test_a_joiner_may_return_anything(tmp_path: Path) -> None:
    a = prepared(tmp_path / "a", "xy")
    assert made(open_joined([a], ["error"], lambda sample: sample.text)) == ["a x", "a y"]


def test_fields_are_merged_and_the_later_ones_win(tmp_path: Path) -> None:
    a, b = prepared(tmp_path / "a", "xy", subflavors="{n: 1}"), prepared(tmp_path / "b", "yx")
    joined = open_joined([a, b], ["error", "error"], TextSample)
    sample = made(joined)[0]
    assert type(sample) is TextSample
    assert (sample.text, sample.__key__, sample.__subflavors__) == ("b x", "x", {"n": 1})
    assert sample.__sources__ == joined.load(0)["__sources__"]
    missing = open_joined([a, b.cut(0, 1)], ["error", "none"], TextSample)
    assert [sample.text for sample in made(missing)] == ["a x", "b y"]


def test_merged_fields_and_what_they_lack() -> None:
    picture: Any = "a picture"
    image = ImageSample(__key__="a", image=picture)
    question = VQASample(__key__="b", image=picture[:1], context="?", answers=["!"])
    crude = CrudeSample({"__key__": "c", "caption": "a cat"})
    merged = VQASample.from_joined(question, image)
    assert (merged.__key__, merged.context, merged.answers) == ("b", "?", ["!"])
    assert merged.image is picture
    assert VQASample.from_joined(image, question).image == "a"
    assert CaptioningSample.from_joined(image, crude).caption == "a cat"
    with pytest.raises(TypeError, match=r"'context'.*have image, context, .*: write a from_joined"):
        ImageSample.from_joined(image, question)
    with pytest.raises(TypeError, match=r"'caption'.*have image: write a from_joined"):
        CaptioningSample.from_joined(image, None)
    with pytest.raises(TypeError, match=r"by name \(one, two\)"):
        VQASample.from_joined(one=question, two=image)


def test_a_joiner_that_a_yaml_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [prepared(tmp_path / name, "xy") for name in "ab"]

    def opened(module: str, name: str, trust: bool = False) -> Joined:
        joiner = {"__module__": module, "__class__": name}
        return open_joined(parts, ["error"] * 2, joiner, trust_dataset_code=trust)

    assert opened("megatron.energon", "TextSample").joiner is TextSample
    (tmp_path / "joiner_of_test.py").write_text(
        "from energon_fn import Sample, edataclass\n"
        "@edataclass\nclass Two(Sample):\n    texts: list\n"
        "    @staticmethod\n    def from_joined(one, two):\n"
        "        return Two.derive_from(one, texts=[one.text, two.text])\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(EntryError, match=r"joiner: .*Two .*joiner_of_test.*trust_dataset_code"):
        opened("joiner_of_test", "Two")
    assert "joiner_of_test" not in sys.modules
    assert made(opened("joiner_of_test", "Two", trust=True))[1].texts == ["a y", "b y"]
    del sys.modules["joiner_of_test"]
    with pytest.raises(EntryError, match=r"joiner: .*Three.*no attribute 'Three'"):
        opened("joiner_of_test", "Three", trust=True)
    with pytest.raises(EntryError, match=r"joiner: .*No module named 'not_there'.*PYTHONPATH"):
        opened("not_there", "Two", trust=True)
    with pytest.raises(DatasetError, match=r"CrudeSample has no from_joined"):
        opened("megatron.energon", "CrudeSample")


class Forgotten:
    def from_joined(self, one: Any, two: Any) -> Any: ...


@pytest.mark.parametrize(
    ("joiner", "names", "message"),
    [
        (dict, None, r"dict has no from_joined.*derived from Sample"),
        ("TextSample", None, r"'TextSample' has no from_joined"),
        (Pair, ("one", "two"), r"Pair\.from_joined\(.*by the names one, two: .*argument"),
        (lambda one: one, None, r"<lambda>\(one\) does not take 2 samples in order: too many"),
        (partial(lambda one: one), ("two", "one"), r"partial\(.*by the names two, one: .*argument"),
        (Forgotten, None, r"missing a required argument: 'two'.*staticmethod"),
        (TextSample, ("one", "two"), r"TextSample has no .* by name \(one, two\): join a list"),
        (ImageSample, None, r"ImageSample has no field 'text', which .*/a have \(TextSample\)\."),
    ],
)
def test_a_joiner_that_does_not_fit(tmp_path: Path, joiner: Any, names: Any, message: str) -> None:
    parts = [prepared(tmp_path / name, "xy") for name in "ab"]
    with pytest.raises(DatasetError, match=message):
        open_joined(parts, ["error"] * 2, joiner, names)


@edataclass
class Titled(TextSample):
    title: str


def test_a_field_that_no_dataset_has(tmp_path: Path) -> None:
    texts, bare = prepared(tmp_path / "a", "xy"), crude(tmp_path / "b", "xy", ending="title")
    with pytest.raises(DatasetError, match=r"none of the datasets has the field 'title' of Titled"):
        open_joined([texts, texts], ["error"] * 2, Titled)
    # Of a crude dataset nothing is known before it is read.
    joined = open_joined([texts, bare], ["error"] * 2, Titled)
    sample = joined.make(joined.load(0), None)
    assert (sample.text, sample.title) == (b"a x", b"b x")


# ------------------------------------------------------------------------------- what is refused


def test_missing_keys_are_told(tmp_path: Path) -> None:
    a, b = crude(tmp_path / "a", "abcdefgh"), crude(tmp_path / "b", "xh")
    with pytest.raises(DatasetError) as error:
        open_joined([a, b], ["skip", "error"], both)
    assert str(error.value) == (
        f"7 of 8 samples of {tmp_path}/a have no match in {tmp_path}/b, 'train': 'a', 'b', 'c', "
        "'d', 'e', .... It has 'x', for example. If this is as it should be, say for that dataset "
        "nonmatch: skip, to leave such samples out, or nonmatch: none, to have None in its place."
    )
    with pytest.raises(DatasetError, match=r"8 of 8 .* That is empty"):
        open_joined([a, b.cut(0, 0)], ["skip", "error"], both)
    assert len(open_joined([a, b.cut(0, 0)], ["error", "skip"], both)) == 0


@pytest.mark.parametrize("mode", ["skip", "none"])
def test_keys_of_another_kind_are_told_of(
    tmp_path: Path, mode: str, caplog: pytest.LogCaptureFixture
) -> None:
    a, b = crude(tmp_path / "a", "abc"), crude(tmp_path / "b", "XYZ")
    open_joined([a, b], ["error", mode], both)
    assert (
        f"no sample of {a.path} has a match in {b.path}: the first one's key is 'X'" in caplog.text
    )
    caplog.clear()
    open_joined([a, crude(tmp_path / "c", "XYc")], ["error", mode], both)
    open_joined([a.cut(0, 0), b], ["error", mode], both)
    assert not caplog.text


def test_a_key_that_is_not_unique(tmp_path: Path) -> None:
    a, b = crude(tmp_path / "a", "xy"), crude(tmp_path / "b", "xy", "zy", "x")
    message = rf"{tmp_path}/b, 'train': the key 'x' .* in 0\.tar and 2\.tar, and with it 2 samples"
    with pytest.raises(DatasetError, match=message):
        open_joined([a, b], ["error", "none"], both)


def test_arguments_that_make_no_sense(tmp_path: Path) -> None:
    a = crude(tmp_path / "a", "xy")
    with pytest.raises(
        ValueError, match="nonmatch is 'maybe'; it must be one of error, skip, none"
    ):
        open_joined([a, a], ["error", "maybe"], both)
    with pytest.raises(ValueError, match="shorter"):
        open_joined([a, a], ["error"], both)


# ------------------------------------------------------------------------------------- the table


@pytest.fixture
def tables_made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths of the tables that are made from now on."""
    lengths: list[int] = []
    make = module._matches

    def recording(*arguments: Any) -> Any:
        table = make(*arguments)
        lengths.append(len(table))
        return table

    monkeypatch.setattr(module, "_matches", recording)
    return lengths


@pytest.mark.parametrize("index", ["beside", "cache"])
def test_a_table_is_made_once_for_each_state(
    tmp_path: Path, tables_made: list[int], index: str
) -> None:
    place = None if index == "cache" else str(tmp_path / "m.yaml.cache" / "join.npy")
    prepared(tmp_path / "a", "abcd")
    prepared(tmp_path / "b", "bcdx")

    def opened(*modes: str) -> Joined:
        parts = [open_source(tmp_path / name) for name in "ab"]
        return open_joined(parts, ["error", *modes], Pair, index=place)

    first = opened("skip")
    assert opened("skip") == first
    assert tables_made == [3]
    assert len(opened("none")) == 4
    assert opened("skip") == first
    assert tables_made == [3, 4]
    if place:
        assert os.path.dirname(first.table) == os.path.dirname(place)
        assert Path(first.table).name.startswith("join-")
    else:
        assert Path(first.table).parent == Path(os.environ["ENERGON_FN_CACHE"])

    shutil.rmtree(tmp_path / "b")
    prepared(tmp_path / "b", "abxy")  # as many samples in as many shards
    assert open_source(tmp_path / "b").identity == first.parts[1].identity
    assert pairs(opened("skip")) == [("a a", "b a"), ("a b", "b b")]
    assert pairs(opened("skip")) == [("a a", "b a"), ("a b", "b b")]
    assert tables_made == [3, 4, 2]
    assert len(opened("skip")) == 2
    (tmp_path / "a" / ".nv-meta" / "split.yaml").write_text(
        "split_parts: {train: [0.tar]}\nexclude: [0.tar/b]"
    )
    assert pairs(opened("skip")) == [("a a", "b a")]


def test_folders_without_preparation_are_looked_at_again(
    tmp_path: Path, tables_made: list[int]
) -> None:
    crude(tmp_path / "a", "abc")

    def opened() -> list[str]:
        parts = [open_source(tmp_path / name) for name in "ab"]
        return keys(open_joined(parts, ["error", "skip"], both))

    crude(tmp_path / "b", "bc")
    assert [opened(), opened()] == [["b", "c"]] * 2
    crude(tmp_path / "b", "xb")
    os.utime(tmp_path / "b" / "0.tar", ns=(1, 1))
    assert [opened(), opened()] == [["b"]] * 2
    assert tables_made == [2, 1]


@dataclass(frozen=True)
class Letters:
    """Samples of another kind, as far as a join asks for them."""

    path: str
    split_part: str = "train"
    identity: str = "3 letters"

    def __len__(self) -> int:
        return 3

    def key(self, i: int) -> str:
        return Path(self.path).read_text()[i]


def test_other_kinds_of_samples_are_told_apart_by_their_file(
    tmp_path: Path, tables_made: list[int]
) -> None:
    a, letters = crude(tmp_path / "a", "xyz"), tmp_path / "letters"
    for number, (text, column) in enumerate({"zx?": [1, -1, 0], "?yx": [2, 1, -1]}.items()):
        letters.write_text(text)
        os.utime(letters, ns=(number, number))
        for _ in range(2):
            part: Any = Letters(str(letters))
            joined = open_joined([a, part], ["error", "none"], both)
            assert joined._rows[:, 1].tolist() == column
    assert tables_made == [3, 3]


@pytest.mark.parametrize("damage", [b"", b"\x93NUMPY", b"garbage" * 50, "cut", "other", "pickle"])
@pytest.mark.parametrize("index", ["beside", "cache"])
def test_a_broken_table_is_made_again(
    tmp_path: Path, tables_made: list[int], damage: Any, index: str
) -> None:
    place = None if index == "cache" else str(tmp_path / "join")
    parts = [crude(tmp_path / "a", "abcd"), crude(tmp_path / "b", "dcba")]
    table = Path(open_joined(parts, ["error"] * 2, both, index=place).table)
    if damage == "cut":
        table.write_bytes(table.read_bytes()[:-1])
    elif damage in ("other", "pickle"):
        np.save(table, np.zeros(3) if damage == "other" else np.array([{}]), allow_pickle=True)
    else:
        table.write_bytes(damage)
    joined = open_joined(parts, ["error"] * 2, both, index=place)
    assert joined.table == str(table)
    assert joined._rows.tolist() == [[0, 3], [1, 2], [2, 1], [3, 0]]
    assert tables_made == [4, 4]


def test_where_the_index_cannot_be_written(tmp_path: Path, tables_made: list[int]) -> None:
    parts = [crude(tmp_path / "a", "ab"), crude(tmp_path / "b", "ba")]
    (tmp_path / "file").touch()
    for _ in range(2):
        joined = open_joined(parts, ["error"] * 2, both, index=str(tmp_path / "file" / "join"))
        assert Path(joined.table).parent == Path(os.environ["ENERGON_FN_CACHE"])
        assert keys(joined) == ["a", "b"]
    assert tables_made == [2]


def test_nothing_is_left_of_a_join_that_fails(tmp_path: Path) -> None:
    a, b = crude(tmp_path / "a", "ab"), crude(tmp_path / "b", "a")
    with pytest.raises(DatasetError, match=r"1 of 2 samples .* no match"):
        open_joined([a, b], ["error"] * 2, both, index=str(tmp_path / "cache" / "join"))
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_relative_index_stays_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = crude(tmp_path / "a", "ab")
    monkeypatch.chdir(tmp_path)
    joined = open_joined([a, a], ["error"] * 2, both, index="join.npy")
    monkeypatch.chdir("/")
    assert keys(joined) == ["a", "b"]


def test_it_travels_without_the_table(tmp_path: Path) -> None:
    small, large = (
        open_joined(
            [crude(tmp_path / f"{name}{count}", keys) for name in "ab"], ["error"] * 2, Pair
        )
        for count, keys in ((1, "x"), (2000, "".join(map(chr, range(1000, 3000)))))
    )
    assert keys(large)[-1] == chr(2999)
    assert len(pickle.dumps(large)) < len(pickle.dumps(small)) + 100
    other = pickle.loads(pickle.dumps(large))
    assert other == large
    assert keys(other) == keys(large)
    mapped: Any = other._rows
    while isinstance(mapped.base, np.ndarray):
        mapped = mapped.base
    assert isinstance(mapped, np.memmap)


def _opened(folder: str) -> list[list[int]]:
    parts = [open_source(os.path.join(folder, name)) for name in "ab"]
    rows: list[list[int]] = open_joined(parts, ["error", "skip"], both)._rows.tolist()
    return rows


def test_several_processes_open_it_at_once(tmp_path: Path) -> None:
    for name, own in (("a", "abcdef"), ("b", "fedx")):
        crude(tmp_path / name, own)
    with multiprocessing.get_context("fork").Pool(4) as pool:
        found = pool.map(_opened, [str(tmp_path)] * 8, chunksize=1)
    assert found == [[[3, 2], [4, 1], [5, 0]]] * 8


def test_a_table_that_is_gone(tmp_path: Path) -> None:
    a = crude(tmp_path / "a", "ab")
    joined = open_joined([a, a], ["error"] * 2, both)
    os.unlink(joined.table)
    with pytest.raises(DatasetError, match=rf"{joined.table} cannot be used: .*open the dataset"):
        joined.load(0)


def test_its_identity_is_what_is_joined(tmp_path: Path) -> None:
    """Wherever the table lies; and when as many samples match, but others, it is another one."""
    a = prepared(tmp_path / "a", "abcd")
    found = set()
    for turn, own in enumerate(("bcd", "bcd", "dcb", "acd")):
        shutil.rmtree(tmp_path / "b", ignore_errors=True)
        b = prepared(tmp_path / "b", own)
        joined = open_joined([a, b], ["error", "skip"], Pair, index=str(tmp_path / f"{turn}"))
        assert joined.identity.startswith("3 samples of 'train' joined of 2 datasets, ")
        found.add(joined.identity)
        assert len(found) == max(turn, 1)
    assert joined.cut(0, 2).identity not in found
    assert joined.cut(0, 3).identity in found


# ------------------------------------------------------------------------- the published package


THEIR_JOINER = """
from typing import Any
from megatron.energon import Sample, edataclass

@edataclass
class Pair(Sample):
    first: Any
    second: Any

    @staticmethod
    def from_joined(first, second):
        return Pair.derive_from(first, first=first.text, second=second and second.text)
"""
THEIR_SCRIPT = """
import io, json, sys
from contextlib import redirect_stdout
from importlib.metadata import entry_points
from megatron.energon import WorkerConfig, get_loader, get_val_dataset, reraise_exception

found = []
with redirect_stdout(io.StringIO()):
    energon, = entry_points(group="console_scripts", name="energon")
    workers = WorkerConfig(
        rank=0, world_size=1, num_workers=0, global_error_handler=reraise_exception)
    for path in sys.argv[1:]:
        sys.argv = ["energon", "prepare", "--non-interactive", path]
        ended = None
        try:
            energon.load()()
        except SystemExit as end:
            ended = str(end.code or "") or None
        except Exception as error:
            ended = str(error)
        rows = []
        try:
            if ended is None:
                dataset = get_val_dataset(
                    path, split_part="train", batch_size=None, worker_config=workers)
                for s in get_loader(dataset):
                    own = [s.first, s.second] if hasattr(s, "first") else [s.text]
                    rows.append([s.__key__, s.__subflavors__, own])
        except Exception as error:
            ended = str(error)
        found.append([rows, ended])
print(json.dumps(found))
"""
PAIR = {"__module__": "their_joiner", "__class__": "Pair"}
TEXT = {"__module__": "megatron.energon", "__class__": "TextSample"}
ALL, NAMED = ("all", "error"), ("first", "second")
# name: (the datasets after the first one with their modes, names, joiner, keys)
JOINS: dict[str, tuple[list[tuple[str, str]], Any, Any, str]] = {
    "error": ([ALL], None, Pair, "acdef"),
    "error by name": ([ALL], NAMED, Pair, "acdef"),
    "skip": ([("some", "skip")], None, Pair, "acdf"),
    "skip by name": ([("some", "skip")], NAMED, Pair, "acdf"),
    "none": ([("some", "none")], None, Pair, "acdef"),
    "none by name": ([("some", "none")], NAMED, Pair, "acdef"),
    "missing": ([("some", "error")], None, Pair, ""),
    "excluded": ([("excluded", "skip")], None, Pair, "acef"),
    "merged": ([ALL, ("some", "skip"), ALL], None, TextSample, "acdf"),
    "error then skip": ([("some", "error"), ("some", "skip")], None, TextSample, "acdf"),
}


@pytest.fixture(scope="module")
def theirs(
    published_python: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    root = tmp_path_factory.mktemp("joins")
    prepared(root / "primary", "abc", "def", exclude=["0.tar/b"], subflavors="{of: primary}")
    prepared(root / "all", "fedc", "ba", subflavors="{of: all, more: 1}")
    prepared(root / "some", "xfdca")
    prepared(root / "excluded", "fe", "dcba", exclude=["1.tar/d"])
    (root / "their_joiner.py").write_text(THEIR_JOINER)
    paths = []
    for name, (others, names, joiner, _) in JOINS.items():
        parts = [{"path": "primary"}, *({"path": o, "nonmatch": mode} for o, mode in others)]
        content = {
            "__module__": "megatron.energon",
            "__class__": "MetadatasetV2",
            "splits": {
                "train": {
                    "join": dict(zip(names, parts, strict=True)) if names else parts,
                    "joiner": PAIR if joiner is Pair else TEXT,
                }
            },
        }
        paths.append(root / f"{name}.yaml")
        paths[-1].write_text(json.dumps(content))  # which is yaml
    ran = subprocess.run(
        [published_python, "-W", "ignore", "-c", THEIR_SCRIPT, *map(str, paths)],
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    return root, dict(zip(JOINS, json.loads(ran.stdout.splitlines()[-1]), strict=True))


@pytest.mark.parametrize("name", JOINS)
def test_the_published_package_joins_the_same(
    theirs: tuple[Path, dict[str, Any]], name: str
) -> None:
    root, found = theirs
    rows, ended = found[name]
    others, names, joiner, own_keys = JOINS[name]
    parts = [open_source(root / folder) for folder in ("primary", *(o for o, _ in others))]
    modes = ["error", *(mode for _, mode in others)]
    if name == "missing":
        assert "missing sample" in ended
        with pytest.raises(DatasetError, match=r"1 of 5 samples .* 'e'"):
            open_joined(parts, modes, joiner, names)
        return
    ours = [
        [s.__key__, s.__subflavors__, [s.first, s.second] if joiner is Pair else [s.text]]
        for s in made(open_joined(parts, modes, joiner, names))
    ]
    assert "".join(row[0] for row in ours) == own_keys
    if "none" in modes:  # which the published one writes, and cannot read
        assert "No valid files found" in ended
        assert rows == ours[:3]
        assert ours[3][2] == ["primary e", None]
    else:
        assert ended is None
        assert rows == ours
