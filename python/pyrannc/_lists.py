"""Lists of samples, told from lists of tensors that each hold a batch.

The global batch of a list of batches is a list of as many, each with the rows of all processes;
that of a list of samples is a longer list. A model that keeps all rows apart gives the same for
both. Of any other one a trial shows what it takes: a list of samples may have any length.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ._culprit import undisturbed
from ._export import repeated
from ._snapshot import unchanged
from ._structure import Structure, flatten
from .capture import Captured, argument_names
from .errors import CaptureError

if TYPE_CHECKING:
    from collections.abc import Collection


def refuse_samples(
    model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], captured: Captured
) -> None:
    """Refuses lists among the arguments of which each item seems to be a sample.

    Args:
        model: the model.
        args: positional arguments of a call.
        kwargs: its keyword arguments.
        captured: the model as captured for them, which does not keep all rows apart.

    Raises:
        CaptureError: if there are any.
    """
    tensors, _, structure = flatten((args, kwargs))
    for path, part in _lists(structure, tensors):
        inside = _positions(part)
        if inside.isdisjoint(captured.batch_inputs):
            continue
        others = captured.batch_inputs.keys() - inside
        if others and not _runs_with_more_rows(model, tensors, structure, captured, inside):
            continue  # they belong to the rows of other arguments
        if _takes_any_number(model, tensors, structure, part):
            (name,) = argument_names(model, [path])
            raise CaptureError(
                f"the argument `{name}` is a list that may have any length, so its "
                f"{len(part.children)} items seem to be samples, and those of several processes "
                "would be taken for rows of the same one",
                hint="pass one tensor with the samples along its first dimension: stack them, or "
                "pad them to one size; or use one process for each step",
            )


def _lists(structure: Structure, tensors: list[torch.Tensor]) -> list[tuple[str, Structure]]:
    """Lists and tuples of items of the same kind, with their paths."""
    found: list[tuple[str, Structure]] = []

    def kind(position: int) -> str:
        return f"{tensors[position].dtype} {tensors[position].dim()}"

    def walk(part: Structure, path: tuple[str, ...]) -> None:
        kinds = {child.describe(kind) for child in part.children}
        if part.kind == "sequence" and len(path) > 1 and len(kinds) == 1 and _positions(part):
            found.append((".".join(path), part))
            return
        names = part.keys or range(len(part.children))
        for name, child in zip(names, part.children, strict=True):
            walk(child, (*path, str(name)))

    walk(structure, ())
    return found


def _positions(part: Structure) -> set[int]:
    """Positions of the tensors in it."""
    if part.kind == "tensor":
        return {part.value}
    return {position for child in part.children for position in _positions(child)}


def _runs_with_more_rows(
    model: torch.nn.Module,
    tensors: list[torch.Tensor],
    structure: Structure,
    captured: Captured,
    inside: Collection[int],
) -> bool:
    """Whether these tensors may have another number of rows than the others."""
    more = list(tensors)
    for position in captured.batch_inputs.keys() & set(inside):
        dim = captured.batch_inputs[position]
        more[position] = repeated(tensors[position], dim, tensors[position].shape[dim] + 1)
    return _run(model, structure, more) is not None


def _takes_any_number(
    model: torch.nn.Module, tensors: list[torch.Tensor], structure: Structure, part: Structure
) -> bool:
    """Whether the model makes something else of a list with each item twice."""
    twice = Structure(part.kind, part.value, (), part.children * 2)
    once = _run(model, structure, tensors)
    other = _run(model, _replaced(structure, part, twice), tensors)
    if once is None or other is None:
        return False
    return len(once) != len(other) or not all(
        one.shape == two.shape and torch.equal(one.nan_to_num(), two.nan_to_num())
        for one, two in zip(once, other, strict=True)
    )


def _replaced(structure: Structure, part: Structure, by: Structure) -> Structure:
    if structure is part:
        return by
    children = tuple(_replaced(child, part, by) for child in structure.children)
    return Structure(structure.kind, structure.value, structure.keys, children)


def _run(
    model: torch.nn.Module, structure: Structure, tensors: list[torch.Tensor]
) -> list[torch.Tensor] | None:
    """The tensors that the model gives for copies of these, or nothing if it fails."""
    args, kwargs = structure.build([tensor.detach().clone() for tensor in tensors])
    with unchanged(model), undisturbed(model):
        torch.manual_seed(0)
        try:
            results, _, _ = flatten(model(*args, **kwargs), unknown=lambda _, item: item)
        except Exception:  # whatever the user's forward raises
            return None
    return [result.detach().clone() for result in results]
