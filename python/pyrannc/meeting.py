"""Makes sure that all processes are in the same call before they exchange anything for it.

A call that needs every process fails here, with what each of them called, when they do not agree;
and it fails after the time limit when some never come. What follows can then be sure of the others.
"""

from __future__ import annotations

import hashlib
import struct
from typing import TYPE_CHECKING, TypeVar

import torch
from torch.utils import _pytree as pytree

from .calls import HINT
from .errors import ExecutionError, MismatchError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .comm import Communicator

T = TypeVar("T")
_WIDTH = 12  # equal for all calls, so that different ones can meet


def meet(comm: Communicator, call: str, numbers: Sequence[int] = ()) -> list[list[int]]:
    """Waits for all processes to make the same call.

    Args:
        comm: the connections to them.
        call: what is called, as a person would write it.
        numbers: at most 11 to tell the others.

    Returns:
        Every rank's numbers, by rank.

    Raises:
        MismatchError: when a process is in another call.
        ExecutionError: when a process does not come within the time limit.
    """
    if comm.world_size == 1:
        return [list(numbers)]
    row = [digest(call), *numbers]
    with comm.guard(call), comm.calls.meeting(call):
        try:
            rows = comm.all_gather_row(row + [0] * (_WIDTH - len(row)))
        except RuntimeError as error:
            comm.check_others()  # a connection that broke may be that of a process that has ended
            if "timed out" not in str(error).lower():
                raise
            raise TimeoutError(
                f"the other processes did not come to this call within "
                f"{comm.timeout.total_seconds():g} s; it must be made by all of them together, "
                "and only what is done with its result belongs under `if get_rank() == 0`"
            ) from error
    if any(other[0] != rows[0][0] for other in rows):
        told = comm.all_gather_objects(call)
        lines = "".join(f"\n  rank {rank}: {text}" for rank, text in enumerate(told))
        raise MismatchError(
            f"the processes are in different calls, all of which need every process:{lines}",
            hint=HINT,
        )
    return [other[1 : len(row)] for other in rows]


def raise_together(comm: Communicator, problem: Exception | None) -> None:
    """Raises on every rank the first problem that any rank has; collective.

    Args:
        comm: the connections to the other ranks.
        problem: this rank's, which must be picklable.
    """
    for found in comm.all_gather_objects(problem):
        if found is not None:
            raise found


def agree(comm: Communicator, task: str, action: Callable[[], T]) -> T:
    """Runs ``action`` on every rank, and raises on every rank if it failed on any.

    Raises:
        RaNNCError: this rank's own error where it failed here, else one that names the failing
            ranks.
    """
    result: T | None = None
    error: Exception | None = None
    try:
        result = action()
    except Exception as caught:  # raised again below, after the others know
        error = caught
    problems = comm.all_gather_objects(
        None if error is None else f"{type(error).__name__}: {error}"
    )
    if error is not None:
        raise error
    failed = [f"rank {rank}: {problem}" for rank, problem in enumerate(problems) if problem]
    if failed:
        raise ExecutionError(
            f"could not {task} on {len(failed)} of {comm.world_size} ranks: " + "; ".join(failed)
        )
    return result  # type: ignore[return-value]


def from_rank_zero(comm: Communicator, value: T) -> T:
    """Rank 0's nested value on every rank, with its tensors on the CPU; collective.

    Tensors travel one by one, so that no message has the size of them all.
    """
    leaves, structure = pytree.tree_flatten(value)
    described = [
        (leaf.shape, leaf.dtype) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves
    ]
    is_tensor = [isinstance(leaf, torch.Tensor) for leaf in leaves]
    described, is_tensor, structure = comm.broadcast_object((described, is_tensor, structure))
    received: list[object] = []
    for index, (description, travels) in enumerate(zip(described, is_tensor, strict=True)):
        if not travels:
            received.append(description)
            continue
        shape, dtype = description
        tensor = torch.empty(shape, dtype=dtype, device=comm.device)
        if comm.rank == 0:
            tensor.copy_(leaves[index].detach())
        received.append(comm.broadcast(tensor, 0).cpu())
    found: T = pytree.tree_unflatten(received, structure)
    return found


def digest(text: str) -> int:
    """A number that differs for texts that differ."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


def to_bits(number: float) -> int:
    """A floating-point number as a whole one that :func:`meet` can tell the others unchanged."""
    return int.from_bytes(struct.pack("<d", number), "little", signed=True)


def from_bits(bits: int) -> float:
    """What :func:`to_bits` was given."""
    (number,) = struct.unpack("<d", bits.to_bytes(8, "little", signed=True))
    return float(number)
