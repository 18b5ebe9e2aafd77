"""``energon-fn trace`` and ``exclude``: what to do about samples that fail."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from contextlib import suppress
from itertools import chain
from typing import Any

from energon_fn.cli.encoder import load_encoder
from energon_fn.cli.samples import BAD, sources_of
from energon_fn.cli.terminal import columns
from energon_fn.datasets import get_dataset
from energon_fn.failures.exclude import exclude as exclude_samples
from energon_fn.failures.quarantine import read_quarantine
from energon_fn.failures.trace import trace as trace_sample
from energon_fn.lanes import WorkerConfig
from energon_fn.look.values import counted, one_line


def trace(args: argparse.Namespace) -> int:
    encoder = load_encoder(args.task_encoder)
    key: Any = args.key
    if key.startswith("["):
        with suppress(ValueError):  # then it is a key that looks like this
            key = json.loads(key)
    parts = sources_of(args)
    having = (
        part
        for part, inside in parts.items()
        if isinstance(key, list) or any(source.find(key) is not None for source in inside)
    )
    dataset = get_dataset(
        args.path,
        split_part=next(having, next(iter(parts))),
        batch_size=None,
        task_encoder=encoder,
        worker_config=WorkerConfig(rank=0, world_size=1, num_workers=0),
        image_decode=args.image_decode,
        dataset_config=args.dataset_config,
        split_config=args.split_config,
        trust_dataset_code=args.trust,
    )
    found = trace_sample(dataset, key)
    print(found.text(columns() - 1))
    return BAD if found.error else 0


def exclude(args: argparse.Namespace) -> int:
    failures = chain.from_iterable(map(read_quarantine, args.files))
    done = exclude_samples(
        args.path, failures, split_config=args.split_config, dry_run=args.dry_run
    )
    for entry in done.added:
        print(one_line(entry))
    to = f"`exclude` in {args.split_config}"
    verb = "would be added" if args.dry_run else "added"
    print(f"{counted(len(done.added), 'entry').replace('entrys', 'entries')} {verb} to {to}")
    if done.known:
        print(f"{counted(done.known, 'sample')} excluded before")
    _left_out("of several samples at once, whose fault it is cannot be told", done.several)
    _left_out("of other datasets", done.elsewhere)
    return 0


def _left_out(what: str, counts: Mapping[str, int]) -> None:
    if counts:
        print(f"{counted(sum(counts.values()), 'failure')} {what}:")
    for name, count in counts.items():
        print(f"  {count:,} {one_line(name or 'not read from a file')}")
