"""Data that is fetched in the background, onto a local disk, until it is needed.

A cooker that has the pool (``@cooker(need_cache=True)``) asks it for a :class:`Lazy` instead of the
picture: ``cache.get_lazy(images, "1.jpg")``. While a packing buffer fills, threads read the files
of the lazies in it; what ``lazy.get()`` gives then, in ``postencode_sample`` say, comes from the
local disk.

On the disk are bytes as they were read, and no pickles. A pool never has more there than its limit:
the threads wait for room, and who gets what has not been fetched yet reads it himself, so that he
never waits for room that only his own going on would make. A file belongs to the lazies that lead
to it, and is removed with the last of them or when that has been got.

Every process that uses a pool has a folder, and holds a lock on a file in it. The system lets go of
the lock when the process ends, however it does: a folder whose lock is free is removed by the next
pool that starts or closes beside it.
"""

from __future__ import annotations

import fcntl
import os
import pickle
import shutil
import tempfile
import threading
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from energon_fn.errors import DatasetError, logger
from energon_fn.processes import wire
from energon_fn.samples import SourceInfo
from energon_fn.stores import FileStore, add_source

T = TypeVar("T")

PREFIX = "energon_fn_pool_"
"""What the names of pools' folders begin with."""

LIMITS = ("num_workers", "max_cache_size_gbytes", "max_cache_count")


class Lazy(Generic[T]):
    """A value to be had when it is needed: ``lazy.get()``.

    Getting it again gives the same object, which the lazy holds from then on. When a lazy is
    pickled, as in a batch that goes from a worker to the training process, it is got first and
    its value goes along; but errors are better had in your functions, where they cost one sample.

    >>> lazy = Lazy("1.txt", lambda: ("a rose", None))
    >>> lazy, lazy.get()
    (Lazy('1.txt'), 'a rose')
    """

    def __init__(self, fname: str, fetch: Callable[[], tuple[T, SourceInfo | None]]):
        self.fname = fname
        self._fetch: Callable[[], tuple[T, SourceInfo | None]] | None = fetch
        self._found: tuple[T, SourceInfo | None] | None = None

    def get(self, sample: Any = None) -> T:
        """The value; waits for it if need be, and raises what reading or decoding it raises.

        sample: the one to whose ``__sources__`` it is added where the value was read.
        """
        fetch, found = self._fetch, self._found  # in this order, for the sake of other threads
        if found is None:
            assert fetch is not None
            found = self._found = fetch()
            self._fetch = None  # with it goes the file
        add_source(sample, found[1])
        return found[0]

    def __repr__(self) -> str:
        return f"Lazy({self.fname!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        self.get()
        return _with_value, (self.fname, self._found)


def _with_value(fname: str, found: tuple[T, SourceInfo | None]) -> Lazy[T]:
    return Lazy(fname, lambda: found)


class CachePool(Protocol):
    """Gives lazies, and holds what they lead to."""

    def get_lazy(self, ds: FileStore, fname: str) -> Lazy[Any]:
        """A lazy for what ``ds.get(fname)`` gives. Errors are raised where it is got."""
        ...

    def to_cache(self, data: T, name: str) -> Lazy[T]:
        """Put away what has been loaded already; ``name`` is for messages."""
        ...

    def get(self, ds: FileStore, fname: str, sample: Any = None) -> Any:
        """What the store has, at once and past the cache."""
        return ds.get(fname, sample)

    def close(self) -> None:
        """Let go of threads, files and folder. A pool that is used again begins anew."""
        return None


@dataclass(frozen=True)
class NoCachePool(CachePool):
    """Caches nothing: its lazies read when they are got.

    >>> from energon_fn.stores import SystemFileStore
    >>> lazy = NoCachePool().get_lazy(SystemFileStore(os.path.dirname(__file__)), "caching.py")
    >>> lazy.get()[3:19]
    b'Data that is fet'
    """

    def get_lazy(self, ds: FileStore, fname: str) -> Lazy[Any]:
        return Lazy(fname, partial(_read, ds, fname))

    def to_cache(self, data: T, name: str) -> Lazy[T]:
        return Lazy(name, lambda: (data, None))


def _read(ds: FileStore, fname: str) -> tuple[Any, SourceInfo]:
    data, source = ds.read(fname)
    return ds.decode(fname, data), source


class FileStoreCachePool(CachePool):
    """Fetches files in threads into a folder of its own; decodes them when they are got.

    A pool is its arguments until it is used, and that is what pickles: every process, so every
    worker, has its own folder, threads and limits.

    parent_cache_dir: a folder on a local disk, in which each process makes its own; it is made if
    need be. None: the system's folder for temporary files.
    num_workers: threads that read.
    max_cache_size_gbytes, max_cache_count: how much may be there at any time, in GiB and in files.
    method: "raw", the only one: files are kept as they are read.

    ``to_cache`` puts bytes on the disk, and of other data the memory of the tensors and arrays in
    it; everything else, and what there is no room for, stays in memory.

    >>> from energon_fn.stores import SystemFileStore
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     pool = FileStoreCachePool(parent_cache_dir=folder, max_cache_size_gbytes=0.5)
    ...     lazy = pool.get_lazy(SystemFileStore(os.path.dirname(__file__)), "caching.py")
    ...     name = pool.to_cache(b"a rose", "1.txt")
    ...     lazy.get()[3:19], name.get()
    ...     pool.close()
    ...     os.listdir(folder)
    (b'Data that is fet', b'a rose')
    []
    """

    def __init__(
        self,
        *,
        parent_cache_dir: str | os.PathLike[str] | None = None,
        num_workers: int = 8,
        max_cache_size_gbytes: float = 1024,
        max_cache_count: int = 10_000_000,
        method: str = "raw",
    ):
        if method != "raw":
            raise ValueError(
                f"method is {method!r}; there is only 'raw': files are kept as they are read, and "
                "decoded when they are got. Pickles are not written"
            )
        self._parent = os.path.abspath(parent_cache_dir or tempfile.gettempdir())
        self._limits = num_workers, max_cache_size_gbytes, max_cache_count
        for name, value in zip(LIMITS, self._limits, strict=True):
            if not value > 0:
                raise ValueError(f"{name} is {value}; it must be more than 0")
        self._own: _Cache | None = None

    def __repr__(self) -> str:
        limits = [f"{name}={value}" for name, value in zip(LIMITS, self._limits, strict=True)]
        return f"FileStoreCachePool(parent_cache_dir={self._parent!r}, {', '.join(limits)})"

    def __reduce__(self) -> tuple[Any, ...]:
        arguments: dict[str, Any] = dict(zip(LIMITS, self._limits, strict=True))
        return partial(FileStoreCachePool, parent_cache_dir=self._parent, **arguments), ()

    def get_lazy(self, ds: FileStore, fname: str) -> Lazy[Any]:
        return Lazy(fname, partial(self._fetched, self._cache().item(ds, fname)))

    def to_cache(self, data: T, name: str) -> Lazy[T]:
        head, buffers = b"", list[Any]()
        if type(data) is bytes:
            buffers = [data]
        else:
            with suppress(Exception):  # what does not pickle stays as it is
                head, *buffers = wire.dumps(data)
        cache = self._cache() if buffers else None
        item = cache.kept(name, buffers) if cache else None
        if item is None:
            return Lazy(name, lambda: (data, None))
        sizes = [len(buffer) for buffer in buffers]
        return Lazy(name, partial(self._restored, item, head, sizes))

    def close(self) -> None:
        """End the threads and remove the folder, and those of processes that are gone.

        Call it where the workers were started, too, when they have ended: their pools leave their
        folders behind, since a worker may end at any time.
        """
        if self._own is not None:
            self._own.close()
        remove_leftovers(self._parent)

    # Methods of the pool, so that its lazies keep it.

    def _fetched(self, item: _Item) -> tuple[Any, SourceInfo | None]:
        found = item.cache.bytes_of(item)
        if found is None:  # not there yet, too large, or it could not be read: that is raised now
            return _read(item.ds, item.fname)
        return item.ds.decode(item.fname, found[0]), found[1]

    def _restored(self, item: _Item, head: bytes, sizes: list[int]) -> tuple[Any, None]:
        try:
            data = item.file.read_bytes()
        except OSError as error:
            raise DatasetError(
                f"{item.fname!r}, which was put into the cache, is gone: the pool was closed, or "
                f"its folder removed ({error})"
            ) from error
        if not head:
            return data, None
        rest, buffers = memoryview(bytearray(data)), []
        for size in sizes:
            buffers.append(rest[:size])
            rest = rest[size:]
        return pickle.loads(head, buffers=buffers), None  # the head never was outside this process

    def _cache(self) -> _Cache:
        with _starting:
            own = self._own
            if own is None or own.closed or own.pid != os.getpid():
                own = self._own = _Cache(self._parent, *self._limits)
                weakref.finalize(self, own.close)
            return own


_starting = threading.Lock()
# A fork waits for it, so that the child can use its pools.
os.register_at_fork(
    before=_starting.acquire, after_in_parent=_starting.release, after_in_child=_starting.release
)


QUEUED, READING, HELD, STORED, NOT_HERE = range(5)
"""Where an item is: HELD in memory until there is room, NOT_HERE if it is to be read by others."""


class _Item:
    """A file that is fetched, owned by its lazies and by nothing else."""

    def __init__(self, cache: _Cache, ds: FileStore | None, fname: str):
        self.cache, self.fname = cache, fname
        self.ds: Any = ds
        self.at = QUEUED
        self.shared = False
        self.data: bytes | None = None
        self.source: SourceInfo | None = None
        self.file = Path()


class _Cache:
    """What a pool has in one process: threads, a folder, and the count of what is in it.

    ``changed`` guards all of it. It may be taken again by who holds it, as items can die at any
    moment; then they only append to ``freed``.
    """

    def __init__(self, parent: str, workers: int, gbytes: float, count: int):
        remove_leftovers(parent)
        self.folder, self.lock = _new_folder(parent)
        self.pid, self.closed, self.warned = os.getpid(), False, False
        self.limit, self.most = int(gbytes * 2**30), count
        self.size = self.count = self.number = 0
        self.freed: deque[int] = deque()
        self.changed = threading.Condition(threading.RLock())
        self.queue: deque[weakref.ref[_Item]] = deque()
        self.items: weakref.WeakValueDictionary[tuple[int, str], _Item]
        self.items = weakref.WeakValueDictionary()
        self.workers = workers
        for _ in range(workers):
            threading.Thread(target=self._work, name="energon_fn cache", daemon=True).start()

    def item(self, ds: FileStore, fname: str) -> _Item:
        """The item of that file, which is put into the queue if there is none yet."""
        key = id(ds), fname  # nobody else gets that id while the item holds the store
        with self.changed:
            item = self.items.get(key)
            if item is None:
                item = self.items[key] = _Item(self, ds, fname)
                self.queue.append(weakref.ref(item, self._died))
                self.changed.notify_all()
            else:
                item.shared = True
            return item

    def kept(self, name: str, buffers: list[Any]) -> _Item | None:
        """An item with these bytes on the disk, or None if there is no room."""
        item, size = _Item(self, None, name), sum(map(len, buffers))
        with self.changed:
            room = self._take_room(size)
        if room and self._write(item, buffers, size):
            return item
        self._warn(
            f"there is no room for {name!r} ({size} bytes), which stays in memory: raise "
            "max_cache_size_gbytes or max_cache_count, or take a smaller packing buffer"
        )
        return None

    def bytes_of(self, item: _Item) -> tuple[bytes, SourceInfo | None] | None:
        """The item's bytes and source if they are here, or about to be."""
        if os.getpid() != self.pid:
            return None  # a copy that was made by a fork, without the threads
        with self.changed:
            if item.at == QUEUED:
                if not item.shared:
                    item.at = NOT_HERE  # so that it is not read twice
                return None
            self.changed.wait_for(lambda: item.at != READING or self.closed)
            at, data = item.at, item.data
        if at == STORED:
            with suppress(OSError):
                data = item.file.read_bytes()
        return None if data is None else (data, item.source)

    def _work(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.queue or self.closed)
                if self.closed:
                    return
                waiting = self.queue.popleft()
            self._bring(waiting)

    def _bring(self, waiting: weakref.ref[_Item]) -> None:
        """Read an item and put it on the disk when there is room, as long as anybody wants it."""
        item = waiting()
        with self.changed:
            if item is None or item.at != QUEUED:
                return
            item.at = READING
        try:
            data, item.source = item.ds.read(item.fname)
        except BaseException:
            data = None  # who gets it reads it again, and sees the error
        with self.changed:
            lost = data is None or len(data) > self.limit
            item.at, item.data = (NOT_HERE, None) if lost else (HELD, data)
            self.changed.notify_all()
            del item
            if lost:
                return
            while (item := waiting()) is not None and not self._take_room(len(data)):
                del item  # or it would live while this waits
                if self.closed:
                    return
                self.changed.wait()
            if item is None:
                return
        self._write(item, [data], len(data))

    def _take_room(self, size: int) -> bool:
        """Count a file of that size as there, if it fits in."""
        while self.freed:
            self.size -= self.freed.popleft()
            self.count -= 1
        fits = not self.closed and self.size + size <= self.limit and self.count < self.most
        if fits:
            self.size, self.count = self.size + size, self.count + 1
        return fits

    def _write(self, item: _Item, buffers: list[Any], size: int) -> bool:
        """Write a file that is counted already, and let go of its bytes in memory."""
        with self.changed:
            self.number += 1
            path = Path(self.folder, str(self.number))
        try:
            with open(path, "xb", buffering=0) as file:
                for buffer in buffers:
                    rest = memoryview(buffer).cast("B")
                    while rest:
                        rest = rest[file.write(rest) :]
        except OSError as error:
            self._free(path, size)
            item.at, item.data = NOT_HERE, None
            if not self.closed:
                self._warn(f"{path} cannot be written: {error.strerror}. Going on without it")
            return False
        weakref.finalize(item, self._free, path, size).atexit = False
        with self.changed:
            item.file, item.data, item.at = path, None, STORED
        return True

    def _free(self, path: Path, size: int) -> None:
        if os.getpid() == self.pid:
            with suppress(OSError):
                path.unlink()
            self.freed.append(size)
            self._died()

    def _died(self, item: object = None) -> None:
        if os.getpid() == self.pid:
            with self.changed:
                self.changed.notify_all()

    def _warn(self, what: str) -> None:
        if not self.warned:
            self.warned = True
            logger.warning("cache pool in %s: %s", self.folder, what)

    def close(self) -> None:
        if os.getpid() != self.pid:
            return
        with self.changed:
            if self.closed:
                return
            self.closed = True
            self.changed.notify_all()
        for _ in range(self.workers + 1):  # each may be writing one more file
            shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self.lock)


# -------------------------------------------------------------------------- folders and their locks


def remove_leftovers(parent: str | os.PathLike[str]) -> None:
    """Remove the pools' folders in ``parent`` whose processes are gone.

    >>> remove_leftovers("/no/such/folder")
    """
    for folder in Path(parent).glob(f"{PREFIX}*"):
        lock = _take_lock(folder)
        if lock is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


def _new_folder(parent: str) -> tuple[str, int]:
    """A folder of this process, and the open file that holds its lock."""
    try:
        os.makedirs(parent, exist_ok=True)
        for _ in range(100):  # another process may take a new one for a leftover
            folder = tempfile.mkdtemp(prefix=PREFIX, dir=parent)
            lock = _take_lock(Path(folder))
            if lock is not None:
                return folder, lock
    except OSError as error:
        raise DatasetError(
            f"the cache pool cannot use {parent}: {error.strerror}. Give a folder that can be "
            "written as parent_cache_dir"
        ) from error
    raise DatasetError(
        f"the cache pool cannot lock files in {parent}: give a folder on a local disk as "
        "parent_cache_dir"
    )


def _take_lock(folder: Path) -> int | None:
    """The lock of a pool's folder, held while the file is open; None if it is another's."""
    file, flags = -1, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    with suppress(OSError):
        file = os.open(folder / "lock", flags, 0o600)
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(file).st_nlink:  # nobody removed it meanwhile
            return file
    if file >= 0:
        os.close(file)
    return None
