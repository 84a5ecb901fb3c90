"""Sizes as expressions of the number of rows, and of numbers that the model is given.

Capture sees one batch; the sizes it computed from the batch come as symbolic expressions. In the
captured graph every such size is a call `size(rows, "8*rows")`, which any part of the graph can
make from the number of rows it is given. Numbers among the arguments or in attributes that change
from call to call occur in such expressions, too: as `number_0`, `number_1`...
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any, TypeAlias

import sympy  # type: ignore[import-untyped]
import torch
from torch.utils._sympy.printers import PythonPrinter

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import CodeType

ROWS = sympy.Symbol("rows", integer=True, positive=True)

Size: TypeAlias = "int | sympy.Expr"
Affine: TypeAlias = "int | list[int]"


def size(rows: int, expression: str, **numbers: float) -> Any:
    """The value of an expression of `rows` and of numbers."""
    return evaluated(expression, {"rows": rows, **numbers}) if numbers else _size(rows, expression)


def evaluated(expression: str, names: Mapping[str, float]) -> Any:
    """The value of an expression of some names."""
    return eval(_compiled(expression), {**names, "math": math, "torch": torch})


@functools.lru_cache(maxsize=4096)
def _size(rows: int, expression: str) -> Any:
    return evaluated(expression, {"rows": rows})


@functools.lru_cache(maxsize=1024)
def _compiled(expression: str) -> CodeType:
    return compile(expression, "<size>", "eval")


class _Printer(PythonPrinter):
    """Writes floating-point numbers with all their digits, and more functions."""

    def _print_Float(self, expression: sympy.Expr) -> str:
        return repr(float(expression))

    def _print_OpaqueUnaryFn_sqrt(self, expression: sympy.Expr) -> str:
        return f"math.sqrt({self._print(expression.args[0])})"

    def _print_OpaqueUnaryFn_exp(self, expression: sympy.Expr) -> str:
        return f"math.exp({self._print(expression.args[0])})"

    def _print_OpaqueUnaryFn_log(self, expression: sympy.Expr) -> str:
        return f"math.log({self._print(expression.args[0])})"


def expression_text(expression: sympy.Expr) -> str:
    """Python source of an expression."""
    return str(_Printer().doprint(expression))


def is_variable(expression: Any) -> bool:
    """Whether a size or number is another one in other calls."""
    return isinstance(expression, sympy.Basic) and bool(expression.free_symbols)


def names_in(expression: Any) -> set[str]:
    """The names of the variables in a size or number."""
    return {symbol.name for symbol in expression.free_symbols} if is_variable(expression) else set()


def depends_on_rows(expression: Any) -> bool:
    """Whether a size changes with the batch."""
    return is_variable(expression) and ROWS in expression.free_symbols


def number_symbol(index: int, value: float) -> sympy.Symbol:
    """What stands for a number that the model is given."""
    is_whole = isinstance(value, int)
    return sympy.Symbol(number_name(index), integer=True if is_whole else None, real=True)


def number_name(index: int | str) -> str:
    """Its name in expressions, and in the graph."""
    return f"number_{index}"


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
    text = expression_text(expression)
    degrees = set()
    for value in (2, 7):  # of all other numbers in it
        others = dict.fromkeys(names_in(expression) - {"rows"}, value)
        degrees.add(_degree([(rows, float(size(rows, text, **others))) for rows in (2, 3, 5, 16)]))
    return degrees.pop() if len(degrees) == 1 else 0


def _degree(samples: list[tuple[int, float]]) -> int:
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
    """Translates the exporter's symbols: those of batch inputs become the one symbol `rows`.

    Attributes:
        any: whether there are any of batch inputs.
    """

    def __init__(
        self,
        batch_symbols: list[sympy.Symbol],
        numbers: Mapping[sympy.Symbol, sympy.Symbol] | None = None,
    ) -> None:
        self.any = bool(batch_symbols)
        self._table = {**dict.fromkeys(batch_symbols, ROWS), **(numbers or {})}

    def expression(self, number: Any) -> Any:
        """A number, or the expression of `rows` it stands for."""
        if not isinstance(number, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return number
        expression = self.translated(number.node.expr)
        if expression.is_Integer:
            return int(expression)
        return expression

    def translated(self, expression: sympy.Expr) -> sympy.Expr:
        """An expression of the exporter's as one of `rows` and numbers."""
        return expression.xreplace(self._table)

    def shape(self, tensor: torch.Tensor) -> tuple[Size, ...]:
        """The sizes of a tensor."""
        return tuple(self.expression(number) for number in tensor.shape)
