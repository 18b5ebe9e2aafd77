"""Real shards to test on."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from PIL import Image

from energon_fn import errors, prepare_dataset, write_dataset_yaml

# Where tests are run in the background, Ctrl-C is ignored; some of them press it.
signal.signal(signal.SIGINT, signal.default_int_handler)

# A machine that is busy with worker processes is slow, not wrong.
hypothesis.settings.register_profile("all", deadline=None)
hypothesis.settings.load_profile("all")

Parts = Mapping[str, bytes]


def jpeg(seed: int = 0, size: tuple[int, int] = (24, 16)) -> bytes:
    """A small picture of its own for each seed."""
    noise = np.random.default_rng(seed).integers(0, 255, (3, 4, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).resize(size).save(file, "JPEG")
    return file.getvalue()


def write_members(path: Path, members: Iterable[tuple[str, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz" if path.suffix in (".gz", ".tgz") else "w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def write_tar(path: Path, samples: Iterable[tuple[str, Parts]]) -> None:
    write_members(
        path, [(f"{key}.{part}", data) for key, parts in samples for part, data in parts.items()]
    )


def numbered(n: int) -> Parts:
    """What the n-th sample of :func:`shards` holds."""
    return {"json": json.dumps({"n": n}).encode(), "txt": f"caption {n}".encode()}


def shards(
    folder: Path, counts: Sequence[int], parts: Callable[[int], Parts] = numbered
) -> list[str]:
    """Write shards of ``counts`` samples, numbered through from 0; their names are given back."""
    names, n = [], 0
    for shard, count in enumerate(counts):
        names.append(f"shard_{shard:03d}.tar")
        write_tar(folder / names[-1], [(f"{i:05d}", parts(i)) for i in range(n, n + count)])
        n += count
    return names


def prepare(folder: Path, names: list[str], *ratio: tuple[str, float]) -> None:
    """Index and split, by default all to "train", in the shards' order."""
    split = list(ratio) or [("train", 1), ("val", 0)]
    prepare_dataset(folder, names, split_parts_ratio=split, shuffle_seed=None, workers=1)


def pet(n: int) -> Parts:
    """A picture of its own size, its caption and more."""
    detail = {"caption": f"pet {n}", "words": ["pet", str(n)], "size": {"width": 8 + 4 * (n % 3)}}
    return {
        "jpg": jpeg(n, (8 + 4 * (n % 3), 6 + 2 * (n % 2))),
        "txt": f"pet {n}".encode(),
        "cls": str(n % 4).encode(),
        "detail.json": json.dumps(detail).encode(),
    }


def size_of(n: int) -> tuple[int, int, int]:
    return 3, 6 + 2 * (n % 2), 8 + 4 * (n % 3)


# What a test does to its folder begins with a copy, not with drawing pictures.


@pytest.fixture(scope="session")
def pets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """10 captioned pictures in three shards, prepared: two shards to train on."""
    folder = tmp_path_factory.mktemp("pets")
    prepare(folder, shards(folder, (4, 3, 3), pet), ("train", 2), ("val", 1))
    write_dataset_yaml(folder, "CaptioningSample", {"image": "jpg", "caption": "txt"})
    return folder


@pytest.fixture
def own_pets(pets: Path, tmp_path: Path) -> Path:
    """The same in a folder that may be changed."""
    return Path(shutil.copytree(pets, tmp_path / "pets"))


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 numbered samples in two shards, not prepared."""
    path = tmp_path_factory.mktemp("numbers")
    shards(path, (5, 7))
    return path


@pytest.fixture(scope="session")
def published_python() -> str:
    """A Python that has megatron-energon: what ENERGON_PYTHON names, or this one."""
    python = os.environ.get("ENERGON_PYTHON", sys.executable)
    found = subprocess.run([python, "-c", "import megatron.energon"], capture_output=True)
    if found.returncode:
        pytest.skip("megatron-energon is not installed; ENERGON_PYTHON may name a Python with it")
    return python


@pytest.fixture(autouse=True)
def _nothing_told_yet() -> None:
    """Each test gets the traceback of its first failure."""
    errors._times.clear()


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Indices of the test's datasets go with them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ENERGON_FN_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
