"""What every rank does in test_distributed.py: started by torchrun with a job, the data, a folder.

A job gives back what this rank found; it is written to the folder as JSON.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import random
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as distributed

from energon_fn import (
    DefaultTaskEncoder,
    Loader,
    SkipSample,
    StateError,
    WorkerConfig,
    default_worker_config,
    get_savable_loader,
    get_train_dataset,
)

LANES = 8


class Numbers(DefaultTaskEncoder[Any, Any, Any, Any]):
    """Batches are lists of the samples' numbers."""

    def encode_sample(self, sample: Any) -> Any:
        return sample["json"]["n"]

    def batch(self, samples: list[Any]) -> list[Any]:
        return samples


class Packs(Numbers):
    """Lists of samples with random numbers of their own, some skipped, packed at random."""

    def encode_sample(self, sample: Any) -> Any:
        if sample["json"]["n"] % 7 == 3:
            raise SkipSample
        return [sample["json"]["n"], random.random()]

    def select_samples_to_pack(self, samples: list[Any]) -> list[list[Any]]:
        mixed = random.sample(samples, len(samples))
        return [mixed[::2], mixed[1::2]]

    def pack_selected_samples(self, samples: list[Any]) -> Any:
        return samples


def numbers(data: Path, config: WorkerConfig | None, **options: Any) -> Loader[Any]:
    """A loader of numbers; its WorkerConfig may be left out."""
    dataset = get_train_dataset(
        data,
        batch_size=3,
        shuffle_buffer_size=10,
        max_samples_per_sequence=5,
        task_encoder=Numbers(),
        worker_config=config,
        **options,
    )
    return get_savable_loader(dataset)


def packs(data: Path, config: WorkerConfig) -> Loader[Any]:
    """The endless loader that is saved and restored."""
    return get_savable_loader(
        get_train_dataset(
            data,
            batch_size=2,
            shuffle_buffer_size=10,
            max_samples_per_sequence=5,
            packing_buffer_size=5,
            task_encoder=Packs(),
            worker_config=config,
        )
    )


def elastic(workers: int = 0, group: Any = None) -> WorkerConfig:
    return replace(default_worker_config(workers, group), lanes=LANES)


def take(loader: Loader[Any], count: int) -> list[Any]:
    return list(itertools.islice(loader, count))


def resumed(data: Path, file: Path, count: int, *, on: int | None) -> list[Any]:
    """The first batches after restoring a file, which is read on all ranks, or on one only."""
    here = on is None or distributed.get_rank() == on
    loader = packs(data, elastic(workers=1 if on is None else 0))
    loader.restore_state_global(torch.load(file, weights_only=True) if here else None, src_rank=on)
    return take(loader, count)


def save(state: Any, file: Path) -> bool:
    """Save the state where there is one, wait for it where there is none; say which."""
    if state is not None:
        torch.save(state, file)
    distributed.barrier()
    return state is not None


def said(error: type[Exception], function: Callable[..., Any], *args: Any, **options: Any) -> str:
    """What the function says in the error that it raises, or nothing."""
    try:
        function(*args, **options)
    except error as raised:
        return str(raised)
    return ""


def four(data: Path, folder: Path) -> dict[str, Any]:
    rank = distributed.get_rank()
    found: dict[str, Any] = {}
    config = default_worker_config(num_workers=2)
    found["default"] = [config.rank, config.world_size, config.lane_count, config.rank_lanes]

    loader = numbers(data, config, repeat=False)
    found["epochs"] = [list(loader), list(loader)]
    loader = numbers(data, None, virtual_epoch_length=5)  # four workers of its own on each rank
    found["virtual"] = [list(loader) for _ in range(3)]
    loader.close()

    loader = packs(data, elastic(workers=2))
    found["batches"] = take(loader, 6)
    found["saved"] = save(loader.save_state_global(global_dst_rank=0), folder / "four.pt")
    torch.save(loader.save_state_rank(), folder / f"four_{rank}.pt")
    found["saved on 2"] = save(loader.save_state_global(2), folder / "four_on_2.pt")
    found["afterwards"] = take(loader, 2)
    loader.close()

    again = packs(data, elastic())
    again.restore_state_rank(torch.load(folder / f"four_{rank}.pt", weights_only=True))
    found["afterwards, rank by rank"] = take(again, 2)
    for name, on in (("on all", None), ("on 3", 3)):
        found[f"from one, {name}"] = resumed(data, folder / "one.pt", 3, on=on)
    found["no such rank"] = [
        said(ValueError, loader.save_state_global, 4),
        said(ValueError, loader.restore_state_global, None, src_rank=4),
    ]
    found["no state"] = said(StateError, loader.restore_state_global, None, src_rank=1)
    return found | {"groups": groups(data, folder)}  # in the same processes: starting them is slow


def groups(data: Path, folder: Path) -> dict[str, Any]:
    """Four processes are two ranks: 0 and 1 hold one model, and get the same data; 2 and 3 too."""
    rank = distributed.get_rank()
    found: dict[str, Any] = {}
    members = [[0, 2], [1, 3]]
    group = [distributed.new_group(ranks) for ranks in members][rank % 2]
    config = elastic(1, group)
    found["default"] = [config.rank, config.world_size, config.rank_lanes]

    loader = packs(data, config)
    found["batches"] = take(loader, 6)
    found["saved"] = save(loader.save_state_global(0), folder / "groups.pt")
    found["saved on 3"] = save(loader.save_state_global(3), folder / "groups_on_3.pt")
    if rank in members[0]:  # the others have a copy
        found["saved by one group"] = loader.save_state_global(2) is not None
    found["afterwards"] = take(loader, 3)
    loader.close()

    for name, source in (("on all", None), ("on the first", 0), ("on the second", 1)):
        again = packs(data, config)
        given = source is None or config.rank == source
        state = torch.load(folder / "groups.pt", weights_only=True) if given else None
        again.restore_state_global(state, src_rank=source)
        found[f"afterwards, {name}"] = take(again, 3)
        again.close()
    found["no such rank"] = said(ValueError, loader.restore_state_global, None, src_rank=2)

    twice = packs(data, replace(config, num_workers=0, data_parallel_group=None))
    found["batches without groups"] = take(twice, 6)
    found["saved without groups"] = save(twice.save_state_global(1), folder / "twice.pt")
    wrong = [distributed.new_group(ranks) for ranks in ([0, 1], [2, 3])][rank // 2]
    loader = packs(data, replace(config, num_workers=0, data_parallel_group=wrong))
    found["the wrong group"] = said(StateError, loader.save_state_global, rank // 2 * 2)
    return found


def two(data: Path, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in ("four.pt", "groups.pt"):
        for where, on in (("on all", None), ("on 0", 0)):
            found[f"{name}, {where}"] = resumed(data, folder / name, 4, on=on)
    loader = packs(data, elastic())
    loader.restore_state_global(torch.load(folder / "four.pt", weights_only=True))
    take(loader, 5)
    save(loader.save_state_global(), folder / "two.pt")
    return found


def endless(data: Path, folder: Path) -> None:
    """Trains until somebody ends it. One rank forks its workers, the other spawns them."""
    rank = distributed.get_rank()
    dataset = numbers(data, default_worker_config(num_workers=2)).dataset
    loader = get_savable_loader(dataset, multiprocessing_context=("fork", "spawn")[rank % 2])
    for step, _ in enumerate(loader):
        distributed.barrier()
        if step == 3:
            workers = [child.pid for child in multiprocessing.active_children()]
            written = folder / f"{rank}.new"
            written.write_text(json.dumps([os.getpid(), *workers]))
            written.rename(folder / f"pids_{rank}.json")


JOBS = {job.__name__: job for job in (four, two, endless)}


if __name__ == "__main__":
    distributed.init_process_group("gloo")
    job, out = JOBS[sys.argv[1]], Path(sys.argv[3])
    result = json.dumps(job(Path(sys.argv[2]), out))
    (out / f"{job.__name__}_{distributed.get_rank()}.json").write_text(result)
    distributed.destroy_process_group()
