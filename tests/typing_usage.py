"""Documented usage, as a type checker and an IDE see it: ``mypy`` reads this file with the package.

:func:`usage` also runs, on the demo's dataset. ``assert_type`` is what the checker has to agree to.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, assert_type

import toolz
import torch

from energon_fn import (
    AugmentTaskEncoder,
    Batch,
    CaptioningSample,
    Cooker,
    CrudeSample,
    Dataset,
    DefaultTaskEncoder,
    Loader,
    PackedSamplesOutput,
    Sample,
    SkipSample,
    SourceInfo,
    TextSample,
    WorkerConfig,
    basic_sample_keys,
    batch,
    batch_list,
    batch_stack,
    blend,
    blend_epochized,
    concat,
    cooker,
    decode,
    edataclass,
    encode_batch,
    encode_sample,
    epochize,
    get_dataset,
    get_loader,
    get_savable_loader,
    get_train_dataset,
    get_val_dataset,
    get_val_datasets,
    group,
    join,
    knapsack,
    limit,
    open_source,
    pack,
    pipe,
    repeat,
    shuffle,
    stage,
    stateless,
    subset,
    using,
)

# A task encoder


@edataclass
class RawBatch(Batch):
    image: torch.Tensor  # (n, c, h, w)
    caption: list[str]


@edataclass
class CaptioningBatch(Batch):
    images: torch.Tensor  # (n, c, h, w)
    texts: list[str]


class MyEncoder(DefaultTaskEncoder[CaptioningSample, CaptioningSample, RawBatch, CaptioningBatch]):
    def __init__(self, size: int = 32):
        super().__init__(raw_batch_type=RawBatch)
        self.size = size

    @stateless
    def encode_sample(self, sample: CaptioningSample) -> CaptioningSample:
        size = (self.size, self.size)
        sample.image = torch.nn.functional.interpolate(sample.image[None], size)[0]
        return sample

    def batch(self, samples: list[CaptioningSample]) -> RawBatch:
        actions = {"image": batch_stack, "caption": batch_list}
        return self._batch(samples, result_type=RawBatch, actions=actions)

    def encode_batch(self, batch_data: RawBatch) -> CaptioningBatch:
        images, texts = batch_data.image, batch_data.caption
        return CaptioningBatch.derive_from(batch_data, images=images, texts=texts)


class Defaults(DefaultTaskEncoder[CaptioningSample, CaptioningSample, RawBatch, CaptioningBatch]):
    """The types are known from the brackets where a method is left to its default."""


class Short(DefaultTaskEncoder[Any, Any, Any, Any]):
    """Where the brackets do not tell, the method does."""

    def encode_batch(self, batch_data: CaptioningSample) -> CaptioningBatch:
        return CaptioningBatch.derive_from(batch_data, images=batch_data.image, texts=[])


class Bare:
    """Any object with some of the methods will do."""

    def encode_batch(self, batch_data: CaptioningSample) -> CaptioningBatch:
        return CaptioningBatch.from_samples([], images=batch_data.image, texts=[])


class Lines:
    """What a checker cannot know it does not claim: no ``encode_batch``, so batches are Any."""

    def encode_sample(self, sample: CaptioningSample) -> Iterator[TextSample]:
        for line in sample.caption.splitlines():
            yield TextSample(**basic_sample_keys(sample), text=line)


class Brighter(
    AugmentTaskEncoder[CaptioningSample, CaptioningSample, RawBatch, CaptioningBatch],
):
    @stateless(restore_seeds=True, failure_tolerance=10)
    def encode_sample(
        self, sample: CaptioningSample
    ) -> CaptioningSample | Iterator[CaptioningSample]:
        if not sample.caption:
            raise SkipSample
        sample.image = sample.image * (1 + torch.rand(1))
        return super().encode_sample(sample)


@edataclass
class TokenSample(Sample):
    tokens: torch.Tensor  # (n,)
    lengths: list[int]


def cost(sample: TokenSample) -> int:
    return len(sample.tokens)


class Packing(DefaultTaskEncoder[TextSample, TokenSample, TokenSample, TokenSample]):
    # Pyright wants a def here, and says so unless told not to.
    select_samples_to_pack = knapsack(cost=cost, capacity=4096)  # pyright: ignore[reportAssignmentType]

    def encode_sample(self, sample: TextSample) -> TokenSample:
        tokens = torch.tensor(list(sample.text.encode()))
        return TokenSample(**basic_sample_keys(sample), tokens=tokens, lengths=[len(tokens)])

    def pack_selected_samples(self, samples: list[TokenSample]) -> TokenSample:
        tokens = torch.cat([sample.tokens for sample in samples])
        return TokenSample.derive_from(samples[0], tokens=tokens, lengths=[len(tokens)])


@cooker
def cook_text(sample: CrudeSample) -> TextSample:
    return TextSample(**basic_sample_keys(sample), text=sample["txt"])


@cooker(need_cache=True)
def cook_later(sample: CrudeSample, cache: object) -> TextSample:
    return cook_text(sample)


class Crude(DefaultTaskEncoder[TextSample, TextSample, TextSample, TextSample]):
    cookers = (Cooker(cook_later, has_subflavors={"kind": "later"}), Cooker(cook_text))


def usage(path: str) -> None:
    """All of it once, where ``path`` is a captioned dataset."""
    config = WorkerConfig(rank=0, world_size=1, num_workers=0)

    # Datasets and loaders
    train = get_train_dataset(
        path,
        batch_size=4,
        shuffle_buffer_size=100,
        max_samples_per_sequence=20,
        virtual_epoch_length=2,
        task_encoder=MyEncoder(size=8),
        worker_config=config,
        image_decode="torchrgb",
    )
    assert_type(train, Dataset[CaptioningBatch])
    loader = get_loader(train, prefetch_factor=4)
    assert_type(loader, Loader[CaptioningBatch])
    for data in loader:
        assert_type(data, CaptioningBatch)
        assert_type(data.images, torch.Tensor)
        assert_type(data.texts, list[str])
        assert_type(data.__key__, list[str])
        assert_type(data.to_device("cpu"), CaptioningBatch)
        assert data.images.shape == (4, 3, 8, 8)
    with get_savable_loader(train, checkpoint_every_sec=60, threads=1) as savable:
        assert_type(savable, Loader[CaptioningBatch])
        assert_type(next(iter(savable)).images, torch.Tensor)
        savable.load_state_dict(loader.state_dict())
        savable.restore_state_global(savable.save_state_global())
    if TYPE_CHECKING:
        get_savable_loader(train, threads="one")  # type: ignore[arg-type]
        get_savable_loader(train, prefetch=4)  # type: ignore[call-arg]
    assert_type(loader.report()["batches"], float)
    assert_type(loader.drawn(), dict[str, int])
    assert_type(len(train), int)

    # A loader of some batch is a loader of batches.
    several: list[Loader[Batch]] = [loader, savable]
    assert len(several) == 2

    # Validation
    val = get_val_dataset(
        path,
        batch_size=4,
        limit=1,
        split_part="train",
        task_encoder=MyEncoder(),
        worker_config=config,
    )
    assert_type(val, Dataset[CaptioningBatch])
    for one, source in get_val_datasets(
        path, batch_size=4, task_encoder=MyEncoder(), split_part="train", worker_config=config
    ):
        assert_type(one, Dataset[CaptioningBatch])
        assert 4 * (len(one) - 1) < len(source) <= 4 * len(one)
    both = get_dataset(path, batch_size=4, shuffle=True, task_encoder=MyEncoder())
    assert_type(both, Dataset[CaptioningBatch])

    # Other encoders
    assert_type(get_train_dataset(path, batch_size=4), Dataset[Any])
    assert_type(
        get_train_dataset(path, batch_size=4, task_encoder=Defaults()), Dataset[CaptioningBatch]
    )
    assert_type(
        get_train_dataset(path, batch_size=4, task_encoder=Short()), Dataset[CaptioningBatch]
    )
    assert_type(
        get_train_dataset(path, batch_size=4, task_encoder=Bare()), Dataset[CaptioningBatch]
    )
    assert_type(get_train_dataset(path, batch_size=4, task_encoder=Lines()), Dataset[Any])
    assert_type(
        get_train_dataset(path, batch_size=4, task_encoder=Brighter(MyEncoder())),
        Dataset[CaptioningBatch],
    )
    assert_type(
        get_train_dataset(
            path, batch_size=None, task_encoder=Packing(), packing_buffer_size=100, repeat=False
        ),
        Dataset[TokenSample],
    )
    assert_type(
        get_train_dataset(path, batch_size=None, task_encoder=MyEncoder()),
        Dataset[CaptioningSample],
    )
    assert_type(get_train_dataset(path, batch_size=4, task_encoder=Crude()), Dataset[TextSample])
    assert_type(cook_text(CrudeSample(__key__="a", txt="a rose")), TextSample)

    # Recipes
    part = subset("0%", "50%")(path)
    recipe = blend([(part, 3), (using(path, subflavors={"a": 1}), lambda given: 1.0)])
    epoch = blend_epochized([(concat([part, path]), 1), (path, 0.5), (repeat(2)(path), 1)])
    joined = join([path, path], CaptioningSample)
    for each in (recipe, epoch, joined):
        assert_type(
            get_train_dataset(each, batch_size=4, task_encoder=MyEncoder()),
            Dataset[CaptioningBatch],
        )

    # Samples
    sample = CaptioningSample(__key__="a", image=torch.zeros(3, 2, 2), caption="a rose\nis")
    assert_type(sample.image, torch.Tensor)
    assert_type(sample.__sources__, tuple[SourceInfo, ...] | None)
    assert_type(TextSample.derive_from(sample, text="a rose"), TextSample)
    made = RawBatch.from_samples([sample], image=sample.image[None], caption=[sample.caption])
    assert_type(made, RawBatch)

    stages()
    piped(path)


def words(text: str) -> Iterator[str]:
    yield from text.split()


def parity(text: str) -> tuple[int, int | None]:
    return len(text) % 2, 2


def joined_text(texts: list[str]) -> str:
    return " ".join(texts)


@stage
def every(items: Iterable[str], n: int) -> Iterator[str]:
    for number, item in enumerate(items):
        if number % n == 0:
            yield item


def stages() -> None:
    """Stages, called."""
    texts = ["a rose", "is a rose"]
    assert_type(encode_sample(str.upper)(texts), Iterable[str])
    assert_type(encode_sample(words)(texts), Iterable[str])
    assert_type(encode_sample(lambda text: len(text))(texts), Iterable[int])
    assert_type(limit(1)(texts), Iterable[str])
    assert_type(shuffle(2, seed=1)(texts), Iterable[str])
    assert_type(epochize(1)(texts), Iterable[str])
    assert_type(every(2)(texts), Iterable[str])
    assert_type(group(parity)(texts), Iterable[list[str]])
    assert_type(batch(2, list)(texts), Iterable[list[str]])
    assert_type(batch(2, " ".join, drop_last=True)(texts), Iterable[str])
    assert_type(batch(2)(texts), Iterable[Any])
    assert_type(encode_batch(len)(batch(2, list)(texts)), Iterable[int])
    assert_type(decode("pil")([{"__key__": "a", "txt": b"a"}]), Iterable[dict[str, Any]])

    select = knapsack(cost=lambda text: len(text), capacity=10)
    assert [len(group) for group in select(texts)] == [1, 1]
    of_tokens = knapsack(cost=cost, capacity=10)
    assert_type(of_tokens([]), PackedSamplesOutput[TokenSample])
    assert_type(pack(select, joined_text, buffer_size=2)(texts), Iterable[str])
    assert next(iter(batch(2, list)(encode_sample(words)(texts)))) == ["a", "rose"]


def piped(path: str) -> None:
    """Stages through ``pipe``: toolz's own has no types, with ours what comes out is known."""
    texts = ["a rose", "is a rose"]
    assert_type(pipe(texts, encode_sample(words), limit(3), shuffle(2)), Iterable[str])
    assert_type(pipe(texts, encode_sample(words), batch(2, list)), Iterable[list[str]])
    assert_type(pipe(texts, every(2), encode_sample(parity)), Iterable[tuple[int, int | None]])
    batches = pipe(
        open_source(path),
        decode("torchrgb"),
        encode_sample(thumbnail),
        limit(3),
        batch(2, rows),
    )
    # Pyright knows these batches; to mypy they are Any behind a dict of Any, or a lambda.
    assert [tuple(each.images.shape) for each in batches] == [(2, 3, 8, 8), (1, 3, 8, 8)]
    assert pipe(texts, encode_sample(lambda text: len(text)), batch(2, sum), list) == [15]
    assert toolz.pipe(texts, encode_sample(len), list) == [6, 9]


def thumbnail(raw: dict[str, Any]) -> CaptioningSample:
    image = torch.nn.functional.interpolate(raw["jpg"][None], (8, 8))[0]
    return CaptioningSample(**basic_sample_keys(raw), image=image, caption=raw["txt"])


def rows(samples: list[CaptioningSample]) -> CaptioningBatch:
    images = torch.stack([sample.image for sample in samples])
    texts = [sample.caption for sample in samples]
    return CaptioningBatch.from_samples(samples, images=images, texts=texts)
