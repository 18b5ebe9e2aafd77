"""A loader's state as plain data: merged over ranks, checked, handed out again.

A state is what ``json`` and ``torch.save`` carry::

    {
        "version": 1,
        "fingerprint": {"lanes": 4, "seed_offset": 0, "batch_size": 32, ...},
        "world_size": 2,            # ranks when it was saved
        "epoch": 0,
        "delivered": 17,            # batches of this epoch, or virtual epoch, on each rank
        "lanes": {"0": [..., 9], "2": "ended"},  # the stream's state with its count of batches
    }

Each rank's state has the lanes of that rank. Lanes do not know of ranks: the states of all ranks
are merged into one, and any number of ranks that the lanes can be shared out to restores from it.
"""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from energon_fn.disk import files
from energon_fn.errors import StateError

VERSION = 1
ENDED = "ended"
State = dict[str, Any]

NEVER_ACCEPTED = {
    "lanes": "set WorkerConfig(lanes=...) to the number it was saved with",
    "seed_offset": "set WorkerConfig(seed_offset=...) to the number it was saved with",
}


def listed(state: Any) -> Any:
    """Plain data with lists for tuples: equal before and after a way through JSON.

    >>> listed(((0, 5), 1, None))
    [[0, 5], 1, None]
    """
    return [listed(part) for part in state] if isinstance(state, tuple | list) else state


def tupled(state: Any) -> Any:
    """The other way round: states are tuples inside of streams.

    >>> tupled([[0, 5], 1, None])
    ((0, 5), 1, None)
    """
    return tuple(tupled(part) for part in state) if isinstance(state, tuple | list) else state


def merge(states: Iterable[State]) -> State:
    """One state of those that the ranks saved at the same moment.

    Raises :class:`~energon_fn.StateError` if they do not belong together.

    >>> ranks = [
    ...     {"version": 1, "fingerprint": {"lanes": 2}, "world_size": 2, "epoch": 0, "delivered": 3,
    ...      "lanes": {str(rank): [[rank], 3]}} for rank in range(2)]
    >>> merge(ranks)["lanes"]
    {'0': [[0], 3], '1': [[1], 3]}
    """
    states = list(states)
    if not states:
        raise StateError("there is no state to merge: give those of all ranks")
    for other in states:
        check_version(other)
    first, lanes = states[0], dict[str, Any]()
    for other in states:
        for name in ("fingerprint", "world_size", "epoch"):
            if other[name] != first[name]:
                raise StateError(
                    f"the states do not belong to one checkpoint: {name} is {first[name]} in one "
                    f"and {other[name]} in another. Give the states that all ranks saved together."
                )
        if twice := lanes.keys() & other["lanes"].keys():
            raise StateError(f"two of the states have lane {min(twice)}: give each rank's once")
        lanes |= other["lanes"]
    running = {state["delivered"] for state in states if not _all_ended(state)}
    if len(running) > 1:
        raise StateError(
            f"the states were saved at different batches ({sorted(running)} delivered): save all "
            "ranks' states at the same step"
        )
    return {
        **first,
        "delivered": max(state["delivered"] for state in states),
        "lanes": {name: lanes[name] for name in sorted(lanes, key=int)},
    }


def _all_ended(state: State) -> bool:
    return all(lane == ENDED for lane in state["lanes"].values())


def redistribute(states: Iterable[State], world_size: int) -> list[State]:
    """The states for ``world_size`` ranks, of those that all ranks saved.

    Raises :class:`~energon_fn.StateError` if the lanes cannot be shared out evenly.

    >>> whole = {"version": 1, "fingerprint": {"lanes": 4}, "world_size": 1, "epoch": 0,
    ...          "delivered": 4, "lanes": {str(lane): [[lane], 1] for lane in range(4)}}
    >>> [list(rank["lanes"]) for rank in redistribute([whole], 2)]
    [['0', '2'], ['1', '3']]
    """
    whole = merge(states)
    count = whole["fingerprint"]["lanes"]
    if world_size < 1 or count % world_size:
        fitting = [n for n in range(1, count + 1) if count % n == 0]
        near = sorted(fitting, key=lambda n: abs(n - world_size))[:3]
        raise StateError(
            f"{count} lanes cannot be shared out evenly to {world_size} ranks; "
            f"{', '.join(map(str, sorted(near)))} ranks would do"
        )
    ranks = [[str(lane) for lane in range(rank, count, world_size)] for rank in range(world_size)]
    for lanes in ranks:
        check_lanes(whole, lanes)
    delivered = whole["delivered"] * whole["world_size"] // world_size
    return [
        {
            **whole,
            "world_size": world_size,
            "delivered": delivered,
            "lanes": {lane: whole["lanes"][lane] for lane in lanes},
        }
        for lanes in ranks
    ]


def read_state(path: str | PathLike[str]) -> State:
    """The state in a file: JSON (``*.json``) or ``torch.save``'s, alone or in a larger checkpoint.

    Raises :class:`~energon_fn.StateError` if there is none, or more than one.
    """
    path, data = Path(path), files.read_bytes(path)
    try:
        if path.suffix == ".json":
            content = json.loads(data)
        else:
            content = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        raise StateError(
            f"{path} holds more than plain data and tensors, or was not written by torch.save. "
            "States of megatron-energon are not read: begin an epoch, or seek to the batch."
        ) from error
    except Exception as error:
        raise StateError(
            f"{path} cannot be read: {error}. It must be JSON (*.json) or written by torch.save, "
            "and hold plain data and tensors only."
        ) from error
    found = list(_states_in(content))
    if len(found) != 1:
        raise StateError(f"{path} holds {len(found)} states of loaders; give a file with one")
    return found[0]


def _states_in(content: Any) -> Iterator[State]:
    if isinstance(content, dict):
        if {"version", "fingerprint", "lanes"} <= content.keys():
            yield content
        else:
            for part in content.values():
                yield from _states_in(part)


def write_state(path: str | PathLike[str], state: State) -> None:
    """Write a state as JSON (``*.json``) or as ``torch.save`` does, whole or not at all."""
    file = io.BytesIO()
    if Path(path).suffix == ".json":
        file.write(json.dumps(state).encode())
    else:
        torch.save(state, file)
    files.write_atomic(path, file.getvalue())


def check_version(state: Any) -> None:
    """Raise :class:`~energon_fn.StateError` for what is not a state that can be read here."""
    if not isinstance(state, Mapping) or "version" not in state:
        raise StateError(
            f"this is no state of a loader (a {type(state).__name__}): give what state_dict, "
            "save_state_rank or save_state_global returned"
        )
    if state["version"] != VERSION:
        raise StateError(
            f"the state has format {state['version']}, this version of energon_fn reads {VERSION}"
        )
    parts = {"fingerprint": Mapping, "world_size": int, "epoch": int, "delivered": int}
    parts["lanes"] = Mapping
    wrong = [name for name, kind in parts.items() if not isinstance(state.get(name), kind)]
    wrong = wrong or [f"lane {n}" for n, lane in state["lanes"].items() if not _is_of_lane(lane)]
    if wrong:
        raise StateError(
            f"the state is damaged: {', '.join(wrong)} is missing or not as it was saved. Give "
            "what state_dict, save_state_rank or save_state_global returned, or an older one."
        )


def _is_of_lane(state: Any) -> bool:
    match state:
        case None | "ended" | [_, int(), *_]:  # a tuple is such a sequence, too
            return True
    return False


def check_lanes(state: State, needed: Sequence[str]) -> None:
    """Raise :class:`~energon_fn.StateError` if the state lacks some of the lanes."""
    if missing := [lane for lane in needed if lane not in state["lanes"]]:
        raise StateError(
            f"the state has the lanes {', '.join(state['lanes'])}, but {', '.join(missing)} are "
            "needed here too: it is that of one rank of another layout. Merge the states of all "
            "ranks (energon_fn.checkpoint.merge, or save with save_state_global)."
        )


def differences(state: State, fingerprint: Mapping[str, Any], accept: Collection[str]) -> list[str]:
    """The accepted names in which the state and the loader differ.

    Raises :class:`~energon_fn.StateError` that shows both sides if there are others.
    """
    saved = state["fingerprint"]
    names = [
        name
        for name in {**saved, **fingerprint}
        if listed(saved.get(name)) != listed(fingerprint.get(name))
    ]
    refused = [name for name in names if name not in accept or name in NEVER_ACCEPTED]
    if refused:
        sides = "".join(
            f"\n  {name}: saved with {saved.get(name)}, here {fingerprint.get(name)}"
            for name in refused
        )
        remedies = [NEVER_ACCEPTED[name] for name in refused if name in NEVER_ACCEPTED]
        others = [name for name in refused if name not in NEVER_ACCEPTED]
        if others:
            remedies.append(
                f"accept={others} begins the next epoch with what is here, leaving out what "
                "remains of the current one"
            )
        raise StateError(f"the state does not fit this loader:{sides}\n{'; '.join(remedies)}")
    return names


def describe(state: State) -> str:
    """What is in a state, for people.

    >>> print(describe({"version": 1, "fingerprint": {"lanes": 2, "batch_size": 3}, "epoch": 0,
    ...     "world_size": 2, "delivered": 4, "lanes": {"0": [[], 4], "1": "ended"}}))
    epoch 0, 4 batches delivered to each of 2 ranks
    lanes: 2 of 2 (1 ended), with 4 to 4 batches
    batch_size: 3
    """
    lanes = list(state["lanes"].values())
    counts = [batches(lane) for lane in lanes if lane != ENDED]
    ended = lanes.count(ENDED)
    lines = [
        f"epoch {state['epoch']}, {state['delivered']} batches delivered to each of "
        f"{state['world_size']} ranks",
        f"lanes: {len(lanes)} of {state['fingerprint']['lanes']} ({ended} ended)"
        + (f", with {min(counts)} to {max(counts)} batches" if counts else ""),
    ]
    fingerprint = state["fingerprint"].items()
    lines += [f"{name}: {value}" for name, value in fingerprint if name != "lanes"]
    return "\n".join(lines)


def batches(state: Any) -> int:
    """How many batches a lane has given.

    >>> batches((((2, 17), 1), 3)), batches(None)
    (3, 0)
    """
    return 0 if state is None else int(state[1])


def plan_epoch(state: Any) -> int:
    """The epoch that a lane's stream is in: at the bottom of its state lies the plan's.

    >>> plan_epoch((((2, 17), 1), 3))
    2
    """
    while isinstance(state, tuple | list) and isinstance(state[0], tuple | list):
        state = state[0]
    return int(state[0]) if isinstance(state, tuple | list) and state[0] is not None else 0
