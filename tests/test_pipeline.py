"""From samples to batches: which methods are called, of encoders of all kinds."""

from __future__ import annotations

import json
import pickle
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import pet, shards, size_of, write_tar
from encoders import (
    Cooking,
    CookingWords,
    Encoder,
    Everything,
    Grouped,
    Halves,
    Numbers,
    Whole,
    here,
    load,
    shout,
    val,
)

from energon_fn import (
    AugmentTaskEncoder,
    CaptioningSample,
    CrudeSample,
    DatasetError,
    DefaultTaskEncoder,
    TextSample,
    decode_part,
    edataclass,
    get_loader,
    get_val_dataset,
    reraise_exception,
)
from energon_fn.disk import files
from energon_fn.disk.source import LARGE
from energon_fn.pipeline import WILL_NEED, lifts

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


# ------------------------------------------------------------------------------- reading beforehand


def told_and_loaded(path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """What the system is told of and what is read, by offset, in the order in which it happens."""
    done: list[tuple[str, int]] = []
    read_at, will_need = files.read_at, files.will_need

    def reading(path: str, offset: int, size: int) -> bytes:
        if size >= LARGE // 2:  # and not of an index
            done.append(("read", offset))
        return read_at(path, offset, size)

    def advising(path: str, offset: int, size: int) -> None:
        done.append(("told", offset))
        will_need(path, offset, size)

    monkeypatch.setattr(files, "read_at", reading)
    monkeypatch.setattr(files, "will_need", advising)
    list(get_loader(get_val_dataset(path, batch_size=1, split_part="train", worker_config=here())))
    return done


def test_the_system_is_told_of_large_samples_before_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = 2 * LARGE
    write_tar(tmp_path / "0.tar", [(f"{n:03d}", {"bin": bytes(size)}) for n in range(200)])
    done = told_and_loaded(tmp_path, monkeypatch)
    told = [offset for what, offset in done if what == "told"]
    read = [offset for what, offset in done if what == "read"]
    assert told == read == sorted({*told})
    assert len(told) == 200
    for offset in told:
        assert done.index(("told", offset)) < done.index(("read", offset))
    ahead = [
        sum(1 if what == "told" else -1 for what, _ in done[: n + 1]) for n in range(len(done))
    ]
    assert WILL_NEED <= max(ahead) <= WILL_NEED + 1


@pytest.mark.parametrize("name", ["0.tar", "0.tar.gz"])
def test_it_is_not_told_of_small_or_compressed_ones(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = LARGE // 2 if name == "0.tar" else 2 * LARGE
    write_tar(tmp_path / name, [(f"{n:03d}", {"bin": bytes(size)}) for n in range(10)])
    assert {what for what, _ in told_and_loaded(tmp_path, monkeypatch)} == {"read"}


def test_a_shard_that_is_gone_is_told_of_when_it_is_due(tmp_path: Path) -> None:
    for shard in range(2):
        samples = [(f"{shard}{n:02d}", {"bin": bytes(2 * LARGE)}) for n in range(5)]
        write_tar(tmp_path / f"{shard}.tar", samples)
    loader = get_loader(
        get_val_dataset(tmp_path, batch_size=1, split_part="train", worker_config=here())
    )
    (tmp_path / "1.tar").unlink()
    batches = iter(loader)
    assert [next(batches)["__key__"] for _ in range(5)] == [[f"00{n}"] for n in range(5)]
    with pytest.raises(DatasetError, match=r"1\.tar"):
        next(batches)
