"""Where the data is, what is prepared about it, and what can be wrong with it."""

from __future__ import annotations

import logging
import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import numbered, pet, prepare, shards, write_tar
from encoders import Numbers, here, load, train, val

from energon_fn import (
    CaptioningSample,
    CrudeSample,
    DatasetError,
    ImageClassificationSample,
    decode_part,
    get_dataset,
    get_loader,
    get_train_dataset,
    get_val_dataset,
    get_val_datasets,
    prepare_dataset,
    write_dataset_yaml,
)
from energon_fn.disk.metadata import write_dataset_config

# --- where the data is -------------------------------------------------------------------------

PATHS = {
    "a prepared folder": "prepared",
    "a plain folder": "plain",
    "a glob": "plain/shard_*.tar",
    "a brace pattern": "plain/shard_{000..001}.tar",
    "braces and a glob": "{none,plain}/shard_00[01].tar",
    "one tar": "one.tar",
    "one .tgz": "one.tgz",
    "one .tar.gz": "one.tar.gz",
}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same five samples in all kinds of places."""
    root = tmp_path_factory.mktemp("places")
    for name in ("prepared", "plain"):
        names = shards(root / name, (2, 3))
    prepare(root / "prepared", names)
    write_dataset_yaml(root / "prepared", None)
    (root / "none").mkdir()
    shutil.copy(root / "plain" / names[0], root / "none")
    for name in ("one.tar", "one.tgz", "one.tar.gz"):
        write_tar(root / name, [(f"{n:05d}", numbered(n)) for n in range(5)])
    return root


@pytest.mark.parametrize("form", [str, Path])
@pytest.mark.parametrize("name", [name for name in PATHS if name != "braces and a glob"])
def test_every_form_of_path_gives_the_same_samples(places: Path, name: str, form: Any) -> None:
    path = form(places / PATHS[name])
    found = load(path)
    assert [type(sample) for sample in found] == [CrudeSample] * 5
    assert [(sample["__key__"], sample["json"], sample["txt"]) for sample in found] == [
        (f"{n:05d}", {"n": n}, f"caption {n}") for n in range(5)
    ]
    shuffled = train(path, 5, batch_size=1, task_encoder=Numbers(), repeat=False)
    assert sorted(n for [n] in shuffled) == list(range(5))


def test_a_pattern_may_go_over_folders(places: Path) -> None:
    found = load(places / PATHS["braces and a glob"], task_encoder=Numbers())
    assert found == [0, 1, 0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nowhere", "nowhere.*check the path"),
        ("nowhere/{0..3}.tar", r"0\.tar.*check the path"),
        ("plain/*.tgz", "tgz.*check the path"),
        ("plain/{0.tar", "braces do not match"),
        ("", "neither .nv-meta nor shards|no split part"),
    ],
)
def test_no_dataset_there_is_an_error(tmp_path: Path, name: str, said: str) -> None:
    shards(tmp_path / "plain", (1,))
    (tmp_path / "plain" / "shard_000.tar").rename(tmp_path / "plain" / "shard_000.txt")
    with pytest.raises(DatasetError, match=said):
        load(tmp_path / name)


# --- prepared datasets -------------------------------------------------------------------------


def test_a_prepared_dataset_gives_typed_samples(pets: Path) -> None:
    found = load(pets)
    assert [type(sample) for sample in found] == [CaptioningSample] * 7
    for n, sample in enumerate(found):
        assert (sample.__key__, sample.caption) == (f"{n:05d}", f"pet {n}")
        assert torch.equal(sample.image, decode_part("jpg", pet(n)["jpg"]))
        (source,) = sample.__sources__
        assert (source.dataset_path, source.shard_name) == (
            str(pets),
            f"shard_{int(n > 3):03d}.tar",
        )
        assert set(source.file_names) == {f"{n:05d}.jpg", f"{n:05d}.txt"}


@pytest.mark.parametrize(
    ("sample_type", "field_map", "fields"),
    [
        ("TextSample", {"text": "detail.json[caption]"}, {"text": "pet 5"}),
        ("TextSample", {"text": "md,detail.json[words][1]"}, {"text": "5"}),
        (ImageClassificationSample, {"image": "jpg", "label": "cls"}, {"label": 1}),
        (
            "VQASample",
            {"image": "jpg", "context": "txt", "answers": "detail.json[words]"},
            {"context": "pet 5", "answers": ["pet", "5"], "answer_weights": None},
        ),
    ],
)
def test_the_field_map_says_where_fields_come_from(
    own_pets: Path, sample_type: Any, field_map: dict[str, str], fields: dict[str, Any]
) -> None:
    write_dataset_yaml(own_pets, sample_type, field_map, name="other.yaml")
    sample = load(own_pets, dataset_config="other.yaml")[5]
    expected = sample_type if isinstance(sample_type, str) else sample_type.__name__
    assert type(sample).__name__ == expected
    assert {name: getattr(sample, name) for name in fields} == fields


def test_split_parts_and_split_files(own_pets: Path) -> None:
    def keys(path: Path = own_pets, **options: Any) -> list[int]:
        return [int(sample.__key__) for sample in load(path, **options)]

    assert keys() == [0, 1, 2, 3, 4, 5, 6]
    assert keys(split_part="val") == [7, 8, 9]
    (own_pets / ".nv-meta" / "few.yaml").write_text(
        "split_parts:\n  train: ['shard_{002,000}.tar']\n"
        "exclude: [shard_000.tar/00001, shard_002.tar/00009]\n"
    )
    assert keys(split_config="few.yaml") == [7, 8, 0, 2, 3]
    defaults = {"batch_size": None, "worker_config": here()}
    assert len(get_train_dataset(own_pets, repeat=False, **defaults)) == 7
    assert len(get_val_dataset(own_pets, **defaults)) == 3
    assert len(get_dataset(own_pets, **defaults)) == 7
    with pytest.raises(DatasetError, match=r"no split part 'test'; there are: train, val"):
        get_val_dataset(own_pets, split_part="test", **defaults)
    with pytest.raises(DatasetError, match=r"few2\.yaml does not exist.*there are.* few\.yaml"):
        get_val_dataset(own_pets, split_config="few2.yaml", **defaults)
    with pytest.raises(DatasetError, match=r"other\.yaml does not exist.*there are: dataset\.yaml"):
        get_val_dataset(own_pets, dataset_config="other.yaml", **defaults)


def test_val_datasets_are_the_val_dataset_and_its_source(pets: Path) -> None:
    [(dataset, source)] = get_val_datasets(pets, batch_size=2, worker_config=here())
    assert dataset.sources == (source,)
    assert [source.key(i) for i in range(len(source))] == ["00007", "00008", "00009"]
    assert [batch.__key__ for batch in get_loader(dataset)] == [["00007", "00008"], ["00009"]]


def test_subflavors_reach_samples_and_batches(own_pets: Path) -> None:
    write_dataset_config(
        own_pets, "TextSample", {"text": "txt"}, subflavors={"kind": "pet", "year": 2024}
    )
    assert {str(sample.__subflavors__) for sample in load(own_pets)} == {
        "{'kind': 'pet', 'year': 2024}"
    }
    (batch, *_) = load(own_pets, batch_size=3)
    assert batch.__subflavors__ == [{"kind": "pet", "year": 2024}] * 3


def test_a_datasets_code_runs_only_where_it_is_trusted(own_pets: Path) -> None:
    meta = own_pets / ".nv-meta"
    loader, _ = write_dataset_yaml(own_pets, "TextSample", parts=["txt", "jpg"])
    assert loader == meta / "sample_loader.py"
    loader.write_text(
        "import pathlib\n"
        "from energon_fn import SkipSample\n"
        f"pathlib.Path({str(meta)!r}, 'ran').touch()\n"
        "def sample_loader(raw):\n"
        "    if raw['__key__'] == '00002':\n"
        "        raise SkipSample\n"
        "    return {'text': raw['txt'].upper() + ','.join(sorted(raw))}\n"
        "def part_filter(part):\n"
        "    return part == 'txt'\n"
    )
    with pytest.raises(DatasetError, match=r"dataset\.yaml.*trust_dataset_code=True"):
        load(own_pets)
    assert not (meta / "ran").exists()
    found = load(own_pets, trust_dataset_code=True)
    assert (meta / "ran").exists()
    assert [sample.text[:5] for sample in found] == [f"PET {n}" for n in range(7) if n != 2]
    assert "jpg" not in found[0].text
    assert found[3].__key__ == "00004"
    assert found[3].__sources__[0].shard_name == "shard_001.tar"


# --- what can be wrong with the data ------------------------------------------------------------


def test_a_truncated_tar_is_named_when_it_is_indexed(tmp_path: Path) -> None:
    names = shards(tmp_path, (3, 3))
    whole = (tmp_path / names[1]).read_bytes()
    for size in (len(whole) // 3, 700, 100):
        (tmp_path / names[1]).write_bytes(whole[:size])
        with pytest.raises(DatasetError, match=r"shard_001\.tar.*(again|exclude)"):
            load(tmp_path)
        with pytest.raises(DatasetError, match=r"shard_001\.tar.*(again|exclude)"):
            prepare(tmp_path, names)


@pytest.mark.parametrize("how", ["missing", "truncated", "changed", "other keys"])
def test_a_shard_that_does_not_fit_its_index_ends_the_run(own_pets: Path, how: str) -> None:
    shard = own_pets / "shard_001.tar"
    if how == "missing":
        shard.unlink()
    elif how == "truncated":
        shard.write_bytes(shard.read_bytes()[:1500])
    elif how == "changed":
        write_tar(shard, [(f"{n:05d}", {"txt": b"x" * 999, **pet(n)}) for n in (4, 5, 6)])
    else:
        write_tar(shard, [(f"{n:05d}", pet(n)) for n in (6, 5, 4)])
    loader = get_loader(val(own_pets))
    found = [sample.__key__ for sample in islice(loader, 4)]
    assert found == ["00000", "00001", "00002", "00003"]  # what came before is right
    with pytest.raises(DatasetError, match=r"shard_001\.tar.*energon-fn prepare"):
        next(iter(loader))


def test_an_unprepared_folder_follows_its_shards(tmp_path: Path) -> None:
    shards(tmp_path, (2,))
    assert load(tmp_path, task_encoder=Numbers()) == [0, 1]
    shards(tmp_path, (3, 2))
    assert load(tmp_path, task_encoder=Numbers()) == [0, 1, 2, 3, 4]


def test_an_unknown_field_in_the_field_map(own_pets: Path) -> None:
    with pytest.raises(DatasetError, match=r"no field 'captoin'.*Did you mean 'caption'"):
        write_dataset_yaml(own_pets, "CaptioningSample", {"image": "jpg", "captoin": "txt"})
    path = own_pets / ".nv-meta" / "dataset.yaml"
    path.write_text(path.read_text().replace("caption:", "captoin:"))
    with pytest.raises(DatasetError, match=r"dataset\.yaml, line.*'captoin'.*mean 'caption'"):
        load(own_pets)


def test_duplicate_keys(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = shards(tmp_path, (3, 2))
    write_tar(tmp_path / names[1], [("00001", numbered(7)), ("00008", numbered(8))])
    with caplog.at_level(logging.ERROR):
        _, duplicates = prepare_dataset(
            tmp_path, names, split_parts_ratio=[("train", 1)], shuffle_seed=None, workers=1
        )
    assert duplicates == [("00001", 2)]
    for said in ("'00001'", "unique", "exclude a shard", str(tmp_path)):
        assert said in caplog.text
    assert not (tmp_path / ".nv-meta").exists()
    # Without preparation nothing needs the keys: every sample comes.
    assert load(tmp_path, task_encoder=Numbers()) == [0, 1, 2, 7, 8]
