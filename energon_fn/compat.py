"""Names of the published megatron-energon that are not needed here, for code that moves over.

Most names are in ``energon_fn`` itself, so that changing the import is all there is to do. Here are
those that are classes there and only carry functions, or another name for what we have. For the
rest there is another way: importing them raises an ImportError that says which.

>>> from energon_fn.compat import BlendDataset
Traceback (most recent call last):
    ...
ImportError: energon_fn has no BlendDataset; instead: blend([(dataset, weight), ...]) ...

Nothing in the package imports this module. What the names mean is in the published documents
"Metadataset", "Programmatic Data Preparation" and "Customized Blending".
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from fractions import Fraction
from types import SimpleNamespace
from typing import Any, TypeVar

from energon_fn.caching import Lazy
from energon_fn.disk.jsonl import is_jsonl, open_jsonl, prepare_jsonl
from energon_fn.disk.metadata import FORMAT_VERSION
from energon_fn.disk.prepare import prepare_dataset, write_media_metadata
from energon_fn.disk.source import Samples
from energon_fn.errors import DatasetError
from energon_fn.loader import Loader
from energon_fn.pipeline import Dataset
from energon_fn.recipes.compose import using
from energon_fn.recipes.metadataset import is_metadataset
from energon_fn.recipes.opening import Mixed, Tree, open_recipe, prepare_metadataset
from energon_fn.recipes.outline import outline
from energon_fn.stores import FileStore

__all__ = [
    "CaptioningWebdataset",
    "CrudeJsonlDatasetFactory",
    "CrudeWebdataset",
    "DataLoader",
    "DatasetBlendMode",
    "DatasetLoader",
    "DefaultCrudeJsonlDatasetFactory",
    "DefaultDecoderWebdatasetFactory",
    "DefaultGenericWebdatasetFactory",
    "ImageClassificationWebdataset",
    "ImageWebdataset",
    "InterleavedWebdataset",
    "LoadedDataset",
    "LoadedDatasetList",
    "Metadataset",
    "MetadatasetV2",
    "MockLazy",
    "MultiChoiceVQAWebdataset",
    "OCRWebdataset",
    "SavableDataLoader",
    "SavableDataset",
    "SimilarityInterleavedWebdataset",
    "StandardWebdatasetFactory",
    "TextWebdataset",
    "TraversedDatasetReference",
    "VQAOCRWebdataset",
    "VQAWebdataset",
    "VidQAWebdataset",
    "load_dataset",
    "prepare_metadataset",
    "traverse_metadataset",
]

__version__ = FORMAT_VERSION
"""The published release whose names these are."""

T = TypeVar("T")

# --------------------------------------------------------------------------------- by another name

DataLoader = SavableDataLoader = Loader
SavableDataset = Dataset


def MockLazy(fname: str, get_fn: Callable[[str], T]) -> Lazy[T]:
    """A lazy whose value is made by a function of its name.

    >>> MockLazy("1.txt", str.upper).get()
    '1.TXT'
    """
    return Lazy(fname, lambda: (get_fn(fname), None))


# ------------------------------------------------------------------- classes that carry functions

CrudeWebdataset = SimpleNamespace(
    prepare_dataset=prepare_dataset, add_media_metadata=write_media_metadata
)
"""What a dataset of shards is prepared with; its sample type is said in ``dataset.yaml``."""

CaptioningWebdataset = ImageClassificationWebdataset = ImageWebdataset = CrudeWebdataset
InterleavedWebdataset = MultiChoiceVQAWebdataset = OCRWebdataset = CrudeWebdataset
SimilarityInterleavedWebdataset = TextWebdataset = VidQAWebdataset = CrudeWebdataset
VQAOCRWebdataset = VQAWebdataset = StandardWebdatasetFactory = CrudeWebdataset
DefaultGenericWebdatasetFactory = DefaultDecoderWebdatasetFactory = CrudeWebdataset


def _prepare_jsonl(path: str | os.PathLike[str]) -> int:
    """Index a file of JSON lines; how many there are."""
    prepare_jsonl(path)
    return len(open_jsonl(path))


CrudeJsonlDatasetFactory = SimpleNamespace(prepare_dataset=_prepare_jsonl)
DefaultCrudeJsonlDatasetFactory = CrudeJsonlDatasetFactory


# ------------------------------------------------------------------------- datasets that are opened


class DatasetBlendMode(Enum):
    """What the numbers of a :class:`LoadedDatasetList` are."""

    NONE = "none"
    DATASET_WEIGHT = "dataset_weight"
    SAMPLE_REPETITIONS = "sample_repetitions"


@dataclass(frozen=True)
class LoadedDataset:
    """A dataset, and how often it comes."""

    dataset: Samples
    weight: float | None = None
    """Its share of all samples."""
    repetitions: float | None = None
    """How often it is in an epoch."""
    aux: Mapping[str, FileStore] = field(default_factory=dict)


@dataclass(frozen=True)
class LoadedDatasetList:
    """The single datasets of a recipe, in its order."""

    datasets: list[LoadedDataset]
    blend_mode: DatasetBlendMode = DatasetBlendMode.NONE


@dataclass(frozen=True)
class TraversedDatasetReference:
    """A single dataset in a metadataset, and what is said about it."""

    path: str
    split_part: str
    aux: dict[str, str]
    subflavors: dict[str, Any]


@dataclass(frozen=True)
class DatasetLoader:
    """A dataset or metadataset by its path, with what is to be said about it."""

    path: str | os.PathLike[str]
    split_part: str | None = None
    subflavors: Mapping[str, Any] | None = None
    dataset_config: str | None = None
    split_config: str | None = None

    def get_datasets(
        self,
        *,
        split_part: str,
        training: bool = True,
        worker_config: object = None,
        subflavors: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> LoadedDatasetList:
        """Open all single datasets, with their numbers.

        training, worker_config: taken and not needed, as the samples are not in an order yet.
        options: those of :func:`~energon_fn.recipes.opening.open_recipe`.

        Raises ValueError for repetitions inside of weights and the other way round.
        """
        recipe = using(
            using(
                self.path,
                split_part=self.split_part,
                subflavors=self.subflavors,
                dataset_config=self.dataset_config,
                split_config=self.split_config,
            ),
            subflavors=subflavors,
        )
        opened = open_recipe(recipe, split_part, **options)
        hows = {tree.how for tree in _mixed(opened.tree)} - {"concat"}
        if len(hows) > 1:
            raise ValueError(
                f"{self.path} has {' and '.join(sorted(hows))}, so its datasets have no numbers of "
                "one kind: energon_fn.recipes.opening.open_recipe gives them and the tree of both"
            )
        numbers = [float(number) for number in _numbers(opened.tree)]
        loaded = zip(opened.sources, numbers, opened.aux, strict=True)
        if hows == {"blend"}:
            return LoadedDatasetList(
                [LoadedDataset(one, weight=number, aux=aux) for one, number, aux in loaded],
                DatasetBlendMode.DATASET_WEIGHT,
            )
        if hows:
            return LoadedDatasetList(
                [LoadedDataset(one, repetitions=number, aux=aux) for one, number, aux in loaded],
                DatasetBlendMode.SAMPLE_REPETITIONS,
            )
        return LoadedDatasetList([LoadedDataset(one, aux=aux) for one, _, aux in loaded])

    def get_dataset(self, *, split_part: str | None = None, **options: Any) -> Samples:
        """The one dataset; ValueError if there are several."""
        datasets = self.get_datasets(split_part=split_part or "train", **options).datasets
        if len(datasets) != 1:
            raise ValueError(f"{self.path} is made of {len(datasets)} datasets: use get_datasets")
        return datasets[0].dataset

    def prepare(self, split_part: str | None = None) -> list[str]:
        """Make the indexes of joins, or of a file of JSON lines; the files with them."""
        if is_metadataset(self.path):
            prepared = prepare_metadataset(self.path)
            return [*prepared.made, *prepared.kept]
        return [str(prepare_jsonl(self.path))] if is_jsonl(self.path) else []

    def traverse(self, *, split_part: str) -> list[TraversedDatasetReference]:
        """The single datasets by their paths; none is opened. Those of a join are told, too."""
        said = using(self.path, split_part=self.split_part, subflavors=self.subflavors)
        return [
            TraversedDatasetReference(
                os.path.abspath(str(node.recipe)),
                node.said.split_part or split_part,
                dict(node.said.aux),
                dict(node.said.subflavors),
            )
            for node in outline(said, split_part)
            if not node.inside
        ]


MetadatasetV2 = Metadataset = DatasetLoader


def load_dataset(path: str | os.PathLike[str], **options: Any) -> DatasetLoader:
    """A dataset or metadataset by its path; nothing is opened yet.

    >>> load_dataset("data/blend.yaml", split_part="val").split_part
    'val'
    """
    return DatasetLoader(path, **options)


def traverse_metadataset(
    path: str | os.PathLike[str], *, split_part: str
) -> list[TraversedDatasetReference]:
    """The single datasets in a split of a metadataset, in its order; none is opened.

    Raises :class:`~energon_fn.DatasetError` for what is no metadataset.

    >>> traverse_metadataset("data/coco", split_part="train")
    Traceback (most recent call last):
        ...
    energon_fn.errors.DatasetError: data/coco is no metadataset: that is a .yaml file ...
    """
    if not is_metadataset(path):
        raise DatasetError(
            f"{path} is no metadataset: that is a .yaml file with splits. A single dataset is "
            "opened with open_source"
        )
    return load_dataset(path).traverse(split_part=split_part)


def _mixed(tree: Tree) -> Iterator[Mixed]:
    if isinstance(tree, Mixed):
        yield tree
        for part in tree.parts:
            yield from _mixed(part)


def _numbers(tree: Tree, number: Fraction = Fraction(1)) -> Iterator[Fraction]:
    """The number of each dataset in a tree, those around it multiplied in."""
    if isinstance(tree, int):
        yield number
        return
    amounts = [Fraction(str(amount)) for amount in tree.amounts] or [Fraction(1)] * len(tree.parts)
    whole = sum(amounts) if tree.how == "blend" else 1
    for part, amount in zip(tree.parts, amounts, strict=True):
        yield from _numbers(part, number * amount / whole)


# ----------------------------------------------------------------------- what is done another way

_INSTEAD = {
    # wrappers, as in overrides of build_train_datasets and build_val_datasets
    "BaseCoreDatasetFactory": "open_source(path, split_part) gives a dataset's samples",
    "BatchDataset": "the batch_size of get_train_dataset, or the stage batch(n)",
    "BlendDataset": "blend([(dataset, weight), ...]) as the path of get_train_dataset",
    "ConcatDataset": "concat([dataset, ...]) as the path of get_train_dataset",
    "EpochizeDataset": "the virtual_epoch_length of get_train_dataset, or the stage epochize(n)",
    "FilterDataset": "raise SkipSample in any method of the task encoder",
    "GcDataset": "nothing: leave it out",
    "GroupBatchDataset": "a task encoder's batch_group_criterion, or the stage group",
    "IterMapDataset": "write encode_sample as a generator, or use a stage of your own (stage)",
    "LimitDataset": "the limit of get_val_dataset, or the stage limit(n)",
    "LogSampleDataset": "loop over the loader, or look with `energon-fn preview`",
    "MapDataset": "a task encoder's encode_sample, or the stage encode_sample(function)",
    "MixBatchDataset": "blend([(dataset, weight), ...]), which mixes samples within batches; "
    "homogeneous_concat_mix joins batches",
    "PackingDataset": "the packing_buffer_size of get_train_dataset, or the stage pack",
    "RepeatDataset": "repeat(n)(dataset), and the repeat of get_train_dataset",
    "ShuffleBufferDataset": "the shuffle_buffer_size of get_train_dataset, or the stage shuffle(n)",
    "build_train_datasets": "give get_train_dataset a recipe: blend, concat, join, subset",
    # datasets and how they are opened
    "DatasetLoaderInterface": "load_dataset(path) of this module gives a DatasetLoader",
    "DirectLazy": "NoCachePool().get_lazy(store, name)",
    "FileCacheLazy": "FileStoreCachePool().get_lazy(store, name)",
    "JoinedWebdatasetFactory": "join([dataset, ...], joiner) as the path of get_train_dataset",
    "EPath": "a str or pathlib.Path; object stores are to be mounted",
    "get_dataset_from_config": "open_source(path, split_part)",
    "get_dataset_type": "is_metadataset of energon_fn.recipes.metadataset, is_jsonl of "
    "energon_fn.disk.jsonl",
    # of release 8
    "EnergonDatasetType": "an object with the methods of energon_fn.disk.source.Samples as path",
    "JsonParser": "yaml and dataclasses of your own",
    "PRIORITY_FIRST": "an object with the methods of energon_fn.disk.source.Samples as path",
    "Recipe": "blend, concat, join, subset, using; in YAML __class__: MetadatasetV2",
    "RestoreKey": "the loader's state_dict says where it is",
    "WrappedRestoreKey": "the loader's state_dict says where it is",
    "build_filter_index": "list what is left out in the split.yaml, under exclude",
    "build_filter_index_from_shard_indexes": "list what is left out in the split.yaml, under "
    "exclude",
    "get_processing_dataset": "get_val_dataset(path, split_part=..., batch_size=None)",
    "get_processing_datasets": "get_val_datasets(path, split_part=..., batch_size=None)",
    "register_dataset_factory_provider": "an object with the methods of "
    "energon_fn.disk.source.Samples as path",
    "wrap_sample_restore_key": "the loader's state_dict says where it is",
}


def __getattr__(name: str) -> Any:
    # An AttributeError's text is lost where a name is imported.
    if name in _INSTEAD:
        raise ImportError(f"energon_fn has no {name}; instead: {_INSTEAD[name]}", name=__name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
