"""Metadatasets: the YAML files of the published documentation and more, read into recipes."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import write_tar
from hypothesis import given, settings
from hypothesis import strategies as st

from energon_fn.disk.prepare import prepare_dataset, write_dataset_yaml
from energon_fn.errors import DatasetError
from energon_fn.recipes.compose import (
    Blend,
    Concat,
    Epochized,
    Join,
    Recipe,
    Subset,
    Using,
    blend,
    blend_epochized,
    concat,
    join,
    subset,
    using,
)
from energon_fn.recipes.metadataset import is_metadataset, read_metadataset, splits_of

V1 = "__module__: megatron.energon\n__class__: Metadataset\n"
V2 = "__module__: megatron.energon\n__class__: MetadatasetV2\n"
JOINER = "joiner: {__module__: megatron.energon, __class__: CaptioningSample}"
CAPTIONING = {"__module__": "megatron.energon", "__class__": "CaptioningSample"}


def written(folder: Path, text: str, name: str = "m.yaml") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def read(folder: Path, body: str, split: str = "train", head: str = V2) -> Using:
    """The recipe of a split, as :func:`bare` shows it; the body is what stands below splits."""
    recipe = bare(read_metadataset(written(folder, f"{head}splits:\n{body}"), split), folder)
    assert isinstance(recipe, Using)
    return recipe


def bare(recipe: Recipe, folder: Path | str) -> Recipe:
    """The same with paths from the folder, without where it is written and tables are kept."""
    match recipe:
        case str():
            return recipe.removeprefix(f"{folder}/")
        case Using():
            aux = {name: url.replace(f"{folder}/", "") for name, url in recipe.aux.items()}
            return replace(recipe, inner=bare(recipe.inner, folder), aux=aux, where="")
        case Subset():
            return replace(recipe, inner=bare(recipe.inner, folder))
        case Blend():
            return replace(recipe, parts=tuple((bare(part, folder), w) for part, w in recipe.parts))
        case Epochized():
            return replace(recipe, parts=tuple((bare(part, folder), n) for part, n in recipe.parts))
        case Concat():
            return replace(recipe, parts=tuple(bare(part, folder) for part in recipe.parts))
        case Join():
            parts = tuple(bare(part, folder) for part in recipe.parts)
            return replace(recipe, parts=parts, index=None)
    raise AssertionError(recipe)


def insides(recipe: Recipe) -> Iterator[Recipe]:
    """A recipe and all that is in it, each before what it holds."""
    yield recipe
    match recipe:
        case Using() | Subset():
            yield from insides(recipe.inner)
        case Blend() | Epochized():
            for part, _ in recipe.parts:
                yield from insides(part)
        case Concat() | Join():
            for part in recipe.parts:
                yield from insides(part)


# ----------------------------------------------------------------------------- what is documented

SHORT = {"augmentation_type": "small_images", "text_length": "short"}
LARGE = {"augmentation_type": "large_images", "text_length": "short"}

# The files in the documents, laid out more tightly, and what their splits are.
DOCUMENTED: dict[str, tuple[str, dict[str, Using]]] = {
    "Metadataset": (
        """\
  train:
    # Mix the following datasets
    blend:
      - weight: 5
        path: ./coco
      - weight: 2
        path: ./coyo
      - weight: 1
        path: ./other
  val:
    path: ./coco
  test:
    path: ./coyo
""",
        {
            "train": using(blend([(using("coco"), 5), (using("coyo"), 2), (using("other"), 1)])),
            "val": using("coco"),
            "test": using("coyo"),
        },
    ),
    "Metadataset, split parts and subflavors": (
        """\
  train:
    blend:
      - weight: 5
        path: ./coco
        subflavors: {augmentation_type: small_images, text_length: short}
      - weight: 2
        path: ./coyo
        split_part: train
        subflavors: {augmentation_type: large_images, text_length: short}
      - weight: 1
        path: ./coyo
        split_part: val  # <-- the val set of coyo
  val:
    path: ./coco
    subflavor: small_images
    subflavors: {augmentation_type: small_images, text_length: short}
""",
        {
            "train": using(
                blend(
                    [
                        (using("coco", subflavors=SHORT), 5),
                        (using("coyo", split_part="train", subflavors=LARGE), 2),
                        (using("coyo", split_part="val"), 1),
                    ]
                )
            ),
            "val": using("coco", subflavors={"__subflavor__": "small_images"} | SHORT),
        },
    ),
    "Epochized Blending": (
        """\
  train:
    blend_epochized:
      - repetitions: 5
        path: ./coco
      - repetitions: 2
        path: ./coyo
      - repetitions: 1
        path: ./coyo
        split_part: val
""",
        {
            "train": using(
                blend_epochized(
                    [(using("coco"), 5), (using("coyo"), 2), (using("coyo", split_part="val"), 1)]
                )
            )
        },
    ),
    "Dataset Subsets": (
        """\
  train:
    path: ./coyo
    subset: {range: ["0%", "80%"]}
  val:
    path: ./coyo
    split: train
    subset: {range: [80%, 100%]}
  test:
    path: ./coyo
    subset: {range: [1422, end]}
""",
        {
            "train": using(subset("0%", "80%")("coyo")),
            "val": using(subset("80%", "100%")("coyo"), split_part="train"),
            "test": using(subset(1422, "end")("coyo")),
        },
    ),
    "Dataset Subsets, nested": (
        """\
  train:
    subset: {range: [0%, 50%]}
    blend:
      - weight: 1.0
        path: ./coco
        subset:
          # Take exactly 1000 samples
          range: [0, 1000]
      - weight: 1.0
        path: ./coyo
""",
        {
            "train": using(
                subset("0%", "50%")(
                    blend([(using(subset(0, 1000)("coco")), 1), (using("coyo"), 1)])
                )
            )
        },
    ),
    "Joining Datasets": (
        f"""\
  train:
    join:
      - path: ds1
      - path: ds2
    {JOINER}
""",
        {"train": using(join([using("ds1"), using("ds2")], CAPTIONING))},
    ),
    "Joining Datasets, nonmatch": (
        f"""\
  train:
    join:
      - path: ds1
      - path: ds2
        nonmatch: skip
      - path: ds3
        nonmatch: none
    {JOINER}
""",
        {
            "train": using(
                join(
                    [using("ds1"), using("ds2"), using("ds3")],
                    CAPTIONING,
                    nonmatch={1: "skip", 2: "none"},
                )
            )
        },
    ),
    "Joining Datasets, extensive": (
        """\
  train:
    blend:
      - weight: 1
        join:
          - path: ds1
            dataset_config: dataset.yaml  # If override is needed
          - path: ds2
            dataset_config: dataset.yaml
            subflavors:
              ds2_extra: 2
            split_config: split.yaml
        joiner:
          __module__: my_module
          __class__: JoinedSample
        split_config: split.yaml
        split_part: train
        subflavor: ds1
        subflavors:
          source: metadataset.yaml
""",
        {
            "train": using(
                blend(
                    [
                        (
                            using(
                                join(
                                    [
                                        using("ds1", dataset_config="dataset.yaml"),
                                        using(
                                            "ds2",
                                            dataset_config="dataset.yaml",
                                            split_config="split.yaml",
                                            subflavors={"ds2_extra": 2},
                                        ),
                                    ],
                                    {"__module__": "my_module", "__class__": "JoinedSample"},
                                ),
                                split_config="split.yaml",
                                split_part="train",
                                subflavors={"__subflavor__": "ds1", "source": "metadataset.yaml"},
                            ),
                            1,
                        )
                    ]
                )
            )
        },
    ),
    "Crude Datasets and Auxiliary Data": (
        """\
  train:
    path: ./my_pimary_ds
    aux:
      foo_bar_source: ./aux_ds123
      fs_source: filesystem://./images
      fs_source_abs: filesystem:///absolute/path/to/images
      byte_range_source: byterange://./blobs
    subflavors:
      crude_type: my_dual_aux_example
""",
        {
            "train": using(
                "my_pimary_ds",
                aux={
                    "foo_bar_source": "aux_ds123",
                    "fs_source": "filesystem://images",
                    "fs_source_abs": "filesystem:///absolute/path/to/images",
                    "byte_range_source": "byterange://blobs",
                },
                subflavors={"crude_type": "my_dual_aux_example"},
            )
        },
    ),
}


@pytest.mark.parametrize("title", DOCUMENTED)
def test_the_documented_files(tmp_path: Path, title: str) -> None:
    body, expected = DOCUMENTED[title]
    for split, recipe in expected.items():
        named = replace(recipe, split_part=recipe.split_part or split)
        assert read(tmp_path, body, split) == named
    assert splits_of(tmp_path / "m.yaml") == list(expected)


@pytest.mark.parametrize("head", [V1, "", V1.replace("megatron.energon", "energon_fn.x")])
def test_the_first_version(tmp_path: Path, head: str) -> None:
    body = """\
  train:
    datasets:
    - {path: coco, weight: 2, subflavor: a, subflavors: {b: 1}}
    - {path: coyo, split_part: val, dataset_config: d.yaml, split_config: s.yaml}
  val:
    datasets: [{path: coco, shuffle_over_epochs_multiplier: 1}]
"""
    coyo = using("coyo", split_part="val", dataset_config="d.yaml", split_config="s.yaml")
    coco = using("coco", subflavors={"__subflavor__": "a", "b": 1})
    found = read(tmp_path, body, head=head)
    assert found == using(blend([(coco, 2), (coyo, 1)]), split_part="train")
    assert read(tmp_path, body, "val", head).inner == blend([(using("coco"), 1)])


def test_the_split_part_is_that_of_the_split_unless_said(tmp_path: Path) -> None:
    body = "  train: {path: a}\n  val: {path: a, split_part: train}\n  odd: {blend: [{path: a}]}\n"
    assert [read(tmp_path, body, split).split_part for split in ("train", "val", "odd")] == [
        "train",
        "train",
        "odd",
    ]
    inner = read(tmp_path, body, "odd").inner
    assert inner == blend([(using("a"), 1)])  # whoever opens it hands the outer one down


# ---------------------------------------------------------------------------- blocks and options


def test_blocks_nest(tmp_path: Path) -> None:
    body = f"""\
  train:
    concat:
    - blend:
      - weight: 0.5
        blend_epochized:
        - {{path: a, repetitions: 0.7}}
        - {{concat: [{{path: b}}]}}
      - path: other.yaml
    - join:
        image: {{path: c}}
        caption: {{nonmatch: skip, concat: [{{path: d}}, {{path: e}}]}}
      {JOINER}
"""
    inner = blend_epochized([(using("a"), 0.7), (using(concat([using("b")])), 1)])
    assert inner.parts[0][1] == Fraction(7, 10)
    joined = join(
        {"image": using("c"), "caption": using(concat([using("d"), using("e")]))},
        CAPTIONING,
        nonmatch={"caption": "skip"},
    )
    blended = blend([(using(inner), 0.5), (using("other.yaml"), 1)])
    assert read(tmp_path, body).inner == concat([using(blended), using(joined)])


OPTIONS = """\
split_part: val, split_config: s.yaml, dataset_config: d.yaml, subset: {range: [0%, 50%]},
 subflavors: {a: {b: [1]}, 2: c}, aux: {more: ../more}"""


@pytest.mark.parametrize(
    "block",
    [
        "path: x",
        "blend: [{path: x}]",
        "blend_epochized: [{path: x}]",
        "concat: [{path: x}]",
        f"join: [{{path: x}}], {JOINER}",
    ],
)
def test_options_go_with_every_block(tmp_path: Path, block: str) -> None:
    folder = tmp_path / "folder"
    plain = read(folder, f"  train: {{{block}}}")
    expected = using(
        subset("0%", "50%")(plain.inner),
        split_part="val",
        dataset_config="d.yaml",
        split_config="s.yaml",
        subflavors={"a": {"b": [1]}, "2": "c"},
        aux={"more": f"{tmp_path}/more"},
    )
    assert read(folder, f"  train: {{{block}, {OPTIONS}}}") == expected
    inside = read(folder, f"  train: {{concat: [{{{block}, {OPTIONS}}}]}}").inner
    assert inside == concat([expected])


def test_null_is_as_if_it_was_not_there(tmp_path: Path) -> None:
    options = ("split_part", "split_config", "dataset_config", "subflavors", "aux", "subset")
    nulls = ", ".join(f"{option}: null" for option in options)
    assert read(tmp_path, f"  train: {{path: a, {nulls}}}") == using("a", split_part="train")


def test_numbers(tmp_path: Path) -> None:
    """1e-3 is a text in YAML 1.1, and a number to the published package."""
    body = "  train: {%s: [%s]}"
    for text, number in {"1e-3": 0.001, "5": 5, "0.1": 0.1, "1.0e+2": 100, "2E2": 200}.items():
        found = read(tmp_path, body % ("blend", f"{{path: a, weight: {text}}}")).inner
        assert found == blend([(using("a"), number)])
        found = read(tmp_path, body % ("blend_epochized", f"{{path: a, repetitions: {text}}}"))
        assert found.inner == blend_epochized([(using("a"), number)])


def test_aliases_stand_for_what_they_name(tmp_path: Path) -> None:
    body = "  train: &all\n    blend: [{path: a, weight: 3}]\n  val: *all\n"
    body += "  test: {<<: *all, split_part: x}\n"
    for split, part in (("train", "train"), ("val", "val"), ("test", "x")):
        assert read(tmp_path, body, split) == using(blend([(using("a"), 3)]), split_part=part)


@pytest.mark.parametrize("multiplier", ["2", "-1", "null"])
def test_a_multiplier_of_one_dataset_is_ignored_aloud(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, multiplier: str
) -> None:
    option = "shuffle_over_epochs_multiplier"
    body = "  train:\n    blend:\n    - path: a\n      %s: %s\n    - {path: b, %s: 1}\n"
    with caplog.at_level(logging.WARNING):
        assert read(tmp_path, body % (option, "1", option)).inner
        assert not caplog.messages
        found = read(tmp_path, body % (option, multiplier, option))
    assert found.inner == blend([(using("a"), 1), (using("b"), 1)])
    (message,) = caplog.messages
    for part in (f"{tmp_path}/m.yaml", option, "line 7:", "get_train_dataset"):
        assert part in message


# ------------------------------------------------------------------------------ paths and places


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("a", "FOLDER/a"),
        ("./a/", "FOLDER/a"),
        ("../a/./b", "ABOVE/a/b"),
        ("/a/b", "/a/b"),
        ("shard_{000..009}.tar", "FOLDER/shard_{000..009}.tar"),
        ("train-*.tar", "FOLDER/train-*.tar"),
        ("lines.jsonl", "FOLDER/lines.jsonl"),
        ("more/m.yaml", "FOLDER/more/m.yaml"),
        ("äü ~", "FOLDER/äü ~"),
    ],
)
def test_paths_are_from_the_folder_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, path: str
) -> None:
    folder = tmp_path / "folder"
    written(folder, V2 + yaml.safe_dump({"splits": {"train": {"path": text, "aux": {"x": text}}}}))
    monkeypatch.chdir(folder)
    for file in (folder / "m.yaml", "m.yaml", "../folder/m.yaml"):
        recipe = read_metadataset(file, "train")
        expected = path.replace("FOLDER", str(folder)).replace("ABOVE", str(tmp_path))
        assert isinstance(recipe, Using)
        assert recipe.inner == recipe.aux["x"] == expected


@pytest.mark.parametrize(
    "path", ["s3://bucket/x", "msc://profile/x", "dss://x", "file:///data/x", "byterange+msc://x"]
)
def test_only_local_paths(tmp_path: Path, path: str) -> None:
    for entry in (f"path: {path}", f"{{path: a, aux: {{path: '{path}'}}}}"):
        with pytest.raises(DatasetError) as caught:
            read(tmp_path, f"  train:\n    {entry}\n")
        for part in (f"{tmp_path}/m.yaml, line 5: path is", repr(path), "only local", "Mount"):
            assert part in str(caught.value)


def test_every_block_knows_its_line(tmp_path: Path) -> None:
    body = f"""\
  train:
    blend:
    - path: a
      weight: 5
    - weight: 1
      join:
        x: {{path: b}}
        y:
          path: c
      {JOINER}
  val: {{path: d}}
"""
    path = written(tmp_path, f"{V2}splits:\n{body}")
    lines = {}
    for split in ("train", "val"):
        for inner in insides(read_metadataset(path, split)):
            if isinstance(inner, Using):
                file, _, line = inner.where.partition(", line ")
                assert file == str(path)
                lines[type(inner.inner), str(inner.inner)[-1]] = int(line)
    assert lines == {
        (Blend, ")"): 4,
        (str, "a"): 6,
        (Join, ")"): 8,
        (str, "b"): 10,
        (str, "c"): 11,
        (str, "d"): 14,
    }


def test_joins_have_a_place_each_and_import_nothing(tmp_path: Path) -> None:
    one = "{join: [{path: a}, {path: b}], joiner: {__module__: no_such_module, __class__: X}}"
    body = f"  train: {{blend: [{one}, {{path: c}}, {one}]}}\n  val: {one}\n"
    body += f"  'te/st': {{join: {{x: {{path: a}}, y: {one}}}, {JOINER}}}\n"
    path = written(tmp_path, f"{V2}splits:\n{body}")
    joins = [
        inner
        for split in splits_of(path)
        for inner in insides(read_metadataset(path, split))
        if isinstance(inner, Join)
    ]
    cache = f"{path}.cache"  # as the published package calls it
    assert [join.index for join in joins] == [
        f"{cache}/train.blend.0.join",
        f"{cache}/train.blend.2.join",
        f"{cache}/val.join",
        f"{cache}/te%2Fst.join",
        f"{cache}/te%2Fst.join.y.join",
    ]
    assert joins[0].joiner == {"__module__": "no_such_module", "__class__": "X"}
    assert "no_such_module" not in sys.modules
    assert os.listdir(tmp_path) == ["m.yaml"]


def test_what_is_a_metadataset(tmp_path: Path) -> None:
    for name in ("m.yaml", "m.yml", "m.json", "folder/.nv-meta/dataset.yaml", "folder/m.yaml"):
        written(tmp_path, "", name)
    (tmp_path / "folder.yaml").mkdir()
    found = [p.name for p in tmp_path.rglob("*") if is_metadataset(p)]
    assert sorted(found) == ["m.yaml", "m.yaml", "m.yml"]
    assert is_metadataset(str(tmp_path / "m.yml"))
    assert not is_metadataset(tmp_path / "none.yaml")


# -------------------------------------------------------------------------------------- mistakes

PATH = "{path: a}"


@pytest.mark.parametrize(
    ("block", "message"),
    [
        # The block begins on line 4, below "train:"; ~ stands for a new line within it.
        ("blned: [{path: a}]", r"line 5: 'blned' does not belong here; .*Did you mean 'blend'\?"),
        ("path: a~blend: []", "line 4: exactly one of path, .*, but path and blend are given"),
        ("subflavors: {a: 1}", "line 4: exactly one of path, .*, but none is given"),
        ("path: a~weight: 2", "line 6: 'weight' does not belong here, but to an entry of blend;"),
        ("path: a~joiner: {}", "line 6: 'joiner' does not belong here, but beside join"),
        ("path: a~nonmatch: skip", "line 6: 'nonmatch' .*, but to a part of join"),
        ("path: a~1: 2", "line 6: 1 does not belong here"),
        ("path: 7", "line 5: path must be a path, not 7"),
        ("path: ''", "line 5: path must be a path, not ''"),
        ("path: a~split_part: 1", "line 6: split_part must be a name, not 1"),
        ("path: a~split_config: ''", "line 6: split_config must be a name, not ''"),
        ("path: a~split: x~split_part: x", "line 6: split is another name of split_part"),
        ("path: a~subflavors: [b]", r"line 6: subflavors must be a mapping, not \['b'\]"),
        ("path: a~aux: b", "line 6: aux must be a mapping from names to paths, not 'b'"),
        ("path: a~aux:~  b: 1", "line 7: b must be a path, not 1"),
        ("path: a~aux:~  b: 'filesystem://'", "line 7: b must be a path"),
        ("path: a~aux:~  b: 'filesystem://s3://c'", "line 7: b is 's3://c', but only local"),
        ("path: a~subset: [0, 1]", r"line 6: subset must be .* example\nsubset:\n  range"),
        ("path: a~subset: {range: [0%]}", "line 6: subset must be a mapping with a range"),
        ("path: a~subset: {range: [0, 1], x: 1}", "line 6: subset must be a mapping with a range"),
        ("path: a~subset:~  range: [0%, 101%]", "line 7: the bound '101%' is none: write a perc"),
        ("path: a~subset:~  range: [-1, 5]", "line 7: the bound -1 is none"),
        ("path: a~subset:~  range: [true, 5]", "line 7: the bound True is none"),
        ("path: a~subset:~  range: [50%, 20%]", "line 7: the range from 50% to 20% holds no samp"),
        ("blend: {path: a}", r"line 5: blend must be a list .* example\nblend:\n- \{path"),
        ("blend: a", "line 5: blend must be a list of datasets, not 'a'"),
        ("blend: []", "line 5: blend was given no datasets"),
        ("blend:~- path: a~- b", "line 7: entry 2 of blend must be a mapping, .* not 'b'"),
        ("blend:~- path: a~- path: b~  wieght: 2", "line 8: 'wieght' .*Did you mean 'weight'"),
        ("blend:~- path: a~  weight: 0", "line 7: the weight of 'a' is 0; it must be above 0"),
        ("blend:~- path: a~  weight: -.5", r"line 7: the weight of 'a' is -0\.5;"),
        ("blend:~- path: a~  weight: .nan", "line 7: weight must be a number above 0, not nan"),
        ("blend:~- path: a~  weight: .inf", "line 7: weight must be a number above 0, not inf"),
        ("blend:~- path: a~  weight: much", "line 7: weight must be a number .*, not 'much'"),
        ("blend:~- path: a~  weight: true", "line 7: weight must be a number .*, not True"),
        ("blend:~- path: a~  weight:", "line 7: weight must be a number above 0, not None"),
        ("blend:~- path: a~  repetitions: 2", "'repetitions' .*, but to an entry of blend_epoch"),
        ("blend_epochized:~- path: a~  repetitions: 0", "line 7: the repetitions of 'a' are 0"),
        ("blend_epochized:~- path: a~  repetitions: x", "line 7: repetitions must be a number"),
        ("blend_epochized:~- path: a~  weight: 2", "line 7: 'weight' .*, but to an entry of blend"),
        ("blend:~- concat: [{path: a, b: 1}]", "line 6: 'b' does not belong here"),
        ("blend:~- concat:~  - path: a~  - blend:~    - path: 1", "line 9: path must be a path"),
        ("concat: []", "line 5: concat was given no datasets"),
        ("concat: [a]", "line 5: entry 1 of concat must be a mapping"),
        ("join: a", "line 5: join must be a list of datasets, or a mapping from the joiner's"),
        (f"join: []~{JOINER}", "line 5: join was given no datasets"),
        (f"join: {{}}~{JOINER}", "line 5: join was given no datasets"),
        (f"join: [{PATH}]", r"line 4: join needs a joiner.* example\njoiner:\n  __module"),
        (f"join: [{PATH}]~joiner: TextSample", "line 6: joiner must be the __module__ and __class"),
        (f"join: [{PATH}]~joiner: {{__class__: X}}", "line 6: joiner must be the __module__ and"),
        (f"join:~- path: a~- path: b~  nonmatch: nope~{JOINER}",
         "line 8: nonmatch must be one of error, skip, none, not 'nope'"),
        (f"join:~  x: {PATH}~  y:~    path: b~    nonmatch: null~{JOINER}",
         "line 9: nonmatch must be one of error, skip, none, not None"),
        (f"join:~- path: a~  nonmatch: skip~- path: b~{JOINER}",
         "line 7: the first part of a join has no nonmatch"),
        (f"join:~- path: a~  weight: 2~{JOINER}", "line 7: 'weight' .*, but to an entry of blend"),
        (f"join:~- path: a~{JOINER}~nonmatch: skip", "'nonmatch' .*, but to a part of join"),
        ("path: a~shuffle_over_epochs_multiplier: 0", "line 6: .* a number of epochs, -1 or null"),
        ("path: a~shuffle_over_epochs_multiplier: 1.5", "line 6: .*, not 1.5"),
        ("datasets: [{path: a}]", "line 5: 'datasets' does not belong here; there are: path"),
    ],
)  # fmt: skip
def test_mistakes_in_a_block_are_explained(tmp_path: Path, block: str, message: str) -> None:
    body = "  train:\n    " + block.replace("~", "\n    ") + "\n"
    with pytest.raises(DatasetError, match=f"^{tmp_path}/m.yaml, .*{message}"):
        read(tmp_path, body)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must hold a mapping"),
        ("[1", "not valid yaml"),
        (V2, "m.yaml: splits must map names to what they are made of, not None. Write for"),
        (V2 + "splits: [train]", "line 3: splits must map names"),
        (V2 + "splits: {}", "line 3: there is no split 'train'; there are: none"),
        (V2 + "splits: {trian: {path: a}}", "line 3: .*; there are: trian. Did you mean 'trian'"),
        (V2 + "splits: {train: a}", "line 3: train must be a mapping, .*, not 'a'"),
        (V2 + "splits: {train: [{path: a}]}", "line 3: train must be a mapping"),
        (V2 + "splits:\n  train:", "line 4: train must be a mapping, .*, not None"),
        (V2 + "path: a", "line 3: unknown key 'path'; there are: __module__, __class__, splits"),
        ("sample_type: {}", "line 1: unknown key 'sample_type'"),
        (V2.replace("V2", "V3") + "splits: {}", "line 2: unknown class 'MetadatasetV3'.*'Metad"),
        ("__class__: 7\nsplits: {}", "line 1: unknown class 7 of metadatasets; there are"),
        ("__module__: mine\n__class__: M\nsplits: {}", "line 1: M of the module mine is not ours"),
        (
            "splits:\n  train:\n    path: a",
            r"line 3: 'path' .*datasets\. For blend, .*MetadatasetV2",
        ),
        (V1 + "splits: {train: {blend: []}}", "line 3: 'blend' .*__class__: MetadatasetV2"),
        (V1 + "splits: {train: {}}", "line 3: datasets is needed"),
        (V1 + "splits: {train: {datasets: []}}", "line 3: blend was given no datasets"),
        (V1 + "splits:\n  train:\n    datasets:\n    - path: a\n      weight: x", "line 7: weight"),
        (V2 + "splits:\n  train: &a\n    blend: [*a]", "line 4: it goes on without end: an alias"),
    ],
)
def test_mistakes_around_the_blocks_are_explained(tmp_path: Path, text: str, message: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(DatasetError, match=message) as caught:
        read_metadataset(path, "train")
    assert str(path) in str(caught.value)


def test_a_missing_file(tmp_path: Path) -> None:
    for function in (splits_of, lambda path: read_metadataset(path, "train")):
        with pytest.raises(DatasetError, match=f"{tmp_path}/none.yaml does not exist"):
            function(tmp_path / "none.yaml")


# ------------------------------------------------------------------------------------- round trip

names = st.text("ab1.%~{}: ä", min_size=1, max_size=6)
paths = names.map(lambda name: os.path.normpath(f"/{name}")).filter(lambda path: "//" not in path)
floats = st.floats(1e-6, 1e6, exclude_min=True) | st.integers(1, 10**6)
data = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text("ab1: ", max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(names, inner, max_size=2),
    max_leaves=3,
)


@st.composite
def subsets(draw: st.DrawFn, inner: Recipe) -> Recipe:
    """The recipe, or a subset of it."""
    kind = draw(st.sampled_from(["", "", "percent", "count"]))
    if not kind:
        return inner
    low, high = sorted(draw(st.lists(st.integers(0, 1000), min_size=2, max_size=2, unique=True)))
    if kind == "count":
        stop: Any = draw(st.sampled_from([high, "end"]))
        return subset(low, stop)(inner)
    return subset(f"{low / 10}%", f"{high / 10}%")(inner)


@st.composite
def blocks(draw: st.DrawFn, inner: st.SearchStrategy[Recipe]) -> Recipe:
    """A block, as a file has it, with all its options."""
    name = st.none() | names
    return using(
        draw(subsets(draw(inner))),
        split_part=draw(name),
        dataset_config=draw(name),
        split_config=draw(name),
        subflavors=draw(st.dictionaries(names, data, max_size=2)),
        aux=draw(st.dictionaries(names, paths | paths.map("filesystem://".__add__), max_size=2)),
    )


def combined(block: st.SearchStrategy[Recipe]) -> st.SearchStrategy[Recipe]:
    some = st.lists(block, min_size=1, max_size=3)
    joiner = st.fixed_dictionaries({"__module__": names, "__class__": names})

    @st.composite
    def joins(draw: st.DrawFn) -> Recipe:
        parts = draw(some)
        modes: Any = ["error", *draw(st.lists(st.sampled_from(["error", "skip", "none"]),
                                              min_size=2, max_size=2))]  # fmt: skip
        if draw(st.booleans()):
            return join(parts, draw(joiner), nonmatch=dict(enumerate(modes[: len(parts)])))
        called = draw(st.lists(names, min_size=len(parts), max_size=len(parts), unique=True))
        return join(
            dict(zip(called, parts, strict=True)),
            draw(joiner),
            nonmatch=dict(zip(called, modes, strict=False)),
        )

    return blocks(
        st.lists(st.tuples(block, floats), min_size=1, max_size=3).map(blend)
        | st.lists(st.tuples(block, floats), min_size=1, max_size=3).map(blend_epochized)
        | some.map(concat)
        | joins()
    )


recipes = st.recursive(blocks(paths), combined, max_leaves=6)


def as_yaml(recipe: Any) -> dict[str, Any]:
    """The block that stands for a recipe: what :func:`read_metadataset` undoes."""
    match recipe:
        case str():
            return {"path": recipe}
        case Using():
            options = ("split_part", "dataset_config", "split_config", "subflavors", "aux")
            given = {key: value for key in options if (value := getattr(recipe, key))}
            return as_yaml(recipe.inner) | given
        case Subset():
            return as_yaml(recipe.inner) | {"subset": {"range": [recipe.start, recipe.stop]}}
        case Blend():
            return {"blend": [as_yaml(part) | {"weight": w} for part, w in recipe.parts]}
        case Epochized():
            parts = [as_yaml(part) | {"repetitions": float(n)} for part, n in recipe.parts]
            return {"blend_epochized": parts}
        case Concat():
            return {"concat": [as_yaml(part) for part in recipe.parts]}
        case Join():
            parts = [
                as_yaml(part) | ({} if mode == "error" else {"nonmatch": mode})
                for part, mode in zip(recipe.parts, recipe.nonmatch, strict=True)
            ]
            named = parts if recipe.names is None else dict(zip(recipe.names, parts, strict=True))
            return {"join": named, "joiner": recipe.joiner}
    raise AssertionError(recipe)


@given(recipes, names, st.sampled_from([None, False]))
def test_what_is_written_is_read(recipe: Using, split: str, style: bool | None) -> None:
    content = {"__class__": "MetadatasetV2", "splits": {"other": 1, split: as_yaml(recipe)}}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "m.yaml")
        path.write_text(yaml.safe_dump(content, sort_keys=False, default_flow_style=style))
        found = read_metadataset(path, split)
    assert bare(found, folder) == replace(recipe, split_part=recipe.split_part or split)
    joins = [inner.index for inner in insides(found) if isinstance(inner, Join)]
    assert len(set(joins)) == len(joins)


anything = data | st.floats() | st.sampled_from(["50%", "end", "skip", "1e-3", "s3://a", {}, [{}]])


def places(value: Any, keys: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The keys that lead to everything in nested lists and dicts."""
    yield keys
    inside = value.items() if isinstance(value, dict) else ()
    for key, inner in enumerate(value) if isinstance(value, list) else inside:
        yield from places(inner, (*keys, key))


@settings(max_examples=50)
@given(st.data(), recipes, anything)
def test_whatever_is_wrong_is_a_dataset_error_with_its_line(
    draws: st.DataObject, recipe: Recipe, value: Any
) -> None:
    """A good file with something else somewhere is still good, or the error says where."""
    content = {"__class__": "MetadatasetV2", "splits": {"train": as_yaml(recipe)}}
    _, _, *keys = draws.draw(st.sampled_from([keys for keys in places(content) if len(keys) > 1]))
    around: Any = content["splits"]
    for key in ("train", *keys)[:-1]:
        around = around[key]
    around[("train", *keys)[-1]] = value
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "m.yaml")
        path.write_text(yaml.safe_dump(content))
        problem = ""
        try:
            read_metadataset(path, "train")
        except DatasetError as error:
            problem = str(error)
    assert not problem or re.match(rf"{path}, line \d+: ", problem)


# ------------------------------------------------------------------------------- the published one

# Runs in the other Python: the texts of each file's val split in order, or what went wrong.
THEIR_SCRIPT = """
import json, sys
from contextlib import redirect_stdout
import megatron.energon as published

def texts(path):
    workers = published.WorkerConfig(rank=0, world_size=1, num_workers=0)
    dataset = published.get_val_dataset(path, batch_size=1, worker_config=workers)
    return [[batch.text[0], batch.__subflavors__[0]] for batch in published.get_loader(dataset)]

found = {}
for path in sys.argv[1:]:
    try:
        found[path] = texts(path)
    except Exception as error:
        found[path] = f"{type(error).__name__}: {error}"
print(json.dumps(found))
"""

# Name -> what stands below val:, and whether the published package reads it; all else ours does.
COMPARED: dict[str, tuple[str, bool]] = {
    "path": ("{path: a}", True),
    "part": ("{path: a, split_part: train}", True),
    "blend": ("{blend: [{path: b}, {path: a, weight: 2}, {path: b, split_part: test}]}", True),
    "epochized": ("{blend_epochized: [{path: b, repetitions: 3}, {path: a}]}", True),
    "exponent": ("{blend: [{path: b, weight: 1e-3}, {path: a}]}", True),
    "nulls": ("{path: a, split_part: null, subflavors: null, subset: null}", True),
    "nested": ("{path: blend.yaml}", True),
    "nested_part": ("{blend: [{path: more/two.yaml, split_part: odd}, {path: blend.yaml}]}", True),
    "first_version": ("{path: more/one.yaml}", True),
    "subset": ("{path: a, subset: {range: [0%, 50%]}}", True),
    "subflavors": ("{path: a, subflavors: {x: {y: [1, null]}, 2: z}}", True),
    # Documented, but not read by the release 7.4.1.
    "split": ("{path: a, split: train}", False),
    "subflavor": ("{path: a, subflavor: x}", False),
    # Ours only.
    "blocks": ("{blend: [{blend: [{path: b}]}, {path: a}]}", False),
    "concat": ("{concat: [{path: b}, {path: a}]}", False),
    "blend_part": ("{split_part: train, blend: [{path: b}]}", False),
}
MORE = {
    "more/one.yaml": f"{V1}splits: {{val: {{datasets: [{{path: ../b}}, {{path: ../a}}]}}}}",
    "more/two.yaml": f"{V2}splits: {{odd: {{path: ../b, split_part: test}}, val: {{path: ../a}}}}",
}


@pytest.fixture(scope="module")
def theirs(
    tmp_path_factory: pytest.TempPathFactory, published_python: str
) -> tuple[Path, dict[str, Any]]:
    """The folder of datasets and files, and what the published package saw in each file."""
    root = tmp_path_factory.mktemp("metadatasets")
    for name in "ab":
        shards = [f"{part}.tar" for part in ("train", "val", "test")]
        for shard in shards:
            texts = [f"{name} {shard[:-4]}" for _ in range(2)]
            write_tar(root / name / shard, [(f"{shard[:-4]}{i}", {"txt": text.encode()})
                                            for i, text in enumerate(texts)])  # fmt: skip
        patterns = [(shard[:-4], shard) for shard in shards]
        prepare_dataset(root / name, shards, split_parts_patterns=patterns, workers=1)
        write_dataset_yaml(root / name, "TextSample", {"text": "txt"})
    for name, text in MORE.items():
        written(root, text, name)
    files = [str(written(root, f"{V2}splits: {{val: {block}}}", f"{name}.yaml"))
             for name, (block, _) in COMPARED.items()]  # fmt: skip
    command = [published_python, "-W", "ignore", "-c", THEIR_SCRIPT, *files]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return root, json.loads(ran.stdout.splitlines()[-1])


def datasets(recipe: Recipe, split_part: str) -> Iterator[str]:
    """The datasets that a recipe leads to, in order, each as its samples' text."""
    match recipe:
        case Using():
            yield from datasets(recipe.inner, recipe.split_part or split_part)
        case Subset():
            yield from datasets(recipe.inner, split_part)
        case Blend() | Epochized():
            for part, _ in recipe.parts:
                yield from datasets(part, split_part)
        case Concat():
            for part in recipe.parts:
                yield from datasets(part, split_part)
        case str() if is_metadataset(recipe):
            yield from datasets(read_metadataset(recipe, split_part), split_part)
        case str():
            yield f"{os.path.basename(recipe)} {split_part}"


@pytest.mark.parametrize("name", COMPARED)
def test_the_published_package_finds_the_same_datasets(
    theirs: tuple[Path, dict[str, Any]], name: str
) -> None:
    root, seen = theirs
    path = root / f"{name}.yaml"
    recipe = read_metadataset(path, "val")
    ours, found = list(datasets(recipe, "val")), seen[str(path)]
    assert ours
    if COMPARED[name][1]:
        assert ours == [text for text, _ in groupby(text for text, _ in found)]
    else:
        assert "JsonValueError" in found
    if name == "subflavors":
        assert isinstance(recipe, Using)
        assert recipe.subflavors == found[0][1] == {"x": {"y": [1, None]}, "2": "z"}
