"""Data loading for multimodal training: Megatron-Energon's task encoder as generator stages.

``plan`` decides which sample comes when, on keys; ``source`` loads samples by key; ``stages``
transform them, from iterator to iterator; ``lanes`` say who runs which stream. The files' names
show the data's way; this one lists the public names.
"""

from energon_fn.collation import (
    batch_list,
    batch_pad_stack,
    batch_stack,
    collate,
    generic_batch,
)
from energon_fn.datasets import (
    get_dataset,
    get_train_dataset,
    get_val_dataset,
    get_val_datasets,
)
from energon_fn.decoding import decode_part, decoder
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
from energon_fn.lanes import WorkerConfig, default_worker_config
from energon_fn.loader import Loader, get_loader, get_savable_loader
from energon_fn.pipeline import Dataset
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
from energon_fn.sheet import contact_sheet
from energon_fn.stages import (
    Cooker,
    batch,
    cook,
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
from energon_fn.task_encoder import (
    AugmentTaskEncoder,
    DefaultTaskEncoder,
    TaskEncoder,
    stateless,
)

__all__ = [
    "AugmentTaskEncoder",
    "BaseWebdatasetFactory",
    "Batch",
    "CaptioningSample",
    "Cooker",
    "CrudeSample",
    "Dataset",
    "DatasetError",
    "DefaultTaskEncoder",
    "FatalSampleError",
    "IgnoreSample",
    "ImageClassificationSample",
    "ImageSample",
    "InterleavedSample",
    "Loader",
    "MultiChoiceVQASample",
    "OCRSample",
    "Sample",
    "SampleError",
    "SimilarityInterleavedSample",
    "SkipSample",
    "Source",
    "SourceInfo",
    "StateError",
    "TaskEncoder",
    "TextSample",
    "VQAOCRSample",
    "VQASample",
    "VidQASample",
    "WorkerConfig",
    "WorkerError",
    "basic_sample_keys",
    "batch",
    "batch_list",
    "batch_pad_stack",
    "batch_stack",
    "collate",
    "contact_sheet",
    "cook",
    "decode",
    "decode_part",
    "decoder",
    "default_worker_config",
    "edataclass",
    "encode_batch",
    "encode_sample",
    "epochize",
    "generic_batch",
    "get_dataset",
    "get_loader",
    "get_savable_loader",
    "get_train_dataset",
    "get_val_dataset",
    "get_val_datasets",
    "group",
    "limit",
    "log_exception",
    "open_source",
    "pack",
    "postencode_sample",
    "preencode_sample",
    "prepare_dataset",
    "reraise_exception",
    "shuffle",
    "stage",
    "stateless",
    "write_dataset_yaml",
]
