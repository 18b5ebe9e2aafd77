"""Walking a tar once: which samples there are, and where their parts lie."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import struct
import tarfile
import threading
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, TypeVar

from energon_fn.disk import files
from energon_fn.errors import DatasetError, logger

T = TypeVar("T")

Part = tuple[str, int, int]
"""Part name, offset and size in bytes of its content in the (decompressed) shard."""

Media = tuple[str, str, str]
"""Name of a file in its tar or folder, and type and JSON of its metadata (``disk.media``)."""

TAR_BLOCK = 512
_MAX_PADDING = 2**20  # zeros behind the end of a tar that are looked through


@dataclass(frozen=True)
class ShardIndex:
    """What lies where in one shard, all sequences in the order of the tar.

    ``name`` is the shard's name relative to the dataset, ``offsets`` has one number more than
    there are samples: each sample's first header and, last, the end of the last sample (what
    megatron-energon keeps in ``.tar.idx``). All offsets are bytes of the decompressed stream.
    ``media`` is there if it was asked for.
    """

    name: str
    keys: list[str]
    offsets: list[int]
    parts: list[tuple[Part, ...]]
    media: list[Media] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.keys)


def split_name(name: str) -> tuple[str, str] | None:
    """Key and part name of a file in a tar, or None for a file that belongs to no sample.

    The key ends at the first dot of the base name. Files without a dot, files that begin with one
    and those in a folder or of a name like ``__meta__`` are no parts (as in webdataset).

    >>> split_name("a.b/0001.detail.json"), split_name("0001"), split_name(".hidden.txt")
    (('a.b/0001', 'detail.json'), None, None)
    """
    found = _PART.match(name)
    return None if found is None or _META.match(name) else (found[1], found[2])


_PART = re.compile(r"((?:.*/)?[^.]+)\.([^/]*)\Z")
_META = re.compile(r"__[^/]*__(?:$|/)")


def index_shard(path: str | os.PathLike[str], name: str | None = None) -> ShardIndex:
    """Walk one ``.tar``, ``.tar.gz`` or ``.tgz`` from header to header.

    A sample is a run of files with the same key. ``name`` is the shard's name relative to its
    dataset (the file's own name unless given). Raises :class:`DatasetError` if the tar is cut
    short, damaged, not a tar, or holds what cannot be read by offset.
    """
    path = os.fspath(path)
    shard = ShardIndex(os.path.basename(path) if name is None else name, [], [], [])
    keys, offsets = shard.keys, shard.offsets
    parts: list[Part] = []

    links, twice = 0, []

    def broken(why: object) -> DatasetError:
        # The last one begun may lack parts.
        last = f"the last whole sample is {keys[-2]!r}" if len(keys) > 1 else "no sample is whole"
        return DatasetError(f"{path}: {why}; {last}. Copy or write the shard again, or exclude it.")

    with files.open_stream(path) as stream:
        try:
            tar: Any = tarfile.TarFile(fileobj=stream)
            while (member := tar.next()) is not None:
                tar.members.clear()  # tarfile would keep every header of the shard
                split = split_name(member.name)
                if split is None or not member.isreg():
                    links += split is not None and (member.islnk() or member.issym())
                    continue
                if member.issparse():
                    raise broken(f"{member.name} is a sparse file, which has no bytes to read")
                if not keys or keys[-1] != split[0]:
                    if keys:
                        shard.parts.append(tuple(parts))
                    parts = []
                    keys.append(split[0])
                    offsets.append(member.offset)
                if any(split[1] == part[0] for part in parts):
                    twice.append(member.name)
                parts.append((split[1], member.offset_data, member.size))
        except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
            raise broken(error) from error
        if keys:
            shard.parts.append(tuple(parts))
        # tarfile takes damage in the middle for the end, so look at what it stopped at.
        stream.seek(tar.offset)
        rest = stream.read(_MAX_PADDING)
    if len(rest) < TAR_BLOCK:
        raise broken(
            "it ends without an end-of-archive marker, so it was cut short (if it is known to be "
            "whole, append 1024 zero bytes)"
        )
    if any(rest[:TAR_BLOCK]):
        raise broken(f"byte {tar.offset} is not a tar header")
    if rest.strip(b"\0"):
        logger.warning(
            "%s has data behind its end-of-archive marker at byte %d (tars that were "
            "concatenated?): it is not read",
            path,
            tar.offset,
        )
    if links:
        logger.warning(
            "%s: %d links are not read as parts of samples. Write the shard with what "
            "they point to (GNU tar: --dereference --hard-dereference)",
            path,
            links,
        )
    if twice:
        logger.warning(
            "%s: %d files have the name of another one of their sample, %r first. Only the last "
            "one is read: if they are several samples, give each a key of its own",
            path,
            len(twice),
            twice[0],
        )
    offsets.append(tar.offset)
    _check_text(path, shard)
    return shard


def index_shards(
    root: str | os.PathLike[str],
    names: Sequence[str],
    workers: int | None = None,
    walk: Callable[[str, str], ShardIndex] | None = None,
) -> Iterator[ShardIndex]:
    """Walk many shards, ``workers`` at a time (one per processor unless given), in order of names.

    ``walk`` stands in for :func:`index_shard` where more than an index is wanted of them. They are
    walked as :func:`in_order` says, at most two shards per worker ahead of whoever takes the
    results.

    >>> list(index_shards("/", []))
    []
    """
    tasks = [(os.path.join(root, name), name) for name in names]
    return in_order(walk or index_shard, tasks, workers)


def in_order(
    function: Callable[..., T], tasks: Sequence[tuple[Any, ...]], workers: int | None = None
) -> Iterator[T]:
    """``function(*task)`` for each task, ``workers`` at a time (one per processor unless given).

    In processes where that is safe (no thread but this one, so that nobody holds a lock when they
    are forked), else in threads. They start at once, and are at most two tasks per worker ahead
    of whoever takes the results.

    >>> list(in_order(max, [(1, 2), (4, 3)], workers=1))
    [2, 4]
    """
    workers = min(workers or os.cpu_count() or 1, len(tasks))
    todo = iter(tasks)
    if workers <= 1:
        return (function(*task) for task in todo)
    may_fork = (
        "fork" in multiprocessing.get_all_start_methods()
        and threading.active_count() == 1
        and not multiprocessing.current_process().daemon
    )
    pool: Executor = (
        ProcessPoolExecutor(
            workers,
            mp_context=multiprocessing.get_context("fork"),
            initializer=signal.signal,  # Ctrl-C ends them; it is this process that tells of it
            initargs=(signal.SIGINT, signal.SIG_DFL),
        )
        if may_fork
        else ThreadPoolExecutor(workers)
    )
    # The first are submitted here, and so the processes forked before a progress bar has a thread.
    ahead = deque(pool.submit(function, *task) for task in islice(todo, 2 * workers))

    def results() -> Iterator[T]:
        try:
            while ahead:
                yield ahead.popleft().result()
                ahead.extend(pool.submit(function, *task) for task in islice(todo, 1))
        finally:
            pool.shutdown(cancel_futures=True)

    return results()


def _check_text(path: str, shard: ShardIndex) -> None:
    """SQLite and YAML hold Unicode; tarfile marks bytes that are none as lone surrogates."""
    names = [shard.keys, [part[0] for sample in shard.parts for part in sample]]
    for name in ("\0".join(group) for group in names):
        try:
            name.encode()
        except UnicodeEncodeError as error:
            around = name[max(0, error.start - 40) : error.start + 10]
            raise DatasetError(
                f"{path}: a file name near {around!r} is not UTF-8. Write the shard again with "
                "UTF-8 names."
            ) from error


def idx_bytes(shard: ShardIndex) -> bytes:
    """The content of megatron-energon's ``.tar.idx``: the offsets as little-endian uint64.

    >>> idx_bytes(ShardIndex("0.tar", ["a"], [0, 1024], [()])).hex()
    '00000000000000000004000000000000'
    """
    return struct.pack(f"<{len(shard.offsets)}Q", *shard.offsets)
