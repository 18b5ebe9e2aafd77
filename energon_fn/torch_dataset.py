"""A dataset for torch's own ``DataLoader``, and for what is built upon it.

Each of the DataLoader's workers is to the lanes what a rank is: worker w of N, on rank r of W,
drives the lanes of rank ``r + w * W`` of ``W * N``. The DataLoader asks its workers in turn, so the
batches come in the order that they have in our own loader.

A DataLoader may start new workers for every iteration, and tells them nothing about the last one.
So each worker leaves word for its successor: a file with its state, in a folder of the dataset's.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import weakref
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing import parent_process
from multiprocessing.context import get_spawning_popen
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from torch.utils.data import IterableDataset, get_worker_info

from energon_fn import checkpoint
from energon_fn.errors import StateError
from energon_fn.loader import Loader, get_loader
from energon_fn.pipeline import Dataset

T = TypeVar("T")


def as_iterable_dataset(dataset: Dataset[T]) -> TorchDataset[T]:
    """The batches of this rank as a torch ``IterableDataset``.

    Use it as ``DataLoader(as_iterable_dataset(dataset), batch_size=None, num_workers=N)``: the
    batches are made already, and sharing them out to ranks was done by the dataset's WorkerConfig.
    They are those of :func:`~energon_fn.get_loader`, in their order. N must divide the number of
    this rank's lanes, and with N > 1 also ``virtual_epoch_length``. Where lanes end after different
    numbers of batches, an epoch's last ones may change places, unless each worker has one lane.
    The DataLoader makes tensors of NumPy arrays and lists of tuples; its ``collate_fn`` can give
    batches as they are.

    Each iteration is the next epoch, also behind one that was left early. Of a dataset without an
    end it goes on where the last one ended. That place is the dataset object's: of two DataLoaders
    over one object the second goes on behind the first, so give each its own.

    With ``torchdata``'s ``StatefulDataLoader`` it is saved and resumed to the batch, with as many
    workers as it was saved with.

    >>> import tempfile, webdataset
    >>> from torch.utils.data import DataLoader
    >>> from energon_fn import get_val_dataset
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with webdataset.TarWriter(f"{folder}/0.tar") as tar:
    ...         for n in range(5):
    ...             _ = tar.write({"__key__": str(n), "txt": f"text {n}"})
    ...     dataset = get_val_dataset(folder, batch_size=2, split_part="train")
    ...     batches = DataLoader(as_iterable_dataset(dataset), batch_size=None)
    ...     [batch["txt"] for batch in batches]
    [['text 0', 'text 1'], ['text 2', 'text 3'], ['text 4']]
    """
    if not isinstance(dataset, Dataset):
        raise TypeError(
            f"as_iterable_dataset takes a dataset, not {dataset!r}: "
            "as_iterable_dataset(get_train_dataset(...))"
        )
    return TorchDataset(dataset)


class TorchDataset(IterableDataset[T]):
    """Made by :func:`as_iterable_dataset`."""

    def __init__(self, dataset: Dataset[T]):
        self.dataset = dataset
        self._part: Loader[T] | None = None  # what runs in this process
        self._given: dict[str, Any] | None = None  # the state that the next iteration begins with
        self._make_folder()

    def _make_folder(self) -> None:
        self._folder = tempfile.mkdtemp(prefix="energon_fn_")
        weakref.finalize(self, _remove, self._folder, os.getpid())

    def __getstate__(self) -> dict[str, Any]:
        state = {**self.__dict__, "_part": None}
        if get_spawning_popen() is None:  # a copy, which is not on its way to a worker of this one
            del state["_folder"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if "_folder" not in state:
            self._make_folder()

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[T]:
        _check_callers(sys._getframe(1), self.dataset.worker_config.world_size)
        part, word = _part_here(self.dataset), self._word()
        if self._given is not None:
            part.load_state_dict(self._given)
        elif word is None and self._part is not None:
            part.load_state_dict(self._part.state_dict())
            _go_on(part, left_early=False)
        elif word is not None and word.exists():
            part.load_state_dict(checkpoint.read_state(word))
            _go_on(part, left_early=part._delivered != part.dataset.length)
        self._part, self._given = part, None
        if word is not None:
            checkpoint.write_state(word, part.state_dict())
        return self._run(part, word)

    def _run(self, part: Loader[T], word: Path | None) -> Iterator[T]:
        while part._delivered != part.dataset.length and (delivery := part._next()):
            part._delivered += 1
            yield delivery.batch
        if word is not None:
            checkpoint.write_state(word, part.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """Where this process is: behind the last batch that it gave."""
        part = _part_here(self.dataset) if self._part is None else self._part
        return {**(self._given or part.state_dict()), "num_workers": _place()[1]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Have the next iteration begin where the process was that gave ``state``.

        Raises :class:`~energon_fn.StateError` if it does not fit, or if there were more or fewer
        workers.
        """
        checkpoint.check_version(state)
        workers = _place()[1]
        if state.get("num_workers") != workers:
            raise StateError(
                f"the state was saved with num_workers={state.get('num_workers')}, here it is "
                f"{workers}: each worker goes on with its own lanes, so take as many. States of "
                "get_loader fit any number of workers."
            )
        _part_here(self.dataset).load_state_dict(state)
        self._given = state

    def _word(self) -> Path | None:
        """The file in which this worker leaves word; None outside of workers."""
        worker, workers = _place()
        parent = parent_process()
        # The number of the process whose workers they are, since others may have copies.
        name = f"{parent and parent.pid}_{worker}_of_{workers}.json"
        return Path(self._folder, name) if workers else None


def _check_callers(frame: FrameType | None, world_size: int) -> None:
    """Raise ValueError where batches would be batched again, or shared out to the ranks again.

    Neither is said to a dataset, so it looks at who calls it.
    """
    if frame and frame.f_locals.get("auto_collation"):  # the fetcher of a DataLoader
        raise ValueError(
            "the items of this dataset are batches, which the DataLoader would batch again: write "
            "DataLoader(dataset, batch_size=None)"
        )
    while frame and world_size > 1:
        if frame.f_globals.get("__name__") == "accelerate.data_loader":
            raise ValueError(
                f"this dataset has been shared out to {world_size} ranks by its WorkerConfig, and "
                "Accelerate would share each rank's part out again, which loses samples: leave its "
                "DataLoader out of accelerator.prepare, or give get_loader(...) to it"
            )
        frame = frame.f_back


def _place() -> tuple[int, int]:
    """Which of a DataLoader's workers this process is, and of how many; (0, 0) if it is none."""
    info = get_worker_info()
    return (info.id, info.num_workers) if info else (0, 0)


def _part_here(dataset: Dataset[T]) -> Loader[T]:
    """A loader of this worker's lanes, or, outside of workers, of all of the rank's."""
    worker, workers = _place()
    config, length, count = dataset.worker_config, dataset.length, max(workers, 1)
    lanes = len(config.rank_lanes)
    if lanes % count:
        fitting = ", ".join(str(n) for n in range(1, lanes + 1) if lanes % n == 0)
        raise ValueError(
            f"num_workers is {workers}; it must divide the number of this rank's lanes, which is "
            f"{lanes}, for the batches to come in their order: take {fitting} or 0, or set lanes "
            "in the WorkerConfig"
        )
    if dataset.virtual and workers > 1:
        if not dataset.repeats:
            raise ValueError(
                f"virtual_epoch_length with repeat=False and {workers} workers: some of them would "
                "come to the end of the dataset earlier than others. Take 0 or 1 workers, or "
                "repeat=True."
            )
        if length and length % workers:
            raise ValueError(
                f"virtual_epoch_length is {length}, which {workers} workers cannot share evenly, "
                "and each iteration begins with the first worker: take a multiple"
            )
    return get_loader(
        replace(
            dataset,
            length=length and (length - worker + count - 1) // count,
            worker_config=replace(
                config,
                rank=config.rank + worker * config.world_size,
                world_size=config.world_size * count,
                num_workers=0,
                lanes=config.lane_count,
                data_parallel_group=None,
            ),
        ),
        threads=0 if workers else None,
    )


def _go_on(part: Loader[Any], left_early: bool) -> None:
    """From where the last iteration was to where the next one begins."""
    dataset = part.dataset
    goes_on = dataset.virtual or (dataset.repeats and dataset.length is None)
    if not goes_on or not part._lanes:
        part._begin(part._epoch + 1)
    elif left_early:
        raise StateError(
            "the last iteration was left before its end, and workers cannot know how many of the "
            "batches that they made ahead were used. Set virtual_epoch_length and go through whole "
            "iterations, or take get_loader, num_workers=0, or torchdata's StatefulDataLoader with "
            "load_state_dict."
        )
    else:
        part._delivered = 0


def _remove(folder: str, process: int) -> None:
    if os.getpid() == process:  # not in a fork
        shutil.rmtree(folder, ignore_errors=True)
