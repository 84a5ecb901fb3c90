"""Cuts a part out of the flat graph as a module of its own."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.utils.checkpoint import checkpoint

from ._autocast import no_weight_cache
from ._flat import (
    attribute,
    is_value,
    operator_of,
    outputs_of,
    state_name,
    written_arguments,
)
from .batch_norm import companions_of, norms_of, recomputing
from .errors import CaptureError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

EXTRAS = ("rows", "row_share")


@dataclass(frozen=True, slots=True)
class Part:
    """A part of the flat graph.

    Attributes:
        module: computes the wanted values from the inputs and the extras, in that order.
        extras: names of the further arguments: `rows`, `row_share`, `denominator_0`...
        state: qualified names of the parameters, buffers and constants it reads.
        denominator_dtypes: types of the denominators among the extras.
        written: qualified names of the buffers that it writes to: it is given copies of these, as
            its last arguments.
    """

    module: fx.GraphModule
    extras: list[str]
    state: list[str]
    denominator_dtypes: dict[str, torch.dtype]
    written: list[str]


def cut(
    source: fx.GraphModule,
    inputs: list[fx.Node],
    wanted: list[fx.Node],
    *,
    only: Sequence[fx.Node] | None = None,
    recompute: Sequence[Sequence[fx.Node]] = (),
    name: str = "Part",
    always: tuple[str, ...] = (),
) -> Part:
    """The part of a graph that computes `wanted` from `inputs`.

    Args:
        source: the flat graph.
        inputs: values that are given; each becomes an argument.
        wanted: values that are returned.
        only: the operators of the part in the order in which they run, including those that only
            write; by default all that `wanted` needs.
        recompute: operators of `only`, each group together there, whose inner values are not kept
            for the backward but computed again in it.
        name: class name of the module.
        always: extras that are arguments even when nobody needs them.
    """
    needed = _needed(source.graph, inputs, wanted, only)
    copier = _Copier(source)
    for node in inputs:
        copier.argument(node)
    placeholders = [n for n in source.graph.nodes if n.op == "placeholder" and n not in inputs]
    extras = [node for node in placeholders if node in needed or node.name in always]
    for node in extras:
        copier.argument(node)
    attributes = [node for node in needed if node.op == "get_attr" and is_value(node)]
    buffers = [node for node in attributes if not _is_parameter(source, node)]
    written = _written_inputs(buffers, needed)
    for node in written:
        copier.argument(node)
    for node in _written_inputs(inputs, needed):
        copier.clone(node)
    for part in recompute:
        copier.announce(part, wanted)
    for node in [*(needed if only is None else only), *wanted]:
        copier.copy(node)
    module = copier.module(wanted, name)
    state, names = [[state_name(node) for node in nodes] for nodes in (attributes, written)]
    dtypes = {node.name: node.meta["example"].dtype for node in extras if "example" in node.meta}
    return Part(module, [node.name for node in extras], state, dtypes, names)


class _Copier:
    """Copies nodes of a flat graph into a graph of their own."""

    def __init__(self, source: fx.GraphModule) -> None:
        self._source = source
        self._graph = fx.Graph()
        self._copies: dict[fx.Node, fx.Node] = {}
        self._attributes: dict[str, object] = {}
        self._groups: dict[fx.Node, _Group] = {}

    def argument(self, node: fx.Node) -> None:
        """Makes a node an argument."""
        copy = self._graph.placeholder(node.name)
        copy.meta = dict(node.meta)
        self._copies[node] = copy

    def clone(self, node: fx.Node) -> None:
        """Has what follows use a copy of an argument's memory."""
        copied = self._graph.call_function(torch.ops.aten.clone.default, (self._copies[node],))
        self._copies[node] = copied

    def announce(self, members: Sequence[fx.Node], wanted: Iterable[fx.Node]) -> None:
        """Has these operators become one call whose values are computed again in backward."""
        group = _Group.of(members, set(wanted), given=set(self._copies))
        self._groups.update(dict.fromkeys(group.members, group))

    def copy(self, node: fx.Node) -> None:
        """Copies a node, after those that it needs and that are not operators."""
        if node in self._copies:
            return
        if node.op == "placeholder":
            message = f"a part of the model needs its input `{node.name}`, which it is not given"
            raise CaptureError(message)
        group = self._groups.get(node)
        for needed in node.all_input_nodes if group is None else group.inputs:
            self.copy(needed)
        if group is not None:
            self._copy_group(group)
            return
        self._copies[node] = self._graph.node_copy(node, self._copies.__getitem__)
        if node.op in ("get_attr", "call_module"):
            self._attributes[str(node.target)] = attribute(self._source, node)

    def _copy_group(self, group: _Group) -> None:
        inner = _Copier(self._source)
        for node in group.inputs:
            inner.argument(node)
        for node in group.members:
            inner.copy(node)
        target = f"recompute_{len(self._attributes)}"
        written = _written_inputs(group.inputs, group.members)
        places = [group.inputs.index(node) for node in written]
        self._attributes[target] = Recomputed(inner.module(group.outputs, "Recomputed"), places)
        arguments = tuple(self._copies[node] for node in group.inputs)
        results = self._graph.call_module(target, arguments)
        for index, node in enumerate(group.outputs):
            self._copies[node] = self._graph.call_function(operator.getitem, (results, index))
        # What stays inside counts as copied, too: nothing outside reads it.
        self._copies.update({n: results for n in group.members if n not in self._copies})

    def module(self, results: list[fx.Node], name: str) -> fx.GraphModule:
        """The copies as a function that returns `results`."""
        self._graph.output(tuple(self._copies[node] for node in results))
        return fx.GraphModule(self._attributes, self._graph, name)


@dataclass(frozen=True, slots=True)
class _Group:
    """Operators that become one call.

    Attributes:
        members: the operators and the items of their results, in the order in which they run.
        inputs: what they read from others: values and sizes.
        outputs: what others read from them.
    """

    members: list[fx.Node]
    inputs: list[fx.Node]
    outputs: list[fx.Node]

    @classmethod
    def of(cls, operators: Sequence[fx.Node], wanted: set[fx.Node], given: set[fx.Node]) -> _Group:
        members: dict[fx.Node, None] = {}
        for node in operators:
            members[node] = None
            if not is_value(node):
                members.update(dict.fromkeys(outputs_of(node)))
        read = dict.fromkeys(node for member in members for node in member.all_input_nodes)
        outside = [node for node in read if node not in members]
        inputs = [node for node in outside if node.op != "get_attr" or node in given]
        outputs = [
            node
            for node in members
            if node in wanted or (is_value(node) and any(u not in members for u in node.users))
        ]
        return cls(list(members), inputs, outputs)


class Recomputed(torch.nn.Module):
    """Operators whose inner values are computed again in backward, with the same random numbers.

    What they write to, they write to once: computing again starts from copies of what was there.
    """

    def __init__(self, inner: fx.GraphModule, written: Sequence[int]) -> None:
        super().__init__()
        self.inner = inner
        self._written = written
        self._norms = norms_of(inner)

    def forward(self, *args: Any) -> Any:
        """Runs the operators."""
        if not torch.is_grad_enabled():
            return self.inner(*args)
        # `checkpoint` keeps what it is given and refuses it when somebody wrote to it since.
        read = [arg for place, arg in enumerate(args) if place not in self._written]
        targets = _Targets([args[place] for place in self._written])
        companions = companions_of(self._norms)

        def run(*read: Any) -> Any:
            given, again = targets.take()
            merged = list(read)
            for place, target in zip(self._written, given, strict=True):
                merged.insert(place, target)
            if not again:
                return self.inner(*merged)
            with recomputing(self._norms, companions):
                return self.inner(*merged)

        with no_weight_cache():
            return checkpoint(run, *read, use_reentrant=False)


class _Targets:
    """What operators write to: the memory itself once, then copies of what it had held."""

    def __init__(self, targets: list[torch.Tensor]) -> None:
        self._before = [
            target.detach().clone().requires_grad_(target.requires_grad) for target in targets
        ]
        self._first: list[torch.Tensor] | None = targets

    def take(self) -> tuple[list[torch.Tensor], bool]:
        """What to write to now, and whether that was written to before."""
        first, self._first = self._first, None
        if first is not None:
            return first, False
        return [before.clone() for before in self._before], True


def _needed(
    graph: fx.Graph, inputs: list[fx.Node], wanted: list[fx.Node], only: Sequence[fx.Node] | None
) -> dict[fx.Node, None]:
    """All nodes of the part, in the graph's order."""
    given, allowed = set(inputs), set(only or ())
    needed: set[fx.Node] = set()
    stack = [*wanted, *(only or ())]
    while stack:
        node = stack.pop()
        if node in needed or node in given:
            continue
        if only is not None and operator_of(node) is not None and node not in allowed:
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


def _is_parameter(source: fx.GraphModule, node: fx.Node) -> bool:
    return isinstance(attribute(source, node), torch.nn.Parameter)
