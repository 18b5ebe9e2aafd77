"""Real shards to test on."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from PIL import Image

from energon_fn import errors

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


def write_tar(path: Path, samples: Sequence[tuple[str, Parts]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz" if path.suffix in (".gz", ".tgz") else "w") as tar:
        for key, parts in samples:
            for part, data in parts.items():
                member = tarfile.TarInfo(f"{key}.{part}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


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
    errors._told.clear()


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Indices of the test's datasets go with them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ENERGON_FN_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
