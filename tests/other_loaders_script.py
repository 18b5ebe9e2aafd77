"""What every rank does in test_other_loaders.py: trains with another library's trainer.

Started by torchrun with a job, the data and a folder; what a rank's model was given is written to
the folder as JSON. The functions are called by the tests as well, where one process is enough.
"""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as distributed
from torch.utils.data import DataLoader

from energon_fn import (
    DefaultTaskEncoder,
    Loader,
    WorkerConfig,
    as_iterable_dataset,
    get_savable_loader,
    get_train_dataset,
)

LANES = 4
EPOCH = {"repeat": False}
VIRTUAL = {"virtual_epoch_length": 10}


class Numbers(DefaultTaskEncoder[Any, Any, Any, Any]):
    def encode_sample(self, sample: Any) -> dict[str, torch.Tensor]:
        number = torch.tensor(sample["json"]["n"])
        return {"number": number, "drawn": torch.tensor(random.random())}


def numbers(
    data: Path, rank: int, world_size: int, workers: int = 0, **options: Any
) -> Loader[Any]:
    """A loader of dicts of tensors."""
    config = WorkerConfig(rank=rank, world_size=world_size, num_workers=workers, lanes=LANES)
    dataset = get_train_dataset(
        data,
        batch_size=4,
        shuffle_buffer_size=10,
        max_samples_per_sequence=5,
        task_encoder=Numbers(),
        worker_config=config,
        **options,
    )
    return get_savable_loader(dataset)


def plain(batch: Any) -> list[Any]:
    return [batch["number"].tolist(), batch["drawn"].tolist()]


# Lightning


class Everywhere:
    """A loader whose state is that of all ranks, since Lightning's checkpoint has rank 0's."""

    def __init__(self, loader: Loader[Any]):
        self.loader = loader

    def __iter__(self) -> Iterator[Any]:
        return iter(self.loader)

    def __len__(self) -> int:
        return len(self.loader)

    def state_dict(self) -> Any:
        return self.loader.save_state_global()

    def load_state_dict(self, state: Any) -> None:
        self.loader.restore_state_global(state)


def fit(
    data: Path,
    folder: Path,
    ranks: int = 1,
    checkpoint: Path | None = None,
    every: int | None = None,
    workers: int = 0,
    options: Any = VIRTUAL,
    **limits: Any,
) -> list[Any]:
    """What a model was given by Lightning's Trainer.

    every: save so often.
    """
    import lightning

    class Model(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.seen = torch.nn.Linear(1, 1), []

        def train_dataloader(self) -> Any:
            ranks = self.trainer.world_size
            loader = numbers(data, self.global_rank, ranks, workers, **options)
            return Everywhere(loader)

        def training_step(self, batch: Any) -> Any:
            self.seen.append(plain(batch))
            return self.layer(batch["drawn"][:, None]).sum()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=1e-3)

    saving = lightning.pytorch.callbacks.ModelCheckpoint(
        folder, "{step}", every_n_train_steps=every, save_top_k=-1
    )
    model = Model()
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy="ddp" if ranks > 1 else "auto",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[saving] if every else [],
        enable_checkpointing=bool(every),
        **limits,
    )
    trainer.fit(model, ckpt_path=checkpoint)
    return model.seen


def lightning_ranks(data: Path, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {
        "epoch": fit(data, folder, 2, options=EPOCH, max_epochs=1),
        "straight": fit(data, folder, 2, every=7, max_steps=7),
    }
    checkpoint = folder / "step=7.ckpt"
    found["resumed"] = fit(data, folder, 2, checkpoint, max_steps=12)
    return found


# Hugging Face


def train(
    data: Path,
    folder: Path,
    steps: int,
    resumed_from: int | None = None,
    workers: int = 0,
    options: Any = VIRTUAL,
    **arguments: Any,
) -> list[Any]:
    """What a model was given by Hugging Face's Trainer, which saves at every fifth step."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    loader = numbers(data, rank, world_size, workers, **options)

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.seen = torch.nn.Linear(1, 1), []

        def forward(self, number: Any, drawn: Any) -> Any:
            self.seen.append(plain({"number": number, "drawn": drawn}))
            return {"loss": self.layer(drawn[:, None]).sum()}

    class OurTrainer(Trainer):
        def get_train_dataloader(self) -> Any:
            return loader

    class SaveLoader(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            whole = loader.save_state_global()
            if whole is not None:
                step = folder / f"checkpoint-{state.global_step}"
                (step / "loader.json").write_text(json.dumps(whole))

    checkpoint = None if resumed_from is None else folder / f"checkpoint-{resumed_from}"
    if checkpoint:
        loader.restore_state_global(json.loads((checkpoint / "loader.json").read_text()))
    settings = TrainingArguments(
        str(folder),
        max_steps=steps,
        save_steps=5,
        ignore_data_skip=True,  # the loader's state says where to go on
        use_cpu=True,
        ddp_backend="gloo" if world_size > 1 else None,
        ddp_find_unused_parameters=False,
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        **arguments,
    )
    model = Model()
    trainer = OurTrainer(model, settings, callbacks=[SaveLoader()])
    trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    return model.seen


def accelerated(data: Path) -> dict[str, Any]:
    """What Accelerate makes of our loader, and of a DataLoader of our dataset."""
    from accelerate import Accelerator
    from accelerate.utils import DataLoaderConfiguration

    found: dict[str, Any] = {}
    accelerator = Accelerator(cpu=True)
    rank, world_size = accelerator.process_index, accelerator.num_processes
    loader = numbers(data, rank, world_size, **EPOCH)
    prepared = accelerator.prepare(loader)
    found["prepared as it was"] = prepared is loader
    found["epoch"] = [plain(batch) for batch in prepared]
    for dispatched in (True, False):
        if dispatched and rank:  # the others would wait for rank 0, which raises
            continue
        settings = DataLoaderConfiguration(dispatch_batches=dispatched)
        items = as_iterable_dataset(loader.dataset)
        batches = DataLoader(items, batch_size=None if dispatched else 4)
        accelerator = Accelerator(cpu=True, dataloader_config=settings)
        try:
            next(iter(accelerator.prepare(batches)))
        except ValueError as error:
            found[f"dispatched: {dispatched}"] = str(error)
    return found


def hugging_face_ranks(data: Path, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {
        "straight": train(data, folder, 8),
        "resumed": train(data, folder, 8, resumed_from=5),
    }
    return found | {"accelerate": accelerated(data)}


JOBS = {job.__name__: job for job in (lightning_ranks, hugging_face_ranks)}


if __name__ == "__main__":
    rank = int(os.environ["RANK"])
    job, out = JOBS[sys.argv[1]], Path(sys.argv[3])
    result = json.dumps(job(Path(sys.argv[2]), out))
    (out / f"{job.__name__}_{rank}.json").write_text(result)
    if distributed.is_initialized():
        distributed.destroy_process_group()
