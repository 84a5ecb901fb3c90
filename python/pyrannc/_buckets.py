"""Tensors that travel together: few messages, but small ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import torch

T = TypeVar("T")


def buckets(
    items: Iterable[T], tensor: Callable[[T], torch.Tensor], limit_bytes: int = 32 * 2**20
) -> list[list[T]]:
    """Cuts a list into runs of one type and about ``limit_bytes`` of the items' tensors."""
    found: list[list[T]] = []
    size = 0
    for item in items:
        one = tensor(item)
        fits = size + one.nbytes <= limit_bytes
        if found and tensor(found[-1][0]).dtype == one.dtype and fits:
            found[-1].append(item)
            size += one.nbytes
        else:
            found.append([item])
            size = one.nbytes
    return found
