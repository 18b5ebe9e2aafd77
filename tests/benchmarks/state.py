"""What it costs that a loader can be stopped anywhere and gone on with.

For a shuffle buffer and for a packing buffer of 1000 samples:

* bytes of one rank's state, as JSON, and per lane of it;
* time to take it, in the training loop;
* time from a state to the first batch: dataset and loader made, state restored, batch received;
* slowdown: CPU time for the same batches, made in one process, with states kept and without; also
  in microseconds, since the pictures are small, and percents of more work for each are fewer.

Data are small captioned pictures, made on the spot. With --peer-python the published
megatron-energon does the same on them in the same rounds, in turn with this package. Its loader
without states is its `get_loader`, the one with states its `get_savable_loader`. This package keeps
states always; for the comparison they are taken out of its streams. Each round is a new process,
and what is printed are medians over the rounds.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import io
import itertools
import json
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rounds import add_peer_and_json, header, in_turn, measured, parser_of, side_by_side, write_json

WORKLOADS = ("shuffle", "packing")
BATCH = 20  # samples
PACK = 4  # samples
SAVES = 20
Make = Callable[[], Iterator[Any]]


def main(arguments: list[str] | None = None) -> None:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("--samples", type=int, default=4000, help="pictures in the dataset (default: %(default)s)")
    add("--buffer", type=int, default=1000, help="size of the buffers (default: %(default)s)")
    add("--workers", type=int, default=2, help="for all but the slowdown (default: %(default)s)")
    add("--turns", type=int, default=10, help="pairs timed for the slowdown (default: 10)")
    add("--rounds", type=int, default=3, help="processes of each package (default: %(default)s)")
    add_peer_and_json(parser)
    add("--measure", nargs=2, metavar=("PACKAGE", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.measure:
        package, folder = options.measure
        print(json.dumps(measure(package, folder, options)))
        return
    chosen = [
        f"--{name}={getattr(options, name)}" for name in ("samples", "buffer", "workers", "turns")
    ]
    with tempfile.TemporaryDirectory() as folder:
        make_dataset(Path(folder), options.samples)
        rounds = in_turn(options, lambda *which: measured(*which, __file__, folder, *chosen))
    write_json(options, rounds)
    print(table(rounds))


def make_dataset(folder: Path, samples: int, shards: int = 8) -> None:
    """A prepared dataset that both packages read."""
    import numpy as np
    from PIL import Image

    from energon_fn import prepare_dataset, write_dataset_yaml

    chance = np.random.default_rng(0)
    names = [f"shard_{number}.tar" for number in range(shards)]
    for number, name in enumerate(names):
        with tarfile.open(folder / name, "w") as tar:
            for key in range(number, samples, shards):
                noise = chance.integers(0, 255, (8, 8, 3), dtype=np.uint8)
                picture = io.BytesIO()
                Image.fromarray(noise).resize((64, 64)).save(picture, "JPEG")
                for part, data in (("jpg", picture.getvalue()), ("txt", f"number {key}".encode())):
                    member = tarfile.TarInfo(f"{key:06}.{part}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    prepare_dataset(folder, names, split_parts_ratio=[("train", 1)])
    write_dataset_yaml(folder, "CaptioningSample", {"image": "jpg", "caption": "txt"})


# --- in a new process: the same for both packages -------------------------------------------------


def measure(package: str, folder: str, options: Any) -> dict[str, Any]:
    return {load: measure_one(package, folder, load, options) for load in WORKLOADS}


def measure_one(package: str, folder: str, load: str, options: Any) -> dict[str, float]:
    energon = importlib.import_module(package)
    length = -(-options.buffer // BATCH)  # batches: a packing buffer is filled once in each

    def dataset(workers: int) -> Any:
        config = energon.WorkerConfig(rank=0, world_size=1, num_workers=workers)
        sizes: dict[str, Any] = {"batch_size": BATCH, "shuffle_buffer_size": options.buffer}
        if load == "packing":
            sizes = {"batch_size": BATCH // PACK, "packing_buffer_size": options.buffer}
        return energon.get_train_dataset(
            folder,
            max_samples_per_sequence=100,
            worker_config=config,
            task_encoder=task_encoder(energon),
            **{"shuffle_buffer_size": None, **sizes},
        )

    loader = energon.get_savable_loader(dataset(options.workers))
    batches, saving = iter(loader), []
    for _ in range(length * 3 // 2):  # into the middle of a buffer
        next(batches)
    for _ in range(SAVES):
        next(batches)
        start = time.perf_counter()
        state = loader.save_state_rank()
        saving.append(time.perf_counter() - start)
    del batches, loader

    start = time.perf_counter()
    loader = energon.get_savable_loader(dataset(options.workers))
    loader.restore_state_rank(state)
    batches = iter(loader)
    next(batches)
    resuming = time.perf_counter() - start
    del batches, loader

    turns = alternately(
        lambda: iter(energon.get_savable_loader(dataset(0))),
        lambda: without_states(energon, dataset(0)),
        length,
        options.turns,
    )
    size = len(json.dumps(plain(state)))
    return {
        "state_bytes": size,
        "state_bytes_per_lane": size / max(options.workers, 1),
        "save_ms": 1e3 * statistics.median(saving),
        "first_batch_ms": 1e3 * resuming,
        "cpu_us_per_sample": 1e6 * statistics.median(a for a, _ in turns) / BATCH,
        "slowdown_us_per_sample": 1e6 * statistics.median(a - b for a, b in turns) / BATCH,
        "slowdown_percent": 100 * (statistics.median(a / b for a, b in turns) - 1),
    }


def task_encoder(energon: Any) -> Any:
    class Encoder(energon.DefaultTaskEncoder):  # type: ignore[misc]
        @energon.stateless
        def select_samples_to_pack(self, samples: list[Any]) -> list[list[Any]]:
            return [samples[n : n + PACK] for n in range(0, len(samples), PACK)]

        @energon.stateless
        def pack_selected_samples(self, samples: list[Any]) -> Any:
            import torch

            image = torch.cat([sample.image for sample in samples], dim=2)
            caption = ", ".join(sample.caption for sample in samples)
            return energon.CaptioningSample.derive_from(samples[0], image=image, caption=caption)

    return Encoder()


def alternately(kept: Make, bare: Make, length: int, turns: int) -> list[tuple[float, float]]:
    """CPU seconds of a batch from each of the two, by turns.

    Made anew for every turn: where things happen to lie in memory is worth some percents.
    """
    spent = []
    for turn in range(turns):
        seconds = [0.0, 0.0]
        for which in (0, 1) if turn % 2 else (1, 0):
            batches = (kept, bare)[which]()
            next(batches)
            start = time.process_time()
            for _ in itertools.islice(batches, length):
                pass
            seconds[which] = (time.process_time() - start) / length
        spent.append((seconds[0], seconds[1]))
    return spent


def without_states(energon: Any, dataset: Any) -> Iterator[Any]:
    """The batches of a loader that cannot be resumed."""
    if energon.__name__ != "energon_fn":
        yield from energon.get_loader(dataset)
        return
    from energon_fn import position

    def bare(stage: Any, upstream: Any, **options: Any) -> Any:
        def pull(items: Any) -> Iterator[Any]:
            for value, where in items:
                position.at(where)  # random numbers need it, states or not
                yield value

        held: list[list[Any]] = [[]] if options.get("gives_back") else []
        return lambda state: ((value, None) for value in stage(pull(upstream(None)), *held))

    module: Any = sys.modules[energon.Dataset.__module__]
    resumable, module.resumable = module.resumable, bare
    try:
        batches = iter(energon.get_loader(dataset))
        yield next(batches)  # by now the stages are put together
    finally:
        module.resumable = resumable
    yield from batches


def plain(state: Any) -> Any:
    """What json can write, of any state."""
    if dataclasses.is_dataclass(state) and not isinstance(state, type):
        names = [field.name for field in dataclasses.fields(state)]
        return {name: plain(getattr(state, name)) for name in names}
    if isinstance(state, dict):
        return {str(key): plain(value) for key, value in state.items()}
    if isinstance(state, list | tuple | set):
        return [plain(part) for part in state]
    if hasattr(state, "tolist"):  # arrays, tensors
        return state.tolist()
    return state.hex() if isinstance(state, bytes) else state


# --- what is printed ------------------------------------------------------------------------------


def table(rounds: dict[str, list[Any]]) -> str:
    """Medians over the rounds, the packages side by side."""
    lines = [header(rounds, 32)]
    for load in WORKLOADS:
        of_load = {package: [found[load] for found in each] for package, each in rounds.items()}
        lines += [f"{load} buffer", *side_by_side(of_load, 32, indent="  ")]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
