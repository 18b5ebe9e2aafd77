"""CPU time for a sample, samples a second, time to the first batch, and memory: side by side.

Contenders: `floor`, a bare loop (known offsets, read, decode, transform, collate; as workers, as
many such loops, whose batches stay where they are); torch's `DataLoader` over a map-style dataset
of known offsets; `webdataset` in a `DataLoader`; `megatron.energon`, if a Python that has it is
given; and `energon_fn`, with states kept as always. All have the same functions of the user, the
same data, and orders that are equally random: from shuffle buffers of 1000 (texts and pictures), 10
(photos, of which one framework keeps as many in memory), or none (packs). Work:

* text: 300 bytes of JSON to tokens, batches of 64;
* jpeg: captioned pictures of about 390 x 390, a random crop of each to 224, batches of 32; the
  same crops come back after a resume with energon_fn, and with `megatron.energon seeded`;
* pack: the texts, packed to 4096 tokens from a buffer of 1000;
* photo: 12-megapixel JPEGs, to 224; `energon_fn min_size` decodes them at a reduced scale;
* start: seconds from the start of a process to the end of its import, and to the first batch of
  `text` from 2 workers; also with the state of 1000 batches before, and with that of a packing
  buffer of 1000 JPEGs; and the size of these states, pickled;
* memory: MB of a worker (its share of all that is in use, and what only it uses) after 20,000
  texts, by how much the share grows over 200,000 more, and that of all processes with a consumer
  that takes 0.2 s for a batch of 32 JPEGs.

CPU time is that of all processes, and like the samples a second it counts from the first batch on.
Each run is a process of its own; in a round every contender has one, in turn. What is printed are
medians over the rounds, of ratios too: `x floor` is how many times the floor's CPU time it takes,
`x ours` how many times energon_fn's, `ours is` how many times as fast energon_fn is. Linux only.
"""

from __future__ import annotations

import importlib.util
import io
import json
import os
import platform
import random
import statistics
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

from rounds import OURS, PEER, add_peer_and_json, parser_of, printed, write_json

LOADERS = ("DataLoader", "webdataset", PEER, OURS)
CONTENDERS: dict[str, tuple[str, ...]] = {
    "text": ("floor", *LOADERS),
    "jpeg": ("floor", *LOADERS, f"{PEER} seeded"),
    "pack": ("floor", "webdataset", PEER, OURS),
    "photo": ("floor", *LOADERS, f"{OURS} min_size"),
    "start": ("torch", *LOADERS),
    "memory": LOADERS,
}
SAMPLES = {"text": 40_000, "jpeg": 1000, "pack": 40_000, "photo": 24, "memory": 200_000}  # measured
SAVED = {"text": 64_000, "jpeg packs": 6000}  # samples before the state
DATA = {"text": (20_000, 20), "jpeg": (1000, 10), "photo": (12, 4)}  # samples, shards
Found = dict[str, float]


def main(arguments: list[str] | None = None) -> None:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("--work", default=",".join(CONTENDERS), help="some of these (default: %(default)s)")
    add("--workers", default="0,2", help="numbers of them, for text and jpeg (default: 0,2)")
    add("--rounds", type=int, default=5, help="runs of each contender (default: %(default)s)")
    add("--scale", type=float, default=1, help="of all sizes but batches (default: %(default)s)")
    add("--data", metavar="FOLDER", type=Path, help="keep the datasets there, for the next time")
    add_peer_and_json(parser)
    options = parser.parse_args(arguments)
    works = options.work.split(",")
    if unknown := {*works} - {*CONTENDERS}:
        parser.error(f"--work: there is no {', '.join(unknown)}, but {', '.join(CONTENDERS)}")
    tables: dict[str, dict[str, list[Found]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options.data or Path(folder), options.scale, options.peer_python)
        for work in works:
            workers = options.workers.split(",") if work in ("text", "jpeg") else ["0"]
            able = [contender for contender in CONTENDERS[work] if bench.has(contender)]
            named = {work if work in ("start", "memory") else f"{work}, {n} workers": int(n)
                     for n in workers}  # fmt: skip
            for name in named:
                tables[name] = {contender: [] for contender in able}
            for number in range(options.rounds):
                for name, count in named.items():
                    for contender in able[number % len(able) :] + able[: number % len(able)]:
                        tables[name][contender].append(bench.measure(work, contender, count))
            for name in named:
                print(table(name, tables[name]), flush=True)
    write_json(options, tables, machine=machine())


class Bench:
    """The datasets, and the processes that are run on them."""

    def __init__(self, folder: Path, scale: float, peer_python: str | None):
        self.folder, self.scale, self.peer_python = folder, scale, peer_python
        self.state_kb: dict[str, float] = {}  # by file

    def has(self, contender: str) -> bool:
        if contender.startswith(PEER):
            return bool(self.peer_python)
        return contender != "webdataset" or importlib.util.find_spec(contender) is not None

    def measure(self, work: str, contender: str, workers: int) -> Found:
        if work == "start":
            return self.start(contender)
        samples = max(int(SAMPLES[work] * self.scale), 10)
        if work == "memory":
            found, _ = self.run("memory", contender, "text", workers=2, samples=samples)
            slow, _ = self.run("memory", contender, "jpeg", workers=2, samples=320)
            return found | {"slow_consumer_mb": slow["slow_consumer_mb"]}
        return self.run("speed", contender, work, workers=workers, samples=samples)[0]

    def start(self, contender: str) -> Found:
        module = "torch" if contender == "DataLoader" else contender
        code = f"import {module}, json, time; print(json.dumps(dict(at=time.monotonic())))"
        found = {"import_s": self.process(contender, "-c", code)[1]}
        if contender != "torch":
            found["first_batch_s"] = self.run("start", contender, "text", workers=2)[1]
        for work in SAVED if contender in (PEER, OURS) else ():
            state = str(self.folder / f"{contender}, {work}.state")
            if state not in self.state_kb:
                samples = max(int(SAVED[work] * self.scale), 10)
                saved, _ = self.run(
                    "save", contender, work, workers=2, samples=samples, state=state
                )
                self.state_kb[state] = saved["state_kb"]
            if work != "text":
                found[f"{work}_s"] = self.run("start", contender, work, workers=2)[1]
            found[f"{work} resumed_s"] = self.run("resume", contender, work, workers=2,
                                                  state=state)[1]  # fmt: skip
            found[f"{work} state_kb"] = self.state_kb[state]
        return found

    def run(
        self, kind: str, contender: str, work: str, *, samples: int = 0, **more: Any
    ) -> tuple[Found, float]:
        """What contenders.py found, and the seconds until then, from the start of its process."""
        data = {"pack": "text", "jpeg packs": "jpeg"}.get(work, work)
        if not (self.folder / data / "offsets.json").exists():
            make_dataset(self.folder / data, data, self.scale)
        more |= {"kind": kind, "contender": contender, "work": work, "samples": samples}
        buffer = max(int((10 if work == "photo" else 1000) * self.scale), 10)
        more |= {"folder": str(self.folder / data), "buffer": buffer}
        script = str(Path(__file__).with_name("contenders.py"))
        return self.process(contender, script, json.dumps(more))

    def process(self, contender: str, *command: str) -> tuple[Found, float]:
        python = str(self.peer_python) if contender.startswith(PEER) else sys.executable
        failed = f"{contender} failed: {python} {' '.join(command)}"
        start = time.monotonic()
        found: Found = printed(python, *command, failed=failed)
        return found, found.get("at", start) - start


# --- data -----------------------------------------------------------------------------------------


def make_dataset(folder: Path, kind: str, scale: float) -> None:
    """A prepared dataset, and where in its shards the parts are."""
    from energon_fn import prepare_dataset, write_dataset_yaml

    samples, shards = DATA[kind]
    samples = max(int(samples * scale), min(samples, 80))  # more than a batch
    folder.mkdir(parents=True, exist_ok=True)
    places = []
    names = [f"shard_{number:03}.tar" for number in range(shards)]
    for number, name in enumerate(names):
        with tarfile.open(folder / name, "w") as tar:
            for key in range(samples * number // shards, samples * (number + 1) // shards):
                chance = random.Random(key)
                pixels = 12e6 * scale if kind == "photo" else chance.uniform(380, 400) ** 2
                for part, data in text(chance) if kind == "text" else picture(chance, pixels):
                    member = tarfile.TarInfo(f"{key:06}.{part}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        parts: dict[str, list[Any]] = {}
        with tarfile.open(folder / name) as tar:
            for member in tar:
                key_of, _, part = member.name.partition(".")
                parts.setdefault(key_of, []).append((part, member.offset_data, member.size))
        places += [(number, of_sample) for of_sample in parts.values()]
    prepare_dataset(folder, names, split_parts_ratio=[("train", 1)])
    if kind == "text":
        write_dataset_yaml(folder, "TextSample", {"text": "json[text]"})
    else:
        write_dataset_yaml(folder, "CaptioningSample", {"image": "jpg", "caption": "txt"})
    (folder / "offsets.json").write_text(json.dumps({"shards": names, "samples": places}))


def text(chance: random.Random) -> list[tuple[str, bytes]]:
    letters = "abcdefghijklmnopqrstuvwxyz"
    lengths = [chance.randint(1, 9) for _ in range(chance.randint(40, 52))]
    words = ["".join(chance.choices(letters, k=length)) for length in lengths]
    return [("json", json.dumps({"text": " ".join(words)}).encode())]


def picture(chance: random.Random, pixels: float) -> list[tuple[str, bytes]]:
    """Noise of several scales, so that it has about as many bytes as a photo."""
    import numpy as np
    from PIL import Image

    numbers = np.random.default_rng(chance.randrange(1 << 30))
    ratio = chance.uniform(0.7, 1.4)
    size = int((pixels * ratio) ** 0.5), int((pixels / ratio) ** 0.5)
    whole = Image.new("RGB", size)
    for cells in (4, 16, 64, max(size) // 4):
        noise = Image.fromarray(numbers.integers(0, 255, (cells, cells, 3), dtype=np.uint8))
        whole = Image.blend(whole, noise.resize(size, Image.Resampling.BICUBIC), 0.4)
    file = io.BytesIO()
    whole.save(file, "JPEG", quality=90)
    return [("jpg", file.getvalue()), ("txt", b"a picture of nothing at all")]


# --- what is printed ------------------------------------------------------------------------------

RATIOS = (("x floor", "cpu_us", "floor", 1), ("x ours", "cpu_us", OURS, 1),
          ("ours is", "samples_per_s", OURS, -1))  # fmt: skip
"""Columns of ratios: title, of what, to which contender, and -1 if the other way round."""


def table(name: str, found: dict[str, list[Found]]) -> str:
    """Medians over the rounds, the contenders one below the other."""
    columns: dict[str, dict[str, float]] = {}
    for contender, rounds in found.items():
        for what in rounds[0]:
            columns.setdefault(what, {})[contender] = statistics.median(r[what] for r in rounds)
            for title, of, base, power in RATIOS:
                if what == of and base in found:
                    pairs = zip(rounds, found[base], strict=True)
                    ratios = [(one[of] / other[of]) ** power for one, other in pairs]
                    columns.setdefault(title, {})[contender] = statistics.median(ratios)
    lines = [f"\n{name:24}" + "".join(f"{column:>{len(column) + 3}}" for column in columns)]
    for contender in found:
        cells = (
            (f"{of[contender]:,.4g}" if contender in of else "").rjust(len(column) + 3)
            for column, of in columns.items()
        )
        lines.append(f"{contender:24}" + "".join(cells))
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    import torch

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    processor = next((line.split(": ")[1] for line in lines if line[:10] == "model name"), "")
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    return {"processor": processor, "cores": len(os.sched_getaffinity(0)), **versions}


if __name__ == "__main__":
    main()
