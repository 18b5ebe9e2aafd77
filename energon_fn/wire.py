"""How a batch crosses from one process to another: one message, its tensors copied once.

A message is a pickle whose tensors and arrays are left out of it (pickle protocol 5, PEP 574).
Small ones follow it through the socket. Large ones are written to one piece of anonymous shared
memory, whose file descriptor goes along, and the receiver's tensors lie in that memory. It has no
name, so nothing is left behind whoever is killed when; it is freed with the last tensor in it.
"""

from __future__ import annotations

import io
import os
import pickle
import struct
from collections.abc import Sequence
from socket import recv_fds, send_fds, socket
from typing import Any

import torch

SHARED_FROM = 1 << 16  # bytes; below, a file descriptor costs more than the copy it saves
ALIGNED = 64  # bytes, what vector instructions like
_HEAD = struct.Struct("<QQ?")  # bytes of the pickle, number of buffers, whether they are shared


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
    """Send anything that pickles.

    >>> from socket import socketpair
    >>> here, there = socketpair()
    >>> send(here, {"image": torch.zeros(3, 99, 99), "text": "a rose"})
    >>> message = receive(there)
    >>> message["image"].shape, message["text"]
    (torch.Size([3, 99, 99]), 'a rose')
    """
    send_dumped(to, *dumps(thing))


def send_dumped(to: socket, data: bytes, buffers: list[memoryview]) -> None:
    """Send what :func:`dumps` gave."""
    sizes = [len(buffer) for buffer in buffers]
    shared = sum(sizes) >= SHARED_FROM and hasattr(os, "memfd_create")
    head = _HEAD.pack(len(data), len(sizes), shared) + struct.pack(f"<{len(sizes)}Q", *sizes)
    if not shared:
        to.sendall(b"".join([head, data, *buffers]))
        return
    memory = os.memfd_create("energon_fn")
    try:
        _write(memory, buffers)
        to.sendall(head)
        send_fds(to, [b"\0"], [memory])
        to.sendall(data)
    finally:
        os.close(memory)


def _write(memory: int, buffers: Sequence[memoryview]) -> None:
    pieces: list[bytes | memoryview] = []
    for buffer in buffers:
        pieces += buffer, bytes(-len(buffer) % ALIGNED)
    for first in range(0, len(pieces), 512):  # the system takes so many at a time
        some = pieces[first : first + 512]
        written = os.writev(memory, some)
        if written < sum(map(len, some)):  # no system call writes more than 2 GiB
            rest = memoryview(b"".join(some))[written:]
            while rest:
                rest = rest[os.write(memory, rest) :]


def receive(source: socket) -> Any:
    """What was sent with :func:`send`.

    Raises EOFError if the other side is gone, also in the middle of a message.
    """
    length, count, shared = _HEAD.unpack(_exactly(source, _HEAD.size))
    sizes = struct.unpack(f"<{count}Q", _exactly(source, 8 * count))
    if not shared:
        data = _exactly(source, length)
        return pickle.loads(data, buffers=[_exactly(source, size) for size in sizes])
    _, files, _, _ = recv_fds(source, 1, 1)
    if not files:
        raise EOFError("the other side ended in the middle of a message")
    try:
        # Mapped by torch, since Python's mmap would keep a descriptor for every batch that is held.
        whole = sum(size + -size % ALIGNED for size in sizes)
        storage: Any = torch.UntypedStorage.from_file(f"/proc/self/fd/{files[0]}", True, whole)
        bytes_there: Any = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
        memory = memoryview(bytes_there)
    finally:
        os.close(files[0])
    buffers, start = [], 0
    for size in sizes:
        buffers.append(memory[start : start + size])
        start += size + -size % ALIGNED
    return pickle.loads(_exactly(source, length), buffers=buffers)


def _exactly(source: socket, size: int) -> bytearray:
    data = bytearray(size)  # writable, as the tensors in it must be
    view = memoryview(data)
    while view:
        got = source.recv_into(view)
        if not got:
            raise EOFError("the other side ended")
        view = view[got:]
    return data
