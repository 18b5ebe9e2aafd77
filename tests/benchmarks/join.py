"""How long it takes to find which samples of two datasets have the same key.

Two prepared datasets of the same keys, the second one's in another order. Only their metadata are
written, as nothing else is read for it. With --peer-python the published megatron-energon prepares
a metadataset that joins the same two, in the same rounds, in turn with this package. Each round is
a new process, and what is printed are medians over the rounds:

* seconds to join, without those for imports;
* seconds to open the join again, once the matches are known (this package only);
* the process's largest memory in MB, and what of it there was before.
"""

from __future__ import annotations

import argparse
import importlib
import json
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rounds import add_peer_and_json, header, in_turn, measured, parser_of, side_by_side, write_json

NAMES = ("first", "second")
METADATASET = """
__module__: megatron.energon
__class__: MetadatasetV2
splits:
  train:
    join:
      - path: first
      - path: second
    joiner: {__module__: megatron.energon, __class__: TextSample}
"""


def main(arguments: list[str] | None = None) -> None:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("--samples", type=int, default=1_000_000, help="in each dataset (default: %(default)s)")
    add("--shards", type=int, default=100, help="of each dataset (default: %(default)s)")
    add("--rounds", type=int, default=3, help="processes of each package (default: %(default)s)")
    add_peer_and_json(parser)
    add("--measure", nargs=2, metavar=("PACKAGE", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.measure:
        package, folder = options.measure
        print(json.dumps(MEASURES[package](Path(folder))))
        return
    with tempfile.TemporaryDirectory() as folder:
        make_datasets(Path(folder), options.samples, options.shards)
        rounds = in_turn(options, lambda *which: measured(*which, __file__, folder))
    write_json(options, rounds)
    print(table(rounds))


def make_datasets(folder: Path, samples: int, shards: int) -> None:
    """Two datasets that both packages can join, and a metadataset that does."""
    from energon_fn.disk.index import write_index
    from energon_fn.disk.metadata import SplitConfig, info_text, split_text
    from energon_fn.disk.prepare import write_dataset_yaml
    from energon_fn.disk.tars import ShardIndex

    size = -(-samples // shards)
    for name in NAMES:
        keys = [f"folder/{key:09}" for key in range(samples)]
        if name != NAMES[0]:
            random.Random(0).shuffle(keys)
        meta = folder / name / ".nv-meta"
        meta.mkdir(parents=True)
        indexed = [
            ShardIndex(
                f"shard_{start // size:06}.tar",
                keys[start : start + size],
                list(range(0, 1024 * len(keys[start : start + size]) + 1, 1024)),
                [(("txt", 1024 * n + 512, 3),) for n in range(len(keys[start : start + size]))],
            )
            for start in range(0, samples, size)
        ]
        counts = write_index(meta / "index.sqlite", indexed).counts
        (meta / "index.uuid").write_text(name)
        (meta / ".info.json").write_text(info_text(counts))
        (meta / "split.yaml").write_text(split_text(SplitConfig({"train": tuple(counts)})))
        write_dataset_yaml(folder / name, "TextSample", {"text": "txt"})
    (folder / "join.yaml").write_text(METADATASET)


# --- in a new process -----------------------------------------------------------------------------


def measure_ours(folder: Path) -> dict[str, float]:
    from energon_fn import TextSample, open_source
    from energon_fn.disk.joined import open_joined

    before = megabytes()
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        parts = [open_source(folder / name) for name in NAMES]
        joined = open_joined(parts, ["error", "error"], TextSample, index=str(folder / "ours/join"))
        seconds.append(time.perf_counter() - start)
    shutil.rmtree(folder / "ours")
    return {
        "samples": len(joined),
        "join_s": seconds[0],
        "open_again_s": seconds[1],
        "peak_mb": megabytes(),
        "before_mb": before,
    }


def measure_theirs(folder: Path) -> dict[str, float]:
    from importlib.metadata import entry_points

    importlib.import_module("megatron.energon")
    before = megabytes()
    (energon,) = entry_points(group="console_scripts", name="energon")
    command = energon.load()
    sys.argv = ["energon", "prepare", "--non-interactive", str(folder / "join.yaml")]
    start = time.perf_counter()
    try:
        command()
    except SystemExit as end:
        if end.code:
            raise
    seconds = time.perf_counter() - start
    shutil.rmtree(folder / "join.yaml.cache")  # where its matches are; fails if there are none
    return {"join_s": seconds, "peak_mb": megabytes(), "before_mb": before}


MEASURES = {"energon_fn": measure_ours, "megatron.energon": measure_theirs}


def megabytes() -> float:
    """The most memory that this process has had. (That of getrusage is its parent's, too.)"""
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x[:5] == "VmHWM")
    return int(line.split()[1]) / 1024


# --- what is printed ------------------------------------------------------------------------------


def table(rounds: dict[str, list[Any]]) -> str:
    """Medians over the rounds, the packages side by side."""
    return "\n".join([header(rounds, 20), *side_by_side(rounds, 20)])


if __name__ == "__main__":
    main()
