"""What the first call of a model changes for good: the submodules and tensors that it makes.

A model that looks at its first input and then changes itself, once, is run twice for real before it
is captured. What the first run changes and the second one leaves alone belongs to the model; what
the second changes again is put back as it was before the first.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.parameter import is_lazy

from ._culprit import undisturbed
from ._places import GONE, holder_of, put
from ._snapshot import Snapshot
from .errors import CaptureError, MismatchError
from .meeting import agree

if TYPE_CHECKING:
    from collections.abc import Callable

    from .comm import Communicator

_KINDS = ("_modules", "_parameters", "_buffers")
_Parts = dict[torch.nn.Module, dict[str, dict[str, Any]]]

logger = logging.getLogger(__name__)


def is_unfinished(model: torch.nn.Module) -> bool:
    """Whether its first call is to give parameters their shapes, as with `nn.LazyLinear`."""
    return any(map(is_lazy, itertools.chain(model.parameters(), model.buffers())))


def settle(
    comm: Communicator,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer | None,
    run: Callable[[], object],
) -> None:
    """Has a model be as its first call leaves it; collective.

    Args:
        comm: the connections to the other ranks, whose rank 0's values count.
        model: the model.
        optimizer: what trains it, if anything does.
        run: calls it.

    Raises:
        MismatchError: when the first call makes something else on other ranks.
    """
    if any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()]):
        raise CaptureError(
            "the model's first call makes parts of it, for which it has to run",
            hint="create the model on a real device, or make these parts in __init__",
        )
    before = dict(model.named_parameters())
    for tensor in [*before.values(), *model.buffers()]:
        if not is_lazy(tensor):
            tensor.data = comm.broadcast(tensor.detach().to(comm.device).contiguous(), 0)
    generator = comm.broadcast_object(torch.get_rng_state())

    def once() -> None:
        with torch.random.fork_rng():
            torch.set_rng_state(generator)
            run()

    if is_unfinished(model):
        agree(comm, "make the first call of the model", lambda: _finish(model, once))
    agree(comm, "make the first call of the model", lambda: _keep(model, once))
    after = dict(model.named_parameters())
    made = [name for name, parameter in after.items() if before.get(name) is not parameter]
    state = {**after, **dict(model.named_buffers())}
    prints = [(name, _digest(tensor)) for name, tensor in sorted(state.items())]
    for theirs in comm.all_gather_objects(prints):
        if theirs != prints:
            different = sorted({name for name, _ in {*theirs} ^ {*prints}})
            raise MismatchError(
                f"the model's first call makes `{different[0]}`, and something else on each "
                "process, as it depends on the rows that they were given",
                hint="make it in __init__, or call the bare model on all processes with the same "
                "input before it is wrapped",
            )
    _tell_of_untrained(optimizer, {name: after[name] for name in made}, comm.rank)


def _finish(model: torch.nn.Module, run: Callable[[], None]) -> None:
    """Runs a model whose parameters get their shapes in that; whatever else it changes does not."""
    lazy = {m for m in model.modules() if any(map(is_lazy, m.parameters(recurse=False)))}
    lazy |= {m for m in model.modules() if any(map(is_lazy, m.buffers(recurse=False)))}
    others = [(path, module) for path, module in model.named_modules() if module not in lazy]
    values = [(b, b.detach().clone()) for _, m in others for b in m.buffers(recurse=False)]
    snapshot = Snapshot(others)
    try:
        with torch.no_grad():
            run()
    finally:
        snapshot.restore()
        with torch.no_grad():
            for buffer, value in values:
                buffer.copy_(value)


def _keep(model: torch.nn.Module, run: Callable[[], None]) -> None:
    """Runs a model twice, and keeps what the first run changes for good."""
    first = _parts(model)
    begin = Snapshot(model.named_modules())
    changes = again = None
    try:
        second, values = _run(model, run)
        middle = Snapshot(model.named_modules())
        try:
            third, later_values = _run(model, run)
        finally:
            again = middle.restore()
    finally:
        changes = begin.restore()
    steady = {
        identity: value
        for identity, value in values.items()
        if identity in later_values and torch.equal(value, later_values[identity])
    }
    for module, kinds in second.items():
        for kind in _KINDS:
            then = third.get(module, kinds)[kind]
            _settle(
                module.__dict__[kind], first.get(module, {}).get(kind), kinds[kind], then, steady
            )
    for place, value in changes.values.items():
        holder = holder_of(model, place)
        is_module = isinstance(holder, torch.nn.Module)
        if is_module and any(place[-1] in second[holder][kind] for kind in _KINDS):
            continue  # settled above
        if holder is not GONE and not again.touch(place):
            put(holder, place[-1], value)


def _settle(
    target: dict[str, Any],
    first: dict[str, Any] | None,
    second: dict[str, Any],
    third: dict[str, Any],
    steady: dict[int, torch.Tensor],
) -> None:
    """Makes submodules, parameters or buffers those after the second run, where those stay.

    Args:
        target: where a module has them.
        first: what it had there before; `None` for a module that was made.
        second: what it had after the first run.
        third: and after the second.
        steady: values of tensors that the second run left alone, by identity.
    """
    before = first or {}
    kept: dict[str, Any] = {}
    for name in {**before, **second}:
        was, now = before.get(name), second.get(name)
        stays = now is third.get(name)
        is_new = now is not None and (first is None or now is not was)
        if is_new and isinstance(now, torch.Tensor):
            is_assigned = was is not None and not isinstance(was, torch.nn.Parameter)
            stays = stays and id(now) in steady and not is_assigned
        chosen = now if stays else was
        if name in (second if stays else before):
            kept[name] = chosen
    target.clear()
    target.update(kept)


def _run(model: torch.nn.Module, run: Callable[[], None]) -> tuple[_Parts, dict[int, torch.Tensor]]:
    """The parts of a model after a run, and the values of its tensors, by identity."""
    with undisturbed(model):
        run()
        tensors = [*model.parameters(), *model.buffers()]
        return _parts(model), {id(tensor): tensor.detach().clone() for tensor in tensors}


def _parts(model: torch.nn.Module) -> _Parts:
    return {
        module: {kind: dict(module.__dict__[kind]) for kind in _KINDS} for module in model.modules()
    }


def _digest(tensor: torch.Tensor) -> str:
    content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.blake2b(content.numpy().tobytes(), digest_size=16).hexdigest()


def _tell_of_untrained(
    optimizer: torch.optim.Optimizer | None, made: dict[str, torch.nn.Parameter], rank: int
) -> None:
    """Warns of parameters that the first call made, and that the optimizer does not have."""
    if optimizer is None or rank != 0:
        return
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    names = [name for name, p in made.items() if p.requires_grad and id(p) not in trained]
    if names:
        logger.warning(
            "the model's first call made the parameters `%s`, which the optimizer does not have, "
            "so they are not trained: make them in __init__, or call the bare model once before "
            "the optimizer is made; `add_param_group` works, too",
            "`, `".join(names[:3]),
        )
