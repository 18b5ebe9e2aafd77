"""JSON Lines: every line that is not blank is a sample, wherever it lies and whoever indexed it."""

from __future__ import annotations

import gzip
import json
import multiprocessing
import os
import pickle
import subprocess
import tempfile
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import run

from energon_fn import (
    Cooker,
    DefaultTaskEncoder,
    WorkerConfig,
    basic_sample_keys,
    get_loader,
    get_train_dataset,
    get_val_dataset,
)
from energon_fn.decoding import decoder
from energon_fn.disk import files
from energon_fn.disk.jsonl import Jsonl, is_jsonl, jsonl_files, open_jsonl, prepare_jsonl
from energon_fn.disk.source import Samples
from energon_fn.errors import DatasetError, SampleError
from energon_fn.samples import CrudeSample, SourceInfo


def write(path: Path, values: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def values(source: Samples) -> list[Any]:
    return [source.make(source.load(i), None)["json"] for i in range(len(source))]


def keys(source: Samples) -> list[str]:
    return [source.key(i) for i in range(len(source))]


@pytest.fixture
def seven(tmp_path: Path) -> Path:
    return write(tmp_path / "seven.jsonl", [{"id": n} for n in range(7)])


# -------------------------------------------------------------------------------- what a sample is


def test_a_line_is_a_crude_sample(seven: Path) -> None:
    source = open_jsonl(seven, "val", {"kind": "numbers"})
    raw = source.load(3)
    assert raw == {
        "__key__": "3",
        "json": b'{"id": 3}',
        "__restore_key__": (),
        "__subflavors__": {"kind": "numbers"},
        "__sources__": (SourceInfo(str(seven), 3, "seven.jsonl", ("3.json",)),),
    }
    sample = source.make(raw, decoder())
    assert type(sample) is CrudeSample
    assert sample == {**raw, "json": {"id": 3}}
    assert raw["json"] == b'{"id": 3}'
    assert (source.path, source.split_part, source.runs) == (str(seven), "val", (7,))
    assert [raw["__key__"] for raw in source] == keys(source) == list("0123456")
    assert source[3] == raw


def test_its_value_is_there_whatever_decodes(seven: Path) -> None:
    source, seen = open_jsonl(seven), []

    def decode(raw: dict[str, Any]) -> dict[str, Any]:
        seen.append(raw["json"])
        return {**raw, "more": 1}

    raw = source.load(6)
    assert source.make(raw, None) == source.make(raw, decoder(None)) == source.make(raw, decoder())
    assert source.make(raw, decode) == {**raw, "json": {"id": 6}, "more": 1}
    assert seen == [{"id": 6}]


def test_every_part_of_a_split_is_all_of_it(seven: Path) -> None:
    parts = [open_jsonl(seven, part) for part in ("train", "val", "test", "my own")]
    assert all(values(part) == [{"id": n} for n in range(7)] for part in parts)
    assert len({part.identity for part in parts}) == 4


def test_outside_there_is_nothing(seven: Path) -> None:
    source = open_jsonl(seven)
    for i in (-1, 7):
        with pytest.raises(IndexError, match=r"seven\.jsonl has 7"):
            source.load(i)
        with pytest.raises(IndexError):
            source.key(i)
    for key in ("7", "-1", "03", "", "a", "3.0", "٣", "seven.jsonl/3", "3\n", "9" * 5000):
        assert source.find(key) is None


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)
texts = json_values.map(lambda value: json.dumps(value, ensure_ascii=False).encode())
blanks = st.sampled_from([b"", b"", b"  ", b"\t", b"\r", b" \x0c\x0b "])
lines = st.tuples(blanks, texts | blanks, blanks).map(b"".join)


@given(st.lists(lines, max_size=12), texts, st.lists(lines | texts, max_size=12), st.booleans())
@settings(max_examples=150)
def test_lines_are_found(before: list[bytes], text: bytes, after: list[bytes], ended: bool) -> None:
    all_lines = [line + b"\n" for line in (*before, text, *after)]
    if not ended:
        all_lines[-1] = all_lines[-1][:-1]
    expected = [json.loads(line.strip()) for line in all_lines if line.strip()]
    places = accumulate(map(len, all_lines), initial=0)
    starts = [at for at, line in zip(places, all_lines, strict=False) if line.strip()]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "x.jsonl")
        file.write_bytes(b"".join(all_lines))
        source = open_jsonl(file)
        assert values(source) == expected
        index = np.fromfile(prepare_jsonl(file), "<u8")
        assert index.tolist() == [0, *starts[1:], file.stat().st_size]
        assert values(open_jsonl(file)) == expected
        assert open_jsonl(file).lines[0].offsets == f"{file}.idx" != source.lines[0].offsets


def test_long_and_many_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than one piece of the file at a time, and a line that is larger than a piece."""
    monkeypatch.setattr("energon_fn.disk.jsonl._CHUNK", 1000)
    lengths = [*range(300), 5000, 0, 7]
    file = write(tmp_path / "long.jsonl", ["x" * length for length in lengths])
    pieces: list[int] = []
    prepare_jsonl(file, pieces.append)
    assert sum(pieces) == file.stat().st_size
    assert len(pieces) > 10
    assert [len(value) for value in values(open_jsonl(file))] == lengths


def test_editors_of_other_systems(tmp_path: Path) -> None:
    file = tmp_path / "notes.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n{"a": "\xe2\x80\xa8"}\r\n\r\n{"a": 3}')
    source = open_jsonl(file)
    assert values(source) == [{"a": 1}, {"a": "\u2028"}, {"a": 3}]
    assert source.load(0)["json"] == b'{"a": 1}'
    assert source.load(1)["json"] == b'{"a": "\xe2\x80\xa8"}'


# ------------------------------------------------------------------------------- pieces of datasets


@given(st.data())
@settings(max_examples=50)
def test_cuts_are_slices(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        counts = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
        for number, count in enumerate(counts):
            write(Path(folder, f"{number}.jsonl"), [[number, n] for n in range(count)])
        last = len(counts) - 1
        whole = cut = open_jsonl(f"{folder}/{{0..{last}}}.jsonl" if last else f"{folder}/0.jsonl")
        assert whole.runs == tuple(counts)
        wanted = list(range(len(whole)))
        for _ in range(2):
            start = data.draw(st.integers(0, len(wanted)))
            stop = data.draw(st.integers(start, len(wanted)))
            cut, wanted = cut.cut(start, stop), wanted[start:stop]
        assert [cut.load(i) for i in range(len(cut))] == [whole.load(i) for i in wanted]
        assert keys(cut) == [whole.key(i) for i in wanted]
        assert sum(cut.runs) == len(cut) == len(wanted)
        assert all(cut.runs)
        for i in range(len(whole)):
            assert whole.find(whole.key(i)) == i
            assert cut.find(whole.key(i)) == (wanted.index(i) if i in wanted else None)
        assert (cut.identity == whole.identity) is (len(cut) == len(whole))


def test_a_pattern_is_its_files_one_behind_the_other(tmp_path: Path) -> None:
    for name in ("b", "a", "sub/a"):
        write(tmp_path / f"{name}.jsonl", [f"{name} {n}" for n in range(2)])
    braces = open_jsonl(f"{tmp_path}/{{b,a}}.jsonl")
    assert values(braces) == ["b 0", "b 1", "a 0", "a 1"]
    assert keys(braces) == ["b.jsonl/0", "b.jsonl/1", "a.jsonl/0", "a.jsonl/1"]
    assert braces.load(2)["__sources__"] == (
        SourceInfo(f"{tmp_path}/a.jsonl", 0, "a.jsonl", ("0.json",)),
    )
    glob = open_jsonl(tmp_path / "**/*.jsonl")
    assert keys(glob)[::2] == ["a.jsonl/0", "b.jsonl/0", "sub/a.jsonl/0"]
    assert glob.runs == (2, 2, 2)
    assert jsonl_files(tmp_path / "*.jsonl") == [f"{tmp_path}/a.jsonl", f"{tmp_path}/b.jsonl"]
    # One file more must not give the others new keys.
    assert keys(open_jsonl(tmp_path / "b*.jsonl")) == ["b.jsonl/0", "b.jsonl/1"]


def test_subflavors_are_added(seven: Path) -> None:
    source = open_jsonl(seven, subflavors={"a": 1, "b": 1})
    tagged = source.tagged({"b": 2})
    assert tagged.load(0)["__subflavors__"] == {"a": 1, "b": 2}
    tagged.load(0)["__subflavors__"]["a"] = 3
    assert tagged.load(0)["__subflavors__"] == {"a": 1, "b": 2}
    assert source.subflavors == {"a": 1, "b": 1}
    assert tagged.identity == source.identity


def test_the_identity_is_that_of_the_lines(seven: Path, tmp_path: Path) -> None:
    found = {open_jsonl(seven).identity}
    moved = write(tmp_path / "elsewhere" / "seven.jsonl", [{"id": n} for n in range(7)])
    assert {open_jsonl(moved).identity} == found
    for other in (write(seven, list(range(8))), write(tmp_path / "six.jsonl", list(range(7)))):
        found.add(open_jsonl(other).identity)
    assert len(found) == 3
    assert "8 lines of 'train' in 1 runs, " in open_jsonl(seven).identity


# ----------------------------------------------------------------------------- the index, processes


def test_an_index_is_kept_in_the_cache_folder(
    seven: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ENERGON_FN_CACHE", str(tmp_path / "cache"))
    first = open_jsonl(seven)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "seven.jsonl"]
    (kept,) = (tmp_path / "cache").iterdir()
    monkeypatch.setattr(files, "open_stream", None)  # it is not read again
    assert open_jsonl(seven) == first
    monkeypatch.undo()
    monkeypatch.setenv("ENERGON_FN_CACHE", str(tmp_path / "cache"))

    with seven.open("a") as file:
        file.write('\n\n{"id": 7}')
    assert values(open_jsonl(seven)) == [{"id": n} for n in range(8)]
    seven.write_text("1\n" * 40)
    os.utime(seven, ns=(1, 1))
    assert len(open_jsonl(seven)) == 40
    seven.write_text("10\n" + "1\n" * 37 + "100")
    assert seven.stat().st_size == 80  # as before
    assert len(open_jsonl(seven)) == 39
    assert kept.exists()


def test_opening_what_is_prepared_reads_no_lines(tmp_path: Path) -> None:
    """Of a file of 400 million bytes that has none on disk, and an index of a million lines."""
    file, index = tmp_path / "large.jsonl", tmp_path / "large.jsonl.idx"
    with file.open("wb") as out:
        out.truncate(400_000_000)
    with index.open("wb") as out:
        out.truncate(8 * 1_000_000)
        out.seek(0, os.SEEK_END)
        out.write((400_000_000).to_bytes(8, "little"))
    tracemalloc.start()
    source = open_jsonl(file)
    assert tracemalloc.get_traced_memory()[1] < 100_000
    tracemalloc.stop()
    assert len(source) == 1_000_000
    assert source.key(999_999) == "999999"


@pytest.mark.parametrize("change", ["longer", "shorter", "no_index", "cut_index", "first"])
def test_an_index_that_does_not_fit_is_refused(change: str, seven: Path) -> None:
    index = prepare_jsonl(seven)
    text, offsets = seven.read_text(), index.read_bytes()
    if change == "longer":
        seven.write_text(text + '{"id": 7}\n')
    elif change == "shorter":
        seven.write_text(text[:-1])
    elif change == "first":
        index.write_bytes(b"\x01" + offsets[1:])
    else:
        index.write_bytes(b"" if change == "no_index" else offsets[:-1])
    with pytest.raises(DatasetError, match=r"`energon-fn prepare .*seven\.jsonl`") as error:
        open_jsonl(seven)
    assert f"remove {index}" in str(error.value)
    prepare_jsonl(seven)
    assert len(open_jsonl(seven)) == (8 if change == "longer" else 7)


def test_lines_that_moved_are_noticed(seven: Path) -> None:
    prepare_jsonl(seven)
    text = seven.read_text()
    seven.write_text('{"id": 10}\n' + text[10:-2] + "\n")  # not longer
    assert seven.stat().st_size == len(text)
    source = open_jsonl(seven)
    for i in range(7):
        with pytest.raises(
            DatasetError, match=rf"line {i + 1} .* changed|changed .* line {i + 1} "
        ):
            source.load(i)


def test_a_file_cut_short_is_noticed(seven: Path) -> None:
    prepare_jsonl(seven)
    source = open_jsonl(seven)
    source.load(6)
    os.truncate(seven, 30)
    assert source.load(2)["json"] == b'{"id": 2}'
    with pytest.raises(DatasetError, match="cut short or changed"):
        source.load(6)


def test_a_file_that_is_being_written_to(seven: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = files.open_stream

    @contextmanager
    def read_while_another_writes(path: str) -> Iterator[IO[bytes]]:
        with read(path) as file:
            yield file
        with seven.open("a") as more:
            more.write('{"id": 7}\n')

    with monkeypatch.context() as patch:
        patch.setattr(files, "open_stream", read_while_another_writes)
        with pytest.raises(DatasetError, match="nobody writes to it any more"):
            open_jsonl(seven)
    assert len(open_jsonl(seven)) == 8


def test_it_travels_light(seven: Path) -> None:
    source = open_jsonl(seven)
    values(source)
    pickled = pickle.dumps(source)
    assert len(pickled) < 1000
    assert values(pickle.loads(pickled)) == values(source)


def test_threads_and_forks(tmp_path: Path) -> None:
    file = write(tmp_path / "many.jsonl", [{"id": n, "x": "x" * (n % 97)} for n in range(2000)])
    source = open_jsonl(file)
    wanted = values(source)
    with ThreadPoolExecutor(8) as pool:
        assert [json.loads(raw["json"]) for raw in pool.map(source.load, range(2000))] == wanted
        with multiprocessing.get_context("fork").Pool(2) as processes:
            raws = processes.map(source.load, range(2000))
    assert [json.loads(raw["json"]) for raw in raws] == wanted


# ---------------------------------------------------------------------------------- what goes wrong


def test_a_bad_line_is_named(tmp_path: Path) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_bytes(b'{"a": 1}\n\n{"a": }\n{"a": "\xff"}\n' + b"[" * 100_000 + b'\n{"a": 5}\n')
    source = open_jsonl(file)
    assert source.make(source.load(4), decoder())["json"] == {"a": 5}
    for i, what in ((1, "Expecting value at column 7"), (2, "utf-8"), (3, "recursion")):
        with pytest.raises(SampleError, match=rf"bad\.jsonl, line {i + 1} .*: .*{what}"):
            source.make(source.load(i), decoder())


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "has no lines"),
        (b" \r\n\n", "has no lines"),
        (b'[\n{"a": 1}\n]\n', "the first line .* is not JSON: Expecting value at column"),
        ('{"a": 1}\n'.encode("utf-16"), "the first line .* is not JSON"),
        (gzip.compress(b'{"a": 1}\n'), "the first line .* not compressed"),
    ],
)
def test_what_is_no_file_of_lines_is_refused(content: bytes, what: str, tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_bytes(content)
    for make in (open_jsonl, prepare_jsonl):
        with pytest.raises(DatasetError, match=what) as error:
            make(file)
        assert str(file) in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["x.jsonl"]


def test_compressed_and_missing_files(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(b"1\n"))
    assert is_jsonl(tmp_path / "x.jsonl.gz")
    with pytest.raises(DatasetError, match="gunzip"):
        open_jsonl(tmp_path / "x.jsonl.gz")
    with pytest.raises(DatasetError, match=r"no shard matches .*1\.jsonl.*\(from "):
        open_jsonl(tmp_path / "{1,2}.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    assert not is_jsonl(tmp_path / "folder.jsonl")
    assert not is_jsonl("a.jsonl/0.tar")
    assert not is_jsonl(["a.jsonl"])


class Numbers(DefaultTaskEncoder[Any, Any, Any, Any]):
    cookers = (Cooker(lambda raw: {**basic_sample_keys(raw), "id": raw["json"]["id"]}),)


@pytest.mark.parametrize("workers", [0, 2])
def test_training_and_validation(
    workers: int, seven: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options: Any = {
        "batch_size": None,
        "task_encoder": Numbers(),
        "worker_config": WorkerConfig(rank=0, world_size=1, num_workers=workers),
    }
    val = get_loader(get_val_dataset(seven, **options))
    assert [(sample["__key__"], sample["id"]) for sample in val] == [(str(n), n) for n in range(7)]
    assert caplog.text == ""

    seven.write_text(seven.read_text().replace('"id": 4', '"id" 4'))
    train = get_train_dataset(seven, shuffle_buffer_size=4, repeat=False, **options)
    assert sorted(sample["id"] for sample in get_loader(train)) == [0, 1, 2, 3, 5, 6]
    if workers == 0:  # others log in their own processes
        assert "seven.jsonl, line 5 (blank ones not counted) is not JSON" in caplog.text


# ------------------------------------------------------------------------------------- the commands


def test_the_commands(seven: Path) -> None:
    described = run("info", seven)
    assert (described.status, described.err) == (0, "")
    assert described.out.startswith(f"{seven}: 7 samples in 1 file, 70 bytes, not prepared\n")

    prepared = run("prepare", seven, "--split-ratio", "8,1,1")
    assert prepared.status == 0
    assert "ignored: --split-ratio" in prepared.err
    assert prepared.out.startswith(f"{seven}: 7 samples in 1 file, 70 bytes\n")
    assert f'"{seven}"' in prepared.out
    assert Path(f"{seven}.idx").stat().st_size == 64

    fine = run("lint", seven, "--num-workers", "0")
    assert (fine.status, fine.out) == (0, "7 samples in 1 shard: all can be read and decoded\n")
    shown = run("preview", seven, "-n", "1")
    assert shown.out == 'train 0: 0 in seven.jsonl\n  json  {"id": 0}\n\n'


def test_the_commands_find_bad_lines(seven: Path, tmp_path: Path) -> None:
    seven.write_text(seven.read_text().replace('"id": 4', '"id" 4'))
    write(tmp_path / "more.jsonl", ["a"])
    result = run("lint", tmp_path / "*.jsonl", "--num-workers", "0")
    assert result.status == 1
    assert result.out == (
        f"seven.jsonl seven.jsonl/4: {seven}, line 5 (blank ones not counted) is not JSON: "
        "Expecting ':' delimiter at column 7\n8 samples in 2 shards: 1 bad sample\n"
    )
    shown = run("preview", seven, "-n", "7")
    assert shown.status == 1
    assert "error: " in shown.out

    prepare_jsonl(seven)
    seven.write_text("1\n")
    for command in ("info", "lint", "preview"):
        refused = run(command, seven)
        assert refused.status == 2
        assert "`energon-fn prepare" in refused.err
    assert run("prepare", seven).status == 0
    assert run("prepare", tmp_path / "x.jsonl.gz").status == 2


# ------------------------------------------------------------------------- the published package

# Prepares some of the files, loads all, and prints what it saw.
THEIR_SCRIPT = """
import io, json, sys
from contextlib import redirect_stdout
from importlib.metadata import entry_points
from megatron.energon import (Cooker, CrudeSample, DefaultTaskEncoder, WorkerConfig, get_loader,
                              get_val_dataset, reraise_exception, stateless)

@stateless
def cook(raw):
    return CrudeSample(raw)

class Encoder(DefaultTaskEncoder):
    cookers = [Cooker(cook)]

prepare, load = json.load(sys.stdin)
seen = []
with redirect_stdout(io.StringIO()):
    energon, = entry_points(group="console_scripts", name="energon")
    for file in prepare:
        sys.argv = ["energon", "prepare", file]
        try:
            energon.load()()
        except SystemExit as end:
            assert not end.code, (file, end.code)
    workers = WorkerConfig(
        rank=0, world_size=1, num_workers=0, global_error_handler=reraise_exception)
    for file in load:
        dataset = get_val_dataset(
            file, split_part="test", batch_size=None, worker_config=workers, task_encoder=Encoder())
        seen.append([[sample["__key__"], json.dumps(sample["json"]), at.dataset_path, at.index,
                      at.shard_name, list(at.file_names)]
                     for sample in get_loader(dataset) for at in sample["__sources__"]])
print(json.dumps(seen))
"""

FILES = {
    "plain": b'{"a": 1}\n{"a": [2, "\xc3\xa4"]}\n{}\n',
    "no end of line": b'{"a": 1}\n{"a": 2}',
    "blanks": b'\n \n{"a": 1}\n\n\t{"a": 2}  \n  \n\n',
    "crlf": b'{"a": 1}\r\n\r\n{"a": 2}\r\n',
    "one": b'{"a": NaN}',
}


def test_the_published_package_reads_and_writes_the_same(
    published_python: str, tmp_path: Path
) -> None:
    ours, theirs = (
        [tmp_path / side / f"{name}.jsonl" for name in FILES] for side in ("ours", "theirs")
    )
    for file, content in zip([*ours, *theirs], [*FILES.values()] * 2, strict=True):
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(content)
    for file in ours:
        prepare_jsonl(file)
    job = json.dumps([list(map(str, theirs)), list(map(str, [*ours, *theirs]))])
    command = [published_python, "-W", "ignore", "-c", THEIR_SCRIPT]
    ran = subprocess.run(command, input=job, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    seen = json.loads(ran.stdout.splitlines()[-1])
    for file, published, found in zip([*ours, *theirs], [*theirs, *ours], seen, strict=True):
        index, other = Path(f"{file}.idx"), Path(f"{published}.idx")
        assert index.read_bytes() == other.read_bytes()
        source: Jsonl = open_jsonl(file, "test")
        assert len(source) == len(found) > 0
        for raw, facts in zip(source, found, strict=True):
            sample = source.make(raw, decoder())
            (at,) = sample["__sources__"]
            assert facts == [
                sample["__key__"],
                json.dumps(sample["json"]),
                at.dataset_path,
                at.index,
                at.shard_name,
                list(at.file_names),
            ]
