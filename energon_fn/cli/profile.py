"""``energon-fn profile``: how fast batches are made, and which stage takes the time."""

from __future__ import annotations

import argparse
from time import perf_counter

from tqdm import tqdm

from energon_fn.cli.encoder import load_encoder
from energon_fn.cli.samples import parts_of
from energon_fn.cli.terminal import columns
from energon_fn.datasets import get_train_dataset
from energon_fn.lanes import default_worker_config
from energon_fn.loader import get_loader


def profile(args: argparse.Namespace) -> int:
    """Load for some seconds, in the order of training, and print the loader's report."""
    dataset = get_train_dataset(
        args.path,
        split_part=parts_of(args)[0],
        batch_size=args.batch_size,
        shuffle_buffer_size=1000,
        packing_buffer_size=args.packing_buffer_size,
        task_encoder=load_encoder(args.task_encoder),
        worker_config=default_worker_config(args.num_workers),
        image_decode=args.image_decode,
        min_size=args.min_size,
        dataset_config=args.dataset_config,
        split_config=args.split_config,
        trust_dataset_code=args.trust,
    )
    loader = get_loader(dataset, threads=args.threads)
    with loader, tqdm(desc="profile", unit=" batches", leave=False, disable=None) as bar:
        batches = iter(loader)
        next(batches)  # workers have started
        start, count = perf_counter(), 0
        while (seconds := perf_counter() - start) < args.seconds:
            next(batches)
            count += 1
            bar.update()
        report = loader.report()
    samples = report["load/in"] / report["batches"]
    print(f"{count / seconds:,.4g} batches, of {samples:,.4g} samples loaded each, a second\n")
    print(report.text(columns() - 1))
    return 0
