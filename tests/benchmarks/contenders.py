"""One run of one contender of the benchmark in throughput.py, in a process of its own.

Its argument is a :class:`Run` as JSON, and so is what it prints. First come the functions of the
user, the same for all; then the contenders, each an endless iterator of batches, from the bare loop
to the frameworks; then what is measured. Only what all need is imported at the top, as the time to
the first batch is measured, too.
"""

from __future__ import annotations

import importlib
import io
import itertools
import json
import os
import pickle
import random
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

SIDE = 224  # pixels
TOKENS = 64  # of a text, padded
PACK = 4096  # tokens
SEQUENCE = 100  # samples that lie one behind the other and are read so
F = TypeVar("F")
Batches = Iterator[dict[str, Any]]
Raw = dict[str, bytes]


@dataclass(frozen=True)
class Run:
    kind: str  # a key of KINDS
    contender: str  # a key of CONTENDERS
    work: str  # a key of WORKS
    folder: str  # a prepared dataset, with offsets.json besides
    workers: int
    samples: int  # how many are measured
    buffer: int  # size of the shuffle or packing buffer
    state: str = ""  # the file of a loader's state


# --- what the user writes -------------------------------------------------------------------------


def tokenize(text: str) -> list[int]:
    """A token for each word: its FNV-1a hash. As slow as a tokenizer in Python is."""
    tokens = []
    for word in text.split():
        number = 0xCBF29CE484222325
        for byte in word.encode():
            number = ((number ^ byte) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
        tokens.append(number % 50_000)
    return tokens


def unpadded(text: str) -> torch.Tensor:
    return torch.tensor(tokenize(text))


def padded(text: str) -> torch.Tensor:
    tokens = tokenize(text)
    return torch.tensor(tokens + [0] * (TOKENS - len(tokens)))


def picture(data: bytes) -> Any:
    from PIL import Image

    image = Image.open(io.BytesIO(data))
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy


def crop(image: Any) -> torch.Tensor:
    """A random square of a PIL image, resized: uint8 (3, SIDE, SIDE)."""
    side = int(min(image.size) * random.uniform(0.7, 1))
    x, y = (random.randrange(length - side + 1) for length in image.size)
    small = image.resize((SIDE, SIDE), 2, (x, y, x + side, y + side))  # 2: bilinear
    return torch.from_numpy(np.asarray(small).transpose(2, 0, 1).copy())


def text_batch(texts: list[torch.Tensor]) -> dict[str, Any]:
    return {"tokens": torch.stack(texts), "samples": len(texts)}


def picture_batch(pairs: list[tuple[torch.Tensor, str]]) -> dict[str, Any]:
    images, captions = zip(*pairs, strict=True)
    return {"images": torch.stack(images), "captions": captions, "samples": len(pairs)}


def pack_batch(packs: list[tuple[torch.Tensor, int]]) -> dict[str, Any]:
    tokens, counts = zip(*packs, strict=True)
    return {"tokens": torch.stack(tokens), "samples": sum(counts)}


def select(texts: list[torch.Tensor]) -> list[list[int]]:
    """Which texts go together so that no pack is too long; none is left out."""
    lengths = list(map(len, texts))
    packs: list[list[int]] = [[]]
    left = PACK
    for n in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        if lengths[n] > left:
            packs.append([])
            left = PACK
        packs[-1].append(n)
        left -= lengths[n]
    return packs


def join(texts: list[torch.Tensor]) -> tuple[torch.Tensor, int]:
    """A pack: its tokens (PACK,), and how many texts it is made of."""
    whole = torch.cat(texts)
    return torch.nn.functional.pad(whole, (0, PACK - len(whole))), len(texts)


def select_pictures(images: list[torch.Tensor]) -> list[list[int]]:
    return [[*range(n, min(n + 4, len(images)))] for n in range(0, len(images), 4)]


def join_pictures(images: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat(images, dim=2)


def encode_text(raw: Raw) -> torch.Tensor:
    return padded(json.loads(raw["json"])["text"])


def encode_unpadded(raw: Raw) -> torch.Tensor:
    return unpadded(json.loads(raw["json"])["text"])


def encode_picture(raw: Raw) -> tuple[torch.Tensor, str]:
    return crop(picture(raw["jpg"])), raw["txt"].decode()


@dataclass(frozen=True)
class Work:
    batch_size: int
    encode: Callable[[Raw], Any]
    collate: Callable[[list[Any]], dict[str, Any]]
    fields: tuple[str, ...]  # those of a task encoder's sample that go into a batch
    transform: Callable[[Any], Any]  # of the first of them
    is_random: bool = False
    packing: tuple[Callable[[list[Any]], list[list[int]]], Callable[[list[Any]], Any]] | None = None


PICTURE = ("image", "caption")
PACKS, PICTURE_PACKS = (select, join), (select_pictures, join_pictures)
WORKS = {
    "text": Work(64, encode_text, text_batch, ("text",), padded),
    "pack": Work(1, encode_unpadded, pack_batch, ("text",), unpadded, packing=PACKS),
    "jpeg": Work(32, encode_picture, picture_batch, PICTURE, crop, True),
    "photo": Work(4, encode_picture, picture_batch, PICTURE, crop, True),
    "jpeg packs": Work(4, encode_picture, picture_batch, PICTURE, crop, True, PICTURE_PACKS),
}


def task_encoder(energon: Any, work: Work, seeded: bool) -> Any:
    """The same functions as methods, for either package.

    seeded: ask that a sample that is made again has the same random numbers. energon_fn always sees
    to that, megatron-energon only then; without it, it cannot resume a packing buffer.
    """
    stateless: Callable[[F], F] = energon.stateless
    field, of_batch = work.fields[0], attrgetter(*work.fields)

    class Encoder(energon.DefaultTaskEncoder):  # type: ignore[misc]
        def encode_sample(self, sample: Any) -> Any:
            setattr(sample, field, work.transform(getattr(sample, field)))
            return sample

        if seeded or not work.is_random:
            encode_sample = energon.stateless(restore_seeds=work.is_random)(encode_sample)

        @stateless
        def batch(self, samples: list[Any]) -> dict[str, Any]:
            return work.collate([of_batch(sample) for sample in samples])

    if work.packing is None:
        return Encoder()
    choose, put_together = work.packing

    class Packing(Encoder):
        @stateless
        def select_samples_to_pack(self, samples: list[Any]) -> list[list[Any]]:
            packs = choose([getattr(sample, field) for sample in samples])
            return [[samples[n] for n in pack] for pack in packs]

        @stateless
        def pack_selected_samples(self, samples: list[Any]) -> Any:
            joined = put_together([getattr(sample, field) for sample in samples])
            setattr(samples[0], field, joined)
            return samples[0]

    return Packing()


# --- the contenders -------------------------------------------------------------------------------


class Known:
    """Samples at known offsets, encoded: ``samples[i]``, as the map-style datasets of torch."""

    def __init__(self, folder: str, encode: Callable[[Raw], Any]):
        known = json.loads(Path(folder, "offsets.json").read_text())
        self.files = [os.open(Path(folder, name), os.O_RDONLY) for name in known["shards"]]
        self.samples, self.encode = known["samples"], encode

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int) -> Any:
        shard, parts = self.samples[i]
        file = self.files[shard]
        return self.encode({name: os.pread(file, size, start) for name, start, size in parts})

    def order(self, buffer: int) -> list[int]:
        """All indices: sequences are shuffled, then samples within a buffer."""
        starts, out = list(range(0, len(self), SEQUENCE)), list[int]()
        random.shuffle(starts)
        held: list[int] = []
        for n in (n for start in starts for n in range(start, min(start + SEQUENCE, len(self)))):
            held.append(n)
            if len(held) >= buffer:
                out.append(held.pop(random.randrange(len(held))))
        return out + random.sample(held, len(held))


def floor(run: Run) -> Batches:
    """A bare loop; as workers, as many of them, whose batches stay where they are."""
    work = WORKS[run.work]
    samples = Known(run.folder, work.encode)
    order = samples.order(1 if work.packing else run.buffer)

    def loop(order: list[int]) -> Batches:
        encoded: Iterator[Any] = map(samples.__getitem__, itertools.cycle(order))
        items = packs(encoded, run.buffer) if work.packing else encoded
        while True:
            yield work.collate(list(itertools.islice(items, work.batch_size)))

    if not run.workers:
        yield from loop(order)
    told, tells = os.pipe()
    for n in range(run.workers):
        if not os.fork():
            os.close(told)
            first = len(order) * n // run.workers
            for _ in loop(order[first:] + order[:first]):
                os.write(tells, b".")
    while os.read(told, 1):
        yield {"samples": work.batch_size}


def packs(items: Iterable[torch.Tensor], buffer: int) -> Iterator[tuple[torch.Tensor, int]]:
    items = iter(items)
    while texts := list(itertools.islice(items, buffer)):
        for pack in select(texts):
            yield join([texts[n] for n in pack])


def data_loader(run: Run) -> Batches:
    """torch's DataLoader over samples at known offsets."""
    from torch.utils.data import DataLoader

    work = WORKS[run.work]
    samples: Any = Known(run.folder, work.encode)
    order: Any = itertools.cycle(samples.order(run.buffer))
    yield from DataLoader(
        samples, work.batch_size, sampler=order, num_workers=run.workers, collate_fn=work.collate
    )


def webdataset(run: Run) -> Batches:
    """webdataset in torch's DataLoader."""
    from torch.utils.data import DataLoader

    wds: Any = importlib.import_module("webdataset")
    work = WORKS[run.work]
    shards = sorted(map(str, Path(run.folder).glob("*.tar")))
    dataset = wds.WebDataset(shards, shardshuffle=len(shards), empty_check=False).repeat()
    if work.packing:
        dataset = dataset.map(work.encode).compose(lambda items: packs(items, run.buffer))
    else:
        dataset = dataset.shuffle(run.buffer).map(work.encode)
    dataset = dataset.batched(work.batch_size, collation_fn=work.collate, partial=False)
    yield from DataLoader(dataset, batch_size=None, num_workers=run.workers)


def energon_loader(run: Run) -> Any:
    """megatron-energon's loader whose state can be saved, or this package's."""
    name, *how = run.contender.split()
    energon, work = importlib.import_module(name), WORKS[run.work]
    encoder = task_encoder(energon, work, "seeded" in how or work.packing is not None)
    if work.fields == PICTURE:
        smallest = {"min_size": SIDE} if "min_size" in how else {}
        encoder.decoder = energon.SampleDecoder(image_decode="pilrgb", **smallest)
    dataset = energon.get_train_dataset(
        run.folder,
        batch_size=work.batch_size,
        shuffle_buffer_size=None if work.packing else run.buffer,
        packing_buffer_size=run.buffer if work.packing else None,
        max_samples_per_sequence=SEQUENCE,
        worker_config=energon.WorkerConfig(rank=0, world_size=1, num_workers=run.workers),
        task_encoder=encoder,
    )
    return energon.get_savable_loader(dataset)


def energon(run: Run) -> Batches:
    loader = energon_loader(run)
    if run.kind == "resume":
        loader.restore_state_rank(pickle.loads(Path(run.state).read_bytes()))
    yield from loader


CONTENDERS: dict[str, Callable[[Run], Batches]] = {
    "floor": floor,
    "DataLoader": data_loader,
    "webdataset": webdataset,
    "megatron.energon": energon,
    "megatron.energon seeded": energon,
    "energon_fn": energon,
    "energon_fn min_size": energon,
}


# --- what is measured -----------------------------------------------------------------------------


def measure_speed(run: Run) -> dict[str, float]:
    """From behind the first batch on: CPU time of all processes, and time."""
    batches = CONTENDERS[run.contender](run)
    next(batches)
    cpu, start = cpu_seconds(), time.perf_counter()
    done = take(batches, run.samples)
    cpu, seconds = cpu_seconds() - cpu, time.perf_counter() - start
    return {"cpu_us": 1e6 * cpu / done, "samples_per_s": done / seconds}


def measure_start(run: Run) -> dict[str, float]:
    """When the first batch is there, by the clock that all processes share."""
    next(CONTENDERS[run.contender](run))
    return {"at": time.monotonic()}


def save_state(run: Run) -> dict[str, float]:
    """Save the state of a loader that has given so many samples."""
    loader = energon_loader(run)
    take(iter(loader), run.samples)
    state = pickle.dumps(loader.save_state_rank())
    Path(run.state).write_bytes(state)
    return {"state_kb": len(state) / 1e3}


def measure_memory(run: Run) -> dict[str, float]:
    """Megabytes: of a worker, its growth, and of all processes while the consumer is slow."""
    batches = CONTENDERS[run.contender](run)
    take(batches, run.samples // 10)
    workers = started_by(os.getpid())
    before = [megabytes(pid) for pid in workers]
    take(batches, run.samples)
    after, slow = [megabytes(pid) for pid in workers], 0.0
    for _ in range(10):
        next(batches)
        time.sleep(0.2)
        slow = max(slow, sum(megabytes(pid)[0] for pid in (os.getpid(), *workers)))
    shared, own, grown = (
        sum(column) / len(workers)
        for column in zip(
            *((*a, b[0] - a[0]) for a, b in zip(before, after, strict=True)), strict=True
        )
    )
    return {"worker_mb": shared, "worker_own_mb": own, "growth_mb": grown, "slow_consumer_mb": slow}


KINDS: dict[str, Callable[[Run], dict[str, float]]] = {
    "speed": measure_speed,
    "start": measure_start,
    "resume": measure_start,
    "save": save_state,
    "memory": measure_memory,
}


def take(batches: Batches, samples: int) -> int:
    """Go on for at least so many samples; returns how many it were."""
    done = 0
    while done < samples:
        done += next(batches)["samples"]
    return done


def started_by(pid: int) -> list[int]:
    """All living processes that a process has started, directly or not."""
    found = []
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, children.read_text().split()):
            found += [child, *started_by(child)]
    return found


def cpu_seconds() -> float:
    """CPU time of this process and all that it has started, those included that still run."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    clocks = (~pid << 3 | 2 for pid in started_by(os.getpid()))  # see clock_getcpuclockid(3)
    running = sum(map(time.clock_gettime, clocks))
    return time.process_time() + ended.ru_utime + ended.ru_stime + running


def megabytes(pid: int) -> tuple[float, float]:
    """A process's memory: its share of all that is in use, and what only it uses."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    size = {name: int(kilobytes) / 1024 for name, kilobytes, _ in map(str.split, lines)}
    return size["Pss:"], size["Private_Clean:"] + size["Private_Dirty:"]


if __name__ == "__main__":
    torch.set_num_threads(1)
    run = Run(**json.loads(sys.argv[1]))
    print(json.dumps(KINDS[run.kind](run)), flush=True)
    for child in started_by(os.getpid()):
        os.kill(child, 9)
    os._exit(0)  # nobody waits for how a framework ends
