"""Makes numbers inputs of a captured graph, where that is right.

The model is exported a second time, with symbols in the places of the numbers. Its code may do
something else with a symbol than with a number, so the two graphs are compared: with the values of
the call the second must be the first.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ._flat import Flattener, is_value, operator_of, written_arguments
from ._numbers import PinnedError, equality
from ._opaque import Opaque
from ._rows import is_random
from ._sizes import number_name

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from ._export import Program
    from ._numbers import Number

_log = logging.getLogger("pyrannc")
_TOLERANCE = 1e-12


def promoted(
    plain: Program,
    flatten: Callable[[Program], Flattener],
    numbers: Mapping[Number, float],
    deciding: Collection[Number],
) -> tuple[Program, Flattener]:
    """The program with numbers as inputs, as far as that is right, and its flat graph.

    Args:
        plain: the program for the numbers' values.
        flatten: gives a program's flat graph.
        numbers: the numbers.
        deciding: those for which it is known not to be right.
    """
    flat = flatten(plain)
    wanted = {
        number: value
        for number, value in numbers.items()
        if number not in deciding and math.isfinite(value)
    }
    while wanted:
        try:
            found = _attempt(plain, flat, flatten, wanted)
            return _with_all(found[0], numbers), found[1]
        except PinnedError as pinned:
            names = {number_name(index): number for index, number in enumerate(wanted)}
            gone = [names[name] for name in pinned.names if name in names]
            wanted = {n: value for n, value in wanted.items() if n not in (gone or wanted)}
        except Exception as failure:  # whatever the user's code does with symbols
            _log.info("numbers are constants in what was captured: %s", failure)
            wanted = {} if len(wanted) == 1 else _those_that_work(plain, flat, flatten, wanted)
    return _with_all(plain, numbers), flat


def _attempt(
    plain: Program,
    flat: Flattener,
    flatten: Callable[[Program], Flattener],
    numbers: Mapping[Number, float],
) -> tuple[Program, Flattener]:
    program = plain.with_numbers(plain, numbers)
    other = flatten(program)
    if other.stood_in != {*program.stand_ins} or not _Comparison(flat, other).same():
        raise PinnedError(program.names)
    return program, other


def _those_that_work(
    plain: Program,
    flat: Flattener,
    flatten: Callable[[Program], Flattener],
    numbers: Mapping[Number, float],
) -> dict[Number, float]:
    """The numbers that can be inputs by themselves."""
    found: dict[Number, float] = {}
    for number, value in numbers.items():
        try:
            _attempt(plain, flat, flatten, {number: value})
        except Exception as failure:
            _log.info("`%s` is a constant in what was captured: %s", number.name, failure)
        else:
            found[number] = value
    return found


def _with_all(program: Program, numbers: Mapping[Number, float]) -> Program:
    """The program with guards for the numbers that are constants in it.

    Symbols keep their names by having the inputs first.
    """
    constants = {n: value for n, value in numbers.items() if n not in program.numbers}
    first = len(program.numbers)
    guards = [equality(first + i, value) for i, value in enumerate(constants.values())]
    return replace(
        program,
        numbers={**program.numbers, **constants},
        guards=(*program.guards, *guards),
    )


@dataclass(slots=True)
class _Comparison:
    """Compares a flat graph with one that has numbers as inputs.

    What no tensor of the model's goes into is compared by its content: numbers become tensors in
    several ways.
    """

    plain: Flattener
    other: Flattener

    def same(self) -> bool:
        """Whether both compute the same with the numbers' values."""
        left, right = _Contents(self.plain), _Contents(self.other)
        one, two = left.others(), right.others()
        if len(one) != len(two):
            return False
        pairs = dict(zip(one, two, strict=True))

        def alike(first: Any, second: Any) -> bool:
            if isinstance(first, fx.Node) and first in pairs:
                return pairs[first] is second
            return _equal(first, second, left, right, alike)

        return all(
            a.op == b.op
            and _described(a) == _described(b)
            and alike(a.args, b.args)
            and alike(dict(a.kwargs), dict(b.kwargs))
            for a, b in pairs.items()
        )


def _described(node: fx.Node) -> Any:
    what = operator_of(node)
    if what is None:
        return str(node.target)
    if isinstance(what.target, Opaque):
        return what.name, what.module
    return what.name, what.module, what.scope


def _equal(
    first: Any,
    second: Any,
    left: _Contents,
    right: _Contents,
    alike: Callable[[Any, Any], bool],
) -> bool:
    if isinstance(first, (list, tuple)) and isinstance(second, (list, tuple)):
        return len(first) == len(second) and all(map(alike, first, second))
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(alike(first[k], second[k]) for k in first)
    one, two = left.of(first), right.of(second)
    if isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor):
        if one.shape != two.shape or one.dtype != two.dtype:
            return False
        if one.is_meta or two.is_meta:
            return one.is_meta == two.is_meta
        return torch.allclose(one, two, rtol=_TOLERANCE, atol=0.0, equal_nan=True)
    if isinstance(one, float) and isinstance(two, float):
        return math.isclose(one, two, rel_tol=_TOLERANCE) or repr(one) == repr(two)
    if type(one) is not type(two):
        return False
    return bool(one == two)


class _Contents:
    """What the values of a flat graph are into which no tensor of the model's goes."""

    def __init__(self, flat: Flattener) -> None:
        self._flat = flat
        self._module = flat.module("Contents")
        self._known: dict[fx.Node, Any] = {}
        self._constant: set[fx.Node] = set()
        for node in flat.graph.nodes:
            if self._is_constant(node):
                self._constant.add(node)

    def others(self) -> list[fx.Node]:
        """The nodes that are none of these."""
        return [node for node in self._flat.graph.nodes if node not in self._constant]

    def of(self, argument: Any) -> Any:
        """The content of a node, or what else is an operator's argument."""
        if not isinstance(argument, fx.Node) or argument not in self._constant:
            return argument
        if "hint" in argument.meta or argument.name == "rows":
            return argument.meta.get("hint", self._flat.example_rows)
        if argument not in self._known:
            self._run()
        return self._known[argument]

    @torch.no_grad()
    def _run(self) -> None:
        """Computes all of them, in order, as some may be written to."""
        for node in self._flat.graph.nodes:
            if node not in self._constant:
                continue
            if "hint" in node.meta or node.op == "placeholder":
                self._known[node] = self.of(node)
                continue
            args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), self._known.__getitem__)
            if node.op == "get_attr":
                self._known[node] = self._flat.attributes[str(node.target)].detach().clone()
            elif node.op == "call_module":
                self._known[node] = self._module.get_submodule(str(node.target))(*args, **kwargs)
            else:
                target: Any = node.target
                self._known[node] = target(*args, **kwargs)

    def _is_constant(self, node: fx.Node) -> bool:
        if node.op == "placeholder":
            return node not in self._flat.inputs and node is not self._flat.row_share
        if node.op == "output":
            return False
        if node.op == "get_attr":
            return is_value(node) and self._flat.is_lifted(str(node.target))
        what = operator_of(node)
        if what is not None and (isinstance(what.target, Opaque) or is_random(node)):
            return False
        if any(target not in self._constant for target in written_arguments(node)):
            return False
        return all(argument in self._constant for argument in node.all_input_nodes)
