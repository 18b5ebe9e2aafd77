"""JSON Lines files as datasets: every line is a sample, a crude one, and found by its offset.

``FILE.jsonl.idx`` beside a file is what the published megatron-energon 7 has there (found by
preparing files): little-endian 64-bit numbers, which are 0, the offset of every further line that
is not blank, and the file's size. A file that was not prepared gets such an index in the user's
cache folder. It is read two numbers at a time, so no process holds it.
"""

from __future__ import annotations

import json
import os
import re
from bisect import bisect_right
from codecs import BOM_UTF8
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from struct import Struct
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from energon_fn.disk import files
from energon_fn.errors import DatasetError, SampleError
from energon_fn.samples import CrudeSample, SourceInfo
from energon_fn.seeds import number

ENDING, INDEX_ENDING = ".jsonl", ".idx"

_CHUNK = 2**22  # bytes of lines that are indexed at a time
_OFFSET, _OFFSETS = Struct("<Q"), Struct("<QQ")


def is_jsonl(path: object) -> bool:
    """Whether the path is named like JSON Lines, so that :func:`open_jsonl` is to open it.

    Compressed ones too, which it refuses with the remedy.

    >>> is_jsonl("a.jsonl"), is_jsonl("a_{0..9}.jsonl"), is_jsonl("a.jsonl.gz"), is_jsonl("a.tar")
    (True, True, True, False)
    """
    return (
        isinstance(path, str | os.PathLike)
        and re.search(r"\.jsonl(\.\w+)?$", os.fspath(path)) is not None
        and not os.path.isdir(path)
    )


class Lines(NamedTuple):
    """Samples ``start`` to ``stop`` (excluded) of a file; blank lines are none and not counted."""

    file: str
    offsets: str
    """The index file."""
    prefix: str
    """What the keys begin with before the sample's number, to tell several files apart."""
    start: int
    stop: int

    @property
    def name(self) -> str:
        """The file's name; of a pattern's files with what tells them apart."""
        return self.prefix[:-1] or os.path.basename(self.file)


@dataclass(frozen=True)
class Jsonl:
    """The samples of JSON Lines files, in their order; :class:`~energon_fn.disk.source.Samples`.

    Pickles small, without open files. May be used from several threads, and after a fork.
    """

    path: str
    """The file, or the pattern of files."""
    split_part: str
    """As it was asked for: a file has no parts, it is all in any."""
    lines: tuple[Lines, ...]
    subflavors: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return self._starts[-1]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The raw samples in order."""
        return map(self.load, range(len(self)))

    def __getitem__(self, i: int) -> dict[str, Any]:
        """:meth:`load` by another name; with ``len()`` it makes this a torch map-style dataset."""
        return self.load(i)

    def load(self, i: int) -> dict[str, Any]:
        """The ``i``-th raw sample: its line as the part ``json``, and where it comes from.

        Raises IndexError outside of ``0 <= i < len(self)``, :class:`DatasetError` if the file is
        missing or changed since it was indexed.

        >>> import tempfile, pathlib
        >>> folder = tempfile.TemporaryDirectory()
        >>> file = pathlib.Path(folder.name, "questions.jsonl")
        >>> size = file.write_text('{"id": 7}\\n{"id": 8}\\n')
        >>> raw = open_jsonl(file).load(1)
        >>> raw["__key__"], raw["json"], raw["__sources__"][0].file_names
        ('1', b'{"id": 8}', ('1.json',))
        >>> folder.cleanup()
        """
        lines, n = self._place(i)
        start, stop = _OFFSETS.unpack(files.read_at(lines.offsets, 8 * n, 16))
        before = min(start, 1)  # the end of the line before shows that this is where one begins
        data = files.read_at(lines.file, start - before, stop - start + before)
        if data[:before].strip(b"\n") or not (
            data.endswith(b"\n") or stop == files.stream_size(lines.file)
        ):
            raise DatasetError(
                f"{lines.file} changed since it was indexed: line {n + 1} (blank ones not "
                f"counted) is not from byte {start} to {stop}. {_remedy(lines.file, lines.offsets)}"
            )
        source = SourceInfo(lines.file, n, os.path.basename(lines.file), (f"{n}.json",))
        return {
            "__key__": f"{lines.prefix}{n}",
            "json": _text(data),
            "__restore_key__": (),
            "__subflavors__": {**self.subflavors},
            "__sources__": (source,),
        }

    def make(
        self, raw: dict[str, Any], decode: Callable[[dict[str, Any]], dict[str, Any]] | None
    ) -> CrudeSample:
        """The crude sample of a raw one, with the value of its line as ``json``.

        That is so whatever decodes other parts; ``decode`` finds the value already there.

        Raises :class:`~energon_fn.errors.SampleError` for a line that is not JSON.
        """
        try:
            parts = {**raw, "json": json.loads(raw["json"].decode())}
        except (ValueError, RecursionError) as error:
            (at,) = raw["__sources__"]
            raise SampleError(
                f"{at.dataset_path}, line {at.index + 1} (blank ones not counted) is not "
                f"JSON: {_what(error)}"
            ) from error
        return CrudeSample(parts if decode is None else decode(parts))

    def key(self, i: int) -> str:
        """The ``i``-th sample's key, without reading anything: its number in the file, from 0."""
        lines, n = self._place(i)
        return f"{lines.prefix}{n}"

    def find(self, key: str) -> int | None:
        """The position of the first sample with this key, or None."""
        match = re.fullmatch(r"(.*/)?(0|[1-9][0-9]{0,18})", key, re.DOTALL)
        prefix, n = (match[1] or "", int(match[2])) if match else ("", -1)
        found = (
            first + n - lines.start
            for first, lines in zip(self._starts, self.lines, strict=False)
            if lines.prefix == prefix and lines.start <= n < lines.stop
        )
        return next(found, None)

    @property
    def is_crude(self) -> bool:
        """Yes: its samples are dicts."""
        return True

    @property
    def runs(self) -> tuple[int, ...]:
        """How many samples of each file."""
        return tuple(lines.stop - lines.start for lines in self.lines)

    @property
    def identity(self) -> str:
        """Counts, and a number that depends on the files' names and their numbers of lines."""
        named = [(lines.name, lines.start, lines.stop) for lines in self.lines]
        return (
            f"{len(self)} lines of {self.split_part!r} in {len(self.lines)} runs, {number(named):x}"
        )

    def cut(self, start: int, stop: int) -> Jsonl:
        """The samples ``start`` to ``stop`` (excluded) of these."""
        lines = (
            one._replace(
                start=one.start + max(start - at, 0), stop=min(one.stop, one.start + stop - at)
            )
            for at, one in zip(self._starts, self.lines, strict=False)
            if max(at, start) < min(at + one.stop - one.start, stop)
        )
        return replace(self, lines=tuple(lines))

    def tagged(self, subflavors: Mapping[str, Any]) -> Jsonl:
        """The same samples, with these entries added to their ``__subflavors__``."""
        return replace(self, subflavors={**self.subflavors, **subflavors})

    def _place(self, i: int) -> tuple[Lines, int]:
        starts = self._starts
        if not 0 <= i < starts[-1]:
            raise IndexError(f"there is no sample {i}: {self.path} has {starts[-1]}")
        piece = bisect_right(starts, i) - 1
        lines = self.lines[piece]
        return lines, lines.start + i - starts[piece]

    def __getstate__(self) -> dict[str, Any]:
        return {own.name: getattr(self, own.name) for own in fields(self)}

    @cached_property
    def _starts(self) -> list[int]:
        """The position of each file's first sample and, last, the number of samples."""
        return [0, *accumulate(self.runs)]


def open_jsonl(
    path: str | os.PathLike[str],
    split_part: str = "train",
    subflavors: Mapping[str, Any] | None = None,
) -> Jsonl:
    """Open a JSON Lines file, or all that a brace or glob pattern names, one behind the other.

    A file is read only if it was not prepared, once, to index it. Keys are the lines' numbers from
    0, blank ones not counted; of a pattern's files with the file in front: ``a_1.jsonl/0``.

    split_part: kept as it is; there are no parts, all lines are in each.
    subflavors: the samples' ``__subflavors__``.

    Raises :class:`DatasetError` for files that do not exist, are compressed, or do not fit the
    index that lies beside them.

    >>> open_jsonl("/no/such/questions.jsonl.gz")
    Traceback (most recent call last):
        ...
    energon_fn.errors.DatasetError: /no/such/questions.jsonl.gz does not end in .jsonl: lines ...
    """
    path = os.path.abspath(path)
    found = jsonl_files(path)
    folder = os.path.commonpath([os.path.dirname(file) for file in found])
    lines = []
    for file in found:
        prefix = "" if file == path else f"{os.path.relpath(file, folder)}/"
        index, count = _index_of(file)
        lines.append(Lines(file, index, prefix, 0, count))
    return Jsonl(path, split_part, tuple(lines), subflavors or {})


def prepare_jsonl(
    path: str | os.PathLike[str], progress: Callable[[int], object] = lambda size: None
) -> Path:
    """Index a JSON Lines file and write that beside it, as megatron-energon does; give the path.

    progress: called with the number of bytes that were gone over since the last call.

    Raises :class:`DatasetError` for a file that does not exist, or does not begin with JSON.

    >>> import tempfile, pathlib
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = pathlib.Path(folder, "questions.jsonl")
    ...     size = file.write_text('{"id": 7}\\n\\n{"id": 8}\\n')
    ...     np.fromfile(prepare_jsonl(file), "<u8")
    array([ 0, 11, 21], dtype=uint64)
    """
    path = os.path.abspath(path)
    index = Path(path + INDEX_ENDING)
    with files.replacing(index) as temporary:
        _write_index(path, temporary, progress)
    return index


def jsonl_files(path: str | os.PathLike[str]) -> list[str]:
    """The files that a path or a pattern names. Raises DatasetError if there are none."""
    path = os.path.abspath(path)
    if not path.endswith(ENDING):
        raise DatasetError(
            f"{path} does not end in {ENDING}: lines are read at offsets, which only plain files "
            "have. Decompress it once (`gunzip`, `zstd -d`), or write its lines into tars."
        )
    return files.expand(path, (ENDING,))


def _index_of(path: str) -> tuple[str, int]:
    """The index beside the file, or one in the cache folder, and how many samples it has."""
    index = path + INDEX_ENDING
    if not os.path.exists(index):
        stamps = files.size_mtime(path)

        def make(temporary: str, others: list[Path]) -> None:
            with tqdm(
                total=stamps[0],
                desc=f"indexing {path}",
                unit="B",
                unit_scale=True,
                disable=None,  # shown on a terminal only
            ) as bar:
                _write_index(path, temporary, bar.update)

        index = str(files.kept(os.path.realpath(path), stamps, ENDING + INDEX_ENDING, make))
    size, length = files.stream_size(path), files.stream_size(index)
    count = length // 8 - 1
    if length % 8 or count < 1 or files.read_at(index, 0, 8) != _OFFSET.pack(0):
        raise DatasetError(f"{index} is not an index of lines. {_remedy(path, index)}")
    (last,) = _OFFSET.unpack(files.read_at(index, 8 * count, 8))
    if last != size:
        raise DatasetError(
            f"{path} has {size} bytes and had {last} when it was indexed. {_remedy(path, index)}"
        )
    return index, count


def _remedy(path: str, index: str) -> str:
    if index == path + INDEX_ENDING:
        return f"Prepare it again: `energon-fn prepare {path}`. Or remove {index}."
    return "Open it again when nobody writes to it any more: it will be indexed anew."


def _write_index(path: str, index: str, progress: Callable[[int], object]) -> None:
    end = count = 0
    with files.open_stream(path) as file, open(index, "wb") as out:
        while lines := file.readlines(_CHUNK):
            starts = [*accumulate(map(len, lines), initial=end)]
            progress(starts[-1] - end)
            end = starts.pop()
            texts = [
                (at, line) for at, line in zip(starts, lines, strict=True) if not line.isspace()
            ]
            if texts and not count:
                _check_first(path, texts[0][1])
                texts[0] = 0, b""
            count += len(texts)
            out.write(np.array([at for at, _ in texts], "<u8").tobytes())
        out.write(_OFFSET.pack(end))
    if not count:
        raise DatasetError(f"{path} has no lines. Remove it, or do not name it.")


def _text(line: bytes) -> bytes:
    """The line without blanks around it, and without the mark that some editors put before all."""
    return line.strip().removeprefix(BOM_UTF8)


def _check_first(path: str, line: bytes) -> None:
    """Raise DatasetError for what is no JSON Lines file at all."""
    try:
        json.loads(_text(line).decode())
    except (ValueError, RecursionError) as error:
        raise DatasetError(
            f"the first line of {path} is not JSON: {_what(error)}. In a JSON Lines file each line "
            "is a JSON value; it is UTF-8 text and not compressed."
        ) from error


def _what(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"  # it counts lines from this one
    return str(error)
