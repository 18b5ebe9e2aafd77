"""Samples and batches made again from their restore keys, and functions that do not replay."""

import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import shards

from energon_fn import (
    Batch,
    CrudeSample,
    DefaultTaskEncoder,
    StateError,
    WorkerConfig,
    edataclass,
    get_loader,
    get_train_dataset,
    stateless,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data")
    shards(path, (20, 21))
    return path


@edataclass
class Numbers(Batch):
    numbers: torch.Tensor
    members: list[Any]


class Encoder(DefaultTaskEncoder[Any, Any, Any, Any]):
    """Samples are multiplied and augmented; batches remember their samples."""

    def encode_sample(self, sample: CrudeSample) -> Iterator[Any]:
        for copy in range(1 + sample["json"]["n"] % 3):
            yield CrudeSample(
                sample, n=torch.tensor([float(sample["json"]["n"]), copy, random.random()])
            )

    def batch(self, samples: list[Any]) -> Numbers:
        numbers = torch.stack([sample["n"] for sample in samples]) + torch.rand(())
        return Numbers.from_samples(samples, numbers=numbers, members=list(samples))


class Packing(Encoder):
    def select_samples_to_pack(self, samples: list[Any]) -> list[list[Any]]:
        random.shuffle(samples)
        return [samples[::2], samples[1::2]]

    def pack_selected_samples(self, samples: list[Any]) -> Any:
        return CrudeSample(samples[0], n=sum(sample["n"] for sample in samples) + torch.rand(()))


class Grouping(Encoder):
    def batch_group_criterion(self, sample: Any) -> tuple[int, int]:
        return int(sample["n"][0]) % 2, 3


def make(folder: Path, encoder: Any, workers: int = 0, **options: Any) -> Any:
    dataset = get_train_dataset(
        folder,
        batch_size=options.pop("batch_size", 4),
        shuffle_buffer_size=10,
        packing_buffer_size=5 if isinstance(encoder, Packing) else None,
        worker_config=WorkerConfig(rank=0, world_size=1, num_workers=workers, lanes=3),
        task_encoder=encoder,
        **options,
    )
    return get_loader(dataset)


@pytest.mark.parametrize("encoder", [Encoder, Packing, Grouping])
def test_batches_are_made_again_on_a_fresh_dataset(folder: Path, encoder: type) -> None:
    batches = list(itertools.islice(make(folder, encoder(), workers=2), 30))
    keys = [json.loads(json.dumps(batch.__restore_key__)) for batch in batches]
    assert len({str(key) for key in keys}) == 30
    fresh = make(folder, encoder())
    drawn = random.getstate()
    for batch, key in random.Random(0).sample(list(zip(batches, keys, strict=True)), 12):
        again = fresh.restore_sample(key)
        assert torch.equal(again.numbers, batch.numbers)
        assert again.__key__ == batch.__key__
        assert again.__restore_key__ == batch.__restore_key__
    assert random.getstate() == drawn


def test_samples_are_made_again_whichever_of_many_they_are(folder: Path) -> None:
    batches = itertools.islice(make(folder, Encoder(), workers=1), 20)
    samples = [sample for batch in batches for sample in batch.members]
    assert len({sample["__restore_key__"] for sample in samples}) == len(samples)
    fresh = make(folder, Encoder())
    for sample in samples:
        again = fresh.restore_sample(json.loads(json.dumps(sample["__restore_key__"])))
        assert torch.equal(again["n"], sample["n"])
        assert again["__restore_key__"] == sample["__restore_key__"]


def test_without_batches_a_sample_is_made_again_too(folder: Path) -> None:
    for sample in itertools.islice(make(folder, Encoder(), batch_size=None), 25):
        again = make(folder, Encoder(), batch_size=None).restore_sample(sample["__restore_key__"])
        assert again["__key__"] == sample["__key__"]


@pytest.mark.parametrize(
    "key",
    [
        (),
        "00001",
        ("batch", 0, 0),
        ("sample", 0, 999, 0),
        ("sample", 0, 1, 99),
        ("batch", 0, 1, ((((0, 999), 0, None), 0, None), 5)),
    ],
)
def test_a_key_of_nothing_is_refused(folder: Path, key: Any) -> None:
    dataset = make(folder, Encoder(), repeat=False).dataset
    with pytest.raises(StateError, match="no sample or batch of this dataset"):
        dataset.restore_sample(key)


class Indices(DefaultTaskEncoder[Any, Any, Any, Any]):
    @stateless
    def encode_sample(self, sample: Any) -> tuple[int, int]:
        return self.current_sample_index, sample["json"]["n"]

    @stateless
    def batch(self, samples: list[Any]) -> tuple[int, list[Any]]:
        return self.current_batch_index, samples


@pytest.mark.parametrize("workers", [0, 2])
def test_indices_count_what_is_delivered_over_all_lanes(folder: Path, workers: int) -> None:
    loader = make(folder, Indices(), workers)
    first = list(itertools.islice(loader, 13))
    again = make(folder, Indices())
    again.load_state_dict(loader.state_dict())
    batches = first + list(itertools.islice(again, 17))
    assert [index for index, _ in batches] == list(range(30))
    samples = [index for _, batch in batches for index, _ in batch]
    assert len(set(samples)) == len(samples)
    by_lane = [[index for _, batch in batches[lane::3] for index, _ in batch] for lane in range(3)]
    assert all(lane == sorted(lane) for lane in by_lane)
    assert {index % 3 for index in by_lane[1]} == {1}


@pytest.mark.parametrize("encoder", [Encoder, Packing, Grouping])
@pytest.mark.parametrize("options", [{}, {"virtual_epoch_length": 5}])
def test_seeking_goes_to_any_batch(folder: Path, encoder: type, options: dict[str, Any]) -> None:
    def stream(loader: Any) -> Iterator[Any]:
        while True:
            yield from ((batch.numbers.tolist(), loader.state_dict()) for batch in loader)

    whole = list(itertools.islice(stream(make(folder, encoder(), **options)), 16))
    loader = make(folder, encoder(), **options)
    for n in (7, 0, 1, 12, 5, 10):
        loader.seek(n)
        assert list(itertools.islice(stream(loader), 4)) == whole[n : n + 4]


@pytest.mark.parametrize("batch_size", [4, None])
def test_seeking_by_the_plan_is_right_where_nothing_is_left_out(
    folder: Path, batch_size: int | None
) -> None:
    class Plain(DefaultTaskEncoder[Any, Any, Any, Any]):
        def encode_sample(self, sample: Any) -> Any:
            return CrudeSample(sample, draw=random.random())

    def make_plain() -> Any:
        return make(folder, Plain(), batch_size=batch_size)

    def look(batches: Any) -> list[Any]:
        return [(batch["__key__"], batch["draw"]) for batch in batches]

    whole = look(itertools.islice(make_plain(), 100))
    loader = make_plain()
    for n in (3, 97, 0, 31, 64):
        loader.seek(n, exact=False)
        assert look(itertools.islice(loader, 3)) == whole[n : n + 3]
    with pytest.raises(TypeError, match="exact=True"):
        make(folder, Packing()).seek(3, exact=False)
    with pytest.raises(ValueError, match="cannot seek to batch -1"):
        loader.seek(-1)
    with pytest.raises(ValueError, match="the first epoch ends before it"):
        make(folder, Plain(), repeat=False).seek(1000)


class Counting(DefaultTaskEncoder[Any, Any, Any, Any]):
    """Leaves out every third sample that it sees: what it gives depends on what it gave before."""

    seen = 0

    def encode_sample(self, sample: CrudeSample) -> Iterator[CrudeSample]:
        self.seen += 1
        if self.seen % 3:
            yield sample


@pytest.mark.parametrize("steps", [1, 4, 7])
def test_a_function_that_does_not_replay_is_named_with_its_stage_and_key(
    folder: Path, steps: int
) -> None:
    loader = make(folder, Counting())
    for _ in itertools.islice(loader, steps):
        pass
    state = loader.state_dict()
    encoder = Counting()
    encoder.seen = 1
    again = make(folder, encoder)
    again.load_state_dict(state)
    with pytest.raises(StateError, match=r"replay diverged in \w+: expected key \d+.*, got"):
        list(itertools.islice(again, 6))
    again.load_state_dict(state, accept=["replay"])
    assert len(list(itertools.islice(again, 3))) == 3
