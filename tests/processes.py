"""The command line, run in processes of its own.

:func:`run` forks this process, so that what is imported need not be imported again for every
command; :func:`start` begins from nothing, as a user does.
"""

from __future__ import annotations

import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Sequence
from fcntl import ioctl
from pathlib import Path
from typing import NamedTuple

import torch

from energon_fn import cli
from energon_fn.cli import commands  # noqa: F401  # commands: imported before forking

REPOSITORY = Path(__file__).parent.parent


class Result(NamedTuple):
    status: int
    out: str
    err: str


def run(*words: object, stdin: str = "", columns: int = 80, **env: str) -> Result:
    """``energon-fn WORDS`` with pipes for input and output."""
    return run_function(lambda: cli.main([str(word) for word in words]), stdin, columns, **env)


def run_function(function: Callable[[], int], stdin: str = "", columns: int = 80,
                 **env: str) -> Result:  # fmt: skip
    """The function in a process of its own, with pipes for input and output."""
    pipes = [os.pipe() for _ in range(3)]
    child = os.fork()
    if not child:
        for number, (read, write) in enumerate(pipes):
            os.dup2(write if number else read, number)
            os.close(read)
            os.close(write)
        os.environ.update(env, COLUMNS=str(columns))
        _exit_with(function)
    (stdin_read, stdin_write), (out, out_write), (err, err_write) = pipes
    for end in (stdin_read, out_write, err_write):
        os.close(end)
    os.write(stdin_write, stdin.encode())
    os.close(stdin_write)
    texts = {out: b"", err: b""}
    reading = [out, err]
    while reading:
        for end in select.select(reading, [], [], 60)[0]:
            piece = os.read(end, 65536)
            texts[end] += piece
            if not piece:
                reading.remove(end)
                os.close(end)
    _, status = os.waitpid(child, 0)
    return Result(os.waitstatus_to_exitcode(status), texts[out].decode(), texts[err].decode())


def run_on_terminal(
    words: Sequence[object], answers: Sequence[str] = (), columns: int = 60, **env: str
) -> Result:
    """``energon-fn WORDS`` on a terminal; each answer is typed at a prompt. ``^C`` is Ctrl-C."""
    child, terminal = pty.fork()
    if not child:
        for name in ("NO_COLOR", "COLUMNS", "LINES"):
            os.environ.pop(name, None)
        os.environ.update(env)
        time.sleep(0.05)  # until the terminal has its size
        _exit_with(lambda: cli.main([str(word) for word in words]))
    ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    left = list(answers)
    out = b""
    while True:
        ready = select.select([terminal], [], [], 0.1)[0]
        if ready:
            try:
                piece = os.read(terminal, 65536)
            except OSError:  # how Linux says that the other end is closed
                break
            if not piece:
                break
            out += piece
        elif left and out.endswith(b": "):
            answer = left.pop(0)
            os.write(terminal, b"\x03" if answer == "^C" else answer.encode() + b"\n")
    os.close(terminal)
    _, status = os.waitpid(child, 0)
    return Result(os.waitstatus_to_exitcode(status), out.decode().replace("\r\n", "\n"), "")


def _exit_with(function: Callable[[], int]) -> None:
    """Run the function with the real input and output, and end the process by its result."""
    status = 70
    torch.set_num_threads(1)  # what threads there were did not come along
    try:
        sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115  # for the rest of its life
        status = function()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def start(*words: object, **env: str) -> subprocess.Popen[str]:
    """``python -m energon_fn WORDS`` in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "energon_fn", *map(str, words)],
        cwd=REPOSITORY,
        env={**os.environ, **env},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for_children(process: subprocess.Popen[str], count: int) -> None:
    """Wait until the process has started so many others."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while process.poll() is None:
        if len(children.read_text().split()) >= count:
            time.sleep(0.2)  # an interrupt in the middle of a fork is lost: Python swallows it
            return
        time.sleep(0.01)
    raise AssertionError(process.communicate())


def interrupt(process: subprocess.Popen[str], whole_group: bool) -> None:
    """Ctrl-C in a terminal goes to the whole group; ``kill -INT`` to the one process."""
    (os.killpg if whole_group else os.kill)(process.pid, signal.SIGINT)


def check_ctrl_c(process: subprocess.Popen[str], whole_group: bool) -> None:
    """Once it has started two others, Ctrl-C ends the process in order, and them with it."""
    wait_for_children(process, 2)
    interrupt(process, whole_group)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err == "\ninterrupted\n"
    assert group_is_empty(process.pid)


def group_is_empty(group: int) -> bool:
    """Whether no process of the group is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False
