"""Every name of the published package and its documentation is here, or there is another way."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import numbered, shards

import energon_fn
from energon_fn import WorkerConfig, av, compat, get_loader, get_train_dataset
from energon_fn.disk.prepare import write_dataset_yaml
from energon_fn.errors import DatasetError
from energon_fn.samples import CaptioningSample

# The names that megatron-energon 7.4.1 exports.
PUBLISHED = """
__version__ AugmentTaskEncoder BaseCoreDatasetFactory BaseWebdatasetFactory basic_sample_keys
batch_list batch_pad_stack batch_stack Batch BatchDataset BlendDataset CachePool CaptioningSample
CaptioningWebdataset concat_pad ConcatDataset cooker Cooker CrudeJsonlDatasetFactory CrudeSample
CrudeWebdataset DatasetLoader DatasetLoaderInterface DecodeFileStore
DefaultCrudeJsonlDatasetFactory DefaultDecoderWebdatasetFactory DefaultGenericWebdatasetFactory
DefaultTaskEncoder DirectLazy edataclass EpochizeDataset FileCacheLazy FileStore FileStoreCachePool
FileStoreDecoder FilterDataset GcDataset generic_batch generic_concat get_loader get_savable_loader
get_train_dataset get_val_dataset get_val_datasets GroupBatchDataset homogeneous_concat_mix
ImageClassificationSample ImageClassificationWebdataset ImageSample ImageWebdataset
InterleavedSample InterleavedWebdataset IterMapDataset JoinedWebdatasetFactory Lazy LimitDataset
load_dataset log_exception LogSampleDataset MapDataset Metadataset MetadatasetV2 MixBatchDataset
MockLazy MultiChoiceVQASample MultiChoiceVQAWebdataset NoCachePool OCRSample OCRWebdataset
PackingDataset PrimaryFileStore prepare_metadataset RepeatDataset reraise_exception Sample
SampleDecoder SavableDataLoader SavableDataset traverse_metadataset ShuffleBufferDataset
SimilarityInterleavedSample SimilarityInterleavedWebdataset SkipSample SourceInfo
StandardWebdatasetFactory stateless SystemFileStore TaskEncoder TextSample TextWebdataset
VidQASample VidQAWebdataset VQAOCRWebdataset VQASample VQAWebdataset WorkerConfig
"""

# What the Python examples of its documentation use besides, those of release 8 and old ones too.
DOCUMENTED = """
AVMetadata DataLoader EPath EnergonDatasetType FatalSampleError IgnoreSample ImageMetadata
JsonParser PRIORITY_FIRST PackedSamplesOutput Recipe RestoreKey VQAOCRSample WrappedRestoreKey
build_filter_index build_filter_index_from_shard_indexes get_dataset_from_config
get_processing_dataset get_processing_datasets register_dataset_factory_provider
wrap_sample_restore_key
"""


@pytest.mark.parametrize("name", (PUBLISHED + DOCUMENTED).split())
def test_every_name_is_here_or_says_what_is(name: str) -> None:
    if name in energon_fn.__all__:
        assert name not in compat.__all__
    elif name not in vars(compat):
        with pytest.raises(ImportError, match=f"energon_fn has no {name}; instead: "):
            exec(f"from energon_fn.compat import {name}")


@pytest.mark.parametrize("name", ["AVData", "AVDecoder", "get_clips_uniform",
                                  "get_single_frames_uniform"])  # fmt: skip
def test_audio_and_video_have_their_module_too(name: str) -> None:
    assert hasattr(av, name)


def test_these_are_the_published_names(published_python: str) -> None:
    code = "import json, megatron.energon as it; print(json.dumps(it.__all__))"
    ran = subprocess.run([published_python, "-W", "ignore", "-c", code],
                         capture_output=True, text=True, check=True)  # fmt: skip
    assert sorted(json.loads(ran.stdout)) == sorted(PUBLISHED.split())


def test_what_is_here_is_listed() -> None:
    made_here = {
        name
        for name, value in vars(compat).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == compat.__name__
    }
    assert made_here <= {*compat.__all__, "T"}
    assert {*compat.__all__} - {*PUBLISHED.split(), *DOCUMENTED.split()} == {
        "DatasetBlendMode", "LoadedDataset", "LoadedDatasetList", "TraversedDatasetReference",
    }  # fmt: skip
    with pytest.raises(AttributeError, match="no attribute 'BlendDatasets'"):
        compat.BlendDatasets  # noqa: B018


def test_nothing_imports_it() -> None:
    code = "import energon_fn.cli.commands, sys; assert 'energon_fn.compat' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# ------------------------------------------------------------------------------------- they work


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three prepared datasets and metadatasets of them."""
    for name, counts in (("a", [4, 4]), ("b", [6, 2]), ("c", [5])):
        names = shards(tmp_path / name, counts, numbered)
        parts, duplicates = compat.TextWebdataset.prepare_dataset(
            tmp_path / name, names, split_parts_ratio=[("train", 1)], shuffle_seed=None, workers=1
        )
        assert (sorted(parts), duplicates) == (["json", "txt"], [])
        write_dataset_yaml(tmp_path / name, "TextSample", {"text": "txt"})
    head = "__module__: megatron.energon\n__class__: MetadatasetV2\nsplits:\n  train:\n    "
    for name, block in {
        "blend": "blend: [{weight: 5, path: a, subflavors: {x: 1}}, {weight: 2, path: b, "
        "aux: {words: ./c, notes: 'filesystem://.'}}]",
        "nested": "blend: [{weight: 1, path: blend.yaml, subflavors: {x: 2, y: 3}}, "
        "{weight: 3, path: c}]",
        "epochs": "blend_epochized: [{repetitions: 2, path: a}, {repetitions: 3, path: half.yaml}]",
        "half": "blend_epochized: [{repetitions: 2, path: b}, {repetitions: 0.5, path: c}]",
        "both": "blend_epochized: [{repetitions: 2, path: blend.yaml}, {repetitions: 1, path: c}]",
        "one": "path: a\n    split_part: train",
        "joined": "join: [{path: a}, {path: b}]\n"
        "    joiner: {__module__: no_such_module, __class__: Pair}",
    }.items():
        (tmp_path / f"{name}.yaml").write_text(f"{head}{block}\n")
    return tmp_path


def test_numbers_of_datasets_are_multiplied(root: Path) -> None:
    def numbers(name: str) -> tuple[str, list[Any]]:
        loaded = compat.load_dataset(root / name).get_datasets(training=True, split_part="train")
        found = [
            (Path(one.dataset.path).name, one.weight, one.repetitions) for one in loaded.datasets
        ]
        return loaded.blend_mode.value, found

    assert numbers("blend.yaml") == ("dataset_weight", [("a", 5 / 7, None), ("b", 2 / 7, None)])
    assert numbers("nested.yaml") == (
        "dataset_weight", [("a", 5 / 28, None), ("b", 2 / 28, None), ("c", 0.75, None)],
    )  # fmt: skip
    assert numbers("epochs.yaml") == (
        "sample_repetitions", [("a", None, 2), ("b", None, 6), ("c", None, 1.5)],
    )  # fmt: skip
    assert numbers("one.yaml") == numbers("a") == ("none", [("a", None, None)])
    with pytest.raises(ValueError, match="blend and blend_epochized"):
        numbers("both.yaml")
    stores = compat.load_dataset(root / "blend.yaml").get_datasets(split_part="train").datasets[1]
    assert stores.aux["words"].get("00003.txt") == b"caption 3"


def test_a_loader_says_how_to_open(root: Path) -> None:
    loader = compat.DatasetLoader(path=root / "a", split_part="train", subflavors={"x": 1})
    samples = loader.get_dataset(split_part="val", training=False, worker_config=None)
    assert (len(samples), samples.subflavors) == (8, {"x": 1})
    more = loader.get_datasets(split_part="val", subflavors={"x": 0, "y": 2}).datasets
    assert more[0].dataset.subflavors == {"x": 1, "y": 2}
    with pytest.raises(ValueError, match=r"blend\.yaml is made of 2 datasets"):
        compat.MetadatasetV2(path=root / "blend.yaml").get_dataset()


def test_traversal_opens_nothing(root: Path) -> None:
    found = compat.traverse_metadataset(root / "nested.yaml", split_part="train")
    assert [(Path(one.path).name, one.split_part, one.subflavors) for one in found] == [
        ("a", "train", {"x": 1, "y": 3}), ("b", "train", {"x": 2, "y": 3}), ("c", "train", {}),
    ]  # fmt: skip
    assert found[1].aux == {"words": str(root / "c"), "notes": f"filesystem://{root}"}
    for name in "abc":
        (root / name).rename(root / f"{name}_away")
    assert compat.traverse_metadataset(root / "nested.yaml", split_part="train") == found
    parts = compat.traverse_metadataset(root / "joined.yaml", split_part="train")
    assert [Path(one.path).name for one in parts] == ["a", "b"]
    with pytest.raises(DatasetError, match="is no metadataset"):
        compat.traverse_metadataset(root / "c", split_part="train")


def test_preparing(root: Path) -> None:
    (table,) = compat.load_dataset(root / "joined.yaml").prepare()
    assert Path(table).parent == root / "joined.yaml.cache"
    prepared = compat.prepare_metadataset(root / "joined.yaml")
    assert (prepared.made, prepared.kept, prepared.removed) == ((), (table,), ())
    assert compat.load_dataset(root / "a").prepare() == []
    lines = root / "lines.jsonl"
    lines.write_text('{"a": 1}\n{"a": 2}\n')
    assert compat.CrudeJsonlDatasetFactory.prepare_dataset(lines) == 2
    assert compat.load_dataset(lines).prepare() == [f"{lines}.idx"]


def test_other_names(root: Path) -> None:
    config = WorkerConfig(rank=0, world_size=1, num_workers=0)
    dataset = get_train_dataset(root / "a", batch_size=2, worker_config=config)
    loader = get_loader(dataset)
    assert isinstance(dataset, compat.SavableDataset)
    assert isinstance(loader, compat.SavableDataLoader)
    assert compat.DataLoader is compat.SavableDataLoader
    lazy = compat.MockLazy("7.txt", lambda name: f"got {name}")
    sample = CaptioningSample(__key__="7", __restore_key__=(), image=None, caption="")  # type: ignore[arg-type]
    assert (lazy.get(sample), lazy.get(), lazy.fname) == ("got 7.txt", "got 7.txt", "7.txt")
