"""The files in .nv-meta: what is read back is what was written, and every mistake is explained."""

from __future__ import annotations

import dataclasses
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from energon_fn.errors import DatasetError, SampleError
from energon_fn.metadata import (
    CodeRef,
    SplitConfig,
    collapse_braces,
    expand_braces,
    part_filter,
    read_dataset_config,
    read_info,
    read_split_config,
    sample_type_named,
    to_sample,
    write_dataset_config,
    write_info,
    write_split_config,
)
from energon_fn.samples import (
    SAMPLE_TYPES,
    CaptioningSample,
    ImageClassificationSample,
    SourceInfo,
    TextSample,
    VQAOCRSample,
)

OURS = {"__module__": "megatron.energon"}
TEXT = {"sample_type": OURS | {"__class__": "TextSample"}}


def dataset(folder: Path, content: Any, **files: str) -> Path:
    """A folder whose dataset.yaml is ``content`` (text or data), with other files in .nv-meta."""
    meta = folder / ".nv-meta"
    meta.mkdir(exist_ok=True)
    text = content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False)
    (meta / "dataset.yaml").write_text(text)
    for name, code in files.items():
        (meta / f"{name}.py").write_text(code)
    return folder


def text_of(folder: Path, access: str, raw: dict[str, Any]) -> Any:
    config = read_dataset_config(dataset(folder, TEXT | {"field_map": {"text": access}}))
    return to_sample(config)({"__key__": "k", **raw}).text


# ------------------------------------------------------------------------------------ dataset.yaml


def test_the_documented_example(tmp_path: Path) -> None:
    dataset(
        tmp_path,
        """\
sample_type:
  __module__: megatron.energon
  __class__: CaptioningSample
field_map:
  image: jpg,png
  caption: detail.json[a][1][b]
""",
    )
    config = read_dataset_config(tmp_path)
    assert config.sample_type is CaptioningSample
    assert not config.crude
    assert config.subflavors == {}

    kept: dict[str, Any] = {
        "__key__": "d/0001",
        "__restore_key__": ("x", 3),
        "__subflavors__": {"lang": "en"},
        "__sources__": (SourceInfo("/data", 3, "a.tar", ("d/0001.png",)),),
    }
    raw = {**kept, "png": torch.zeros(3, 1, 2), "detail.json": {"a": [0, {"b": "a cat"}]}}
    sample = to_sample(config)(raw)
    assert type(sample) is CaptioningSample
    assert vars(sample) == {**kept, "image": raw["png"], "caption": "a cat"}
    wanted = part_filter(config)
    parts = ["jpg", "png", "detail.json", "json", "txt", "webp"]
    assert [part for part in parts if wanted(part)] == ["jpg", "png", "detail.json"]


DATACLASSES = [name for name, t in SAMPLE_TYPES.items() if dataclasses.is_dataclass(t)]


@pytest.mark.parametrize("name", DATACLASSES)
@pytest.mark.parametrize("module", ["megatron.energon", "megatron.energon.flavors.x", "energon_fn"])
def test_sample_types_by_new_and_old_names(tmp_path: Path, name: str, module: str) -> None:
    sample_type = SAMPLE_TYPES[name]
    field_map = {
        f.name: "json" for f in dataclasses.fields(sample_type) if not f.name.startswith("__")
    }
    names = {"__module__": module, "__class__": name}
    new = dataset(tmp_path, {"sample_type": names, "field_map": field_map})
    assert read_dataset_config(new).sample_type is sample_type
    old_name = name.removesuffix("Sample") + "Webdataset"
    old = dataset(tmp_path, names | {"__class__": old_name, "field_map": field_map})
    assert read_dataset_config(old).sample_type is sample_type


@pytest.mark.parametrize("extra", [{}, {"subflavors": {"kind": "web"}}])
def test_crude(tmp_path: Path, extra: dict[str, Any]) -> None:
    config = read_dataset_config(dataset(tmp_path, OURS | {"__class__": "CrudeWebdataset"} | extra))
    assert config.crude
    assert config.subflavors == extra.get("subflavors", {})
    assert part_filter(config)("anything")
    raw = {"__key__": "a", "jpg": b""}
    assert to_sample(config)(raw) is raw


@pytest.mark.parametrize(("access", "raw", "expected"), [
    ("txt,json", {"txt": "t", "json": "j"}, "t"),
    ("txt,json", {"json": "j"}, "j"),
    ("txt, json", {"json": "j"}, "j"),
    ("json[0]", {"json": {"0": "key, not number"}}, "key, not number"),
    ("json[x][-1]", {"json": {"x": [1, 2]}}, 2),
    ("json[x][1][y z]", {"json": {"x": [1, {"y z": 3}]}}, 3),
    ("json[n],txt", {"json": {"n": None}, "txt": "t"}, None),
    ("json[q],txt", {"json": {}, "txt": "t"}, "t"),
    ("json[x][9],txt", {"json": {"x": []}, "txt": "t"}, "t"),
    ("json[x][a],txt", {"json": {"x": [1]}, "txt": "t"}, "t"),
    ("json[x][a],txt", {"json": {"x": "word"}, "txt": "t"}, "t"),
    ("__key__", {}, "k"),
])  # fmt: skip
def test_access(tmp_path: Path, access: str, raw: dict[str, Any], expected: Any) -> None:
    assert text_of(tmp_path, access, raw) == expected


@pytest.mark.parametrize(("access", "raw", "message"), [
    ("txt", {"json": 1, "jpg": 2}, r"'k' in a\.tar: .*'text': no part 'txt' \(.* json, jpg\)"),
    ("txt,md", {}, r"no part 'txt' \(.*none\); no part 'md'"),
    ("json[a][b]", {"json": {"a": {"c": 1}}}, r"no json\[a\]\[b\] \(json\[a\] has the keys c\)"),
    ("json[a][5]", {"json": {"a": [1, 2]}}, r"no json\[a\]\[5\] \(json\[a\] is a list of 2\)"),
    ("json[a][b][c]", {"json": {"a": {"b": 1}}}, r"no json\[a\]\[b\]\[c\] \(.* is a int\)"),
    ("txt[0]", {"txt": "word"}, r"no txt\[0\] \(txt is a str\)"),
])  # fmt: skip
def test_a_sample_without_the_value(
    tmp_path: Path, access: str, raw: dict[str, Any], message: str
) -> None:
    sources = (SourceInfo("/data", 0, "a.tar", ()),)
    with pytest.raises(SampleError, match=message) as caught:
        text_of(tmp_path, access, {"__sources__": sources, **raw})
    assert f"dataset.yaml says text: {access}" in str(caught.value)


def test_an_optional_field_may_be_left_out_but_not_its_part(tmp_path: Path) -> None:
    content: dict[str, Any] = {"sample_type": OURS | {"__class__": "ImageClassificationSample"}}
    config = read_dataset_config(dataset(tmp_path, content | {"field_map": {"image": "jpg"}}))
    sample = to_sample(config)({"__key__": "a", "jpg": 1, "cls": 2})
    assert sample == ImageClassificationSample(__key__="a", image=1)  # type: ignore[arg-type]

    field_map = {"image": "jpg", "label": "cls"}  # as megatron-energon: the map is a promise
    config = read_dataset_config(dataset(tmp_path, content | {"field_map": field_map}))
    assert to_sample(config)({"__key__": "a", "jpg": 1, "cls": 2}).label == 2
    with pytest.raises(SampleError, match="no part 'cls'"):
        to_sample(config)({"__key__": "a", "jpg": 1})


@pytest.mark.parametrize(("content", "messages"), [
    (TEXT | {"field_map": {"txet": "txt"}},
     [", line 5:", "TextSample has no field 'txet'", "there are: text", "Did you mean 'text'?"]),
    (TEXT | {"field_map": {}}, ["requires the field 'text'", "text: PART"]),
    (TEXT | {"field_map": {"text": 5}}, ["field 'text'", "must name a part", "not 5"]),
    (TEXT | {"field_map": {"text": "json[a"}}, ["'json[a'", "PART[key][0]"]),
    (TEXT | {"field_map": {"text": "json[a].b"}}, ["'json[a].b'"]),
    (TEXT | {"field_map": {"text": "json[a,b]"}}, ["'json[a'"]),
    (TEXT | {"field_map": {"text": "txt,"}}, ["'' in 'txt,'"]),
    (TEXT | {"field_map": ["text"]}, ["must map fields to parts"]),
    (TEXT, ["exactly one of field_map and sample_loader", "text: PART"]),
    (TEXT | {"field_map": {"text": "txt"}, "sample_loader": "a.py:b"}, ["exactly one"]),
    (TEXT | {"field_map": {"text": "txt"}, "part_filter": "a.py:b"}, ["goes with a sample_loader"]),
    (TEXT | {"field_map": {"text": "txt"}, "subflavor": 1},
     ["unknown key 'subflavor'", "Did you mean 'subflavors'?"]),
    (TEXT | {"field_map": {"text": "txt"}, "subflavors": [1]}, ["subflavors must be a mapping"]),
    ({"sample_type": OURS | {"__class__": "CaptionSample"}, "field_map": {}},
     [", line 3:", "unknown sample type 'CaptionSample'", "Did you mean 'CaptioningSample'?"]),
    ({"sample_type": OURS | {"__class__": "CrudeSample"}}, ["CrudeWebdataset"]),
    ({"sample_type": "TextSample"}, ["__module__ and __class__ are needed", "'TextSample'"]),
    ({"field_map": {}}, ["no sample_type"]),
    (OURS | {"__class__": "CaptionWebdataset"}, ["Did you mean 'CaptioningWebdataset'?"]),
    (OURS | {"__class__": "CrudeWebdataset", "field_map": {"text": "txt"}}, ["has no field_map"]),
    ({"__module__": "evil", "__class__": "Factory"}, ["evil.Factory", "sample type instead"]),
    ("a: [1", ["not valid yaml"]),
    ("just words", ["must hold a mapping", "'just words'"]),
    ("", ["must hold a mapping"]),
])  # fmt: skip
def test_mistakes_are_explained(tmp_path: Path, content: Any, messages: list[str]) -> None:
    with pytest.raises(DatasetError) as caught:
        read_dataset_config(dataset(tmp_path, content))
    for message in [str(tmp_path / ".nv-meta" / "dataset.yaml"), *messages]:
        assert message in str(caught.value)


def test_a_missing_file_says_what_there_is(tmp_path: Path) -> None:
    dataset(tmp_path, OURS | {"__class__": "CrudeWebdataset"})
    with pytest.raises(DatasetError, match=r"has: dataset\.yaml\. Did you mean 'dataset\.yaml'"):
        read_dataset_config(tmp_path, "datasets.yaml")
    with pytest.raises(DatasetError, match="energon-fn prepare"):
        read_dataset_config(tmp_path / "nowhere")


def test_yaml_tags_are_not_obeyed(tmp_path: Path) -> None:
    dataset(tmp_path, f"sample_type: !!python/object/apply:os.mkdir ['{tmp_path}/made']")
    with pytest.raises(DatasetError, match="not valid yaml"):
        read_dataset_config(tmp_path)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("sample_type", ["CaptioningSample", CaptioningSample])
def test_what_is_written_is_read_and_looks_like_the_published(
    tmp_path: Path, sample_type: Any
) -> None:
    field_map = {"image": "jpg, png", "caption": "detail.json[a][1][b]"}
    path = write_dataset_config(tmp_path, sample_type, field_map, name="other.yaml")
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
    config = read_dataset_config(tmp_path, "other.yaml")
    assert config.sample_type is CaptioningSample
    assert config.field_map == {"image": "jpg,png", "caption": "detail.json[a][1][b]"}

    write_dataset_config(tmp_path, "CrudeWebdataset", subflavors={"a": {"b": [1, "ä"]}})
    assert read_dataset_config(tmp_path).crude
    assert read_dataset_config(tmp_path).subflavors == {"a": {"b": [1, "ä"]}}
    write_dataset_config(tmp_path, VQAOCRSample, {"image": "jpg", "context": "a", "text": "b"})
    assert read_dataset_config(tmp_path).sample_type is VQAOCRSample


@pytest.mark.parametrize(("arguments", "message"), [
    (("TextSampel", {"text": "txt"}), "Did you mean 'TextSample'"),
    (("TextSample", {"txt": "txt"}), "not written: TextSample has no field 'txt'"),
    (("TextSample", None), "exactly one of"),
    ((None, {"text": "txt"}), "CrudeWebdataset has no field_map"),
])  # fmt: skip
def test_nothing_wrong_is_written(tmp_path: Path, arguments: Any, message: str) -> None:
    before = write_dataset_config(tmp_path, "TextSample", {"text": "md"}).read_bytes()
    with pytest.raises(DatasetError, match=message):
        write_dataset_config(tmp_path, *arguments)
    assert (tmp_path / ".nv-meta" / "dataset.yaml").read_bytes() == before


# --------------------------------------------------------------------------------- code of datasets

LOADER = """\
import pathlib
pathlib.Path(__file__).with_suffix(".ran").touch()

def sample_loader(raw):
    return dict(__key__="own " + raw["__key__"], text=raw["txt"].upper(), __subflavors__="ignored")

def part_filter(part):
    return part == "txt"

def no_dict(raw):
    return raw["txt"]

def wrong_field(raw):
    return dict(text="", txt="")

def forgetful(raw):
    return {}
"""


def with_loader(folder: Path, function: str = "sample_loader") -> Path:
    content = TEXT | {
        "sample_loader": f"sample_loader.py:{function}",
        "part_filter": "sample_loader.py:part_filter",
    }
    return dataset(folder, content, sample_loader=LOADER)


def test_code_runs_only_when_trusted(tmp_path: Path) -> None:
    with_loader(tmp_path)
    with pytest.raises(DatasetError) as caught:
        read_dataset_config(tmp_path)
    for part in ("sample_loader.py:sample_loader", "line 4", "trust_dataset_code=True", "--trust"):
        assert part in str(caught.value)
    assert not (tmp_path / ".nv-meta" / "sample_loader.ran").exists()

    config = read_dataset_config(tmp_path, trust_dataset_code=True)
    raw = {"__key__": "a", "__subflavors__": {"s": 1}, "__restore_key__": (1,), "txt": "hi"}
    assert to_sample(config)(raw) == TextSample(
        __key__="own a", __subflavors__={"s": 1}, __restore_key__=(1,), text="HI"
    )
    assert part_filter(config)("txt")
    assert not part_filter(config)("jpg")
    assert sorted(p.name for p in (tmp_path / ".nv-meta").iterdir()) == [
        "dataset.yaml", "sample_loader.py", "sample_loader.ran",
    ]  # fmt: skip


def test_a_sample_type_of_another_module_is_code(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "my_project_types.py").write_text(
        "from dataclasses import dataclass\n"
        "@dataclass\n"
        "class Loud:\n    __key__: str\n    text: str\n    volume: int = 3\n"
        "class NoSample: pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    content = {"sample_type": {"__module__": "my_project_types", "__class__": "Loud"},
               "field_map": {"text": "txt"}}  # fmt: skip
    with pytest.raises(DatasetError, match=r"Loud is to be imported .* my_project_types.*--trust"):
        read_dataset_config(dataset(tmp_path, content))
    assert "my_project_types" not in sys.modules

    config = read_dataset_config(tmp_path, trust_dataset_code=True)
    sample = to_sample(config)({"__key__": "a", "__restore_key__": (), "txt": "hi"})
    assert (sample.__key__, sample.text, sample.volume) == ("a", "hi", 3)
    write_dataset_config(tmp_path, config.sample_type, {"text": "md"})
    assert read_dataset_config(tmp_path, trust_dataset_code=True).sample_type is config.sample_type

    for names, message in [
        ({"__module__": "my_project_types", "__class__": "Lout"}, "no attribute 'Lout'"),
        ({"__module__": "my_project_tpyes", "__class__": "Loud"}, "No module named"),
        ({"__module__": "my_project_types", "__class__": "NoSample"}, "must be a dataclass"),
    ]:
        dataset(tmp_path, content | {"sample_type": names})
        with pytest.raises(DatasetError, match=message):
            read_dataset_config(tmp_path, trust_dataset_code=True)


@pytest.mark.parametrize(("function", "error", "message"), [
    ("no_dict", DatasetError, "returned str for sample 'a'. It must return a dict"),
    ("wrong_field", DatasetError, "returned the field 'txt', .* Did you mean 'text'"),
    ("forgetful", SampleError, "sample 'a': .*returned no 'text'"),
])  # fmt: skip
def test_what_a_sample_loader_returns_is_checked(
    tmp_path: Path, function: str, error: type[Exception], message: str
) -> None:
    config = read_dataset_config(with_loader(tmp_path, function), trust_dataset_code=True)
    with pytest.raises(error, match=message):
        to_sample(config)({"__key__": "a", "txt": "hi"})


@pytest.mark.parametrize(("ref", "message"), [
    ("sample_loader.py:sample_loadr", r"no function 'sample_loadr'.* Did you mean 'sample_loader'"),
    ("loader.py:sample_loader", r"loader\.py does not exist"),
    ("broken.py:sample_loader", r"broken\.py failed to load: ZeroDivisionError"),
    ("sample_loader", "must be FILE:FUNCTION, not 'sample_loader'"),
    ("sample_loader.py:a.b", "must be FILE:FUNCTION"),
])  # fmt: skip
def test_a_wrong_reference_to_code(tmp_path: Path, ref: str, message: str) -> None:
    dataset(tmp_path, TEXT | {"sample_loader": ref}, sample_loader=LOADER, broken="1 / 0")
    with pytest.raises(DatasetError, match=message):
        read_dataset_config(tmp_path, trust_dataset_code=True)


def test_edited_code_is_loaded_again(tmp_path: Path) -> None:
    read_dataset_config(with_loader(tmp_path), trust_dataset_code=True)
    (tmp_path / ".nv-meta" / "sample_loader.py").write_text(LOADER.replace("upper", "title"))
    config = read_dataset_config(tmp_path, trust_dataset_code=True)
    assert to_sample(config)({"__key__": "a", "txt": "hi you"}).text == "Hi You"


def test_everything_travels_to_another_process(tmp_path: Path) -> None:
    code = read_dataset_config(with_loader(tmp_path), trust_dataset_code=True)
    (tmp_path / "b").mkdir()
    plain = read_dataset_config(dataset(tmp_path / "b", TEXT | {"field_map": {"text": "md,txt"}}))
    functions = [f(config) for config in (code, plain) for f in (to_sample, part_filter)]
    assert [pickle.loads(pickle.dumps(f)) for f in functions] == functions
    script = (
        "import pickle, sys\n"
        "make, wanted, plain, _ = pickle.load(sys.stdin.buffer)\n"
        "raw = {'__key__': 'a', 'txt': 'hi'}\n"
        "print(make(raw).text, wanted('txt'), wanted('jpg'), plain(raw).text)\n"
    )
    ran = subprocess.run([sys.executable, "-c", script], input=pickle.dumps(functions),
                         capture_output=True, check=True)  # fmt: skip
    assert ran.stdout.decode().split() == ["HI", "True", "False", "hi"]


def test_names_for_the_command_line() -> None:
    assert sample_type_named("CrudeWebdataset") is None
    assert sample_type_named("OCRWebdataset") is SAMPLE_TYPES["OCRSample"]
    with pytest.raises(DatasetError, match="Did you mean 'CaptioningSample'"):
        sample_type_named("CaptionSample")
    with pytest.raises(DatasetError, match="no function 'nothing'"):
        CodeRef(__file__, "nothing").function  # noqa: B018  # reading it is what is tested


# -------------------------------------------------------------------------------------- split.yaml


def split_yaml(folder: Path, text: str) -> Path:
    (folder / ".nv-meta").mkdir(exist_ok=True)
    (folder / ".nv-meta" / "split.yaml").write_text(text)
    return folder


def test_the_documented_split(tmp_path: Path) -> None:
    split = read_split_config(
        split_yaml(
            tmp_path,
            """\
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
""",
        )
    )
    assert split.shards("train") == ("shards/shard_000.tar", "shards/shard_001.tar")
    assert split.shards("val") == ("shards/shard_002.tar", "shards/x.tar")
    assert split.shards("test") == ()
    assert split.excluded_keys(split.shards("train")) == {
        "shards/shard_001.tar": {"000032", "a/7", "b/7"}
    }
    with pytest.raises(DatasetError, match=r"'tran'; .*: train, val, test\. Did you mean 'train'"):
        split.shards("tran")


@pytest.mark.parametrize(("text", "message"), [
    ("split_parts: {val: a.tar}", r"line 1: val must be a list of names, not 'a\.tar'"),
    ("split_parts:\n  val:", r"line 2: val must be a list .* Write \[\]"),
    ("split_parts: {val: [1]}", r"val must be a list of names"),
    ("split_parts: {val: ['a{0..1.tar']}", r"Unbalanced braces: 'a\{0..1.tar'"),
    ("split_parts: [a.tar]", "split_parts must map parts"),
    ("exclude: []", "split_parts must map parts"),
    ("split_parts: {}\nexclude: a.tar", "line 2: exclude must be a list"),
    ("split_parts: {}\nexcludes: []", "unknown key 'excludes'.*Did you mean 'exclude'"),
])  # fmt: skip
def test_a_wrong_split_is_explained(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DatasetError, match=message) as caught:
        read_split_config(split_yaml(tmp_path, text))
    assert "split.yaml" in str(caught.value)


def test_a_split_is_written_as_the_published(tmp_path: Path) -> None:
    split = SplitConfig(
        {"train": ("s_000.tar", "s_001.tar"), "val": ("s_002.tar",), "test": ()},
        ("s_001.tar/a{b",),
    )
    path = write_split_config(tmp_path, split)
    assert (
        path.read_text()
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
    again = read_split_config(tmp_path)
    assert (again.split_parts, again.exclude) == (split.split_parts, split.exclude)


@pytest.mark.parametrize(("names", "patterns"), [
    ("a_9 a_10", "a_9 a_10"),
    ("a_08 a_09 a_10", "a_{08..10}"),
    ("a_0_x a_1_x", "a_{0..1}_x"),
    ("1/a 2/a 2/b", "{1..2}/a 2/b"),
    ("s1.mp4 s2.mp4", "s{1..2}.mp4"),
    ("a_1 a_0", "a_1 a_0"),
    ("a_1 a_2 a_4 a_5", "a_{1..2} a_{4..5}"),
    ("a1_9 a2_9 a2_8", "a{1..2}_9 a2_8"),
    ("a0_0 a0_1 a1_1", "a0_{0..1} a1_1"),
])  # fmt: skip
def test_runs_of_numbers_become_braces(names: str, patterns: str) -> None:
    assert collapse_braces(names.split()) == patterns.split()


@given(st.lists(st.text(alphabet="019{}\\,.-_$/a", min_size=1, max_size=7), max_size=12))
def test_expanding_undoes_collapsing(names: list[str]) -> None:
    assert list(expand_braces(collapse_braces(names))) == names


@given(st.lists(st.integers(0, 1200), max_size=40), st.integers(0, 4))
def test_expanding_undoes_collapsing_numbers(numbers: list[int], width: int) -> None:
    names = [f"s/x_{n:0{width}d}.tar" for n in numbers]
    patterns = collapse_braces(names)
    assert list(expand_braces(patterns)) == names
    assert len(collapse_braces(sorted(set(names)))) <= len(set(names))


# -------------------------------------------------------------------------------------- .info.json


def test_info(tmp_path: Path) -> None:
    counts = {"z.tar": 5, "a/ä.tar": 0}
    (tmp_path / ".nv-meta").mkdir()
    path = write_info(tmp_path, counts)
    content = json.loads(path.read_text())
    assert set(content) == {"energon_version", "shard_counts"}  # the published admits nothing else
    assert list(read_info(tmp_path).items()) == list(counts.items())

    # What older releases wrote is the second choice.
    older = tmp_path / ".nv-meta" / ".info.yaml"
    older.write_text("shard_counts:\n  b.tar: 1223\n  a.tar: 1420\n")
    assert read_info(tmp_path) == counts
    path.unlink()
    assert list(read_info(tmp_path).items()) == [("b.tar", 1223), ("a.tar", 1420)]


@pytest.mark.parametrize(("text", "message"), [
    ("{}", "shard_counts must map shards to counts, not None"),
    ('{"shard_counts": {"a.tar": "5"}}', "'5' is not a number of samples"),
    ('{"shard_counts": {"a.tar": -1}}', "-1 is not a number of samples"),
    ('{"shard_counts": {"a.tar": 5}', "not valid json"),
])  # fmt: skip
def test_a_wrong_info_is_explained(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / ".nv-meta").mkdir()
    (tmp_path / ".nv-meta" / ".info.json").write_text(text)
    with pytest.raises(DatasetError, match=message) as caught:
        read_info(tmp_path)
    assert ".info.json" in str(caught.value)


def test_not_prepared(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=f"energon-fn prepare {tmp_path}"):
        read_info(tmp_path)
