"""The published megatron-energon and we read each other's datasets: same order, pixels, texts.

Runs where ``ENERGON_PYTHON`` names a Python that has megatron-energon, or this one has it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from energon_fn.decoding import decoder
from energon_fn.disk.metadata import read_info
from energon_fn.disk.prepare import prepare_dataset, write_dataset_yaml
from energon_fn.disk.source import open_source


def energon_python() -> str | None:
    """A Python that can import megatron.energon."""
    named = os.environ.get("ENERGON_PYTHON")
    if named:
        return named  # if it cannot, the tests fail: that is what was asked for
    try:
        found = importlib.util.find_spec("megatron.energon")
    except ImportError:
        found = None
    return sys.executable if found else None


PYTHON = energon_python()
pytestmark = pytest.mark.skipif(PYTHON is None, reason="megatron-energon is not installed")

# Runs in the other Python: prepares, then loads, and prints what it saw as json.
THEIR_SCRIPT = """
import hashlib, io, json, sys
from contextlib import redirect_stdout
from importlib.metadata import entry_points
from pathlib import Path
from megatron.energon import (Cooker, DefaultTaskEncoder, Sample, WorkerConfig, basic_sample_keys,
                              edataclass, get_loader, get_val_dataset, reraise_exception, stateless)

@edataclass
class Cooked(Sample):
    image: object
    caption: str

@stateless
def cook(raw):
    return Cooked(**basic_sample_keys(raw), image=raw["jpg"], caption=raw["txt"])

class Encoder(DefaultTaskEncoder):
    cookers = [Cooker(cook)]

def facts(sample):
    image = sample.image.contiguous().numpy()
    text = sample.caption if hasattr(sample, "caption") else [sample.context, sample.text]
    return [sample.__key__, sample.__sources__[0].shard_name, list(image.shape), str(image.dtype),
            hashlib.sha256(image.tobytes()).hexdigest(), text, sample.__subflavors__]

commands, edits, loads = json.load(sys.stdin)
seen = []
with redirect_stdout(io.StringIO()):
    energon, = entry_points(group="console_scripts", name="energon")
    for command in commands:
        sys.argv = ["energon", "prepare", "--non-interactive", "--no-progress", *command]
        try:
            energon.load()()
        except SystemExit as end:
            assert not end.code, (command, end.code)
    for file, old, new in edits:
        text = Path(file).read_text()
        assert old in text
        Path(file).write_text(text.replace(old, new))
    workers = WorkerConfig(
        rank=0, world_size=1, num_workers=0, global_error_handler=reraise_exception)
    for folder, part in loads:
        dataset = get_val_dataset(folder, split_part=part, batch_size=None, worker_config=workers,
                                  task_encoder=Encoder())
        seen.append([facts(sample) for sample in get_loader(dataset)])
print(json.dumps(seen))
"""


def picture(number: int, kind: str) -> bytes:
    values = np.random.default_rng(number).integers(0, 256, (6 + number % 3, 9, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(values).resize((16, 12 + number % 5)).save(file, kind)
    return file.getvalue()


def write_shards(root: Path, names: list[str]) -> None:
    """Four samples in each shard; picture and text as different parts, keys in folders."""
    number = 0
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(root / name, "w") as tar:
            for _ in range(4):
                kind = "png" if number % 3 == 1 else "jpg"
                detail = {"a": [0, {"b": f"caption ä {number}"}], "n": number}
                parts = {
                    kind: picture(number, {"jpg": "JPEG"}.get(kind, kind)),
                    "txt": f"text {number}".encode(),
                    "detail.json": json.dumps(detail).encode(),
                }
                if kind == "png":
                    parts["jpg" if name.startswith("c") else "webp"] = picture(number, "JPEG")
                for part, data in parts.items():
                    info = tarfile.TarInfo(f"folder.{number % 2}/{number:04d}.{part}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
                number += 1


CAPTIONS = {"image": "jpg,png", "caption": "detail.json[a][1][b]"}
OCR = {"image": "jpg,png", "context": "txt", "text": "detail.json[a][1][b]"}
# Shares that are exact in floats: the published loses the last shard of 3, 2, 1.
RATIO = [("train", 2), ("val", 1), ("test", 1)]
SUBFOLDERS = [f"parts/{n // 2}/s_{n:02d}.tar" for n in range(6)]

# name: (shards, sample type, field map, options of prepare)
SETS: dict[str, tuple[list[str], str, dict[str, str] | None, dict[str, Any]]] = {
    "captions": (SUBFOLDERS, "CaptioningSample", CAPTIONS, {"split_parts_ratio": RATIO}),
    "shuffled": (
        SUBFOLDERS, "CaptioningSample", CAPTIONS, {"split_parts_ratio": RATIO, "shuffle_seed": 42},
    ),
    "excluded": (SUBFOLDERS, "CaptioningSample", CAPTIONS, {"split_parts_ratio": RATIO}),
    "crude": (
        ["c1.tar", "c2.tar"], "CrudeWebdataset", None,
        {"split_parts_patterns": [("train", "c1"), ("val", "c{2..3}.tar")]},
    ),
    "ocr": (["a.tar"], "VQAOCRSample", OCR, {"split_parts_ratio": [("train", 1), ("val", 0)]}),
}  # fmt: skip

EXCLUDED = ["parts/0/s_00.tar", "parts/0/s_01.tar/folder.1/0005", "parts/1/s_02.tar/folder.0/0008"]


def our_facts(folder: Path, part: str) -> list[list[Any]]:
    source = open_source(folder, part)
    decode = decoder("torchrgb")
    seen = []
    for i in range(len(source)):
        sample = source.to_sample(decode(source.load(i)))
        if isinstance(sample, dict):
            image, text = sample["jpg"], sample["txt"]
            sources, subflavors = sample["__sources__"], sample["__subflavors__"]
            key = sample["__key__"]
        else:
            text = sample.caption if hasattr(sample, "caption") else [sample.context, sample.text]
            image, key = sample.image, sample.__key__
            sources, subflavors = sample.__sources__, sample.__subflavors__
        array = image.contiguous().numpy()
        digest = hashlib.sha256(array.tobytes()).hexdigest()
        seen.append([key, sources[0].shard_name, list(array.shape), str(array.dtype), digest, text,
                     subflavors])  # fmt: skip
    return seen


PARTS = [f"{name}/{part}" for name in ("captions", "shuffled", "excluded")
         for part in ("train", "val", "test")] + ["crude/train", "crude/val"]  # fmt: skip


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder of all datasets, and what megatron-energon saw in each: ours/NAME/PART, ..."""
    root = tmp_path_factory.mktemp("datasets")
    commands: list[list[str]] = []
    for name, (shards, sample_type, field_map, options) in SETS.items():
        ours = root / "ours" / name
        write_shards(ours, shards)
        if sample_type != "VQAOCRSample":  # their assistant does not offer it
            shutil.copytree(ours, root / "theirs" / name)
            commands.append([str(root / "theirs" / name), *their_options(name)])
        prepare_dataset(ours, shards, workers=2, **({"shuffle_seed": None} | options))
        write_dataset_yaml(ours, sample_type, field_map)

    edits = []
    for side in ("ours", "theirs"):
        meta = root / side / "excluded" / ".nv-meta"
        edits += [
            (str(meta / "split.yaml"), "exclude: []", f"exclude: {json.dumps(EXCLUDED)}"),
            (str(meta / "dataset.yaml"), "field_map:",
             "subflavors:\n  language: {code: de}\nfield_map:"),
        ]  # fmt: skip
    loads = [f"ours/{part}" for part in [*PARTS, "ocr/train"]] + [f"theirs/{p}" for p in PARTS]
    job = [commands, edits, [(str(root / p.rpartition("/")[0]), p.rpartition("/")[2])
                             for p in loads]]  # fmt: skip
    assert PYTHON is not None
    ran = subprocess.run([PYTHON, "-W", "ignore", "-c", THEIR_SCRIPT], input=json.dumps(job),
                         capture_output=True, text=True, check=False)  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-3000:]
    return root, dict(zip(loads, json.loads(ran.stdout.splitlines()[-1]), strict=True))


def their_options(name: str) -> list[str]:
    """The command line of `energon prepare` that stands for the options in SETS."""
    _, sample_type, field_map, options = SETS[name]
    command = ["--num-workers", "2", "--sample-type", sample_type]
    if field_map:
        command += ["--field-map", json.dumps(field_map)]
    if "split_parts_ratio" in options:
        shares = [str(share) for _, share in options["split_parts_ratio"]]
        command += ["--split-ratio", ",".join(shares)]
    for part, pattern in options.get("split_parts_patterns", ()):
        command += ["--split-parts", f"{part}:{pattern}"]
    if options.get("shuffle_seed"):
        command.append("--shuffle-tars")
    return command


@pytest.mark.parametrize("part", [*PARTS, "ocr/train"])
def test_they_load_what_we_prepare(theirs: tuple[Path, dict[str, Any]], part: str) -> None:
    root, seen = theirs
    name, _, split_part = part.partition("/")
    assert seen[f"ours/{part}"] == our_facts(root / "ours" / name, split_part)


@pytest.mark.parametrize("part", PARTS)
def test_we_load_what_they_prepare(theirs: tuple[Path, dict[str, Any]], part: str) -> None:
    root, seen = theirs
    name, _, split_part = part.partition("/")
    assert seen[f"theirs/{part}"] == our_facts(root / "theirs" / name, split_part)


@pytest.mark.parametrize("part", PARTS)
def test_both_preparations_are_the_same_dataset(
    theirs: tuple[Path, dict[str, Any]], part: str
) -> None:
    _, seen = theirs
    assert seen[f"theirs/{part}"] == seen[f"ours/{part}"]
    assert seen[f"ours/{part}"]


def test_the_comparison_sees_what_it_should(theirs: tuple[Path, dict[str, Any]]) -> None:
    """Not two empty lists: keys, texts and excluded samples are the ones written."""
    _, seen = theirs
    whole = seen["theirs/captions/train"]
    assert [(row[0], row[5]) for row in whole[:2]] == [
        ("folder.0/0000", "caption ä 0"), ("folder.1/0001", "caption ä 1"),
    ]  # fmt: skip
    kept = [row for row in whole if row[1] != EXCLUDED[0]]
    kept = [row for row in kept if f"{row[1]}/{row[0]}" not in EXCLUDED]
    assert len(whole) == 12
    assert len(kept) == 6
    assert [row[:6] for row in seen["theirs/excluded/train"]] == [row[:6] for row in kept]
    assert seen["theirs/excluded/train"][0][6] == {"language": {"code": "de"}}
    assert seen["theirs/shuffled/train"] != whole
    assert len({row[4] for row in whole}) == 12


@pytest.mark.parametrize("name", ["captions", "shuffled", "crude"])
def test_the_files_are_the_same(theirs: tuple[Path, dict[str, Any]], name: str) -> None:
    root, _ = theirs
    ours, published = root / "ours" / name, root / "theirs" / name

    def files(folder: Path) -> set[str]:
        return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}

    assert files(ours) == files(published)
    for file in files(ours):
        if file.endswith((".yaml", ".idx")):
            assert (ours / file).read_bytes() == (published / file).read_bytes(), file
    assert list(read_info(ours).items()) == list(read_info(published).items())

    def database(folder: Path) -> list[Any]:
        connection = sqlite3.connect(folder / ".nv-meta" / "index.sqlite")
        tables = ["samples", "sample_parts"]
        found = [sorted(connection.execute(f"SELECT * FROM {table}")) for table in tables]
        columns = [connection.execute(f"PRAGMA table_info({table})").fetchall() for table in tables]
        indices = connection.execute("SELECT name FROM sqlite_master WHERE type = 'index'")
        found += [columns, sorted(indices)]
        connection.close()
        return found

    assert database(ours) == database(published)
