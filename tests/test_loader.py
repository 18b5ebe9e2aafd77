"""Loaders over real shards and real worker processes: nothing lost, nothing twice, in order."""

import dataclasses
import itertools
import logging
import multiprocessing
import os
import random
import subprocess
import sys
import threading
import time
import weakref
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import jpeg, numbered, prepare, shards, write_tar
from hypothesis import given, settings
from hypothesis import strategies as st

from energon_fn import (
    Batch,
    DatasetError,
    DefaultTaskEncoder,
    FatalSampleError,
    SkipSample,
    WorkerConfig,
    get_loader,
    get_savable_loader,
    get_train_dataset,
    get_val_dataset,
    reraise_exception,
    write_dataset_yaml,
)
from energon_fn.pipeline import executor
from energon_fn.processes.outbox import MESSAGE_BYTES

ONE = WorkerConfig(rank=0, world_size=1, num_workers=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data")
    shards(path, (13, 1, 20, 7))
    return path


class Numbers(DefaultTaskEncoder[Any, Any, Any, Any]):
    """Batches are lists of the samples' numbers."""

    def encode_sample(self, sample: Any) -> int:
        return int(sample["json"]["n"])

    def batch(self, samples: list[int]) -> list[int]:
        return samples


class Skipping(Numbers):
    def encode_sample(self, sample: Any) -> Iterator[int]:  # type: ignore[override]
        n = sample["json"]["n"]
        if n % 7 == 3:
            raise SkipSample
        yield from [n] * (1 + n % 2)


class Drawing(Numbers):
    """Numbers, each with random ones from the three generators."""

    def encode_sample(self, sample: Any) -> Any:
        drawn = random.random(), float(np.random.rand()), float(torch.rand(()))
        return (sample["json"]["n"], *drawn)


class Packing(Skipping):
    sizes: tuple[int, ...] = ()

    def select_samples_to_pack(self, samples: list[int]) -> list[list[int]]:
        chosen = random.sample(samples, len(samples))
        return [[len(samples), *chosen[::2]], [len(samples), *chosen[1::2]]]

    def pack_selected_samples(self, samples: list[int]) -> Any:
        return tuple(samples)


@dataclasses.dataclass
class Plain:
    __key__: list[str]
    n: torch.Tensor


class Grouping(Numbers):
    def batch_group_criterion(self, sample: int) -> tuple[int, int]:
        return sample % 3, 2 + sample % 3


class Living(Numbers):
    """A batch is how many samples and how many batches there were when it was made."""

    def __init__(self) -> None:
        self.samples: list[Any] = []
        self.batches: list[Any] = []

    @staticmethod
    def noted(where: list[Any], tensor: torch.Tensor) -> torch.Tensor:
        where.append(weakref.ref(tensor))
        return tensor

    def encode_sample(self, sample: Any) -> Any:
        return self.noted(self.samples, torch.tensor(sample["json"]["n"]))

    def batch(self, samples: Any) -> Any:
        living = [sum(ref() is not None for ref in refs) for refs in (self.samples, self.batches)]
        return self.noted(self.batches, torch.tensor(living))


class LivingTwice(Living):
    def encode_batch(self, batch_data: torch.Tensor) -> torch.Tensor:
        return self.noted(self.batches, batch_data + 0)


class LivingGroups(LivingTwice):
    def batch_group_criterion(self, sample: Any) -> tuple[None, None]:
        return None, None


def train(folder: Path, config: WorkerConfig = ONE, **options: Any) -> Any:
    defaults = {
        "batch_size": 3,
        "shuffle_buffer_size": 5,
        "max_samples_per_sequence": 4,
        "task_encoder": Numbers(),
    }
    threads = options.pop("threads", None)
    dataset = get_train_dataset(folder, worker_config=config, **{**defaults, **options})
    return get_loader(dataset, threads=threads)


def val(folder: Path, config: WorkerConfig = ONE, **options: Any) -> Any:
    defaults = {"batch_size": 3, "task_encoder": Numbers(), "split_part": "train"}
    return get_loader(get_val_dataset(folder, worker_config=config, **{**defaults, **options}))


def ranks(world_size: int, **options: Any) -> list[WorkerConfig]:
    return [WorkerConfig(rank=rank, world_size=world_size, **options) for rank in range(world_size)]


@settings(max_examples=40)
@given(
    counts=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    world_size=st.integers(1, 4),
    lanes=st.integers(1, 4),
    batch_size=st.none() | st.integers(1, 5),
    sequence=st.none() | st.integers(1, 5),
    buffer=st.none() | st.integers(1, 9),
)
def test_every_sample_once_per_epoch_over_all_ranks(
    tmp_path_factory: pytest.TempPathFactory,
    counts: list[int],
    world_size: int,
    lanes: int,
    batch_size: int | None,
    sequence: int | None,
    buffer: int | None,
) -> None:
    folder = tmp_path_factory.mktemp("data")
    shards(folder, counts)
    sizes = {"batch_size": batch_size}
    order = {"shuffle_buffer_size": buffer, "max_samples_per_sequence": sequence}
    for make, options in ((train, {**sizes, **order, "repeat": False}), (val, sizes)):
        configs = ranks(world_size, num_workers=0, lanes=lanes * world_size)
        loaders = [make(folder, config, **options) for config in configs]
        for _epoch in range(2):
            found = [batch for loader in loaders for batch in loader]
            numbers = found if batch_size is None else [n for batch in found for n in batch]
            assert sorted(numbers) == list(range(sum(counts)))


@pytest.mark.parametrize("encoder", [Numbers, Skipping, Drawing, Packing, Grouping])
def test_the_number_of_workers_does_not_change_what_comes(folder: Path, encoder: type) -> None:
    def first(workers: int) -> list[Any]:
        config = WorkerConfig(rank=0, world_size=1, num_workers=workers, lanes=6)
        size = 7 if encoder is Packing else None
        loader = train(folder, config, task_encoder=encoder(), packing_buffer_size=size)
        return list(itertools.islice(loader, 25))

    alone = first(0)
    assert first(2) == alone
    assert first(4) == alone  # six lanes over four workers: some have no lane at some turns


def test_ranks_share_the_lanes_of_one_sequence(folder: Path) -> None:
    whole = list(itertools.islice(train(folder, ranks(1, num_workers=0, lanes=4)[0]), 24))
    for world_size in (2, 4):
        parts = [
            itertools.islice(train(folder, config), 24 // world_size)
            for config in ranks(world_size, num_workers=0, lanes=4)
        ]
        assert [batch for turn in zip(*parts, strict=True) for batch in turn] == whole


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("options", [{}, {"virtual_epoch_length": 7}, {"repeat": False}])
def test_leaving_the_loop_anywhere_loses_and_repeats_nothing(
    folder: Path, workers: int, options: dict[str, Any]
) -> None:
    config = WorkerConfig(rank=0, world_size=1, num_workers=workers, lanes=2)
    whole: list[Any] = []
    straight = train(folder, config, **options)
    while len(whole) < 30:
        whole += itertools.islice(straight, 30 - len(whole))
    torn: list[Any] = []
    loader = train(folder, config, **options)
    for stop in itertools.cycle((1, 4, 2, 7)):
        for n, batch in enumerate(loader, 1):
            torn.append(batch)
            if n == stop or len(torn) == 30:
                break
        if len(torn) == 30:
            break
    assert torn == whole


def test_virtual_epochs_have_equal_lengths_and_go_on(folder: Path) -> None:
    endless = list(itertools.islice(train(folder), 15))
    loader = train(folder, virtual_epoch_length=5)
    assert len(loader) == 5
    assert [list(loader), list(loader), list(loader)] == [endless[:5], endless[5:10], endless[10:]]
    for config in ranks(3, num_workers=0):
        assert len(list(train(folder, config, virtual_epoch_length=5))) == 5


def test_validation_is_in_order_whatever_the_lanes_and_starts_anew(folder: Path) -> None:
    for lanes in (1, 2, 5):
        config = WorkerConfig(rank=0, world_size=1, num_workers=0, lanes=lanes)
        loader = val(folder, config)
        expected = [list(range(n, min(n + 3, 41))) for n in range(0, 41, 3)]
        assert list(loader) == expected
        assert list(loader) == expected
        assert len(loader) == len(expected)


def test_limit_ends_validation_after_so_many_batches(folder: Path) -> None:
    loader = val(folder, WorkerConfig(rank=0, world_size=1, num_workers=2), limit=3)
    assert len(loader) == 3
    assert list(loader) == list(loader) == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    for n, _ in enumerate(loader, 1):
        if n == 3:
            break
    assert len(list(loader)) == 3
    assert len(list(val(folder, limit=99))) == 14


def test_drop_last_drops_only_the_short_batches(folder: Path) -> None:
    batches = list(val(folder, batch_size=6, batch_drop_last=True))
    assert [n for batch in batches for n in batch] == list(range(36))
    assert len(val(folder, batch_size=6, batch_drop_last=True)) == 6


def test_epochs_differ_and_the_seed_offset_changes_the_order(folder: Path) -> None:
    def two(seed: int) -> list[Any]:
        config = WorkerConfig(rank=0, world_size=1, num_workers=0, seed_offset=seed)
        loader = train(folder, config, repeat=False)
        return [list(loader), list(loader)]

    assert two(0) == two(0)
    orders = [str(epoch) for seed in (0, 1) for epoch in two(seed)]
    assert len(set(orders)) == 4


def test_global_seeds_do_not_matter_and_are_not_touched(folder: Path) -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    def seed(n: int) -> None:
        random.seed(n), np.random.seed(n), torch.manual_seed(n)

    found, drawn = [], []
    for n in (1, 2):
        seed(n)
        found.append(list(itertools.islice(train(folder, task_encoder=Drawing()), 9)))
        drawn.append(draw())
        seed(n)
        assert draw() == drawn[-1]
    assert found[0] == found[1]
    assert drawn[0] != drawn[1]


def test_augmentations_differ_by_sample_and_epoch_alone(folder: Path) -> None:
    def by_sample(lanes: int, epochs: int) -> list[dict[int, Any]]:
        config = WorkerConfig(rank=0, world_size=1, num_workers=0, lanes=lanes)
        loader = train(folder, config, task_encoder=Drawing(), repeat=False, batch_size=None)
        return [{n: tuple(drawn) for n, *drawn in loader} for _ in range(epochs)]

    first, second = by_sample(lanes=1, epochs=2)
    assert by_sample(lanes=3, epochs=2) == [first, second]
    assert all(first[n] != second[n] for n in first)
    assert len(set(first.values())) == len(first)


def test_training_fills_every_packing_buffer_across_epochs(folder: Path) -> None:
    loader = train(folder, task_encoder=Packing(), packing_buffer_size=9, batch_size=1)
    packed = [pack for batch in itertools.islice(loader, 60) for pack in batch]
    assert {size for size, *_ in packed} == {9}
    samples = [n for _, *chosen in packed for n in chosen]
    expected = Counter(n for n in range(41) if n % 7 != 3 for _ in range(1 + n % 2))
    epochs = len(samples) // sum(expected.values())
    assert epochs >= 4
    whole = Counter(samples[: epochs * sum(expected.values())])
    assert whole.keys() == expected.keys()


def test_validation_packs_the_remainder(folder: Path) -> None:
    loader = val(folder, task_encoder=Packing(), packing_buffer_size=9, batch_size=1)
    packed = [pack for batch in loader for pack in batch]
    expected = sorted(n for n in range(41) if n % 7 != 3 for _ in range(1 + n % 2))
    assert sorted(n for _, *chosen in packed for n in chosen) == expected
    assert packed[-1][0] == len(expected) % 9


def test_groups_have_their_own_batch_sizes_and_need_no_common_one(folder: Path) -> None:
    batches = list(val(folder, task_encoder=Grouping(), batch_size=None))
    assert sorted(n for batch in batches for n in batch) == list(range(41))
    assert all(len({n % 3 for n in batch}) == 1 for batch in batches)
    short = [batch for batch in batches if len(batch) != 2 + batch[0] % 3]
    assert len(short) <= 3


def test_a_group_without_any_batch_size_is_an_error(folder: Path) -> None:
    class Sizeless(Numbers):
        def batch_group_criterion(self, sample: int) -> tuple[int, None]:
            return sample % 3, None

    with pytest.raises(ValueError, match="no batch size for the group"):
        list(val(folder, task_encoder=Sizeless(), batch_size=None))
    assert len(next(iter(val(folder, task_encoder=Sizeless(), batch_size=4)))) == 4


def test_the_length_is_known_only_where_it_can_be(folder: Path) -> None:
    assert len(train(folder, repeat=False)) == 14
    for unknown in (
        train(folder),
        val(folder, task_encoder=Skipping()),
        val(folder, task_encoder=Packing(), packing_buffer_size=4),
        val(folder, task_encoder=Grouping()),
    ):
        with pytest.raises(TypeError, match="number of batches is not known"):
            len(unknown)


def test_fewer_samples_than_workers(tmp_path: Path) -> None:
    shards(tmp_path, (2,))
    config = WorkerConfig(rank=0, world_size=1, num_workers=3)
    assert sorted(n for b in val(tmp_path, config) for n in b) == [0, 1]
    endless = list(itertools.islice(train(tmp_path, config, batch_size=2), 6))
    assert Counter(n for batch in endless for n in batch).keys() == {0, 1}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_failing_function_costs_its_samples_only(
    folder: Path, workers: int, tmp_path: Path
) -> None:
    handler = logging.FileHandler(tmp_path / "log")  # workers inherit it
    logging.getLogger("energon_fn").addHandler(handler)

    class Failing(Numbers):
        def encode_sample(self, sample: Any) -> int:
            if sample["json"]["n"] == 5:
                raise ValueError("five is right out")
            return super().encode_sample(sample)

    config = WorkerConfig(rank=0, world_size=1, num_workers=workers)
    numbers = [n for batch in val(folder, config, task_encoder=Failing()) for n in batch]
    logging.getLogger("energon_fn").removeHandler(handler)
    assert sorted(numbers) == [n for n in range(41) if n != 5]
    log = (tmp_path / "log").read_text()
    for said in ("five is right out", "encode_sample", "00005", "shard_000.tar", "Traceback"):
        assert said in log


@pytest.mark.parametrize("workers", [0, 1])
def test_the_error_handler_decides(folder: Path, workers: int) -> None:
    class Failing(Numbers):
        def batch(self, samples: list[int]) -> list[int]:
            raise KeyError("caption")

    config = WorkerConfig(
        rank=0, world_size=1, num_workers=workers, global_error_handler=reraise_exception
    )
    with pytest.raises(KeyError, match="caption"):
        list(val(folder, config, task_encoder=Failing()))
    config = WorkerConfig(rank=0, world_size=1, num_workers=workers, failure_tolerance=4)
    with pytest.raises(FatalSampleError, match="batch failed 4 times in a row"):
        list(val(folder, config, task_encoder=Failing()))


@pytest.mark.parametrize("workers", [0, 1])
def test_programming_errors_end_the_run_at_once(folder: Path, workers: int) -> None:
    class Typo(Numbers):
        def encode_sample(self, sample: Any) -> int:
            return smaple["json"]["n"]  # type: ignore[name-defined] # noqa: F821

    config = WorkerConfig(rank=0, world_size=1, num_workers=workers)
    with pytest.raises(NameError, match="smaple"):
        list(val(folder, config, task_encoder=Typo()))


def test_skipping_everything_for_ever_is_an_error_not_a_hang(folder: Path) -> None:
    class Picky(Numbers):
        def encode_sample(self, sample: Any) -> int:
            raise SkipSample

    with pytest.raises(FatalSampleError, match="all of them were skipped"):
        next(iter(train(folder, task_encoder=Picky())))
    assert list(val(folder, task_encoder=Picky())) == []


@pytest.mark.parametrize(
    ("part", "data", "said"),
    [
        ("jpg", jpeg()[:300], "jpg"),
        ("json", b'{"n": ', "json"),
        ("txt", b"\xff\xfe caption", "txt"),
        ("pkl", b"\x80\x04.", "pkl"),
    ],
)
def test_broken_parts_cost_their_sample_and_are_named(
    tmp_path: Path, part: str, data: bytes, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    good = numbered(1)
    write_tar(tmp_path / "a.tar", [("good", good), ("bad", {**good, part: data})])
    loader = val(tmp_path, batch_size=None, task_encoder=DefaultTaskEncoder())
    assert [sample["__key__"] for sample in loader] == ["good"]
    for word in (said, "bad", "a.tar", "decode"):
        assert word in caplog.text


def test_a_missing_shard_ends_the_run_and_is_named(tmp_path: Path) -> None:
    shards(tmp_path, (3, 3))
    dataset = get_val_dataset(
        tmp_path, batch_size=1, split_part="train", worker_config=ONE, task_encoder=Numbers()
    )
    (tmp_path / "shard_001.tar").unlink()
    with pytest.raises(DatasetError, match=r"shard_001\.tar"):
        list(get_loader(dataset))


def test_an_error_leaves_the_loader_where_it_was(folder: Path) -> None:
    class Once(Numbers):
        failed = False

        def encode_sample(self, sample: Any) -> int:
            if sample["json"]["n"] == 20 and not self.failed:
                self.failed = True
                raise MemoryError
            return super().encode_sample(sample)

    loader, found = val(folder, task_encoder=Once()), []
    with pytest.raises(MemoryError):
        found.extend(batch for batch in loader)
    found += list(loader)
    assert [n for batch in found for n in batch] == list(range(41))


def test_loader_and_dataset_must_agree_on_lanes_and_seed(folder: Path) -> None:
    dataset = get_train_dataset(folder, batch_size=1, worker_config=ONE)
    two = WorkerConfig(rank=0, world_size=1, num_workers=2)
    with pytest.raises(ValueError, match="lane_count 1"):
        get_loader(dataset, worker_config=two)
    one_lane = WorkerConfig(rank=0, world_size=1, num_workers=2, lanes=1)
    assert get_loader(dataset, worker_config=one_lane).dataset.worker_config == one_lane
    with pytest.raises(ValueError, match="prefetch_factor is 0"):
        get_loader(dataset, prefetch_factor=0)


def test_batches_are_pinned_in_the_training_process(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Tensors(Numbers):
        def batch(self, samples: list[int]) -> Any:
            return Plain(["key"] * len(samples), torch.tensor(samples))

    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor, *args: tensor + 1000)
    loader = val(folder, task_encoder=Tensors())
    assert [batch.n.tolist() for batch in itertools.islice(loader, 2)] == [
        [1000, 1001, 1002],
        [1003, 1004, 1005],
    ]
    assert next(iter(loader)).__key__ == ["key"] * 3


class Pinned(Batch):
    """A batch that is pinned by a function of the test's."""

    pin: Any = None

    def pin_memory(self) -> Any:
        return Pinned.pin(self.__key__)


def test_a_batch_that_cannot_be_pinned_is_not_lost_and_one_may_be_skipped(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Keyed(Numbers):
        def batch(self, samples: list[int]) -> Any:
            return Pinned(__key__=list(map(str, samples)))

    def once(keys: list[str]) -> list[str]:
        if "3" in keys and not failed:
            failed.append(keys)
            raise RuntimeError("out of memory")
        if "6" in keys:
            raise SkipSample
        return keys

    failed: list[Any] = []
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(Pinned, "pin", staticmethod(once))
    loader = val(folder, task_encoder=Keyed())
    batches = iter(loader)
    assert next(batches) == ["0", "1", "2"]
    with pytest.raises(RuntimeError, match="out of memory"):
        next(batches)
    assert list(itertools.islice(loader, 2)) == [["3", "4", "5"], ["9", "10", "11"]]


class Broken(Exception):
    def __init__(self, one: int, two: int):
        super().__init__(one)


def test_what_cannot_be_read_from_a_worker_is_told(folder: Path) -> None:
    class Unreadable(Numbers):
        def batch(self, samples: list[int]) -> Any:
            return [Broken(1, 2)]

    config = WorkerConfig(rank=0, world_size=1, num_workers=1)
    with pytest.raises(TypeError, match="a batch that worker 0 sent cannot be read: TypeError"):
        next(iter(val(folder, config, task_encoder=Unreadable())))


def test_no_more_workers_than_lanes(folder: Path) -> None:
    before = len(multiprocessing.active_children())
    with val(folder, WorkerConfig(rank=0, world_size=1, num_workers=4, lanes=2)) as loader:
        whole = list(itertools.islice(loader, 3))
        assert len(multiprocessing.active_children()) == before + 2
    assert whole == list(itertools.islice(val(folder), 3))


def test_what_cannot_be_sent_from_a_worker_is_an_error_not_a_hang(folder: Path) -> None:
    class Unsendable(Numbers):
        def batch(self, samples: list[int]) -> Any:
            return lambda: samples

    config = WorkerConfig(rank=0, world_size=1, num_workers=1)
    with pytest.raises(TypeError, match="a batch of type function cannot be sent from a worker"):
        next(iter(val(folder, config, task_encoder=Unsendable())))


def test_returning_nothing_is_a_failure_not_a_batch_of_nothing(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Forgetful(Numbers):
        def encode_sample(self, sample: Any) -> int | None:
            return sample["json"]["n"] if sample["json"]["n"] != 5 else None

    numbers = [n for batch in val(folder, task_encoder=Forgetful()) for n in batch]
    assert sorted(numbers) == [n for n in range(41) if n != 5]
    assert "encode_sample returned None: return the result, or raise SkipSample" in caplog.text


def test_groups_that_never_get_full_are_an_error_not_a_leak(folder: Path) -> None:
    class Unique(Numbers):
        def batch_group_criterion(self, sample: int) -> tuple[object, int]:
            return object(), 2

    with pytest.raises(FatalSampleError, match="none of its groups gets full"):
        next(iter(train(folder, task_encoder=Unique())))


# ------------------------------------------------------------------------------------ threads


@pytest.fixture(scope="module")
def spoiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures, every fifth of which cannot be decoded."""
    path = tmp_path_factory.mktemp("spoiled")
    pictures = [(f"{n:02d}", {"jpg": b"no" if n % 5 == 3 else jpeg(n)}) for n in range(40)]
    write_tar(path / "0.tar", pictures)
    return path


class Pictures(DefaultTaskEncoder[Any, Any, Any, Any]):
    def encode_sample(self, sample: Any) -> Any:
        return sample["__key__"], float(sample["jpg"].sum()), random.random()

    def batch(self, samples: list[Any]) -> list[Any]:
        return samples


@pytest.mark.parametrize("workers", [0, 2])
def test_threads_read_ahead_and_change_nothing(
    spoiled: Path, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    failed: list[tuple[str, str]] = []

    def note(error: Exception, sample: Any, sources: Any) -> None:
        failed.append((str(error), sample["__key__"]))

    def batches(threads: int, workers: int = 0, state: Any = None) -> tuple[list[Any], Any]:
        config = WorkerConfig(
            rank=0, world_size=1, num_workers=workers, lanes=2, global_error_handler=note
        )
        dataset = get_train_dataset(
            spoiled,
            batch_size=3,
            shuffle_buffer_size=7,
            task_encoder=Pictures(),
            worker_config=config,
        )
        with get_loader(dataset, threads=threads) as loader:
            if state is not None:
                loader.load_state_dict(state)
            found = list(itertools.islice(loader, 20))
            return found, loader.state_dict()

    plain, state = batches(0)
    told = failed.copy()
    failed.clear()
    assert batches(3, workers) == (plain, state)
    if not workers:  # the handler of a worker notes in the worker
        assert failed[: len(told)] == told
        assert told
    assert batches(2, workers, state)[0] == batches(0, 0, state)[0]


def test_threads_work_at_the_same_time(folder: Path) -> None:
    barrier, calls, met = threading.Barrier(2, timeout=20), itertools.count(), list[int]()

    def together(raw: dict[str, Any]) -> dict[str, Any]:
        assert threading.current_thread() is not threading.main_thread()
        if next(calls) in (1, 2):  # the very first sample is waited for alone
            met.append(barrier.wait())
        return {**raw, "json": {"n": 0}}

    dataset = get_train_dataset(
        folder, batch_size=3, task_encoder=Numbers(), worker_config=ONE, decoder=together
    )
    next(iter(get_loader(dataset, threads=2)))
    assert sorted(met) == [0, 1]  # each waited until the other was there


def test_an_iteration_that_is_left_leaves_no_work_to_threads(folder: Path) -> None:
    read: list[str] = []

    def noting(raw: dict[str, Any]) -> dict[str, Any]:
        read.append(raw["__key__"])
        return {**raw, "json": {"n": 0}}

    dataset = get_train_dataset(
        folder, batch_size=2, task_encoder=Numbers(), worker_config=ONE, decoder=noting
    )
    for _ in get_loader(dataset, threads=2):
        break
    assert len(read) <= 2 + 4  # the batch, and twice the threads ahead of it


@pytest.mark.parametrize("threads", [0, 2])
def test_a_decoder_may_skip_samples(folder: Path, threads: int) -> None:
    def choosing(raw: dict[str, Any]) -> dict[str, Any]:
        if int(raw["__key__"]) % 3:
            raise SkipSample
        return {**raw, "json": {"n": int(raw["__key__"])}}

    dataset = get_val_dataset(
        folder,
        batch_size=2,
        split_part="train",
        task_encoder=Numbers(),
        worker_config=ONE,
        decoder=choosing,
    )
    found = [n for batch in get_loader(dataset, threads=threads) for n in batch]
    assert found == list(range(0, 41, 3))


@pytest.mark.parametrize("threads", [0, 2])
def test_a_datasets_own_code_may_skip_samples(
    tmp_path: Path, threads: int, caplog: pytest.LogCaptureFixture
) -> None:
    prepare(tmp_path, shards(tmp_path, (20,)))
    loader, _ = write_dataset_yaml(tmp_path, "TextSample", parts=["json", "txt"])
    loader.write_text(
        "from energon_fn import SkipSample\n"
        "def sample_loader(raw):\n"
        "    if raw['json']['n'] % 3:\n"
        "        raise SkipSample\n"
        "    return {'text': raw['txt']}\n"
        "def part_filter(part):\n"
        "    return True\n"
    )
    dataset = get_val_dataset(
        tmp_path, batch_size=None, split_part="train", worker_config=ONE, trust_dataset_code=True
    )
    found = [sample.text for sample in get_loader(dataset, threads=threads)]
    assert found == [f"caption {n}" for n in range(0, 20, 3)]
    assert not caplog.records


@pytest.mark.parametrize("leave", ["close", "forget"])
def test_reads_ahead_are_called_off_when_the_loader_goes(folder: Path, leave: str) -> None:
    gate, read, first = threading.Event(), list[str](), set[str]()

    def waiting(raw: dict[str, Any]) -> dict[str, Any]:
        read.append(raw["__key__"])
        if raw["__key__"] not in first:  # counting would not do: the sixth may come before them
            assert gate.wait(20)
        return {**raw, "json": {"n": 0}}

    dataset = get_train_dataset(
        folder, batch_size=1, task_encoder=Numbers(), worker_config=ONE, decoder=waiting
    )
    gate.set()
    assert len(list(itertools.islice(get_loader(dataset), 5))) == 5
    first.update(read)
    gate.clear(), read.clear()
    loader = get_loader(dataset, threads=2)
    assert len(list(itertools.islice(loader, 5))) == 5
    # Now each thread is at one, or will be; the two behind these wait for their turn.
    loader.close() if leave == "close" else None
    del loader
    gate.set()
    executor(2, os.getpid()).submit(lambda: None).result(20)
    assert len(read) <= 5 + 2


LEAVING = """
import atexit, itertools, sys, time
sys.path.insert(0, {here!r})
from test_loader import Numbers, train
read = []
def slow(raw):
    read.append(raw["__key__"])
    if len(read) > 5:
        time.sleep(1)
    return {{**raw, "json": {{"n": 0}}}}
atexit.register(lambda: print(len(read)))
for n, batch in enumerate(train({folder!r}, batch_size=1, decoder=slow, threads=2), 1):
    if n == 5:
        raise RuntimeError("loss is nan")
"""


def test_a_process_ends_with_the_reads_that_were_begun(folder: Path) -> None:
    script = LEAVING.format(here=str(Path(__file__).parent), folder=str(folder))
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert int(done.stdout) <= 5 + 2  # one of each thread
    assert done.stderr.count("Traceback") == 1
    assert done.stderr.rstrip().endswith("RuntimeError: loss is nan")


def test_workers_read_no_further_ahead_with_every_epoch(folder: Path) -> None:
    made = multiprocessing.get_context("fork").Value("i", 0)

    class Counting(Numbers):
        def batch(self, samples: list[int]) -> Any:
            with made.get_lock():
                made.value += 1
            return np.zeros(MESSAGE_BYTES, np.uint8)  # small ones would go together

    one = WorkerConfig(rank=0, world_size=1, num_workers=1)
    dataset = get_val_dataset(
        folder,
        batch_size=2,
        limit=1,
        split_part="train",
        task_encoder=Counting(),
        worker_config=one,
    )
    with get_loader(dataset, multiprocessing_context="fork") as loader:
        for _ in range(10):
            for _ in loader:
                pass
        time.sleep(0.3)
    assert made.value <= 10 * 4


@pytest.mark.parametrize(
    "wrong",
    [
        {"prefetch_factor": 0},
        {"prefetch_factor": 1.5},
        {"max_worker_restarts": -1},
        {"watchdog_timeout_seconds": 0},
        {"watchdog_timeout_seconds": "60"},
        {"multiprocessing_context": "frok"},
    ],
)
def test_a_wrong_argument_is_told(folder: Path, wrong: Any) -> None:
    dataset = get_train_dataset(folder, batch_size=2, worker_config=ONE)
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"{name} is {value!r}; "):
        get_loader(dataset, **wrong)


def test_a_cache_pool_is_no_path(folder: Path) -> None:
    dataset = get_train_dataset(folder, batch_size=2, worker_config=ONE)
    with pytest.raises(TypeError, match="cache_pool is '/tmp'; give a FileStoreCachePool"):
        get_loader(dataset, cache_pool="/tmp")  # type: ignore[arg-type]


def test_loaders_in_several_threads_do_not_meddle(folder: Path) -> None:
    class Slow(Drawing):
        def encode_sample(self, sample: Any) -> Any:
            time.sleep(0.0005)  # another thread's turn, between seeding and drawing
            return super().encode_sample(sample)

    def run(found: list[Any]) -> None:
        loader = train(folder, ONE, task_encoder=Slow())
        for batch in itertools.islice(loader, 12):
            found.append((batch, loader.state_dict()["lanes"], loader.drawn()))

    found = [list[Any]() for _ in range(4)]
    alone, *together = found
    run(alone)
    threads = [threading.Thread(target=run, args=(one,)) for one in together]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [alone] * 4


@pytest.mark.parametrize("length", [2, 3, 4, 5])
def test_no_virtual_epoch_is_empty(folder: Path, length: int) -> None:
    loader = train(folder, ONE, repeat=False, virtual_epoch_length=length, batch_size=2)
    epochs = [len(list(loader)) for _ in range(12)]
    batches = len(list(train(folder, ONE, repeat=False, batch_size=2)))
    whole, rest = divmod(batches, length)
    pattern = [length] * whole + [rest] * (rest > 0)
    assert epochs == list(itertools.islice(itertools.cycle(pattern), 12))


@pytest.mark.parametrize("threads", [-1, 1.5, "two"])
def test_a_wrong_number_of_threads_is_told(folder: Path, threads: Any) -> None:
    dataset = get_train_dataset(folder, batch_size=2, worker_config=ONE)
    with pytest.raises(ValueError, match=r"threads is .*; it must be 0 or more"):
        get_loader(dataset, threads=threads)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("encoder", [Living, LivingTwice, LivingGroups])
def test_lanes_that_wait_keep_no_batches(folder: Path, encoder: Any, workers: int) -> None:
    size, lanes = 5, 6
    config = WorkerConfig(rank=0, world_size=1, num_workers=workers, lanes=lanes)
    with train(folder, config, batch_size=size, task_encoder=encoder()) as loader:
        living = [data.tolist() for data in itertools.islice(loader, 4 * lanes)]
    for samples, batches in living:
        assert samples <= size + lanes  # a lane may keep its last sample
        assert batches <= 1  # ``data``


def test_workers_are_the_datasets_matter(folder: Path) -> None:
    dataset = get_train_dataset(folder, batch_size=2, worker_config=ONE)
    with pytest.raises(TypeError, match=r"'num_workers': give get_train_dataset .*WorkerConfig"):
        get_loader(dataset, num_workers=2)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"get_loader\(\) .*'thread'; did you mean threads\?"):
        get_loader(dataset, thread=2)  # type: ignore[arg-type]


def test_the_published_name_takes_what_is_not_needed_here(folder: Path) -> None:
    dataset = get_train_dataset(folder, batch_size=3, task_encoder=Numbers(), worker_config=ONE)
    loader = get_savable_loader(
        dataset, checkpoint_every_sec=60, n_checkpoints=3, watchdog_initial_timeout_seconds=9
    )
    assert next(iter(loader)) == next(iter(get_loader(dataset)))
    with pytest.raises(TypeError, match=r"savable_loader\(\) has no argument 'checkpoint_every'"):
        get_savable_loader(dataset, checkpoint_every=60)  # type: ignore[call-arg]
