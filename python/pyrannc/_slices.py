"""Rows of tensors: cutting them out and putting them together, wherever the rows lie.

A value whose rows lie in dimension ``dim`` has there ``outer * rows * inner`` entries, row-major.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from ._core import ValueInfo
    from ._strides import Order


def num_rows(tensor: torch.Tensor, value: ValueInfo) -> int:
    """How many rows of the batch ``tensor`` holds."""
    return tensor.shape[value.dim] // (value.outer * value.inner)


def rows_of(tensor: torch.Tensor, value: ValueInfo, start: int, stop: int) -> torch.Tensor:
    """A view of rows ``start`` to ``stop``, their dimension unfolded when they lie scattered."""
    if value.outer == 1:
        return tensor.narrow(value.dim, start * value.inner, (stop - start) * value.inner)
    unfolded: torch.Tensor = tensor.unflatten(value.dim, (value.outer, -1, value.inner))
    return unfolded.narrow(value.dim + 1, start, stop - start)


def cut_rows(tensor: torch.Tensor, value: ValueInfo, start: int, stop: int) -> torch.Tensor:
    """Rows ``start`` to ``stop`` in the value's own form."""
    if start == 0 and stop == num_rows(tensor, value):
        return tensor
    rows = rows_of(tensor, value, start, stop)
    return rows if value.outer == 1 else rows.flatten(value.dim, value.dim + 2)


def add_rows(
    target: torch.Tensor, value: ValueInfo, start: int, stop: int, piece: torch.Tensor
) -> None:
    """Adds ``piece`` to rows ``start`` to ``stop`` of ``target`` in place."""
    whole = rows_of(target, value, start, stop)
    part = rows_of(piece, value, 0, stop - start)
    if target.dtype == torch.bool:
        whole.logical_or_(part)
    else:
        whole.add_(part)


def empty(value: ValueInfo, rows: int, order: Order, device: torch.device) -> torch.Tensor:
    """Memory for ``rows`` rows of a value, with its dimensions in this order."""
    shape, dtype = value.shape(rows), getattr(torch, value.dtype)
    return torch.empty_permuted(shape, order, dtype=dtype, device=device)


def zeros(value: ValueInfo, rows: int, order: Order, device: torch.device) -> torch.Tensor:
    """``rows`` rows of zeros."""
    return empty(value, rows, order, device).zero_()
