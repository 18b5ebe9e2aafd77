"""The one seam of file access: shards, settings and folders are read and written through here.

Shards are read with :func:`read_at`, at an offset and never by walking. A compressed shard
(``.tar.gz``, ``.tgz``) has no offsets of its own, so it is decompressed once per process and all
offsets refer to the decompressed stream.

An object store would be added by teaching these functions its paths. Files of the library's own
are opened elsewhere too: SQLite opens the indexes (:mod:`energon_fn.disk.index`), numpy the tables
of joins (:mod:`energon_fn.disk.joined`), :mod:`energon_fn.caching` what it puts aside; and what
:func:`replacing` names is written by whoever asked.
"""

from __future__ import annotations

import errno
import glob
import gzip
import hashlib
import io
import os
import shutil
import stat
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from energon_fn.disk.braces import expand_braces
from energon_fn.errors import DatasetError

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
GZIP_SUFFIXES = (".tar.gz", ".tgz")

MAX_OPEN = 256
"""Shards that one process keeps open, whatever their number: a quarter of the usual limit."""

MAX_UNPACKED = 512
"""Decompressed shards that one process keeps: more than others, as one takes long to make."""

TOO_MANY_OPEN = (
    "this process has as many files open as it may. Raise that number, by `ulimit -n 65536` in the "
    "shell that starts it, or start fewer loaders in it."
)
"""What to tell of EMFILE."""

_LIFETIME = 30 * 86400.0  # seconds after its last use that a file of the cache is kept
_PIECE_BUFFER = 2**15  # bytes read at a time: the header of most pictures
_BROKEN_GZIP = (EOFError, gzip.BadGzipFile, zlib.error)
_TOO_MANY = (errno.EMFILE, errno.ENFILE)
_WITH_SAMPLES = (*TAR_SUFFIXES, ".jsonl")  # read at offsets that others keep
_KEPT_STAMPS = 2**16


def is_tar(name: str | os.PathLike[str]) -> bool:
    """Whether the name is a shard's: ``.tar``, ``.tar.gz`` or ``.tgz``.

    >>> is_tar("0001.tar"), is_tar("0001.tar.idx")
    (True, False)
    """
    return os.fspath(name).endswith(TAR_SUFFIXES)


def size_mtime(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Size in bytes and time of last change in nanoseconds: what an index is invalidated by.

    >>> size_mtime(__file__)[0] == len(read_bytes(__file__))
    True
    """
    with _explained(path):
        found = os.stat(path)
    return found.st_size, found.st_mtime_ns


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """The whole file as it is on disk.

    >>> read_bytes("/no/such/file")
    Traceback (most recent call last):
        ...
    energon_fn.errors.DatasetError: /no/such/file does not exist: check the path, ...
    """
    with _explained(path), open(path, "rb") as file:
        return file.read()


def read_at(path: str | os.PathLike[str], offset: int, size: int) -> bytes:
    """Exactly ``size`` bytes of a shard from ``offset`` on (of its decompressed stream).

    May be called from any thread, and after a fork: there is no shared file position.

    >>> read_at(__file__, 3, 7)
    b'The one'
    >>> read_at(__file__, 10**9, 1)
    Traceback (most recent call last):
        ...
    energon_fn.errors.DatasetError: ...files.py ends before byte 1000000001 ...
    """
    path = os.fspath(path)
    data = _shard(path).pread(path, offset, size)
    if len(data) < size:
        raise DatasetError(
            f"{path} ends before byte {offset + size} (wanted {size} bytes at {offset}): it was "
            "cut short or changed since it was indexed. Restore the file, or index the dataset "
            "again (`energon-fn prepare`)."
        )
    return data


def will_need(path: str | os.PathLike[str], offset: int, size: int) -> None:
    """Have the system begin to read these bytes, for a :func:`read_at` that comes soon.

    >>> will_need(__file__, 3, 7)
    """
    if hasattr(os, "posix_fadvise"):
        _shard(os.fspath(path)).will_need(offset, size)


def open_piece(path: str | os.PathLike[str], offset: int, size: int) -> IO[bytes]:
    """A piece of a shard (of its decompressed stream) as a file that only reads what is asked for.

    >>> with open_piece(__file__, 3, 7) as file:
    ...     file.seek(4), file.read()
    (4, b'one')
    """
    return io.BufferedReader(_Piece(os.fspath(path), offset, size), _PIECE_BUFFER)


def open_file(path: str | os.PathLike[str]) -> IO[bytes]:
    """A file that is no shard, opened for reading as it is on disk.

    >>> with open_file(__file__) as file:
    ...     file.read(10)
    b'\"""The one'
    """
    with _explained(path):
        return open(path, "rb")  # whoever called closes it


def stream_size(path: str | os.PathLike[str]) -> int:
    """Length in bytes of what :func:`read_at` reads: of the decompressed stream, or of the file.

    Asking also notices that the file was replaced since it was opened, so ask before trusting
    what :func:`read_at` gives after a change.

    >>> stream_size(__file__) == size_mtime(__file__)[0]
    True
    """
    path = os.fspath(path)
    let_go_if_replaced(path)
    return _shard(path).size


def let_go_if_replaced(path: str | os.PathLike[str]) -> bool:
    """Whether the file is no longer the one that was opened; then it is opened anew when next read.

    Whoever asks knows to forget where things were in it. Nobody else gets to read the new file:
    :func:`read_at` gives the bytes of the one that was opened first, or raises DatasetError.

    >>> let_go_if_replaced(__file__)
    False
    """
    path = os.fspath(path)
    with _explained(path):
        identity = _identity(os.stat(path))
    with _lock:
        shard = _open_shards.get(path) or _unpacked.get(path)
        if (shard is None or shard.identity == identity) and (
            _stamps.get(path, identity[2:]) == identity[2:]
        ):
            return False
        for known in (_open_shards, _unpacked, _stamps):
            known.pop(path, None)
    return True


def too_many_open() -> bool:
    """Whether this process can open no more files.

    >>> too_many_open()
    False
    """
    try:
        os.close(os.open(os.devnull, os.O_RDONLY))
    except OSError as error:
        return error.errno in _TOO_MANY
    return False


def append_line(path: str | os.PathLike[str], line: bytes) -> None:
    """Put a line at the end of a file in one write, as other processes may do at the same time.

    An empty line only makes the file if it is not there. Raises OSError if it cannot be written.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     append_line(folder + "/log", b"one\\n")
    ...     append_line(folder + "/log", b"two\\n")
    ...     read_bytes(folder + "/log")
    b'one\\ntwo\\n'
    """
    file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        if line and (end := os.fstat(file).st_size) and os.pread(file, 1, end - 1) != b"\n":
            line = b"\n" + line  # whoever wrote the last line was ended in the middle of it
        written = os.write(file, line)
    finally:
        os.close(file)
    if written < len(line):
        raise OSError(errno.ENOSPC, "no room for a whole line", os.fspath(path))


def list_files(folder: str | os.PathLike[str], hidden: str) -> list[str]:
    """Names of all files below the folder, relative to it with ``/``, sorted folder by folder.

    Links are followed, but not in circles; the folder called ``hidden`` is left out.

    >>> import tempfile, pathlib
    >>> with tempfile.TemporaryDirectory() as d:
    ...     for name in ("b", ".meta"):
    ...         (pathlib.Path(d) / name).mkdir()
    ...     for name in ("b/1.jpg", "c.txt", "a.txt", ".meta/index"):
    ...         (pathlib.Path(d) / name).touch()
    ...     list_files(d, ".meta")
    ['a.txt', 'b/1.jpg', 'c.txt']
    """

    return _below(
        folder, lambda name, entry: name != hidden and (entry.is_dir() or entry.is_file())
    )


def list_tars(folder: str | os.PathLike[str]) -> list[str]:
    """Names of all shards below the folder, relative to it with ``/``, sorted folder by folder.

    Links are followed, but not in circles; hidden folders and files are left out.

    >>> import tempfile, pathlib
    >>> with tempfile.TemporaryDirectory() as d:
    ...     (pathlib.Path(d) / "b").mkdir()
    ...     for name in ("b/1.tar", "a.tgz", "a.txt"):
    ...         (pathlib.Path(d) / name).touch()
    ...     list_tars(d)
    ['a.tgz', 'b/1.tar']
    """

    def wanted(name: str, entry: os.DirEntry[str]) -> bool:
        return not entry.name.startswith(".") and (entry.is_dir() or is_tar(name))

    return _below(folder, wanted)


def _below(
    folder: str | os.PathLike[str], wanted: Callable[[str, os.DirEntry[str]], bool]
) -> list[str]:
    """Names of the files below the folder that are wanted, and lie in folders that are."""

    def below(where: str, prefix: str, above: tuple[str, ...]) -> Iterator[str]:
        real = os.path.realpath(where)
        if real in above:  # a link to a folder that it is in
            return
        with os.scandir(where) as found:
            entries = sorted(found, key=lambda entry: entry.name)
        for entry in entries:
            name = prefix + entry.name
            if not wanted(name, entry):
                continue
            if entry.is_dir():
                yield from below(entry.path, f"{name}/", (*above, real))
            else:
                yield name

    with _explained(folder):
        return [*below(os.fspath(folder), "", ())]


def expand(pattern: str | os.PathLike[str], endings: tuple[str, ...] = TAR_SUFFIXES) -> list[str]:
    """The shards that a brace or glob pattern names: braces as written, globs sorted.

    endings: what their names end in.

    Raises :class:`DatasetError` if a named shard does not exist or a glob finds none.

    >>> import tempfile, pathlib
    >>> with tempfile.TemporaryDirectory() as d:
    ...     for name in ("a.tar", "b.tar", "c0.tar", "c1.tar"):
    ...         (pathlib.Path(d) / name).touch()
    ...     [os.path.basename(p) for p in expand(d + "/{b,a,c*}.tar")]
    ['b.tar', 'a.tar', 'c0.tar', 'c1.tar']
    """
    pattern = os.fspath(pattern)
    # A file may have a name that merely looks like a pattern.
    names = [pattern] if os.path.exists(pattern) else expand_braces(pattern)
    found: dict[str, None] = {}
    for name in names:
        if os.path.exists(name) or not glob.has_magic(name):
            matches = [name]
        else:
            matches = [one for one in glob.glob(name, recursive=True) if one.endswith(endings)]
            matches.sort(key=_by_folder)
        if not matches or not os.path.exists(matches[0]):
            origin = f" (from {pattern!r})" if name != pattern else ""
            raise DatasetError(
                f"no shard matches {name!r}{origin}: check the path, or mount what it is on."
            )
        if not matches[0].endswith(endings):
            raise DatasetError(f"{name} is not a shard: those end in {', '.join(endings)}.")
        found.update(dict.fromkeys(matches))
    return list(found)


def write_atomic(path: str | os.PathLike[str], data: bytes) -> None:
    """Write the whole file or nothing: to a temporary name, flushed to disk, then renamed.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as d:
    ...     write_atomic(d + "/a", b"1")
    ...     read_bytes(d + "/a"), os.listdir(d)
    (b'1', ['a'])
    """
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(data)


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[str]:
    """A temporary name beside ``path``: renamed to it when the block ends well, else removed.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as d:
    ...     with replacing(d + "/a") as temporary:
    ...         _ = Path(temporary).write_text("text")
    ...     os.listdir(d)
    ['a']
    """
    folder, name = os.path.split(os.path.abspath(path))
    with _explained(path):
        temporary = os.path.join(folder, f".{name}.{os.getpid()}.{os.urandom(4).hex()}.tmp")
        try:
            yield temporary
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            if os.path.exists(temporary):
                os.unlink(temporary)


def cache_folder() -> Path:
    """The user's cache folder, existing and writable; a temporary one if none can be had.

    ``$ENERGON_FN_CACHE``, else ``$XDG_CACHE_HOME/energon_fn``, else ``~/.cache/energon_fn``.

    >>> cache_folder().is_dir()
    True
    """
    named = os.environ.get("ENERGON_FN_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = Path(named or os.path.join(base, "energon_fn"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK | os.X_OK):
            return folder
    except OSError:
        pass
    return _temporary_cache()


def kept(root: str, stamps: object, ending: str, make: Callable[[str, list[Path]], object]) -> Path:
    """A file in the user's cache folder about what lies at ``root``, made if need be.

    root: a real path. stamps: what tells this state of it from another one, sizes and times of
    change say. Both are in the file's name: it never changes once it is there, several processes
    may make it at once, and of what changed another one is made. Unused for a month, it is removed.
    ending: of its name, with the version of its format; such as ".1.sqlite".
    make: writes the file; called with its temporary name and the files of other states, of which
    the last one was used last.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as d:
    ...     write = lambda path, others: Path(path).write_text(f"{len(others)} before")
    ...     one = kept(d, ("a", 1), ".txt", write)
    ...     other = kept(d, ("a", 2), ".txt", write)
    ...     kept(d, ("a", 1), ".txt", write) == one, one.read_text(), other.read_text()
    (True, '0 before', '1 before')
    """
    prefix = hashlib.sha256(root.encode(errors="surrogateescape")).hexdigest()[:16]
    version = hashlib.sha256(repr(stamps).encode()).hexdigest()[:32]
    folder = cache_folder()
    path = folder / f"{prefix}-{version}{ending}"
    if path.exists():
        with suppress(OSError):
            os.utime(path)  # when it was last used
        return path
    others = sorted((_last_used(other), other) for other in folder.glob(f"{prefix}-*{ending}"))
    with replacing(path) as temporary:
        make(temporary, [other for _, other in others])
    leftovers = [(_last_used(other), other) for other in folder.glob(f".{prefix}-*.tmp")]
    for used, other in others + leftovers:
        if used < time.time() - _LIFETIME:
            other.unlink(missing_ok=True)
    return path


def _last_used(path: Path) -> float:
    with suppress(OSError):
        return path.stat().st_mtime
    return 0.0  # another process has just removed it


@contextmanager
def open_stream(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """A shard opened for reading once from its beginning, decompressed on the way.

    >>> with open_stream(__file__) as file:
    ...     file.read(10)
    b'\"""The one'
    """
    with _explained(path), open(path, "rb") as file:
        if not is_packed(os.fspath(path)):
            yield file
        else:
            with gzip.GzipFile(fileobj=file) as stream:
                yield stream  # type: ignore[misc]  # GzipFile is a binary file in all but name


class _Piece(io.RawIOBase):
    """What :func:`open_piece` buffers."""

    def __init__(self, path: str, offset: int, size: int) -> None:
        self.path, self.offset, self.size, self.at = path, offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.at = max((0, self.at, self.size)[whence] + offset, 0)
        return self.at

    def readinto(self, buffer: Any) -> int:
        size = max(min(len(buffer), self.size - self.at), 0)
        if size:
            buffer[:size] = read_at(self.path, self.offset + self.at, size)
            self.at += size
        return size


class _Shard:
    """An open shard, closed when the last reference goes: a reader may still hold what was evicted.

    ``fd`` is the file, or an anonymous temporary one with the decompressed stream.
    """

    def __init__(self, path: str) -> None:
        self.fd = -1
        with _explained(path), open(path, "rb", buffering=0) as file:
            found = os.fstat(file.fileno())
            self.identity = _identity(found)
            self.size = found.st_size
            if not is_packed(path):
                self.fd = os.dup(file.fileno())
                return
            with _lock:
                _make_room(8 * self.size)
            try:
                with tempfile.TemporaryFile(prefix="energon_fn_") as target:
                    with gzip.GzipFile(fileobj=file) as stream:
                        shutil.copyfileobj(stream, target, 2**20)
                    target.flush()
                    self.size = target.tell()
                    self.fd = os.dup(target.fileno())
            except _BROKEN_GZIP:
                raise
            except OSError as error:
                if error.errno in _TOO_MANY:
                    raise
                raise DatasetError(
                    f"{path} cannot be decompressed into {tempfile.gettempdir()}: {error}. Set "
                    "TMPDIR to a folder with room, or decompress the shards once with `gunzip`."
                ) from error

    def pread(self, path: str, offset: int, size: int) -> bytes:
        try:
            data = os.pread(self.fd, size, offset)
            if len(data) == size or not data:
                return data
            pieces = [data]  # the system gives at most 2 GiB at once, a network may give less
            done = len(data)
            while done < size and (data := os.pread(self.fd, size - done, offset + done)):
                pieces.append(data)
                done += len(data)
            return b"".join(pieces)
        except OSError as error:
            raise DatasetError(
                f"{path} cannot be read ({size} bytes at {offset}): {error}. Check the disk or the "
                "network mount that it is on."
            ) from error

    def will_need(self, offset: int, size: int) -> None:
        with suppress(OSError):  # it is no more than advice
            os.posix_fadvise(self.fd, offset, size, os.POSIX_FADV_WILLNEED)

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)


_open_shards: dict[str, _Shard] = {}
_unpacked: dict[str, _Shard] = {}
"""Those that were compressed."""
_stamps: dict[str, tuple[int, ...]] = {}
"""Size and time of change of what was opened once, though it may be closed by now."""
_opening: dict[str, threading.Lock] = {}
"""Held by whoever opens that shard: it may have to be decompressed, which takes long."""
_lock = threading.Lock()
"""Held while the dicts above change. A fork waits for it."""


def _forked() -> None:
    # Descriptors stay good in the child: reading moves no position. Whoever held these is not here.
    _opening.clear()
    _lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_forked)


def _shard(path: str) -> _Shard:
    # No lock when it is there: looking into a dict is atomic. So the oldest opened goes first, not
    # the least recently used.
    shard = _open_shards.get(path) or _unpacked.get(path)
    if shard is None:
        with _lock:
            opening = _opening.setdefault(path, threading.Lock())
        with opening:
            try:
                shard = _open_shards.get(path) or _unpacked.get(path)
                if shard is None:
                    shard = _Shard(path)
                    with _lock:
                        _keep(path, shard)
            finally:
                with _lock:
                    _opening.pop(path, None)
    return shard


def _keep(path: str, shard: _Shard) -> None:
    """Keep it open (called locked). Raises DatasetError if it is not what was open before."""
    if path.endswith(_WITH_SAMPLES):
        stamp = shard.identity[2:]
        if _stamps.setdefault(path, stamp) != stamp:
            raise DatasetError(
                f"{path} changed since it was indexed: it was replaced or written to while it was "
                "in use. Restore the file, or index the dataset again (`energon-fn prepare`) and "
                "open it again."
            )
        while len(_stamps) > _KEPT_STAMPS:
            del _stamps[next(iter(_stamps))]
    kept, most = (_unpacked, MAX_UNPACKED) if is_packed(path) else (_open_shards, MAX_OPEN)
    while len(kept) >= most:
        del kept[next(iter(kept))]
    kept[path] = shard


def is_packed(path: str) -> bool:
    return path.endswith(GZIP_SUFFIXES)


def _make_room(size: int) -> None:
    """Let go of decompressed shards while the temporary disk has less room (called locked)."""
    for name in [*_unpacked]:
        if shutil.disk_usage(tempfile.gettempdir()).free > size:
            return
        del _unpacked[name]


def _by_folder(name: str) -> list[str]:
    return name.split("/")


def _identity(found: os.stat_result) -> tuple[int, int, int, int]:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _temporary_cache() -> Path:
    """A folder in the temporary one that belongs to this user and nobody else can write."""
    if hasattr(os, "getuid"):
        folder = Path(tempfile.gettempdir(), f"energon_fn_cache_{os.getuid()}")
        with suppress(OSError):
            folder.mkdir(mode=0o700, exist_ok=True)
            found = folder.lstat()
            if found.st_uid == os.getuid() and stat.S_IMODE(found.st_mode) == 0o700:
                return folder
    return Path(tempfile.mkdtemp(prefix="energon_fn_cache_"))


@contextmanager
def _explained(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn an operating system's error into one that says what to do."""
    try:
        yield
    except FileNotFoundError as error:
        raise DatasetError(
            f"{error.filename or os.fspath(path)} does not exist: check the path, or mount what it "
            "is on. If a shard was removed or renamed, index the dataset again (`energon-fn "
            "prepare`)."
        ) from error
    except _BROKEN_GZIP as error:
        raise DatasetError(
            f"{os.fspath(path)} is not whole gzip data: {error}. Copy or write the file again."
        ) from error
    except OSError as error:
        if error.errno in _TOO_MANY:
            raise DatasetError(f"{os.fspath(path)} cannot be opened: {TOO_MANY_OPEN}") from error
        raise DatasetError(
            f"{error.filename or os.fspath(path)} cannot be used: {error.strerror or error}. Check "
            "its permissions and the disk that it is on."
        ) from error
