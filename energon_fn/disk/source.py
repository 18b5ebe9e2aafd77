"""A dataset's samples by position: which ones there are is known at once, bytes come on demand.

:func:`open_source` takes a prepared folder (one with ``.nv-meta``), a plain folder of tars, a brace
or glob pattern of tars, or one tar. A :class:`Source` is a list of raw samples that reads nothing
before it is asked, and then only the wanted parts, at their offsets.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, lru_cache
from itertools import accumulate, pairwise
from typing import Any, NamedTuple, Protocol

from toolz import identity

from energon_fn.disk import files, metadata
from energon_fn.disk.index import Entry, Index, cached_index, has_parts
from energon_fn.disk.metadata import every_part
from energon_fn.disk.tars import Part
from energon_fn.errors import DatasetError, logger
from energon_fn.look.values import counted, seen
from energon_fn.samples import BOOKKEEPING, CrudeSample, SourceInfo
from energon_fn.seeds import number

LARGE = 16 * 1024
"""Bytes of a sample from which on it pays to have the system begin to read it early."""
NEAR = 64 * 1024
"""A sample's parts are read at once if less than so many bytes lie between them."""


class Samples(Protocol):
    """A dataset's samples by position: what a plan's indices point into.

    A :class:`Source` is one; so are joins and files of JSON lines. Pickles small.
    """

    @property
    def path(self) -> str: ...
    @property
    def split_part(self) -> str: ...
    @property
    def subflavors(self) -> Mapping[str, Any]: ...
    @property
    def is_crude(self) -> bool:
        """Whether the samples are dicts that cookers make samples of."""
        ...

    @property
    def runs(self) -> tuple[int, ...]:
        """Lengths of the runs of samples that lie next to each other, in their order."""
        ...

    @property
    def identity(self) -> str:
        """What and how much this is, in a line that changes when an index finds other samples."""
        ...

    def __len__(self) -> int: ...
    def load(self, i: int) -> dict[str, Any]:
        """The ``i``-th raw sample; see :meth:`Source.load`."""
        ...

    def make(
        self, raw: dict[str, Any], decode: Callable[[dict[str, Any]], dict[str, Any]] | None
    ) -> Any:
        """The sample of a raw one: of the dataset's sample type, or a crude one."""
        ...

    def key(self, i: int) -> str:
        """The ``i``-th sample's key, without reading the sample."""
        ...

    def find(self, key: str) -> int | None:
        """The position of the first sample with this key, or None."""
        ...

    def cut(self, start: int, stop: int) -> Samples:
        """The samples ``start`` to ``stop`` (excluded) of these."""
        ...

    def tagged(self, subflavors: Mapping[str, Any]) -> Samples:
        """The same samples, with these entries added to their ``__subflavors__``."""
        ...


class Segment(NamedTuple):
    """Samples ``start`` to ``stop`` (excluded) of the ``shard``-th of :attr:`Source.shards`."""

    shard: int
    start: int
    stop: int


@dataclass(frozen=True)
class Source:
    """The raw samples of one part of a dataset, in its order (that of validation).

    Pickles small, without open files: every process opens its own. May be used from several
    threads, and after a fork.
    """

    path: str
    """The folder that the shards' names are relative to."""
    split_part: str
    shards: tuple[str, ...]
    """All shards of the dataset, those of other split parts too."""
    segments: tuple[Segment, ...]
    """Runs of neighbouring samples; excluded samples lie between them."""
    index: Index = field(repr=False, compare=False)
    sample_type: type[Any] | None = None
    """None for a crude dataset, whose samples are dicts."""
    to_sample: Callable[[dict[str, Any]], Any] = identity
    """Makes the sample of a *decoded* raw dict."""
    part_filter: Callable[[str], bool] = every_part
    """Which parts are read."""
    subflavors: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        shards = len({segment.shard for segment in self.segments})
        return (
            f"Source({counted(len(self), 'sample')} of {seen(self.path)}, {self.split_part}, "
            f"{counted(shards, 'shard')})"
        )

    def __len__(self) -> int:
        return self._starts[-1]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The raw samples in order."""
        return map(self.load, range(len(self)))

    def __getitem__(self, i: int) -> dict[str, Any]:
        """:meth:`load` by another name; with ``len()`` it makes this a torch map-style dataset."""
        return self.load(i)

    def load(self, i: int) -> dict[str, Any]:
        """The ``i``-th raw sample: bytes by part name, and what it is and where it comes from.

        Raises IndexError outside of ``0 <= i < len(source)``, :class:`DatasetError` if the shard is
        missing or changed since it was indexed.

        >>> import tempfile, webdataset
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with webdataset.TarWriter(folder + "/0.tar") as tar:
        ...         size = tar.write({"__key__": "a/1", "txt": "a cat", "jpg": b"..."})
        ...     source = open_source(folder + "/0.tar")
        ...     raw = source.load(0)
        >>> raw["__key__"], raw["txt"], raw["jpg"], raw["__restore_key__"], raw["__subflavors__"]
        ('a/1', b'a cat', b'...', (), {})
        >>> raw["__sources__"][0].file_names
        ('a/1.jpg', 'a/1.txt')
        """
        # This runs for every sample: what is the same for all is at hand in one tuple.
        starts, places, parts_of, is_wanted = self._at_hand
        if not 0 <= i < starts[-1]:
            raise self._lacks(i)
        shard, shift, path, shard_name = places[bisect_right(starts, i) - 1]
        key, parts = parts_of(shard, i + shift)
        for part in parts:
            if not is_wanted(part[0]):
                parts = tuple([part for part in parts if is_wanted(part[0])])
                break
        names = (f"{key}.{parts[0][0]}",) if len(parts) == 1 else _names(key, parts)
        # The parts come behind: none has the name of any of these, see is_wanted.
        raw: dict[str, Any] = {
            "__key__": key,
            "__restore_key__": (),
            "__subflavors__": {**self.subflavors},
            "__sources__": (SourceInfo(self.path, i, shard_name, names),),
        }
        if len(parts) > 1 and _between(parts) < NEAR:
            first, last = parts[0][1], parts[-1]
            data = files.read_at(path, first, last[1] + last[2] - first)
            for name, offset, size in parts:
                raw[name] = data[offset - first : offset - first + size]
        else:
            for name, offset, size in parts:
                raw[name] = files.read_at(path, offset, size)
        return raw

    @cached_property
    def is_large(self) -> bool:
        """Whether samples, as the first ones are, are so large that reading them early pays."""
        some, total = range(min(8, len(self))), 0
        with suppress(DatasetError):  # which is told when they are loaded
            for i in some:
                path, parts = self._wanted(i)
                total += 0 if files.is_packed(path) else sum(size for _, _, size in parts)
        return total > LARGE * len(some)

    def will_need(self, i: int) -> None:
        """Have the system begin to read the ``i``-th sample, which will be loaded soon.

        What is wrong with it is told when it is loaded.
        """
        with suppress(DatasetError):
            path, parts = self._wanted(i)
            if len(parts) > 1 and _between(parts) < NEAR:
                (_, first, _), (_, last, size) = parts[0], parts[-1]
                files.will_need(path, first, last + size - first)
            else:
                for _, offset, size in parts:
                    files.will_need(path, offset, size)

    def _wanted(self, i: int) -> tuple[str, list[Part]]:
        """The shard that the sample is in, and those of its parts that are read."""
        starts, places, parts_of, is_wanted = self._at_hand
        shard, shift, path, _ = places[bisect_right(starts, i) - 1]
        return path, [part for part in parts_of(shard, i + shift)[1] if is_wanted(part[0])]

    def make(
        self, raw: dict[str, Any], decode: Callable[[dict[str, Any]], dict[str, Any]] | None
    ) -> Any:
        """The sample of a raw one: of the dataset's sample type, or a crude one.

        decode: gives the decoded parts of a raw sample; None leaves them bytes.
        """
        parts = raw if decode is None else decode(raw)
        return CrudeSample(parts) if self.sample_type is None else self.to_sample(parts)

    def key(self, i: int) -> str:
        """The ``i``-th sample's key, without reading the sample."""
        return self.index.parts(*self._place(i))[0]

    def keys(self) -> list[str]:
        """The keys of all samples, in order; for many samples at once, :meth:`key` is slow."""
        return [key for segment in self.segments for key in self.index.keys(*segment)]

    def find(self, key: str) -> int | None:
        """The position of the first sample with this key, or None.

        >>> import tempfile, webdataset
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with webdataset.TarWriter(folder + "/0.tar") as tar:
        ...         size = tar.write({"__key__": "a", "txt": "a cat"})
        ...         size = tar.write({"__key__": "b", "txt": "a dog"})
        ...     source = open_source(folder)
        ...     source.find("b"), source.find("c")
        (1, None)
        """
        places = self.index.find_all(key)
        found = [
            start + place - segment.start
            for shard, place in places
            for start, segment in self._segments_of.get(shard, ())
            if segment.start <= place < segment.stop
        ]
        return min(found, default=None)

    @property
    def is_crude(self) -> bool:
        """Whether there is no sample type."""
        return self.sample_type is None

    @property
    def runs(self) -> tuple[int, ...]:
        """Lengths of the segments."""
        return tuple(segment.stop - segment.start for segment in self.segments)

    @property
    def identity(self) -> str:
        """Counts, and a number that depends on the shards' names and the segments."""
        return (
            f"{len(self)} samples of {self.split_part!r} in {len(self.segments)} segments of "
            f"shards, {number(self.shards, self.segments):x}"
        )

    def cut(self, start: int, stop: int) -> Source:
        """The samples ``start`` to ``stop`` (excluded) of these."""
        segments = (
            Segment(shard, first + max(start - at, 0), min(last, first + stop - at))
            for at, (shard, first, last) in zip(self._starts, self.segments, strict=False)
            if max(at, start) < min(at + last - first, stop)
        )
        return replace(self, segments=tuple(segments))

    def tagged(self, subflavors: Mapping[str, Any]) -> Source:
        """The same samples, with these entries added to their ``__subflavors__``."""
        return replace(self, subflavors={**self.subflavors, **subflavors})

    def _place(self, i: int) -> tuple[int, int]:
        starts, places, *_ = self._at_hand
        if not 0 <= i < starts[-1]:
            raise self._lacks(i)
        shard, shift, *_ = places[bisect_right(starts, i) - 1]
        return shard, i + shift

    def _lacks(self, i: int) -> IndexError:
        return IndexError(f"there is no sample {i}: {self.path} has {len(self)}")

    # What follows is made once per process from the fields, and does not travel with them.

    def __getstate__(self) -> dict[str, Any]:
        return {own.name: getattr(self, own.name) for own in fields(self)}

    @cached_property
    def _starts(self) -> list[int]:
        """The position of each segment's first sample and, last, the number of samples."""
        return [0, *accumulate(segment.stop - segment.start for segment in self.segments)]

    @cached_property
    def _at_hand(
        self,
    ) -> tuple[
        list[int],
        list[tuple[int, int, str, str]],
        Callable[[int, int], Entry],
        Callable[[str], bool],
    ]:
        """What :meth:`load` needs: the last tells which parts are read, asked once for each name.

        The second is, for each segment, its shard's number, by how much places in the shard exceed
        positions here, and the shard's path and name.
        """
        paths = [os.path.join(self.path, name) for name in self.shards]
        places = [
            (segment.shard, segment.start - at, paths[segment.shard], self.shards[segment.shard])
            for at, segment in zip(self._starts, self.segments, strict=False)
        ]
        part_filter = self.part_filter

        @lru_cache(maxsize=4096)  # bounded: names with many dots make many part names
        def is_wanted(name: str) -> bool:
            return name not in BOOKKEEPING and part_filter(name)

        return self._starts, places, self.index.parts, is_wanted

    @cached_property
    def _segments_of(self) -> dict[int, list[tuple[int, Segment]]]:
        found: dict[int, list[tuple[int, Segment]]] = {}
        for start, segment in zip(self._starts, self.segments, strict=False):
            found.setdefault(segment.shard, []).append((start, segment))
        return found


def _names(key: str, parts: Sequence[Part]) -> tuple[str, ...]:
    return tuple([f"{key}.{part[0]}" for part in parts])


def _between(parts: Sequence[Part]) -> int:
    """How many bytes of the shard lie between the parts."""
    return parts[-1][1] - parts[0][1] - sum([size for _, _, size in parts[:-1]])


def open_source(
    path: str | os.PathLike[str],
    split_part: str = "train",
    *,
    dataset_config: str = metadata.DATASET_YAML,
    split_config: str = metadata.SPLIT_YAML,
    trust_dataset_code: bool = False,
    make: bool = True,
) -> Source:
    """Open one split part of a dataset; no shard is touched if it is prepared.

    path: a folder with ``.nv-meta``, a folder of tars (found in folders below it too), a brace or
    glob pattern of tars, or a tar. What is not prepared is indexed when it is first opened, has no
    sample type (its samples are dicts) and no parts: all of it is "train".
    make: False if only keys and counts are wanted: ``dataset.yaml`` is not read, and none of the
    dataset's code needed.

    Raises :class:`DatasetError` for anything that does not exist or does not fit together.

    >>> open_source("/no/such/{0..9}.tar")
    Traceback (most recent call last):
        ...
    energon_fn.errors.DatasetError: no shard matches '/no/such/0.tar' (from ...
    """
    path = os.path.abspath(path)
    if os.path.isdir(os.path.join(path, metadata.META_FOLDER)):
        config = (
            metadata.read_dataset_config(path, dataset_config, trust_dataset_code)
            if make
            else metadata.DatasetConfig()
        )
        return _open_prepared(path, split_part, config, split_config)
    if (dataset_config, split_config) != (metadata.DATASET_YAML, metadata.SPLIT_YAML):
        raise DatasetError(
            f"{path} has no {metadata.META_FOLDER} folder with {dataset_config} and {split_config}:"
            f" prepare it with `energon-fn prepare {path}`."
        )
    return _open_unprepared(path, split_part)


def _open_prepared(
    folder: str, split_part: str, config: metadata.DatasetConfig, split_config: str
) -> Source:
    split = metadata.read_split_config(folder, split_config)
    counts = metadata.read_info(folder)
    names = split.shards(split_part)
    for name in names:
        if name not in counts:
            raise DatasetError(
                f"{split.path}: the shard {name!r} of the split part {split_part!r} is not among "
                f"the {len(counts)} shards that were indexed. Correct its name (relative to "
                f"{folder}), or prepare the dataset again: `energon-fn prepare {folder}`."
            )
    index_path = str(metadata.meta_file(folder, "index.sqlite"))
    if not has_parts(index_path):  # made by an older release, or not there
        index_path, found = cached_index(folder, list(counts))
        for name in names:
            if found[name] != counts[name]:
                raise DatasetError(
                    f"{os.path.join(folder, name)} has {found[name]} samples and had "
                    f"{counts[name]} when it was prepared. Prepare the dataset again: "
                    f"`energon-fn prepare {folder}`."
                )
    shards = tuple(counts)
    index = Index(index_path, folder, shards)
    number = {name: i for i, name in enumerate(shards)}
    excluded = split.excluded_keys(names)
    segments: list[Segment] = []
    for name in names:
        cuts = _places(index, number[name], excluded.get(name, frozenset()), name)
        segments += (
            Segment(number[name], before + 1, after)
            for before, after in pairwise((-1, *cuts, counts[name]))
            if before + 1 < after
        )
    return Source(
        folder, split_part, shards, tuple(segments), index,
        config.sample_type, config.to_sample, config.part_filter,
        config.subflavors,
    )  # fmt: skip


def _places(index: Index, shard: int, keys: frozenset[str], name: str) -> list[int]:
    """Where in the shard the excluded samples lie, in order."""
    places: list[int] = []
    for key in sorted(keys):
        found = [place for where, place in index.find_all(key) if where == shard]
        if not found:
            logger.warning(
                "%s: the excluded sample %s/%s does not exist: check its spelling",
                index.root,
                name,
                key,
            )
        places += found
    return sorted(places)


def _open_unprepared(path: str, split_part: str) -> Source:
    if os.path.isdir(path):
        root, names = path, files.list_tars(path)
        if not names:
            raise DatasetError(
                f"{path} has neither {metadata.META_FOLDER} nor shards: no file below it ends in "
                f"{', '.join(files.TAR_SUFFIXES)}. Check the path."
            )
    else:
        found = files.expand(path)
        root = os.path.commonpath([os.path.dirname(name) for name in found])
        names = [os.path.relpath(name, root) for name in found]
    if split_part != "train":
        raise DatasetError(
            f"{path} is not prepared, so it has no split part {split_part!r}: all of it is "
            f"'train'. Run `energon-fn prepare {root}` to split it, or ask for "
            'split_part="train".'
        )
    index_path, counts = cached_index(root, names)
    shards = tuple(counts)
    segments = (Segment(i, 0, count) for i, count in enumerate(counts.values()) if count)
    index = Index(index_path, root, shards, "Open the dataset again: it will be indexed anew.")
    return Source(root, split_part, shards, tuple(segments), index)
