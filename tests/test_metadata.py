"""The files in .nv-meta: what is read back is what was written, and every mistake is explained."""

from __future__ import annotations

import json
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
import yaml

from energon_fn.disk.metadata import (
    SplitConfig,
    info_text,
    read_dataset_config,
    read_info,
    read_split_config,
    split_text,
    write_dataset_config,
)
from energon_fn.errors import DatasetError
from energon_fn.samples import SAMPLE_TYPES, CaptioningSample, TextSample, VQAOCRSample

OURS = {"__module__": "megatron.energon"}
TEXT: dict[str, Any] = {"sample_type": OURS | {"__class__": "TextSample"}}
MAPPED = TEXT | {"field_map": {"text": "txt"}}
CRUDE = OURS | {"__class__": "CrudeWebdataset"}


def written(folder: Path, name: str, content: Any) -> Path:
    """The folder, with a file in .nv-meta whose content is given as text or data."""
    path = folder / ".nv-meta" / name
    path.parent.mkdir(exist_ok=True)
    text = content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False)
    path.write_text(text)
    return folder


def dataset(folder: Path, content: Any) -> Path:
    return written(folder, "dataset.yaml", content)


# ------------------------------------------------------------------------------------ dataset.yaml


def test_the_documented_example(tmp_path: Path) -> None:
    text = """\
sample_type:
  __module__: megatron.energon
  __class__: CaptioningSample
field_map:
  image: jpg,png
  caption: detail.json[a][1][b]
"""
    config = read_dataset_config(dataset(tmp_path, text))
    assert config.sample_type is CaptioningSample
    assert config.subflavors == {}
    assert config.field_map == {"image": "jpg,png", "caption": "detail.json[a][1][b]"}
    raw = {"__key__": "0001", "png": "pixels", "detail.json": {"a": [0, {"b": "a cat"}]}}
    assert config.to_sample(raw).caption == "a cat"
    parts = ["jpg", "png", "detail.json", "json", "txt", "webp"]
    assert [part for part in parts if config.part_filter(part)] == ["jpg", "png", "detail.json"]


@pytest.mark.parametrize(
    "names",
    [
        TEXT,
        OURS | {"__class__": "TextWebdataset"},
        OURS | {"__class__": "StandardWebdatasetFactory"} | TEXT,
        {"sample_type": {"__module__": "megatron.energon.flavors.x", "__class__": "TextSample"}},
    ],
)
def test_ways_to_name_the_type(tmp_path: Path, names: dict[str, Any]) -> None:
    config = read_dataset_config(dataset(tmp_path, names | {"field_map": {"text": "txt"}}))
    assert config.sample_type is TextSample


@pytest.mark.parametrize("names", [CRUDE, {"sample_type": OURS | {"__class__": "CrudeSample"}}])
@pytest.mark.parametrize("extra", [{}, {"subflavors": {"kind": "web"}}])
def test_crude(tmp_path: Path, names: dict[str, Any], extra: dict[str, Any]) -> None:
    config = read_dataset_config(dataset(tmp_path, names | extra))
    assert config.sample_type is None
    assert config.subflavors == extra.get("subflavors", {})
    assert config.part_filter("anything")
    raw = {"__key__": "a", "jpg": b""}
    assert config.to_sample(raw) is raw


@pytest.mark.parametrize(
    ("content", "messages"),
    [
        (TEXT | {"field_map": {"txet": "txt"}}, [", line 5:", "Did you mean 'text'?"]),
        (TEXT | {"field_map": {}}, [", line 4:", "requires the field 'text'"]),
        (TEXT, [", line 1:", "exactly one of field_map and sample_loader", "text: PART"]),
        (MAPPED | {"sample_loader": "a.py:b"}, ["exactly one"]),
        (MAPPED | {"part_filter": "a.py:b"}, [", line 6:", "goes with a sample_loader"]),
        (MAPPED | {"subflavor": 1}, [", line 6:", "unknown key 'subflavor'", "'subflavors'?"]),
        (MAPPED | {7: 1}, [", line 6:", "unknown key 7"]),
        (MAPPED | {"subflavors": [1]}, ["subflavors must be a mapping"]),
        (TEXT | {"sample_loader": "sample_loader"}, ["must be FILE:FUNCTION, not 'sample_loader'"]),
        (TEXT | {"sample_loader": "sample_loader.py:a.b"}, ["must be FILE:FUNCTION"]),
        ({"sample_type": OURS | {"__class__": "CaptionSample"}}, [", line 3:", "'CaptionSample'"]),
        ({"sample_type": "TextSample"}, [", line 1:", "__module__ and __class__", "'TextSample'"]),
        ({"field_map": {}}, ["sample_type:\n  __module__: megatron.energon"]),
        (OURS | {"__class__": "CaptionWebdataset"}, [", line 2:", "'CaptioningWebdataset'?"]),
        (CRUDE | {"field_map": {"text": "txt"}}, [", line 3:", "has no field_map"]),
        ({"__module__": "evil", "__class__": "Factory"}, [", line 1:", "Factory", "trust"]),
        ("a: [1", ["not valid yaml"]),
        ("just words", ["must hold a mapping", "'just words'"]),
        ("", ["must hold a mapping"]),
    ],
)
def test_mistakes_are_explained(tmp_path: Path, content: Any, messages: list[str]) -> None:
    with pytest.raises(DatasetError) as caught:
        read_dataset_config(dataset(tmp_path, content))
    for message in [str(tmp_path / ".nv-meta" / "dataset.yaml"), *messages]:
        assert message in str(caught.value)


def test_options_of_the_loader_in_old_datasets_are_ignored(tmp_path: Path, caplog: Any) -> None:
    old = {"decoder": "pil", "shuffle_over_epochs": 1, "parallel_shard_iters": 2}
    dataset(tmp_path, MAPPED | old | {"max_samples_per_sequence": 5})
    with caplog.at_level(logging.WARNING):
        assert read_dataset_config(tmp_path).sample_type is TextSample
    (message,) = caplog.messages
    assert str(tmp_path / ".nv-meta" / "dataset.yaml") in message
    for name in (*old, "max_samples_per_sequence"):
        assert name in message


def test_a_missing_file_says_what_there_is(tmp_path: Path) -> None:
    dataset(tmp_path, CRUDE)
    with pytest.raises(DatasetError, match=r"there are: dataset\.yaml\. Did you mean 'dataset\.y"):
        read_dataset_config(tmp_path, "datasets.yaml")
    with pytest.raises(DatasetError, match=f"energon-fn prepare {tmp_path}/nowhere"):
        read_dataset_config(tmp_path / "nowhere")


def test_yaml_tags_are_not_obeyed(tmp_path: Path) -> None:
    dataset(tmp_path, f"sample_type: !!python/object/apply:os.mkdir ['{tmp_path}/made']")
    with pytest.raises(DatasetError, match="not valid yaml"):
        read_dataset_config(tmp_path)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("sample_type", ["CaptioningSample", CaptioningSample])
def test_what_is_written_looks_like_the_published(tmp_path: Path, sample_type: Any) -> None:
    field_map = {"image": "jpg, png", "caption": "detail.json[a][1][b]"}
    path = write_dataset_config(tmp_path, sample_type, field_map, name="other.yaml")
    assert path == tmp_path / ".nv-meta" / "other.yaml"
    assert (
        path.read_text()
        == """\
sample_type:
  __module__: megatron.energon
  __class__: CaptioningSample
field_map:
  image: jpg,png
  caption: detail.json[a][1][b]
"""
    )


def test_what_is_written_is_read(tmp_path: Path) -> None:
    write_dataset_config(tmp_path, "CrudeWebdataset", subflavors={"a": {"b": [1, "ä"]}})
    config = read_dataset_config(tmp_path)
    assert (config.sample_type, config.subflavors) == (None, {"a": {"b": [1, "ä"]}})
    write_dataset_config(tmp_path, VQAOCRSample, {"image": "jpg", "context": "a", "text": "b"})
    assert read_dataset_config(tmp_path).sample_type is SAMPLE_TYPES["VQAOCRSample"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("TextSampel", {"text": "txt"}), "Did you mean 'TextSample'"),
        (("TextSample", {"txt": "txt"}), "not written: TextSample has no field 'txt'"),
        (("TextSample", None), "not written: exactly one of"),
        ((None, {"text": "txt"}), "not written: a CrudeWebdataset has no field_map"),
    ],
)
def test_nothing_wrong_is_written(tmp_path: Path, arguments: Any, message: str) -> None:
    before = write_dataset_config(tmp_path, "TextSample", {"text": "md"}).read_bytes()
    with pytest.raises(DatasetError, match=message):
        write_dataset_config(tmp_path, *arguments)
    with pytest.raises(DatasetError, match="not written: sample_loader must be FILE:FUNCTION"):
        write_dataset_config(tmp_path, "TextSample", sample_loader="loader.py")
    assert (tmp_path / ".nv-meta" / "dataset.yaml").read_bytes() == before


LOADER = """\
import pathlib
pathlib.Path(__file__).with_suffix(".ran").touch()

def sample_loader(raw):
    return dict(text=raw["txt"].upper())

def part_filter(part):
    return part == "txt"
"""


def with_loader(folder: Path, function: str = "sample_loader") -> Path:
    code = {"sample_loader": f"code.py:{function}", "part_filter": "code.py:part_filter"}
    written(folder, "code.py", LOADER)
    return dataset(folder, TEXT | code)


def test_code_runs_only_when_trusted(tmp_path: Path) -> None:
    with_loader(tmp_path)
    with pytest.raises(DatasetError) as caught:
        read_dataset_config(tmp_path)
    for part in ("code.py:sample_loader", "line 4", "trust_dataset_code=True", "--trust"):
        assert part in str(caught.value)
    assert not (tmp_path / ".nv-meta" / "code.ran").exists()

    config = read_dataset_config(tmp_path, trust_dataset_code=True)
    config = pickle.loads(pickle.dumps(config))
    assert config.to_sample({"__key__": "a", "txt": "hi"}) == TextSample(__key__="a", text="HI")
    assert [part for part in ("jpg", "txt") if config.part_filter(part)] == ["txt"]
    with pytest.raises(DatasetError, match=r"dataset\.yaml.* no function 'sampleloader'"):
        read_dataset_config(with_loader(tmp_path, "sampleloader"), trust_dataset_code=True)


def test_edited_code_is_loaded_again(tmp_path: Path) -> None:
    read_dataset_config(with_loader(tmp_path), trust_dataset_code=True)
    (tmp_path / ".nv-meta" / "code.py").write_text(LOADER.replace("upper", "title"))
    config = read_dataset_config(tmp_path, trust_dataset_code=True)
    assert config.to_sample({"__key__": "a", "txt": "hi you"}).text == "Hi You"


def test_a_trusted_type_of_another_module_is_written_and_read(
    tmp_path: Path, monkeypatch: Any
) -> None:
    (tmp_path / "other_types.py").write_text(
        "from dataclasses import dataclass\n@dataclass\nclass Loud:\n    text: str\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    names = {"sample_type": {"__module__": "other_types", "__class__": "Loud"}}
    dataset(tmp_path, names | {"field_map": {"text": "txt"}})
    with pytest.raises(DatasetError, match=r"line 2: .* imported from the module other_types\. "):
        read_dataset_config(tmp_path)
    loud = read_dataset_config(tmp_path, trust_dataset_code=True).sample_type
    assert loud is not None
    write_dataset_config(tmp_path, loud, {"text": "md"})
    assert read_dataset_config(tmp_path, trust_dataset_code=True).sample_type is loud


# -------------------------------------------------------------------------------------- split.yaml


def test_the_documented_split(tmp_path: Path) -> None:
    text = """\
exclude:
  - shards/shard_004.tar
  - shards/shard_001.tar/000032
  - shards/shard_001.tar/{a..b}/7
  - shards/shard_009.tar/1
split_parts:
  train:
  - shards/shard_{000..001}.tar
  - shards/shard_004.tar
  val:
  - shards/{shard_002,x}.tar
  test: []
"""
    split = read_split_config(written(tmp_path, "split.yaml", text))
    assert split.shards("train") == ("shards/shard_000.tar", "shards/shard_001.tar")
    assert split.shards("val") == ("shards/shard_002.tar", "shards/x.tar")
    assert split.shards("test") == ()
    assert split.excluded_keys(split.shards("train")) == {
        "shards/shard_001.tar": {"000032", "a/7", "b/7"}
    }
    with pytest.raises(DatasetError, match=r"'tran'; .*: train, val, test\. Did you mean 'train'"):
        split.shards("tran")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("split_parts: {val: a.tar}", r"line 1: val must be a list of names, not 'a\.tar'"),
        ("split_parts:\n  val:", r"line 2: val must be a list .* Write \[\]"),
        ("split_parts: {val: [1]}", r"val must be a list of names"),
        ("split_parts: {val: ['a{0..1.tar']}", r"line 1: braces do not match in 'a\{0..1.tar'"),
        ("split_parts: [a.tar]", "split_parts must map parts"),
        ("exclude: []", "split_parts must map parts"),
        ("split_parts: {}\nexclude: a.tar", "line 2: exclude must be a list"),
        ("split_parts: {}\nexcludes: []", "line 2: unknown key 'excludes'.*mean 'exclude'"),
    ],
)
def test_a_wrong_split_is_explained(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DatasetError, match=message) as caught:
        read_split_config(written(tmp_path, "split.yaml", text))
    assert "split.yaml" in str(caught.value)


def test_a_split_is_written_as_the_published(tmp_path: Path) -> None:
    split = SplitConfig(
        {"train": ("s_000.tar", "s_001.tar"), "val": ("s_002.tar",), "test": ()},
        ("s_001.tar/a{b",),
    )
    text = split_text(split)
    assert (
        text
        == """\
split_parts:
  train:
  - s_{000..001}.tar
  val:
  - s_002.tar
  test: []
exclude:
- s_001.tar/a\\{b
"""
    )
    again = read_split_config(written(tmp_path, "split.yaml", text))
    assert (again.split_parts, again.exclude) == (split.split_parts, split.exclude)


# -------------------------------------------------------------------------------------- .info.json


def test_info(tmp_path: Path) -> None:
    counts = {"z.tar": 5, "a/ä.tar": 0}
    text = info_text(counts)
    assert set(json.loads(text)) == {"energon_version", "shard_counts"}  # it admits nothing else
    written(tmp_path, ".info.json", text)
    # What older releases wrote is the second choice.
    written(tmp_path, ".info.yaml", "shard_counts:\n  b.tar: 1223\n  a.tar: 1420\n")
    assert list(read_info(tmp_path).items()) == list(counts.items())
    (tmp_path / ".nv-meta" / ".info.json").unlink()
    assert list(read_info(tmp_path).items()) == [("b.tar", 1223), ("a.tar", 1420)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "shard_counts must map shards to counts, not None"),
        ('{"shard_counts":\n{"a.tar": "5"}}', "line 2: '5' is not a number of samples"),
        ('{"shard_counts": {"a.tar": -1}}', "-1 is not a number of samples"),
        ('{"shard_counts": {"a.tar": 5}', "not valid json"),
    ],
)
def test_a_wrong_info_is_explained(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DatasetError, match=message) as caught:
        read_info(written(tmp_path, ".info.json", text))
    assert ".info.json" in str(caught.value)


def test_not_prepared(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=f"energon-fn prepare {tmp_path}"):
        read_info(tmp_path)
