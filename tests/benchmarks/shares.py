"""Do the shares of a loader's report agree with an outside profiler, and what does the report cost?

    python tests/benchmarks/shares.py              # needs: pip install py-spy
    python tests/benchmarks/shares.py --seconds 20

Two kinds of work, small pictures and short texts, run in a process that py-spy samples 500 times a
second. Its samples are given to stages by the functions on the stack; shares of both are printed
side by side. With ``--child`` it is the process that is sampled.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from energon_fn import (
    DefaultTaskEncoder,
    WorkerConfig,
    get_loader,
    get_train_dataset,
    open_source,
    stateless,
)
from energon_fn.look.report import OWN, Report

MARKS = {
    ("raw_sample", "pipeline.py"): "load",
    ("make", "source.py"): "decode",
    ("encode_sample", "shares.py"): "encode_sample",
    ("reseed", "seeds.py"): "encode_sample",  # no other stage is seeded
    ("batch", "shares.py"): "batch",
}
"""Functions on the stack, and the stages they are of."""
SAMPLES = 2000


class Pictures(DefaultTaskEncoder[Any, Any, Any, Any]):
    @stateless
    def encode_sample(self, sample: Any) -> Any:
        return torch.nn.functional.interpolate(sample["jpg"][None], (96, 96))[0]

    @stateless
    def batch(self, samples: list[Any]) -> Any:
        return torch.stack(samples)


class Texts(DefaultTaskEncoder[Any, Any, Any, Any]):
    def encode_sample(self, sample: Any) -> Any:
        return torch.tensor([len(word) for word in sample["json"]["text"].split()][:40])

    @stateless
    def batch(self, samples: list[Any]) -> Any:
        return torch.stack(samples)


WORKS = {"pictures": (Pictures, 32), "texts": (Texts, 64)}


def write(work: str, folder: Path) -> None:
    """A shard of samples for that work."""
    import webdataset

    chance = np.random.default_rng(0)
    with webdataset.TarWriter(str(folder / "0.tar")) as tar:
        for n in range(SAMPLES):
            noise = chance.integers(0, 255, (12, 12, 3), dtype=np.uint8)
            picture = Image.fromarray(noise).resize((160, 160))
            sample = {"jpg": picture} if work == "pictures" else {"json": {"text": "a rose " * 40}}
            tar.write({"__key__": f"{n:05d}", **sample})


def loader_of(work: str, folder: str) -> Any:
    encoder, size = WORKS[work]
    dataset = get_train_dataset(
        open_source(folder),
        batch_size=size,
        shuffle_buffer_size=100,
        task_encoder=encoder(),
        worker_config=WorkerConfig(rank=0, world_size=1, num_workers=0),
    )
    return get_loader(dataset)


def child(work: str, folder: str, seconds: float) -> None:
    loader, end = loader_of(work, folder), time.monotonic() + seconds
    for _ in loader:
        if time.monotonic() > end:
            break
    print(json.dumps(loader.report()))


def sampled(raw: str) -> dict[str, float]:
    """Shares by stage of py-spy's stacks, of those in which batches are made."""
    counts: Counter[str] = Counter()
    for line in raw.splitlines():
        stack, _, number = line.rpartition(" ")
        frames = [
            (name.rpartition(".")[2], Path(place.rpartition(":")[0]).name)
            for name, _, place in (frame.partition(" (") for frame in stack.split(";"))
        ]
        if ("deliveries", "turns.py") in frames:
            counts[next((MARKS[frame] for frame in frames if frame in MARKS), OWN)] += int(number)
    return {stage: count / counts.total() for stage, count in counts.items()}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=10, help="of each work (10)")
    parser.add_argument("--child", nargs=2, metavar=("WORK", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.child:
        return child(*args.child, args.seconds)
    spy = shutil.which("py-spy", path=sysconfig.get_path("scripts")) or shutil.which("py-spy")
    if spy is None:
        parser.error("py-spy is not there: pip install py-spy")
    for work in WORKS:
        with tempfile.TemporaryDirectory() as folder:
            write(work, Path(folder))
            stacks = Path(folder, "stacks")
            mine = [__file__, "--seconds", str(args.seconds), "--child", work, folder]
            spying = ["record", "--rate", "500", "--idle", "--format", "raw", "--output", stacks]
            done = subprocess.run(
                [spy, *spying, "--", sys.executable, *mine],
                capture_output=True,
                text=True,
                check=True,
            )
            line = next(line for line in done.stdout.splitlines() if line.startswith("{"))
            report = Report(json.loads(line))
            theirs = sampled(stacks.read_text())
            print(f"{work:<16} {'report':>8} {'py-spy':>8} {'points apart':>13}")
            for stage in report.stages:
                ours, spied = report[f"{stage}/share"], theirs.get(stage, 0.0)
                apart = 100 * abs(ours - spied)
                print(f"{stage:<16} {ours:>8.1%} {spied:>8.1%} {apart:>13.1f}")
            print()


if __name__ == "__main__":
    main()
