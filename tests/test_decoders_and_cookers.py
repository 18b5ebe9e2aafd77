"""From the parts in a shard to samples: decoders, field maps and cookers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import jpeg, numbered, pet, prepare, shards, write_tar
from encoders import Cooking, CookingWords, Encoder, Numbers, load, shout, val

from energon_fn import (
    AugmentTaskEncoder,
    CaptioningSample,
    Cooker,
    CrudeSample,
    DatasetError,
    FatalSampleError,
    SkipSample,
    TextSample,
    decode_part,
    get_loader,
    stateless,
    write_dataset_yaml,
)
from energon_fn.disk.metadata import write_dataset_config

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
