"""Read and decode every sample, to find those that training would stumble over."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from energon_fn.decoding import decoder
from energon_fn.disk import files
from energon_fn.disk.jsonl import Jsonl
from energon_fn.disk.source import Samples, Source, open_source
from energon_fn.errors import DatasetError, FatalSampleError, SampleError, SkipSample
from energon_fn.failures.quarantine import Failure
from energon_fn.samples import SourceInfo

CHUNK = 32
"""Samples that a worker checks at a time."""


@dataclass(frozen=True)
class BadSample:
    """A sample that cannot be read, decoded or made a sample of its type; or a whole shard."""

    shard: str
    key: str | None
    """None: the shard itself is missing, damaged or not what was indexed."""
    error: str
    failure: Failure = field(repr=False)
    """The same as a line of a quarantine file."""

    def __str__(self) -> str:
        return (
            f"{self.shard} {self.key}: {self.error}" if self.key else f"{self.shard}: {self.error}"
        )


def lint(
    source: Samples,
    image_decode: str | None = "torchrgb",
    workers: int | None = None,
    progress: Callable[[int], object] = lambda samples: None,
) -> Iterator[BadSample]:
    """Load, decode and convert every sample of a dataset; yield the bad ones in its order.

    Only the parts that the dataset uses are read. A shard that cannot be read is yielded once, and
    its other samples are not tried.

    image_decode: as in :func:`~energon_fn.get_dataset`.
    workers: processes that do the work; 0: this one; None: one for each processor.
    progress: called with the number of samples that were dealt with since the last call.

    >>> import tempfile, webdataset
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with webdataset.TarWriter(folder + "/0.tar", encoder=False) as tar:
    ...         size = tar.write({"__key__": "a", "json": b"[1, 2]"})
    ...         size = tar.write({"__key__": "b", "json": b"[1, 2"})
    ...     for bad in lint(open_source(folder), workers=0):
    ...         print(bad)
    0.tar b: cannot decode part 'json' (5 bytes): Expecting ',' delimiter: line 1 column 6 (char 5)
    """
    if workers is None:
        workers = os.cpu_count() or 1
    check = _Check(source, decoder(image_decode))
    chunks: DataLoader[_Checked] = DataLoader(
        check,
        batch_size=None,
        collate_fn=_as_is,
        num_workers=min(workers, len(check)),
        generator=torch.Generator(),  # not the user's: it would draw from that
    )
    unreadable: set[str] = set()
    try:
        for count, bad_samples in chunks:
            for bad in bad_samples:
                if bad.key is not None or bad.shard not in unreadable:
                    yield bad
                if bad.key is None:
                    unreadable.add(bad.shard)
            progress(count)
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise FatalSampleError(
            f"a process that checks samples has died: {error} Give fewer workers if the memory "
            "is short; workers=0 (--num-workers 0) shows where it happens."
        ) from error


def shard_names(source: Samples) -> list[str]:
    """What each of the dataset's runs lies in: a shard, a file of lines, or the dataset itself."""
    match source:
        case Source():
            return [source.shards[segment.shard] for segment in source.segments]
        case Jsonl():
            return [lines.name for lines in source.lines]
        case _:
            return [source.path for _ in source.runs]


def open_shards(path: str | os.PathLike[str]) -> Iterator[Source | BadSample]:
    """Each shard of a dataset that is not prepared as a source of its own, or what is wrong.

    For a folder of which :func:`~energon_fn.open_source` refuses the whole because of one shard.
    """
    path = os.path.abspath(path)
    folder = path if os.path.isdir(path) else ""
    for name in files.list_tars(path) if folder else files.expand(path):
        try:
            source = open_source(os.path.join(folder, name))
            # By the name that it has in the folder.
            yield replace(source, path=folder, shards=(name,)) if folder else source
        except DatasetError as error:
            yield _bad_shard(error, folder or path, 0, name)


def _bad_shard(error: DatasetError, path: str, i: int, shard: str) -> BadSample:
    """What is wrong with a shard; it was seen at the ``i``-th sample."""
    sources = (SourceInfo(path, i, shard, ()),)
    return BadSample(shard, None, str(error), Failure.of(error, None, sources, "load"))


_Checked = tuple[int, list[BadSample]]


class _Check(Dataset[_Checked]):
    """The chunks of a dataset; getting one checks its samples."""

    def __init__(self, source: Samples, decode: Callable[[dict[str, Any]], dict[str, Any]]):
        self.source = source
        self.decode = decode
        self.chunks: list[tuple[int, int, str]] = []  # first sample, the one behind the last, shard
        first = 0
        for shard, length in zip(shard_names(source), source.runs, strict=True):
            end = first + length
            self.chunks += [(i, min(i + CHUNK, end), shard) for i in range(first, end, CHUNK)]
            first = end

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, number: int) -> _Checked:
        first, end, shard = self.chunks[number]
        bad_samples: list[BadSample] = []
        for i in range(first, end):
            try:
                raw = self.source.load(i)
            except DatasetError as error:
                bad_samples.append(_bad_shard(error, self.source.path, i, shard))
                break
            try:
                self.source.make(raw, self._decoded)
            except SkipSample:  # the dataset's own code leaves it out
                continue
            except Exception as error:
                known = isinstance(error, SampleError | DatasetError)
                what = str(error) if known else f"{type(error).__name__}: {error}"
                failure = Failure.of(error, raw, raw["__sources__"], "decode")
                bad_samples.append(BadSample(shard, raw["__key__"], what, failure))
        return end - first, bad_samples

    def _decoded(self, raw: dict[str, Any]) -> dict[str, Any]:
        # The message need not say key and shard once more.
        parts = {name: part for name, part in raw.items() if not name.startswith("__")}
        return {**raw, **self.decode(parts)}


def _as_is(checked: Any) -> Any:
    return checked
