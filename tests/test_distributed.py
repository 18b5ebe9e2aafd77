"""Several processes under torchrun: one sequence, whatever their number, also across a resume."""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import shards
from distributed_script import LANES, numbers, packs
from test_readme import demo_dataset, examples

from energon_fn import WorkerConfig, checkpoint

SCRIPT = Path(__file__).with_name("distributed_script.py")
SAMPLES = 41 * LANES
ONE = WorkerConfig(rank=0, world_size=1, num_workers=0, lanes=LANES)


def start(*command: object, cwd: Path, **env: str) -> subprocess.Popen[str]:
    """``python COMMAND``."""
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def torchrun(ranks: int) -> list[object]:
    """``torchrun --nproc-per-node RANKS``, as words for :func:`start`."""
    return ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks]


def finish(process: subprocess.Popen[str], seconds: float = 120) -> str:
    """What the process said, once it has ended well."""
    with process:
        try:
            out, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun ends its ranks then
            raise AssertionError(process.communicate()[0]) from None
    assert process.returncode == 0, out
    return out


def do(job: str, ranks: int, data: Path, folder: Path) -> list[Any]:
    """What each rank found."""
    finish(start(*torchrun(ranks), SCRIPT, job, data, folder, cwd=folder))
    return [json.loads((folder / f"{job}_{rank}.json").read_text()) for rank in range(ranks)]


def in_turn(parts: Sequence[Sequence[Any]]) -> list[Any]:
    """The batches of all ranks in the order of the global sequence."""
    return [batch for step in zip(*parts, strict=True) for batch in step]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data")
    shards(path, (100, 1, 120, SAMPLES - 221))
    return path


@pytest.fixture(scope="module")
def whole(data: Path) -> list[Any]:
    """The sequence as one process without torch.distributed loads it."""
    return list(itertools.islice(packs(data, ONE), 60))


@pytest.fixture(scope="module")
def folder(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where states are saved; there is one of a single process after eight batches."""
    path = tmp_path_factory.mktemp("states")
    loader = packs(data, ONE)
    for _ in itertools.islice(loader, 8):
        pass
    torch.save(loader.save_state_global(), path / "one.pt")
    return path


@pytest.fixture(scope="module")
def four(data: Path, folder: Path) -> list[Any]:
    return do("four", 4, data, folder)


@pytest.fixture(scope="module")
def groups(four: list[Any]) -> list[Any]:
    return [rank["groups"] for rank in four]


@pytest.fixture(scope="module")
def two(data: Path, folder: Path, four: Any) -> list[Any]:
    return do("two", 2, data, folder)


def test_the_default_configuration_is_the_ranks(four: list[Any]) -> None:
    expected = [[rank, 4, LANES, [rank, rank + 4]] for rank in range(4)]
    assert [rank["default"] for rank in four] == expected


def test_every_epoch_has_every_sample_once_over_the_ranks(four: list[Any]) -> None:
    for epoch in range(2):
        parts = [rank["epochs"][epoch] for rank in four]
        assert sorted(n for part in parts for batch in part for n in batch) == list(range(SAMPLES))
        assert len({len(part) for part in parts}) == 1
    assert four[0]["epochs"][0] != four[0]["epochs"][1]


def test_virtual_epochs_are_as_long_on_every_rank(four: list[Any]) -> None:
    assert [[len(epoch) for epoch in rank["virtual"]] for rank in four] == [[5, 5, 5]] * 4
    seen = [n for rank in four for epoch in rank["virtual"] for batch in epoch for n in batch]
    assert len(seen) == len(set(seen)) == 4 * 15 * 3


def test_ranks_deliver_the_sequence_of_a_single_process(four: list[Any], whole: list[Any]) -> None:
    assert in_turn([rank["batches"] for rank in four]) == whole[:24]
    assert in_turn([rank["afterwards"] for rank in four]) == whole[24:32]


def test_one_rank_gets_the_state_of_all(four: list[Any], folder: Path) -> None:
    assert [rank["saved"] for rank in four] == [True, False, False, False]
    assert [rank["saved on 2"] for rank in four] == [False, False, True, False]
    merged, on_2 = (torch.load(folder / n, weights_only=True) for n in ("four.pt", "four_on_2.pt"))
    ranks = [torch.load(folder / f"four_{rank}.pt", weights_only=True) for rank in range(4)]
    assert merged == on_2 == checkpoint.merge(ranks)
    assert len(merged["lanes"]) == LANES


def test_each_rank_can_keep_its_own_state(four: list[Any], whole: list[Any]) -> None:
    assert in_turn([rank["afterwards, rank by rank"] for rank in four]) == whole[24:32]


@pytest.mark.parametrize("where", ["on all", "on 0"])
def test_four_ranks_go_on_as_two(two: list[Any], whole: list[Any], where: str) -> None:
    assert in_turn([rank[f"four.pt, {where}"] for rank in two]) == whole[24:32]


@pytest.mark.parametrize("where", ["on all", "on 3"])
def test_one_process_goes_on_as_four(four: list[Any], whole: list[Any], where: str) -> None:
    assert in_turn([rank[f"from one, {where}"] for rank in four]) == whole[8:20]


@pytest.mark.parametrize(("name", "done"), [("four.pt", 24), ("two.pt", 34), ("groups.pt", 12)])
@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_go_on_as_one_process(
    data: Path, folder: Path, two: Any, whole: list[Any], name: str, done: int, workers: int
) -> None:
    config = WorkerConfig(rank=0, world_size=1, num_workers=workers, lanes=LANES)
    loader = packs(data, config)
    loader.restore_state_global(torch.load(folder / name, weights_only=True), src_rank=0)
    assert list(itertools.islice(loader, 9)) == whole[done : done + 9]
    loader.close()


@pytest.mark.parametrize(("length", "left"), [(5, 5), (20, 8)])
def test_a_virtual_epoch_ends_also_when_fewer_ranks_go_on(
    data: Path, length: int, left: int
) -> None:
    loaders = [
        numbers(
            data,
            WorkerConfig(rank=rank, world_size=4, num_workers=0, lanes=LANES),
            virtual_epoch_length=5,
        )
        for rank in range(4)
    ]
    parts = [list(itertools.islice(loader, 3)) for loader in loaders]
    one = numbers(data, ONE, virtual_epoch_length=length)
    one.restore_state_global(checkpoint.merge(loader.state_dict() for loader in loaders))
    epochs = [list(one), list(one)]
    assert [len(epoch) for epoch in epochs] == [left, length]
    straight = itertools.islice(numbers(data, ONE), 12 + left + length)
    assert in_turn(parts) + epochs[0] + epochs[1] == list(straight)


def test_ranks_that_are_not_there_are_named(four: list[Any], groups: list[Any]) -> None:
    for rank in four:
        saving, restoring = rank["no such rank"]
        assert "global_dst_rank is 4; there are 4 processes" in saving
        assert "src_rank is 4; there are 4 ranks" in restoring
        assert "there is no state: give it on every rank" in rank["no state"]
    assert all("src_rank is 2; there are 2 ranks" in rank["no such rank"] for rank in groups)


def test_processes_of_one_model_get_the_same_data(groups: list[Any], whole: list[Any]) -> None:
    lanes = [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert [rank["default"] for rank in groups] == [[n, 2, lanes[n]] for n in (0, 0, 1, 1)]
    for name in ("batches", "batches without groups"):
        assert groups[0][name] == groups[1][name]
        assert groups[2][name] == groups[3][name]
        assert in_turn([groups[0][name], groups[2][name]]) == whole[:12]


def test_one_group_saves_for_all(groups: list[Any], folder: Path) -> None:
    assert [rank["saved"] for rank in groups] == [True, False, False, False]
    assert [rank["saved on 3"] for rank in groups] == [False, False, False, True]
    assert [rank.get("saved by one group") for rank in groups] == [False, None, True, None]
    assert [rank["saved without groups"] for rank in groups] == [False, True, False, False]
    names = ("groups.pt", "groups_on_3.pt", "twice.pt")
    state, *others = (torch.load(folder / name, weights_only=True) for name in names)
    assert others == [state, state]


@pytest.mark.parametrize("where", ["on all", "on the first", "on the second"])
def test_groups_go_on(groups: list[Any], whole: list[Any], where: str) -> None:
    name = f"afterwards, {where}"
    assert groups[0][name] == groups[1][name] == groups[0]["afterwards"]
    assert in_turn([groups[0][name], groups[2][name]]) == whole[12:18]
    assert groups[2][name] == groups[3][name]


def test_groups_go_on_as_plain_ranks(two: list[Any], whole: list[Any]) -> None:
    for where in ("on all", "on 0"):
        assert in_turn([rank[f"groups.pt, {where}"] for rank in two]) == whole[12:20]


def test_a_group_that_lacks_lanes_is_an_error_when_saving(groups: list[Any]) -> None:
    errors = [rank["the wrong group"] for rank in groups]
    for error in errors[::2]:
        assert re.search(r"4 of 8 lanes are on none of the 2 ranks.*data_parallel_group", error)


def marked(mark: str) -> set[int]:
    """The processes that were started with the mark in their environment, or forked from such."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (process / "environ").read_bytes():
                found.add(int(process.name))
        except OSError:  # it has just ended, or is somebody else's
            continue
    return found


def wait_for(condition: Any, seconds: float = 30) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


@pytest.mark.parametrize("victim", ["a rank", "torchrun"])
def test_nobody_outlives_a_run(data: Path, tmp_path: Path, victim: str) -> None:
    mark = uuid.uuid4().hex
    job = (*torchrun(2), SCRIPT, "endless", data, tmp_path)
    with start(*job, cwd=tmp_path, ENERGON_FN_TEST=mark) as run:
        files = [tmp_path / f"pids_{rank}.json" for rank in range(2)]
        try:
            assert wait_for(lambda: all(file.exists() for file in files))
            pids = [json.loads(file.read_text()) for file in files]
            assert [len(rank) for rank in pids] == [3, 3]  # each with two workers
            assert marked(mark) >= {run.pid, *pids[0], *pids[1]}
            if victim == "a rank":
                os.kill(pids[1][0], signal.SIGKILL)
            else:
                run.terminate()
            assert run.wait(40) != 0
            assert wait_for(lambda: not marked(mark), 10), marked(mark)
        finally:
            for pid in marked(mark):
                os.kill(pid, signal.SIGKILL)


def test_the_readmes_training_script_resumes_with_another_number_of_ranks(tmp_path: Path) -> None:
    (script,) = (example for example in examples() if "save_state_global" in example)

    def train(name: str, ranks: int, last_step: int) -> Any:
        folder = tmp_path / name
        if not folder.exists():
            folder.mkdir()
            (folder / "train.py").write_text(script)
            (folder / "energon_fn_demo").symlink_to(tmp_path / "energon_fn_demo")
        command = torchrun(ranks) if ranks > 1 else []
        finish(start(*command, "train.py", last_step, cwd=folder))
        return torch.load(folder / "checkpoint.pt", weights_only=True)

    demo_dataset(tmp_path)
    straight = train("straight", 1, 10)
    assert train("torn", 2, 7)["step"] == 5
    torn = train("torn", 1, 10)
    assert straight["step"] == torn["step"] == 10
    assert straight["loader"] == torn["loader"]
    for name, weight in straight["model"].items():
        torch.testing.assert_close(torn["model"][name], weight, atol=1e-5, rtol=0)
