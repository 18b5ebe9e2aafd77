"""Data loading for multimodal training: Megatron-Energon's task encoder as generator stages.

The way of the data: ``recipes`` (what datasets are made of others, in Python or YAML; opened from
``disk``) -> ``order`` (which sample when, on keys) -> ``stages`` (from iterator to iterator) ->
``streams`` (which go on from any state) -> ``pipeline`` (all, as a ``task_encoder`` says) ->
``lanes`` and ``processes`` (who runs which stream) -> ``loader``. Beside it ``look`` (how things
are shown, reports) and ``failures`` (samples that fail). This file lists the public names.
"""

from energon_fn.caching import CachePool, FileStoreCachePool, Lazy, NoCachePool
from energon_fn.collation import (
    batch_list,
    batch_pad_stack,
    batch_stack,
    collate,
    concat_pad,
    generic_batch,
    generic_concat,
    homogeneous_concat_mix,
)
from energon_fn.datasets import (
    get_dataset,
    get_train_dataset,
    get_val_dataset,
    get_val_datasets,
)
from energon_fn.decoding import SampleDecoder, decode_part, decoder
from energon_fn.describing import describe
from energon_fn.disk.jsonl import open_jsonl, prepare_jsonl
from energon_fn.disk.media import AVMetadata, ImageMetadata
from energon_fn.disk.prepare import BaseWebdatasetFactory, prepare_dataset, write_dataset_yaml
from energon_fn.disk.source import Source, open_source
from energon_fn.errors import (
    DatasetError,
    FatalSampleError,
    IgnoreSample,
    SampleError,
    SkipSample,
    StateError,
    WorkerError,
    log_exception,
    reraise_exception,
)
from energon_fn.failures.exclude import exclude
from energon_fn.failures.quarantine import quarantine, read_quarantine
from energon_fn.failures.trace import trace
from energon_fn.lanes import WorkerConfig, default_worker_config
from energon_fn.loader import Loader, get_loader, get_savable_loader
from energon_fn.look.sheet import contact_sheet
from energon_fn.look.show import show
from energon_fn.packing import best_fit, fill_ratio, knapsack
from energon_fn.pipeline import Dataset
from energon_fn.piping import pipe
from energon_fn.recipes.compose import blend, blend_epochized, concat, join, repeat, subset, using
from energon_fn.samples import (
    Batch,
    CaptioningSample,
    CrudeSample,
    ImageClassificationSample,
    ImageSample,
    InterleavedSample,
    MultiChoiceVQASample,
    OCRSample,
    Sample,
    SimilarityInterleavedSample,
    SourceInfo,
    TextSample,
    VidQASample,
    VQAOCRSample,
    VQASample,
    basic_sample_keys,
    edataclass,
)
from energon_fn.stages import (
    Cooker,
    PackedSamplesOutput,
    batch,
    cook,
    cooker,
    decode,
    encode_batch,
    encode_sample,
    epochize,
    group,
    limit,
    pack,
    postencode_sample,
    preencode_sample,
    shuffle,
    stage,
)
from energon_fn.stores import (
    DecodeFileStore,
    FileStore,
    FileStoreDecoder,
    PrimaryFileStore,
    SystemFileStore,
    open_store,
)
from energon_fn.task_encoder import (
    AugmentTaskEncoder,
    DefaultTaskEncoder,
    TaskEncoder,
    stateless,
)
from energon_fn.torch_dataset import as_iterable_dataset

__all__ = [
    "AVMetadata",
    "AugmentTaskEncoder",
    "BaseWebdatasetFactory",
    "Batch",
    "CachePool",
    "CaptioningSample",
    "Cooker",
    "CrudeSample",
    "Dataset",
    "DatasetError",
    "DecodeFileStore",
    "DefaultTaskEncoder",
    "FatalSampleError",
    "FileStore",
    "FileStoreCachePool",
    "FileStoreDecoder",
    "IgnoreSample",
    "ImageClassificationSample",
    "ImageMetadata",
    "ImageSample",
    "InterleavedSample",
    "Lazy",
    "Loader",
    "MultiChoiceVQASample",
    "NoCachePool",
    "OCRSample",
    "PackedSamplesOutput",
    "PrimaryFileStore",
    "Sample",
    "SampleDecoder",
    "SampleError",
    "SimilarityInterleavedSample",
    "SkipSample",
    "Source",
    "SourceInfo",
    "StateError",
    "SystemFileStore",
    "TaskEncoder",
    "TextSample",
    "VQAOCRSample",
    "VQASample",
    "VidQASample",
    "WorkerConfig",
    "WorkerError",
    "as_iterable_dataset",
    "basic_sample_keys",
    "batch",
    "batch_list",
    "batch_pad_stack",
    "batch_stack",
    "best_fit",
    "blend",
    "blend_epochized",
    "collate",
    "concat",
    "concat_pad",
    "contact_sheet",
    "cook",
    "cooker",
    "decode",
    "decode_part",
    "decoder",
    "default_worker_config",
    "describe",
    "edataclass",
    "encode_batch",
    "encode_sample",
    "epochize",
    "exclude",
    "fill_ratio",
    "generic_batch",
    "generic_concat",
    "get_dataset",
    "get_loader",
    "get_savable_loader",
    "get_train_dataset",
    "get_val_dataset",
    "get_val_datasets",
    "group",
    "homogeneous_concat_mix",
    "join",
    "knapsack",
    "limit",
    "log_exception",
    "open_jsonl",
    "open_source",
    "open_store",
    "pack",
    "pipe",
    "postencode_sample",
    "preencode_sample",
    "prepare_dataset",
    "prepare_jsonl",
    "quarantine",
    "read_quarantine",
    "repeat",
    "reraise_exception",
    "show",
    "shuffle",
    "stage",
    "stateless",
    "subset",
    "trace",
    "using",
    "write_dataset_yaml",
]
