"""Captures a model for the batch of all processes, of which each has a part.

Where the captured model keeps rows apart, any number of them will do. Where it does not, it has to
be clear what the global batch is: all local ones one behind the other in the first dimension.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from . import _core
from ._export import repeated
from ._lists import refuse_samples
from ._structure import flatten
from .capture import Captured, batch_size, capture
from .errors import CaptureError

if TYPE_CHECKING:
    from collections.abc import Callable


def capture_for_all(
    model: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    rows: int,
    run: Callable[..., Captured],
    *,
    gathered: bool,
) -> Captured:
    """The captured model, valid for the rows of all processes.

    Args:
        model: the model.
        args: positional arguments of this process's call.
        kwargs: its keyword arguments.
        rows: how many rows all processes have together.
        run: captures it for arguments.
        gathered: whether the local batches of several processes make the global one.

    Raises:
        CaptureError: when the model cannot be run with all rows, or it is not clear what they are.
    """
    local = batch_size(flatten((args, kwargs))[0])
    whole = _with_rows((args, kwargs), local, rows)
    try:
        captured = run(args, kwargs)
    except CaptureError:
        raise
    except Exception:  # whatever the user's forward raises
        if rows == local:
            raise
        try:
            return run(*whole)
        except Exception:  # the first failure tells more
            pass
        raise
    if gathered:
        _check_batch(model, args, kwargs, captured)
    if captured.static_rows in (None, rows):
        return captured
    try:
        return run(*whole)
    except CaptureError:
        raise
    except Exception as failure:  # whatever the user's forward raises
        raise CaptureError(
            f"{_place(model, failure)} runs with the {local} rows of one process, but not with the "
            f"{rows} rows of all, which it cannot take in parts: {failure}",
            hint="take the batch size from a tensor (`x.shape[0]`) where it is written into the "
            "model; or write that of all processes into it",
        ) from failure


def _check_batch(
    model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], captured: Captured
) -> None:
    """Refuses a batch of which it is not clear how it goes on with that of another process."""
    graph = _core.Graph.from_json(captured.graph_json)
    outputs = [graph.values[value].transport for value in graph.outputs]
    if graph.splittable and all(transport == "split" for transport in outputs):
        return
    refuse_samples(model, args, kwargs, captured)
    if not graph.splittable and _is_split_by_second_dimension(model, args, kwargs):
        raise CaptureError(
            "the model computes across the first dimension of its arguments, but takes what lies "
            "along the second one apart, so the batch seems to be there; batches of several "
            "processes are joined along the first dimension",
            hint="give it the batch as first dimension (`batch_first=True`, or transpose in its "
            "forward)",
        )


def _is_split_by_second_dimension(
    model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> bool:
    first = next((t for t in flatten((args, kwargs))[0] if t.dim() > 0), None)
    if first is None or first.dim() < 2 or first.shape[1] == 0:
        return False
    try:
        other = capture(model, args, kwargs, batch_dim=1)
    except Exception:  # whatever the user's forward raises
        return False
    return _core.Graph.from_json(other.graph_json).splittable


def _place(model: torch.nn.Module, failure: Exception) -> str:
    """The innermost part of the model that was running when it failed, in words."""
    names = {id(module): name for name, module in model.named_modules()}
    found, trace = "", failure.__traceback__
    while trace is not None:
        found = names.get(id(trace.tb_frame.f_locals.get("self")), found)
        trace = trace.tb_next
    return f"`{found}`" if found else "the model's forward"


def _with_rows(arguments: Any, rows: int, total: int) -> Any:
    """The same arguments with as many rows as the global batch has, of whatever content."""

    def repeat(tensor: Any) -> Any:
        if not isinstance(tensor, torch.Tensor) or tensor.dim() == 0 or tensor.shape[0] != rows:
            return tensor
        if rows == 0:
            return tensor
        return repeated(tensor.detach(), 0, total).requires_grad_(tensor.requires_grad)

    return pytree.tree_map(repeat, arguments)
