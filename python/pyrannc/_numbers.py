"""Numbers that a model is given, as symbols while it is exported.

A symbol is a number to the model's code: arithmetic gives expressions of it, and a decision by it
gives a guard. Where code needs the very value, the guard says that it is this one.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch._dynamo.source import ConstantSource
from torch._guards import detect_fake_mode
from torch.fx.experimental import proxy_tensor
from torch.fx.experimental.sym_node import SymNode
from torch.fx.experimental.symbolic_shapes import DimDynamic
from torch.utils import _pytree as pytree
from torch.utils._sympy import functions
from torch.utils._thunk import Thunk

from ._places import replaced
from ._sizes import expression_text, names_in, number_name, number_symbol
from .errors import CaptureError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    import sympy  # type: ignore[import-untyped]
    from torch import fx

    from ._places import Place
    from ._sizes import Symbols
    from ._structure import Path, Structure

_FUNCTIONS = (
    "sqrt", "exp", "log", "log2", "cos", "cosh", "sin", "sinh", "tan", "tanh", "asin", "acos",
    "atan",
)  # fmt: skip
_ARGUMENT_PARSER = "python_arg_parser.h"
Symbol: TypeAlias = "torch.SymInt | torch.SymFloat"


@dataclass(frozen=True, slots=True)
class Number:
    """Where a number is.

    Attributes:
        name: what the user calls it.
        argument: the way to it, if it is in the arguments.
        place: the way to it, if the model holds it or its code finds it outside.
    """

    name: str
    argument: Path | None = None
    place: Place | None = None


class PinnedError(Exception):
    """Occurs when numbers cannot be inputs: with other values the graph is another one.

    Attributes:
        names: their names in expressions.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.names = frozenset(names)
        super().__init__(", ".join(sorted(self.names)))


@dataclass(slots=True)
class Symbolic:
    """Has symbols in the places of numbers while a model is exported.

    Attributes:
        values: the numbers' values in the call that is exported.
        symbols: the symbols of the last export.
        stand_ins: expressions by the values that stand for them where the exporter takes plain
            numbers only.
    """

    values: Mapping[Number, float]
    symbols: list[Symbol] = field(default_factory=list)
    stand_ins: dict[float, sympy.Expr] = field(default_factory=dict)

    @contextlib.contextmanager
    def placed(
        self, model: torch.nn.Module, arguments: Structure, tensors: Sequence[torch.Tensor]
    ) -> Iterator[Structure]:
        """Runs the body with symbols in what the model finds; gives the arguments with them."""
        self._begin(tensors)
        pairs = list(zip(self.values, self.symbols, strict=True))
        held = {number.place: symbol for number, symbol in pairs if number.place is not None}
        given = {n.argument: symbol for n, symbol in pairs if n.argument is not None}
        with replaced(model, held), _computing(self._owns), self._plain_arguments():
            yield arguments.with_constants(given)

    @property
    def environment(self) -> Any:
        """The exporter's knowledge about symbols."""
        return self.symbols[0].node.shape_env

    @property
    def table(self) -> dict[sympy.Symbol, sympy.Symbol]:
        """The symbols in the graph's expressions, by the exporter's."""
        return {
            symbol.node._expr: number_symbol(index, value)
            for index, (symbol, value) in enumerate(
                zip(self.symbols, self.values.values(), strict=True)
            )
        }

    @property
    def names(self) -> dict[str, float]:
        """The values by their names in expressions."""
        return {number_name(index): value for index, value in enumerate(self.values.values())}

    def guards(self, symbols: Symbols) -> tuple[str, ...]:
        """What was decided by the numbers, as expressions that are true.

        Raises:
            PinnedError: when they decided together with something else.
        """
        own = {symbol.node._expr: index for index, symbol in enumerate(self.symbols)}
        texts: dict[str, None] = {}
        for guard in self.environment.guards:
            if not guard.expr.free_symbols.isdisjoint(own):
                expression = symbols.translated(guard.expr)
                check_apart(expression)
                texts[expression_text(expression)] = None
        values = list(self.values.values())
        for symbol, index in own.items():
            if not self.environment.replace(symbol).free_symbols:
                texts[equality(index, values[index])] = None
        return tuple(texts)

    def _begin(self, tensors: Sequence[torch.Tensor]) -> None:
        mode, proxies = detect_fake_mode(tensors), proxy_tensor.get_proxy_mode()
        if mode is None or proxies is None:
            message = "the exporter does not trace numbers"
            raise CaptureError(message)
        self.stand_ins.clear()
        self.symbols[:] = [
            _tracked(_symbol(mode.shape_env, index, value))
            for index, value in enumerate(map(_plain, self.values.values()))
        ]

    def _owns(self, expression: sympy.Expr) -> bool:
        own = {symbol.node._expr for symbol in self.symbols}
        return bool(expression.free_symbols) and expression.free_symbols <= own

    @contextlib.contextmanager
    def _plain_arguments(self) -> Iterator[None]:
        """Has operators' arguments that can be no symbols be other, unlikely numbers for them."""
        original = SymNode.guard_float

        def guard_float(node: Any, file: str, line: int) -> float:
            if file.endswith(_ARGUMENT_PARSER) and self._owns(node.expr):
                return self._stand_in(node)
            return float(original(node, file, line))

        setattr(SymNode, "guard_float", guard_float)  # noqa: B010
        try:
            yield
        finally:
            setattr(SymNode, "guard_float", original)  # noqa: B010

    def _stand_in(self, node: Any) -> float:
        value = math.nextafter(float(node.hint), 0.0)
        while value in self.stand_ins or value == node.hint:
            value = math.nextafter(value, 0.0 if value else 1.0)
        self.stand_ins[value] = node.expr
        return value


def equality(index: int, value: float) -> str:
    """An expression that is true for one value of a number only."""
    return f"repr({number_name(index)}) == {repr(value)!r}"


def pinned(guards: Iterable[str], index: int) -> bool:
    """Whether guards let a number have one value only."""
    return any(guard.startswith(f"repr({number_name(index)}) ==") for guard in guards)


def check_apart(expression: sympy.Expr) -> None:
    """Looks whether an expression is one of numbers or of other symbols.

    Raises:
        PinnedError: when it is one of both.
    """
    names = names_in(expression)
    numbers = {name for name in names if name.startswith(number_name(""))}
    if numbers and names - numbers:
        raise PinnedError(numbers)


def check_independent(module: fx.GraphModule, symbols: Symbols) -> None:
    """Looks whether the sizes of tensors are the same for all values of numbers.

    Raises:
        PinnedError: when they are not.
    """
    for node in module.graph.nodes:
        value = node.meta.get("val")
        for tensor in pytree.tree_leaves(value):
            if isinstance(tensor, torch.Tensor):
                names = {name for size in symbols.shape(tensor) for name in names_in(size)}
                numbers = {name for name in names if name.startswith(number_name(""))}
                if numbers:
                    raise PinnedError(numbers)


def _plain(value: float) -> float:
    return value if type(value) is int else float(value)


def _symbol(environment: Any, index: int, value: float) -> Symbol:
    source = ConstantSource(number_name(index))
    symbol = environment.create_unspecified_symbol(value, source, DimDynamic.DYNAMIC)
    is_float = isinstance(value, float)
    make = environment.create_symfloatnode if is_float else environment.create_symintnode
    made: Symbol = make(symbol, hint=value, source=source)
    return made


def _tracked(symbol: Symbol) -> Symbol:
    """The symbol, as something that a node of the exported graph makes."""
    mode = proxy_tensor.get_proxy_mode()
    assert mode is not None
    convert = torch.sym_float if isinstance(symbol, torch.SymFloat) else torch.sym_int
    proxy = mode.tracer.create_proxy("call_function", convert, (symbol.node.hint,), {})
    proxy.node.meta["val"] = symbol
    proxy_tensor.set_proxy_slot(symbol, mode.tracer, Thunk(lambda: proxy))
    return symbol


@contextlib.contextmanager
def _computing(owns: Callable[[sympy.Expr], bool]) -> Iterator[None]:
    """Has functions of `math` give expressions of symbols."""
    originals = {name: getattr(math, name) for name in _FUNCTIONS}

    def replacement(name: str) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            symbol = args[0] if len(args) == 1 else None
            if isinstance(symbol, (torch.SymInt, torch.SymFloat)) and owns(symbol.node.expr):
                return _function(name, originals[name], symbol)
            return originals[name](*args)

        return call

    for name in _FUNCTIONS:
        setattr(math, name, replacement(name))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(math, name, original)


def _function(name: str, original: Callable[[Any], float], symbol: Symbol) -> Symbol:
    node = torch.sym_float(symbol).node
    expression = getattr(functions, f"OpaqueUnaryFn_{name}")(node.expr)
    made = SymNode(expression, node.shape_env, float, original(node.hint))
    return _tracked(torch.SymFloat(made))
