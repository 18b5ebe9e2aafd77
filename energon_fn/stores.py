"""Files by name: what a cooker looks up besides the sample at hand.

A store reads the bytes of a file and says where they are from; :class:`DecodeFileStore` decodes
them by the file's extension, as the parts of samples are. :func:`open_store` opens what a recipe's
or metadataset's ``aux`` names, :func:`primary_store` the files of a dataset itself, and
:func:`cooker_arguments` gives all of them to a cooker.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from functools import partial
from inspect import Parameter, signature
from typing import Any, Protocol, cast

from energon_fn.disk import files, metadata
from energon_fn.disk.index import Index, cached_index, has_parts
from energon_fn.disk.jsonl import Jsonl
from energon_fn.disk.media import MediaMetadata, read_media_metadata
from energon_fn.disk.source import Samples, Source
from energon_fn.disk.tars import split_name
from energon_fn.errors import DatasetError, SampleError
from energon_fn.samples import SourceInfo, key_of
from energon_fn.stages import needs_of


class FileStore(Protocol):
    """Files by name, each read when it is asked for.

    For one of your own, derive from it and define :meth:`read` and :meth:`get_path`; it should
    pickle small, and may be used from several threads.
    """

    def read(self, key: str) -> tuple[bytes, SourceInfo]:
        """The file's bytes, and where they are from.

        Raises :class:`~energon_fn.SampleError` if there is no such file.
        """
        ...

    def decode(self, key: str, data: bytes) -> Any:
        """What :meth:`get` makes of the file's bytes: the bytes themselves, unless overridden."""
        return data

    def get(self, key: str, sample: Any = None) -> Any:
        """The content of a file, such as ``images/0001.jpg``.

        sample: the sample, a dict or an object, to whose ``__sources__`` the file is added.
        Raises :class:`~energon_fn.SampleError` if there is no such file.
        """
        try:
            data, source = self.read(key)
        except SampleError as error:
            if (asking := key_of(sample)) is not None:
                error.add_note(f"asked for by sample {asking}")
            raise
        add_source(sample, source)
        return self.decode(key, data)

    def get_path(self) -> str:
        """The folder, or whatever it is that the names are relative to."""
        ...

    def get_media_metadata(self, key: str) -> MediaMetadata:
        """Size, duration and the like of a picture, sound or video, without reading it.

        An ``ImageMetadata`` or ``AVMetadata``, stored beforehand by ``energon-fn prepare-media`` or
        ``prepare --media-metadata-by-...``. Raises :class:`~energon_fn.SampleError` if there is
        none of that file, :class:`~energon_fn.DatasetError` if there is none of any.
        """
        database = str(metadata.meta_file(self.get_path(), "index.sqlite"))
        found = read_media_metadata(database, key)
        if found is None:
            raise SampleError(
                f"{self.get_path()} has no media metadata of {key!r}: it has no such file, or the "
                "filter that they were prepared with left it out"
            )
        return found


def add_source(sample: Any, source: SourceInfo | None) -> None:
    """Add to a sample's ``__sources__`` where more of it is from; None for either: do nothing.

    >>> sample = {"__key__": "7", "__sources__": None}
    >>> add_source(sample, SourceInfo("/data/images", "7.jpg", "0.tar", ("7.jpg",)))
    >>> sample["__sources__"][0].file_names
    ('7.jpg',)
    """
    if sample is None or source is None:
        return
    if isinstance(sample, MutableMapping):
        sample["__sources__"] = (*(sample.get("__sources__") or ()), source)
        return
    known = getattr(sample, "__sources__", None) or ()
    try:
        object.__setattr__(sample, "__sources__", (*known, source))  # of a frozen dataclass too
    except (AttributeError, TypeError):
        raise TypeError(
            f"a {type(sample).__name__} cannot hold the __sources__ of what is read for it: give "
            "the sample, a dict or an object with that field, or none"
        ) from None


# ------------------------------------------------------------------------------------- the stores


@dataclass(frozen=True)
class WebdatasetFileStore(FileStore):
    """The files in a dataset's shards, of all its split parts, by their names in the tars.

    A part of the sample ``images/0001`` has a name like ``images/0001.jpg``.
    """

    path: str
    """The dataset's folder."""
    index: Index = field(repr=False, compare=False)

    def read(self, key: str) -> tuple[bytes, SourceInfo]:
        of_sample, name = split_name(key) or (None, "")
        found: list[str] = []
        for shard, place in [] if of_sample is None else self.index.find_all(of_sample):
            for part, offset, size in self.index.parts(shard, place)[1]:
                if part == name:
                    shard_name = self.index.shards[shard]
                    data = files.read_at(os.path.join(self.index.root, shard_name), offset, size)
                    return data, SourceInfo(self.path, key, shard_name, (key,))
                found.append(part)
        raise SampleError(
            f"{self.path} has no file {key!r}: "
            + (
                f"the sample {of_sample!r} has the parts {', '.join(found)}"
                if found
                else "no sample has that key. Names are those in the shards, up to the base name's "
                "first dot a sample's key: images/0001.jpg, say"
            )
        )

    def get_path(self) -> str:
        return self.path


@dataclass(frozen=True)
class SamplesFileStore(FileStore):
    """The parts of any dataset's samples, as ``KEY.PART``: ``17.json`` of a file of JSON lines."""

    samples: Samples

    def read(self, key: str) -> tuple[bytes, SourceInfo]:
        of_sample, name = split_name(key) or (key, "")
        place = self.samples.find(of_sample)
        raw = {} if place is None else self.samples.load(place)
        if name.startswith("__") or name not in raw:
            parts = [part for part in raw if not part.startswith("__")]
            raise SampleError(
                f"{self.get_path()} has no {key!r}: "
                + (f"the sample has the parts {', '.join(parts)}" if raw else "no such sample")
            )
        (source,) = raw["__sources__"]
        return raw[name], SourceInfo(source.dataset_path, key, source.shard_name, (key,))

    def get_path(self) -> str:
        return self.samples.path

    def get_media_metadata(self, key: str) -> MediaMetadata:
        raise DatasetError(f"{self.get_path()} holds no media, and no metadata of {key!r}")


@dataclass(frozen=True)
class SystemFileStore(FileStore):
    """The files in a folder and in those below it.

    base_dir: the folder; nothing outside of it is read, links included. None: names are any paths.

    >>> import tempfile, pathlib
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     size = pathlib.Path(folder, "a.txt").write_text("a rose")
    ...     store = SystemFileStore(folder)
    ...     store.get("a.txt"), store.get_path() == folder
    (b'a rose', True)
    >>> SystemFileStore("/data").get("../etc/passwd")
    Traceback (most recent call last):
        ...
    energon_fn.errors.SampleError: '../etc/passwd' leads out of /data ...
    """

    base_dir: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        if self.base_dir is not None:  # the same folder in every process, and after chdir
            object.__setattr__(self, "base_dir", os.path.abspath(self.base_dir))

    def read(self, key: str) -> tuple[bytes, SourceInfo]:
        data = files.read_bytes(_locate(self.base_dir, key))
        return data, SourceInfo(self.get_path(), key, self.get_path(), (key,))

    def get_path(self) -> str:
        return os.fspath(self.base_dir or "")


_RANGE = re.compile(r"(.+)#bytes=([0-9]{1,18}):([0-9]{1,18})\Z", re.DOTALL)


@dataclass(frozen=True)
class ByteRangeFileStore(FileStore):
    """Pieces of the files in a folder, by names like ``blobs/0.bin#bytes=OFFSET:SIZE``.

    base_dir: as in :class:`SystemFileStore`. Of a ``.tar.gz`` the offsets are those of its
    decompressed stream, as everywhere.

    >>> import tempfile, pathlib
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     size = pathlib.Path(folder, "blob").write_text("a rose is a rose")
    ...     ByteRangeFileStore(folder).get("blob#bytes=2:4")
    b'rose'
    """

    base_dir: str | os.PathLike[str]

    def __post_init__(self) -> None:
        object.__setattr__(self, "base_dir", os.path.abspath(self.base_dir))

    def read(self, key: str) -> tuple[bytes, SourceInfo]:
        match = _RANGE.match(key)
        if match is None:
            raise SampleError(
                f"{key!r} is no range of bytes in {self.get_path()}: write "
                "path/to/file#bytes=OFFSET:SIZE"
            )
        name, offset, size = match[1], int(match[2]), int(match[3])
        path = _locate(self.base_dir, name)
        if (end := files.stream_size(path)) < offset + size:
            raise SampleError(f"{key!r} is not within {path}, which has {end} bytes")
        return files.read_at(path, offset, size), SourceInfo(self.get_path(), key, name, (key,))

    def get_path(self) -> str:
        return os.fspath(self.base_dir)


def _locate(base: str | os.PathLike[str] | None, name: str) -> str:
    """The real path of a file in a folder. Names come from data, so they are not trusted."""
    if "\0" in name:
        raise SampleError(f"{name!r} is no file name")
    path = os.path.realpath(name if base is None else os.path.join(base, name))
    if base is not None:
        root = os.path.realpath(base)
        if os.path.commonpath([root, path]) != root:
            raise SampleError(
                f"{name!r} leads out of {os.fspath(base)} to {path}, which is not read. Name "
                "files within the folder, or take a folder that they are all in"
            )
    if not os.path.isfile(path):
        what = "is a folder, not a file" if os.path.isdir(path) else "does not exist"
        raise SampleError(f"{os.fspath(base or '.')} has no file {name!r}: {path} {what}")
    return path


class FileStoreDecoder(Protocol):
    """Decodes one file by its name."""

    def decode(self, fname: str, data: bytes) -> Any: ...


@dataclass(frozen=True)
class DecodeFileStore(FileStore):
    """A store whose files are decoded by their extensions, as samples' parts are.

    decoder: what decodes raw samples, see :func:`~energon_fn.decoder`, or an object whose
    ``decode(name, data)`` does that with a file.

    >>> import tempfile, pathlib
    >>> from energon_fn import decoder
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     size = pathlib.Path(folder, "a.json").write_text("[7]")
    ...     DecodeFileStore(SystemFileStore(folder), decoder=decoder()).get("a.json")
    [7]
    """

    inner: FileStore
    decoder: Callable[[dict[str, Any]], dict[str, Any]] | FileStoreDecoder = field(kw_only=True)

    def read(self, key: str) -> tuple[bytes, SourceInfo]:
        return self.inner.read(key)

    def decode(self, key: str, data: bytes) -> Any:
        match = _RANGE.match(key)
        name = match[1] if match else key
        if hasattr(self.decoder, "decode"):
            return self.decoder.decode(name, data)
        base = name.rpartition("/")[2]
        part = base.partition(".")[2] or base
        sample = {"__key__": os.path.join(self.get_path(), key), part: data}  # the key: for errors
        return self.decoder(sample)[part]

    def get_path(self) -> str:
        return self.inner.get_path()

    def get_media_metadata(self, key: str) -> MediaMetadata:
        return self.inner.get_media_metadata(key)


@dataclass(frozen=True)
class PrimaryFileStore(FileStore):
    """The files of the dataset that a sample is of; names with a dot in front are its own.

    ``.wav`` is the current sample's part, ``0007.wav`` that of the sample 0007.
    """

    inner: FileStore
    current_key: str

    def _whole(self, key: str) -> str:
        return self.current_key + key if key.startswith(".") else key

    def read(self, key: str) -> tuple[bytes, SourceInfo]:
        return self.inner.read(self._whole(key))

    def decode(self, key: str, data: bytes) -> Any:
        return self.inner.decode(self._whole(key), data)

    def get_path(self) -> str:
        return self.inner.get_path()

    def get_media_metadata(self, key: str) -> MediaMetadata:
        return self.inner.get_media_metadata(self._whole(key))


# ------------------------------------------------------------------------------------ opening them


def open_store(url: str | os.PathLike[str], base: str | os.PathLike[str] = ".") -> FileStore:
    """The store that an entry of ``aux`` names; its files come as bytes.

    url: the path of a prepared dataset or a folder of tars, ``filesystem://FOLDER`` for the files
    in a folder, or ``byterange://FOLDER`` for pieces of them.
    base: what relative paths are relative to: the metadataset's folder.

    Raises :class:`~energon_fn.DatasetError` for what does not exist, and for object stores.

    >>> open_store("filesystem://images", "/no/such")
    Traceback (most recent call last):
        ...
    energon_fn.errors.DatasetError: the auxiliary store 'filesystem://images' leads to
    /no/such/images, which is not a folder...
    >>> open_store("msc://bucket/images")
    Traceback (most recent call last):
        ...
    energon_fn.errors.DatasetError: the auxiliary store 'msc://bucket/images' is not on a file
    system...
    """
    url = os.fspath(url)
    scheme, _, rest = url.rpartition("://")
    openers = {"": _open_dataset, "filesystem": SystemFileStore, "byterange": ByteRangeFileStore}
    if scheme not in openers:
        raise DatasetError(
            f"the auxiliary store {url!r} is not on a file system: mount or copy it. Known are a "
            "prepared dataset's path, filesystem://FOLDER and byterange://FOLDER"
        )
    folder = os.path.abspath(os.path.join(base, rest))
    if not os.path.isdir(folder):
        raise DatasetError(
            f"the auxiliary store {url!r} leads to {folder}, which is not a folder: check the "
            "path, or mount what it is on"
        )
    return cast("Callable[[str], FileStore]", openers[scheme])(folder)


def _open_dataset(folder: str) -> FileStore:
    index_path = str(metadata.meta_file(folder, "index.sqlite"))
    if metadata.is_prepared(folder):
        names = list(metadata.read_info(folder))
    else:
        names = files.list_tars(folder)
        if not names:
            raise DatasetError(
                f"the auxiliary store {folder} is neither prepared nor a folder of tars: prepare it"
                f" with `energon-fn prepare {folder}`, or write filesystem://{folder} if it holds "
                "plain files"
            )
    if not has_parts(index_path):
        index_path, _ = cached_index(folder, names)
    return WebdatasetFileStore(folder, Index(index_path, folder, tuple(names)))


def primary_store(samples: Samples) -> FileStore:
    """The files of a dataset's samples by name, for cookers that need the primary dataset.

    Raises :class:`~energon_fn.DatasetError` for what has no files of its own, such as a join.
    """
    if isinstance(samples, Source):
        return WebdatasetFileStore(samples.path, samples.index)
    if isinstance(samples, Jsonl):
        return SamplesFileStore(samples)
    raise DatasetError(
        f"{samples.path}: a cooker asks for the primary dataset (need_primary), which a "
        f"{type(samples).__name__.lower()} dataset is not: its samples are made of several. Name "
        "the datasets that the cooker looks into under `aux`"
    )


def cooker_arguments(
    cook: Callable[..., Any],
    aux: Mapping[str, FileStore],
    primary: FileStore | None,
    cache: object,
) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """What a cooker is given besides the sample: a function from the sample to keyword arguments.

    aux: the stores of the dataset, all of which it is given. primary, cache: the dataset's own
    files and the cache pool, which it is given if ``@cooker`` says that it needs them.

    Raises :class:`~energon_fn.DatasetError` if the cooker has no parameter for one of them, or one
    for which there is nothing.

    >>> def caption(sample, images): ...
    >>> of = cooker_arguments(caption, {"images": SystemFileStore("/data")}, None, None)
    >>> of({"__key__": "7"})
    {'images': SystemFileStore(base_dir='/data')}
    >>> cooker_arguments(caption, {}, None, None)
    Traceback (most recent call last):
        ...
    energon_fn.errors.DatasetError: the cooker caption asks for 'images', which it is not given: the
    dataset has no auxiliary stores. ...
    """
    need_primary, need_cache = needs_of(cook)
    own = {"primary": need_primary, "cache": need_cache}
    given = {**aux, **({"cache": cache} if need_cache else {})}
    whole = cook
    while isinstance(whole, partial):
        whole = whole.func
    name = getattr(whole, "__name__", repr(whole))
    if twice := [word for word in aux if own.get(word)]:
        raise DatasetError(
            f"the auxiliary store {twice[0]!r} ({aux[twice[0]].get_path()}) has the name of what "
            f"the cooker {name} is given anyway: give the store another name"
        )
    names = [*given, *(["primary"] if need_primary else [])]
    missing, unwanted = _mismatch(cook, names)
    if unwanted:
        known = aux.get(unwanted[0])
        what = repr(unwanted[0])
        if known is not None:
            what = f"the auxiliary store {what} ({known.get_path()})"
        raise DatasetError(
            f"the cooker {name} has no parameter for {what}, which it is given by keyword: write "
            f"def {name}(sample, {', '.join(names)}), or take **stores"
        )
    if missing:
        stores = f"the auxiliary stores {', '.join(aux)}" if aux else "no auxiliary stores"
        remedy = (
            f"Decorate it with @cooker(need_{missing[0]}=True)"
            if missing[0] in own
            else "Name it under `aux` where the dataset is named, or give the parameter a default"
        )
        raise DatasetError(
            f"the cooker {name} asks for {missing[0]!r}, which it is not given: the dataset has "
            f"{stores}. {remedy}"
        )
    if not need_primary:
        return lambda sample: dict(given)
    if primary is None:
        raise DatasetError(f"the cooker {name} asks for the primary dataset, and there is none")
    return lambda sample: {**given, "primary": PrimaryFileStore(primary, sample["__key__"])}


def _mismatch(cook: Callable[..., Any], given: list[str]) -> tuple[list[str], list[str]]:
    """Parameters behind the sample that would get nothing, and names that no parameter takes."""
    try:
        _, *parameters = signature(cook).parameters.values()
    except ValueError:  # a builtin, or a cooker without any parameter: calling it will tell
        return [], []
    by_name = {
        parameter.name: parameter
        for parameter in parameters
        if parameter.kind in (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
    }
    takes_all = any(parameter.kind is Parameter.VAR_KEYWORD for parameter in parameters)
    missing = [
        name for name, parameter in by_name.items()
        if parameter.default is Parameter.empty and name not in given
    ]  # fmt: skip
    return missing, [name for name in given if name not in by_name and not takes_all]
