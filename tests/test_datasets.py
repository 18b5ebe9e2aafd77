"""Datasets: paths, arguments and task encoders, over real shards and pictures."""

from __future__ import annotations

import json
import logging
import pickle
import random
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Parts, jpeg, numbered, shards, write_tar
from hypothesis import given, settings
from hypothesis import strategies as st

from energon_fn import (
    AugmentTaskEncoder,
    CaptioningSample,
    Cooker,
    CrudeSample,
    DatasetError,
    DefaultTaskEncoder,
    FatalSampleError,
    IgnoreSample,
    ImageClassificationSample,
    SampleDecoder,
    SkipSample,
    TextSample,
    WorkerConfig,
    decode_part,
    edataclass,
    get_dataset,
    get_loader,
    get_train_dataset,
    get_val_dataset,
    get_val_datasets,
    prepare_dataset,
    reraise_exception,
    seeds,
    stateless,
    write_dataset_yaml,
)
from energon_fn.disk.metadata import write_dataset_config
from energon_fn.pipeline import lifts


class Encoder(DefaultTaskEncoder[Any, Any, Any, Any]):
    """Overrides nothing."""


def here(lanes: int | None = None, **options: Any) -> WorkerConfig:
    """All the work in this process."""
    return WorkerConfig(rank=0, world_size=1, num_workers=0, lanes=lanes, **options)


def val(path: Any, **options: Any) -> Any:
    """The dataset in order, once; sample by sample unless a batch_size is given."""
    defaults = {"batch_size": None, "split_part": "train", "worker_config": here()}
    return get_val_dataset(path, **{**defaults, **options})


def load(path: Any, **options: Any) -> list[Any]:
    return list(get_loader(val(path, **options)))


def train(path: Any, number: int = 40, **options: Any) -> list[Any]:
    """The first batches of endless training."""
    defaults = {"batch_size": 2, "worker_config": here()}
    return list(islice(get_loader(get_train_dataset(path, **{**defaults, **options})), number))


def prepare(folder: Path, names: list[str], *ratio: tuple[str, float]) -> None:
    """Index and split, by default all to "train", in the shards' order."""
    split = list(ratio) or [("train", 1), ("val", 0)]
    prepare_dataset(folder, names, split_parts_ratio=split, shuffle_seed=None, workers=1)


# What a test does to its folder begins with a copy, not with drawing pictures.


def pet(n: int) -> Parts:
    """A picture of its own size, its caption and more."""
    detail = {"caption": f"pet {n}", "words": ["pet", str(n)], "size": {"width": 8 + 4 * (n % 3)}}
    return {
        "jpg": jpeg(n, (8 + 4 * (n % 3), 6 + 2 * (n % 2))),
        "txt": f"pet {n}".encode(),
        "cls": str(n % 4).encode(),
        "detail.json": json.dumps(detail).encode(),
    }


def size_of(n: int) -> tuple[int, int, int]:
    return 3, 6 + 2 * (n % 2), 8 + 4 * (n % 3)


@pytest.fixture(scope="module")
def pets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """10 captioned pictures in three shards, prepared: two shards to train on."""
    folder = tmp_path_factory.mktemp("pets")
    prepare(folder, shards(folder, (4, 3, 3), pet), ("train", 2), ("val", 1))
    write_dataset_yaml(folder, "CaptioningSample", {"image": "jpg", "caption": "txt"})
    return folder


@pytest.fixture
def own_pets(pets: Path, tmp_path: Path) -> Path:
    """The same in a folder that may be changed."""
    return Path(shutil.copytree(pets, tmp_path / "pets"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 numbered samples in two shards, not prepared."""
    path = tmp_path_factory.mktemp("numbers")
    shards(path, (5, 7))
    return path


class Numbers(Encoder):
    """Samples are their numbers, batches are lists."""

    def encode_sample(self, sample: Any) -> Any:
        return sample["json"]["n"]

    def batch(self, samples: Any) -> Any:
        return samples


class Halves(Numbers):
    """Packs the even and the odd places of each buffer."""

    def select_samples_to_pack(self, samples: Any) -> Any:
        return [samples[::2], samples[1::2]]

    def pack_selected_samples(self, samples: Any) -> Any:
        return tuple(samples)


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


# --- decoding ----------------------------------------------------------------------------------


@pytest.mark.parametrize("image", ["torchrgb", "torchl8", "rgb8", "l", "pil", "pilrgba"])
def test_image_decode_says_how_images_come_out(pets: Path, image: str) -> None:
    for n, sample in enumerate(load(pets, image_decode=image)):
        expected = decode_part("jpg", pet(n)["jpg"], image=image)
        assert type(sample.image) is type(expected)
        assert np.array_equal(np.asarray(sample.image), np.asarray(expected))
        assert sample.caption == f"pet {n}"


@pytest.mark.parametrize("options", [{"auto_decode": False}, {"decoder": None}])
def test_without_a_decoder_parts_are_bytes(pets: Path, folder: Path, options: Any) -> None:
    for n, sample in enumerate(load(pets, **options)):
        assert (sample.image, sample.caption) == (pet(n)["jpg"], pet(n)["txt"])
    for n, sample in enumerate(load(folder, **options)):
        assert {part: sample[part] for part in ("json", "txt")} == numbered(n)


def shout(raw: dict[str, Any]) -> dict[str, Any]:
    return {**raw, "txt": raw["txt"].decode().upper()}


class Whispering(Encoder):
    def decoder(self, raw: dict[str, Any]) -> dict[str, Any]:
        return {**raw, "txt": raw["txt"].decode() + "..."}


class Shouting(Encoder):
    decoder = staticmethod(shout)


class WhisperingAround(AugmentTaskEncoder[Any, Any, Any, Any]):
    decoder = Whispering.decoder


@pytest.mark.parametrize(
    ("options", "caption"),
    [
        ({"decoder": shout}, "PET 0"),
        ({"task_encoder": Whispering()}, "pet 0..."),
        ({"task_encoder": Shouting()}, "PET 0"),
        ({"task_encoder": AugmentTaskEncoder(Whispering())}, "pet 0..."),
        ({"task_encoder": WhisperingAround(Shouting())}, "pet 0..."),
        ({"task_encoder": Whispering(), "decoder": shout}, "PET 0"),
        ({"task_encoder": Whispering(), "decoder": None}, b"pet 0"),
        ({"task_encoder": Whispering(), "auto_decode": False}, b"pet 0"),
    ],
)
def test_which_decoder_is_used(pets: Path, options: dict[str, Any], caption: Any) -> None:
    sample = load(pets, **options)[0]
    assert type(sample) is CaptioningSample
    assert sample.caption == caption
    assert sample.image == pet(0)["jpg"]  # these decoders leave it alone


def test_a_decoder_that_fails_or_skips_costs_its_sample(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def picky(raw: dict[str, Any]) -> dict[str, Any]:
        n = json.loads(raw["json"])["n"]
        if n == 3:
            raise SkipSample
        if n == 4:
            raise OSError("no such font")
        return {**raw, "json": {"n": n}}

    found = load(folder, decoder=picky, task_encoder=Numbers())
    assert found == [n for n in range(12) if n not in (3, 4)]
    (record,) = caplog.records
    for said in ("no such font", "decode", "00004", "shard_000.tar"):
        assert said in record.getMessage()


def test_only_parts_in_the_field_map_are_read_and_decoded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken = {"json": b"{", "png": jpeg()[:99], "pkl": b"\x80\x04."}
    names = shards(tmp_path, (3,), lambda n: {**broken, "txt": f"text {n}".encode()})
    prepare(tmp_path, names)
    write_dataset_yaml(tmp_path, "TextSample", {"text": "txt"})
    found = load(tmp_path)
    assert [sample.text for sample in found] == ["text 0", "text 1", "text 2"]
    assert [sample.__sources__[0].file_names for sample in found] == [
        (f"{n:05d}.txt",) for n in range(3)
    ]
    assert not caplog.records
    write_dataset_yaml(tmp_path, "TextSample", {"text": "json[text]"})
    assert load(tmp_path) == []
    assert len(caplog.records) == 3
    for said in ("json", "00002", "shard_000.tar", "decode"):
        assert said in caplog.records[-1].getMessage()


def test_a_sample_without_a_field_is_dropped_and_named(
    own_pets: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.rmtree(own_pets / ".nv-meta")
    write_tar(own_pets / "shard_001.tar", [("odd", {"txt": b"no picture"}), ("even", pet(0))])
    prepare(own_pets, ["shard_001.tar"])
    write_dataset_yaml(own_pets, "CaptioningSample", {"image": "jpg,png", "caption": "txt"})
    assert [sample.__key__ for sample in load(own_pets)] == ["even"]
    for said in ("'odd'", "shard_001.tar", "no part 'jpg'", "no part 'png'", "split.yaml"):
        assert said in caplog.records[0].getMessage()


# --- cookers -----------------------------------------------------------------------------------


def cook_text(sample: CrudeSample) -> TextSample:
    return TextSample.derive_from(sample, text=sample["txt"])


def cook_words(sample: CrudeSample) -> Iterator[TextSample]:
    if sample["json"]["n"] == 2:
        raise SkipSample
    for word in sample["txt"].split():
        yield TextSample.derive_from(sample, text=word)


class Cooking(Encoder):
    cookers = (Cooker(cook_text),)


class CookingWords(Encoder):
    cookers = (Cooker(cook_words),)


def test_cookers_make_samples_of_crude_ones(folder: Path) -> None:
    found = load(folder, task_encoder=Cooking())
    assert [(type(sample), sample.text) for sample in found] == [
        (TextSample, f"caption {n}") for n in range(12)
    ]
    assert found[7].__key__ == "00007"
    assert found[7].__sources__[0].shard_name == "shard_001.tar"
    (batch, *_) = load(folder, task_encoder=Cooking(), batch_size=12)
    assert type(batch) is TextSample
    assert batch.text == [f"caption {n}" for n in range(12)]


def test_a_cook_may_be_a_generator_and_skip(folder: Path) -> None:
    found = [sample.text for sample in load(folder, task_encoder=CookingWords())]
    assert found == [word for n in range(12) if n != 2 for word in ("caption", str(n))]
    assert len(val(folder, task_encoder=Cooking())) == 12
    with pytest.raises(TypeError, match="number of batches is not known"):
        len(val(folder, task_encoder=CookingWords()))


def test_the_first_cooker_that_takes_the_subflavors_cooks(tmp_path: Path) -> None:
    class Choosing(Encoder):
        cookers = (
            Cooker(lambda sample: "cat", has_subflavors={"kind": "cat"}),
            Cooker(lambda sample: "dog", has_subflavors={"kind": "dog"}),
            Cooker(lambda sample: "any", has_subflavors={"year": 2024}),
        )

    prepare(tmp_path, shards(tmp_path, (2,)))
    for subflavors, cooked in (
        ({"kind": "cat"}, "cat"),
        ({"kind": "dog", "year": 2024}, "dog"),
        ({"kind": "emu", "year": 2024}, "any"),
    ):
        write_dataset_config(tmp_path, None, subflavors=subflavors)
        assert load(tmp_path, task_encoder=Choosing()) == [cooked] * 2
    for subflavors in ({"kind": "emu"}, {}):
        write_dataset_config(tmp_path, None, subflavors=subflavors)
        with pytest.raises(DatasetError, match=r"no cooker takes.*00000.*Add a cooker"):
            load(tmp_path, task_encoder=Choosing())


def test_samples_that_have_a_type_are_not_cooked(pets: Path) -> None:
    assert {type(sample) for sample in load(pets, task_encoder=Cooking())} == {CaptioningSample}


def test_an_overridden_cook_crude_sample_is_asked(folder: Path) -> None:
    class Own(Cooking):
        def cook_crude_sample(self, sample: Any, cooker: Cooker, aux: Any) -> Any:
            assert type(sample) is CrudeSample
            cooked = super().cook_crude_sample(sample, cooker, aux)
            return cooker is self.cookers[0], aux, cooked.text

    for encoder in (Own(), AugmentTaskEncoder(Own())):
        assert load(folder, task_encoder=encoder)[5] == (True, {}, "caption 5")

    class Generating(Cooking):
        def cook_crude_sample(self, sample: Any, cooker: Cooker, aux: Any) -> Any:
            yield from [sample["json"]["n"]] * 2

    generating = val(folder, task_encoder=Generating())
    assert list(get_loader(generating)) == [n for n in range(12) for _ in range(2)]
    with pytest.raises(TypeError, match="not known"):
        len(generating)


def test_a_failing_cook_costs_its_sample(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    @stateless(failure_tolerance=3)
    def cook(sample: CrudeSample) -> Any:
        if sample["json"]["n"] in failing:
            raise KeyError("caption")
        return sample["json"]["n"]

    class Failing(Encoder):
        cookers = (Cooker(cook),)

    failing = {2, 3, 7, 8}
    assert load(folder, task_encoder=Failing()) == [0, 1, 4, 5, 6, 9, 10, 11]
    assert "in cook of sample 00008" in caplog.records[-1].getMessage()
    failing = {2, 3, 4}
    with pytest.raises(FatalSampleError, match="cook failed 3 times in a row"):
        load(folder, task_encoder=Failing())


def test_an_encoder_around_another_adds_its_cookers(folder: Path) -> None:
    class Around(AugmentTaskEncoder[Any, Any, Any, Any]):
        cookers = (Cooker(lambda sample: "outer"),)

    assert load(folder, task_encoder=AugmentTaskEncoder(Cooking()))[1].text == "caption 1"
    assert load(folder, task_encoder=Around(Cooking()))[1] == "outer"
    assert load(folder, task_encoder=Around(Encoder()))[1] == "outer"


# --- skipping, multiplying, failing in every method ---------------------------------------------


class Everything(Encoder):
    """All methods but those that exclude each other; samples are their numbers.

    With a packing buffer of 4 the packs are (0, 2), (1, 3), (4, 6), (5, 7), (8, 10), (9, 11).
    """

    def act(self, name: str, result: Any, numbers: list[int]) -> Any:
        """What the method does with these numbers: here, give its result."""
        return result

    def preencode_sample(self, sample: Any) -> Any:
        n = sample["json"]["n"] if isinstance(sample, dict) else sample
        return self.act("preencode_sample", n, [n])

    def postencode_sample(self, sample: Any) -> Any:
        return self.act("postencode_sample", sample, [sample])

    def select_samples_to_pack(self, samples: Any) -> Any:
        return self.act("select_samples_to_pack", [samples[::2], samples[1::2]], samples)

    def pack_selected_samples(self, samples: Any) -> Any:
        return self.act("pack_selected_samples", tuple(samples), samples)

    def batch(self, samples: Any) -> Any:
        return self.act("batch", samples, flat(samples))

    def encode_batch(self, batch_data: Any) -> Any:
        return self.act("encode_batch", batch_data, flat(batch_data))


class Grouped(Everything):
    def batch_group_criterion(self, sample: Any) -> Any:
        return self.act("batch_group_criterion", (0, None), flat([sample]))


class Whole(Everything):
    """With ``encode_sample`` in place of its two halves."""

    preencode_sample = Encoder.preencode_sample
    postencode_sample = Encoder.postencode_sample

    def encode_sample(self, sample: Any) -> Any:
        n = sample["json"]["n"]
        return self.act("encode_sample", n, [n])


def flat(thing: Any) -> list[int]:
    return [n for part in thing for n in flat(part)] if isinstance(thing, list | tuple) else [thing]


# What goes with sample 6 where the method is left out for it: method, base, packing, numbers.
LOST: list[tuple[str, type[Everything], int | None, set[int]]] = [
    ("encode_sample", Whole, None, {6}),
    ("encode_sample", Whole, 4, {6}),
    ("preencode_sample", Everything, None, {6}),
    ("preencode_sample", Everything, 4, {6}),
    ("postencode_sample", Everything, None, {6}),
    ("postencode_sample", Everything, 4, {6}),
    ("select_samples_to_pack", Everything, 4, {4, 5, 6, 7}),
    ("pack_selected_samples", Everything, 4, {4, 6}),
    ("batch_group_criterion", Grouped, None, {6}),
    ("batch_group_criterion", Grouped, 4, {4, 6}),
    ("batch", Everything, None, {4, 5, 6, 7}),
    ("batch", Grouped, None, {4, 5, 6, 7}),
    ("batch", Everything, 4, {0, 1, 2, 3, 4, 5, 6, 7}),
    ("encode_batch", Everything, None, {4, 5, 6, 7}),
    ("encode_batch", Grouped, None, {4, 5, 6, 7}),
    ("encode_batch", Everything, 4, {0, 1, 2, 3, 4, 5, 6, 7}),
]
METHODS = pytest.mark.parametrize(("method", "base", "packing", "lost"), LOST)


def numbers_in(batches: Any) -> Counter[int]:
    return Counter(flat(list(batches)))


@METHODS
@pytest.mark.parametrize("error", [SkipSample, IgnoreSample("not this one"), SkipSample()])
def test_skipping_drops_what_the_method_is_called_with(
    folder: Path, method: str, base: Any, packing: int | None, lost: set[int], error: Any
) -> None:
    class Skipping(base):  # type: ignore[misc]
        def act(self, name: str, result: Any, numbers: list[int]) -> Any:
            if name == method and 6 in numbers:
                raise error
            return result

    found = load(folder, task_encoder=Skipping(), batch_size=4, packing_buffer_size=packing)
    assert numbers_in(found) == Counter(set(range(12)) - lost)


@METHODS
def test_failing_costs_the_same_and_is_told_to_the_handler(
    folder: Path, method: str, base: Any, packing: int | None, lost: set[int]
) -> None:
    told: list[Any] = []

    class Failing(base):  # type: ignore[misc]
        def act(self, name: str, result: Any, numbers: list[int]) -> Any:
            if name == method and 6 in numbers:
                raise ValueError("six")
            return result

    config = here(global_error_handler=lambda *error: told.append(error))
    options = {"batch_size": 4, "packing_buffer_size": packing, "task_encoder": Failing()}
    found = load(folder, worker_config=config, **options)
    assert numbers_in(found) == Counter(set(range(12)) - lost)
    ((error, item, _),) = told
    assert str(error) == "six"
    assert method in error.__notes__[0]
    assert 6 in flat([item["json"]["n"]] if isinstance(item, dict) else item)
    with pytest.raises(ValueError, match="six"):
        load(folder, worker_config=here(global_error_handler=reraise_exception), **options)


@pytest.mark.parametrize(
    ("method", "base", "packing", "lost"),
    [case for case in LOST if case[0] != "batch_group_criterion"],  # one question, one answer
)
def test_a_generator_may_skip_or_fail_after_some_results(
    folder: Path, method: str, base: Any, packing: int | None, lost: set[int]
) -> None:
    selects = method == "select_samples_to_pack"  # the one that gives many things anyway

    def skip() -> None:
        raise SkipSample

    def fail() -> None:
        raise ValueError("six")

    for end in (None, skip, fail):

        class Generating(base):  # type: ignore[misc]
            def act(self, name: str, result: Any, numbers: list[int]) -> Any:
                return self.results(result, numbers) if name == method else result

            def results(self, result: Any, numbers: list[int], end: Any = end) -> Iterator[Any]:
                first, second = result if selects else (result, result)
                yield first
                if end and 6 in numbers:
                    end()
                yield second

        config = here(global_error_handler=lambda *error: None)
        options = {"batch_size": 4, "packing_buffer_size": packing, "worker_config": config}
        found = numbers_in(load(folder, task_encoder=Generating(), **options))
        missing = ({5, 7} if selects else lost) if end else set()
        assert found == Counter(list(range(12)) * (1 if selects else 2)) - Counter(missing)


def test_results_before_a_failure_are_kept(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Breaking(Numbers):
        def encode_sample(self, sample: Any) -> Any:
            n = sample["json"]["n"]
            yield n
            if n % 4 == 2:
                raise ValueError("no more")
            yield -n

    found = load(folder, task_encoder=Breaking())
    assert found == [m for n in range(12) for m in ((n,) if n % 4 == 2 else (n, -n))]
    assert len(caplog.records) == 3


def test_a_handler_that_raises_ends_the_run_with_its_own_error(folder: Path) -> None:
    class Stop(Exception):
        pass

    def handler(error: Exception, sample: Any, sources: Any) -> None:
        raise Stop(sources[0].shard_name) from error

    class Failing(Numbers):
        def encode_sample(self, sample: Any) -> Any:
            if sample["json"]["n"] == 5:
                raise ValueError("five")
            yield sample["json"]["n"]

    loader = get_loader(
        val(folder, task_encoder=Failing(), worker_config=here(global_error_handler=handler))
    )
    found: list[int] = []
    for _ in range(2):  # it stays where it was
        with pytest.raises(Stop, match=r"shard_001\.tar") as caught:
            found.extend(loader)
        assert isinstance(caught.value.__cause__, ValueError)
    assert found == [0, 1, 2, 3, 4]


def test_whatever_a_batch_has_as_its_sources_its_failure_is_told(folder: Path) -> None:
    class Odd(Encoder):
        def batch(self, samples: Any) -> Any:
            return {"__sources__": [sample["__sources__"] for sample in samples]}

        def encode_batch(self, batch_data: Any) -> Any:
            raise ValueError("not my batch")

    with pytest.raises(FatalSampleError, match="not my batch"):
        load(folder, batch_size=2, task_encoder=Odd(), worker_config=here(failure_tolerance=3))


@pytest.mark.parametrize("groups", [[], [[]], [[], []], ()])
def test_selecting_nothing_drops_the_buffer(folder: Path, groups: Any) -> None:
    class Picky(Halves):
        def select_samples_to_pack(self, samples: Any) -> Any:
            return groups if 0 in samples else [samples]

    found = load(folder, task_encoder=Picky(), packing_buffer_size=5)
    assert found == [(5, 6, 7, 8, 9), (10, 11)]
    if groups == []:
        assert load(folder, task_encoder=Picky(), packing_buffer_size=12) == []


def test_a_selection_that_forgets_to_return_is_told(folder: Path) -> None:
    class Forgetting(Halves):
        def select_samples_to_pack(self, samples: Any) -> Any:
            pass

    with pytest.raises(TypeError, match=r"returned None: return the groups"):
        load(folder, task_encoder=Forgetting(), packing_buffer_size=5)


@pytest.mark.parametrize("answer", [3, None, "ab", (1, 2, 3), ([1], 2), (1, "2"), (1, 2.5)])
def test_a_criterion_that_gives_no_key_and_size_is_told(folder: Path, answer: Any) -> None:
    class Wrong(Numbers):
        def batch_group_criterion(self, sample: Any) -> Any:
            return answer

    with pytest.raises(TypeError, match=r"batch_group_criterion returned .* must return \(key,"):
        load(folder, batch_size=2, task_encoder=Wrong())


@pytest.mark.parametrize("size", [np.int64(3), torch.tensor(3), 3])
def test_a_groups_size_may_be_any_whole_number(folder: Path, size: Any) -> None:
    class Sized(Numbers):
        def batch_group_criterion(self, sample: Any) -> Any:
            return [sample // 6, size]

    found = load(folder, task_encoder=Sized())
    assert found == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]


def test_packing_may_yield_several_packs(folder: Path) -> None:
    class Cutting(Halves):
        def pack_selected_samples(self, samples: Any) -> Any:
            yield tuple(samples[:1])
            yield tuple(samples[1:])

    found = load(folder, task_encoder=Cutting(), packing_buffer_size=6)
    assert found == [(0,), (2, 4), (1,), (3, 5), (6,), (8, 10), (7,), (9, 11)]
    found = load(folder, task_encoder=Cutting(), packing_buffer_size=6, batch_size=3)
    assert found == [[(0,), (2, 4), (1,)], [(3, 5), (6,), (8, 10)], [(7,), (9, 11)]]


def test_leaving_the_loop_between_the_parts_of_a_batch(folder: Path) -> None:
    class Parting(Numbers):
        def encode_batch(self, batch_data: Any) -> Any:
            for n in batch_data:
                yield n, random.random()

    whole = load(folder, batch_size=5, task_encoder=Parting())
    assert [n for n, _ in whole] == list(range(12))
    assert len({drawn for _, drawn in whole}) == 12
    for stop in range(1, 12):
        loader = get_loader(val(folder, batch_size=5, task_encoder=Parting()))
        first = list(islice(loader, stop))
        assert first + list(loader) == whole


# --- which methods are called -------------------------------------------------------------------


class Called(Encoder):
    """Counts calls, and calls the default."""


def counting(name: str) -> Any:
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.calls[name] += 1
        return getattr(Encoder, name)(self, *args, **kwargs)

    return method


EACH = ("preencode_sample", "encode_sample", "postencode_sample", "batch", "encode_batch")


def test_a_method_that_is_not_overridden_is_not_called(
    pets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: Counter[str] = Counter()
    for name in (*EACH, "batch_group_criterion", "cook_crude_sample"):
        default = getattr(DefaultTaskEncoder, name)

        def counted(self: Any, *args: Any, name: str = name, default: Any = default) -> Any:
            calls[name] += 1
            return default(self, *args)

        monkeypatch.setattr(DefaultTaskEncoder, name, counted)
    for encoder in (Encoder(), AugmentTaskEncoder(Encoder())):
        assert len(load(pets, batch_size=2, task_encoder=encoder)) == 4
    assert not calls
    encoder = Encoder(encoded_sample_type=dict, batch_type=dict)
    assert type(load(pets, batch_size=2, task_encoder=encoder)[0]) is dict
    assert calls == {"encode_sample": 7, "batch": 4, "encode_batch": 4}


@pytest.mark.parametrize("name", EACH)
def test_an_overridden_method_is_called_once_for_each(pets: Path, name: str) -> None:
    derived = type("Derived", (Called,), {name: counting(name)})
    encoder = derived()
    encoder.calls = Counter()
    loader = get_loader(val(pets, batch_size=3, task_encoder=encoder))
    next(iter(loader))
    once = {name: 1 if "batch" in name else 3}
    assert encoder.calls == once  # nothing is done ahead
    list(loader)
    assert encoder.calls == {name: 3 if "batch" in name else 7}


def lift_count(path: Path, encoder: Any = None, **options: Any) -> int:
    return len(lifts(val(path, task_encoder=encoder, **options), 0, 0))


def test_stages_that_are_not_used_add_no_lift(folder: Path) -> None:
    encoding = type("Encoding", (Everything,), {"act": lambda self, name, result, n: result})
    assert lift_count(folder) == lift_count(folder, Cooking()) == lift_count(folder, Whole()) == 1
    assert lift_count(folder, encoding()) == 1
    assert lift_count(folder, batch_size=2) == lift_count(folder, Everything(), batch_size=2) == 2
    assert lift_count(folder, Halves(), packing_buffer_size=2) == 2
    assert lift_count(folder, Halves(), packing_buffer_size=2, batch_size=2) == 3
    assert lift_count(folder, Halves(), batch_size=2) == 2  # no buffer, no packing
    alone = lift_count(folder, Grouped())
    assert alone == lift_count(folder, Grouped(), batch_size=2) > 2
    assert lift_count(folder, Grouped(), batch_size=2, packing_buffer_size=3) == alone + 1


def test_without_a_batch_size_nothing_is_batched(folder: Path) -> None:
    encoder = type("Derived", (Called,), {name: counting(name) for name in EACH[3:]})()
    encoder.calls = Counter()
    found = load(folder, task_encoder=encoder, batch_drop_last=True)
    assert [type(sample) for sample in found] == [CrudeSample] * 12
    assert not encoder.calls


# --- encoders of all kinds ----------------------------------------------------------------------


def test_an_object_with_some_of_the_methods_is_an_encoder(pets: Path) -> None:
    class Duck:
        def encode_sample(self, sample: Any) -> Any:
            sample.caption += "!"
            yield sample

    (batch, *_) = load(pets, batch_size=2, task_encoder=Duck())
    assert type(batch) is CaptioningSample
    assert batch.caption == ["pet 0!", "pet 1!"]
    assert batch.image.shape == (2, 3, 8, 12)
    with pytest.raises(TypeError, match="Duck has no select_samples_to_pack"):
        val(pets, task_encoder=Duck(), packing_buffer_size=4)
    assert len(load(pets, task_encoder=object())) == 7


def test_an_encoder_need_not_call_super_init(pets: Path) -> None:
    class Careless(Encoder):
        def __init__(self, suffix: str):
            self.suffix = suffix

        def encode_batch(self, batch_data: Any) -> Any:
            return [caption + self.suffix for caption in batch_data.caption]

    assert load(pets, batch_size=4, task_encoder=Careless("?"))[1] == ["pet 4?", "pet 5?", "pet 6?"]


class Crop(AugmentTaskEncoder[Any, Any, Any, Any]):
    """Goes around another encoder: before its samples, after its batches."""

    def encode_sample(self, sample: CaptioningSample) -> Any:
        sample.image = sample.image[:, :6, :8]
        return super().encode_sample(sample)

    def encode_batch(self, batch_data: Any) -> Any:
        return "after", super().encode_batch(batch_data)


def test_an_encoder_goes_around_another_through_a_whole_dataset(pets: Path) -> None:
    class Inner(Encoder):
        def encode_sample(self, sample: CaptioningSample) -> Any:
            for n in range(2):
                yield CaptioningSample.derive_from(
                    sample, image=sample.image, caption=f"{sample.caption} ({n})"
                )

        def select_samples_to_pack(self, samples: Any) -> Any:
            return [samples[::2], samples[1::2]]

        def pack_selected_samples(self, samples: Any) -> Any:
            return TextSample.derive_from(
                samples[0],
                text=" + ".join(sample.caption for sample in samples) + str(samples[0].image.shape),
            )

    inner = Inner(batch_type=dict)
    found = load(pets, batch_size=2, packing_buffer_size=4, task_encoder=Crop(inner))
    assert len(found) == 4
    after, batch = found[0]
    assert (after, type(batch)) == ("after", dict)
    shape = "torch.Size([3, 6, 8])"
    assert batch["text"] == [f"pet 0 (0) + pet 1 (0){shape}", f"pet 0 (1) + pet 1 (1){shape}"]
    twice = load(pets, batch_size=2, packing_buffer_size=4, task_encoder=Crop(Crop(inner)))
    assert twice[0][1][1]["text"] == batch["text"]


@pytest.mark.parametrize("around", [lambda encoder: encoder, AugmentTaskEncoder])
@pytest.mark.parametrize(
    ("names", "packing", "said"),
    [
        (["select_samples_to_pack"], None, "no pack_selected_samples: write it"),
        (["select_samples_to_pack"], 5, "no pack_selected_samples: write it"),
        (["pack_selected_samples"], 5, "packing_buffer_size is 5.*no select_samples_to_pack"),
        ([], 5, "packing_buffer_size is 5.*leave packing_buffer_size out"),
        (["encode_sample", "preencode_sample"], None, "two halves: write either"),
        (["encode_sample", "postencode_sample"], None, "two halves: write either"),
    ],
)
def test_encoders_that_cannot_work_are_told_so_at_once(
    folder: Path, around: Any, names: list[str], packing: int | None, said: str
) -> None:
    for base in (Encoder, object):
        derived = type("Mine", (base,), {name: counting(name) for name in names})
        with pytest.raises(TypeError, match=said) as caught:
            val(folder, task_encoder=around(derived()), packing_buffer_size=packing)
        assert ("Mine" if around is not AugmentTaskEncoder else "Augment") in str(caught.value)


def test_a_type_for_encode_sample_beside_its_halves_is_told(folder: Path) -> None:
    class Half(Encoder):
        def preencode_sample(self, sample: Any) -> Any:
            return sample

    with pytest.raises(TypeError, match="encoded_sample_type"):
        val(folder, task_encoder=Half(encoded_sample_type=dict))


# --- batches ------------------------------------------------------------------------------------


def test_default_batching_pads_tensors_and_lists_the_rest(pets: Path) -> None:
    found = load(pets, batch_size=3)
    assert [batch.caption for batch in found] == [
        ["pet 0", "pet 1", "pet 2"],
        ["pet 3", "pet 4", "pet 5"],
        ["pet 6"],
    ]
    for batch, numbers in zip(found, ((0, 1, 2), (3, 4, 5), (6,)), strict=True):
        sizes = [size_of(n) for n in numbers]
        assert batch.image.shape == (len(numbers), *map(max, zip(*sizes, strict=True)))
        for image, n, (_, height, width) in zip(batch.image, numbers, sizes, strict=True):
            assert torch.equal(image[:, :height, :width], decode_part("jpg", pet(n)["jpg"]))
            assert image[:, height:].abs().sum() == image[:, :, width:].abs().sum() == 0
    pil = load(pets, batch_size=3, image_decode="pil")[0]
    assert [image.size for image in pil.image] == [size_of(n)[:0:-1] for n in range(3)]


def test_default_batching_of_crude_samples(pets: Path) -> None:
    (batch, *_) = load(pets / "shard_*.tar", batch_size=2)
    assert type(batch) is CrudeSample
    assert batch["__key__"] == ["00000", "00001"]
    assert batch["jpg"].shape == (2, 3, 8, 12)
    assert (batch["txt"], batch["cls"]) == (["pet 0", "pet 1"], [0, 1])
    assert batch["detail.json"]["words"] == [["pet", "0"], ["pet", "1"]]


@dataclass
class RawBatch:
    __key__: list[str]
    image: torch.Tensor
    caption: list[str]


@dataclass
class FinalBatch:
    __keys__: list[str]
    caption: list[str]


@edataclass
class Tokens:
    __key__: str
    caption: str
    length: int = 0


def test_types_with_fewer_fields_and_other_names(pets: Path) -> None:
    raw = load(pets, batch_size=4, task_encoder=Encoder(raw_batch_type=RawBatch))[0]
    assert type(raw) is RawBatch
    assert vars(raw).keys() == {"__key__", "image", "caption"}
    assert raw.__key__ == ["00000", "00001", "00002", "00003"]
    final = load(pets, batch_size=4, task_encoder=Encoder(batch_type=FinalBatch))[1]
    assert final == FinalBatch(["00004", "00005", "00006"], ["pet 4", "pet 5", "pet 6"])
    encoder = Encoder(raw_batch_type=RawBatch, batch_type=FinalBatch)
    assert load(pets, batch_size=4, task_encoder=encoder)[1] == final
    sample = load(pets, task_encoder=Encoder(encoded_sample_type=Tokens))[2]
    assert sample == Tokens(__key__="00002", caption="pet 2")
    encoder = Encoder(encoded_sample_type=Tokens, batch_type=dict)
    assert load(pets, batch_size=2, task_encoder=encoder)[0] == {
        "__key__": ["00000", "00001"],
        "caption": ["pet 0", "pet 1"],
        "length": [0, 0],
    }


def test_a_type_that_lacks_what_it_needs_is_told(pets: Path) -> None:
    @dataclass
    class Needy:
        __key__: list[str]
        tokens: torch.Tensor

    config = here(global_error_handler=reraise_exception)
    with pytest.raises(TypeError, match="Needy requires the field 'tokens'"):
        load(pets, batch_size=4, task_encoder=Encoder(batch_type=Needy), worker_config=config)


def test_batches_know_their_samples(pets: Path) -> None:
    seen: list[Any] = []

    class Watching(Encoder):
        def encode_batch(self, batch_data: Any) -> Any:
            seen.append(batch_data.__restore_key__)
            return batch_data

    dataset = val(pets, batch_size=3, task_encoder=Watching(), worker_config=here(lanes=2))
    found = list(get_loader(dataset))
    assert [key for batch in found for key in batch.__key__] == [f"{n:05d}" for n in range(7)]
    for batch, restore_keys in zip(found, list(seen), strict=True):
        sources = batch.__sources__
        assert [int(key) for key in batch.__key__] == [source.index for source in sources]
        assert {source.dataset_path for source in sources} == {str(pets)}
        assert len(restore_keys) == len(batch.__key__)
        again = [dataset.restore_sample(key) for key in restore_keys]
        assert [sample.__key__ for sample in again] == batch.__key__
        restored = dataset.restore_sample(batch.__restore_key__)
        assert torch.equal(restored.image, batch.image)
        assert restored.__key__ == batch.__key__


def test_batch_drop_last_and_limit(folder: Path) -> None:
    options = {"batch_size": 5, "task_encoder": Numbers()}
    assert load(folder, **options)[-1] == [10, 11]
    assert [len(batch) for batch in load(folder, batch_drop_last=True, **options)] == [5, 5]
    for limit in (1, 2, 3, 99):
        assert len(load(folder, limit=limit, **options)) == min(limit, 3)
        assert len(val(folder, limit=limit, **options)) == min(limit, 3)
    grouped = load(folder, batch_drop_last=True, batch_size=5, task_encoder=Grouped())
    assert [len(batch) for batch in grouped] == [5, 5]


# --- random numbers -----------------------------------------------------------------------------


def drawn() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


class DrawingSamples(Encoder):
    """Numbers with random ones, drawn where single samples are at hand."""

    cookers = (Cooker(lambda sample: (sample["json"]["n"], drawn())),)

    def preencode_sample(self, sample: Any) -> Any:
        for part in "ab":
            yield (*sample, drawn(), part)

    def postencode_sample(self, sample: Any) -> Any:
        return (*sample, drawn())

    def batch(self, samples: Any) -> Any:
        return samples


class DrawingBatches(Numbers):
    """Only what is drawn for whole batches."""

    def batch(self, samples: Any) -> Any:
        return drawn()

    def encode_batch(self, batch_data: Any) -> Any:
        return batch_data, drawn()


def test_what_is_drawn_for_a_sample_depends_on_sample_and_epoch_alone(folder: Path) -> None:
    def epochs(**options: Any) -> list[set[Any]]:
        defaults = {"batch_size": 1, "task_encoder": DrawingSamples()}
        dataset = get_train_dataset(folder, repeat=False, **{**defaults, **options})
        loader = get_loader(dataset)
        return [{sample for batch in loader for sample in batch} for _ in range(2)]

    first, second = epochs(worker_config=here())
    assert epochs(worker_config=here(lanes=5), batch_size=4) == [first, second]
    assert epochs(worker_config=here(), shuffle_buffer_size=7) == [first, second]
    assert len(first) == len(second) == 24
    # cook, preencode and postencode of the two parts of each sample in each epoch
    cooked = {sample[1] for sample in first | second}
    others = {numbers for sample in first | second for numbers in (sample[2], sample[4])}
    assert (len(cooked), len(others), len(cooked | others)) == (24, 96, 120)
    assert not first & set().union(*epochs(worker_config=here(seed_offset=1)))


def test_what_is_drawn_for_a_batch_differs_by_lane_epoch_and_place(folder: Path) -> None:
    dataset = get_train_dataset(
        folder, batch_size=1, repeat=False, task_encoder=DrawingBatches(),
        worker_config=here(lanes=3),
    )  # fmt: skip
    loader = get_loader(dataset)
    found = [numbers for _epoch in range(3) for numbers in loader]
    assert len(found) == len({pair for numbers in found for pair in numbers}) / 2 == 36
    again = get_loader(dataset)
    assert [numbers for _epoch in range(3) for numbers in again] == found


def test_validation_draws_the_same_every_time(folder: Path) -> None:
    for encoder in (DrawingBatches(), DrawingSamples()):
        loader = get_loader(val(folder, batch_size=2, task_encoder=encoder))
        assert list(loader) == list(loader)


def test_stateless_methods_are_not_seeded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Marked(Everything):
        preencode_sample = stateless(lambda self, sample: sample["json"]["n"])
        postencode_sample = stateless(restore_seeds=True)(lambda self, sample: sample)
        batch = stateless(failure_tolerance=5)(lambda self, samples: samples)

    class MarkedCook(Encoder):
        cookers = (Cooker(stateless(lambda sample: sample)), Cooker(lambda sample: sample))

    seeded: list[str] = []
    reseed = seeds.reseed
    monkeypatch.setattr(
        seeds, "reseed", lambda seed, what: (seeded.append(what), reseed(seed, what))
    )
    load(folder, batch_size=4, task_encoder=Marked())
    assert Counter(seeded) == {"postencode_sample": 12, "encode_batch": 3}
    seeded.clear()
    load(folder, batch_size=4, task_encoder=AugmentTaskEncoder(Marked()), packing_buffer_size=6)
    assert Counter(seeded) == {
        "select_samples_to_pack": 2,
        "postencode_sample": 12,
        "pack_selected_samples": 4,
        "encode_batch": 1,
    }
    seeded.clear()
    load(folder, task_encoder=MarkedCook())
    load(folder)
    assert not seeded


def test_failure_tolerance_of_one_method(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Failing(Encoder):
        @stateless(failure_tolerance=4)
        def encode_sample(self, sample: Any) -> Any:
            if sample["json"]["n"] in failing:
                raise ValueError("bad")
            return sample

    failing = {1, 2, 3, 5, 6, 7, 9, 10, 11}
    for encoder in (Failing(), AugmentTaskEncoder(Failing())):
        assert len(load(folder, task_encoder=encoder)) == 3
    failing = {4, 5, 6, 7}
    assert len(caplog.records) == 18
    with pytest.raises(FatalSampleError, match=r"encode_sample failed 4 times in a row.*00007"):
        load(folder, task_encoder=Failing())


# --- arguments ----------------------------------------------------------------------------------

GETTERS = {
    get_dataset: ["batch_size", "packing_buffer_size", "shuffle_buffer_size",
                  "max_samples_per_sequence"],
    get_train_dataset: ["batch_size", "packing_buffer_size", "shuffle_buffer_size",
                        "max_samples_per_sequence", "virtual_epoch_length"],
    get_val_dataset: ["batch_size", "packing_buffer_size", "limit"],
    get_val_datasets: ["batch_size", "packing_buffer_size", "limit"],
}  # fmt: skip


@pytest.mark.parametrize("wrong", [-1, 2.5, "4", [1]])
@pytest.mark.parametrize(
    ("getter", "name"), [(getter, name) for getter, names in GETTERS.items() for name in names]
)
def test_sizes_are_checked_and_named(folder: Path, getter: Any, name: str, wrong: Any) -> None:
    options = {"batch_size": 2, "worker_config": here(), "task_encoder": Halves()}
    with pytest.raises(ValueError, match=name) as caught:
        getter(folder, **{**options, name: wrong})
    assert repr(wrong) in str(caught.value)
    assert "switch it off" in str(caught.value)
    if name != "virtual_epoch_length":
        with pytest.raises(ValueError, match=f"{name} is 0; it must be"):
            getter(folder, **{**options, name: 0})


@pytest.mark.parametrize("number", [np.int64, np.uint8, torch.tensor])
def test_sizes_may_be_numpys(folder: Path, number: Any) -> None:
    def first(number: Any) -> list[Any]:
        config = WorkerConfig(
            rank=number(0), world_size=number(1), num_workers=number(0), lanes=number(2),
            seed_offset=number(5),
        )  # fmt: skip
        return train(
            folder, 9, task_encoder=DrawingBatches(), worker_config=config, batch_size=number(3),
            shuffle_buffer_size=number(4), max_samples_per_sequence=number(2),
            virtual_epoch_length=number(9),
        )  # fmt: skip

    assert first(number) == first(int)


@pytest.mark.parametrize("getter", GETTERS)
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"task_encoder": Numbers}, r"task_encoder is the class Numbers; give .*: Numbers\(\)"),
        ({"worker_config": 4}, "worker_config is 4; give a WorkerConfig"),
        ({"decoder": "pil"}, "decoder is 'pil'; it must be a function.*image_decode"),
        ({"image_decode": "torchrbg"}, "'torchrbg', did you mean 'torchrgb'"),
        ({"dataset_config": "crude.yaml"}, r"crude\.yaml.*energon-fn prepare"),
        ({"split_config": "few.yaml"}, r"few\.yaml.*energon-fn prepare"),
        ({"split_part": "test"}, "no split part 'test'.*energon-fn prepare"),
        ({"batchsize": 3}, "batchsize"),
    ],
)
def test_other_arguments_are_checked_and_named(
    folder: Path, getter: Any, options: dict[str, Any], said: str
) -> None:
    defaults = {"batch_size": 2, "worker_config": here(), "split_part": "train"}
    with pytest.raises((ValueError, TypeError, DatasetError), match=said):
        getter(folder, **{**defaults, **options})


@pytest.mark.parametrize("getter", GETTERS)
@pytest.mark.parametrize("path", [None, 3, ["a.tar", "b.tar"]])
def test_a_path_is_one_path(getter: Any, path: Any) -> None:
    with pytest.raises(TypeError, match=r"path is .* must be one string"):
        getter(path, batch_size=2, worker_config=here())


@pytest.mark.parametrize("getter", GETTERS)
def test_the_batch_size_has_to_be_said(folder: Path, getter: Any) -> None:
    with pytest.raises(TypeError, match="batch_size"):
        getter(folder, worker_config=here())


def test_get_dataset_does_neither_shuffle_nor_repeat_unless_told(folder: Path) -> None:
    def first(**options: Any) -> list[int]:
        defaults = {"batch_size": 1, "worker_config": here(), "task_encoder": Numbers()}
        loader = get_loader(get_dataset(folder, **{**defaults, **options}))
        return [n for [n] in islice(loader, 24)]

    order = list(range(12))
    assert first() == order
    assert first(repeat=True) == order * 2
    shuffled = first(shuffle=True, max_samples_per_sequence=1)
    assert sorted(shuffled) == order != shuffled
    endless = first(shuffle=True, repeat=True, max_samples_per_sequence=1)
    assert endless[:12] == shuffled != endless[12:]
    assert sorted(endless[12:]) == order
    assert first(limit=5) == order[:5]
    virtual = get_loader(
        get_dataset(
            folder, batch_size=1, worker_config=here(), task_encoder=Numbers(), repeat=True,
            virtual_epoch_length=7,
        )
    )  # fmt: skip
    assert [[n for [n] in virtual] for _ in range(3)] == [
        [0, 1, 2, 3, 4, 5, 6],
        [7, 8, 9, 10, 11, 0, 1],
        [2, 3, 4, 5, 6, 7, 8],
    ]


def test_train_options_change_the_order(folder: Path) -> None:
    def order(**options: Any) -> list[int]:
        found = train(folder, repeat=False, batch_size=1, task_encoder=Numbers(), **options)
        return [n for [n] in found]

    assert order() in ([*range(12)], [*range(5, 12), *range(5)])  # whole shards, permuted
    sequences = order(max_samples_per_sequence=2)
    assert sorted(sequences) == list(range(12))
    pairs = [sequences.index(n + 1) - sequences.index(n) for n in (0, 2, 5, 7, 9)]
    assert pairs == [1] * 5
    assert sequences != order(max_samples_per_sequence=2, shuffle_buffer_size=12)


# --- odd sizes ----------------------------------------------------------------------------------


def test_an_empty_split_part(tmp_path: Path) -> None:
    prepare(tmp_path, shards(tmp_path, (3,)))
    write_dataset_yaml(tmp_path, None)
    for options in (
        {},
        {"batch_size": 4},
        {"packing_buffer_size": 3, "task_encoder": Halves()},
        {"task_encoder": Grouped(), "batch_size": 2},
        {"worker_config": here(lanes=3)},
    ):
        assert load(tmp_path, split_part="val", **options) == []
    assert len(val(tmp_path, split_part="val", batch_size=2)) == 0
    assert train(tmp_path, split_part="val", repeat=False) == []
    with pytest.raises(DatasetError, match=r"'val' has no samples.*another split_part"):
        train(tmp_path, split_part="val")


@pytest.mark.parametrize("lanes", [1, 2, 5])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_fewer_samples_than_lanes_batches_or_buffers(
    tmp_path: Path, lanes: int, count: int
) -> None:
    shards(tmp_path, (count,))
    for encoder, options in (
        (Numbers(), {"batch_size": None}),
        (Numbers(), {"batch_size": 4}),
        (Halves(), {"batch_size": 4, "packing_buffer_size": 7}),
        (Grouped(), {"batch_size": 4}),
        (Grouped(), {"batch_size": 4, "packing_buffer_size": 7}),
    ):
        options = {**options, "task_encoder": encoder, "worker_config": here(lanes=lanes)}
        once = Counter(range(count))
        assert numbers_in(load(tmp_path, **options)) == once
        assert numbers_in(train(tmp_path, repeat=False, **options)) == once
        endless = train(tmp_path, 6 * lanes, **options)
        assert len(endless) == 6 * lanes
        assert numbers_in(endless).keys() == once.keys()
        in_order = get_loader(get_dataset(tmp_path, repeat=True, **options))
        repeated = list(islice(in_order, 6 * lanes))
        assert len(repeated) == 6 * lanes
        assert numbers_in(repeated).keys() == once.keys()


def test_training_goes_on_for_ever(tmp_path: Path) -> None:
    class First(Numbers):
        def encode_sample(self, sample: Any) -> Any:
            if sample["json"]["n"]:
                raise SkipSample
            return 0

    shards(tmp_path, (3,))
    for encoder in (Numbers(), Grouped()):
        found = numbers_in(train(tmp_path, 1500, batch_size=1, task_encoder=encoder))
        assert found == Counter(dict.fromkeys(range(3), 500))
    assert train(tmp_path, 500, batch_size=1, task_encoder=First()) == [[0]] * 500


def test_repeating_in_order_goes_on_with_the_lane_whose_turn_is_next(folder: Path) -> None:
    for lanes in (1, 2, 5, 7):
        dataset = get_dataset(
            folder, batch_size=4, repeat=True, task_encoder=Numbers(),
            worker_config=here(lanes=lanes),
        )  # fmt: skip
        found = [n for batch in islice(get_loader(dataset), 14) for n in batch]
        assert found == [*range(12)] * 4 + [*range(8)]


def test_the_number_of_batches_is_that_of_the_epoch(folder: Path) -> None:
    config = WorkerConfig(rank=0, world_size=5, num_workers=0)
    dataset = get_train_dataset(
        folder, batch_size=1, repeat=False, task_encoder=Numbers(), worker_config=config
    )
    loader = get_loader(dataset)
    known = [(len(loader), len(list(loader))) for _epoch in range(5)]
    assert all(said == came for said, came in known)
    assert len({said for said, _ in known}) == 2  # 12 samples for 5 ranks: 2 or 3 to each


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


# --- travelling ---------------------------------------------------------------------------------


def test_a_dataset_pickles(pets: Path, folder: Path) -> None:
    for dataset in (
        val(pets, batch_size=2),
        val(folder, batch_size=2, task_encoder=CookingWords(), decoder=shout_json),
        val(folder, batch_size=2, task_encoder=Halves(), packing_buffer_size=3),
    ):
        list(get_loader(dataset))  # with its files open
        again = pickle.loads(pickle.dumps(dataset))
        assert [repr(batch) for batch in get_loader(again)] == [
            repr(batch) for batch in get_loader(dataset)
        ]


def shout_json(raw: dict[str, Any]) -> dict[str, Any]:
    return {**shout(raw), "json": json.loads(raw["json"])}


def test_a_pickled_dataset_does_not_grow_with_its_samples(tmp_path: Path) -> None:
    sizes = []
    for count in (3, 300):
        shards(tmp_path / str(count), (count, count))
        dataset = val(tmp_path / str(count), batch_size=2)
        next(iter(get_loader(dataset)))
        sizes.append(len(pickle.dumps(dataset)))
    assert sizes[1] < sizes[0] + 20
    assert sizes[0] < 4000


# --- the law ------------------------------------------------------------------------------------


class Random(Encoder):
    """Does what its options say, and draws random numbers all along."""

    def __init__(self, skip: int, most: int, pack: bool, group: int, parts: int):
        self.skip, self.most, self.packs, self.group, self.parts = skip, most, pack, group, parts
        self.encode_sample = self.many if most > 1 else self.one  # type: ignore[method-assign]
        if pack:
            self.select_samples_to_pack = self.select  # type: ignore[method-assign]
            self.pack_selected_samples = self.join  # type: ignore[method-assign]
        if group:
            self.batch_group_criterion = self.criterion  # type: ignore[method-assign]
        if parts:
            self.encode_batch = self.part if parts > 1 else self.whole  # type: ignore[method-assign]

    def maybe_skip(self, n: int) -> None:
        if self.skip and (n + random.randrange(2)) % self.skip == 0:
            raise SkipSample

    def one(self, sample: Any) -> Any:
        n = sample["json"]["n"]
        self.maybe_skip(n)
        return [n, random.random()]

    def many(self, sample: Any) -> Any:
        for copy in range(sample["json"]["n"] % (self.most + 1)):
            yield [*self.one(sample), copy]

    def select(self, samples: Any) -> Any:
        groups = self.groups(samples)
        return groups if self.most == 1 else list(groups)

    def groups(self, samples: Any) -> Any:
        shuffled = random.sample(samples, len(samples))
        while shuffled:
            size = 1 + int(torch.randint(3, ()))
            yield shuffled[:size]
            shuffled = shuffled[size:]

    def join(self, samples: Any) -> Any:
        self.maybe_skip(int(samples[0][0]))
        return [n for sample in samples for n in sample] + [random.random()]

    def criterion(self, sample: Any) -> Any:
        return int(sample[0]) % self.group, 1 + int(sample[0]) % 3

    def batch(self, samples: Any) -> Any:
        return [*samples, float(np.random.rand())]

    def whole(self, batch_data: Any) -> Any:
        self.maybe_skip(len(batch_data))
        return [*batch_data, random.random()]

    def part(self, batch_data: Any) -> Any:
        for part in range(len(batch_data) % (self.parts + 1)):
            yield [batch_data[: part + 1], random.random()]


encoders = st.builds(
    Random,
    skip=st.sampled_from([0, 0, 2, 3]),
    most=st.integers(1, 3),
    pack=st.booleans(),
    group=st.integers(0, 3),
    parts=st.integers(0, 3),
)


@settings(max_examples=40)
@given(
    encoder=encoders,
    lanes=st.integers(1, 3),
    batch_size=st.none() | st.integers(1, 5),
    packing=st.integers(1, 7),
    drop_last=st.booleans(),
    is_train=st.booleans(),
    repeat=st.booleans(),
)
def test_going_on_from_every_state_gives_the_rest(
    folder: Path,
    encoder: Random,
    lanes: int,
    batch_size: int | None,
    packing: int,
    drop_last: bool,
    is_train: bool,
    repeat: bool,
) -> None:
    dataset = get_dataset(
        folder,
        batch_size=batch_size,
        batch_drop_last=drop_last,
        packing_buffer_size=packing if encoder.packs else None,
        shuffle=is_train,
        shuffle_buffer_size=4,
        max_samples_per_sequence=3,
        repeat=repeat,
        task_encoder=encoder,
        worker_config=here(lanes=lanes),
    )
    longest = 15
    alone = []
    try:
        for lane in range(lanes):
            stream = dataset.lane_stream(lane)
            whole = list(islice(stream(None), longest))
            alone.append([batch for batch, _ in whole])
            for k, (_, state) in enumerate(whole, 1):
                assert list(islice(stream(state), longest - k)) == whole[k:]
    except FatalSampleError:
        assert repeat  # everything is skipped
        return
    # In turn, the lanes do not disturb each other; nor do restarts anywhere.
    in_turn = [batches[turn] for turn in range(longest) for batches in alone if turn < len(batches)]
    loader, torn = get_loader(dataset), []
    for stop in (1, 3, 2, 5, 4):
        torn += islice(loader, min(stop, len(in_turn) - len(torn)))
        loader.close()
    assert torn == in_turn[:15]


@pytest.mark.parametrize("is_train", [True, False])
@pytest.mark.parametrize("batch_size", [None, 1, 3, 5])
@pytest.mark.parametrize("lanes", [1, 3, 13])
def test_the_plan_tells_where_a_batch_begins(
    folder: Path, lanes: int, batch_size: int | None, is_train: bool
) -> None:
    encoder = DrawingBatches() if batch_size else Numbers()
    dataset = get_dataset(
        folder, batch_size=batch_size, shuffle=is_train, repeat=True, task_encoder=encoder,
        worker_config=here(lanes=lanes),
    )  # fmt: skip
    for lane in range(lanes):
        whole = [batch for batch, _ in islice(dataset.lane_stream(lane)(None), 14)]
        for done in range(14):
            stream = dataset.lane_stream(lane)(dataset.lane_state(lane, done))
            assert [batch for batch, _ in islice(stream, 14 - done)] == whole[done:]


def test_what_would_be_ignored_is_warned_of(
    folder: Path, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    class Misspelt(Numbers):
        def encode_sampel(self, sample: Any) -> Any:
            return sample

        def select_samples_to_pack(self, samples: list[Any]) -> list[list[Any]]:
            return [samples]

        def pack_selected_samples(self, samples: list[Any]) -> Any:
            return samples

    get_train_dataset(folder, batch_size=1, worker_config=here(), task_encoder=Misspelt())
    assert "encode_sampel, which is never called: did you mean encode_sample?" in caplog.text
    assert "packing_buffer_size is not given: nothing is packed" in caplog.text
    caplog.clear()
    shards(tmp_path, (2, 2))
    prepare_dataset(tmp_path, ["shard_000.tar", "shard_001.tar"],
                    split_parts_ratio=[("train", 8), ("val", 1), ("test", 1)])  # fmt: skip
    assert "2 shards are too few for train 8, val 1, test 1: val got none" in caplog.text
    write_dataset_config(tmp_path, None)
    get_val_dataset(tmp_path, batch_size=1, worker_config=here())
    assert "the split part 'val' has no samples" in caplog.text


@pytest.mark.parametrize("getter", [get_train_dataset, get_val_dataset, get_val_datasets])
def test_a_misspelt_argument_is_named_with_the_function_and_its_neighbour(
    folder: Path, getter: Any
) -> None:
    name = rf"{getter.__name__}\(\) has no argument 'batch_drop_lost'; did you mean batch_drop_last"
    with pytest.raises(TypeError, match=name):
        getter(folder, batch_size=1, batch_drop_lost=True)


def test_a_crude_sample_says_what_it_has() -> None:
    with pytest.raises(AttributeError, match="'caption'; it is a dict with the parts jpg, json"):
        _ = CrudeSample({"__key__": "1", "jpg": b"", "json": {}}).caption


def test_a_loader_takes_a_dataset() -> None:
    with pytest.raises(TypeError, match="get_loader takes a dataset, not 'birds'"):
        get_loader("birds")  # type: ignore[arg-type]


def test_min_size_is_the_decoders_or_told(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [("0", {"jpg": jpeg(size=(1200, 900))})])
    [sample] = get_loader(get_train_dataset(
        tmp_path, batch_size=None, worker_config=here(), repeat=False, min_size=200
    ))  # fmt: skip
    assert sample["jpg"].shape == (3, 225, 300)

    class Own(DefaultTaskEncoder[Any, Any, Any, Any]):
        decoder = SampleDecoder(min_size=400)

    [sample] = get_loader(get_train_dataset(
        tmp_path, batch_size=None, worker_config=here(), repeat=False, task_encoder=Own()
    ))  # fmt: skip
    assert sample["jpg"].shape == (3, 450, 600)
    with pytest.raises(ValueError, match="min_size is 200, but Own has a decoder"):
        get_train_dataset(tmp_path, batch_size=None, task_encoder=Own(), min_size=200)
