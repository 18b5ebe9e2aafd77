"""The documented task encoder, as users of the published package write it, on real pictures."""

import dataclasses
import re
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from energon_fn import get_loader
from energon_fn.demo import build_demo
from energon_fn.disk.prepare import prepare_dataset, write_dataset_yaml
from energon_fn.samples import CaptioningSample

DOCUMENT = Path(__file__).parents[2] / "shared" / "reference" / "task_encoders.md"
"""The published page on task encoders, where a copy lies beside the checkout."""


def torchvision_transforms() -> Any:
    """torchvision's transforms, also where its wheel does not fit a CPU-only torch.

    The wheel's operators then cannot be loaded. The transforms do not use them, but the import
    wants them to be declared.
    """
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}() -> ()")
    from torchvision import transforms

    return transforms


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    names = build_demo(folder, samples=96, shards=4)
    prepare_dataset(folder, names, split_parts_ratio=[("train", 3), ("val", 1)])
    write_dataset_yaml(folder, CaptioningSample, {"image": "jpg", "caption": "txt"})
    return folder


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Hugging Face tokenizer, made here: nothing is downloaded."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, show_progress=False)
    tokenizer.train_from_iterator(["a red circle on a blue background"] * 9, trainer)
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


@pytest.mark.skipif(not DOCUMENT.exists(), reason="the published page is not beside the checkout")
def test_the_published_example_runs_with_the_import_changed(
    dataset: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torchvision_transforms()
    encoder, usage = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    assert "image_transform(sample.image)" in encoder
    assert "'/my/dataset/path'" in usage
    assert "'gpt2'" in usage
    # The page annotates a Tokenizer that it does not import, and its loop has no end.
    script = f"from typing import Any as Tokenizer\n{encoder}\n{usage}"
    script = script[: script.index("for data in train_loader")]
    script = script.replace("megatron.energon", "energon_fn")
    script = script.replace("'/my/dataset/path'", repr(str(dataset)))
    script = script.replace("'gpt2'", repr(str(tokenizer_folder)))
    module: dict[str, Any] = {"__name__": "reference"}
    monkeypatch.setitem(sys.modules, "reference", type(sys)("reference"))
    exec(compile(script, str(DOCUMENT), "exec"), module)
    sys.modules["reference"].__dict__.update(module)  # where workers look for the batch's type

    batches = list(islice(module["train_loader"], 5))
    for batch in batches:
        assert type(batch) is module["CaptioningBatch"]
        assert batch.images.shape == (32, 3, 224, 224)
        assert batch.images.dtype == torch.float32
        assert -0.01 < batch.images.min() < 0.5 < batch.images.max() < 1.01  # resized
        assert len(batch.__keys__) == len(batch.text_tokens) == len(batch.text_attn_mask) == 32
        assert [len(row) for row in batch.text_tokens] == [len(r) for r in batch.text_attn_mask]
    seen = [key for batch in batches for key in batch.__keys__]
    assert len(set(seen[:64])) > 32  # two of four workers have given a batch of their share each

    # The example says that its `batch` matches the default: without it the same batches come.
    del module["CaptioningTaskEncoder"].batch
    again = list(islice(get_loader(module["train_loader"].dataset), 5))
    for mine, default in zip(batches, again, strict=True):
        for field in dataclasses.fields(mine):
            a, b = getattr(mine, field.name), getattr(default, field.name)
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
