"""Datasets: arguments, orders and odd sizes, over real shards."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import jpeg, prepare, shards, write_tar
from encoders import DrawingBatches, Grouped, Halves, Numbers, here, load, numbers_in, train, val

from energon_fn import (
    CrudeSample,
    DatasetError,
    DefaultTaskEncoder,
    SampleDecoder,
    SkipSample,
    WorkerConfig,
    get_dataset,
    get_loader,
    get_train_dataset,
    get_val_dataset,
    get_val_datasets,
    prepare_dataset,
    write_dataset_yaml,
)
from energon_fn.disk.metadata import write_dataset_config

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


def test_what_would_be_ignored_is_warned_of(
    folder: Path, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    class Misspelt(Numbers):
        def encode_sampel(self, sample: Any) -> Any:
            return sample

        def build_batch(self, dataset: Any) -> Any:
            return dataset

        def select_samples_to_pack(self, samples: list[Any]) -> list[list[Any]]:
            return [samples]

        def pack_selected_samples(self, samples: list[Any]) -> Any:
            return samples

    get_train_dataset(folder, batch_size=1, worker_config=here(), task_encoder=Misspelt())
    assert "encode_sampel, which is never called: did you mean encode_sample?" in caplog.text
    assert "build_batch, which is never called: the stages are fixed" in caplog.text
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
