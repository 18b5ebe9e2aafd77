"""The console script ``energon-fn``: its options, and how it ends.

What the commands do is in :mod:`energon_fn.cli.commands`, which is imported when one is run.
"""

from __future__ import annotations

import argparse
import io
import logging
import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial

ERROR, INTERRUPTED, PIPE_CLOSED = 2, 130, 141
"""Exit statuses besides 0 and 1, which means that bad samples were found."""


def main(argv: Sequence[str] | None = None) -> int:
    """The console script: sets this process up for it and does what :func:`run` does."""
    return run(argv, _set_up_process)


def run(
    argv: Sequence[str] | None = None, set_up: Callable[[str], None] = lambda command: None
) -> int:
    """Run a command line, that of the process unless given, and return the exit status.

    0: done; 1: bad samples were found; 2: an error, one line on stderr; 130: Ctrl-C; 141: whoever
    was to read the output has gone.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help(sys.stderr)
        return ERROR
    try:
        set_up(args.command)
        status = _run(args)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        for child in multiprocessing.active_children():  # one that was just being started
            child.terminate()
        return INTERRUPTED
    except BrokenPipeError:  # `| head` has seen enough; what is in the buffer goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED


def _run(args: argparse.Namespace) -> int:
    """Run the command; what is wrong with data and arguments is said in one line."""
    from energon_fn.cli import commands
    from energon_fn.errors import (
        DatasetError,
        FatalSampleError,
        SampleError,
        StateError,
        WorkerError,
    )
    from energon_fn.look.values import one_line

    try:
        status: int = getattr(commands, args.command.replace("-", "_"))(args)
        return status
    except BrokenPipeError:
        raise
    except (
        DatasetError,
        FatalSampleError,
        SampleError,
        StateError,
        WorkerError,
        ValueError,
        OSError,
    ) as error:
        print("error: " + one_line(str(error)), file=sys.stderr)
        return ERROR


def _set_up_process(command: str) -> None:
    """Log messages as one line; leave Ctrl-C to this process, which then ends the others."""
    from tqdm import tqdm

    from energon_fn.look.values import one_line

    # A walk of a large tar ends at once; loader processes end in order, told by this one.
    ctrl_c_in_children = signal.SIG_DFL if command.startswith("prepare") else signal.SIG_IGN

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            line = f"{record.levelname.lower()}: {one_line(record.getMessage())}"
            tqdm.write(line, file=sys.stderr)  # not into a progress bar

    logger = logging.getLogger("energon_fn")
    logger.handlers = [Lines()]
    logger.propagate = False
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # Pillow has opinions on many a picture
    tqdm.monitor_interval = 0  # no thread: with one, shards are not indexed in processes
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(
            after_in_child=partial(signal.signal, signal.SIGINT, ctrl_c_in_children)
        )
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


# ----------------------------------------------------------------------------------------- options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="energon-fn",
        description="Prepare WebDataset folders for training, and look at what is in them.",
        epilog="Begin with `energon-fn demo`. `energon-fn COMMAND --help` has an example each.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    parser.set_defaults(command=None)

    def command(name: str, help: str, example: str, path: str = "") -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=help,
            description=help,
            epilog=f"example:\n{example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        sub.set_defaults(command=name)
        if path:
            sub.add_argument("path", metavar="PATH", help=path)
        return sub

    sub = command(
        "prepare",
        "Index a folder of tars, split it, and say what a sample is: asks, or takes options. A "
        ".jsonl file is only indexed; of a metadataset the indexes of its joins are made.",
        "  energon-fn prepare cats\n"
        "  energon-fn prepare cats --non-interactive --split-ratio 8,1,1 \\\n"
        "    --sample-type CaptioningSample \\\n"
        '    --field-map \'{"image": "jpg", "caption": "txt"}\'\n'
        "  energon-fn prepare blend.yaml",
        "the folder with the shards (*.tar, *.tar.gz, *.tgz, in folders below it too), a .jsonl "
        "file, or the .yaml of a metadataset",
    )
    add = sub.add_argument
    add("--non-interactive", action="store_true", help="ask nothing")
    add("--split-ratio", metavar="8,1,1", help="shares of train, val and test")
    add(
        "--split-parts",
        metavar="PART:PATTERN",
        action="append",
        help="shards whose name begins with the pattern (a regular expression, after braces are "
        "expanded) belong to the part; may be repeated; instead of --split-ratio",
    )
    add("--exclude", metavar="REGEX", help="leave out the shards whose name has a match")
    add(
        "--sample-type",
        metavar="TYPE",
        help="CaptioningSample, say, or CrudeWebdataset; without it no dataset.yaml is written",
    )
    add(
        "--field-map",
        metavar="JSON",
        help='\'{"image": "jpg,png", "caption": "json[text]"}\', say; without it a '
        "sample_loader.py to be filled in is written",
    )
    add(
        "--num-workers",
        metavar="N",
        type=_at_least(1),
        default=os.cpu_count() or 1,
        help="shards indexed at a time (as many as there are processors)",
    )
    add("--shuffle-tars", action="store_true", help="shuffle the shards before they are split")
    add("--force-overwrite", action="store_true", help="prepare again what is prepared")
    add(
        "--tar-index-only",
        action="store_true",
        help="only index the shards of a prepared folder again",
    )
    add("--skip-dataset-yaml", action="store_true", help="do not say what a sample is")
    add(
        "--dataset-yaml-name",
        metavar="NAME",
        default="dataset.yaml",
        help="another name for .nv-meta/dataset.yaml",
    )
    add(
        "--progress",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="show a progress bar (by default on terminals)",
    )
    _media_options(sub, required=False)
    add(
        "--fix-duplicates",
        action="store_true",
        help="if keys occur in several shards, write all shards again, each with its name as a "
        "folder in the keys",
    )

    sub = command(
        "prepare-media",
        "Keep the sizes of pictures and lengths of recordings, of a folder of files or of a "
        "prepared dataset.",
        "  energon-fn prepare-media pictures --media-metadata-by-extension",
        "the folder with the files (in folders below it too), or a prepared one with shards",
    )
    _media_options(sub, required=True)
    sub.add_argument(
        "--num-workers",
        metavar="N",
        type=_at_least(1),
        default=os.cpu_count() or 1,
        help="files or shards read at a time (as many as there are processors)",
    )
    sub.add_argument(
        "--progress",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="show a progress bar (by default on terminals)",
    )

    data = (
        "a prepared folder; a folder, brace or glob pattern of tars; a tar; a .jsonl file; or the "
        ".yaml of a metadataset"
    )
    sub = command(
        "info",
        "What there is: samples, splits, parts, sizes; of what a metadataset is made.",
        "  energon-fn info cats\n  energon-fn info blend.yaml",
        data,
    )
    _config_options(sub)

    sub = command(
        "lint",
        "Read and decode every sample and list the bad ones; exit status 1 if there are any.",
        "  energon-fn lint cats --num-workers 8 > bad.txt\n"
        "  energon-fn lint blend.yaml --split-part train",
        data,
    )
    _split_part_option(sub, "all")
    sub.add_argument(
        "--num-workers",
        "--parallel",
        metavar="N",
        type=_at_least(0),
        default=None,
        help="processes (as many as there are processors); 0: in this one",
    )
    _image_decode_option(sub)
    sub.add_argument(
        "--quarantine",
        metavar="FILE",
        help="append a line of JSON for each of them, for `energon-fn exclude` and `trace`",
    )
    _config_options(sub)
    _trust_option(sub)

    sub = command(
        "exclude",
        "Leave the samples of quarantine files out of a dataset: adds them to its split.yaml.",
        "  energon-fn lint cats --quarantine bad.jsonl\n"
        "  energon-fn exclude cats bad.jsonl --dry-run\n"
        "  energon-fn exclude cats bad.jsonl",
        "the prepared folder",
    )
    sub.add_argument(
        "files", metavar="QUARANTINE", nargs="+", help="the files, of `lint` or of training runs"
    )
    sub.add_argument("--dry-run", action="store_true", help="only show what would be added")
    sub.add_argument(
        "--split-config",
        metavar="NAME",
        default="split.yaml",
        help="another file than .nv-meta/split.yaml",
    )

    sub = command(
        "trace",
        "Show one sample's way through every function, value by value; exit status 1 if it fails.",
        "  energon-fn trace cats 000123\n"
        "  energon-fn trace cats 000123 --task-encoder my_module:MyEncoder\n"
        "  energon-fn trace cats '[\"sample\", 3, 123, 0]' --task-encoder my_module:MyEncoder",
        data,
    )
    sub.add_argument(
        "key",
        metavar="KEY",
        help="the sample's key; or its restore key, as a quarantine file has it: then with the "
        "random numbers of that epoch",
    )
    _split_part_option(sub, "the first that has the key")
    _task_encoder_option(sub)
    _image_decode_option(sub)
    _config_options(sub)
    _trust_option(sub)

    sub = command(
        "preview",
        "Show samples, spread over the dataset, in the terminal or on a contact sheet.",
        "  energon-fn preview cats -n 3\n"
        "  energon-fn preview cats --sheet cats.png -n 48\n"
        "  energon-fn preview blend.yaml -n 8",
        data,
    )
    _split_part_option(sub, "the first")
    sub.add_argument("-n", metavar="N", type=_at_least(1), help="how many (5; on a sheet 24)")
    sub.add_argument("--sheet", metavar="FILE.png", help="draw the pictures with their texts")
    _config_options(sub)
    _trust_option(sub)

    sub = command(
        "profile",
        "Load in the order of training for some seconds, and show which stage takes the time.",
        "  energon-fn profile cats --num-workers 2\n"
        "  energon-fn profile cats --task-encoder my_module:MyEncoder --batch-size 32",
        data,
    )
    add = sub.add_argument
    add("--seconds", metavar="S", type=float, default=10, help="how long (10)")
    add("--batch-size", metavar="N", type=_at_least(1), default=16, help="samples of a batch (16)")
    add(
        "--packing-buffer-size",
        metavar="N",
        type=_at_least(1),
        help="for a task encoder that packs",
    )
    add(
        "--num-workers",
        metavar="N",
        type=_at_least(0),
        default=0,
        help="processes that load (0: this one)",
    )
    add("--threads", metavar="N", type=_at_least(0), default=0, help="that read ahead in each (0)")
    add("--min-size", metavar="N", type=_at_least(1), help="scale JPEGs while they are decoded")
    _split_part_option(sub, "the first")
    _task_encoder_option(sub)
    _image_decode_option(sub)
    _config_options(sub)
    _trust_option(sub)

    sub = command(
        "demo",
        "Build a small dataset of captioned pictures and run a task encoder on it.",
        "  energon-fn demo",
    )
    sub.add_argument(
        "folder",
        metavar="FOLDER",
        nargs="?",
        default="energon_fn_demo",
        help="where to (./energon_fn_demo)",
    )
    checkpoint = command(
        "checkpoint",
        "Look into saved states of loaders, or hand them out to another number of ranks.",
        "  energon-fn checkpoint info step_1000.pt\n"
        "  energon-fn checkpoint redist rank_*.pt --new-world-size 16 redistributed",
    ).add_subparsers(dest="action", metavar="ACTION", required=True)
    for name, help in (
        ("info", "what is in the states, merged"),
        ("redist", "write a file for each rank of another number of ranks"),
    ):
        sub = checkpoint.add_parser(name, help=help, description=help, allow_abbrev=False)
        sub.add_argument("files", metavar="FILE", nargs="+", help="the states of all ranks")
    sub.add_argument(
        "--new-world-size",
        metavar=("N", "OUT"),
        nargs=2,
        required=True,
        help="how many ranks, and the folder to write rank_00000.* and so on to",
    )
    return parser


def _media_options(parser: argparse.ArgumentParser, required: bool) -> None:
    group = parser.add_mutually_exclusive_group(required=required)
    flag, to = "--media-metadata-by-", "media_metadata_by"
    for how, which in (("extension", "with usual endings"), ("header", "of known formats")):
        text = f"keep the metadata (sizes, durations) of files {which}"
        group.add_argument(flag + how, dest=to, action="store_const", const=how, help=text)
    text = "keep that of files whose name in the tar or folder fits one of these"
    group.add_argument(flag + "glob", dest=to, metavar="'*.jpg,*.png'", help=text)


def _split_part_option(parser: argparse.ArgumentParser, usual: str) -> None:
    parser.add_argument(
        "--split-part",
        "--split-parts",
        metavar="PART,...",
        type=_names,
        help=f"parts of the split ({usual})",
    )


def _task_encoder_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--task-encoder",
        metavar="MODULE:NAME",
        help="the class MyEncoder in ./my_module.py, say, is my_module:MyEncoder; it is imported "
        "and run",
    )


def _image_decode_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--image-decode",
        metavar="HOW",
        default="torchrgb",
        help="how pictures are decoded (torchrgb)",
    )


def _config_options(parser: argparse.ArgumentParser) -> None:
    for name in ("dataset", "split"):
        parser.add_argument(
            f"--{name}-config",
            metavar="NAME",
            default=f"{name}.yaml",
            help=f"another file than .nv-meta/{name}.yaml",
        )


def _trust_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--trust",
        action="store_true",
        help="run code that the dataset names, if it does (a sample_loader.py, a joiner's module)",
    )


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _at_least(smallest: int) -> Callable[[str], int]:
    def integer(text: str) -> int:
        if int(text) < smallest:
            raise argparse.ArgumentTypeError(f"must be {smallest} or more, not {text}")
        return int(text)

    return integer
