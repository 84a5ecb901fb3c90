"""Sizes as expressions of the number of rows.

Capture sees one batch; the sizes it computed from the batch come as symbolic expressions. In the
captured graph every such size is a call `size(rows, "8*rows")`, which any part of the graph can
make from the number of rows it is given.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any, TypeAlias

import sympy  # type: ignore[import-untyped]
import torch
from torch.utils._sympy.printers import PythonPrinter

if TYPE_CHECKING:
    from types import CodeType

ROWS = sympy.Symbol("rows", integer=True, positive=True)

Size: TypeAlias = "int | sympy.Expr"
Affine: TypeAlias = "int | list[int]"


@functools.lru_cache(maxsize=4096)
def size(rows: int, expression: str) -> Any:
    """The value of an expression of `rows`."""
    return eval(_compiled(expression), {"rows": rows, "math": math, "torch": torch})


@functools.lru_cache(maxsize=1024)
def _compiled(expression: str) -> CodeType:
    return compile(expression, "<size>", "eval")


def expression_text(expression: sympy.Expr) -> str:
    """Python source of an expression."""
    return str(PythonPrinter().doprint(expression))


def depends_on_rows(expression: Any) -> bool:
    """Whether a size changes with the batch."""
    return isinstance(expression, sympy.Basic) and bool(expression.free_symbols)


def rows_factor(expression: Size) -> int | None:
    """The `k` of a size `k * rows`; `None` for any other size."""
    if not isinstance(expression, sympy.Expr):
        return None
    factor, rest = expression.as_coeff_Mul()
    if rest != ROWS:
        factor = sympy.simplify(expression / ROWS)
    return int(factor) if factor.is_Integer else None


def degree_in_rows(expression: sympy.Expr) -> int:
    """1 if proportional to the rows, -1 if inversely so, 0 if neither."""
    samples = [(rows, float(size(rows, expression_text(expression)))) for rows in (2, 3, 5, 16)]
    for degree in (1, -1):
        factors = [number / rows**degree for rows, number in samples]
        if factors[0] and all(math.isclose(factor, factors[0]) for factor in factors):
            return degree
    return 0


def at(expression: Size, rows: int) -> int:
    """The size for a number of rows."""
    if not isinstance(expression, sympy.Basic):
        return int(expression)
    return int(size(rows, expression_text(expression)))


def fit(first: int, second: int, rows: tuple[int, int]) -> Affine:
    """The line through two measurements, `fixed` or `[per_row, fixed]`."""
    per_row = round((second - first) / (rows[1] - rows[0]))
    return [per_row, first - per_row * rows[0]] if per_row else first


def affine(expression: Size, rows: int) -> Affine:
    """A size in the graph's form; sizes that are no lines are approximated about `rows`."""
    if not depends_on_rows(expression):
        return int(expression)
    factor = rows_factor(expression)
    if factor is not None:
        return [factor, 0]
    return fit(at(expression, rows), at(expression, 2 * rows), (rows, 2 * rows))


class Symbols:
    """Translates the exporter's symbols, one for each batch input, into the one symbol `rows`."""

    def __init__(self, batch_symbols: list[sympy.Symbol]) -> None:
        self._table = dict.fromkeys(batch_symbols, ROWS)

    @property
    def any(self) -> bool:
        """Whether there are any."""
        return bool(self._table)

    def expression(self, number: Any) -> Any:
        """A number, or the expression of `rows` it stands for."""
        if not isinstance(number, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return number
        expression = number.node.expr.xreplace(self._table)
        if expression.is_Integer:
            return int(expression)
        return expression

    def shape(self, tensor: torch.Tensor) -> tuple[Size, ...]:
        """The sizes of a tensor."""
        return tuple(self.expression(number) for number in tensor.shape)
