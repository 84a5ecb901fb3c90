"""How a value depends on the rows of the batch."""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from ._sizes import Size, depends_on_rows, rows_factor


class MixesRows(Exception):
    """Raised when an operator computes across rows; says what it does."""


class Special(enum.Enum):
    """Dependences that have no parameters."""

    NONE = "none"
    SUM = "sum"
    WHOLE = "whole"


NONE, SUM, WHOLE = Special.NONE, Special.SUM, Special.WHOLE


class Content(enum.Enum):
    """What lies along the dimension of the rows."""

    ROWS = "rows"
    """Something of each row."""
    SAME = "same"
    """The same everywhere, or random numbers: any entry may belong to any row."""
    INDEX = "index"
    """The numbers of the rows."""


@dataclass(frozen=True, slots=True)
class Split:
    """Dimension `dim` has `outer * rows * inner` entries, row-major."""

    dim: int
    outer: int = 1
    inner: int = 1
    content: Content = Content.ROWS

    @property
    def factor(self) -> int:
        """Entries for each row."""
        return self.outer * self.inner

    def at(self, dim: int) -> Split:
        """The same in another dimension."""
        return replace(self, dim=dim)


Layout: TypeAlias = "Split | Special"


def merge(first: Split | None, second: Split) -> Split:
    """The layout of something computed entry by entry from both."""
    if first is None:
        return second
    if first.dim != second.dim or first.factor != second.factor:
        raise MixesRows("combines each row with other rows")
    if second.content is Content.SAME:
        return first
    if first.content is Content.SAME:
        return second
    if (first.outer, first.inner) != (second.outer, second.inner):
        raise MixesRows("combines rows that lie in different order")
    return second if first.content is Content.ROWS else first


def placed(shape: tuple[Size, ...], source: Split | None) -> Split:
    """Where the rows lie in a result that keeps the order of `source`'s entries.

    The result's only dimension that grows with the batch holds the rows; without a source it has
    the same content everywhere.
    """
    dim, factor = only_batch_dim(shape)
    if source is None:
        content = Content.ROWS if factor == 1 else Content.SAME
        return Split(dim, 1, factor, content)
    if source.content is Content.SAME:
        return Split(dim, 1, factor, Content.ROWS if factor == 1 else Content.SAME)
    if source.factor != factor:
        raise MixesRows("changes how many entries a row has")
    return source.at(dim)


def only_batch_dim(shape: tuple[Size, ...]) -> tuple[int, int]:
    """The dimension that grows with the batch, and its entries for each row."""
    dims = [dim for dim, length in enumerate(shape) if depends_on_rows(length)]
    if not dims:
        raise MixesRows("gives a result without rows")
    if len(dims) > 1:
        raise MixesRows("pairs rows with rows")
    factor = rows_factor(shape[dims[0]])
    if factor is None:
        raise MixesRows(f"makes a dimension of {shape[dims[0]]} entries")
    return dims[0], factor


def reshaped(before: tuple[Size, ...], source: Split, after: tuple[Size, ...]) -> Split:
    """Where the rows lie after a reshape, which keeps the row-major order of all entries."""
    dim, factor = only_batch_dim(after)
    if source.content is Content.SAME:
        return Split(dim, 1, factor, Content.ROWS if factor == 1 else Content.SAME)
    if source.content is Content.INDEX and factor != 1:
        raise MixesRows("computes with the numbers of the rows")
    runs = source.outer * _product(before[: source.dim])
    outer, rest = divmod(runs, max(_product(after[:dim]), 1))
    inner, uneven = divmod(factor, max(outer, 1))
    if rest or uneven or outer == 0:
        raise MixesRows("divides rows among the parts of a dimension")
    return Split(dim, outer, inner, source.content)


def fallback(shape: tuple[Size, ...]) -> Layout:
    """A layout that only says where rows seem to lie, for graphs that are never split."""
    try:
        dim, factor = only_batch_dim(shape)
    except MixesRows:
        return WHOLE
    return Split(dim, 1, factor)


def in_json(layout: Layout) -> Any:
    """The graph file's form."""
    if isinstance(layout, Split):
        return {"split": {"dim": layout.dim, "outer": layout.outer, "inner": layout.inner}}
    return layout.value


def _product(sizes: tuple[Size, ...]) -> int:
    result = 1
    for length in sizes:
        result *= int(length)
    return result
