"""The order of a captured graph's operators: the same in all processes, whenever they ran.

A forward that loops over a set runs what does not depend on each other in an order that differs
between processes. So the graph is put into an order that depends only on the operators, on what
they read, and on the places in the program that called them; Rust finds it. Where the model's code
runs in the same order every time, it is that order.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from typing import TYPE_CHECKING

import torch
from torch import fx

from . import _core
from ._flat import (
    CALLED_AT,
    attribute,
    is_value,
    operator_of,
    outputs_of,
    positional,
    state_name,
    written_arguments,
)
from ._opaque import Opaque

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable

Memory = dict[fx.Node, tuple[list[fx.Node], list[fx.Node]]]
"""For operators, the arguments that their results share memory with, and those they write to."""

_NUMBERED = re.compile(r"(.*\b_?(?:lifted_tensor|tensor_constant|lifted_tensor_constant)_?)\d+")


def put_in_order(
    module: fx.GraphModule,
    inputs: list[fx.Node],
    registered: Container[str],
    memory: Callable[[], Memory],
    *,
    keeps: bool,
) -> None:
    """Puts the operators of a flat graph, and the constants in it, into the canonical order.

    Args:
        module: the flat graph.
        inputs: its placeholders for the model's tensors.
        registered: names of the model's parameters and buffers.
        memory: finds out what its operators do to memory; called if any of them writes.
        keeps: whether parts that run as they are change what their next call finds.
    """
    operators = [node for node in module.graph.nodes if operator_of(node) is not None]
    writes = any(written_arguments(node) for node in operators)
    after = _Turns(memory() if writes else {}, keeps=keeps).of(operators)
    labelled = _Labels(module, inputs, operators)
    labels, reads = [], []
    for node in operators:
        label, read = labelled.of(node)
        labels.append(label)
        reads.append(read)
    steps = list(zip(_places(operators, reads), labels, reads, after, strict=True))
    order = [operators[index] for index in _core.canonical_order(steps)]
    output = module.graph.output_node()
    for node in order:
        output.prepend(node)
        for item in [] if is_value(node) else sorted(outputs_of(node), key=_item):
            output.prepend(item)
    _place_constants(order, registered)


def _places(operators: list[fx.Node], reads: list[list[int]]) -> list[list[tuple[int, bool]]]:
    """Where operators are called; with the last that they read from where that is not known."""
    given = [node.meta.get(CALLED_AT, ()) for node in operators]
    names = {item for place in given for item, _ in place if isinstance(item, str)}
    numbers = {name: number for number, name in enumerate(sorted(names, key=_padded))}
    places: list[list[tuple[int, bool]]] = []
    for place, read in zip(given, reads, strict=True):
        known = [(numbers.get(item, item), is_loop) for item, is_loop in place]
        places.append(known or max((places[index] for index in read), default=[]))
    return places


def _padded(text: str) -> str:
    """The text with zeros before its numbers, so that `layers.10` comes after `layers.9`."""
    return re.sub(r"\d+", lambda number: number[0].zfill(10), text)


class _Labels:
    """What tells operators apart, whatever their order is."""

    def __init__(
        self, module: fx.GraphModule, inputs: list[fx.Node], operators: list[fx.Node]
    ) -> None:
        self._module = module
        self._inputs = {node: f"input {index}" for index, node in enumerate(inputs)}
        self._makers = {n: index for index, node in enumerate(operators) for n in outputs_of(node)}
        self._results: dict[int, list[str]] = {}
        for position, output in enumerate(positional(module.graph.output_node())[0]):
            if output in self._makers:
                text = f"{_item(output)} is result {position}"
                self._results.setdefault(self._makers[output], []).append(text)

    def of(self, node: fx.Node) -> tuple[str, list[int]]:
        """All that is known of an operator but those it reads from, and the numbers of these."""
        reads: list[int] = []

        def shown(argument: fx.Node) -> str:
            if argument not in self._makers:
                return self._name(argument)
            reads.append(self._makers[argument])
            return f"item {_item(argument)}"

        what = operator_of(node)
        assert what is not None
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), shown)
        plain = what.target.plain_arguments if isinstance(what.target, Opaque) else ""
        made = [
            text for n in outputs_of(node)[:1] for text in self._results.get(self._makers[n], [])
        ]
        text = f"{what.module}/{what.name}{args!r}{kwargs!r}{plain}{what.scope!r}{made!r}"
        return _padded(text), reads

    def _name(self, node: fx.Node) -> str:
        """A name of what no operator makes that is the same in all processes."""
        if node.op != "get_attr":
            return self._inputs.get(node, str(node.meta.get("size", node.name)))
        found = attribute(self._module, node)
        if isinstance(found, fx.GraphModule):
            return str(found.graph)
        stem = _stem(node)
        return state_name(node) if stem is None else f"{stem}{_digest(found)}"


class _Turns:
    """What operators must follow apart from those they read from.

    Of those that touch memory which is written to, and of the calls of a part that keeps something
    for its next call, the order in which they ran counts.
    """

    def __init__(self, memory: Memory, *, keeps: bool) -> None:
        self._memory = memory
        self._keeps = keeps
        self._lies_in: dict[fx.Node, frozenset[fx.Node]] = {}
        self._last_write: dict[object, int] = {}
        self._since: dict[object, list[int]] = {}

    def of(self, operators: list[fx.Node]) -> list[list[int]]:
        """For each operator the numbers of those it must follow."""
        return [self._turn(index, node) for index, node in enumerate(operators)]

    def _turn(self, index: int, node: fx.Node) -> list[int]:
        aliases, writes = self._memory.get(node, ([], []))
        written: set[object] = set(self._memories(writes))
        read: set[object] = set(self._memories(n for n in node.all_input_nodes if is_value(n)))
        what = operator_of(node)
        if self._keeps and what is not None and isinstance(what.target, Opaque):
            written.add(what.target.site)
        shared = self._memories(aliases)
        for output in outputs_of(node):
            self._lies_in[output] = shared or frozenset([output])
        after: set[int] = set()
        for place in written | read:
            if place in self._last_write:
                after.add(self._last_write[place])
            if place in written:
                after.update(self._since.pop(place, ()))
                self._last_write[place] = index
            else:
                self._since.setdefault(place, []).append(index)
        return sorted(after)

    def _memories(self, tensors: Iterable[fx.Node]) -> frozenset[fx.Node]:
        each = (self._lies_in.get(tensor, frozenset([tensor])) for tensor in tensors)
        return frozenset().union(*each)


def _item(output: fx.Node) -> int:
    """Which of its operator's results a value is."""
    return int(positional(output)[1]) if operator_of(output) is None else 0


def _place_constants(operators: list[fx.Node], registered: Container[str]) -> None:
    """Puts tensors that the model's code holds or makes in the order in which they are read.

    Those that it makes are numbered in this order.
    """
    read = dict.fromkeys(n for one in operators for n in one.all_input_nodes if n.op == "get_attr")
    constants = [n for n in read if is_value(n) and state_name(n) not in registered]
    made = [(node, stem) for node in constants if (stem := _stem(node))]
    numbers = itertools.count()
    for node, stem in made:
        free = (name for number in numbers if (name := f"{stem}{number}") not in registered)
        node.meta["state"] = next(free)
    for node in constants:
        operators[0].prepend(node)


def _stem(node: fx.Node) -> str | None:
    """What comes before the number in the name of a tensor that the model's code makes."""
    found = _NUMBERED.fullmatch(state_name(node))
    return None if found is None else found[1]


def _digest(tensor: torch.Tensor) -> str:
    """A text that is equal for equal tensors."""
    kind = f"{tensor.dtype}{list(tensor.shape)}{tensor.device}"
    if tensor.is_meta:
        return kind
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return f"{kind}{hashlib.sha256(data.numpy().tobytes()).hexdigest()}"
