"""Writes the captured graph in the form `rannc.graph/1`."""

from __future__ import annotations

import hashlib
import json
import re
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ._flat import (
    Operator,
    is_value,
    operator_of,
    outputs_of,
    positional,
    state_name,
    tensors_read,
)
from ._layout import NONE, WHOLE, Layout, Split, in_json
from ._opaque import Opaque
from ._rows import RowAnalysis, is_random
from ._sizes import affine
from ._snapshot import written_to
from .errors import CaptureError

if TYPE_CHECKING:
    from ._export import Program
    from ._measure import Measurements, OperatorFacts
    from ._strides import Order


class GraphFile:
    """The graph as plain data.

    Attributes:
        values: the values in the file's form.
        value_nodes: the values as nodes of the flat graph.
        orders: how each value lies in memory.
        node_by_key: operators by key.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        module: fx.GraphModule,
        inputs: list[fx.Node],
        input_names: list[str],
        analysis: RowAnalysis,
        facts: Measurements,
        program: Program,
    ) -> None:
        self.values: list[dict[str, Any]] = []
        self.value_nodes: list[fx.Node] = []
        self.orders: list[Order] = []
        self.node_by_key: dict[str, fx.Node] = {}
        self._name = type(model).__name__
        self._module = module
        self._analysis = analysis
        self._facts = facts
        self._program = program
        self._ids: dict[fx.Node, int] = {}
        self._used_names: set[str] = set()
        self._num_named: dict[str, int] = {}
        self._ordinals: dict[tuple[str, str], int] = {}
        self._nodes: list[dict[str, Any]] = []
        self._kinds = _kinds(model)
        self._views: dict[fx.Node, set[fx.Node]] = {}
        self._add_state()
        for node, given in zip(inputs, input_names, strict=True):
            self._add_value(node, "input", given)
        self._inputs = inputs
        self._given_back = {inputs[position] for position in program.arguments.written}
        for node in module.graph.nodes:
            what = operator_of(node)
            if what is not None:
                self._add_operator(node, what)
        self._outputs = list(positional(module.graph.output_node())[0])

    def json(self, rows: int) -> str:
        """The file's text for a batch that had `rows` rows."""
        batch: dict[str, Any] = {"rows": rows, "splittable": self._analysis.reason is None}
        if self._analysis.reason is not None:
            batch["reason"] = self._analysis.reason
        return json.dumps(
            {
                "format": "rannc.graph/1",
                "name": self._name,
                "batch": batch,
                "values": self.values,
                "nodes": self._nodes,
                "inputs": [self._ids[node] for node in self._inputs],
                "outputs": [self._ids[node] for node in self._outputs],
            }
        )

    def _add_state(self) -> None:
        for node in self._module.graph.nodes:
            if node.op == "get_attr" and is_value(node):
                name = state_name(node)
                self._add_value(node, self._kinds.get(name, "constant"), name)

    def _add_value(self, node: fx.Node, kind: str, name: str) -> None:
        unique, number = name, 1
        while unique in self._used_names:
            number += 1
            unique = f"{name}~{number}"
        self._used_names.add(unique)
        facts = self._facts.tensors[node]
        layout = self._layout(node)
        self._ids[node] = len(self.values)
        self.value_nodes.append(node)
        self.orders.append(facts.order)
        self.values.append(
            {
                "name": unique,
                "kind": kind,
                "dtype": facts.dtype,
                "shape": self._shape(node, layout),
                "rows": in_json(layout),
                "requires_grad": facts.requires_grad,
            }
        )

    def _numbered(self, node: fx.Node) -> str:
        """The exporter's name with a number that counts from the first in this graph."""
        stem = re.sub(r"(_\d+)+$", "", node.name)
        number = self._num_named.get(stem, 0)
        self._num_named[stem] = number + 1
        return f"{stem}_{number}" if number else stem

    def _layout(self, node: fx.Node) -> Layout:
        return self._analysis.layouts.get(node, NONE if node.op == "get_attr" else WHOLE)

    def _shape(self, node: fx.Node, layout: Layout) -> list[Any]:
        sizes = self._program.symbols.shape(node.meta["val"])
        shape: list[Any] = [affine(length, self._program.rows) for length in sizes]
        if isinstance(layout, Split) and isinstance(shape[layout.dim], int):
            # A program for one batch size: its rows are known, not marked.
            shape[layout.dim] = [shape[layout.dim] // self._program.rows, 0]
        return shape

    def _add_operator(self, node: fx.Node, what: Operator) -> None:
        for output in outputs_of(node):
            self._add_value(output, "activation", self._numbered(output))
        ordinal = self._ordinals.get((what.module, what.name), 0)
        self._ordinals[what.module, what.name] = ordinal + 1
        key = f"{what.module}/{what.name}#{ordinal}"
        self.node_by_key[key] = node
        facts = self._facts.operators[node]
        self._check_writes(node, facts)
        _check_generators(node, what)
        read = [self._ids[tensor] for tensor in tensors_read(node)]
        written = {
            "key": key,
            "op": what.name,
            "module": what.module,
            "inputs": read + self._batch_for_random(node, read),
            "outputs": [self._ids[output] for output in outputs_of(node)],
            "signature": self._signature(node, what),
            "flops": facts.flops,
            "saved_bytes": facts.saved_bytes,
        }
        if facts.writes:
            written["mutates"] = [self._ids[tensor] for tensor in facts.writes]
        if facts.aliases:
            written["aliases"] = [self._ids[tensor] for tensor in facts.aliases]
        self._nodes.append(written)

    def _check_writes(self, node: fx.Node, facts: OperatorFacts) -> None:
        """Refuses to write into what is no buffer, directly or through a view of it."""
        known = {c for tensor in facts.aliases for c in self._views.get(tensor, {tensor})}
        for output in outputs_of(node):
            self._views[output] = known
        for tensor in facts.writes:
            for viewed in {tensor, *self._views.get(tensor, ())}:
                index = self._ids[viewed]
                if self.values[index]["kind"] == "constant":
                    raise written_to(self.values[index]["name"])
                if viewed in self._inputs and viewed not in self._given_back:
                    raise CaptureError(
                        f"forward changes its argument `{self.values[index]['name']}` in place, in "
                        "a part that cannot be captured or where autograd does not see it",
                        hint="change a copy of it, and return that",
                    )

    def _batch_for_random(self, node: fx.Node, read: list[int]) -> list[int]:
        """Ties random numbers to the batch: copies of the operator would draw different ones."""
        depends = any(self.values[value]["kind"] in ("input", "activation") for value in read)
        if depends or not is_random(node):
            return []
        held = [self._ids[n] for n in self._inputs if self._layout(n) is not NONE]
        return held[:1]

    def _signature(self, node: fx.Node, what: Operator) -> str:
        """Equal for operators that cost the same: operator, argument types and plain arguments."""

        def described(argument: fx.Node) -> str:
            if "size" in argument.meta:
                return str(argument.meta["size"])
            if argument not in self._ids:
                return "number"
            value = self.values[self._ids[argument]]
            facts = self._facts.tensors[argument]
            order = "" if facts.contiguous else " strided"
            gradient = " grad" if value["requires_grad"] else ""
            return f"{value['dtype']}{json.dumps(value['shape'])}{order}{gradient}"

        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), described)
        scope = f" in {what.scope}" if what.scope is not None else ""
        plain = what.target.plain_arguments if isinstance(what.target, Opaque) else ""
        text = f"{what.name}{args!r}{kwargs!r}{plain}{scope}"
        if len(text) <= 200:
            return text
        return f"{what.name}:{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _check_generators(node: fx.Node, what: Operator) -> None:
    """Refuses to draw from a generator of the user's, which all parts would share."""
    if node.kwargs.get("generator") is not None:
        raise CaptureError(
            f"`{what.name}` in `{what.module or 'the model'}` draws from a generator of its own: a "
            "model that runs in parts draws in another order, and again when it recomputes",
            hint="leave `generator` out: every part has a stream of numbers of its own, derived "
            "from torch.manual_seed",
        )


def _kinds(model: torch.nn.Module) -> dict[str, str]:
    kinds = {name: "buffer" for name, _ in model.named_buffers(remove_duplicate=False)}
    for name, _ in model.named_parameters(remove_duplicate=False):
        kinds[name] = "parameter"
    return kinds
