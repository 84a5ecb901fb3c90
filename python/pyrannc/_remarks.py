"""What is said once about a model: which parts stay whole, and why its batch does."""

from __future__ import annotations

import inspect
import json
from typing import TYPE_CHECKING, Any

from ._obstacles import described

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch

    from .capture import Captured

_STATEMENT = (
    "if that belongs to a loss which the model returns, state with the argument "
    '`output_reduction` of RaNNCModule that it is the "mean" or the "sum" over rows of what '
    "microbatches give; or have the model return what the loss needs, compute it outside, and "
    "state how it reduces with `loss_reduction`"
)
_BUFFER = (
    "have forward return what the buffer keeps, and keep it outside of the model; or write to it "
    "what does not depend on the rows"
)
_SIZE = "take the batch size from `x.shape[0]` wherever it is needed, and do not decide by it"


def how_to_split(reason: str) -> str:
    """What to do where a model needs the whole batch at once.

    Args:
        reason: why it does.
    """
    if " to the buffer `" in reason:
        return _BUFFER
    return _SIZE if reason.startswith("the model ") else _STATEMENT


def unsplit(captured: Captured, reason: str, model: torch.nn.Module) -> str:
    """Why the batch stays whole, where that is, and what to change.

    Args:
        captured: the captured model.
        reason: why.
        model: the user's model.
    """
    where = ""
    if captured.mixing_module is not None:
        module = model.get_submodule(captured.mixing_module)
        place = _forward_of(module)
        where = f" ({type(module).__name__}.forward, {place})" if place else ""
    return (
        "the batch cannot be split, so every step runs as one microbatch on one replica: "
        f"{reason}{where}; {how_to_split(reason)}"
    )


def uncaptured(captured: Captured, model: torch.nn.Module) -> str:
    """Which parts could not be captured, how large they are, why, and what to change.

    Args:
        captured: the captured model.
        model: the user's model.
    """
    paths = {one.path for one in captured.obstacles if one.path is not None}
    inside = {id(p): p for path in paths for p in model.get_submodule(path).parameters()}
    entries = sum(parameter.numel() for parameter in model.parameters())
    parameters = _percent(sum(p.numel() for p in inside.values()), entries)
    nodes = json.loads(captured.graph_json)["nodes"]
    whole = [node for node in nodes if node["op"].startswith("opaque.")]
    work = _percent(_work(whole), _work(nodes))
    count = len(captured.obstacles)
    many = f"{count} parts" if count > 1 else "a part"
    return (
        f"{many} of the model cannot be captured and cannot be divided between stages, with "
        f"{parameters} of the parameters and {work} of the arithmetic: "
        + described(captured.obstacles)
    )


def _work(nodes: Iterable[Any]) -> int:
    """Floating-point operations for a row or more."""
    costs = (node["flops"] for node in nodes)
    return sum(sum(cost) if isinstance(cost, list) else int(cost) for cost in costs)


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.0f} %" if whole else "0 %"


def _forward_of(module: torch.nn.Module) -> str:
    """File and line of a module's forward; empty if that is PyTorch's or unknown."""
    forward = inspect.unwrap(type(module).forward)
    code = getattr(forward, "__code__", None)
    if code is None or type(module).__module__.startswith("torch."):
        return ""
    return f"{code.co_filename}:{code.co_firstlineno}"
