"""Messages arrive as they were sent, in memory of the receiver's own."""

import gc
import os
import threading
from pathlib import Path
from socket import socket, socketpair
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from energon_fn.processes import wire

DTYPES = [
    torch.uint8,
    torch.int64,
    torch.float32,
    torch.bfloat16,
    torch.bool,
    torch.complex64,
]


def through(thing: Any) -> Any:
    here, there = socketpair()
    with here, there:
        message = wire.dumps(thing)
        sender = threading.Thread(target=wire.Lender().send, args=(here, [message]))
        sender.start()
        (received,) = wire.Borrower().receive(there)
        sender.join()
    return wire.loads(received)


def test_nested_tensors_arrive() -> None:
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    assert [part.tolist() for part in through(nested).unbind()] == [[1.0] * 2, [1.0] * 3]


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="this system does not tell")
def test_pieces_that_are_in_use_keep_no_descriptor() -> None:
    before, kept = len(os.listdir("/proc/self/fd")), []
    here, there = socketpair()
    with here, there:
        lender, borrower = wire.Lender(), wire.Borrower()
        for n in range(40):
            lender.send(here, [wire.dumps(torch.full((50_000,), n))])
            kept.append(wire.loads(borrower.receive(there)[0]))
            lender.take_back(borrower.give_back())
        assert len(os.listdir("/proc/self/fd")) == before + 2
    assert [int(tensor[-1]) for tensor in kept] == list(range(40))


@given(
    shape=st.lists(st.integers(0, 60), max_size=3),
    dtype=st.sampled_from(DTYPES),
    transposed=st.booleans(),
)
def test_tensors_arrive_equal(shape: list[int], dtype: torch.dtype, transposed: bool) -> None:
    tensor = torch.arange(int(np.prod(shape))).view(shape).to(dtype)
    if transposed and len(shape) > 1:
        tensor = tensor.transpose(0, 1)
    found = through({"tensor": tensor, "array": tensor.real.float().numpy()})
    assert found["tensor"].dtype == dtype
    assert torch.equal(found["tensor"], tensor)
    assert np.array_equal(found["array"], tensor.real.float().numpy())


@pytest.mark.parametrize("size", [10, 1000, 100_000])
def test_what_arrives_can_be_written_to_and_outlives_its_message(size: int) -> None:
    found = [through([torch.full((size,), n), np.full(size, n)]) for n in range(3)]
    found[0][0][:] = 7
    found[0][1][:] = 7
    for n, (tensor, array) in enumerate(found):
        assert (tensor == (n or 7)).all()
        assert (array == (n or 7)).all()


def test_special_tensors_arrive_too() -> None:
    wanting_gradients = torch.rand(3, requires_grad=True)
    sparse, imaginary = torch.eye(4).to_sparse(), torch.tensor([1 + 2j])
    again, sparse_again, conjugate, negative, one, brain, none = through((
        wanting_gradients, sparse, imaginary.conj(), imaginary.conj().imag, torch.tensor(7),
        torch.ones(2, 3, dtype=torch.bfloat16).T, torch.zeros(0, 3, dtype=torch.bfloat16),
    ))  # fmt: skip
    assert (conjugate.item(), negative.item(), one.item()) == (1 - 2j, -2, 7)
    assert (one.shape, brain.shape, none.shape) == ((), (3, 2), (0, 3))
    assert again.requires_grad
    assert torch.equal(again, wanting_gradients)
    assert torch.equal(sparse_again.to_dense(), torch.eye(4))


@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_keep_their_order_in_memory(dtype: torch.dtype) -> None:
    pictures = torch.arange(144).view(2, 3, 4, 6).to(dtype)
    last = pictures.contiguous(memory_format=torch.channels_last)
    mirrored, swapped = last.permute(3, 1, 0, 2), pictures.transpose(1, 2)
    for tensor in (last, mirrored, swapped, pictures):
        found = through(tensor)
        assert found.stride() == tensor.stride()
        assert torch.equal(found, tensor)
    part, repeated = last[:, :, 1:3], pictures[:1].expand(2, -1, -1, -1)
    for tensor in (part, repeated):  # these have no order of their own, and take no more room
        found = through(tensor)
        assert found.is_contiguous()
        assert torch.equal(found, tensor)


def test_a_thing_that_is_there_twice_stays_one_thing() -> None:
    tensor = torch.zeros(5)
    first, second = through([tensor, tensor])
    assert first is second


def test_no_descriptor_stays_open_and_the_memory_goes_with_the_tensors() -> None:
    def mapped() -> int:
        return Path("/proc/self/maps").read_text().count("memfd:energon_fn")

    before = len(os.listdir("/proc/self/fd")), mapped()
    found = [through([torch.zeros(100_000), np.zeros(100_000)]) for _ in range(5)]
    assert len(os.listdir("/proc/self/fd")) == before[0]
    assert mapped() == before[1] + 5
    del found
    gc.collect()
    assert mapped() == before[1]


@given(st.lists(st.tuples(st.integers(0, 120_000), st.integers(0, 12)), max_size=30))
def test_memory_is_written_to_again_only_when_nobody_holds_what_is_in_it(
    steps: list[tuple[int, int]],
) -> None:
    here, there = socketpair()
    lender, borrower = wire.Lender(), wire.Borrower()
    held: list[tuple[int, torch.Tensor]] = []
    with here, there:
        for n, (size, keep) in enumerate(steps):
            thing = torch.full((size,), n, dtype=torch.int16), np.full(size // 2, n)
            sender = threading.Thread(target=lender.send, args=(here, [wire.dumps(thing)]))
            sender.start()
            tensor, array = wire.loads(*borrower.receive(there))
            sender.join()
            assert (array == n).all()
            held.append((n, tensor[size // 3 :]))  # a part holds the whole
            del tensor, array, held[: max(len(held) - keep, 0)]
            assert all((kept == number).all() for number, kept in held)
            lender.take_back(borrower.give_back())
            del thing
        held.clear()
        lender.take_back(borrower.give_back())
        assert len(lender._pieces) <= wire.KEPT
        assert lender._pieces.keys() == borrower._pieces.keys() == lender._free


def test_batches_that_are_let_go_take_the_same_memory_again() -> None:
    here, there = socketpair()
    lender, borrower = wire.Lender(), wire.Borrower()
    with here, there:
        batch = None
        for n in range(50):
            size = 90_000 + n * 100  # some are a little larger
            lender.send(here, [wire.dumps(torch.zeros(size, dtype=torch.uint8))])
            batch = wire.loads(*borrower.receive(there))
            assert len(batch) == size
            lender.take_back(borrower.give_back())
    assert lender.made == 2  # one is held while the next is written


@given(
    sizes=st.lists(
        st.lists(st.sampled_from([0, 1, 70, 2000, 9000, 40_000]), max_size=4), max_size=6
    ),
    text=st.sampled_from([5, 100_000]),
)
def test_the_things_of_a_message_arrive_each_for_itself(sizes: list[list[int]], text: int) -> None:
    things = [
        ("x" * text, [torch.arange(size) + n for n, size in enumerate(of_one)]) for of_one in sizes
    ]
    here, there = socketpair()
    with here, there:
        message = list(map(wire.dumps, things))
        sender = threading.Thread(target=wire.Lender().send, args=(here, message))
        sender.start()
        found = list(map(wire.loads, wire.Borrower().receive(there)))
        sender.join()
    assert len(found) == len(things)
    for (said, tensors), (expected, others) in zip(found, things, strict=True):
        assert said == expected
        assert len(tensors) == len(others)
        for tensor, other in zip(tensors, others, strict=True):
            assert torch.equal(tensor, other)
            tensor += 1  # nobody else's


def test_a_batch_of_a_message_holds_its_memory_and_a_label_does_not() -> None:
    here, there = socketpair()
    lender, borrower = wire.Lender(), wire.Borrower()
    with here, there:
        batches = [
            {"images": torch.full((9000,), n), "labels": torch.full((9,), n)} for n in (1, 2)
        ]
        lender.send(here, list(map(wire.dumps, batches)))
        first, second = map(wire.loads, borrower.receive(there))
        labels = [first["labels"], second["labels"]]
        del first
        gc.collect()
        assert borrower.give_back() == []  # the second lies in the same piece
        assert (second["images"] == 2).all()
        del second
        gc.collect()
        assert borrower.give_back() == [0]
        assert [label.tolist() for label in labels] == [[1] * 9, [2] * 9]


def test_the_end_of_the_other_side_is_told_wherever_it_comes() -> None:
    def record(thing: Any) -> bytes:
        here, there = socketpair()
        with here, there:
            wire.send(here, thing)
            return there.recv(1 << 20)

    whole = record({"text": "a rose", "tensor": torch.arange(9)})
    for length in range(0, len(whole), 7):
        here, there = socketpair()
        with there:
            here.sendall(whole[:length])
            here.close()
            with pytest.raises(EOFError):
                wire.receive(there)


def test_without_shared_memory_all_goes_through_the_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create")
    sent: list[Any] = []
    monkeypatch.setattr(wire, "send_fds", lambda *args: sent.append(args))
    assert torch.equal(through(torch.arange(100_000)), torch.arange(100_000))
    assert not sent


def test_sockets_are_the_only_thing_needed() -> None:
    here, there = socketpair()
    assert isinstance(here, socket)
    with here, there:
        for n in range(100):  # small messages wait in the socket
            wire.send(here, n)
        assert [wire.receive(there) for _ in range(100)] == list(range(100))
