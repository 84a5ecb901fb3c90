"""Cuts a part out of the flat graph as a module of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import fx

from ._flat import is_value, operator_of, written_arguments
from .errors import CaptureError

if TYPE_CHECKING:
    from collections.abc import Iterable

EXTRAS = ("rows", "row_share")


@dataclass(frozen=True, slots=True)
class Part:
    """A part of the flat graph.

    Attributes:
        module: computes the wanted values from the inputs and the extras, in that order.
        extras: names of the further arguments: `rows`, `row_share`, `denominator_0`...
        state: qualified names of the parameters, buffers and constants it reads.
        denominator_dtypes: types of the denominators among the extras.
    """

    module: fx.GraphModule
    extras: list[str]
    state: list[str]
    denominator_dtypes: dict[str, torch.dtype]


def cut(
    source: fx.GraphModule,
    inputs: list[fx.Node],
    wanted: list[fx.Node],
    *,
    only: set[fx.Node] | None = None,
    name: str = "Part",
    always: tuple[str, ...] = (),
) -> Part:
    """The part of a graph that computes `wanted` from `inputs`.

    Args:
        source: the flat graph.
        inputs: values that are given; each becomes an argument.
        wanted: values that are returned.
        only: the operators of the part, including those that only write; by default all that
            `wanted` needs.
        name: class name of the module.
        always: extras that are arguments even when nobody needs them.
    """
    needed = _needed(source.graph, inputs, wanted, only)
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in inputs:
        copies[node] = graph.placeholder(node.name)
        copies[node].meta = dict(node.meta)
    placeholders = [n for n in source.graph.nodes if n.op == "placeholder" and n not in copies]
    extras = [node for node in placeholders if node in needed or node.name in always]
    for node in extras:
        copies[node] = graph.placeholder(node.name)
    for node in _written_inputs(inputs, needed):
        copies[node] = graph.call_function(torch.ops.aten.clone.default, (copies[node],))
    attributes = {}
    for node in needed:
        if node in copies:
            continue
        if node.op == "placeholder":
            message = f"a part of the model needs its input `{node.name}`, which it is not given"
            raise CaptureError(message)
        copies[node] = graph.node_copy(node, copies.__getitem__)
        if node.op in ("get_attr", "call_module"):
            target = str(node.target)
            attributes[target] = _attribute(source, target)
    graph.output(tuple(copies[node] for node in wanted))
    state = [str(node.target) for node in needed if node.op == "get_attr" and is_value(node)]
    module = fx.GraphModule(attributes, graph, name)
    dtypes = {node.name: node.meta["example"].dtype for node in extras if "example" in node.meta}
    return Part(module, [node.name for node in extras], state, dtypes)


def _needed(
    graph: fx.Graph, inputs: list[fx.Node], wanted: list[fx.Node], only: set[fx.Node] | None
) -> dict[fx.Node, None]:
    """All nodes of the part, in the graph's order."""
    given = set(inputs)
    needed: set[fx.Node] = set()
    stack = [*wanted, *(only or ())]
    while stack:
        node = stack.pop()
        if node in needed or node in given:
            continue
        if only is not None and operator_of(node) is not None and node not in only:
            message = f"a part of the model needs `{node.name}`, which it neither has nor is given"
            raise CaptureError(message)
        needed.add(node)
        stack.extend(node.all_input_nodes)
    return {node: None for node in graph.nodes if node in needed}


def _written_inputs(inputs: list[fx.Node], needed: Iterable[fx.Node]) -> list[fx.Node]:
    """The inputs that the part writes to, itself or through views."""
    origin: dict[fx.Node, set[fx.Node]] = {node: {node} for node in inputs}
    written: set[fx.Node] = set()
    for node in needed:
        if operator_of(node) is None:
            if node.all_input_nodes and node.op == "call_function":
                origin[node] = set().union(*(origin.get(n, set()) for n in node.all_input_nodes))
            continue
        for target in node.meta.get("writes", written_arguments(node)):
            written |= origin.get(target, set())
        shared = node.meta.get("aliases", node.all_input_nodes)
        origin[node] = set().union(*(origin.get(item, set()) for item in shared))
    return [node for node in inputs if node in written]


def _attribute(module: torch.nn.Module, path: str) -> object:
    found: object = module
    for part in path.split("."):
        found = getattr(found, part)
    return found
