"""What metadatasets are made of, and the indexes of their joins."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import shards, write_tar

from energon_fn import blend, blend_epochized, concat, join, subset, using
from energon_fn.disk import files
from energon_fn.disk.prepare import prepare_dataset, write_dataset_yaml
from energon_fn.errors import DatasetError
from energon_fn.recipes.compose import Blend, Epochized, Join, Subset, Using
from energon_fn.recipes.opening import open_recipe, prepare_metadataset
from energon_fn.recipes.outline import Node, outline

HEAD = "__module__: megatron.energon\n__class__: MetadatasetV2\nsplits:\n"
JOINER = "joiner: {__module__: no_such_module, __class__: Pair}"


def write(file: Path, **splits: str) -> Path:
    """A metadataset with these splits."""
    text = HEAD
    for split, block in splits.items():
        text += f"  {split}:\n" + "".join(f"    {line}\n" for line in block.splitlines())
    file.write_text(text)
    return file


def crude(folder: Path, *keys: Sequence[str]) -> Path:
    """Prepared shards of samples with these keys."""
    names = [f"{number}.tar" for number in range(len(keys))]
    for name, inside in zip(names, keys, strict=True):
        write_tar(
            folder / name, [(key, {"txt": f"{folder.name} {key}".encode()}) for key in inside]
        )
    prepare_dataset(folder, names, split_parts_ratio=[("train", 1)], workers=1, shuffle_seed=None)
    write_dataset_yaml(folder, "CrudeWebdataset")
    return folder


def shape(node: Node) -> Any:
    """A node as nested lists: the name of what it is, or a path, and what is inside."""
    if not node.inside:
        return node.recipe
    return [type(node.recipe).__name__, *map(shape, node.inside)]


def test_recipes_of_all_kinds() -> None:
    recipe = blend(
        [
            (concat(["/a", subset(0, 5)("/b")]), 3),
            (
                using(blend_epochized([("/c", 2), (join(["/d", "/e"], dict), 1)]), aux={"x": "/x"}),
                1,
            ),
        ]
    )
    tree = outline(using(recipe, subflavors={"s": 1}), "val")
    assert shape(tree) == [
        "Blend",
        ["Concat", "/a", "/b"],
        ["Epochized", "/c", ["Join", "/d", "/e"]],
    ]
    assert [node.recipe for node in tree if not node.inside] == ["/a", "/b", "/c", "/d", "/e"]
    assert all(node.said.split_part == "val" for node in tree)
    assert all(node.said.subflavors == {"s": 1} for node in tree)
    by_path = {node.recipe: node for node in tree if isinstance(node.recipe, str)}
    assert by_path["/b"].own == (Subset("/b", 0, 5),)
    assert [by_path[path].said.aux for path in ("/a", "/c", "/e")] == [{}, {"x": "/x"}, {"x": "/x"}]
    assert [len(node.own) for node in tree] == [1, 0, 0, 1, 1, 0, 0, 0, 0]


def test_metadatasets_are_followed(tmp_path: Path) -> None:
    inner = write(
        tmp_path / "inner.yaml",
        train="blend: [{path: ./a, subflavors: {who: inner}}, {path: /b, split_part: val}]",
        val="path: ./c\ndataset_config: crude.yaml",
    )
    outer = write(
        tmp_path / "outer.yaml",
        train="path: inner.yaml\nsubflavors: {who: outer, more: 1}",
        val="path: outest.yaml",
        test="path: inner.yaml\nsplit_part: val\nsubset: {range: [0%, 50%]}",
    )
    outest = write(tmp_path / "outest.yaml", val="path: inner.yaml\nsplit_part: train")
    train = outline(outer, "train")
    assert (shape(train), train.files) == (
        ["Blend", str(tmp_path / "a"), "/b"], (str(outer), str(inner)),
    )  # fmt: skip
    assert train.said.subflavors == {"who": "outer", "more": 1}
    assert [(node.said.split_part, node.said.subflavors) for node in train.inside] == [
        ("train", {"who": "inner", "more": 1}), ("val", {"who": "outer", "more": 1}),
    ]  # fmt: skip
    val = outline(outer, "val")
    assert (shape(val), val.files) == (shape(train), (str(outer), str(outest), str(inner)))
    test = outline(outer, "test")
    assert (shape(test), test.said.dataset_config) == (str(tmp_path / "c"), "crude.yaml")
    assert [type(own) for own in test.own] == [Using, Subset, Using]


def test_it_agrees_with_what_is_opened(tmp_path: Path) -> None:
    """The single datasets come in the same order."""
    for name in "abc":
        shards(tmp_path / name, [3])
    write(tmp_path / "in.yaml", train="concat: [{path: c}, {path: a}]")
    file = write(
        tmp_path / "m.yaml",
        train="blend: [{path: b}, {path: in.yaml}, {join: [{path: a}, {path: c}], " + JOINER + "}]",
    )
    opened = open_recipe(file, make=False)
    joins = [node for node in outline(file) if isinstance(node.recipe, Join)]
    within = [one for node in joins for one in node.inside]
    leaves = [node for node in outline(file) if not node.inside and node not in within]
    assert [source.path for source in opened.sources] == [
        *(node.recipe for node in leaves), joins[0].inside[0].recipe,
    ]  # fmt: skip


def test_what_leads_to_itself_is_told(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", train="blend: [{path: b.yaml}]")
    write(tmp_path / "b.yaml", train="concat: [{path: /data}, {path: a.yaml}]")
    with pytest.raises(DatasetError, match=r"leads to itself: .*a.yaml -> .*b.yaml -> .*a.yaml$"):
        outline(tmp_path / "a.yaml")
    # One that is there twice does not.
    twice = write(tmp_path / "c.yaml", train="concat: [{path: d.yaml}, {path: d.yaml}]")
    write(tmp_path / "d.yaml", train="path: /data")
    assert shape(outline(twice)) == ["Concat", "/data", "/data"]


def test_numbers_are_where_the_recipe_has_them(tmp_path: Path) -> None:
    file = write(
        tmp_path / "m.yaml",
        train="blend: [{weight: 3, path: /a}, {weight: 1, path: /b}]",
        val="blend_epochized: [{repetitions: 0.5, path: /a}]",
    )
    train, val = outline(file, "train").recipe, outline(file, "val").recipe
    assert isinstance(train, Blend)
    assert isinstance(val, Epochized)
    assert [weight for _, weight in train.parts] == [3, 1]
    assert [float(times) for _, times in val.parts] == [0.5]


# ------------------------------------------------------------------------------------- preparation


@pytest.fixture
def joins(tmp_path: Path) -> Path:
    """A metadataset with a join in each of two splits, and one in another file."""
    crude(tmp_path / "a", "abc", "def")
    crude(tmp_path / "b", "fedcba")
    crude(tmp_path / "c", "xcd")
    join_of = "join: [{path: a}, {path: OTHER, nonmatch: skip}]\n" + JOINER
    write(tmp_path / "inner.yaml", train=join_of.replace("OTHER", "c"))
    return write(
        tmp_path / "m.yaml",
        train="blend:\n- {path: inner.yaml}\n- "
        + join_of.replace("OTHER", "b").replace("\n", "\n  "),
        val=join_of.replace("OTHER", "b") + "\nsplit_part: train",
        test="path: c\nsplit_part: train",
    )  # fmt: skip


def beside(file: Path) -> list[str]:
    return sorted(path.name for path in Path(f"{file}.cache").glob("*"))


def test_every_join_gets_its_index(joins: Path) -> None:
    prepared = prepare_metadataset(joins)
    assert {split: list(map(len, opened.sources)) for split, opened in prepared.splits.items()} == {
        "train": [2, 6], "val": [6], "test": [3],
    }  # fmt: skip
    assert (len(prepared.made), prepared.kept, prepared.removed) == (3, (), ())
    inner = joins.with_name("inner.yaml")
    assert sorted(Path(table).name for table in prepared.made) == sorted(
        beside(joins) + beside(inner)
    )
    assert (len(beside(joins)), len(beside(inner))) == (2, 1)
    before = [os.stat(table).st_mtime_ns for table in prepared.made]
    again = prepare_metadataset(str(joins))
    assert (again.made, sorted(again.kept), again.removed) == ((), sorted(prepared.made), ())
    assert [os.stat(table).st_mtime_ns for table in prepared.made] == before


def test_what_is_out_of_date_is_removed(joins: Path) -> None:
    first = prepare_metadataset(joins)
    foreign = [joins.with_name("m.yaml.cache") / name for name in ("join_index_12.bin", "my.npy")]
    for path in foreign:
        path.touch()
    crude(joins.parent / "b", "fedcb")
    second = prepare_metadataset(joins)
    ours = {table for table in first.made if "m.yaml.cache" in table}
    assert ({*second.removed}, len(second.made)) == (ours, 2)
    assert {*second.kept} == {*first.made} - ours  # that of the other file
    assert beside(joins) == sorted(
        [Path(table).name for table in second.made] + [path.name for path in foreign]
    )


def test_all_are_made_anew(joins: Path) -> None:
    first = prepare_metadataset(joins)
    ours = [table for table in first.made if "m.yaml.cache" in table]
    Path(ours[0]).write_bytes(b"broken")
    again = prepare_metadataset(joins, anew=True)
    assert (sorted(again.made), again.removed) == (sorted(ours), ())
    assert Path(ours[0]).stat().st_size > 100


def test_where_nothing_can_be_written_they_are_in_the_cache(joins: Path) -> None:
    blocked = joins.with_name("m.yaml.cache")
    blocked.write_text("a file, where the folder would be")
    prepared = prepare_metadataset(joins)
    cached = [table for table in prepared.made if Path(table).parent == files.cache_folder()]
    assert (len(prepared.made), len(cached)) == (2, 1)  # both splits have the same join
    again = prepare_metadataset(joins)
    assert (again.made, sorted(again.kept), again.removed) == ((), sorted(prepared.made), ())


def test_neither_joiner_nor_code_of_datasets_is_needed(joins: Path) -> None:
    meta = joins.parent / "a/.nv-meta"
    (meta / "dataset.yaml").write_text(
        "sample_type: {__module__: megatron.energon, __class__: TextSample}\n"
        "sample_loader: sample_loader.py:sample_loader\n"
    )
    (meta / "sample_loader.py").write_text("raise SystemExit('this must not run')\n")
    assert len(prepare_metadataset(joins).made) == 3
    with pytest.raises(DatasetError, match="runs Python code"):
        open_recipe(joins)


def test_a_join_that_misses_samples_is_told(joins: Path) -> None:
    write(joins, train="join: [{path: a}, {path: c}]\n" + JOINER)
    with pytest.raises(DatasetError, match=r"m.yaml, line 4: 4 of 6 samples of .*/a have no match"):
        prepare_metadataset(joins)


def test_a_file_in_the_metadata_folder_is_no_metadataset(tmp_path: Path) -> None:
    file = tmp_path / ".nv-meta" / "dataset.yaml"
    with pytest.raises(DatasetError, match=r"dataset.yaml does not exist: check the path"):
        outline(file)
    file.parent.mkdir()
    file.touch()
    with pytest.raises(DatasetError, match=f"give the dataset's folder, {tmp_path}$"):
        outline(str(file))


def test_stores_for_a_part_of_a_join_are_refused(joins: Path) -> None:
    a, b = (str(joins.parent / name) for name in "ab")
    stores = {"images": "filesystem:///"}
    for part in (using(a, aux=stores), subset("0%", "50%")(using(using(a), aux=stores))):
        for parts in ([part, b], [b, part]):
            with pytest.raises(
                DatasetError, match=r"aux \(images\).*using\(join\(...\), aux=...\)"
            ):
                open_recipe(join(parts, dict, nonmatch="skip"), make=False)
    opened = open_recipe(using(join([a, b], dict), aux=stores), make=False)
    assert [list(aux) for aux in opened.aux] == [["images"]]
    write(joins, train="join: [{path: a}, {path: b, aux: {images: 'filesystem://a'}}]\n" + JOINER)
    with pytest.raises(DatasetError, match=r"m.yaml, line \d+: aux \(images\) is given to a part"):
        open_recipe(joins, make=False)
