"""How batches cross from one process to another: several in a message, tensors copied once.

A batch is pickled with its tensors and arrays left out (pickle protocol 5, PEP 574); these, and the
pickle, are its parts. A message is the parts of one or more batches. A small message goes through
the socket. A large one is written to a piece of anonymous shared memory that the sender lends
(:class:`Lender`), and the receiver's tensors lie in it. When the last of them is gone, the piece
goes back (:class:`Borrower`) and is written to again: memory that is new to a process takes far
longer to write to than the bytes take to copy. The descriptor of a piece crosses once. Pieces have
no names, so nothing is left behind whoever is killed when.
"""

from __future__ import annotations

import io
import mmap
import os
import pickle
import select
import struct
import weakref
from itertools import islice
from socket import recv_fds, send_fds, socket
from typing import Any

import numpy as np
import torch

SHARED_FROM = 1 << 16  # bytes; below, a file descriptor costs more than the copy it saves
OWN_BELOW = 1 << 14  # bytes; who keeps a batch's labels shall not keep the piece with its pictures
ALIGNED = 64  # bytes, what vector instructions like
KEPT = 8  # pieces that wait to be written to again; more are given up
_HEAD = struct.Struct("<QQqQ")
"""How many numbers follow, the bytes of all parts, the piece they lie in or NONE, its size if new.

The numbers are, for each thing, how many parts it has and the size of each.
"""
NONE = -1

Parts = list[Any]
"""What :func:`dumps` makes of a thing, as bytes: its pickle, then the memory of each tensor."""


class _Pickler(pickle.Pickler):
    def reducer_override(self, thing: Any) -> Any:
        if type(thing) is not torch.Tensor:
            return NotImplemented
        try:
            # One call, which refuses what is more than numbers in memory (gradients, another device
            # or layout ...): several are dear, with caches that are cold after a batch was made.
            array: Any = thing.numpy()
        except (TypeError, RuntimeError):
            return _reduce_other(thing)
        if not array.flags.c_contiguous:
            return _reduce_other(thing)
        if not array.size:
            return NotImplemented
        return _tensor, (pickle.PickleBuffer(array), array.dtype.str, array.shape)


def _reduce_other(tensor: torch.Tensor) -> Any:
    """For what NumPy does not have (bfloat16), other orders in memory, and what pickle sees to."""
    if tensor.device.type != "cpu" or tensor.layout != torch.strided or tensor.numel() == 0:
        return NotImplemented
    if tensor.is_nested:
        return NotImplemented
    if tensor.requires_grad or tensor.is_quantized or tensor.is_conj() or tensor.is_neg():
        return NotImplemented
    lying = tensor.permute(sorted(range(tensor.dim()), key=tensor.stride, reverse=True))
    if not lying.is_contiguous():  # a part of another tensor, or one with numbers used twice
        lying = tensor = tensor.contiguous()
    raw: Any = lying.view(-1).view(torch.uint8).numpy()
    return _other_tensor, (pickle.PickleBuffer(raw), tensor.dtype, tensor.shape, tensor.stride())


def _tensor(raw: Any, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(raw, dtype).reshape(shape))


def _other_tensor(
    raw: Any, dtype: torch.dtype, shape: torch.Size, strides: tuple[int, ...]
) -> torch.Tensor:
    return torch.frombuffer(raw, dtype=dtype).as_strided(shape, strides)


def dumps(thing: Any) -> Parts:
    """``thing`` as a pickle, and the memory of its tensors and arrays, which is not copied."""
    file, buffers = io.BytesIO(), list[pickle.PickleBuffer]()
    _Pickler(file, protocol=5, buffer_callback=buffers.append).dump(thing)
    return [file.getvalue(), *(buffer.raw() for buffer in buffers)]


def loads(parts: Parts) -> Any:
    """The thing again. Its tensors lie in the parts."""
    return pickle.loads(parts[0], buffers=parts[1:])


def size(parts: Parts) -> int:
    """The bytes that they take up in a message."""
    return sum([_aligned(len(part)) for part in parts])


def send(to: socket, thing: Any) -> None:
    """Send anything that pickles, all of it through the socket.

    >>> from socket import socketpair
    >>> here, there = socketpair()
    >>> send(here, {"image": torch.zeros(3, 9, 9), "text": "a rose"})
    >>> message = receive(there)
    >>> message["image"].shape, message["text"]
    (torch.Size([3, 9, 9]), 'a rose')
    """
    _send_all(to, [dumps(thing)])


def receive(source: socket) -> Any:
    """What was sent with :func:`send`.

    Raises EOFError if the other side is gone, also in the middle of a message.
    """
    return loads(Borrower().receive(source)[0])


def _send_all(to: socket, things: list[Parts]) -> None:
    memory = bytearray(sum(map(size, things)))
    _write(memory, things)
    to.sendall(_head(things, NONE) + memory)


def _head(things: list[Parts], number: int, new: int = 0) -> bytes:
    numbers: list[int] = []
    for parts in things:
        numbers += len(parts), *map(len, parts)
    head = _HEAD.pack(len(numbers), sum(map(size, things)), number, new)
    return head + struct.pack(f"<{len(numbers)}Q", *numbers)


def _write(memory: Any, things: list[Parts]) -> None:
    start = 0
    with memoryview(memory) as view:
        for parts in things:
            for part in parts:
                view[start : start + len(part)] = part
                start += _aligned(len(part))


def _aligned(length: int) -> int:
    return length + -length % ALIGNED


class Lender:
    """Sends messages whose tensors lie in shared memory, which comes back when they are gone.

    >>> from socket import socketpair
    >>> here, there = socketpair()
    >>> lender, borrower = Lender(), Borrower()
    >>> for n in range(3):
    ...     lender.send(here, [dumps(torch.full((50_000,), n))])
    ...     number = int(loads(borrower.receive(there)[0])[-1])
    ...     lender.take_back(borrower.give_back())
    >>> lender.made
    1
    """

    def __init__(self) -> None:
        self.made = 0
        self._pieces: dict[int, Any] = {}
        self._free: set[int] = set()

    def send(self, to: socket, things: list[Parts]) -> None:
        """Send what :func:`dumps` gave, of several things in one message."""
        used = sum(map(size, things))
        if used < SHARED_FROM or not hasattr(os, "memfd_create"):
            _send_all(to, things)
            return
        fitting = [number for number in self._free if len(self._pieces[number]) >= used]
        if fitting:
            number = min(fitting, key=lambda number: len(self._pieces[number]))
            self._free.remove(number)
            _write(self._pieces[number], things)
            to.sendall(_head(things, number))
            return
        # Some more than asked for, since the next message may be a little larger.
        length = (used + used // 8) // mmap.PAGESIZE * mmap.PAGESIZE + mmap.PAGESIZE
        descriptor = os.memfd_create("energon_fn")
        try:
            os.ftruncate(descriptor, length)
            number, self.made = self.made, self.made + 1
            self._pieces[number] = _mapped(descriptor, length)
            _write(self._pieces[number], things)
            to.sendall(_head(things, number, length))
            send_fds(to, [b"\0"], [descriptor])
        finally:
            os.close(descriptor)

    def take_back(self, numbers: list[int]) -> None:
        """What :meth:`Borrower.give_back` gave."""
        for number in numbers:
            if number >= 0:
                self._free.add(number)
            else:
                del self._pieces[~number]


class Borrower:
    """Receives what a :class:`Lender` sends; each has one of the other."""

    def __init__(self) -> None:
        self._pieces: dict[int, Any] = {}
        self._waiting = 0  # pieces that are the lender's to write to
        self._done: list[int] = []

    def receive(self, source: socket) -> list[Parts]:
        """The things of the next message. Raises EOFError if the other side is gone."""
        count, used, number, new = _HEAD.unpack(_exactly(source, _HEAD.size))
        numbers = iter(struct.unpack(f"<{count}Q", _exactly(source, 8 * count)))
        whole = _exactly(source, used) if number == NONE else self._piece(source, number, new)
        memory, things, start = memoryview(whole), list[Parts](), 0
        for parts in numbers:
            things.append([])
            for length in islice(numbers, parts):
                part = memory[start : start + length]
                things[-1].append(part if length >= OWN_BELOW else bytearray(part))
                start += _aligned(length)
        return things

    def _piece(self, source: socket, number: int, new: int) -> Any:
        if new:
            self._pieces[number] = _map(source, new)
        else:
            self._waiting -= 1
        whole = self._pieces[number][:]  # an object of its own, which dies with the last tensor
        weakref.finalize(whole, self._done.append, number).atexit = False
        return whole

    def give_back(self) -> list[int]:
        """The pieces that are not used any more, for the lender; ``~number`` of those given up."""
        numbers = []
        while self._done:
            number = self._done.pop(0)
            if self._waiting < KEPT:
                self._waiting += 1
                numbers.append(number)
            else:
                del self._pieces[number]
                numbers.append(~number)
        return numbers


def _map(source: socket, size: int) -> Any:
    """The piece of memory whose descriptor comes next, as an array of bytes."""
    _, files, _, _ = recv_fds(source, 1, 1)
    if not files:
        raise EOFError("the other side ended in the middle of a message")
    try:
        return _mapped(files[0], size)
    finally:
        os.close(files[0])


def _mapped(descriptor: int, size: int) -> Any:
    """A piece of memory as an array of bytes, until it is let go of."""
    # Mapped by torch, since Python's mmap would keep a descriptor for every piece.
    storage: Any = torch.UntypedStorage.from_file(f"/proc/self/fd/{descriptor}", True, size)
    return torch.empty(0, dtype=torch.uint8).set_(storage).numpy()


def poll(connection: socket) -> select.poll:
    """What tells whether something came by the connection."""
    poll = select.poll()
    poll.register(connection, select.POLLIN)
    return poll


def _exactly(source: socket, size: int) -> bytearray:
    data = bytearray(size)  # writable, as the tensors in it must be
    view = memoryview(data)
    while view:
        got = source.recv_into(view)
        if not got:
            raise EOFError("the other side ended")
        view = view[got:]
    return data
