"""Reports: what was counted is what happened, the shares add up, and the advice fits."""

import contextlib
import dataclasses
import html
import itertools
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import numbered, shards, write_tar

from energon_fn import (
    DefaultTaskEncoder,
    FatalSampleError,
    SkipSample,
    WorkerConfig,
    get_loader,
    get_train_dataset,
    get_val_dataset,
    position,
    trace,
)
from energon_fn.look.report import Report, advice, make_report
from energon_fn.packing import best_fit

SAMPLES = 41
STAGES = (
    *("load", "decode", "cook", "preencode_sample", "encode_sample", "select_samples_to_pack"),
    *("postencode_sample", "pack_selected_samples", "batch_group_criterion", "batch"),
    "encode_batch",
)


def quiet(*error: Any) -> None:
    pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data")
    shards(path, (13, 1, 20, 7))
    return path


class Encoder(DefaultTaskEncoder[Any, Any, Any, Any]):
    """Skips each 7th sample, fails with others, and makes one or two of the rest."""

    def encode_sample(self, sample: Any) -> Any:
        n = sample["json"]["n"]
        if n % 7 == 0:
            raise SkipSample
        if n % 7 == 1:
            raise ValueError("bad")
        return sample

    def encode_batch(self, batch: Any) -> Any:
        return batch


class Doubling(DefaultTaskEncoder[Any, Any, Any, Any]):
    def preencode_sample(self, sample: Any) -> Iterator[Any]:  # type: ignore[override]
        for _ in range(1 + sample["json"]["n"] % 2):
            yield dict(sample)

    postencode_sample = Encoder.encode_sample
    encode_batch = Encoder.encode_batch


class Packing(Encoder):
    select_samples_to_pack = best_fit(cost=lambda sample: 1 + sample["json"]["n"] % 3, capacity=4)

    def pack_selected_samples(self, samples: list[Any]) -> Any:
        return samples


def config(workers: int = 0, **options: Any) -> WorkerConfig:
    return WorkerConfig(
        rank=0, world_size=1, num_workers=workers, lanes=2, global_error_handler=quiet, **options
    )


def size(n: int) -> int:
    return sum(map(len, numbered(n).values()))


def counts(report: Report, stage: str) -> tuple[float, ...]:
    return tuple(report[f"{stage}/{what}"] for what in ("in", "out", "skipped", "failed"))


@pytest.mark.parametrize(("workers", "threads"), [(0, 0), (2, 0), (0, 3), (2, 2)])
def test_items_are_counted_in_each_stage(folder: Path, workers: int, threads: int) -> None:
    dataset = get_val_dataset(
        folder,
        batch_size=4,
        split_part="train",
        task_encoder=Doubling(),
        worker_config=config(workers),
    )
    with get_loader(dataset, threads=threads) as loader:
        batches = list(loader)
        report = loader.report()
    doubled = [n for n in range(SAMPLES) for _ in range(1 + n % 2)]
    skipped, failed = (sum(1 for n in doubled if n % 7 == rest) for rest in (0, 1))
    left = len(doubled) - skipped - failed
    assert counts(report, "load") == counts(report, "decode") == (SAMPLES, SAMPLES, 0, 0)
    assert counts(report, "preencode_sample") == (SAMPLES, len(doubled), 0, 0)
    assert counts(report, "postencode_sample") == (len(doubled), left, skipped, failed)
    assert counts(report, "batch") == (left, len(batches), 0, 0)
    assert counts(report, "encode_batch") == (len(batches), len(batches), 0, 0)
    assert report["batches"] == len(batches)
    assert report["bytes_read"] == pytest.approx(sum(map(size, range(SAMPLES))), rel=0.3)
    assert (report["workers"], report["threads"]) == (workers, threads)


def test_items_are_counted_where_samples_are_packed(folder: Path) -> None:
    dataset = get_val_dataset(
        folder,
        batch_size=2,
        split_part="train",
        packing_buffer_size=9,
        task_encoder=Packing(),
        worker_config=config(),
    )
    loader = get_loader(dataset)
    batches = list(loader)
    report = loader.report()
    packs = report["pack_selected_samples/out"]
    assert counts(report, "select_samples_to_pack")[0] == report["encode_sample/out"]
    assert report["select_samples_to_pack/out"] == report["packs"] == packs
    assert report["pack_selected_samples/in"] == report["encode_sample/out"]
    assert report["batch/in"] == packs
    assert report["batch/out"] == len(batches)


@pytest.mark.parametrize(("workers", "threads"), [(0, 0), (1, 0), (0, 2)])
def test_shares_add_up(folder: Path, workers: int, threads: int) -> None:
    dataset = get_train_dataset(
        folder, batch_size=4, task_encoder=Encoder(), worker_config=config(workers)
    )
    with get_loader(dataset, threads=threads) as loader:
        assert sum(1 for _ in itertools.islice(loader, 200)) == 200
        report = loader.report()
    shares = {name: value for name, value in report.items() if name.endswith("/share")}
    del shares["wait/share"]
    assert sum(shares.values()) == pytest.approx(1)
    assert all(0 <= share < 1 for share in shares.values())


def test_two_loaders_in_one_process_count_for_themselves(folder: Path) -> None:
    def loader(size: int) -> Any:
        return get_loader(get_train_dataset(folder, batch_size=size, worker_config=config()))

    small, large = loader(1), loader(10)
    for _ in itertools.islice(zip(small, large, strict=False), 20):
        pass
    assert counts(small.report(), "load")[0] == 20
    assert counts(large.report(), "load")[0] == 200
    large.restore_sample(next(iter(large))["__restore_key__"])
    next(iter(small))
    assert counts(small.report(), "load")[0] == 21


def test_a_worker_that_was_killed_is_missed_by_no_count_of_batches(folder: Path) -> None:
    dataset = get_train_dataset(folder, batch_size=4, worker_config=config(2))
    with get_loader(dataset) as loader:
        for step, _ in enumerate(itertools.islice(loader, 30)):
            if step == 10:
                os.kill(loader._runner._workers[0].process.pid, signal.SIGKILL)  # type: ignore
        report = loader.report()
    assert report["batches"] == 30


def test_a_report_is_plain_numbers(folder: Path) -> None:
    loader = get_loader(get_train_dataset(folder, batch_size=4, worker_config=config()))
    report = loader.report()
    assert report["batches"] == 0  # before anything was loaded, too
    assert "Too few batches" in str(report)
    next(iter(loader))
    report = loader.report()
    assert json.loads(json.dumps(report)) == report
    assert all(type(value) in (int, float) for value in report.values())
    assert report[f"drawn/{folder}"] == 4


def sums(**other: float) -> dict[str, float]:
    """100 batches of 10 samples: 1 ms to decode each, 9 ms to encode; the loop takes as much."""
    found = {"batches": 100.0, "busy": 10.0, "waited": 5.0, "used": 5.0, "bytes": 1e6}
    for name, ms in (("decode", 1.0), ("encode_sample", 9.0)):
        found |= {f"{name}/{what}": 1000.0 for what in ("in", "out", "calls")}
        found |= {f"{name}/ns": ms * 1e9, f"{name}/ns/143": 1000}
    return {**found, **other}


def test_means_and_shares_are_of_what_was_measured() -> None:
    report = make_report(STAGES, sums(busy=12.5), {}, workers=0, threads=0)
    assert report["decode/mean_us"] == pytest.approx(1000)
    assert report["encode_sample/mean_us"] == pytest.approx(9000)
    assert report["encode_sample/share"] == pytest.approx(9 / 12.5)
    assert report["energon_fn/share"] == pytest.approx(2.5 / 12.5)
    assert report["wait/share"] == pytest.approx(0.5)
    assert report["wait/mean_ms"] == pytest.approx(50)


def test_what_threads_do_is_not_the_work_of_the_process() -> None:
    # 9 s of encoding, 0.5 s of waiting and 1 s of its own; the decoding was done elsewhere.
    report = make_report(STAGES, sums(busy=10.5, waiting=0.5), {}, workers=0, threads=2)
    assert report["decode/share"] == pytest.approx(1 / 11)
    assert report["energon_fn/share"] == pytest.approx(1 / 11)


def test_a_slow_loop_and_a_slow_loader_are_told_apart() -> None:
    def said(workers: int = 2, threads: int = 0, **other: float) -> str:
        return advice(make_report(STAGES, sums(**other), {}, workers, threads))

    assert "keeps up" in said(waited=0.1, used=9.9)
    assert "keeps up" not in said(waited=1, used=9)
    assert "encode_sample (90%)" in said()
    assert "encode_sample (90%)" in said(workers=0)
    assert "encode_sample" not in said(idle=20)
    assert "prefetch_factor" in said(idle=20)
    assert "num_workers" not in said(workers=10_000)
    slow_decode = {"decode/ns": 50e9, "busy": 60.0}
    assert "threads" in said(workers=0, **slow_decode)
    assert "threads" not in said(workers=0, threads=4, **slow_decode)
    assert "threads" not in said(workers=10_000, **slow_decode)
    assert "own work" in said(busy=100)


@pytest.mark.parametrize("stage", STAGES)
def test_there_is_something_to_try_for_each_stage(stage: str) -> None:
    found = {"batches": 100.0, "busy": 10.0, "waited": 5.0, f"{stage}/ns": 9e9}
    found |= {f"{stage}/{what}": 10.0 for what in ("in", "out", "calls", "ns/240")}
    assert f"{stage} (90%)" in advice(make_report(STAGES, found, {}, workers=10_000, threads=0))


@pytest.mark.parametrize("width", [30, 40, 60, 79, 120])
def test_the_table_fits(width: int) -> None:
    lines = make_report(STAGES, sums(), {}, workers=2, threads=0).text(width).splitlines()
    assert max(map(len, lines)) <= width
    assert [line.split()[-1] for line in lines[:4]] == ["share", "10%", "90%", "0%"]
    assert ("out" in lines[0]) == (width >= 40)


@pytest.mark.parametrize("path", ["/mnt/share", "share", "s3/failed"])
def test_no_dataset_is_taken_for_a_stage(path: str) -> None:
    report = make_report(STAGES, sums(), {path: 7}, workers=0, threads=0)
    assert report.stages == ["decode", "encode_sample", "energon_fn"]
    assert report[f"drawn/{path}"] == 7


def test_a_notebook_shows_a_table() -> None:
    report = make_report(STAGES, sums(), {"a & b": 3}, workers=2, threads=0)
    table = report._repr_html_()
    assert table.count("<tr>") == 4
    assert html.escape(advice(report)) in table


# ------------------------------------------------------------------------------------ error budgets


def failing(folder: Path, share: int, **options: Any) -> Any:
    """A loader of samples of which each ``share``-th fails."""

    class Failing(DefaultTaskEncoder[Any, Any, Any, Any]):
        def encode_sample(self, sample: Any) -> Any:
            if sample["json"]["n"] % share == 0:
                raise ValueError("bad")
            return sample["json"]["n"]

    dataset = get_val_dataset(
        folder,
        batch_size=1,
        split_part="train",
        task_encoder=Failing(),
        worker_config=config(**options),
    )
    return get_loader(dataset)


@pytest.mark.parametrize("workers", [0, 2])
def test_so_many_failures_are_accepted_and_no_more(folder: Path, workers: int) -> None:
    bad = len(range(0, SAMPLES, 4))
    good = [n for n in range(SAMPLES) if n % 4]
    with failing(folder, 4, workers=workers, max_failures=bad) as loader:
        assert sorted(int(batch[0]) for batch in loader) == good
    message = f"{bad} failures .* max_failures={bad - 1}"
    with (
        failing(folder, 4, workers=workers, max_failures=bad - 1) as loader,
        pytest.raises(FatalSampleError, match=message),
    ):
        list(loader)


def test_so_large_a_share_of_failures_is_accepted(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [(f"{n:05d}", numbered(n)) for n in range(1500)])
    with failing(tmp_path, 60, max_failure_rate=0.02) as loader:
        assert sum(1 for _ in loader) == 1475
    with (
        failing(tmp_path, 40, max_failure_rate=0.02) as loader,
        pytest.raises(FatalSampleError, match=r"max_failure_rate=0\.02"),
    ):
        list(loader)


@pytest.mark.parametrize("options", [{"max_failures": -1}, {"max_failure_rate": 1.5}])
def test_a_budget_that_is_none_is_told(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        config(**options)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_budget_costs_no_sample(
    folder: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("energon_fn.loader.NEWS_EVERY", -1)  # it is looked at with each batch
    monkeypatch.setattr("energon_fn.processes.outbox.NEWS_EVERY", -1)

    def good(loader: Any) -> list[int]:
        found: list[int] = []
        with contextlib.suppress(FatalSampleError):
            for batch in loader:
                found += batch
        return found

    with failing(folder, 4, workers=workers, max_failures=2) as loader:
        before = good(loader)
        state = loader.state_dict()
    with failing(folder, 4, workers=workers) as loader:
        loader.load_state_dict(state)
        after = good(loader)
    assert sorted(before + after) == [n for n in range(SAMPLES) if n % 4]
    assert after


# ----------------------------------------------------------------------- what is counted, and where


@pytest.mark.parametrize("workers", [0, 2])
def test_runs_that_were_cut_short_are_counted(folder: Path, workers: int) -> None:
    dataset = get_val_dataset(
        folder, batch_size=2, limit=3, split_part="train", worker_config=config(workers)
    )
    with get_loader(dataset) as loader:
        for _ in range(10):
            assert sum(1 for _ in loader) == 3
        report = loader.report()
    assert report["batches"] == 30
    assert report["load/in"] >= 2 * 30
    assert report["batch/out"] >= 30


def test_workers_do_not_tell_what_their_parent_counted(folder: Path) -> None:
    first = get_loader(get_train_dataset(folder, batch_size=10, worker_config=config()))
    for _ in itertools.islice(first, 100):
        pass
    dataset = get_val_dataset(folder, batch_size=2, split_part="train", worker_config=config(2))
    with get_loader(dataset, multiprocessing_context="fork") as second:
        list(second)
        assert second.report()["load/in"] == SAMPLES


def test_what_was_made_again_is_counted_for_nobody(folder: Path) -> None:
    loader = get_loader(get_train_dataset(folder, batch_size=10, worker_config=config()))
    batch = next(iter(loader))
    loader.restore_sample(batch["__restore_key__"])
    trace(loader.dataset, batch["__key__"][0])
    assert counts(loader.report(), "load")[0] == 10


def test_time_of_threads_is_not_left_over(tmp_path: Path) -> None:
    def decode(raw: dict[str, Any]) -> Any:
        time.sleep(0.05)
        raise ValueError("bad")

    write_tar(tmp_path / "0.tar", [("0", numbered(0))])
    dataset = get_val_dataset(
        tmp_path, batch_size=1, split_part="train", decoder=decode, worker_config=config()
    )
    assert list(get_loader(dataset, threads=2)) == []
    assert position.here.elsewhere == 0


def test_time_of_error_handlers_is_that_of_the_stage(folder: Path) -> None:
    slow = dataclasses.replace(config(), global_error_handler=lambda *error: time.sleep(0.005))
    dataset = get_val_dataset(
        folder, batch_size=4, split_part="train", task_encoder=Encoder(), worker_config=slow
    )
    loader = get_loader(dataset)
    list(loader)
    report = loader.report()
    assert report["encode_sample/share"] > report["energon_fn/share"]


def test_groups_to_pack_may_be_a_tuple(folder: Path) -> None:
    class InTuples(Packing):
        def select_samples_to_pack(self, samples: list[Any]) -> Any:
            return tuple([sample] for sample in samples)

    dataset = get_val_dataset(
        folder,
        batch_size=2,
        split_part="train",
        packing_buffer_size=9,
        task_encoder=InTuples(),
        worker_config=config(),
    )
    loader = get_loader(dataset)
    list(loader)
    report = loader.report()
    assert report["select_samples_to_pack/out"] == report["pack_selected_samples/out"] > 9
