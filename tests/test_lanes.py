"""Lanes: shared out once, delivered in one order whatever the number of workers."""

from __future__ import annotations

import copy
import pickle
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as distributed
import torch.multiprocessing as multiprocessing
from hypothesis import given
from hypothesis import strategies as st

from energon_fn.errors import log_exception, reraise_exception
from energon_fn.lanes import WorkerConfig, default_worker_config

# --- who has which lanes ----------------------------------------------------------------------


@given(st.integers(1, 8), st.integers(0, 8), st.none() | st.integers(1, 5))
def test_every_lane_is_on_one_rank(world_size: int, num_workers: int, each: int | None) -> None:
    lanes = each and each * world_size
    ranks = [
        WorkerConfig(rank=rank, world_size=world_size, num_workers=num_workers, lanes=lanes)
        for rank in range(world_size)
    ]
    counts = {config.lane_count for config in ranks}
    assert counts == {lanes or world_size * max(num_workers, 1)}
    shares = [config.rank_lanes for config in ranks]
    assert sorted(lane for share in shares for lane in share) == list(range(*counts))
    assert len({len(share) for share in shares}) == 1  # all ranks have as much to do
    for rank, share in enumerate(shares):
        assert share == tuple(range(rank, *counts, world_size))


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))
def test_global_order_is_the_same_for_every_world_size(a: int, b: int, each: int) -> None:
    """The ranks' lanes taken in turn are the lanes in order, whoever drives them."""

    def turns(world_size: int) -> list[int]:
        shares = [
            WorkerConfig(rank=r, world_size=world_size, num_workers=1, lanes=a * b * each)
            for r in range(world_size)
        ]
        return [lane for turn in zip(*(s.rank_lanes for s in shares), strict=True) for lane in turn]

    assert turns(a) == turns(b) == turns(a * b) == list(range(a * b * each))


# --- the configuration ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"world_size": 0}, "world_size is 0; it must be 1 or more"),
        ({"num_workers": -1}, "num_workers is -1; it must be 0 or more"),
        ({"failure_tolerance": 0}, "failure_tolerance is 0; it must be 1 or more"),
        ({"rank": 4}, "rank is 4; with world_size 4 it must be 0 to 3"),
        ({"rank": -1}, "rank is -1; with world_size 4 it must be 0 to 3"),
        ({"lanes": 6}, "lanes is 6; it must be a multiple of world_size 4"),
        ({"lanes": 6}, "4 or 8, say"),
        ({"lanes": 3}, "4 or 8, say"),
        ({"lanes": 0}, "lanes is 0; it must be a multiple of world_size 4"),
        ({"lanes": -4}, "4 or 8, say"),
        ({"max_failure_rate": 2}, "max_failure_rate is 2; it must be a share, 0 to 1"),
        ({"max_failure_rate": "a"}, "max_failure_rate is 'a'; it must be a share, 0 to 1"),
    ],
)
def test_a_wrong_configuration_is_named(wrong: dict[str, Any], named: str) -> None:
    right: dict[str, Any] = {"rank": 3, "world_size": 4, "num_workers": 2}
    WorkerConfig(**right)
    with pytest.raises(ValueError, match=re.escape(named)):
        WorkerConfig(**{**right, **wrong})
    with pytest.raises(ValueError, match=re.escape(named)):
        replace(WorkerConfig(**right), **wrong)


def test_a_handler_is_a_function() -> None:
    with pytest.raises(TypeError, match="global_error_handler is 'log'; give a function such as"):
        WorkerConfig(rank=0, world_size=1, num_workers=0, global_error_handler="log")  # type: ignore[arg-type]


def test_the_defaults() -> None:
    config = WorkerConfig(rank=0, world_size=1, num_workers=0)
    assert (config.seed_offset, config.lane_count, config.failure_tolerance) == (0, 1, 100)
    assert config.global_error_handler is log_exception
    with pytest.raises(TypeError):
        WorkerConfig(0, 1, 0)
    with pytest.raises(AttributeError):
        config.rank = 1


def test_pickling_drops_the_process_group_and_nothing_else() -> None:
    group = (lambda: None, "a thing that does not pickle")
    config = WorkerConfig(
        rank=1,
        world_size=2,
        num_workers=3,
        data_parallel_group=group,
        seed_offset=7,
        lanes=8,
        global_error_handler=reraise_exception,
        failure_tolerance=5,
    )
    again = pickle.loads(pickle.dumps(config))
    assert again == replace(config, data_parallel_group=None)
    assert config.data_parallel_group is group
    for same in (copy.copy(config), copy.deepcopy({"config": config})["config"]):
        assert same.data_parallel_group is group
    assert replace(config, rank=0).data_parallel_group is group
    assert again.rank_lanes == (1, 3, 5, 7)


def test_without_torch_distributed_there_is_one_rank() -> None:
    assert not distributed.is_initialized()
    config = default_worker_config()
    assert (config.rank, config.world_size, config.num_workers) == (0, 1, 4)
    assert WorkerConfig.default_worker_config(num_workers=2) == default_worker_config(2)
    assert config.data_parallel_group is None


def report_config(rank: int, world_size: int, folder: str) -> None:
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world_size
    )
    # Two model-parallel halves: data is parallel over ranks 0, 2 and over ranks 1, 3.
    groups = [distributed.new_group([0, 2]), distributed.new_group([1, 3])]
    whole = default_worker_config(0)
    part = WorkerConfig.default_worker_config(3, data_parallel_group=groups[rank % 2])
    assert part.data_parallel_group is groups[rank % 2]
    assert pickle.loads(pickle.dumps(part)).data_parallel_group is None
    found = [(c.rank, c.world_size, c.num_workers, c.rank_lanes) for c in (whole, part)]
    torch.save(found, f"{folder}/{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()


def test_rank_and_world_size_are_those_of_the_process_group(tmp_path: Path) -> None:
    multiprocessing.start_processes(
        report_config, args=(4, str(tmp_path)), nprocs=4, start_method="fork"
    )
    for rank in range(4):
        whole, part = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert whole == (rank, 4, 0, (rank,))
        assert part == (rank // 2, 2, 3, tuple(range(rank // 2, 6, 2)))


def test_a_rank_that_takes_itself_for_the_only_one_is_warned(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert default_worker_config(num_workers=2, lanes=8).lane_count == 8
    assert "init_process_group first" in caplog.text
