"""Finds out how each value of the flat graph depends on the rows of the batch.

One pass in topological order. For each operator a rule (`_row_rules`) says where rows lie in its
results, given where they lie in its arguments, or that it computes across rows. A reduction over
the batch that is a sum, or becomes one when rewritten (`_losses`), gives a `SUM`; operators that
are linear in a sum keep it one. Whatever else looks across rows makes the model unsplittable, and
the first such operator is the reason.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ._flat import (
    Operator,
    attribute,
    is_value,
    operator_of,
    outputs_of,
    tensors_read,
    written_arguments,
)
from ._layout import NONE, SUM, WHOLE, Content, Layout, MixesRows, Split, fallback, placed
from ._opaque import Opaque
from ._row_rules import layouts_of
from ._sizes import Size, Symbols, depends_on_rows
from ._stated import Stated
from ._sums import layout_with_sums

if TYPE_CHECKING:
    from ._losses import Rewrite


@dataclass(slots=True)
class RowAnalysis:
    """What the analysis found.

    Attributes:
        layouts: the dependence of each value.
        rewrites: what to change so that every reduction over the batch is a plain sum.
        reason: why the model cannot be split, if it cannot.
        mixing: the submodules whose own operators compute across rows.
        culprits: these operators.
    """

    layouts: dict[fx.Node, Layout] = field(default_factory=dict)
    rewrites: list[Rewrite] = field(default_factory=list)
    reason: str | None = None
    mixing: set[str] = field(default_factory=set)
    culprits: list[fx.Node] = field(default_factory=list)

    @property
    def mixing_module(self) -> str | None:
        """The submodule whose operator is the reason."""
        what = operator_of(self.culprits[0]) if self.culprits else None
        return None if what is None else what.module


class Call:
    """One operator as its rule sees it.

    Attributes:
        node: the flat graph's node.
        operator: what it does.
        outputs: its results.
        arguments: its arguments by the names of its schema, defaults filled in; sizes are
            expressions.
        rewrites: what the rule wants changed.
        promoted: sums over the batch that are taken to be known before the step.
    """

    def __init__(self, node: fx.Node, what: Operator, analysis: _Analyser) -> None:
        self.node = node
        self.operator = what
        self.outputs = outputs_of(node)
        self.arguments = _bound(node, what)
        self.rewrites: list[Rewrite] = []
        self._analyser = analysis
        self.promoted: set[fx.Node] = set()

    def __getitem__(self, name: str) -> Any:
        return self.arguments.get(name)

    @property
    def tensors(self) -> list[fx.Node]:
        """The tensors it reads."""
        return tensors_read(self.node)

    @property
    def numbers_of_rows(self) -> list[Any]:
        """Numbers among its arguments that depend on the batch."""
        found: list[Any] = []
        for value in self.arguments.values():
            items = value if isinstance(value, (list, tuple)) else [value]
            found += [item for item in items if depends_on_rows(item)]
        return found

    def layout(self, tensor: Any) -> Layout:
        """The dependence of an argument; `NONE` for what is no tensor."""
        if not isinstance(tensor, fx.Node) or tensor in self.promoted:
            return NONE
        return self._analyser.found.layouts[tensor]

    def shape(self, tensor: fx.Node) -> tuple[Size, ...]:
        """The sizes of a tensor."""
        return self._analyser.symbols.shape(tensor.meta["val"])

    def promotable(self, tensor: fx.Node) -> bool:
        """Whether a sum over the batch can be known before the step, from the inputs alone."""
        return self._analyser.promotable(tensor)


class _Analyser:
    """The pass over the graph."""

    def __init__(
        self, module: fx.GraphModule, inputs: dict[fx.Node, Layout], symbols: Symbols
    ) -> None:
        self.found = RowAnalysis()
        self.symbols = symbols
        self._module = module
        self._written = _written_state(module.graph)
        self._known: dict[fx.Node, bool] = {}
        self.found.layouts.update(inputs)

    def run(self) -> RowAnalysis:
        """Visits every node."""
        for node in self._module.graph.nodes:
            if node.op == "get_attr" and is_value(node):
                self.found.layouts[node] = NONE
            what = operator_of(node)
            if what is not None:
                self._visit(node, what)
        if self.found.reason is not None:
            self.found.rewrites.clear()
            for node, layout in self.found.layouts.items():
                if layout is SUM:
                    self.found.layouts[node] = WHOLE
        return self.found

    def promotable(self, tensor: fx.Node) -> bool:
        """Whether a sum over the batch needs only inputs and buffers that never change."""
        rewrites = [rewrite for rewrite in self.found.rewrites if rewrite.node is tensor]
        if [(rewrite.kind, rewrite.power) for rewrite in rewrites] == [("share", 1)]:
            # A mean: known as well, when weighted by rows.
            return all(self._from_inputs(item) for item in tensor.all_input_nodes)
        return self._from_inputs(tensor)

    def _from_inputs(self, tensor: fx.Node) -> bool:
        if tensor not in self._known:
            self._known[tensor] = self._needs_inputs_only(tensor)
        return self._known[tensor]

    def _needs_inputs_only(self, tensor: fx.Node) -> bool:
        if tensor.op == "placeholder":
            return True
        if tensor.op == "get_attr":
            state = attribute(self._module, tensor)
            # Parameters may lie on other processes.
            is_parameter = isinstance(state, torch.nn.Parameter)
            return tensor not in self._written and not is_parameter
        if operator_of(tensor) is None:
            return all(self._from_inputs(item) for item in tensor.all_input_nodes)
        if any(tensor is rewrite.node for rewrite in self.found.rewrites):
            return False
        if is_random(tensor) or written_arguments(tensor):
            return False
        return all(self._from_inputs(item) for item in tensor.all_input_nodes if is_value(item))

    def _visit(self, node: fx.Node, what: Operator) -> None:
        call = Call(node, what, self)
        try:
            layouts = self._layouts(call)
            self._check_writes(call)
        except MixesRows as mixes:
            self.found.culprits.append(node)
            self._note(what, str(mixes))
            layouts = [fallback(call.shape(output)) for output in call.outputs]
        else:
            self.found.rewrites += call.rewrites
        self.found.layouts.update(zip(call.outputs, layouts, strict=True))

    def _layouts(self, call: Call) -> list[Layout]:
        given = [call.layout(tensor) for tensor in call.tensors]
        if isinstance(call.operator.target, Stated):
            return [SUM]
        if WHOLE in given:
            return [fallback(call.shape(output)) for output in call.outputs]
        if SUM in given:
            return layout_with_sums(call)
        return layouts_of(call)

    def _check_writes(self, call: Call) -> None:
        """Refuses to write something of the batch where the next batch would find it."""
        if call.operator.packet in ("aten.batch_norm", "aten.instance_norm"):
            return
        if isinstance(call.operator.target, Opaque):
            return  # the trial looked at what it writes, too
        given = [call.layout(tensor) for tensor in call.tensors]
        depends = any(layout is not NONE for layout in given)
        for target in written_arguments(call.node):
            layout = call.layout(target)
            if layout is NONE and depends:
                raise MixesRows("stores something of the batch in a tensor without rows")
            if isinstance(layout, Split) and layout.content is not Content.ROWS and depends:
                raise MixesRows("writes rows into a tensor whose rows are not known apart")

    def _note(self, what: Operator, action: str) -> None:
        self.found.mixing.add(what.module)
        if self.found.reason is None:
            place = f"`{what.module}`" if what.module else "the model's forward"
            self.found.reason = f"`{what.name}` in {place} {action}"


def analyse(module: fx.GraphModule, inputs: dict[fx.Node, Layout], symbols: Symbols) -> RowAnalysis:
    """The dependence of each value on the rows.

    Args:
        module: the flat graph.
        inputs: the dependence of the model's tensors.
        symbols: translates symbolic sizes.
    """
    return _Analyser(module, inputs, symbols).run()


def input_layout(shape: tuple[Size, ...]) -> Layout:
    """The dependence of an argument of the model: rows lie in its first dimension or nowhere."""
    return placed(shape, None) if shape and depends_on_rows(shape[0]) else NONE


def is_random(node: fx.Node) -> bool:
    """Whether an operator draws random numbers."""
    what = operator_of(node)
    if what is None or not isinstance(what.target, torch._ops.OpOverload):
        return False
    return torch.Tag.nondeterministic_seeded in what.target.tags


def _written_state(graph: fx.Graph) -> set[fx.Node]:
    return {target for node in graph.nodes for target in written_arguments(node)}


def _bound(node: fx.Node, what: Operator) -> dict[str, Any]:
    """Arguments by name; for functions without a schema by position."""

    def plain(argument: fx.Node) -> Any:
        return argument.meta.get("size", argument)

    def resolve(argument: Any) -> Any:
        if isinstance(argument, fx.Node):
            return plain(argument)
        if isinstance(argument, (list, tuple)):
            return [resolve(item) for item in argument]
        return argument

    named = {key: resolve(value) for key, value in node.kwargs.items()}
    if not isinstance(what.target, torch._ops.OpOverload):
        return {**{str(i): resolve(value) for i, value in enumerate(node.args)}, **named}
    for index, argument in enumerate(what.target._schema.arguments):
        if index < len(node.args):
            named[argument.name] = resolve(node.args[index])
        elif argument.name not in named:
            named[argument.name] = argument.default_value if argument.has_default_value() else None
    return named
