"""The same folders, YAMLs and user code, here and with the published megatron-energon.

What a user has to change is an import: :data:`USERS_CODE` is run with either package. Runs where
``ENERGON_PYTHON`` names a Python that has megatron-energon, or this one has it.
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import pytest
from conftest import write_tar

from energon_fn import WorkerConfig, get_loader, get_train_dataset, get_val_dataset
from energon_fn.disk.jsonl import prepare_jsonl
from energon_fn.disk.prepare import prepare_dataset, write_dataset_yaml
from energon_fn.errors import DatasetError
from energon_fn.recipes.opening import open_recipe, prepare_metadataset

PACKAGES = {"theirs": "megatron.energon", "ours": "energon_fn"}

# What somebody has who moves over.
USERS_CODE = """
from PACKAGE import (
    Cooker, DefaultTaskEncoder, FileStore, Sample, TextSample, basic_sample_keys, cooker,
    edataclass, stateless,
)

@edataclass
class Pair(Sample):
    one: str
    other: str | None

    @staticmethod
    def from_joined(one, other):
        return Pair.derive_from(one, one=one.text, other=other and other.text)

@edataclass
class Cooked(Sample):
    text: str

@stateless
def cook_line(sample):
    return Cooked(**basic_sample_keys(sample), text=f"line {sample['json']['n']}")

@stateless
@cooker(need_primary=True)
def cook_poem(sample: dict, primary: FileStore) -> Cooked:
    again = primary.get(".txt", sample)
    other = primary.get("0021.txt", sample)
    return Cooked(**basic_sample_keys(sample), text=f"poem {sample['txt']} {again} {other}")

@stateless
def cook_with_stores(sample, notes, words):
    name = sample["json"]["note"]
    text = f"{sample['txt']} + {notes.get(name, sample)} + {words.get('0003.txt', sample)}"
    return Cooked(**basic_sample_keys(sample), text=text)

class Encoder(DefaultTaskEncoder):
    cookers = [
        Cooker(cook_line, has_subflavors={"kind": "lines"}),
        Cooker(cook_with_stores, has_subflavors={"kind": "with stores"}),
        Cooker(cook_poem, has_subflavors={"kind": "poem"}),
    ]

def facts(sample):
    parts = ["text"] if hasattr(sample, "text") else ["one", "other"]
    sources = [[str(s.dataset_path).split("/")[-1], s.shard_name, list(s.file_names)]
               for s in sample.__sources__]
    return [sample.__key__, *(getattr(sample, part) for part in parts), sample.__subflavors__,
            sources]
"""

# Runs in the other Python; prints what it saw as json.
THEIR_SCRIPT = """
import gc, io, json, sys
from contextlib import redirect_stdout
from itertools import islice
folder, joins, loads = json.load(sys.stdin)
sys.path.insert(0, folder)
import moving
from megatron.energon import (
    WorkerConfig, get_loader, get_train_dataset, get_val_dataset, prepare_metadataset,
    reraise_exception)
from megatron.energon.epathlib import EPath

seen = []
gc.collect = lambda generation=2: 0  # each loader spends 0.2 seconds on looking for garbage
with redirect_stdout(io.StringIO()):
    for path in joins:
        prepare_metadataset(EPath(path))
    for path, count, epoch in loads:
        config = WorkerConfig(
            rank=0, world_size=1, num_workers=0, global_error_handler=reraise_exception)
        common = dict(batch_size=None, worker_config=config, task_encoder=moving.Encoder())
        try:
            if count is None:
                dataset = get_val_dataset(path, **common)
            else:
                dataset = get_train_dataset(path, shuffle_buffer_size=5, repeat=not epoch,
                                            max_samples_per_sequence=3, **common)
            seen.append([moving.facts(sample) for sample in islice(get_loader(dataset), count)])
        except Exception as error:
            seen.append(f"{type(error).__name__}: {error}")
print(json.dumps(seen))
"""

HEAD = "__module__: megatron.energon\n__class__: {}\nsplits:\n"
JOINER = "joiner: {__module__: moving, __class__: Pair}"
MANY = 700  # samples of a blend that has no end

# What stands below train and below val of each metadataset.
BLOCKS = {
    "plain": "path: ./texts",
    "blend": "blend: [{weight: 5, path: ./texts}, {weight: 2, path: ./few}]",
    "blend_of_blends": "blend: [{weight: 3, path: blend.yaml}, {weight: 1, path: ./more}]",
    "epochized": "blend_epochized: [{repetitions: 2, path: ./texts}, "
    "{repetitions: 3, path: ./few}]",
    "epochized_in_epochized": "blend_epochized: [{repetitions: 2, path: epochized.yaml}, "
    "{repetitions: 1, path: ./more}]",
    "join_error": f"join: [{{path: ./texts}}, {{path: ./more}}]\n{JOINER}",
    "join_skip": f"join: [{{path: ./texts}}, {{path: ./few, nonmatch: skip}}]\n{JOINER}",
    "join_none": f"join: [{{path: ./texts}}, {{path: ./few, nonmatch: none}}]\n{JOINER}",
    "join_by_name": "join: {other: {path: ./more}, "
    f"one: {{path: ./few, nonmatch: skip}}}}\n{JOINER}",
    "join_of_configured": "join:\n"
    "- {path: ./texts, subflavors: {a: 1}}\n"
    "- {path: ./more, subflavors: {b: 2}, dataset_config: shout.yaml, "
    f"nonmatch: skip}}\n{JOINER}\nsubflavors: {{c: 3}}",
    "joined_subset": f"join: [{{path: ./few}}, {{path: ./more, nonmatch: skip}}]\n{JOINER}\n"
    "subset: {range: [25%, 100%]}",
    "subset": "path: ./more\nsubset: {range: [12.5%, 70%]}",
    "absolute": "path: ./more\nsubset: {range: [2, 7]}",
    "to_the_end": "path: ./more\nsubset: {range: [2, end]}",
    "percent_in_percent": "path: subset.yaml\nsubset: {range: [25%, 75%]}",
    "absolute_in_percent": "path: absolute.yaml\nsubset: {range: [0%, 50%]}",
    "blend_in_subset": "blend_epochized: [{repetitions: 1, path: absolute.yaml}, "
    "{repetitions: 2, path: ./texts}]\nsubset: {range: [0%, 50%]}",
    "crude": "path: ./crude\nsubflavors: {kind: poem}",
    "aux": "path: ./crude\nsubflavors: {kind: with stores}\n"
    "aux: {notes: 'filesystem://./notes', words: ./texts}",
    "jsonl": "path: ./lines.jsonl\nsubflavors: {kind: lines}",
    "excluded": "path: ./excluded",
    "configs": "path: ./more\ndataset_config: shout.yaml\nsplit_config: swapped.yaml",
    "other_part": "path: ./texts\nsplit_part: val",
    "subflavors": "path: inner_subflavors.yaml\nsubflavors: {outer: 1, file: recipe}",
    "inner_subflavors": "path: ./texts\nsubflavors: {inner: [2, {deep: true}]}",
    "conflict": "path: inner_conflict.yaml\nsubflavors: {who: outer}",
    "inner_conflict": "path: ./texts\nsubflavors: {who: inner}",
    "fractional": "blend_epochized: [{repetitions: 1.5, path: ./texts}, "
    "{repetitions: 0.5, path: ./few}]",
}
FIRST = {"first_version": "datasets:\n- {weight: 5, path: ./texts}\n- {weight: 2, path: ./few}"}

ENDLESS = ("blend", "blend_of_blends", "first_version")
DIFFERENT = ("join_none", "conflict", "fractional")  # each has a test of its own
SAME = [name for name in (*BLOCKS, *FIRST) if name not in DIFFERENT]


def dataset(folder: Path, keys: list[range], kind: str | None, parts: Callable[[int], Any]) -> None:
    """The last shard is for validation."""
    names = [f"s{number}.tar" for number in range(len(keys))]
    for name, numbers in zip(names, keys, strict=True):
        write_tar(folder / name, [(f"{n:04d}", parts(n)) for n in numbers])
    patterns = [("train", name) for name in names[:-1]] + [("val", names[-1])]
    prepare_dataset(folder, names, split_parts_patterns=patterns, workers=1)
    write_dataset_yaml(folder, kind or "CrudeWebdataset", {"text": "txt"} if kind else None)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small datasets whose keys overlap, and the metadatasets."""
    root = tmp_path_factory.mktemp("moving")

    def text(name: str) -> Callable[[int], Any]:
        return lambda n: {"txt": f"{name} {n}".encode(), "loud.txt": f"{name.upper()} {n}".encode()}

    dataset(root / "texts", [range(8), range(8, 14), range(20, 26)], "TextSample", text("texts"))
    dataset(root / "more", [range(12), range(12, 18), range(20, 33)], "TextSample", text("more"))
    dataset(root / "few", [range(2, 14, 3), range(19, 26, 2)], "TextSample", text("few"))
    dataset(root / "excluded", [range(4), range(4, 8), range(8, 20), range(20, 26)],
            "TextSample", text("excluded"))  # fmt: skip
    dataset(root / "crude", [range(5), range(20, 23)], None, lambda n: {
        "txt": f"crude {n}".encode(), "json": json.dumps({"note": f"{n % 2}.txt"}).encode(),
    })  # fmt: skip
    with open(root / "texts/.nv-meta/dataset.yaml", "a") as file:
        file.write("subflavors: {file: dataset.yaml, own: 1}\n")
    write_dataset_yaml(root / "more", "TextSample", {"text": "loud.txt"}, name="shout.yaml")
    (root / "more/.nv-meta/swapped.yaml").write_text(
        "split_parts: {train: [s2.tar], val: ['s{0..1}.tar']}\n"
        "exclude: ['s{0..1}.tar/00{01..13..4}']\n"
    )
    split = root / "excluded/.nv-meta/split.yaml"
    entries = "[s0.tar, 's{1..2}.tar/00{05,{08..10}}', 's3.tar/002{1..2}']"
    split.write_text(split.read_text().replace("exclude: []", f"exclude: {entries}"))
    (root / "notes").mkdir()
    for n in range(2):
        (root / f"notes/{n}.txt").write_text(f"note {n}")
    (root / "lines.jsonl").write_text("".join(f'{{"n": {n}}}\n' for n in range(7)))
    prepare_jsonl(root / "lines.jsonl")
    for version, blocks in (("MetadatasetV2", BLOCKS), ("Metadataset", FIRST)):
        for name, block in blocks.items():
            body = "".join(f"    {line}\n" for line in block.splitlines())
            for part in ("train", "val"):
                yaml = yaml_of(root, name, part)
                before = yaml.read_text() if yaml.exists() else HEAD.format(version)
                yaml.write_text(f"{before}  {part}:\n{body}")
    for side, package in PACKAGES.items():
        (root / side).mkdir()
        (root / side / "moving.py").write_text(USERS_CODE.replace("PACKAGE", package))
    return root


def yaml_of(root: Path, name: str, part: str) -> Path:
    """Joins have a file for each part: with one for both, the published package takes the index
    of one part for the other too, and joins wrong samples."""
    return root / (f"{name}_{part}.yaml" if name.startswith("join") else f"{name}.yaml")


Facts = list[list[Any]]


@pytest.fixture(scope="module")
def theirs(root: Path, published_python: str) -> dict[str, Any]:
    """What the published package saw, by ``val/NAME`` and ``train/NAME``: facts, or an error."""
    names = [*BLOCKS, *FIRST]
    loads: dict[str, list[Any]] = {}
    for name in names:
        count = MANY if name in ENDLESS else 10_000
        loads[f"val/{name}"] = [str(yaml_of(root, name, "val")), None, False]
        loads[f"train/{name}"] = [str(yaml_of(root, name, "train")), count, name not in ENDLESS]
    joins = [load[0] for name, load in loads.items() if "/join" in name]
    job = [str(root / "theirs"), joins, list(loads.values())]
    ran = subprocess.run([published_python, "-W", "ignore", "-c", THEIR_SCRIPT],
                         input=json.dumps(job), capture_output=True, text=True)  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-3000:]
    return dict(zip(loads, json.loads(ran.stdout.splitlines()[-1]), strict=True))


@pytest.fixture(scope="module")
def users(root: Path) -> Iterator[ModuleType]:
    """The user's code, with our import."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(root / "ours"))
        yield importlib.import_module("moving")
        del sys.modules["moving"]


ONE = WorkerConfig(rank=0, world_size=1, num_workers=0)


def ours(
    users: ModuleType,
    path: Path,
    train: bool,
    count: int | None = None,
    config: WorkerConfig = ONE,
) -> Facts:
    common: dict[str, Any] = {
        "batch_size": None, "worker_config": config, "task_encoder": users.Encoder(),
        "trust_dataset_code": True,
    }  # fmt: skip
    data = (
        get_train_dataset(path, shuffle_buffer_size=5, max_samples_per_sequence=3,
                          repeat=count is not None, **common)
        if train
        else get_val_dataset(path, **common)
    )  # fmt: skip
    found: Facts = [users.facts(sample) for sample in islice(get_loader(data), count)]
    return cast(Facts, json.loads(json.dumps(found)))


def names_of(facts: Facts) -> Counter[str]:
    """How many samples are of which dataset."""
    return Counter(row[-1][0][0] for row in facts)


@pytest.mark.parametrize("name", SAME)
def test_val_has_the_same_samples_in_the_same_order(
    name: str, root: Path, users: ModuleType, theirs: dict[str, Any]
) -> None:
    assert ours(users, yaml_of(root, name, "val"), train=False) == theirs[f"val/{name}"]


@pytest.mark.parametrize("name", [name for name in SAME if name not in ENDLESS])
def test_an_epoch_of_training_has_the_same_samples(
    name: str, root: Path, users: ModuleType, theirs: dict[str, Any]
) -> None:
    seen = ours(users, yaml_of(root, name, "train"), train=True)
    assert sorted(seen, key=repr) == sorted(theirs[f"train/{name}"], key=repr)
    assert seen


@pytest.mark.parametrize("name", ENDLESS)
def test_a_blend_has_the_same_shares(
    name: str, root: Path, users: ModuleType, theirs: dict[str, Any]
) -> None:
    """There they are drawn by lot; here each dataset's are spread evenly, and exact."""
    seen = ours(users, root / f"{name}.yaml", True, MANY)
    weights = {"texts": 5 / 7, "few": 2 / 7}
    if name == "blend_of_blends":
        weights = {"texts": 15 / 28, "few": 6 / 28, "more": 1 / 4}
    for which, tolerance in (seen, 1.0), (theirs[f"train/{name}"], 4 * (MANY / 4) ** 0.5):
        found = names_of(which)
        assert found.keys() == weights.keys()
        for dataset, share in weights.items():
            assert abs(found[dataset] - share * MANY) <= tolerance


def test_the_comparison_sees_what_it_should(theirs: dict[str, Any]) -> None:
    """Not two empty lists: what each case is about is in what the published package saw."""

    def texts(name: str) -> list[Any]:
        return [row[1] for row in theirs[name]]

    assert all(len(seen) > 1 for seen in theirs.values())
    assert texts("val/plain") == [f"texts {n}" for n in range(20, 26)]
    assert texts("val/blend")[6:] == [f"few {n}" for n in (19, 21, 23, 25)]
    assert Counter(texts("train/epochized"))["texts 3"] == 2
    assert Counter(texts("train/epochized_in_epochized"))["few 5"] == 6
    assert texts("val/join_skip") == [f"texts {n}" for n in (21, 23, 25)]
    assert theirs["val/join_by_name"][0][:3] == ["0021", "few 21", "more 21"]
    assert theirs["val/join_of_configured"][0][1:4] == [
        "texts 20", "MORE 20", {"file": "dataset.yaml", "own": 1, "a": 1, "c": 3},
    ]  # fmt: skip
    assert texts("val/percent_in_percent") == [f"more {n}" for n in range(23, 27)]
    assert texts("val/absolute_in_percent") == ["more 22", "more 23"]
    assert texts("val/crude")[0] == "poem crude 20 crude 20 crude 21"
    assert texts("val/aux")[1] == "crude 21 + note 1 + texts 3"
    assert texts("val/jsonl")[3] == "line 3"
    assert sorted(texts("train/excluded")) == [
        "excluded 11", "excluded 12", "excluded 13", "excluded 14", "excluded 15", "excluded 16",
        "excluded 17", "excluded 18", "excluded 19", "excluded 4", "excluded 6", "excluded 7",
    ]  # fmt: skip
    assert texts("val/configs")[:3] == ["MORE 0", "MORE 2", "MORE 3"]
    assert theirs["val/subflavors"][0][2] == {
        "file": "recipe", "own": 1, "inner": [2, {"deep": True}], "outer": 1,
    }  # fmt: skip


# ------------------------------------------------------------------------- what is meant to differ


def test_of_subflavors_the_inner_wins(
    root: Path, users: ModuleType, theirs: dict[str, Any]
) -> None:
    """As documented; and what a metadataset says wins over dataset.yaml, there too."""
    (found,) = {row[2]["who"] for row in ours(users, root / "conflict.yaml", train=False)}
    (there,) = {row[2]["who"] for row in theirs["val/conflict"]}
    assert (found, there) == ("inner", "outer")


def test_nonmatch_none(root: Path, users: ModuleType, theirs: dict[str, Any]) -> None:
    """The published package writes that into its index, and then cannot load it."""
    assert isinstance(theirs["val/join_none"], str)
    seen = ours(users, root / "join_none_val.yaml", train=False)
    assert [row[1:3] for row in seen] == [
        [f"texts {n}", f"few {n}" if n % 2 else None] for n in range(20, 26)
    ]


def test_fractional_repetitions_are_exact_over_all_streams(
    root: Path, users: ModuleType, theirs: dict[str, Any]
) -> None:
    """Over one stream they are the same."""
    wanted = Counter({"texts": 21, "few": 2})
    assert names_of(theirs["train/fractional"]) == wanted
    for lanes in (1, 4):
        config = WorkerConfig(rank=0, world_size=1, num_workers=0, lanes=lanes)
        seen = ours(users, root / "fractional.yaml", train=True, config=config)
        assert names_of(seen) == wanted


# --------------------------------------------------------------------- joins that change, or cannot


def test_a_join_is_made_anew_when_its_yaml_or_parts_changed(tmp_path: Path) -> None:
    """It is looked up when it is opened, prepared or not, and never taken for another one."""
    yaml = tmp_path / "m.yaml"

    def write(block: str) -> None:
        yaml.write_text(
            HEAD.format("MetadatasetV2") + f"  train:\n    {block}\n"
            "    joiner: {__module__: moving, __class__: Pair}\n"
        )

    def part(name: str, *keys: str) -> None:
        for number, letters in enumerate(keys):
            content = [(key, {"txt": f"{name} {key}".encode()}) for key in letters]
            write_tar(tmp_path / name / f"{number}.tar", content)
        names = [f"{number}.tar" for number in range(len(keys))]
        prepare_dataset(tmp_path / name, names, split_parts_ratio=[("train", 1)], workers=1,
                        shuffle_seed=None)  # fmt: skip
        write_dataset_yaml(tmp_path / name, "TextSample", {"text": "txt"})

    def joined() -> list[tuple[str | None, ...]]:
        (samples,) = open_recipe(yaml, make=False).sources
        raws = [samples.load(i)["__parts__"] for i in range(len(samples))]
        return [tuple(raw and raw["txt"].decode() for raw in pair) for pair in raws]

    part("a", "uvw", "xyz")
    part("b", "zyx")
    write("join: [{path: a}, {path: b, nonmatch: skip}]")
    assert joined() == [(f"a {key}", f"b {key}") for key in "xyz"]
    write("join: [{path: a}, {path: b, nonmatch: none}]")  # the yaml changed
    assert joined() == [(f"a {key}", f"b {key}" if key in "xyz" else None) for key in "uvwxyz"]
    write("join: [{path: b}, {path: a}]")
    assert joined() == [(f"b {key}", f"a {key}") for key in "zyx"]
    part("a", "zyx", "wvu")  # a part changed: the same number of keys elsewhere
    assert joined() == [(f"b {key}", f"a {key}") for key in "zyx"]
    part("b", "zy", "xv")  # and one more
    assert joined() == [(f"b {key}", f"a {key}") for key in "zyxv"]
    split = tmp_path / "b/.nv-meta/split.yaml"
    split.write_text(split.read_text().replace("exclude: []", "exclude: [0.tar/y]"))
    assert joined() == [(f"b {key}", f"a {key}") for key in "zxv"]

    # All but the last index are out of date.
    prepared = prepare_metadataset(yaml)
    assert (len(prepared.made), len(prepared.kept), len(prepared.removed)) == (0, 1, 5)
    assert [str(path) for path in (tmp_path / "m.yaml.cache").iterdir()] == list(prepared.kept)
    assert joined() == [(f"b {key}", f"a {key}") for key in "zxv"]


def test_without_the_joiners_module_a_join_is_prepared_but_not_loaded(
    root: Path, users: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    yaml = yaml_of(root, "join_skip", "train")
    monkeypatch.delitem(sys.modules, "moving")
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(root / "ours")])
    prepared = prepare_metadataset(yaml, anew=True)
    assert (len(prepared.made), len(prepared.splits["train"].sources[0])) == (1, 4)
    line = re.escape(f"{yaml}, line 4: joiner: the sample type Pair is to be imported from")
    with pytest.raises(DatasetError, match=f"{line}.* moving, but: No module named 'moving'"):
        get_train_dataset(yaml, batch_size=1, trust_dataset_code=True)
    with pytest.raises(DatasetError, match=f"{line}.* moving. That is code: if you trust"):
        get_train_dataset(yaml, batch_size=1)
