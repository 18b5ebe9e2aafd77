"""Our dataset in torch's own DataLoader, and in torchdata's: the batches of our loader."""

from __future__ import annotations

import copy
import gc
import json
import os
import pickle
import random
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import shards
from encoders import Halves, Numbers, flat
from torch.utils.data import DataLoader

from energon_fn import (
    SkipSample,
    StateError,
    WorkerConfig,
    as_iterable_dataset,
    get_loader,
    get_train_dataset,
    get_val_dataset,
    torch_dataset,
)

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create", "ignore:'set_vital'")
SAMPLES = 98


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data")
    shards(path, (41, 20, SAMPLES - 61))
    return path


class Drawing(Numbers):
    """Samples are their numbers and two drawn ones."""

    def encode_sample(self, sample: Any) -> Any:
        return [sample["json"]["n"], random.random(), float(torch.rand(()))]


class Sparse(Drawing):
    """Most samples of the last shard are left out, so that some lanes end early."""

    def encode_sample(self, sample: Any) -> Any:
        if 61 <= sample["json"]["n"] < 95:
            raise SkipSample
        return super().encode_sample(sample)


class Packed(Halves):
    def pack_selected_samples(self, samples: Any) -> Any:
        return list(samples)


def config(lanes: int, rank: int = 0, world_size: int = 1) -> WorkerConfig:
    return WorkerConfig(rank=rank, world_size=world_size, num_workers=0, lanes=lanes)


def train(folder: Path, lanes: int = 4, **options: Any) -> Any:
    defaults = {
        "batch_size": 3,
        "shuffle_buffer_size": 10,
        "max_samples_per_sequence": 5,
        "task_encoder": Drawing(),
        "worker_config": config(lanes),
    }
    return get_train_dataset(folder, **{**defaults, **options})


def torchs(dataset: Any, workers: int = 0, **options: Any) -> DataLoader[Any]:
    items = as_iterable_dataset(dataset)
    return DataLoader(items, batch_size=None, num_workers=workers, **options)


def stateful(dataset: Any, workers: int = 0, **options: Any) -> Any:
    torchdata = pytest.importorskip("torchdata.stateful_dataloader")
    items = as_iterable_dataset(dataset)
    return torchdata.StatefulDataLoader(items, batch_size=None, num_workers=workers, **options)


def pretend(monkeypatch: pytest.MonkeyPatch, worker: int, workers: int) -> None:
    """Make this process a worker: a DataLoader takes five seconds to end one that fails."""
    info = SimpleNamespace(id=worker, num_workers=workers) if workers else None
    monkeypatch.setattr(torch_dataset, "get_worker_info", lambda: info)


LAYOUTS = [(1, 0), (1, 1), (4, 0), (4, 1), (4, 2), (4, 4), (6, 2), (6, 3)]
ENDLESS = {}
ONE_EPOCH = {"repeat": False}
VIRTUAL = {"virtual_epoch_length": 12}


@pytest.mark.parametrize(("lanes", "workers"), LAYOUTS)
@pytest.mark.parametrize("options", [ENDLESS, {"packing_buffer_size": 7, "task_encoder": Packed()}])
def test_the_batches_are_those_of_our_loader(
    folder: Path, lanes: int, workers: int, options: dict[str, Any]
) -> None:
    expected = list(islice(get_loader(train(folder, lanes, **options)), 40))
    assert list(islice(torchs(train(folder, lanes, **options), workers), 40)) == expected


@pytest.mark.parametrize(("lanes", "workers"), [(1, 0), (4, 0), (4, 2), (6, 3)])
@pytest.mark.parametrize("options", [ONE_EPOCH, VIRTUAL], ids=["epochs", "virtual epochs"])
@pytest.mark.parametrize("persistent", [False, True])
def test_each_iteration_is_the_next_epoch(
    folder: Path, lanes: int, workers: int, options: dict[str, Any], persistent: bool
) -> None:
    ours = get_loader(train(folder, lanes, **options))
    expected = [list(ours) for _ in range(3)]
    keep = {"persistent_workers": True} if workers and persistent else {}
    theirs = torchs(train(folder, lanes, **options), workers, **keep)
    assert len(theirs) == len(expected[0])
    assert [list(theirs) for _ in range(3)] == expected
    anew = as_iterable_dataset(train(folder, lanes, **options))  # a DataLoader for each epoch
    for epoch in expected:
        assert list(DataLoader(anew, batch_size=None, num_workers=workers)) == epoch


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("limit", [None, 5])
def test_validation_is_in_the_datasets_order(folder: Path, workers: int, limit: int | None) -> None:
    dataset = get_val_dataset(
        folder, batch_size=3, split_part="train", limit=limit, task_encoder=Numbers(),
        worker_config=config(4),
    )  # fmt: skip
    validation = torchs(dataset, workers)
    count = SAMPLES if limit is None else 3 * limit
    for _ in range(2):
        assert flat(list(validation)) == list(range(count))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_that_is_left_is_over(folder: Path, workers: int) -> None:
    ours = get_loader(train(folder, repeat=False))
    expected = [list(ours) for _ in range(3)]
    theirs = torchs(train(folder, repeat=False), workers)
    assert [next(iter(theirs)) for _ in range(2)] == [epoch[0] for epoch in expected[:2]]
    assert list(theirs) == expected[2]


def test_an_endless_iteration_that_is_left_goes_on_only_where_its_place_is_known(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = list(islice(get_loader(train(folder)), 10))
    theirs = torchs(train(folder))
    assert [*islice(theirs, 4), *islice(theirs, 6)] == expected
    pretend(monkeypatch, 0, 1)
    for options in (ENDLESS, VIRTUAL):
        items = as_iterable_dataset(train(folder, **options))
        assert list(islice(items, 4)) == expected[:4]
        with pytest.raises(StateError, match="left before its end"):
            next(iter(items))


def test_lanes_that_end_early_leave_the_order_where_each_worker_has_one(folder: Path) -> None:
    dataset = train(folder, task_encoder=Sparse(), **ONE_EPOCH)
    expected = list(get_loader(dataset))
    for workers in (0, 1, 4):
        assert list(torchs(dataset, workers)) == expected
    two = list(torchs(dataset, 2))
    assert sorted(two) == sorted(expected)
    lanes = [list(get_loader(dataset, worker_config=config(4, lane, 4))) for lane in range(4)]
    assert len({len(lane) for lane in lanes}) > 1
    whole = 4 * min(map(len, lanes))  # until the first lane ends
    assert two[:whole] == expected[:whole]


def test_ranks_have_their_own_lanes(folder: Path) -> None:
    expected = list(get_loader(train(folder, lanes=8, **ONE_EPOCH)))
    ranks = [
        list(torchs(train(folder, 8, worker_config=config(8, rank, 2), **ONE_EPOCH), workers=2))
        for rank in range(2)
    ]
    assert [batch for pair in zip(*ranks, strict=False) for batch in pair] == expected[: 2 * min(
        map(len, ranks)
    )]  # fmt: skip
    assert sorted(batch for rank in ranks for batch in rank) == sorted(expected)


def test_spawned_workers_do_the_same(folder: Path) -> None:
    ours = get_loader(train(folder, **VIRTUAL))
    expected = [list(ours) for _ in range(2)]
    theirs = torchs(
        train(folder, **VIRTUAL), 2, multiprocessing_context="spawn", persistent_workers=True
    )
    assert [list(theirs) for _ in range(2)] == expected


def test_this_process_keeps_its_random_numbers(folder: Path) -> None:
    random.seed(3)
    torch.manual_seed(3)
    before = random.getstate()
    batches = iter(torchs(train(folder)))  # this draws the DataLoader's own seed
    drawn = torch.get_rng_state()
    list(islice(batches, 5))
    assert random.getstate() == before
    assert torch.equal(torch.get_rng_state(), drawn)


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_are_not_batched_again(folder: Path, workers: int) -> None:
    items = as_iterable_dataset(train(folder))
    with pytest.raises(ValueError, match=r"DataLoader\(dataset, batch_size=None\)"):
        next(iter(DataLoader(items, num_workers=workers)))


@pytest.mark.parametrize(
    ("options", "workers", "said"),
    [
        ({}, 3, r"num_workers is 3; it must divide .* which is 4.*take 1, 2, 4 or 0"),
        ({}, 8, "num_workers is 8"),
        ({"virtual_epoch_length": 7}, 2, "virtual_epoch_length is 7"),
        ({"virtual_epoch_length": 8, "repeat": False}, 2, "virtual_epoch_length with repeat=False"),
    ],
)
def test_workers_that_could_not_keep_the_order_are_refused(
    folder: Path, options: dict[str, Any], workers: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, workers - 1, workers)
    with pytest.raises(ValueError, match=said):
        next(iter(as_iterable_dataset(train(folder, **options))))


def test_a_data_loader_makes_lists_of_tuples_unless_told_otherwise(folder: Path) -> None:
    dataset = train(folder, packing_buffer_size=7, task_encoder=Halves())
    expected = next(iter(get_loader(dataset)))
    assert next(iter(torchs(dataset, collate_fn=lambda batch: batch))) == expected
    assert next(iter(torchs(dataset))) == [list(pack) for pack in expected] != expected


def test_a_loader_is_no_dataset(folder: Path) -> None:
    with pytest.raises(TypeError, match="takes a dataset"):
        as_iterable_dataset(get_loader(train(folder)))  # type: ignore[arg-type]


def test_a_copy_counts_its_own_epochs_and_what_is_written_goes_with_it(folder: Path) -> None:
    items = as_iterable_dataset(train(folder, **ONE_EPOCH))
    first, second = (list(DataLoader(items, batch_size=None, num_workers=2)) for _ in range(2))
    for anew in (copy.deepcopy(items), pickle.loads(pickle.dumps(items))):
        assert list(DataLoader(anew, batch_size=None, num_workers=2)) == first != second
        assert anew._folder != items._folder
    written = [each._folder for each in (items, anew)]
    assert all(map(os.listdir, written))
    del items, anew
    gc.collect()
    assert not any(map(os.path.exists, written))


@pytest.mark.parametrize(("workers", "persistent"), [(0, False), (2, False), (2, True)])
@pytest.mark.parametrize("options", [ENDLESS, ONE_EPOCH, VIRTUAL])
def test_a_stateful_data_loader_resumes_at_every_step(
    folder: Path, workers: int, persistent: bool, options: dict[str, Any]
) -> None:
    def make(state: Any = None) -> Any:
        keep = {"persistent_workers": True} if persistent else {}
        loader = stateful(train(folder, **options), workers, **keep)
        if state is not None:
            loader.load_state_dict(json.loads(json.dumps(state)))
        return loader

    ours = get_loader(train(folder, **options))
    epochs = [list(ours if options else islice(ours, 40)) for _ in range(3)]
    loader = make()
    batches = iter(loader)
    states = [loader.state_dict()]
    for batch in islice(batches, len(epochs[0])):
        assert batch == epochs[0][len(states) - 1]
        states.append(loader.state_dict())
    for step in range(0, len(states), 1 if not workers else 5):
        loader = make(states[step])
        assert list(islice(loader, len(epochs[0]) - step)) == epochs[0][step:]
    if options:
        assert next(batches, None) is None
        loader = make(loader.state_dict() if step == len(epochs[0]) else states[-1])
        assert list(loader) == []  # the state is that of an epoch whose end was not asked for
        assert [list(loader) for _ in range(2)] == epochs[1:]


def test_a_stateful_data_loader_goes_on_behind_an_epoch(folder: Path) -> None:
    for workers in (0, 2):
        ours = get_loader(train(folder, **ONE_EPOCH))
        epochs = [list(ours) for _ in range(3)]
        loader = stateful(train(folder, **ONE_EPOCH), workers)
        assert list(loader) == epochs[0]
        state = loader.state_dict()
        loader = stateful(train(folder, **ONE_EPOCH), workers)
        loader.load_state_dict(state)
        assert [list(loader) for _ in range(2)] == epochs[1:]


def test_a_state_asks_for_as_many_workers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    items = as_iterable_dataset(train(folder))
    pretend(monkeypatch, 0, 2)
    next(iter(items))
    state = items.state_dict()
    pretend(monkeypatch, 0, 4)
    with pytest.raises(StateError, match=r"saved with num_workers=2, here it is 4"):
        items.load_state_dict(state)


def test_a_state_of_other_data_is_refused(folder: Path) -> None:
    loader = stateful(train(folder))
    next(iter(loader))
    other = stateful(train(folder, batch_size=4))
    other.load_state_dict(loader.state_dict())
    with pytest.raises(StateError, match="batch_size: saved with 3, here 4"):
        next(iter(other))
