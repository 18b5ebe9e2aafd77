"""``trace``: what it shows is what the pipeline does, also where that fails."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import numbered, prepare, write_tar

from energon_fn import (
    AugmentTaskEncoder,
    CaptioningSample,
    Cooker,
    CrudeSample,
    DefaultTaskEncoder,
    SkipSample,
    StateError,
    WorkerConfig,
    blend,
    get_dataset,
    get_loader,
    get_train_dataset,
    join,
    reraise_exception,
    stateless,
    trace,
    using,
    write_dataset_yaml,
)
from energon_fn.failures.trace import Trace

HERE = WorkerConfig(
    rank=0, world_size=1, num_workers=0, lanes=2, global_error_handler=reraise_exception
)


def make(path: Any, encoder: Any = None, **options: Any) -> Any:
    options = {"batch_size": 2, "shuffle_buffer_size": 6, "worker_config": HERE} | options
    return get_train_dataset(path, task_encoder=encoder, **options)


def stages(way: Trace) -> list[str]:
    return [step.stage for step in way.steps]


class Augmenting(DefaultTaskEncoder[Any, Any, Any, Any]):
    """Draws from all generators, and works in place."""

    def encode_sample(self, sample: CaptioningSample) -> CaptioningSample:
        sample.image *= random.random()
        sample.image = sample.image + torch.rand(())
        sample.caption += "!"
        return sample


# ----------------------------------------------------------------------------------- single samples


def test_every_value_of_a_sample_is_there(pets: Path) -> None:
    way = trace(make(pets, Augmenting()), "00003")
    assert stages(way) == ["load", "decode", "sample", "encode_sample"]
    assert (way.key, way.restore_key, way.error) == ("00003", ("sample", 0, 3, 0), None)
    assert way.paths == (f"{pets}/shard_000.tar",)
    (raw,), (decoded,), (sample,), (encoded,) = (step.values for step in way.steps)
    assert raw["txt"] == b"pet 3"
    assert isinstance(raw["jpg"], bytes)
    assert decoded["txt"] == "pet 3"
    assert isinstance(sample, CaptioningSample)
    assert torch.equal(sample.image, decoded["jpg"])  # though it was changed in place later
    assert sample.caption == "pet 3"
    assert encoded.caption == "pet 3!"
    assert not torch.equal(encoded.image, sample.image)
    assert way.steps[3].function.startswith("Augmenting.encode_sample (test_trace.py:")
    assert all(0 < step.seconds < 60 for step in way.steps)


def test_random_numbers_are_those_of_training(pets: Path) -> None:
    class Members(Augmenting):
        def batch(self, samples: list[Any]) -> dict[str, Any]:
            return {"members": samples}

    dataset = make(pets, Members())
    batches = list(itertools.islice(get_loader(dataset), 9))  # some epochs
    random.seed("mine")
    before, torch_before = random.getstate(), torch.manual_seed(7).get_state()
    epochs = set()
    for sample in [sample for batch in batches for sample in batch["members"]]:
        way = trace(dataset, json.loads(json.dumps(sample.__restore_key__)))
        [again] = way.steps[-1].values
        assert torch.equal(again.image, sample.image)
        assert way.key == sample.__key__
        epochs.add(way.restore_key[1])
    assert epochs > {0, 1}
    first = trace(dataset, "00003").steps[-1].values[0]
    assert torch.equal(first.image, trace(dataset, ("sample", 0, 3, 0)).steps[-1].values[0].image)
    assert random.getstate() == before
    assert torch.equal(torch.get_rng_state(), torch_before)


def test_it_comes_between_without_a_trace(pets: Path) -> None:
    """In the middle of a loop, threads or not, nothing changes for the loader."""

    def texts(looking: bool) -> tuple[list[Any], dict[str, float]]:
        loader = get_loader(make(pets, Augmenting()), threads=2 if looking else 0)
        found = []
        for batch in itertools.islice(loader, 8):
            found.append((batch.caption, [image.sum().item() for image in batch.image]))
            if looking:
                trace(loader.dataset, "00001")
        counts = {name: n for name, n in loader.report().items() if name.endswith(("/in", "/out"))}
        return found, counts

    looked, alone = texts(looking=True), texts(looking=False)
    assert looked == alone
    assert alone[1]["encode_sample/in"] >= 16


class Failing(Augmenting):
    def encode_sample(self, sample: CaptioningSample) -> CaptioningSample:
        sample = super().encode_sample(sample)
        if sample.caption == "pet 3!":
            return _refuse(sample)
        return sample


def _refuse(sample: CaptioningSample) -> CaptioningSample:
    raise ValueError(f"{sample.caption!r} is refused")


def test_a_failure_is_the_last_step_and_no_handler_is_asked(pets: Path) -> None:
    way = trace(make(pets, Failing()), "00003")
    assert stages(way) == ["load", "decode", "sample", "encode_sample"]
    last = way.steps[-1]
    assert (last.values, last.skipped) == ((), False)
    assert isinstance(last.error, ValueError)
    assert way.error is last.error
    text = str(way)
    assert "ValueError: 'pet 3!' is refused" in text
    assert "in encode_sample\n      return _refuse(sample)\n" in text
    assert "in _refuse\n      raise ValueError(" in text
    assert "energon_fn/" not in text  # where the library called it from is of no interest


@pytest.mark.parametrize(
    ("parts", "stage", "said"),
    [
        ({"jpg": b"\xff\xd8 no picture", "txt": b"x"}, "decode", "cannot decode part 'jpg'"),
        ({"txt": b"no picture"}, "sample", "no value for 'image'"),
    ],
)
def test_what_is_wrong_with_data_is_told_where_it_shows(
    parts: dict[str, bytes], stage: str, said: str, tmp_path: Path
) -> None:
    write_tar(tmp_path / "a.tar", [("7", parts)])
    prepare(tmp_path, ["a.tar"])
    write_dataset_yaml(tmp_path, "CaptioningSample", {"image": "jpg", "caption": "txt"})
    way = trace(make(tmp_path), "7")
    assert way.steps[-1].stage == stage
    assert way.steps[0].values[0].items() >= parts.items()
    assert said in str(way.error)


def test_a_shard_that_is_gone_is_told(own_pets: Path) -> None:
    dataset = make(own_pets)
    (own_pets / "shard_000.tar").unlink()
    way = trace(dataset, "00003")
    assert (stages(way), way.key, way.paths) == (["load"], "00003", (str(own_pets),))
    assert "shard_000.tar does not exist" in str(way.error)


class Multiplying(DefaultTaskEncoder[Any, Any, Any, Any]):
    """Three outputs, of which one is skipped, one fails; then it fails itself."""

    def preencode_sample(self, sample: CrudeSample) -> Iterator[Any]:
        for n in range(3):
            yield {"__key__": sample["__key__"], "n": n, "drawn": random.random()}
        raise RuntimeError("no fourth")

    @stateless
    def postencode_sample(self, sample: Any) -> Any:
        if sample["n"] == 0:
            raise SkipSample
        return None if sample["n"] == 1 else [sample]


def test_a_generator_gives_several_values_each_with_its_own_way(folder: Path) -> None:
    way = trace(make(folder, Multiplying()), "00007")
    assert stages(way) == ["load", "decode", "preencode_sample", *["postencode_sample"] * 3]
    pre, skipped, none, one = way.steps[2:]
    assert [value["n"] for value in pre.values] == [0, 1, 2]
    assert len({value["drawn"] for value in pre.values}) == 3
    assert str(pre.error) == "no fourth"
    assert (skipped.skipped, skipped.error, skipped.values) == (True, None, ())
    assert "returned None" in str(none.error)
    assert (one.values, one.error) == (([pre.values[2]],), None)
    text = str(way)
    for said in ("1 of 3", "3 of 3", "skipped: SkipSample was raised", "RuntimeError: no fourth"):
        assert said in text


def test_programming_errors_are_shown_and_not_raised(folder: Path) -> None:
    class Wrong(DefaultTaskEncoder[Any, Any, Any, Any]):
        def encode_sample(self, sample: Any) -> Any:
            return smaple  # type: ignore[name-defined]  # noqa: F821

    way = trace(make(folder, Wrong()), "00007")
    assert isinstance(way.error, NameError)
    assert way.steps[-1].error is way.error


def test_the_functions_of_an_encoder_inside_another_are_named(pets: Path) -> None:
    way = trace(make(pets, AugmentTaskEncoder(Augmenting())), "00003")
    assert way.steps[-1].function.startswith("Augmenting.encode_sample")


def cook_even(sample: CrudeSample) -> dict[str, Any]:
    if sample["json"]["n"] % 2:
        raise ValueError("odd")
    return {"__key__": sample["__key__"], "n": sample["json"]["n"]}


class Cooking(DefaultTaskEncoder[Any, Any, Any, Any]):
    cookers = (Cooker(cook_even, has_subflavors={"kind": "number"}),)


def test_cookers_are_a_step(folder: Path) -> None:
    dataset = make(using(str(folder), subflavors={"kind": "number"}), Cooking())
    way = trace(dataset, "00004")
    assert stages(way) == ["load", "decode", "cook"]
    assert way.steps[-1].values == ({"__key__": "00004", "n": 4},)
    assert way.steps[-1].function.startswith("cook_even (test_trace.py:")
    assert str(trace(dataset, "00005").error) == "odd"


def test_a_sample_that_no_cooker_takes_is_told(folder: Path) -> None:
    way = trace(make(folder, Cooking()), "00004")
    assert stages(way) == ["load", "decode", "cook"]
    assert "no cooker takes the crude sample" in str(way.error)


def test_each_part_of_a_joined_sample_is_decoded(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_tar(tmp_path / name / "0.tar", [(str(n), numbered(n)) for n in range(3)])
        prepare(tmp_path / name, ["0.tar"])
        write_dataset_yaml(tmp_path / name, "TextSample", {"text": "txt"})
    pairs = join([str(tmp_path / "a"), str(tmp_path / "b")], Pair)
    way = trace(make(pairs), "1")
    assert stages(way) == ["load", "decode", "decode", "sample"]
    assert way.steps[-1].values[0].texts == ("caption 1", "caption 1")
    assert way.paths == (f"{tmp_path}/a/0.tar", f"{tmp_path}/b/0.tar")
    assert "0.txt  9 bytes" in str(way)
    assert "1.txt  9 bytes" in str(way)


class Pair:
    def __init__(self, key: str, texts: tuple[str, ...]):
        self.key, self.texts = key, texts

    @classmethod
    def from_joined(cls, a: Any, b: Any) -> Pair:
        return cls(a.__key__, (a.text, b.text))


def test_without_a_decoder_the_sample_is_made_of_bytes(pets: Path) -> None:
    way = trace(make(pets, auto_decode=False), "00003")
    assert stages(way) == ["load", "sample"]
    assert way.steps[1].values[0].caption == b"pet 3"


# --------------------------------------------------------------------------------------- which one


def test_the_first_dataset_that_has_the_key_or_the_one_asked_for(tmp_path: Path) -> None:
    for name, first in (("a", 0), ("b", 3)):
        samples = [(str(n), {"txt": f"{name}{n}".encode()}) for n in range(first, first + 5)]
        write_tar(tmp_path / name / "0.tar", samples)
    a, b = tmp_path / "a", tmp_path / "b"
    dataset = make(blend([(str(a), 1), (str(b), 2)]))

    def text(key: Any) -> str:
        found: str = trace(dataset, key).steps[1].values[0]["txt"]
        return found

    assert [text("2"), text("4"), text("6")] == ["a2", "a4", "b6"]
    assert [text((str(a), "4")), text((str(b), "4"))] == ["a4", "b4"]
    assert text((str(tmp_path / "b/../b/"), "4")) == "b4"
    assert trace(dataset, (str(b), "4")).restore_key == ("sample", 0, 6, 0)
    with pytest.raises(ValueError, match=f"no sample has the key '9' in {a}, {b}"):
        text("9")
    with pytest.raises(ValueError, match=f"no sample has the key '2' in {b}: check"):
        text((str(b), "2"))


@pytest.mark.parametrize(
    "key",
    [7, (), ("sample", 0, 999, 0), ("sample", 0, -1, 0), ("sample", 0), ("batch", 0, 2, (None, 0))],
)
def test_keys_that_are_none_are_errors(key: Any, folder: Path) -> None:
    with pytest.raises(StateError, match="no sample or batch of this dataset"):
        trace(make(folder), key)


def test_a_loader_is_no_dataset(folder: Path) -> None:
    with pytest.raises(TypeError, match=r"\.dataset"):
        trace(get_loader(make(folder)), "00001")  # type: ignore[arg-type]


# ----------------------------------------------------------------------------------------- batches


class Packing(Augmenting):
    def select_samples_to_pack(self, samples: list[Any]) -> list[list[Any]]:
        return [samples[::2], samples[1::2]]

    def pack_selected_samples(self, samples: list[Any]) -> CaptioningSample:
        caption = " ".join(sample.caption for sample in samples)
        image = torch.stack([sample.image.mean() for sample in samples]) + torch.rand(())
        return CaptioningSample.derive_from(samples[0], image=image, caption=caption)


class Grouping(Augmenting):
    def batch_group_criterion(self, sample: CaptioningSample) -> tuple[Any, None]:
        return sample.image.shape, None

    def encode_batch(self, batch: Any) -> Any:
        batch.image = batch.image + torch.rand(())
        return batch


@pytest.mark.parametrize(
    ("encoder", "options", "expected"),
    [
        (Augmenting, {}, ["samples", "batch"]),
        (Grouping, {}, ["samples", "batch", "encode_batch"]),
        (Packing, {"packing_buffer_size": 4}, ["samples", "batch"]),
        (
            Packing,
            {"packing_buffer_size": 4, "batch_size": None},
            ["samples", "pack_selected_samples"],
        ),
        (Augmenting, {"batch_size": None}, ["load", "decode", "sample", "encode_sample"]),
    ],
)
def test_of_a_batch_the_samples_are_shown_and_what_is_made_of_them(
    encoder: type, options: dict[str, Any], expected: list[str], pets: Path
) -> None:
    dataset = make(pets, encoder(), **options)
    for batch in itertools.islice(get_loader(dataset), 12):
        way = trace(dataset, json.loads(json.dumps(batch.__restore_key__)))
        assert stages(way) == expected
        assert torch.equal(way.steps[-1].values[0].image, batch.image)
        assert way.error is None
        if expected[0] == "samples":
            members = way.steps[0].values
            captions = [batch.caption] if isinstance(batch.caption, str) else batch.caption
            assert " ".join(sample.caption for sample in members) == " ".join(captions)
            assert json.dumps(members[0].__restore_key__) in str(way)


def test_a_batch_behind_the_end_is_an_error(folder: Path) -> None:
    dataset = get_dataset(folder, batch_size=5, worker_config=HERE)
    *_, (batch, (inner, given, _)) = dataset.lane_stream(0)()
    assert trace(dataset, batch["__restore_key__"]).steps[0].stage == "samples"
    with pytest.raises(StateError, match="the dataset ends"):
        trace(dataset, ("batch", 0, 0, (inner, given)))


# ----------------------------------------------------------------------------------------- showing


@pytest.mark.parametrize("width", [20, 40, 59, 79, 119])
@pytest.mark.parametrize("encoder", [Augmenting, Failing, Multiplying])
def test_lines_fit_the_width(width: int, encoder: type, pets: Path, folder: Path) -> None:
    path, key = (folder, "00007") if encoder is Multiplying else (pets, "00003")
    way = trace(make(path, encoder()), key)
    lines = way.text(width).splitlines()
    long = [line for line in lines if len(line) > width and ".py:" not in line]
    assert long == []
    assert str(way) == repr(way) == way.text(79)


def test_nothing_of_the_data_moves_the_cursor(tmp_path: Path) -> None:
    evil = "\x1b[31m\r\n\u202e"
    write_tar(tmp_path / "a.tar", [("7", {"txt": evil.encode(), f"{evil[:5]}.txt": b"x"})])

    class Telling(DefaultTaskEncoder[Any, Any, Any, Any]):
        def encode_sample(self, sample: Any) -> Any:
            raise ValueError(sample["txt"])

    text = str(trace(make(tmp_path, Telling()), "7"))
    assert not {*evil} & {*text} - {"\n", "[", "3", "1", "m"}
    assert "ValueError: \ufffd[31m" in text


def test_a_notebook_gets_pictures_and_no_markup_of_the_data(tmp_path: Path, pets: Path) -> None:
    page = trace(make(pets, Failing()), "00003")._repr_html_()
    assert page.count("<img src='data:image/png;base64,") == 2  # decoded, and as a sample
    assert "&#x27;pet 3!&#x27; is refused" in page
    assert len(page) < 100_000
    dataset = make(pets, Augmenting(), batch_size=5)
    batch = next(iter(get_loader(dataset)))
    page = trace(dataset, batch.__restore_key__)._repr_html_()
    assert page.count("<img") == 2  # the samples, and the batch
    write_tar(tmp_path / "a.tar", [("<b>7", {"txt": b"<script>"})])
    page = trace(make(tmp_path), "<b>7")._repr_html_()
    assert "<script>" not in page
    assert "<b>" not in page
    assert "&lt;script&gt;" in page


class Held:
    """What cannot be copied."""

    def __deepcopy__(self, memo: Any) -> Held:
        raise TypeError("not to be copied")


def test_what_cannot_be_copied_is_shown_as_it_is(folder: Path) -> None:
    held = Held()

    class Holding(DefaultTaskEncoder[Any, Any, Any, Any]):
        def preencode_sample(self, sample: Any) -> Any:
            return CrudeSample(sample, held=held, numbers=[1, held])

        def postencode_sample(self, sample: Any) -> Any:
            sample["numbers"][0] = 2
            return sample

    pre, post = trace(make(folder, Holding()), "00007").steps[-2:]
    assert pre.values[0]["held"] is held
    assert pre.values[0]["numbers"] == [1, held]
    assert post.values[0]["numbers"] == [2, held]
