"""How a batch crosses from one process to another: one message, its tensors copied once.

A message is a pickle whose tensors and arrays are left out of it (pickle protocol 5, PEP 574).
Small ones follow it through the socket. Large ones are written to a piece of anonymous shared
memory that the sender lends (:class:`Lender`), and the receiver's tensors lie in it. When the last
of them is gone, the piece goes back (:class:`Borrower`) and is written to again: memory that is new
to a process takes far longer to write to than the bytes take to copy. The descriptor of a piece
crosses once. Pieces have no names, so nothing is left behind whoever is killed when.
"""

from __future__ import annotations

import io
import mmap
import os
import pickle
import struct
import weakref
from socket import recv_fds, send_fds, socket
from typing import Any

import torch

SHARED_FROM = 1 << 16  # bytes; below, a file descriptor costs more than the copy it saves
ALIGNED = 64  # bytes, what vector instructions like
KEPT = 8  # pieces that wait to be written to again; more are given up
_HEAD = struct.Struct("<QQqQ")
"""Bytes of the pickle, number of buffers, the piece they lie in or NONE, its size if it is new."""
NONE = -1


class _Pickler(pickle.Pickler):
    def reducer_override(self, thing: Any) -> Any:
        if type(thing) is not torch.Tensor or not _is_plain(thing):
            return NotImplemented
        raw: Any = thing.contiguous().view(-1).view(torch.uint8).numpy()
        return _tensor, (pickle.PickleBuffer(raw), thing.dtype, thing.shape)


def _is_plain(tensor: torch.Tensor) -> bool:
    return (
        tensor.device.type == "cpu"
        and tensor.layout == torch.strided
        and not (tensor.requires_grad or tensor.is_quantized or tensor.is_conj() or tensor.is_neg())
        and tensor.numel() > 0
    )


def _tensor(raw: Any, dtype: torch.dtype, shape: torch.Size) -> torch.Tensor:
    return torch.frombuffer(raw, dtype=dtype).view(shape)


def dumps(thing: Any) -> tuple[bytes, list[memoryview]]:
    """``thing`` as a pickle, and the memory of its tensors and arrays."""
    file, buffers = io.BytesIO(), list[pickle.PickleBuffer]()
    _Pickler(file, protocol=5, buffer_callback=buffers.append).dump(thing)
    return file.getvalue(), [buffer.raw() for buffer in buffers]


def send(to: socket, thing: Any) -> None:
    """Send anything that pickles, all of it through the socket.

    >>> from socket import socketpair
    >>> here, there = socketpair()
    >>> send(here, {"image": torch.zeros(3, 9, 9), "text": "a rose"})
    >>> message = receive(there)
    >>> message["image"].shape, message["text"]
    (torch.Size([3, 9, 9]), 'a rose')
    """
    data, buffers = dumps(thing)
    to.sendall(b"".join([_head(data, buffers, NONE), data, *buffers]))


def receive(source: socket) -> Any:
    """What was sent with :func:`send`.

    Raises EOFError if the other side is gone, also in the middle of a message.
    """
    return Borrower().receive(source)


def _head(data: bytes, buffers: list[memoryview], number: int, size: int = 0) -> bytes:
    sizes = [len(buffer) for buffer in buffers]
    head = _HEAD.pack(len(data), len(sizes), number, size)
    return head + struct.pack(f"<{len(sizes)}Q", *sizes)


class Lender:
    """Sends messages whose tensors lie in shared memory, which comes back when they are gone.

    >>> from socket import socketpair
    >>> here, there = socketpair()
    >>> lender, borrower = Lender(), Borrower()
    >>> for n in range(3):
    ...     lender.send(here, *dumps(torch.full((50_000,), n)))
    ...     number = int(borrower.receive(there)[-1])
    ...     lender.take_back(borrower.give_back())
    >>> lender.made
    1
    """

    def __init__(self) -> None:
        self.made = 0
        self._pieces: dict[int, mmap.mmap] = {}
        self._free: set[int] = set()

    def send(self, to: socket, data: bytes, buffers: list[memoryview]) -> None:
        """Send what :func:`dumps` gave."""
        used = sum(map(_aligned, buffers))
        if used < SHARED_FROM or not hasattr(os, "memfd_create"):
            to.sendall(b"".join([_head(data, buffers, NONE), data, *buffers]))
            return
        fitting = [number for number in self._free if len(self._pieces[number]) >= used]
        if fitting:
            number = min(fitting, key=lambda number: len(self._pieces[number]))
            self._free.remove(number)
            self._write(number, buffers)
            to.sendall(_head(data, buffers, number) + data)
            return
        # Some more than asked for, since the next batch may be a little larger.
        size = (used + used // 8) // mmap.PAGESIZE * mmap.PAGESIZE + mmap.PAGESIZE
        descriptor = os.memfd_create("energon_fn")
        try:
            os.ftruncate(descriptor, size)
            number, self.made = self.made, self.made + 1
            self._pieces[number] = mmap.mmap(descriptor, size)
            self._write(number, buffers)
            to.sendall(_head(data, buffers, number, size))
            send_fds(to, [b"\0"], [descriptor])
            to.sendall(data)
        finally:
            os.close(descriptor)

    def _write(self, number: int, buffers: list[memoryview]) -> None:
        start = 0
        with memoryview(self._pieces[number]) as memory:
            for buffer in buffers:
                memory[start : start + len(buffer)] = buffer
                start += _aligned(buffer)

    def take_back(self, numbers: list[int]) -> None:
        """What :meth:`Borrower.give_back` gave."""
        for number in numbers:
            if number >= 0:
                self._free.add(number)
            else:
                self._pieces.pop(~number).close()


class Borrower:
    """Receives what a :class:`Lender` sends; each has one of the other."""

    def __init__(self) -> None:
        self._pieces: dict[int, Any] = {}
        self._waiting = 0  # pieces that are the lender's to write to
        self._done: list[int] = []

    def receive(self, source: socket) -> Any:
        """The next message. Raises EOFError if the other side is gone."""
        length, count, number, new = _HEAD.unpack(_exactly(source, _HEAD.size))
        sizes = struct.unpack(f"<{count}Q", _exactly(source, 8 * count))
        if number == NONE:
            data = _exactly(source, length)
            return pickle.loads(data, buffers=[_exactly(source, size) for size in sizes])
        if new:
            self._pieces[number] = _map(source, new)
        else:
            self._waiting -= 1
        whole = self._pieces[number][:]  # an object of its own, which dies with the last tensor
        weakref.finalize(whole, self._done.append, number).atexit = False
        memory, buffers, start = memoryview(whole), list[memoryview](), 0
        for size in sizes:
            buffers.append(memory[start : start + size])
            start += size + -size % ALIGNED
        return pickle.loads(_exactly(source, length), buffers=buffers)

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
        # Mapped by torch, since Python's mmap would keep a descriptor for every piece.
        storage: Any = torch.UntypedStorage.from_file(f"/proc/self/fd/{files[0]}", True, size)
        return torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
    finally:
        os.close(files[0])


def _aligned(buffer: memoryview) -> int:
    return len(buffer) + -len(buffer) % ALIGNED


def _exactly(source: socket, size: int) -> bytearray:
    data = bytearray(size)  # writable, as the tensors in it must be
    view = memoryview(data)
    while view:
        got = source.recv_into(view)
        if not got:
            raise EOFError("the other side ended")
        view = view[got:]
    return data
