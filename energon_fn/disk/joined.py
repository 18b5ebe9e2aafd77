"""A join: samples of several datasets that have the same key become one sample.

The first dataset is the primary one. :func:`open_joined` looks up once which sample of each other
dataset belongs to each of its samples, and keeps that table: an ``.npy`` file of int64, of shape
(samples, datasets), with -1 where a dataset has none. What the datasets hold and how they are
joined is in the file's name, so a table never changes, and of datasets that changed another one is
made. Every process maps it into memory and holds nothing of it itself.
"""

from __future__ import annotations

import inspect
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import accumulate, repeat
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.lib.format import open_memmap

from energon_fn.disk import files
from energon_fn.disk.fields import EntryError, required_fields, sample_fields, sample_type_of
from energon_fn.disk.source import Samples, Source
from energon_fn.errors import DatasetError, logger
from energon_fn.samples import CrudeSample, Sample, SourceInfo
from energon_fn.seeds import number

MODES = ("error", "skip", "none")
_VERSION = 1
_SHOWN = 5  # keys in a message

Table = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Joined:
    """The samples of :func:`open_joined`; implements :class:`~energon_fn.disk.source.Samples`.

    Pickles small, without the table: every process opens its own.
    """

    parts: tuple[Samples, ...]
    """The datasets, the primary one first."""
    names: tuple[str, ...] | None
    """The joiner's parameters for the parts; None: they are given in their order."""
    nonmatch: tuple[str, ...]
    joiner: Any
    """A class with ``from_joined``, or a function."""
    table: str
    """The file with the table."""
    start: int
    """These samples begin at this row of the table ..."""
    stop: int
    """... and end before this one."""

    def __len__(self) -> int:
        return self.stop - self.start

    def load(self, i: int) -> dict[str, Any]:
        """The ``i``-th raw sample, with those of the parts (or None) as ``__parts__``.

        Key and subflavors are the primary one's, sources those of all.
        """
        row = self._row(i)
        raws = [None if at < 0 else part.load(at) for part, at in zip(self.parts, row, strict=True)]
        found: list[dict[str, Any]] = [raw for raw in raws if raw is not None]
        sources: tuple[SourceInfo, ...] = ()
        return {
            "__key__": found[0]["__key__"],
            "__restore_key__": (),
            "__subflavors__": found[0]["__subflavors__"],
            "__sources__": sum((raw["__sources__"] for raw in found), sources),
            "__parts__": tuple(raws),
        }

    def make(
        self, raw: dict[str, Any], decode: Callable[[dict[str, Any]], dict[str, Any]] | None
    ) -> Any:
        """What the joiner makes of the parts' samples, with the restore key of ``raw``."""
        samples = [
            None if own is None else part.make(own, decode)
            for part, own in zip(self.parts, raw["__parts__"], strict=True)
        ]
        join = _function(self.joiner)
        if self.names is None:
            sample = join(*samples)
        else:
            sample = join(**dict(zip(self.names, samples, strict=True)))
        if isinstance(sample, dict):
            sample["__restore_key__"] = raw["__restore_key__"]
        elif hasattr(sample, "__restore_key__"):
            object.__setattr__(sample, "__restore_key__", raw["__restore_key__"])  # if frozen too
        return sample

    def key(self, i: int) -> str:
        """The ``i``-th sample's key: that of the primary one."""
        return self.parts[0].key(self._row(i)[0])

    def keys(self) -> list[str]:
        """The keys of all samples, in order."""
        found = _keys(self.parts[0])
        return [found[at] for at in self._rows[:, 0].tolist()]

    def find(self, key: str) -> int | None:
        """The position of the first sample with this key, or None."""
        primary = self._rows[:, 0]
        if not len(primary):
            return None
        first, last = int(primary[0]), int(primary[-1])
        place = self.parts[0].cut(first, last + 1).find(key)
        if place is None:
            return None
        row = int(np.searchsorted(primary, first + place))
        return row if primary[row] == first + place else None

    @property
    def path(self) -> str:
        """The primary dataset's path."""
        return self.parts[0].path

    @property
    def split_part(self) -> str:
        """The primary dataset's split part."""
        return self.parts[0].split_part

    @property
    def subflavors(self) -> Mapping[str, Any]:
        """The primary dataset's subflavors."""
        return self.parts[0].subflavors

    @property
    def is_crude(self) -> bool:
        """No: the joiner makes its samples."""
        return False

    @cached_property
    def runs(self) -> tuple[int, ...]:
        """What is left of each of the primary dataset's runs."""
        ends = np.searchsorted(self._rows[:, 0], [0, *accumulate(self.parts[0].runs)])
        return tuple(count for count in np.diff(ends).tolist() if count)

    @cached_property
    def identity(self) -> str:
        """Counts, and a number that depends on the parts and on which samples belong together."""
        checksum = 0
        for column in self._rows.T:
            checksum = zlib.crc32(np.ascontiguousarray(column).data, checksum)
        parts = [part.identity for part in self.parts]
        return (
            f"{len(self)} samples of {self.split_part!r} joined of {len(parts)} datasets, "
            f"{number(parts, checksum):x}"
        )

    def cut(self, start: int, stop: int) -> Joined:
        """The samples ``start`` to ``stop`` (excluded) of these."""
        begin = self.start + max(start, 0)
        return replace(self, start=begin, stop=max(begin, min(self.start + stop, self.stop)))

    def tagged(self, subflavors: Mapping[str, Any]) -> Joined:
        """The same samples, with these entries added to the ``__subflavors__`` of all parts."""
        return replace(self, parts=tuple(part.tagged(subflavors) for part in self.parts))

    def _row(self, i: int) -> list[int]:
        if not 0 <= i < len(self):
            raise IndexError(f"there is no sample {i}: the join of {self.path} has {len(self)}")
        row: list[int] = self._rows[i].tolist()
        return row

    # What follows is made once per process from the fields, and does not travel with them.

    def __getstate__(self) -> dict[str, Any]:
        return {own.name: getattr(self, own.name) for own in fields(self)}

    @cached_property
    def _rows(self) -> Table:
        try:
            return _open_table(self.table)[self.start : self.stop]
        except (OSError, ValueError) as error:
            raise DatasetError(
                f"{self.table} cannot be used: {error}. It says which samples of {self.path} and "
                "others are joined; open the dataset again, and it is made anew."
            ) from error


def open_joined(
    parts: Sequence[Samples],
    nonmatch: Sequence[str],
    joiner: Any,
    names: Sequence[str] | None = None,
    index: str | None = None,
    trust_dataset_code: bool = False,
    make: bool = True,
) -> Joined:
    """Join datasets by key: the first one's samples, in its order, with those of the others.

    nonmatch: for each part (the first one's does not matter) what becomes of a sample that the part
    does not have: "error" raises, "skip" leaves the sample out, "none" gives the joiner None.
    joiner: a sample type with ``from_joined`` (see :meth:`Sample.from_joined`), its
    ``__module__`` and ``__class__`` as a yaml has them, or a function. It is called with one sample
    of each part: in their order, or by ``names``.
    index: where the table is kept, if that can be written; else it is in the cache folder. To the
    name is added what state of the parts it is for; see :attr:`Joined.table`.
    trust_dataset_code: a joiner named by a yaml may be imported, if it is not one of ours.
    make: False if only keys and counts are wanted, or the table: the joiner is not looked at.

    Raises :class:`DatasetError` for missing and ambiguous keys, and for a joiner that cannot be
    had or does not fit.

    >>> import tempfile, webdataset
    >>> from energon_fn.disk.source import open_source
    >>> folder = tempfile.TemporaryDirectory()
    >>> for part, keys in ("txt", "abc"), ("cls", "cxa"):
    ...     with webdataset.TarWriter(f"{folder.name}/{part}.tar") as tar:
    ...         for key in keys:
    ...             size = tar.write({"__key__": key, part: f"{part} {key}"})
    >>> parts = [open_source(f"{folder.name}/{part}.tar") for part in ("txt", "cls")]
    >>> def labelled(text, label):
    ...     return text["txt"], label["cls"]
    >>> joined = open_joined(parts, ["error", "skip"], labelled)
    >>> [joined.make(joined.load(i), None) for i in range(len(joined))]
    [(b'txt a', b'cls a'), (b'txt c', b'cls c')]
    >>> open_joined(parts, ["error", "error"], labelled)
    Traceback (most recent call last):
        ...
    energon_fn.errors.DatasetError: 1 of 3 samples of ... has no match in ...: 'b'. ...
    >>> folder.cleanup()
    """
    parts, nonmatch = tuple(parts), tuple(nonmatch)
    names = None if names is None else tuple(names)
    for _, mode in zip(parts, nonmatch, strict=True):
        if mode not in MODES:
            raise ValueError(f"nonmatch is {mode!r}; it must be one of {', '.join(MODES)}")
    if make:
        joiner = _resolved(joiner, parts, names, trust_dataset_code)
    state = f"{number(_VERSION, nonmatch[1:], [(p.identity, _stamp(p)) for p in parts]):016x}"
    table = _kept(index, parts[0].path, state, lambda: _matches(parts, nonmatch))
    rows = len(_open_table(table))
    if not rows and all(map(len, parts)):
        logger.warning(
            "the join of %s has no samples: no key is in all of them. Their first keys are %s",
            " and ".join(part.path for part in parts),
            ", ".join(repr(part.key(0)) for part in parts),
        )
    return Joined(parts, names, nonmatch, joiner, table, 0, rows)


# ------------------------------------------------------------------------------------- the table


def _matches(parts: Sequence[Samples], nonmatch: Sequence[str]) -> Table:
    """Which sample of each part belongs to each sample of the first one that is not left out."""
    keys = _keys(parts[0])
    columns = [np.arange(len(keys), dtype=np.int64)]
    for part in parts[1:]:
        places = _places(part)
        columns.append(np.fromiter(map(places.get, keys, repeat(-1)), np.int64, len(keys)))
    kept = np.ones(len(keys), dtype=bool)
    for column, mode in zip(columns[1:], nonmatch[1:], strict=True):
        if mode == "skip":
            kept &= column >= 0
    for part, column, mode in zip(parts[1:], columns[1:], nonmatch[1:], strict=True):
        missing = np.flatnonzero(kept & (column < 0)) if mode == "error" else ()
        if len(missing):
            raise _no_match(parts[0], part, [keys[at] for at in map(int, missing)])
        if len(keys) and len(part) and (column < 0).all():
            logger.warning(
                "no sample of %s has a match in %s: the first one's key is %r there and %r here",
                parts[0].path,
                part.path,
                part.key(0),
                keys[0],
            )
    return np.array(columns)[:, kept].T  # so each column lies in one piece, in the file too


def _no_match(primary: Samples, part: Samples, missing: Sequence[str]) -> DatasetError:
    shown = ", ".join(map(repr, missing[:_SHOWN])) + (", ..." if len(missing) > _SHOWN else "")
    return DatasetError(
        f"{len(missing)} of {len(primary)} samples of {primary.path} "
        f"{'have' if len(missing) > 1 else 'has'} no match in {part.path}, {part.split_part!r}: "
        f"{shown}. {f'It has {part.key(0)!r}, for example' if len(part) else 'That is empty'}. If "
        "this is as it should be, say for that dataset nonmatch: skip, to leave such samples out, "
        "or nonmatch: none, to have None in its place."
    )


def _places(part: Samples) -> dict[str, int]:
    """Position by key. Raises :class:`DatasetError` for a key that occurs twice."""
    keys = _keys(part)
    places = dict(zip(keys, range(len(keys)), strict=True))
    if len(places) < len(keys):
        first = next(at for at, key in enumerate(keys) if places[key] != at)
        shards = " and ".join(
            ", ".join(source.shard_name for source in part.load(at)["__sources__"])
            for at in (first, places[keys[first]])
        )
        raise DatasetError(
            f"{part.path}, {part.split_part!r}: the key {keys[first]!r} occurs more than once, in "
            f"{shards}, and with it {len(keys) - len(places)} samples have another one's key. To "
            "join a dataset to another one its keys must be unique: list no shard twice in "
            "split.yaml, or write the shards again with the shard's name as a folder in each key."
        )
    return places


def _keys(part: Samples) -> Sequence[str]:
    """All keys, in order."""
    bulk: Callable[[], Sequence[str]] | None = getattr(part, "keys", None)
    return [part.key(at) for at in range(len(part))] if bulk is None else bulk()


def _stamp(part: Samples) -> object:
    """What changes when the part is indexed again and is as large as before."""
    match part:
        case Joined():
            return None  # its identity says it all
        case Source():
            # An index in the cache folder is called by what it is of, and touched when it is used.
            name = os.path.basename(part.index.path)
            return files.size_mtime(part.index.path) if name == "index.sqlite" else name
        case _:
            return files.size_mtime(part.path) if os.path.exists(part.path) else None


def _kept(index: str | None, root: str, state: str, make: Callable[[], Table]) -> str:
    """The file with the table of this state, made if it is not there or broken."""

    def write(path: str, others: object = None) -> None:
        with open(path, "wb") as file:  # first: if that is not allowed, nothing is to be made
            np.save(file, make(), allow_pickle=False)

    if index is not None:
        path = f"{os.path.abspath(index).removesuffix('.npy')}-{state}.npy"
        if _is_table(path):
            return path
        with suppress(OSError):
            os.makedirs(os.path.dirname(path), exist_ok=True)
        try:
            with files.replacing(path) as temporary:
                write(temporary)
            return path
        except DatasetError as error:
            if not isinstance(error.__cause__, OSError):  # it is not the place that is wrong
                raise
    root = os.path.realpath(root)
    cached = files.kept(root, state, ".join.npy", write)
    if not _is_table(cached):
        cached.unlink(missing_ok=True)
        cached = files.kept(root, state, ".join.npy", write)
    return str(cached)


def _open_table(path: str | os.PathLike[str]) -> Table:
    """The table, mapped into memory. Raises OSError or ValueError."""
    table = open_memmap(path, mode="r")
    if table.dtype != np.int64 or table.ndim != 2:
        raise ValueError(f"it holds {table.dtype} of shape {table.shape}")
    return np.asarray(table)


def _is_table(path: str | os.PathLike[str]) -> bool:
    try:
        _open_table(path)
    except (OSError, ValueError):
        return False
    return True


# ------------------------------------------------------------------------------------ the joiner


def _function(joiner: Any) -> Any:
    return getattr(joiner, "from_joined", joiner)


def _resolved(
    joiner: Any, parts: Sequence[Samples], names: Sequence[str] | None, trust: bool
) -> Any:
    """The class or function that joins. Raises :class:`DatasetError` if it cannot join these."""
    if isinstance(joiner, Mapping):
        try:
            joiner = sample_type_of(joiner, trust) or CrudeSample
        except EntryError as error:
            raise EntryError(f"joiner: {error}", "joiner", *error.keys) from error.__cause__
    name, join = getattr(joiner, "__qualname__", repr(joiner)), _function(joiner)
    if isinstance(join, type) or not callable(join):
        raise DatasetError(
            f"the joiner {name} has no from_joined, which makes one sample of one of each dataset. "
            "Give a sample type (derived from Sample), or a function."
        )
    if getattr(join, "__func__", None) is Sample.from_joined.__func__:  # type: ignore[attr-defined]
        _check_merged(joiner, parts, names)
        return joiner
    try:
        signature = inspect.signature(join)
    except ValueError:  # of a function that is not written in Python
        return joiner
    try:
        signature.bind(*parts) if names is None else signature.bind(**dict.fromkeys(names))
    except TypeError as error:
        what = name if join is joiner else f"{name}.from_joined"
        how = "in order" if names is None else f"by the names {', '.join(names)}"
        raise DatasetError(
            f"the joiner {what}{signature} does not take {len(parts)} samples {how}: {error}. It "
            "has a parameter for each dataset; from_joined is a staticmethod or classmethod."
        ) from error
    return joiner


def _check_merged(joiner: type[Any], parts: Sequence[Samples], names: Sequence[str] | None) -> None:
    """Whether the fields of all parts are those of the joiner, as far as is known by now."""
    name, wanted, had = joiner.__qualname__, sample_fields(joiner), set[str]()
    remedy = (
        "Write a from_joined that says what becomes of the samples, in a sample type of your own."
    )
    if names is not None:
        raise DatasetError(
            f"{name} has no from_joined for datasets by name ({', '.join(names)}): join a list of "
            f"datasets. {remedy}"
        )
    types: list[Any] = [getattr(part, "sample_type", None) for part in parts]
    for part, sample_type in zip(parts, types, strict=True):
        own = sample_fields(sample_type) if sample_type else {}
        had |= own.keys()
        for field in own.keys() - wanted.keys():
            raise DatasetError(
                f"{name} has no field {field!r}, which the samples of {part.path} have "
                f"({sample_type.__qualname__}). {remedy}"
            )
    for field in required_fields(joiner):
        if all(types) and field not in had:
            raise DatasetError(f"none of the datasets has the field {field!r} of {name}. {remedy}")
