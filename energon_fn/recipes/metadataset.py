"""Metadatasets: YAML files that make one dataset of several, read into recipes.

::

    __module__: megatron.energon
    __class__: MetadatasetV2
    splits:
      train:
        blend:
        - {path: ./coco, weight: 5}
        - {path: ./coyo, weight: 2, subset: {range: [0%, 80%]}}
      val:
        path: ./coco

A *block* is a ``path``, ``blend``, ``blend_epochized``, ``concat`` or ``join`` with options beside
it, and all but the first hold blocks again. Nothing but the one file is read here: a path may lead
to a dataset or to another metadataset, which :mod:`energon_fn.recipes.opening` finds out.

The format is that of the published megatron-energon (its documents "Metadataset", "Joining
Datasets", "Dataset Subsets", "Epochized Blending" and "Crude Datasets and Auxiliary Data"), where
blocks nest by files only, and ``concat`` and options beside a ``blend`` are not known.
"""

from __future__ import annotations

import os
import re
import reprlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args
from urllib.parse import quote

import yaml

from energon_fn.disk import files
from energon_fn.disk.fields import EntryError, is_ours, there_are
from energon_fn.disk.metadata import META_FOLDER, _line_in, _Loader, _located, _mapping
from energon_fn.errors import logger
from energon_fn.recipes.compose import (
    Join,
    NonMatch,
    Recipe,
    Using,
    blend,
    blend_epochized,
    concat,
    join,
    subset,
)

_KINDS = ("path", "blend", "blend_epochized", "concat", "join")
_OPTIONS = ("split_part", "split", "split_config", "dataset_config", "subflavors", "subflavor",
            "aux", "subset", "shuffle_over_epochs_multiplier")  # fmt: skip
_STORES = ("filesystem://", "byterange://", "")  # what the path of an auxiliary store begins with
_BELONGS = {
    "weight": "to an entry of blend",
    "repetitions": "to an entry of blend_epochized",
    "nonmatch": "to a part of join",
    "joiner": "beside join",
}
_EXAMPLES = {
    "datasets": "- {path: ./coco, weight: 5}",
    "blend": "- {path: ./coco, weight: 5}",
    "blend_epochized": "- {path: ./coco, repetitions: 2}",
    "concat": "- {path: ./coco}",
    "join": "- {path: ./images}\n- {path: ./texts, nonmatch: skip}",
    "joiner": "  __module__: megatron.energon\n  __class__: CaptioningSample",
    "subset": "  range: [0%, 80%]",
}


def is_metadataset(path: str | os.PathLike[str]) -> bool:
    """Whether this is a YAML file that may be a metadataset; those in ``.nv-meta`` are not.

    >>> is_metadataset("data/coco"), is_metadataset("data/coco/.nv-meta/dataset.yaml")
    (False, False)
    """
    path = Path(path)
    is_yaml = path.suffix in (".yaml", ".yml") and path.parent.name != META_FOLDER
    return is_yaml and path.is_file()


def splits_of(path: str | os.PathLike[str]) -> list[str]:
    """The names of a metadataset's splits, in its order. Raises DatasetError.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = Path(folder, "m.yaml")
    ...     size = file.write_text("splits: {train: {datasets: [{path: a}]}, val: {path: b}}")
    ...     splits_of(file)
    ['train', 'val']
    """
    file = _File.read(path)
    with _located(file.path):
        return list(file.splits())


def read_metadataset(path: str | os.PathLike[str], split_part: str) -> Recipe:
    """The recipe that a metadataset has for one of its splits; no dataset is looked at.

    split_part: "train", "val", "test" or whatever the splits are called. It is also the split part
    of the datasets for which nothing else is said.

    Paths become absolute, relative ones from the YAML's folder. A joiner stays the mapping of its
    two names.

    Raises :class:`~energon_fn.DatasetError`, which names file, line and key, for a missing split,
    unknown keys, values that make no sense, and paths that are not local.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = Path(folder, "m.yaml")
    ...     size = file.write_text('''\\
    ... __module__: megatron.energon
    ... __class__: MetadatasetV2
    ... splits:
    ...   train:
    ...     path: /data/coco
    ... ''')
    ...     recipe = read_metadataset(file, "train")
    ...     recipe.inner, recipe.split_part, recipe.where.removeprefix(folder)
    ('/data/coco', 'train', '/m.yaml, line 4')
    """
    file = _File.read(path)
    with _located(file.path):
        splits = file.splits()
        if split_part not in splits:
            problem = f"there is no split {split_part!r}{there_are(split_part, splits)}"
            raise EntryError(problem, "splits")
        entry = splits[split_part]
        try:
            recipe = _block(entry) if file.second else _first(entry)
        except RecursionError:
            problem = "it goes on without end: an alias (*name) leads to what is around it."
            raise EntryError(problem, "splits", split_part) from None
    if file.ignored:
        logger.warning(
            "%s: shuffle_over_epochs_multiplier is ignored, line %s: it holds for all datasets "
            "together, as an argument of get_train_dataset",
            file.path,
            ", ".join(map(str, file.ignored)),
        )
    return replace(recipe, split_part=recipe.split_part or split_part)


# ------------------------------------------------------------------------------ files and entries


@dataclass(frozen=True)
class _File:
    path: Path
    content: dict[Any, Any]
    root: yaml.Node | None
    """The same with the lines of everything."""
    ignored: list[int | None] = field(default_factory=list)
    """The lines of options that were read and mean nothing here."""

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> _File:
        path = Path(os.path.abspath(path))
        data = files.read_bytes(path)
        content = _mapping(path, data, ("__module__", "__class__", "splits"))
        return cls(path, content, yaml.compose(data, _Loader))

    @property
    def second(self) -> bool:
        """Whether it is a MetadatasetV2; what does not say it is not."""
        return self.content.get("__class__") == "MetadatasetV2"

    def splits(self) -> dict[str, _Entry]:
        """Name -> what is said for it. Raises EntryError for what is no metadataset of ours."""
        version = self.content.get("__class__", "Metadataset")
        module = self.content.get("__module__", "megatron.energon")
        if not is_ours(str(module)):
            raise EntryError(
                f"{version} of the module {module} is not ours. Write __module__: megatron.energon",
                "__module__",
            )
        known = ("MetadatasetV2", "Metadataset")
        if version not in known:
            problem = f"unknown class {version!r} of metadatasets{there_are(version, known)}"
            raise EntryError(problem, "__class__")
        splits = self.content.get("splits")
        if not isinstance(splits, dict):
            raise EntryError(
                f"splits must map names to what they are made of, not {splits!r}. Write for example"
                "\nsplits:\n  train:\n    path: ./coco",
                "splits",
            )
        return {str(name): _Entry(value, ("splits", str(name)), self)
                for name, value in splits.items()}  # fmt: skip


@dataclass(frozen=True)
class _Entry:
    """A value in the file, and the keys that lead to it."""

    value: Any
    keys: tuple[str | int, ...]
    file: _File

    def at(self, key: Any) -> _Entry:
        name = key if isinstance(self.value, list) else str(key)
        return _Entry(self.value[key], (*self.keys, name), self.file)

    def each(self) -> list[_Entry]:
        """The entries of a list or mapping."""
        return [self.at(key) for key in (self.value if isinstance(self.value, dict)
                                         else range(len(self.value)))]  # fmt: skip

    @property
    def line(self) -> int | None:
        return _line_in(self.file.root, self.keys)

    def must(self, be: str) -> EntryError:
        """The error that says what kind of thing it must be, with an example if there is one."""
        key = self.keys[-1]
        what = f"entry {key + 1} of {self.keys[-2]}" if isinstance(key, int) else key
        example = f" Write for example\n{key}:\n{_EXAMPLES[key]}" if key in _EXAMPLES else ""
        return self.wrong(f"{what} must be {be}, not {reprlib.repr(self.value)}.{example}")

    def wrong(self, message: str) -> EntryError:
        return EntryError(message, *self.keys)

    @contextmanager
    def told(self) -> Iterator[None]:
        """What :mod:`energon_fn.recipes.compose` finds wrong is wrong with this entry."""
        try:
            yield
        except ValueError as error:
            raise self.wrong(f"{error}.") from None


def _check_keys(entry: _Entry, known: Iterable[str]) -> None:
    """Raises EntryError for what is no mapping, and for keys that are not known in it."""
    if not isinstance(entry.value, dict):
        raise entry.must("a mapping, {path: ./coco} for example")
    for key in entry.value:
        if key not in known:
            where = f", but {_BELONGS[key]}" if key in _BELONGS else ""
            problem = f"{key!r} does not belong here{where}{there_are(key, known)}"
            raise entry.at(key).wrong(problem)


# ------------------------------------------------------------------------------------------ blocks


def _first(entry: _Entry) -> Using:
    """A split of a Metadataset, the first version: a blend by another name."""
    try:
        _check_keys(entry, ("datasets",))
    except EntryError as error:
        remedy = "For blend, path and all else write __class__: MetadatasetV2 at the top."
        raise EntryError(f"{error} {remedy}", *error.keys) from None
    if "datasets" not in entry.value:
        raise entry.wrong(f"datasets is needed. Write\ndatasets:\n{_EXAMPLES['datasets']}")
    return Using(_weighed(entry.at("datasets"), "weight", blend), where=_where(entry))


def _block(entry: _Entry, *more: str) -> Using:
    """A block with its options; ``more`` are keys in it that whoever holds it reads."""
    of_kind = ("joiner",) if isinstance(entry.value, dict) and "join" in entry.value else ()
    _check_keys(entry, (*_KINDS, *of_kind, *more, *_OPTIONS))
    kinds = [key for key in entry.value if key in _KINDS]
    if len(kinds) != 1:
        found = f"{' and '.join(kinds)} are given" if kinds else "none is given"
        raise entry.wrong(f"exactly one of {', '.join(_KINDS)} is needed, but {found}.")
    recipe = _MAKERS[kinds[0]](entry)
    options = {key: entry.at(key) for key, value in entry.value.items() if value is not None}
    if "subset" in options:
        recipe = _subset(options["subset"], recipe)
    if "split" in options and "split_part" in options:
        raise options["split"].wrong("split is another name of split_part: keep one of them.")
    if "shuffle_over_epochs_multiplier" in entry.value:
        _multiplier(entry.at("shuffle_over_epochs_multiplier"))
    return Using(
        recipe,
        split_part=_name(options.get("split_part") or options.get("split")),
        dataset_config=_name(options.get("dataset_config")),
        split_config=_name(options.get("split_config")),
        subflavors=_subflavors(options),
        aux=_aux(options),
        where=_where(entry),
    )


def _where(entry: _Entry) -> str:
    return f"{entry.file.path}, line {entry.line}"


def _path(block: _Entry) -> Recipe:
    entry = block.at("path")
    return _absolute(entry, entry.value)


def _weighed(
    entry: _Entry, amount: str, combine: Callable[[list[tuple[Recipe, float]]], Recipe]
) -> Recipe:
    """Blocks with a number each, which is checked by itself first, to know its line."""
    parts: list[tuple[Recipe, float]] = []
    for part in _list(entry):
        inner, number = _block(part, amount), 1.0
        if amount in part.value:
            number = _number(part.at(amount))
            with part.at(amount).told():
                combine([(str(part.value.get("path", "what is here")), number)])
        parts.append((inner, number))
    with entry.told():
        return combine(parts)


def _concat(block: _Entry) -> Recipe:
    entry = block.at("concat")
    parts = [_block(part) for part in _list(entry)]
    with entry.told():
        return concat(parts)


def _join(block: _Entry) -> Join:
    entry = block.at("join")
    if not isinstance(entry.value, list | dict):
        raise entry.must("a list of datasets, or a mapping from the joiner's arguments to them")
    entries = entry.each()
    parts = [_block(part, "nonmatch") for part in entries]
    modes: list[Any] = [_nonmatch(part) for part in entries]
    for part in entries[:1]:
        if modes[0] != "error":
            remedy = "It is for the others, that may lack a sample of the first one: remove it."
            raise part.at("nonmatch").wrong(f"the first part of a join has no nonmatch. {remedy}")
    if "joiner" not in block.value:
        raise block.wrong(f"join needs a joiner. Write for example\njoiner:\n{_EXAMPLES['joiner']}")
    joiner = block.at("joiner")
    names = joiner.value if isinstance(joiner.value, dict) else {}
    if names.keys() != {"__module__", "__class__"}:
        raise joiner.must("the __module__ and __class__ of a sample type")
    with entry.told():
        if isinstance(entry.value, list):
            made = join(parts, names, nonmatch=dict(enumerate(modes)))
        else:
            called = [str(name) for name in entry.value]
            made = join(dict(zip(called, parts, strict=True)), names,
                        nonmatch=dict(zip(called, modes, strict=True)))  # fmt: skip
    # Where the published package keeps the same for its joins, under a name of its own.
    name = quote(".".join(map(str, entry.keys[1:])), safe="")
    return replace(made, index=os.path.join(f"{entry.file.path}.cache", name))


def _nonmatch(part: _Entry) -> str:
    mode = part.value.get("nonmatch", "error")
    if mode not in get_args(NonMatch):
        raise part.at("nonmatch").must(f"one of {', '.join(get_args(NonMatch))}")
    return str(mode)


_MAKERS: dict[str, Callable[[_Entry], Recipe]] = {
    "path": _path,
    "blend": lambda block: _weighed(block.at("blend"), "weight", blend),
    "blend_epochized": lambda block: _weighed(
        block.at("blend_epochized"), "repetitions", blend_epochized
    ),
    "concat": _concat,
    "join": _join,
}


# ---------------------------------------------------------------------------------------- values


def _list(entry: _Entry) -> list[_Entry]:
    if not isinstance(entry.value, list):
        raise entry.must("a list of datasets")
    return entry.each()


def _number(entry: _Entry) -> float:
    value = entry.value
    if isinstance(value, str):  # 1e-3 is one in YAML 1.1, but a number to the published package
        with suppress(ValueError):
            value = float(value)
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf"):
        return value
    raise entry.must("a number above 0")


def _name(entry: _Entry | None) -> str | None:
    if entry is None:
        return None
    if not isinstance(entry.value, str) or not entry.value:
        raise entry.must("a name")
    return entry.value


def _subset(entry: _Entry, inner: Recipe) -> Recipe:
    bounds = entry.value.get("range") if isinstance(entry.value, dict) else None
    if not isinstance(bounds, list) or len(bounds) != 2 or len(entry.value) != 1:
        raise entry.must("a mapping with a range, [start, end]")
    with entry.at("range").told():
        return subset(*bounds)(inner)


def _subflavors(options: dict[Any, _Entry]) -> dict[str, Any]:
    # One by name of old, which the published package calls like this too.
    found = {"__subflavor__": options["subflavor"].value} if "subflavor" in options else {}
    if "subflavors" in options:
        entry = options["subflavors"]
        if not isinstance(entry.value, dict):
            raise entry.must("a mapping")
        found |= {str(name): value for name, value in entry.value.items()}
    return found


def _aux(options: dict[Any, _Entry]) -> dict[str, str]:
    if "aux" not in options:
        return {}
    if not isinstance(options["aux"].value, dict):
        raise options["aux"].must("a mapping from names to paths")
    found = {}
    for entry in options["aux"].each():
        scheme = next(scheme for scheme in _STORES if str(entry.value).startswith(scheme))
        path = entry.value[len(scheme) :] if scheme else entry.value
        found[str(entry.keys[-1])] = scheme + _absolute(entry, path)
    return found


def _absolute(entry: _Entry, path: Any) -> str:
    if not isinstance(path, str) or not path:
        raise entry.must("a path")
    if re.match(r"[A-Za-z][\w+.-]*://", path):
        raise entry.wrong(
            f"{entry.keys[-1]} is {path!r}, but only local paths are read. Mount what it leads to, "
            "or copy it, and write its path without a scheme."
        )
    return os.path.normpath(os.path.join(entry.file.path.parent, path))


def _multiplier(entry: _Entry) -> None:
    if entry.value is not None and (
        type(entry.value) is not int or (entry.value < 1 and entry.value != -1)
    ):
        raise entry.must("a number of epochs, -1 or null")
    if entry.value != 1:
        entry.file.ignored.append(entry.line)
