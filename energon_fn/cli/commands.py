"""The commands of ``energon-fn``. Each takes its options and returns the exit status."""

from __future__ import annotations

import argparse
from pathlib import Path

from energon_fn.checkpoint import describe as describe_state
from energon_fn.checkpoint import merge, read_state, redistribute, write_state
from energon_fn.cli.failures import exclude, trace
from energon_fn.cli.info import info
from energon_fn.cli.prepare import prepare, prepare_media
from energon_fn.cli.profile import profile
from energon_fn.cli.samples import lint, preview
from energon_fn.demo import run_demo

__all__ = [
    "checkpoint",
    "demo",
    "exclude",
    "info",
    "lint",
    "prepare",
    "prepare_media",
    "preview",
    "profile",
    "trace",
]


def demo(args: argparse.Namespace) -> int:
    run_demo(args.folder)
    return 0


def checkpoint(args: argparse.Namespace) -> int:
    """Show or redistribute the states in ``args.files``."""
    states = [read_state(file) for file in args.files]
    if args.action == "info":
        print(describe_state(merge(states)))
        return 0
    world_size, out = int(args.new_world_size[0]), Path(args.new_world_size[1])
    ranks, suffix = redistribute(states, world_size), Path(args.files[0]).suffix
    out.mkdir(parents=True, exist_ok=True)
    for rank, state in enumerate(ranks):
        write_state(out / f"rank_{rank:05d}{suffix}", state)
    print(f"{len(ranks)} states are in {out}: rank r loads {out}/rank_0000r{suffix}")
    return 0
