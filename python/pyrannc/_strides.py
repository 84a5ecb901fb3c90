"""In which order a tensor's dimensions lie in memory.

A model may look at that order: a `view` of a channels-last image is possible in other ways than of
one whose channels come first. So a tensor that is sent, put together of parts, or made in place of
another, lies in memory as the model would have it.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

Order = tuple[int, ...]
"""The dimensions of a tensor from the outermost to the innermost in memory."""


def order_of(size: Sequence[int], stride: Sequence[int]) -> Order:
    """The order of the dimensions, also of tensors with gaps and of expanded ones.

    Where that leaves it open the order is what PyTorch gives to a new tensor like this one.
    """
    if 0 not in stride and all(one >= other for one, other in itertools.pairwise(stride)):
        return tuple(range(len(stride)))
    strides = torch.empty_like(torch.empty_strided(size, stride, device="meta")).stride()
    return tuple(sorted(range(len(size)), key=lambda dim: -strides[dim]))


def inverse(order: Order) -> Order:
    """Where each dimension is in the order."""
    return tuple(sorted(range(len(order)), key=order.__getitem__))


def ordered(tensor: torch.Tensor, order: Order) -> torch.Tensor:
    """The tensor without gaps in memory, with its dimensions in this order; a copy if need be."""
    return tensor.permute(order).contiguous().permute(inverse(order))


def in_order(tensor: torch.Tensor, order: Order) -> torch.Tensor:
    """The tensor with its dimensions in this order and without gaps; what is expanded may stay."""
    expanded = 0 in tensor.stride() and order_of(tensor.shape, tensor.stride()) == order
    return tensor if expanded else ordered(tensor, order)


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether there are no gaps in the tensor's memory, in whatever order it lies."""
    if tensor.is_contiguous():
        return True
    return tensor.stride() == torch.empty_like(tensor, device="meta").stride()
