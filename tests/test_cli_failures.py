"""``energon-fn lint --quarantine``, ``exclude`` and ``trace``, and task encoders by their names."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from conftest import jpeg, numbered, prepare, shards, write_tar
from processes import Result, run, run_function

from energon_fn import (
    DefaultTaskEncoder,
    WorkerConfig,
    get_loader,
    get_train_dataset,
    quarantine,
    read_quarantine,
    write_dataset_yaml,
)
from energon_fn.cli import main
from energon_fn.cli.encoder import load_encoder

MODULE = """
import random
from energon_fn import DefaultTaskEncoder

class Encoder(DefaultTaskEncoder):
    def encode_sample(self, sample):
        if random.random() < 0.3:
            raise ValueError(f"no luck with {sample.caption}")
        return sample

class WithArguments(Encoder):
    def __init__(self, size):
        self.size = size

def make():
    return WithArguments(3)

class Doer:
    def __call__(self):
        raise AssertionError("it is a task encoder, and not to be called")

    def encode_sample(self, sample):
        return "done"

doer = Doer()
number = 7

def broken():
    return 1 / 0
"""


@pytest.fixture
def cats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two shards of captioned pictures, two of them cut short, beside a module of the user's."""
    folder = tmp_path / "cats"
    folder.mkdir()
    names = shards(
        folder, (6, 6), lambda n: {"jpg": jpeg(n)[: 200 if n in (3, 8) else None], "txt": b"a cat"}
    )
    prepare(folder, names, ("train", 1), ("val", 1))
    write_dataset_yaml(folder, "CaptioningSample", {"image": "jpg", "caption": "txt"})
    (tmp_path / "own_encoders.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    return folder


def test_lint_writes_what_exclude_reads(cats: Path) -> None:
    found = run("lint", "cats", "--quarantine", "bad.jsonl")
    assert found.status == 1
    *lines, after = found.out.splitlines()
    assert (len(lines), after) == (3, "next: energon-fn exclude cats bad.jsonl")
    failures = list(read_quarantine("bad.jsonl"))
    assert [(failure.keys, failure.stage) for failure in failures] == [
        (("00003",), "decode"),
        (("00008",), "decode"),
    ]
    assert [failure.sources[0].shard_name for failure in failures] == [
        "shard_000.tar",
        "shard_001.tar",
    ]
    assert all("runcated" in failure.traceback for failure in failures)

    split = cats / ".nv-meta/split.yaml"
    text = split.read_text()
    planned = run("exclude", "cats", "bad.jsonl", "--dry-run")
    entries = ["shard_000.tar/00003", "shard_001.tar/00008"]
    assert planned.out.splitlines() == [
        *entries,
        "2 entries would be added to `exclude` in split.yaml",
    ]
    assert split.read_text() == text
    done = run("exclude", "cats", "bad.jsonl", "bad.jsonl")
    assert done == (0, "\n".join([*entries, "2 entries added to `exclude` in split.yaml\n"]), "")
    assert run("lint", "cats", "--quarantine", "bad.jsonl").status == 0
    again = run("exclude", "cats", "bad.jsonl")
    assert again.out == "0 entries added to `exclude` in split.yaml\n2 samples excluded before\n"


def test_lint_names_shards_that_cannot_be_read(cats: Path, tmp_path: Path) -> None:
    (cats / "shard_000.tar").unlink()
    write_tar(tmp_path / "loose/good.tar", [("a", {"json": b"{}"})])
    (tmp_path / "loose/bad.tar").write_bytes(b"no tar" * 1000)
    assert run("lint", "cats", "--quarantine", "bad.jsonl").status == 1
    assert run("lint", "loose", "--quarantine", "bad.jsonl").status == 1
    of_cats, bad_sample, of_loose = read_quarantine("bad.jsonl")
    assert (of_cats.keys, of_cats.stage, of_cats.error) == ((), "load", "DatasetError")
    assert (bad_sample.keys, bad_sample.stage) == (("00008",), "decode")
    assert of_loose.sources[0].shard_name == "bad.tar"
    done = run("exclude", "cats", "bad.jsonl")
    assert done.out.splitlines() == [
        "shard_000.tar",
        "shard_001.tar/00008",
        "2 entries added to `exclude` in split.yaml",
        "1 failure of other datasets:",
        f"  1 {tmp_path}/loose",
    ]


def test_failures_of_batches_are_told_and_not_excluded(cats: Path) -> None:
    class Unable(DefaultTaskEncoder[Any, Any, Any, Any]):
        def batch(self, samples: list[Any]) -> Any:
            raise ValueError("never")

    config = WorkerConfig(
        rank=0,
        world_size=1,
        num_workers=0,
        global_error_handler=quarantine("bad.jsonl", then=lambda *failure: None),
    )
    dataset = get_train_dataset(
        cats, batch_size=5, repeat=False, task_encoder=Unable(), worker_config=config
    )
    assert list(get_loader(dataset)) == []
    assert run("exclude", "cats", "bad.jsonl").out.splitlines() == [
        "shard_000.tar/00003",
        "1 entry added to `exclude` in split.yaml",
        "1 failure of several samples at once, whose fault it is cannot be told:",
        "  1 batch",
    ]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["exclude", "cats", "none.jsonl"], "none.jsonl does not exist"),
        (["exclude", "cats", "own_encoders.py"], "own_encoders.py, line 2: this is no record"),
        (["exclude", "none", "bad.jsonl"], "energon-fn prepare"),
        (["lint", "cats", "--quarantine", "none/bad.jsonl"], "none/bad.jsonl"),
        (["trace", "cats", "99"], "no sample has the key '99'"),
        (["trace", "cats", "00001", "--split-part", "val"], "no sample has the key '00001'"),
        (["trace", "cats", '["sample", 0, 99, 0]'], "no sample or batch of this dataset"),
        (["trace", "none", "1"], "none"),
    ],
)
def test_errors_are_one_line(words: list[str], said: str, cats: Path) -> None:
    Path("bad.jsonl").touch()
    result = run(*words)
    assert (result.status, result.out) == (2, "")
    assert said in result.err
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1


# ------------------------------------------------------------------------------------------- trace


@pytest.mark.parametrize("columns", [40, 60, 120])
def test_trace_shows_every_step(columns: int, cats: Path) -> None:
    result = run("trace", "cats", "00001", columns=columns)
    assert (result.status, result.err) == (0, "")
    lines = result.out.splitlines()
    assert max(map(len, lines)) < columns
    heads = [line.split()[0] for line in lines if line[:1] not in ("", " ")]
    assert heads == ["sample", "restore", "load", "decode", "sample"]
    assert "  caption  a cat" in lines
    assert "\x1b" not in result.out


def test_trace_finds_the_part_and_shows_what_fails(cats: Path) -> None:
    result = run("trace", "cats", "00008")
    assert result.status == 1
    assert "sample 00008 of cats/shard_001.tar\n" in result.out
    assert "SampleError: cannot decode part 'jpg'" in result.out
    assert run("trace", "cats", "00008", "--image-decode", "pilrgb").status == 1
    assert run("trace", "cats", "00008", "--split-part", "val").out.startswith("sample 00008")


def test_trace_replays_what_a_quarantine_file_has(cats: Path) -> None:
    """With the user's encoder, whose failures depend on random numbers of the epoch."""
    Path("train.py").write_text(
        "from own_encoders import Encoder\n"
        "from energon_fn import WorkerConfig, get_loader, get_train_dataset, quarantine\n"
        "config = WorkerConfig(rank=0, world_size=1, num_workers=2, lanes=2,\n"
        "                      global_error_handler=quarantine('bad.jsonl'))\n"
        "dataset = get_train_dataset('cats', batch_size=2, shuffle_buffer_size=9,\n"
        "                            task_encoder=Encoder(), worker_config=config)\n"
        "for step, _ in zip(range(8), get_loader(dataset)):\n"
        "    pass\n"
    )
    assert run_function(lambda: _script("train.py")).status == 0
    failures = [one for one in read_quarantine("bad.jsonl") if one.stage == "encode_sample"]
    epochs = {failure.restore_keys[0][1] for failure in failures}
    assert len(epochs) > 1
    for failure in failures[:4]:
        key = json.dumps(failure.restore_keys[0])
        result = run("trace", "cats", key, "--task-encoder", "own_encoders:Encoder")
        assert result.status == 1
        assert f"ValueError: {failure.message}" in result.out
        assert "own_encoders.py:8 in encode_sample" in result.out


def _script(name: str) -> int:
    import runpy
    import sys

    sys.path.insert(0, os.getcwd())
    runpy.run_path(name)
    return 0


def test_trace_of_lines_and_of_a_metadataset(cats: Path, tmp_path: Path) -> None:
    Path("lines.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    assert '{"text": "b"}' in run("trace", "lines.jsonl", "1").out
    shards(tmp_path / "numbers", (3,), numbered)
    Path("meta.yaml").write_text(
        "__module__: megatron.energon\n__class__: MetadatasetV2\nsplits:\n"
        "  train:\n    blend:\n      - {weight: 1, path: ./numbers}\n"
        "      - {weight: 2, path: ./cats}\n"
        "  test: {path: ./cats, split_part: val}\n"
    )
    assert "of numbers/shard_000.tar\n" in run("trace", "meta.yaml", "00002").out
    assert "of cats/shard_000.tar\n" in run("trace", "meta.yaml", "00005").out
    assert "of cats/shard_001.tar\n" in run("trace", "meta.yaml", "00009").out


def test_trace_runs_a_datasets_code_only_if_trusted(cats: Path) -> None:
    write_dataset_yaml(cats, "CaptioningSample", parts=["jpg", "txt"])
    (cats / ".nv-meta/sample_loader.py").write_text(
        "def sample_loader(raw):\n    return dict(image=raw['jpg'], caption=raw['nothing'])\n"
        "def part_filter(part):\n    return True\n"
    )
    assert "--trust" in run("trace", "cats", "00001").err
    result = run("trace", "cats", "00001", "--trust")
    assert result.status == 1
    assert "sample_loader.py" in result.out
    assert "nothing" in result.out


# ------------------------------------------------------------------------------------ task encoders


def shown(name: str) -> Result:
    """What ``load_encoder`` gives, in a process of its own, for what it imports."""

    def show() -> int:
        encoder = load_encoder(name)
        print(type(encoder).__name__, getattr(encoder, "size", None))
        return 0

    return run_function(show)


@pytest.mark.parametrize(
    ("name", "made"), [("Encoder", "Encoder None"), ("make", "WithArguments 3"),
                       ("doer", "Doer None"), ("Doer", "Doer None")]
)  # fmt: skip
def test_task_encoders_are_found_here(name: str, made: str, cats: Path) -> None:
    assert shown(f"own_encoders:{name}").out == made + "\n"


def test_no_name_is_the_default() -> None:
    assert type(load_encoder(None)) is DefaultTaskEncoder


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("own_encoders", "write MODULE:NAME"),
        ("own_encoders.py:Encoder", "write MODULE:NAME"),
        ("own_encoders:", "write MODULE:NAME"),
        ("own_encoders:a.b", "write MODULE:NAME"),
        ("other_encoders:Encoder", "there is no module other_encoders"),
        ("own_encoders:Encode", "has no Encode; did you mean Encoder?"),
        ("own_encoders:number", "7 is no task encoder"),
        ("own_encoders:random", "is no task encoder"),
        ("own_encoders:WithArguments", "WithArguments() failed. Name a function"),
        ("own_encoders:broken", "division by zero (own_encoders.py, line 29)"),
        ("wrong:Encoder", "wrong cannot be imported: NameError: name 'nothing' is not defined"),
        ("half:Encoder", "half cannot be imported: SyntaxError"),
        (
            "needy:Encoder",
            "needy cannot be imported: ModuleNotFoundError: No module named 'no_such",
        ),
    ],
)
def test_what_is_no_task_encoder_is_told(name: str, said: str, cats: Path) -> None:
    Path("wrong.py").write_text("x = nothing\n")
    Path("half.py").write_text("def f(:\n")
    Path("needy.py").write_text("import no_such_module\n")
    result = run("trace", "cats", "00001", "--task-encoder", name)
    assert (result.status, result.out) == (2, "")
    assert result.err.startswith("error: --task-encoder")
    assert said in result.err
    assert result.err.count("\n") == 1


def test_help_is_there() -> None:
    for command in ("trace", "exclude", "lint"):
        result = run_function(lambda command=command: main([command, "--help"]))  # type: ignore[misc]
        assert result.status == 0
        assert "quarantine" in result.out.lower()
