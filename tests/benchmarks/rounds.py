"""What the benchmarks have in common: options, rounds in processes of their own, and medians."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
OURS, PEER = "energon_fn", "megatron.energon"


def parser_of(document: str | None) -> argparse.ArgumentParser:
    """A parser that shows the benchmark's own docstring as it is."""
    return argparse.ArgumentParser(
        description=document, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add_peer_and_json(parser: argparse.ArgumentParser) -> None:
    """The options ``--peer-python`` and ``--json``."""
    parser.add_argument(
        "--peer-python",
        metavar="PYTHON",
        default=os.environ.get("ENERGON_PYTHON"),
        help="a Python that has megatron-energon (default: what ENERGON_PYTHON names)",
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="write all rounds to this file")


def in_turn(
    options: argparse.Namespace, measure: Callable[[str, str], Any]
) -> dict[str, list[Any]]:
    """What ``measure(python, package)`` finds in each round, for both packages in turn."""
    pythons = {OURS: sys.executable}
    if options.peer_python:
        pythons[PEER] = options.peer_python
    rounds: dict[str, list[Any]] = {package: [] for package in pythons}
    for number in range(options.rounds):
        for package, python in sorted(pythons.items(), reverse=bool(number % 2)):
            rounds[package].append(measure(python, package))
    return rounds


def measured(python: str, package: str, script: str, *arguments: object) -> Any:
    """What the script prints for a package in a new process: ``--measure PACKAGE ARGUMENTS``."""
    command = ["-W", "ignore", script, "--measure", package, *map(str, arguments)]
    return printed(python, *command, failed=f"measuring {package} with {python} failed:")


def printed(python: str, *command: str, failed: str) -> Any:
    """The JSON in the last line that a process with this checkout prints.

    Raises SystemExit with ``failed`` and all that it said if it fails.
    """
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([python, *command], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{failed}\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def write_json(options: argparse.Namespace, rounds: dict[str, Any], **more: Any) -> None:
    """Write all rounds to the file that ``--json`` names, if it does."""
    if options.json:
        named = {k: v for k, v in vars(options).items() if k not in ("measure", "json")}
        whole = {"options": named, **more, "rounds": rounds}
        options.json.write_text(json.dumps(whole, indent=1, default=str) + "\n")


def header(rounds: dict[str, Any], width: int) -> str:
    return " " * width + "".join(f"{package:>20}" for package in rounds)


def side_by_side(
    rounds: dict[str, list[Any]],
    width: int,
    indent: str = "",
    form: Callable[[float], str] = "{:,.4g}".format,
) -> list[str]:
    """A line for each thing measured, with medians over the rounds, the packages side by side."""
    lines = []
    for name in rounds[OURS][0]:
        line = f"{indent + name:{width}}"
        for each in rounds.values():
            known = [found[name] for found in each if name in found]
            line += f"{form(statistics.median(known)) if known else '':>20}"
        lines.append(line)
    return lines
