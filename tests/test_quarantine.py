"""The quarantine file: every failure of every process is in it, whole, and can be worked with."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import jpeg, prepare, shards
from hypothesis import given
from hypothesis import strategies as st

from energon_fn import (
    CaptioningSample,
    DatasetError,
    DefaultTaskEncoder,
    SkipSample,
    WorkerConfig,
    exclude,
    get_loader,
    get_train_dataset,
    quarantine,
    read_quarantine,
    reraise_exception,
    trace,
    write_dataset_yaml,
)
from energon_fn.failures.quarantine import Failure, append
from energon_fn.guard import guarded
from energon_fn.position import here
from energon_fn.samples import SourceInfo

CUT = {3, 11}  # pictures that are cut short
NO_PICTURE = {6}
SAD = {4, 9, 12}  # captions that the encoder below does not bear
SOUND = {f"{n:05d}" for n in {*range(15)} - CUT - NO_PICTURE - SAD}


def animal(n: int) -> dict[str, bytes]:
    picture = b"no picture" if n in NO_PICTURE else jpeg(n)[: -90 if n in CUT else None]
    return {"jpg": picture, "txt": f"a {'sad' if n in SAD else 'glad'} cat {n}".encode()}


@pytest.fixture
def cats(tmp_path: Path) -> Path:
    """15 captioned pictures in three shards, six of them with something wrong."""
    folder = tmp_path / "cats"
    folder.mkdir()
    prepare(folder, shards(folder, (5, 5, 5), animal))
    write_dataset_yaml(folder, "CaptioningSample", {"image": "jpg", "caption": "txt"})
    return folder


class Cheerful(DefaultTaskEncoder[Any, Any, Any, Any]):
    def encode_sample(self, sample: CaptioningSample) -> CaptioningSample:
        if "sad" in sample.caption:
            raise ValueError(f"{sample.caption} is too sad")
        return sample


class Fussy(Cheerful):
    """Cannot make a batch of certain samples."""

    def batch(self, samples: list[Any]) -> Any:
        if any(sample.__key__ == "00007" for sample in samples):
            raise RuntimeError("these do not go together")
        return super().batch(samples)


def run(
    folder: Path, handler: Any, encoder: Any = None, workers: int = 0, method: str | None = None
) -> tuple[Any, list[Any]]:
    """The dataset, and the batches of an epoch."""
    config = WorkerConfig(
        rank=0, world_size=1, num_workers=workers, lanes=2, global_error_handler=handler
    )
    dataset = get_train_dataset(
        folder,
        batch_size=2,
        shuffle_buffer_size=10,
        repeat=False,
        task_encoder=encoder or Cheerful(),
        worker_config=config,
    )
    with get_loader(dataset, multiprocessing_context=method) as loader:
        return dataset, list(loader)


def keys_of(batches: list[Any]) -> set[str]:
    return {key for batch in batches for key in batch.__key__}


@pytest.mark.parametrize(("workers", "method"), [(0, None), (2, "fork"), (2, "spawn")])
def test_from_a_run_with_failures_to_one_without(
    workers: int, method: str | None, cats: Path, tmp_path: Path
) -> None:
    file = tmp_path / "bad.jsonl"
    dataset, batches = run(cats, quarantine(file), workers=workers, method=method)
    assert keys_of(batches) == SOUND

    failures = {int(failure.keys[0]): failure for failure in read_quarantine(file)}
    assert failures.keys() == CUT | NO_PICTURE | SAD
    assert len(list(read_quarantine(file))) == len(failures)
    for n, failure in failures.items():
        [source] = failure.sources
        assert (source.dataset_path, source.shard_name) == (str(cats), f"shard_{n // 5:03d}.tar")
        assert (failure.stage, failure.error) == (
            ("encode_sample", "ValueError") if n in SAD else ("decode", "SampleError")
        )
        assert failure.traceback.startswith("Traceback (most recent call last):")
        assert failure.message in failure.traceback
        assert failure.time.endswith("+00:00")
    assert failures[4].message == "a sad cat 4 is too sad"
    assert "test_quarantine.py" in failures[4].traceback

    for failure in failures.values():  # each is replayed from what the file says
        way = trace(dataset, failure.restore_keys[0])
        assert way.key == failure.keys[0]
        assert way.steps[-1].stage == failure.stage
        assert (type(way.error).__name__, str(way.error)) == (failure.error, failure.message)

    done = exclude(cats, read_quarantine(file))
    assert len(done.added) == len(failures)
    _, again = run(cats, reraise_exception)
    assert keys_of(again) == SOUND


def test_a_batch_names_all_its_samples_in_one_line(cats: Path, tmp_path: Path) -> None:
    file = tmp_path / "bad.jsonl"
    _, batches = run(cats, quarantine(file), Fussy(), workers=2)
    found = [failure for failure in read_quarantine(file) if failure.stage == "batch"]
    [failure] = found
    assert set(failure.keys) == SOUND - keys_of(batches)
    assert len(failure.keys) == len(failure.sources) == len(failure.restore_keys) == 2
    assert "00007" in failure.keys
    names = [source.file_names[0].partition(".")[0] for source in failure.sources]
    assert tuple(names) == failure.keys
    assert [key[2] for key in failure.restore_keys] == [int(key) for key in failure.keys]


def test_a_batch_that_is_a_whole_names_its_samples(tmp_path: Path) -> None:
    batch = {
        "__key__": ["1", "2"],
        "__restore_key__": (("sample", 0, 1, 0), ("sample", 0, 2, 0)),
        "__sources__": (SourceInfo("/data", 1, "a.tar", ("1.txt",)), "the user's own"),
    }
    failure = Failure.of(ValueError(), batch, batch["__sources__"], "encode_batch")  # type: ignore[arg-type]
    assert failure.keys == ("1", "2")
    assert failure.restore_keys == batch["__restore_key__"]
    assert [source.shard_name for source in failure.sources] == ["a.tar"]


@pytest.mark.parametrize("item", [None, 7, "text", [], [1, 2], {"txt": 1}, {"__key__": None}])
def test_what_is_no_sample_has_no_keys(item: Any, tmp_path: Path) -> None:
    file = tmp_path / "bad.jsonl"
    quarantine(file, then=lambda *failure: None)(ValueError("x"), item, None)
    [failure] = read_quarantine(file)
    assert (failure.keys, failure.sources, failure.restore_keys) == ((), (), ())


def test_then_is_called_with_the_same_behind_the_line(tmp_path: Path) -> None:
    file = tmp_path / "bad.jsonl"
    told: list[Any] = []

    def then(*failure: Any) -> None:
        told.append((failure, len(file.read_text().splitlines())))

    handler = quarantine(file, then)
    error, sample, sources = ValueError("bad"), {"__key__": "7"}, (SourceInfo("/d", 0, "s", ()),)
    handler(error, sample, sources)
    assert told == [((error, sample, sources), 1)]
    with pytest.raises(ValueError, match="bad"):
        quarantine(file, reraise_exception)(error, sample, sources)
    assert len(list(read_quarantine(file))) == 2


def test_the_stage_is_that_of_the_function(tmp_path: Path) -> None:
    file = tmp_path / "bad.jsonl"

    def fail(item: Any) -> Any:
        yield item
        raise ValueError("the second")

    call = guarded(fail, "postencode_sample", handler=quarantine(file, lambda *failure: None))
    outputs: Any = call({"__key__": "7"})
    next(outputs)
    here.stage = "batch"  # others run between two outputs
    assert next(outputs, None) is None
    assert [failure.stage for failure in read_quarantine(file)] == ["postencode_sample"]


def test_errors_of_the_dataset_are_written_by_whoever_tells_them(tmp_path: Path) -> None:
    file = tmp_path / "bad.jsonl"
    handler = quarantine(file, lambda *failure: None)

    def fail(item: Any) -> Any:
        raise DatasetError("no shard")

    with pytest.raises(DatasetError) as raised:  # it ends the run, and no handler is asked
        guarded(fail, "decode", handler=handler)({"__key__": "7"})
    assert list(read_quarantine(file)) == []
    handler(raised.value, {"__key__": "7"}, None)
    [failure] = read_quarantine(file)
    assert (failure.keys, failure.error, failure.stage) == (("7",), "DatasetError", "decode")


def test_it_pickles_with_where_it_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    handler = pickle.loads(pickle.dumps(quarantine("bad.jsonl")))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    handler(ValueError("x"), {"__key__": "7"}, None)
    assert [failure.keys for failure in read_quarantine(tmp_path / "bad.jsonl")] == [("7",)]


def test_a_run_without_failures_leaves_an_empty_file(tmp_path: Path) -> None:
    quarantine(tmp_path / "bad.jsonl")
    assert list(read_quarantine(tmp_path / "bad.jsonl")) == []


def test_a_file_that_cannot_be_written_is_an_error_at_once(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none/bad\.jsonl"):
        quarantine(tmp_path / "none/bad.jsonl")
    with pytest.raises(IsADirectoryError, match=str(tmp_path)):
        quarantine(tmp_path)


# ------------------------------------------------------------------------------ several processes


def _fail_often(path: str, who: int, count: int) -> None:
    handler = quarantine(path, then=lambda *failure: None)
    for n in range(count):
        size = 10 ** (n % 6)  # up to 100 kB, far more than a page
        handler(ValueError(f"{who} {n} " + chr(97 + who) * size), {"__key__": f"{who}/{n}"}, None)


def test_lines_of_many_processes_stay_whole(tmp_path: Path) -> None:
    path, processes, count = str(tmp_path / "bad.jsonl"), 4, 60
    running = [
        multiprocessing.get_context("fork").Process(target=_fail_often, args=(path, who, count))
        for who in range(processes)
    ]
    for process in running:
        process.start()
    for process in running:
        process.join()
        assert process.exitcode == 0
    failures = list(read_quarantine(path))
    assert {failure.keys[0] for failure in failures} == {
        f"{who}/{n}" for who, n in itertools.product(range(processes), range(count))
    }
    assert len(failures) == processes * count
    for failure in failures:
        who, n = map(int, failure.keys[0].split("/"))
        assert failure.message == f"{who} {n} " + chr(97 + who) * 10 ** (n % 6)


# ----------------------------------------------------------------------------------- broken lines


def record(key: str) -> Failure:
    sources = (SourceInfo("/data", 3, "a.tar", (f"{key}.jpg",)),)
    item = {"__key__": key, "__restore_key__": ("sample", 0, 3, 0)}
    return Failure.of(ValueError("bad"), item, sources, "decode")


def test_what_a_process_did_not_finish_costs_no_other_line(tmp_path: Path) -> None:
    file = tmp_path / "bad.jsonl"
    append(file, record("1"))
    whole = file.read_bytes()
    file.write_bytes(whole + whole[:100])  # the process was killed, or the disk full
    found = read_quarantine(file)
    assert next(found).keys == ("1",)
    with pytest.raises(DatasetError, match=r"bad\.jsonl, line 2: .*only half written"):
        next(found)
    append(file, record("3"))
    lines = file.read_bytes().splitlines()
    assert len(lines) == 3
    with pytest.raises(DatasetError, match=r"line 2: .*Remove the line"):
        list(read_quarantine(file))
    file.write_bytes(lines[0] + b"\n\n" + lines[2] + b"\n")
    assert [failure.keys[0] for failure in read_quarantine(file)] == ["1", "3"]


def without(name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda content: {key: value for key, value in content.items() if key != name}


@pytest.mark.parametrize(
    "spoil",
    [
        lambda content: None,
        lambda content: [],
        lambda content: "text",
        lambda content: content | {"stage": 7},
        lambda content: content | {"keys": 7},
        lambda content: content | {"sources": [{"dataset_path": "/data"}]},
        lambda content: content | {"sources": ["/data"]},
        *map(without, ("keys", "sources", "stage", "traceback", "restore_keys")),
    ],
)
def test_what_is_no_record_is_told_with_its_line(
    spoil: Callable[[dict[str, Any]], Any], tmp_path: Path
) -> None:
    file = tmp_path / "bad.jsonl"
    append(file, record("1"))
    line = file.read_text()
    file.write_text(line + json.dumps(spoil(json.loads(line))) + "\n" + line)
    with pytest.raises(DatasetError, match=r"bad\.jsonl, line 2: this is no record"):
        list(read_quarantine(file))


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"none\.jsonl does not exist"):
        next(read_quarantine(tmp_path / "none.jsonl"))


texts = st.text(st.characters(codec=None))  # lone surrogates and line breaks, too


@given(texts, texts, st.lists(texts), st.integers() | texts)
def test_all_of_it_comes_back(message: str, key: str, names: list[str], index: int | str) -> None:
    sample = {"__key__": key, "__restore_key__": ("sample", 1, 2, 3)}
    sources = (SourceInfo(message, index, key, tuple(names)),)
    failure = Failure.of(KeyError(message), [sample, sample], sources, message)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "bad.jsonl")
        append(path, failure)
        append(path, failure)
        assert list(read_quarantine(path)) == [failure, failure]


def test_skipping_is_no_failure(tmp_path: Path) -> None:
    file = tmp_path / "bad.jsonl"

    def skip(item: Any) -> Any:
        raise SkipSample

    with pytest.raises(SkipSample):
        guarded(skip, "encode_sample", handler=quarantine(file))({"__key__": "7"})
    assert list(read_quarantine(file)) == []
