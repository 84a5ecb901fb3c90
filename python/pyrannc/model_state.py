"""The state of a deployed model as the bare model gives and takes it.

The model itself says what is in its state, under which names, and what it takes from another one:
its own ``state_dict`` and ``load_state_dict`` run, with all hooks and whatever modules override,
while its parameters are what they would be in the bare model.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import torch

from . import remote
from .errors import RaNNCError
from .guards import lifted
from .meeting import from_rank_zero, meet, raise_together

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from .comm import Communicator
    from .sharding import Sharding
    from .state import Holders


def gather(
    model: torch.nn.Module,
    holders: Holders,
    tensors: Mapping[str, torch.Tensor],
    sharding: Sharding,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> dict[str, Any]:
    """What the bare model's ``state_dict(*args, **kwargs)`` returns. Collective.

    Args:
        model: the user's.
        holders: who holds its tensors.
        tensors: parameters and buffers by name.
        sharding: which of them are divided.
        args: for ``state_dict``.
        kwargs: for ``state_dict``.

    Returns:
        Full tensors on the CPU on rank 0, an empty dictionary on the others.
    """
    left_out = {
        id(module._buffers.get(name))
        for module in model.modules()
        for name in module._non_persistent_buffers_set
    }
    whole = {
        name: holders.on_rank_zero(name, tensor)
        for name, tensor in tensors.items()
        if id(tensor) not in left_out
    }
    if holders.comm.rank != 0:
        return {}
    with lifted(), sharding.whole(), _replaced({name: tensors[name] for name in whole}, whole):
        return model.state_dict(*args, **{**kwargs, "keep_vars": False})


def load(
    model: torch.nn.Module,
    holders: Holders,
    tensors: Mapping[str, torch.Tensor],
    sharding: Sharding,
    state_dict: Mapping[str, Any],
    *,
    strict: bool,
) -> Any:
    """Takes this rank's part of a full state. Collective.

    All ranks pass the same, or rank 0 passes it and others an empty one.

    Args:
        model: the user's.
        holders: who holds its tensors.
        tensors: parameters and buffers by name.
        sharding: which of them are divided.
        state_dict: the full state.
        strict: as in ``nn.Module``.

    Returns:
        What the bare model's ``load_state_dict`` returns.

    Raises:
        RuntimeError: as in ``nn.Module``, the same on all ranks; nothing is changed then.
        RaNNCError: when the state is not a dictionary.
    """
    given: dict[int, torch.Tensor] = {}
    problem: Exception | None = None
    result = None
    comm = holders.comm
    filled = [
        number > 0 for (number,) in meet(comm, "model.load_state_dict(...)", [_size(state_dict)])
    ]
    if filled[0] and not all(filled):
        with comm.guard("sending rank 0's state to all processes"):
            state_dict = _from_rank_zero(comm, state_dict)
    try:
        _check(state_dict, comm.rank)
        with sharding.outlined():
            result, given = _assign(model, state_dict, strict=strict)
    except Exception as error:  # raised below, on all ranks
        problem = _without_trace(error)
    raise_together(comm, problem)
    with torch.no_grad():
        for name, tensor in tensors.items():
            if id(tensor) in given and holders.is_local(name):
                tensor.copy_(holders.part(name, given[id(tensor)]))
    return result


def _check(state_dict: Mapping[str, Any], rank: int) -> None:
    if not isinstance(state_dict, dict):
        raise RaNNCError(
            f"the model's state is a {type(state_dict).__name__} on rank {rank}, "
            "needed a dictionary"
        )
    if not state_dict:
        raise RaNNCError(
            f"the model's state has nothing in it on rank {rank}",
            hint="`state_dict()` gives the state to rank 0: load it there, the other processes "
            "with the empty dictionary that they got",
        )


def _size(state_dict: object) -> int:
    return len(state_dict) if isinstance(state_dict, dict) else 1


def _from_rank_zero(comm: Communicator, state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
    """Rank 0's state, with what tells of the versions of modules."""
    values = dict(state_dict)
    metadata = getattr(state_dict, "_metadata", None)
    values, metadata = from_rank_zero(comm, (values, metadata))
    received: OrderedDict[str, Any] = OrderedDict(values)
    if metadata is not None:
        received._metadata = metadata  # type: ignore[attr-defined]
    return received


def _assign(
    model: torch.nn.Module, state_dict: Mapping[str, Any], *, strict: bool
) -> tuple[Any, dict[int, torch.Tensor]]:
    """Lets the model take the state without copying anything.

    Returns:
        What ``load_state_dict`` returned, and by the identity of a parameter or buffer what it
        would have been given.
    """
    own: list[tuple[dict[str, Any], dict[str, Any]]] = [
        (tensors, dict(tensors))
        for module in model.modules()
        for tensors in (module._parameters, module._buffers)
    ]
    # A Parameter would be taken, and changed, as it is.
    values = OrderedDict(
        (key, value.detach() if isinstance(value, torch.Tensor) else value)
        for key, value in state_dict.items()
    )
    if hasattr(state_dict, "_metadata"):
        values._metadata = state_dict._metadata  # type: ignore[attr-defined]
    try:
        result = model.load_state_dict(values, strict=strict, assign=True)
        given = {
            id(tensor): taken.detach()
            for tensors, before in own
            for name, tensor in before.items()
            if (taken := tensors[name]) is not None and taken is not tensor
        }
    finally:
        for tensors, before in own:
            tensors.update(before)
    return result, given


@contextlib.contextmanager
def _replaced(
    tensors: Mapping[str, torch.Tensor], values: Mapping[str, torch.Tensor | None]
) -> Iterator[None]:
    """Gives tensors other values in the body."""
    own = {
        name: None if isinstance(tensor, remote.RemoteParameter) else tensor.data
        for name, tensor in tensors.items()
    }
    try:
        for name, tensor in tensors.items():
            remote.restore_storage(tensor, values[name])
        yield
    finally:
        for name, tensor in tensors.items():
            before = own[name]
            if before is None:
                remote.free_storage(tensor, name)
            else:
                tensor.data = before


def _without_trace(error: Exception) -> Exception:
    """The error as it can be sent: other processes need no frames of this one."""
    error.__traceback__ = error.__cause__ = error.__context__ = None
    return error
