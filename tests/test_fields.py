"""From a decoded raw sample to a sample: by a field map, or by code that the user trusts."""

from __future__ import annotations

import dataclasses
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from energon_fn.disk.fields import (
    DatasetCode,
    FieldMap,
    SampleLoader,
    check_field_map,
    sample_type_named,
    sample_type_of,
)
from energon_fn.errors import DatasetError, SampleError
from energon_fn.samples import (
    SAMPLE_TYPES,
    CaptioningSample,
    ImageClassificationSample,
    SourceInfo,
    TextSample,
)

# ------------------------------------------------------------------------------------ sample types


@pytest.mark.parametrize("name", SAMPLE_TYPES)
@pytest.mark.parametrize("module", ["megatron.energon", "megatron.energon.flavors.x", "energon_fn"])
def test_our_types_by_new_and_old_names(name: str, module: str) -> None:
    ours = None if name == "CrudeSample" else SAMPLE_TYPES[name]
    for one in (name, name.removesuffix("Sample") + "Webdataset"):
        assert sample_type_named(one) is ours
        assert sample_type_of({"__module__": module, "__class__": one}) is ours


@pytest.mark.parametrize(
    ("name", "close"),
    [
        ("CaptionSample", "CaptioningSample"),
        ("CaptionWebdataset", "CaptioningWebdataset"),
        ("textsample", "TextSample"),
    ],
)
def test_an_unknown_name_gets_a_close_one(name: str, close: str) -> None:
    with pytest.raises(DatasetError, match=f"unknown sample type '{name}'.*mean '{close}'"):
        sample_type_named(name)


def test_a_sample_type_of_another_module_is_code(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "my_project_types.py").write_text(
        "from dataclasses import dataclass\n"
        "class Kinds:\n"
        "    @dataclass\n"
        "    class Loud:\n        __key__: str\n        text: str\n        volume: int = 3\n"
        "class NoSample: pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    names = {"__module__": "my_project_types", "__class__": "Kinds.Loud"}
    with pytest.raises(DatasetError, match=r"Loud is to be imported .* my_project_types.*--trust"):
        sample_type_of(names)
    assert "my_project_types" not in sys.modules

    loud = sample_type_of(names, trust=True)
    assert loud is not None
    # It has no __restore_key__ to carry along, and need not.
    sample = FieldMap.of(loud, {"text": "txt"})({"__key__": "a", "__restore_key__": (), "txt": "!"})
    assert vars(sample) == {"__key__": "a", "text": "!", "volume": 3}

    for module, name, message in [
        ("my_project_types", "Lout", "no attribute 'Lout'"),
        ("my_project_tpyes", "Kinds.Loud", "No module named"),
        ("my_project_types", "NoSample", "must be a dataclass"),
    ]:
        with pytest.raises(DatasetError, match=message):
            sample_type_of({"__module__": module, "__class__": name}, trust=True)


# -------------------------------------------------------------------------------------- field maps


def text_of(access: str, raw: dict[str, Any]) -> Any:
    return FieldMap.of(TextSample, {"text": access}, "d.yaml")({"__key__": "k", **raw}).text


def test_the_documented_field_map() -> None:
    field_map = {"image": "jpg,png", "caption": "detail.json[a][1][b]"}
    make = FieldMap.of(CaptioningSample, field_map)
    kept: dict[str, Any] = {
        "__key__": "d/0001",
        "__restore_key__": ("x", 3),
        "__subflavors__": {"lang": "en"},
        "__sources__": (SourceInfo("/data", 3, "a.tar", ("d/0001.png",)),),
    }
    raw = {**kept, "png": torch.zeros(3, 1, 2), "detail.json": {"a": [0, {"b": "a cat"}]}}
    sample = make(raw)
    assert type(sample) is CaptioningSample
    assert vars(sample) == {**kept, "image": raw["png"], "caption": "a cat"}
    assert make.part_filter.parts == {"jpg", "png", "detail.json"}


@pytest.mark.parametrize(
    ("access", "raw", "expected"),
    [
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
    ],
)
def test_access(access: str, raw: dict[str, Any], expected: Any) -> None:
    assert text_of(access, raw) == expected


@pytest.mark.parametrize(
    ("access", "raw", "message"),
    [
        ("txt", {"json": 1, "jpg": 2}, r"'k' in a\.tar: .*'text': no part 'txt' \(.* json, jpg\)"),
        ("txt,md", {}, r"no part 'txt' \(.*none\); no part 'md'"),
        ("json[a][b]", {"json": {"a": {"c": 1}}}, r"no json\[a\]\[b\] \(json\[a\] has \['c'\]\)"),
        ("json[a][5]", {"json": {"a": [1, 2]}}, r"no json\[a\]\[5\] \(json\[a\] has \[1, 2\]\)"),
        ("json[a][b][c]", {"json": {"a": {"b": 1}}}, r"no json\[a\]\[b\]\[c\] \(.* has 1\)"),
        ("txt[0]", {"txt": "word"}, r"no txt\[0\] \(txt has 'word'\)"),
    ],
)
def test_a_sample_without_the_value(access: str, raw: dict[str, Any], message: str) -> None:
    sources = (SourceInfo("/data", 0, "a.tar", ()),)
    with pytest.raises(SampleError, match=message) as caught:
        text_of(access, {"__sources__": sources, **raw})
    assert f"field map of d.yaml says text: {access}" in str(caught.value)


def test_an_optional_field_may_be_left_out_but_not_its_part() -> None:
    make = FieldMap.of(ImageClassificationSample, {"image": "jpg"})
    sample = make({"__key__": "a", "jpg": 1, "cls": 2})
    assert sample == ImageClassificationSample(__key__="a", image=1)  # type: ignore[arg-type]

    # As megatron-energon: the map is a promise.
    make = FieldMap.of(ImageClassificationSample, {"image": "jpg", "label": "cls"})
    assert make({"__key__": "a", "jpg": 1, "cls": 2}).label == 2
    with pytest.raises(SampleError, match="no part 'cls'"):
        make({"__key__": "a", "jpg": 1})


@pytest.mark.parametrize(
    ("field_map", "message"),
    [
        ({"txet": "txt"}, r"TextSample has no field 'txet'; there are: text\. Did you mean 'text'"),
        ({1: "txt"}, "no field 1"),
        ({}, "requires the field 'text'.*\n  text: PART"),
        ({"text": 5}, "field 'text': it must name a part, not 5"),
        ({"text": "json[a"}, r"'json\[a' .*PART\[key\]\[0\]"),
        ({"text": "json[a].b"}, r"'json\[a\]\.b'"),
        ({"text": "json[a,b]"}, r"'json\[a'"),
        ({"text": "txt,"}, "'' in 'txt,'"),
        (["text"], "must map fields to parts"),
    ],
)
def test_a_wrong_field_map_is_explained(field_map: Any, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        check_field_map(TextSample, field_map)


# -------------------------------------------------------------------------------- code of datasets


def code(folder: Path, body: str) -> DatasetCode:
    (folder / "loader.py").write_text("def load(raw):\n    " + body)
    return DatasetCode(str(folder / "loader.py"), "load")


def test_a_sample_loader_gives_the_fields_and_the_key_but_not_the_source(tmp_path: Path) -> None:
    load = code(tmp_path, "return dict(__key__='my ' + raw['__key__'], __subflavors__=0, text='A')")
    raw = {"__key__": "a", "__subflavors__": {"s": 1}, "__restore_key__": (1,), "txt": "hi"}
    assert SampleLoader(TextSample, load)(raw) == TextSample(
        __key__="my a", __subflavors__={"s": 1}, __restore_key__=(1,), text="A"
    )
    assert [file.name for file in tmp_path.iterdir()] == ["loader.py"]  # no cache beside the data


@pytest.mark.parametrize(
    ("body", "error", "message"),
    [
        ("return raw['txt']", DatasetError, "sample 'a': .*load returned str. It must return a"),
        ("return dict(text='', txt='')", DatasetError, "returned 'txt', no field of .*mean 'text'"),
        ("return {}", SampleError, "sample 'a': .*returned no 'text'"),
    ],
)
def test_what_a_sample_loader_returns_is_checked(
    tmp_path: Path, body: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        SampleLoader(TextSample, code(tmp_path, body))({"__key__": "a", "txt": "hi"})


def test_code_that_cannot_be_used(tmp_path: Path) -> None:
    path = code(tmp_path, "return {}").path
    with pytest.raises(DatasetError, match=r"loader\.py has no function 'lod'.*mean 'load'"):
        DatasetCode(path, "lod").check()
    with pytest.raises(DatasetError, match=r"nowhere\.py does not exist"):
        DatasetCode(str(tmp_path / "nowhere.py"), "load").check()
    Path(path).write_text("1 / 0")
    with pytest.raises(DatasetError, match=r"loader\.py failed to load: ZeroDivisionError"):
        DatasetCode(path, "load").check()


def test_what_a_class_of_the_file_makes_can_be_pickled(tmp_path: Path) -> None:
    body = (
        "return dict(text=Own(3))\nfrom dataclasses import dataclass\n@dataclass\nclass Own: x: int"
    )
    sample = SampleLoader(TextSample, code(tmp_path, body))({"__key__": "a"})
    assert pickle.loads(pickle.dumps(sample)) == sample


def test_they_travel_to_another_process(tmp_path: Path) -> None:
    load = code(tmp_path, "return dict(text=raw['txt'].upper())")
    functions = [FieldMap.of(TextSample, {"text": "md,txt"}), SampleLoader(TextSample, load)]
    script = (
        "import pickle, sys\n"
        "raw = {'__key__': 'a', 'txt': 'hi'}\n"
        "print(*(make(raw).text for make in pickle.load(sys.stdin.buffer)))\n"
    )
    command = [sys.executable, "-c", script]
    ran = subprocess.run(command, input=pickle.dumps(functions), capture_output=True, check=True)
    assert ran.stdout.decode().split() == ["hi", "HI"]


def test_every_field_of_every_type_can_be_mapped() -> None:
    for sample_type in SAMPLE_TYPES.values():
        if dataclasses.is_dataclass(sample_type):
            names = [field.name for field in dataclasses.fields(sample_type)]
            sample = FieldMap.of(sample_type, {name: f"json[{name}]" for name in names})
            values = {name: f"value of {name}" for name in names}
            assert vars(sample({"json": values})) == values
