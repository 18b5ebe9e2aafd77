"""Where every sample lies: a shard is walked once, and from then on read by offset.

:func:`write_index` keeps what :mod:`energon_fn.disk.tars` found in the SQLite file that
megatron-energon 7 has in ``.nv-meta/index.sqlite`` (its schema, as found by preparing a dataset)::

    samples(tar_file_id, sample_key, sample_index, byte_offset, byte_size)
    sample_parts(tar_file_id, sample_index, part_name, content_byte_offset, content_byte_size)

and, if it was prepared with media metadata, the tables of :mod:`energon_fn.disk.media`.

``tar_file_id`` is the shard's position in ``shard_counts`` of ``.nv-meta/.info.json``. A dataset
that was not prepared gets such a file in the user's cache folder (:func:`cached_index`).
:class:`Index` reads either.

>>> import tempfile, tarfile, io
>>> from energon_fn.disk.tars import index_shard
>>> folder = tempfile.TemporaryDirectory()
>>> with tarfile.open(folder.name + "/0.tar", "w") as tar:
...     for name in ("a/1.jpg", "a/1.detail.json", "a/2.jpg"):
...         info = tarfile.TarInfo(name)
...         info.size = len(name)
...         tar.addfile(info, io.BytesIO(name.encode()))
>>> shard = index_shard(folder.name + "/0.tar", "0.tar")
>>> shard.keys, shard.offsets
(['a/1', 'a/2'], [0, 2048, 3072])
>>> shard.parts[0]
(('jpg', 512, 7), ('detail.json', 1536, 15))
>>> write_index(folder.name + "/index.sqlite", [shard]).counts
{'0.tar': 2}
>>> index = Index(folder.name + "/index.sqlite", folder.name, ("0.tar",))
>>> index.find("a/2"), index.parts(0, 1)
((0, 1), ('a/2', (('jpg', 2560, 7),)))
>>> index.keys(0, 0, 2)
['a/1', 'a/2']
>>> folder.cleanup()
"""

from __future__ import annotations

import io
import os
import shutil
import sqlite3
import sys
import tarfile
import threading
from array import array
from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from tqdm import tqdm

from energon_fn.disk import files
from energon_fn.disk.tars import TAR_BLOCK, Media, Part, ShardIndex, index_shards
from energon_fn.errors import DatasetError, logger

Entry = tuple[str, tuple[Part, ...]]
"""A sample's key and its parts, in the order of the tar."""

BLOCK = 128  # samples that one query fetches
_KEPT_BLOCKS = 1024  # of all indexes in a process: about 16 MB if samples have two parts
_KEPT_OPEN = 64  # index files that one process keeps open, whatever their number

_SCHEMA = """
CREATE TABLE samples (tar_file_id INTEGER NOT NULL, sample_key TEXT NOT NULL{unique},
    sample_index INTEGER NOT NULL, byte_offset INTEGER, byte_size INTEGER);
CREATE TABLE sample_parts (tar_file_id INTEGER, sample_index INTEGER, part_name TEXT,
    content_byte_offset INTEGER, content_byte_size INTEGER);
"""
_INDICES = """
CREATE INDEX idx_samples_by_tar_and_idx ON samples(tar_file_id, sample_index);
CREATE INDEX idx_sample_parts_seq ON sample_parts(tar_file_id, sample_index, content_byte_offset);
CREATE INDEX idx_sample_parts_full ON sample_parts(tar_file_id, sample_index, part_name,
    content_byte_offset, content_byte_size);
"""
_MEDIA_SCHEMA = """
DROP TABLE IF EXISTS media_metadata;
DROP TABLE IF EXISTS media_filters;
CREATE TABLE media_metadata (entry_key TEXT PRIMARY KEY, metadata_type TEXT NOT NULL,
    metadata_json TEXT NOT NULL);
CREATE TABLE media_filters (filter_id INTEGER PRIMARY KEY AUTOINCREMENT, strategy TEXT NOT NULL,
    patterns TEXT, created_at_utc TEXT DEFAULT CURRENT_TIMESTAMP, UNIQUE(strategy, patterns));
"""
# Only in the cache: keys may occur twice, and a shard that did not change is not walked again.
_CACHE_ENDING = ".1.sqlite"  # with the version of its format
_CACHE_SCHEMA = """
CREATE TABLE shards (tar_file_id INTEGER PRIMARY KEY, name TEXT NOT NULL, size INTEGER NOT NULL,
    mtime_ns INTEGER NOT NULL, sample_count INTEGER NOT NULL);
"""
_CACHE_INDICES = "CREATE INDEX idx_samples_by_key ON samples(sample_key);"
_COLUMNS = {
    "samples": ("sample_key", "sample_index", "byte_offset", "byte_size"),
    "sample_parts": ("sample_index", "part_name", "content_byte_offset", "content_byte_size"),
}
_FIVE = "?, ?, ?, ?, ?"
_SELECT_SAMPLES = """SELECT sample_key, byte_offset FROM samples
    WHERE tar_file_id = ? AND sample_index >= ? AND sample_index < ? ORDER BY sample_index"""
_SELECT_KEYS = """SELECT sample_key FROM samples
    WHERE tar_file_id = ? AND sample_index >= ? AND sample_index < ? ORDER BY sample_index"""
_SELECT_PARTS = """SELECT sample_index, part_name, content_byte_offset, content_byte_size
    FROM sample_parts WHERE tar_file_id = ? AND sample_index >= ? AND sample_index < ?
    ORDER BY sample_index, content_byte_offset"""
_SELECT_END = """SELECT byte_offset + byte_size FROM samples WHERE tar_file_id = ?
    ORDER BY sample_index DESC LIMIT 1"""
_PREPARE_AGAIN = "Prepare the dataset again: `energon-fn prepare {root}`."


# ------------------------------------------------------------------------------ writing the index


@dataclass(frozen=True)
class IndexSummary:
    """What :func:`write_index` went over.

    ``counts``: samples by shard name, in order. ``part_names``: in the order first seen.
    ``duplicates``: (key, shard name) of every sample whose key an earlier one has.
    """

    counts: dict[str, int]
    part_names: tuple[str, ...]
    duplicates: tuple[tuple[str, str], ...]


def write_index(
    path: str | os.PathLike[str],
    shards: Iterable[ShardIndex],
    media_filters: Sequence[tuple[str, str]] = (),
) -> IndexSummary:
    """Write an ``index.sqlite`` as megatron-energon has it, one shard after the other.

    The shards' positions become their ``tar_file_id``. The file appears whole or not at all. Keys
    are unique in it: if :attr:`IndexSummary.duplicates` is not empty, **nothing was written**.
    ``media_filters``: strategy and patterns that the shards' media metadata was made with.
    """
    counts: dict[str, int] = {}
    part_names: dict[str, None] = {}
    duplicates: list[tuple[str, str]] = []
    with suppress(_NotWritten), files.replacing(path) as temporary, _explained(str(path)):
        with _writing(temporary, _SCHEMA.format(unique=" UNIQUE")) as db:
            if media_filters:
                with _lock:
                    _add_media_tables(db, media_filters)
            for tar_file_id, shard in enumerate(shards):
                with _lock:
                    taken = _insert(db, tar_file_id, shard)
                duplicates += [(key, shard.name) for key in taken]
                part_names.update((part[0], None) for sample in shard.parts for part in sample)
                counts[shard.name] = len(shard)
            if not duplicates:
                with _lock:
                    db.executescript(_INDICES)
        if duplicates:
            raise _NotWritten
    return IndexSummary(counts, tuple(part_names), tuple(duplicates))


class _NotWritten(Exception):
    """Leaves :func:`files.replacing` without a file."""


def write_media(
    path: str | os.PathLike[str],
    entries: Iterable[Sequence[Media]],
    media_filters: Sequence[tuple[str, str]],
    index: str | None = None,
) -> int:
    """Write an ``index.sqlite`` with this media metadata, and return how many files it is of.

    index: an index file to take the rest from; without it the file has nothing else.
    """
    with files.replacing(path) as temporary, _explained(str(path)):
        if index is not None:
            shutil.copyfile(index, temporary)
        with _writing(temporary, "") as db:
            with _lock:
                _add_media_tables(db, media_filters)
                db.execute("BEGIN")
            for some in entries:
                with _lock:
                    _insert_media(db, some)
            with _lock:
                db.execute("COMMIT")
                count: int = db.execute("SELECT COUNT(*) FROM media_metadata").fetchone()[0]
    return count


def _add_media_tables(db: sqlite3.Connection, media_filters: Sequence[tuple[str, str]]) -> None:
    db.executescript(_MEDIA_SCHEMA)
    query = "INSERT OR IGNORE INTO media_filters (strategy, patterns) VALUES (?, ?)"
    db.executemany(query, media_filters)


def _insert_media(db: sqlite3.Connection, entries: Sequence[Media]) -> None:
    db.executemany("INSERT OR REPLACE INTO media_metadata VALUES (?, ?, ?)", entries)


@contextmanager
def _writing(path: str, schema: str) -> Iterator[sqlite3.Connection]:
    """A new database. Whoever writes holds the lock, but not while shards are walked: that forks.

    It is a temporary file of our own: no journal, no flushing, and no locks, which network disks
    lack.
    """
    with _lock:
        db = sqlite3.connect(f"file:{quote(path)}?nolock=1", uri=True, isolation_level=None)
    try:
        with _lock:
            db.executescript("PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF;")
            db.executescript(f"PRAGMA cache_size=-65536; {schema}")
        yield db
    finally:
        with _lock:
            db.close()


def _insert(db: sqlite3.Connection, tar_file_id: int, shard: ShardIndex) -> list[str]:
    """Add a shard. Returns the keys that were there before, whose samples were not added."""
    here = shard.offsets
    rows = (
        (tar_file_id, key, i, here[i], here[i + 1] - here[i]) for i, key in enumerate(shard.keys)
    )
    before = db.total_changes
    db.execute("BEGIN")
    db.executemany(f"INSERT OR IGNORE INTO samples VALUES ({_FIVE})", rows)
    taken: list[str] = []
    if db.total_changes - before < len(shard):
        query = "SELECT tar_file_id, sample_index FROM samples WHERE sample_key = ?"
        taken = [
            key
            for i, key in enumerate(shard.keys)
            if db.execute(query, (key,)).fetchone() != (tar_file_id, i)
        ]
    db.executemany(
        f"INSERT INTO sample_parts VALUES ({_FIVE})",
        ((tar_file_id, i, *part) for i, sample in enumerate(shard.parts) for part in sample),
    )
    if shard.media:
        _insert_media(db, shard.media)
    db.execute("COMMIT")
    return taken


# ------------------------------------------------------------- an index in the user's cache folder


def cached_index(
    root: str | os.PathLike[str], names: Sequence[str], workers: int | None = None
) -> tuple[str, dict[str, int]]:
    """An index of these shards that is not the dataset's own, made if need be: path and counts.

    It lies in the cache folder, see :func:`files.kept`, for each state of the shards' names, sizes
    and times of change. A dataset that changed gets another one, for which only new and changed
    shards are walked. Keys may occur twice in it (a warning says so).
    """
    real = os.path.realpath(root)
    stamps = [(name, *files.size_mtime(os.path.join(real, name))) for name in names]

    def make(temporary: str, others: list[Path]) -> None:
        with _explained(os.path.dirname(temporary)):
            _fill_cache(temporary, others[-1:], real, stamps, workers)

    path = str(files.kept(real, stamps, _CACHE_ENDING, make))
    with opened(path) as db:
        query = "SELECT name, sample_count FROM shards ORDER BY tar_file_id"
        return path, dict(db.execute(query).fetchall())


def _fill_cache(
    path: str, old: list[Path], root: str, stamps: list[tuple[str, int, int]], workers: int | None
) -> None:
    """Make a cached index from what an old one has of the same shards and from walking the rest."""
    schema = _SCHEMA.format(unique="") + _CACHE_SCHEMA
    with _writing(path, schema) as db:
        kept: dict[tuple[str, int, int], tuple[int, int]] = {}
        for other in old:
            query = "SELECT name, size, mtime_ns, tar_file_id, sample_count FROM old.shards"
            with _lock:
                db.execute("ATTACH ? AS old", (_read_only_uri(str(other)),))
                kept = {row[:3]: row[3:] for row in db.execute(query)}
        todo = [stamp[0] for stamp in stamps if stamp not in kept]
        walked = iter(
            tqdm(
                index_shards(root, todo, workers),
                total=len(todo),
                desc=f"indexing {root}",
                unit="shard",
                disable=None if todo else True,  # None: shown on a terminal only
            )
        )
        for tar_file_id, stamp in enumerate(stamps):
            shard = None if stamp in kept else next(walked)
            with _lock:
                if shard is None:
                    old_id, count = kept[stamp]
                    _copy(db, old_id, tar_file_id)
                else:
                    count = len(shard)
                    _insert(db, tar_file_id, shard)
                db.execute(f"INSERT INTO shards VALUES ({_FIVE})", (tar_file_id, *stamp, count))
        list(walked)  # ends the progress bar
        query = "SELECT sample_key FROM samples GROUP BY sample_key HAVING COUNT(*) > 1 LIMIT 1"
        with _lock:
            db.executescript(_INDICES + _CACHE_INDICES)
            twice = db.execute(query).fetchone()
        if twice is not None:
            logger.warning(
                "%s: the key %r occurs more than once. Samples are read by position, so all are "
                "there, but a key does not name one; `energon-fn prepare` would refuse them.",
                root,
                twice[0],
            )


def _copy(db: sqlite3.Connection, old_id: int, tar_file_id: int) -> None:
    """Add a shard as the attached old index has it."""
    for table in ("samples", "sample_parts"):
        columns = ", ".join(_COLUMNS[table])
        query = f"INSERT INTO {table} SELECT ?, {columns} FROM old.{table} WHERE tar_file_id = ?"
        db.execute(query, (tar_file_id, old_id))


# ------------------------------------------------------------------------------ reading the index


def has_parts(path: str | os.PathLike[str]) -> bool:
    """Whether this is a finished index with the places of all parts (older ones have none).

    >>> has_parts("/no/such/index.sqlite")
    False
    """
    if not os.path.exists(path):
        return False
    with opened(os.fspath(path)) as db:
        names = {name for (name,) in db.execute("SELECT name FROM sqlite_master")}
    return {"samples", "sample_parts", "idx_samples_by_tar_and_idx"} <= names


@dataclass(frozen=True, slots=True)  # quicker to look into than a named tuple
class _Block:
    """Neighbouring samples, in few objects: many blocks are kept, and each object costs memory."""

    keys: list[str]
    firsts: array[int]
    """Each sample's first part in the lists below and, last, how many parts there are."""
    names: list[str]
    offsets: array[int]
    sizes: array[int]

    @classmethod
    def of(cls, keys: list[str], first: int, rows: list[tuple[int, str, int, int]]) -> _Block:
        samples, names, offsets, sizes = zip(*rows, strict=True) if rows else ((), (), (), ())
        firsts = array("I", (bisect_left(samples, first + i) for i in range(len(keys) + 1)))
        return cls(keys, firsts, [*map(sys.intern, names)], array("q", offsets), array("q", sizes))

    def entry(self, i: int) -> Entry:
        first, end = self.firsts[i], self.firsts[i + 1]
        if end - first == 1:
            return self.keys[i], ((self.names[first], self.offsets[first], self.sizes[first]),)
        some = slice(first, end)
        return self.keys[i], tuple(
            zip(self.names[some], self.offsets[some], self.sizes[some], strict=True)
        )


class Index:
    """Random access to an index file: where the parts of a sample lie, and which sample has a key.

    ``shards`` are the dataset's shards in the order of their ``tar_file_id``, relative to ``root``.
    The file is opened when it is needed, and read in blocks of 128 samples. When a block is first
    read, the shard is checked to be still the one that was indexed.

    Pickles as its arguments. May be used from several threads, and after a fork.
    """

    def __init__(
        self, path: str, root: str, shards: tuple[str, ...], remedy: str = _PREPARE_AGAIN
    ) -> None:
        self.path, self.root, self.shards, self.remedy = path, root, shards, remedy
        self._blocks: dict[tuple[int, int], _Block] = {}
        self._stamp: tuple[int, int] | None = None  # of the file when it was first opened

    def __reduce__(self) -> tuple[Any, ...]:
        return Index, (self.path, self.root, self.shards, self.remedy)

    def parts(self, shard: int, sample: int) -> Entry:
        """Key and parts of a sample by its shard's number and its place in the shard.

        Raises :class:`DatasetError` if there is no such sample, or if the shard is not what it was
        when it was indexed.
        """
        # Looking into a dict needs no lock. So the oldest block goes first, not the least used.
        block = self._blocks.get((shard, sample // BLOCK))
        if block is None:
            block = self._read_block(shard, sample // BLOCK)
        try:
            return block.entry(sample % BLOCK)
        except IndexError:
            raise self._lacks(shard, sample) from None

    def find(self, key: str) -> tuple[int, int] | None:
        """Number of the shard and place in it of the (first) sample with this key, or None."""
        return next(iter(self.find_all(key)), None)

    def find_all(self, key: str) -> list[tuple[int, int]]:
        """Every sample with this key: more than one only if the dataset was not prepared."""
        query = "SELECT tar_file_id, sample_index FROM samples WHERE sample_key = ? ORDER BY 1, 2"
        with self._connection() as db:
            return db.execute(query, (key,)).fetchall()

    def keys(self, shard: int, start: int, stop: int) -> list[str]:
        """The keys of the samples ``start`` to ``stop`` (excluded) of a shard, in one query.

        Nothing is kept of them, and the shard is not looked at. Raises :class:`DatasetError` if
        there are not so many.
        """
        with self._connection() as db:
            rows = db.execute(_SELECT_KEYS, (shard, start, stop)).fetchall()
        if len(rows) < stop - start:
            raise self._lacks(shard, start + len(rows))
        return [key for (key,) in rows]

    def _lacks(self, shard: int, sample: int) -> DatasetError:
        return DatasetError(
            f"{self.path} has no sample {sample} of {self.shards[shard]}: it does not fit the "
            f"counts of the dataset. {self.remedy.format(root=self.root)}"
        )

    def _read_block(self, shard: int, number: int) -> _Block:
        first = number * BLOCK
        where = (shard, first, first + BLOCK)
        with self._connection() as db:
            samples = db.execute(_SELECT_SAMPLES, where).fetchall()
            rows = db.execute(_SELECT_PARTS, where).fetchall()
            end = db.execute(_SELECT_END, (shard,)).fetchone()
        block = _Block.of([key for key, _ in samples], first, rows)
        if samples:
            heads = [(samples[i][1], block.entry(i)) for i in {0, len(samples) - 1}]
            self._check(shard, heads, end[0])
        with _lock:
            self._blocks[shard, number] = block
            _kept_blocks.append((self._blocks, (shard, number)))
            _forget_blocks(_KEPT_BLOCKS)
        return block

    def _check(self, shard: int, samples: list[tuple[int, Entry]], end: int) -> None:
        """Compare the shard with some samples of the index, and with where it says the shard ends.

        Each sample comes with the offset of its first header.
        """
        path = os.path.join(self.root, self.shards[shard])
        if files.let_go_if_replaced(path):
            with _lock:
                _forget_blocks(0)  # they say where things were in the one before
        size = files.stream_size(path)
        fits = size >= end and not any(files.read_at(path, end, min(TAR_BLOCK, size - end)))
        for at, (key, parts) in samples:
            fits = fits and _is_at(path, at, f"{key}.{parts[0][0]}", *parts[0][1:])
        if not fits:
            keys = " or ".join(repr(key) for _, (key, _) in samples)
            raise DatasetError(
                f"{path} changed since it was indexed: {keys} or its end is not where it was. "
                f"{self.remedy.format(root=self.root)}"
            )

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        if self._stamp is None:
            self._stamp = _stamp(self.path)
        with opened(self.path, self._stamp) as db:
            yield db


@contextmanager
def opened(path: str, stamp: tuple[int, int] | None = None) -> Iterator[sqlite3.Connection]:
    """The database to ask something of; nobody else uses it, or any other, meanwhile.

    It stays open for the next time, until :data:`_KEPT_OPEN` others were used since.
    stamp: size and time of change that it had when it was first opened; else it is the file that is
    there now. Raises :class:`DatasetError` if that one must be opened again and is not there.
    """
    now = stamp or _stamp(path)
    with _lock, _explained(path):
        db = _connections.pop((path, now), None)
        if db is None:
            if stamp is not None and _stamp(path) != stamp:
                raise DatasetError(
                    f"{path} was replaced since it was opened: the dataset was prepared again. "
                    "Open it again."
                )
            while len(_connections) >= _KEPT_OPEN:
                _connections.pop(next(iter(_connections))).close()
            db = sqlite3.connect(_read_only_uri(path), uri=True, check_same_thread=False)
        try:
            yield db
        except BaseException:
            db.close()
            raise
        _connections[path, now] = db  # the last one: that used longest ago goes first


def _stamp(path: str) -> tuple[int, int]:
    # In the cache a name stands for one content, and the time says when it was last used.
    return (0, 0) if path.endswith(_CACHE_ENDING) else files.size_mtime(path)


_connections: dict[tuple[str, tuple[int, int]], sqlite3.Connection] = {}
_kept_blocks: deque[tuple[dict[tuple[int, int], _Block], tuple[int, int]]] = deque()
"""In which dict, and where in it: the blocks of all indexes, the oldest first."""
_lock = threading.Lock()
"""Held by whoever is inside of SQLite. A fork waits for it: SQLite has locks of its own, and a
child in which a thread that is gone holds one would hang."""


def _forget_blocks(most: int) -> None:
    """Let go of the oldest blocks but this many (called locked)."""
    while len(_kept_blocks) > most:
        blocks, where = _kept_blocks.popleft()
        blocks.pop(where, None)


def _forked() -> None:
    _connections.clear()  # they must not cross a fork
    _lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_forked)


def _is_at(path: str, header: int, name: str, offset: int, size: int) -> bool:
    """Whether the tar has this file, its first header (it may have several) and content there."""
    headers = files.read_at(path, header, offset - header)
    try:
        member = tarfile.TarFile(fileobj=io.BytesIO(headers)).next()
    except tarfile.TarError:
        return False
    found = member and (member.name, member.offset_data, member.size)
    return found == (name, offset - header, size)


def _read_only_uri(path: str) -> str:
    # Immutable: no locks, which network disks lack. Nobody writes to an index once it is there.
    return f"file:{quote(os.path.abspath(path))}?mode=ro&immutable=1"


@contextmanager
def _explained(path: str) -> Iterator[None]:
    try:
        yield
    except sqlite3.DatabaseError as error:
        if files.too_many_open():
            raise DatasetError(f"{path} cannot be opened: {files.TOO_MANY_OPEN}") from error
        raise DatasetError(
            f"{path}: the index cannot be used: {error}. If the disk is not full, remove it, or "
            "prepare the dataset again (`energon-fn prepare`)."
        ) from error
