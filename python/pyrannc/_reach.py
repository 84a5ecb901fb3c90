"""Which parameters each output of a captured model depends on, as gradients flow.

On one device a parameter that the loss does not depend on has no gradient at all, and optimizers
leave it as it is, weight decay included. A gradient of zeros would be something else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ._flat import is_value, operator_of, outputs_of, state_name, tensors_read

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import fx

    from . import _core
    from .capture import Captured


def reach(captured: Captured, graph: _core.Graph) -> dict[int, frozenset[str]]:
    """By differentiable output the names of the parameters that get a gradient from it.

    What is written in place counts for all that shares memory with it.
    """
    numbers = {node: number for number, node in enumerate(captured.value_nodes)}
    values = graph.values

    def flows(node: fx.Node) -> bool:
        return node in numbers and values[numbers[node]].requires_grad

    memory = _Memory()
    for node in captured.module.graph.nodes:
        if node.op == "get_attr" and is_value(node) and flows(node):
            name = state_name(node)
            if isinstance(captured.state[name], torch.nn.Parameter):
                memory.add(node, {name})
        if operator_of(node) is None:
            continue
        read = tensors_read(node)
        found = set[str]().union(*(memory[tensor] for tensor in read if flows(tensor)))
        outputs = outputs_of(node)
        for shared in node.meta.get("aliases", ()):
            for output in outputs:
                memory.join(output, shared)
        for node_with_it in [*node.meta.get("writes", ()), *filter(flows, outputs)]:
            memory.add(node_with_it, found)
    outputs = [captured.value_nodes[value] for value in graph.outputs]
    return {
        value: frozenset(memory[node])
        for value, node in zip(graph.outputs, outputs, strict=True)
        if flows(node)
    }


def differ(reached: Mapping[int, frozenset[str]]) -> bool:
    """Whether it matters from which outputs gradients come."""
    return len(set(reached.values())) > 1


class _Memory:
    """Names of parameters, by the memory that depends on them."""

    def __init__(self) -> None:
        self._first: dict[fx.Node, fx.Node] = {}
        self._names: dict[fx.Node, set[str]] = {}

    def __getitem__(self, node: fx.Node) -> set[str]:
        return self._names.get(self._root(node), set())

    def add(self, node: fx.Node, names: set[str]) -> None:
        self._names.setdefault(self._root(node), set()).update(names)

    def join(self, node: fx.Node, other: fx.Node) -> None:
        """From now on both are in the same memory."""
        root, kept = self._root(node), self._root(other)
        if root is not kept:
            self._first[root] = kept
            self._names.setdefault(kept, set()).update(self._names.pop(root, set()))

    def _root(self, node: fx.Node) -> fx.Node:
        while node in self._first:
            node = self._first[node]
        return node
