"""What it costs to open a large dataset, and to prepare one.

* opening a prepared dataset for training, of tars and of JSON lines: milliseconds, and by how much
  the process's memory grows;
* preparing tars: samples and gigabytes in a second; JSON lines likewise.

The tars that are opened are not there: only their index and the other files in .nv-meta are made,
of the size asked for, as opening reads nothing else. Those that are prepared, and the lines, are
real; they were just written, so that no disk is measured.

With --peer-python the published megatron-energon does the same with them in the same rounds, in
turn with this package. Each round is a new process, and what is printed are medians over the
rounds.
"""

from __future__ import annotations

import argparse
import importlib
import io
import json
import os
import shutil
import sqlite3
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rounds import add_peer_and_json, header, in_turn, measured, parser_of, side_by_side, write_json


def main(arguments: list[str] | None = None) -> None:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("--shards", type=int, default=10_000, help="of the dataset opened (default: %(default)s)")
    add("--samples", type=int, default=10_000_000, help="of it (default: %(default)s)")
    add("--prepared-shards", type=int, default=16, help="tars prepared (default: %(default)s)")
    add("--prepared-samples", type=int, default=32_000, help="in them (default: %(default)s)")
    add("--bytes", type=int, default=20_000, help="of one of those (default: %(default)s)")
    add("--lines", type=int, default=1_000_000, help="prepared and opened (default: %(default)s)")
    add("--workers", type=int, default=os.cpu_count(), help="tars indexed at a time (%(default)s)")
    add("--rounds", type=int, default=3, help="processes of each package (default: %(default)s)")
    add_peer_and_json(parser)
    add("--measure", nargs=3, metavar=("PACKAGE", "WHAT", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.measure:
        package, what, path = options.measure
        energon = importlib.import_module(package)
        if what == "preparing":
            found = measure_preparing(energon, Path(path), options.workers)
        else:
            found = measure_opening(energon, Path(path))
        print(json.dumps(found))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_opened(folder / "small", 1, 1)
        make_opened(folder / "large", options.shards, options.samples)
        make_tars(folder / "tars", options.prepared_shards, options.prepared_samples, options.bytes)
        make_lines(folder / "lines.jsonl", options.lines)

        def measure(python: str, package: str) -> dict[str, float]:
            found = {}
            for what in ("preparing", "opening"):
                workers = f"--workers={options.workers}"
                found |= measured(python, package, __file__, what, folder, workers)
            return found

        rounds = in_turn(options, measure)
    write_json(options, rounds)
    print(table(rounds))


def make_opened(folder: Path, shards: int, samples: int) -> None:
    """What preparing leaves of so many shards, without the shards."""
    from energon_fn.disk import metadata
    from energon_fn.disk.index import write_index
    from energon_fn.disk.tars import ShardIndex

    def indexed() -> Iterator[ShardIndex]:
        for number in range(shards):
            first, last = (samples * end // shards for end in (number, number + 1))
            blocks = range(0, 1024 * (last - first), 1024)  # a header and a text
            yield ShardIndex(
                f"shard_{number:06}.tar",
                [f"{key:09}" for key in range(first, last)],
                [*blocks, 1024 * (last - first)],
                [(("txt", header + 512, 512),) for header in blocks],
            )

    meta = folder / metadata.META_FOLDER
    meta.mkdir(parents=True)
    counts = write_index(meta / "index.sqlite", indexed()).counts
    (meta / "index.uuid").write_text("00000000-0000-4000-8000-000000000000")
    (meta / metadata.INFO_JSON).write_text(metadata.info_text(counts))
    split = metadata.SplitConfig({"train": tuple(counts)})
    (meta / metadata.SPLIT_YAML).write_text(metadata.split_text(split))
    metadata.write_dataset_config(folder, "TextSample", {"text": "txt"})


def make_tars(folder: Path, shards: int, samples: int, size: int) -> None:
    folder.mkdir()
    picture = os.urandom(size)
    for number in range(shards):
        with tarfile.open(folder / f"shard_{number:06}.tar", "w") as tar:
            for key in range(samples * number // shards, samples * (number + 1) // shards):
                for part, data in (("jpg", picture), ("txt", b"number %d" % key)):
                    member = tarfile.TarInfo(f"{key:09}.{part}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))


def make_lines(file: Path, lines: int) -> None:
    with file.open("w") as out:
        for number in range(lines):
            out.write(json.dumps({"id": number, "question": f"What is {number} + 1?"}) + "\n")


# --- in a new process: the same for both packages -------------------------------------------------


def measure_preparing(energon: Any, folder: Path, workers: int) -> dict[str, float]:
    tars, lines = folder / "tars", folder / "lines.jsonl"
    shutil.rmtree(tars / ".nv-meta", ignore_errors=True)
    for index in folder.rglob("*.idx"):
        index.unlink()
    names = sorted(path.name for path in tars.iterdir())
    start = time.perf_counter()
    energon.BaseWebdatasetFactory.prepare_dataset(
        tars, names, split_parts_ratio=[("train", 1)], workers=workers
    )
    seconds = time.perf_counter() - start
    with sqlite3.connect(tars / ".nv-meta" / "index.sqlite") as db:
        ((samples,),) = db.execute("SELECT COUNT(*) FROM samples")
    found = {
        "prepared_samples_per_s": samples / seconds,
        "prepared_gb_per_s": sum((tars / name).stat().st_size for name in names) / seconds / 1e9,
    }
    start = time.perf_counter()
    prepare_lines(energon, lines)
    seconds = time.perf_counter() - start
    count = Path(f"{lines}.idx").stat().st_size // 8 - 1
    found["prepared_lines_per_s"] = count / seconds
    found["prepared_lines_gb_per_s"] = lines.stat().st_size / seconds / 1e9
    return found


def prepare_lines(energon: Any, file: Path) -> None:
    if energon.__name__ == "energon_fn":
        from energon_fn.disk.jsonl import prepare_jsonl

        prepare_jsonl(file)
    else:
        energon.CrudeJsonlDatasetFactory.prepare_dataset(file)


def measure_opening(energon: Any, folder: Path) -> dict[str, float]:
    found = {}
    kept = [opened(energon, folder / "small")]  # so that all is imported
    for name, path in (("tars", folder / "large"), ("lines", folder / "lines.jsonl")):
        before = resident_memory()
        start = time.perf_counter()
        kept.append(opened(energon, path))
        found[f"open_{name}_ms"] = 1e3 * (time.perf_counter() - start)
        found[f"open_{name}_mb"] = (resident_memory() - before) / 1e6
    return found


def opened(energon: Any, path: Path) -> Any:
    """A loader that is ready to be iterated."""

    class Encoder(energon.DefaultTaskEncoder):  # type: ignore[misc]
        cookers = (energon.Cooker(as_it_is),)

    dataset = energon.get_train_dataset(
        str(path),
        batch_size=8,
        shuffle_buffer_size=100,
        max_samples_per_sequence=100,
        worker_config=energon.WorkerConfig(rank=0, world_size=1, num_workers=2),
        task_encoder=Encoder(),
    )
    return energon.get_savable_loader(dataset)


def as_it_is(sample: Any) -> Any:
    return sample


def resident_memory() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


# --- what is printed ------------------------------------------------------------------------------


def table(rounds: dict[str, list[dict[str, float]]]) -> str:
    """Medians over the rounds, the packages side by side."""
    lines = side_by_side(rounds, 26, form=lambda n: f"{n:,.{0 if n > 99 else 3}f}")
    return "\n".join([header(rounds, 26), *lines])


if __name__ == "__main__":
    main()
