"""The exported program as one flat graph of tensor operators.

`torch.export` gives a graph with regions (`no_grad`, `autocast`) as nested graphs, size arithmetic
between the operators, and assertions. Here all of that goes: regions are inlined and each operator
in one carries its `Scope`; sizes become expressions of `rows` (see `_sizes`); assertions,
operators that do nothing and operators whose result nobody reads are dropped.

The flat graph has as placeholders the model's tensors, `rows` (how many rows this call has),
`row_share` (the part of the whole batch which that is) and the numbers that are inputs.
"""

from __future__ import annotations

import contextlib
import itertools
import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import fx
from torch.utils import _pytree as pytree

from ._numbers import PinnedError
from ._opaque import NAMESPACE, Opaque
from ._program_place import called_at
from ._sizes import evaluated, expression_text, is_variable, size
from .errors import CaptureError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ._export import Program

aten = torch.ops.aten

CALLED_AT = "called_at"
"""Where in the `meta` of an operator's node its place in the program is."""

_GRAD_REGION = "wrap_with_set_grad_enabled"
_AUTOCAST_REGION = "wrap_with_autocast"
_ASSERTIONS = ("assert", "sym_constrain_range", "_check")


@dataclass(frozen=True, slots=True)
class Scope:
    """The regions around an operator.

    Attributes:
        grad: whether gradients are recorded; `None` as the caller has it.
        autocast: arguments of `torch.autocast` for each device type that a region sets.
    """

    grad: bool | None = None
    autocast: tuple[tuple[str, torch.dtype | None, bool], ...] = ()

    def enter_grad(self, enabled: bool) -> Scope:  # noqa: FBT001
        """The scope inside a `set_grad_enabled` region.

        Gradients are on while a model is captured, so turning them on is going back to what the
        caller has.
        """
        return Scope(None if enabled else False, self.autocast)

    def enter_autocast(self, device: str, dtype: torch.dtype | None, enabled: bool) -> Scope:  # noqa: FBT001
        """The scope inside an `autocast` region."""
        others = tuple(entry for entry in self.autocast if entry[0] != device)
        return Scope(self.grad, (*others, (device, dtype, enabled)))

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Runs the body inside the regions."""
        with contextlib.ExitStack() as stack:
            if self.grad is not None:
                stack.enter_context(torch.set_grad_enabled(self.grad))
            for device, dtype, enabled in self.autocast:
                stack.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled))
            yield


class Scoped(torch.nn.Module):
    """An operator called inside its regions."""

    def __init__(self, target: Callable[..., Any], scope: Scope) -> None:
        super().__init__()
        self.target = target
        self.scope = scope

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the operator."""
        with self.scope.entered():
            return self.target(*args, **kwargs)


@dataclass(frozen=True, slots=True)
class Operator:
    """What a node of the flat graph does; in its `meta["operator"]`.

    Attributes:
        target: the function, without its scope.
        module: qualified name of the module whose forward called it.
        scope: the regions around it, if any.
    """

    target: Callable[..., Any]
    module: str
    scope: Scope | None = None

    @property
    def name(self) -> str:
        """The operator as torch spells it."""
        if isinstance(self.target, torch._ops.OpOverload):
            return str(self.target)
        if isinstance(self.target, Opaque):
            return f"opaque.{self.target.site.name}"
        return str(getattr(self.target, "__name__", type(self.target).__name__))

    @property
    def packet(self) -> str:
        """The name without overload and in-place mark: `aten.add`."""
        if isinstance(self.target, torch._ops.OpOverload):
            namespace, _, name = self.target.name().partition("::")
            return f"{namespace}.{name.split('.')[0].removesuffix('_')}"
        return self.name


def operator_of(node: fx.Node) -> Operator | None:
    """The operator of a node; `None` for placeholders, state, sizes and `getitem`s."""
    return node.meta.get("operator")


def is_value(node: fx.Node) -> bool:
    """Whether a node stands for one tensor."""
    return isinstance(node.meta.get("val"), torch.Tensor)


def outputs_of(node: fx.Node) -> list[fx.Node]:
    """The tensors that an operator makes, as nodes."""
    if is_value(node):
        return [node]
    return [user for user in node.users if user.target is operator.getitem]


def state_name(node: fx.Node) -> str:
    """The user's name of the parameter, buffer or constant that a `get_attr` node reads.

    The graph's own attributes have names that no user chose: any name is legal for a parameter,
    also one of Python's words or of an attribute that every graph module has.
    """
    return str(node.meta["state"])


def attribute(module: fx.GraphModule, node: fx.Node) -> Any:
    """What a `get_attr` or `call_module` node refers to."""
    return getattr(module, str(node.target))


def positional(node: fx.Node) -> list[Any]:
    """A node's positional arguments, of whatever types they are."""
    return list(node.args)


def tensors_read(node: fx.Node) -> list[fx.Node]:
    """The tensors that an operator reads, in argument order, each once."""
    return [argument for argument in node.all_input_nodes if is_value(argument)]


def written_arguments(node: fx.Node) -> list[fx.Node]:
    """The tensors among an operator's arguments that it writes to."""
    found, args = operator_of(node), positional(node)
    if found is not None and isinstance(found.target, Opaque):
        given = [*args[0], *args[1]]
        return [given[position] for position in found.target.written]
    if found is None or not isinstance(found.target, torch._ops.OpOverload):
        return []
    written: list[fx.Node] = []
    schema = found.target._schema
    for index, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            passed = args[index] if index < len(args) else node.kwargs.get(argument.name)
            fx.map_arg(passed, written.append)
    # Their schemas do not tell that they keep running statistics.
    if found.packet in ("aten.batch_norm", "aten.instance_norm") and args[5]:
        written += [args[i] for i in (3, 4) if isinstance(args[i], fx.Node)]
    return written


class Flattener:
    """Copies an exported module into a flat graph.

    Attributes:
        graph: the flat graph.
        attributes: what its `get_attr` and `call_module` nodes refer to.
        inputs: its placeholders for the model's tensors.
        rows: its placeholder for the number of rows.
        row_share: its placeholder for the share of the batch.
        numbers: its placeholders for numbers.
        example_rows: the number of rows it was exported with.
        stood_in: what stands for numbers in the program, as far as that was found.
    """

    def __init__(
        self,
        program: Program,
        prefix: str,
        state_names: dict[int, str],
    ) -> None:
        exported = program.module
        self.graph = fx.Graph()
        self._state_names = state_names
        self._copied: dict[int, fx.Node] = {}
        self.attributes: dict[str, Any] = {}
        self.inputs: list[fx.Node] = []
        self._symbols = program.symbols
        self._prefix = prefix
        self._state = program.state
        self._opaque_calls = program.opaque_calls
        self._sizes: dict[str, fx.Node] = {}
        for node in exported.graph.nodes:
            if node.op == "placeholder":
                copied = self.graph.placeholder(node.name)
                copied.meta["val"] = node.meta["val"]
                self.inputs.append(copied)
        self.rows = self.graph.placeholder("rows")
        self.row_share = self.graph.placeholder("row_share")
        self.numbers = {name: self.graph.placeholder(name) for name in program.names}
        self._names = {"rows": program.rows, **program.names}
        for name, node in self.numbers.items():
            node.meta["hint"] = program.names[name]
        self.example_rows = program.rows
        self._stand_ins = program.stand_ins
        self.stood_in: set[float] = set()
        arguments = dict(zip(_placeholders(exported), self.inputs, strict=True))
        results = self._inline(exported, dict(arguments), Scope())
        self.graph.output(tuple(results))
        drop_unread(self.graph)

    def is_lifted(self, name: str) -> bool:
        """Whether a tensor is neither parameter nor buffer: made in the model's code."""
        found = self.attributes[name]
        return isinstance(found, torch.Tensor) and id(found) not in self._state_names

    def module(self, name: str) -> fx.GraphModule:
        """The flat graph as a module."""
        return fx.GraphModule(self.attributes, self.graph, name)

    def _inline(self, source: fx.GraphModule, known: dict[fx.Node, Any], scope: Scope) -> list[Any]:
        outside: dict[fx.Node, Scope] = {}
        for node in source.graph.nodes:
            name, args = getattr(node.target, "__name__", ""), positional(node)
            if node.op == "get_attr":
                known[node] = self._attribute(source, str(node.target), node)
            elif name == "_set_grad_enabled":
                scope = scope.enter_grad(bool(args[0]))
            elif name == "_enter_autocast":
                outside[node] = scope
                scope = scope.enter_autocast(*args[:3])
            elif name == "_exit_autocast":
                scope = Scope(scope.grad, outside[args[0]].autocast)
            elif node.op == "call_function":
                self._call(node, known, scope)
            elif node.op == "output":
                results = args[0] if isinstance(args[0], (tuple, list)) else args
                return [self._argument(result, known) for result in results]
        return []

    def _call(self, node: fx.Node, known: dict[fx.Node, Any], scope: Scope) -> None:
        name, args = getattr(node.target, "__name__", ""), positional(node)
        if name in (_GRAD_REGION, _AUTOCAST_REGION):
            num_settings = 1 if name == _GRAD_REGION else 4
            settings, region = args[:num_settings], known[args[num_settings]]
            passed = [self._argument(item, known) for item in args[num_settings + 1 :]]
            inner = (
                scope.enter_grad(settings[0])
                if name == _GRAD_REGION
                else scope.enter_autocast(*settings[:3])
            )
            inside = dict(zip(_placeholders(region), passed, strict=True))
            known[node] = tuple(self._inline(region, inside, inner))
            return
        value = node.meta.get("val")
        if _is_number(value):
            known[node] = self._symbols.expression(value)
        elif node.target is operator.getitem and isinstance(known[args[0]], (tuple, list)):
            known[node] = known[args[0]][args[1]]
        elif value is None and any(mark in str(node.target) for mark in _ASSERTIONS):
            known[node] = None
        else:
            known[node] = self._operator(node, known, scope)

    def _operator(self, node: fx.Node, known: dict[fx.Node, Any], scope: Scope) -> fx.Node:
        self._check_sizes(node)
        args = tuple(self._argument(item, known) for item in node.args)
        kwargs = {key: self._argument(item, known) for key, item in node.kwargs.items()}
        if node.target is operator.getitem:
            copied = self.graph.call_function(operator.getitem, args)
            copied.meta["val"] = node.meta["val"]
            return copied
        same = self._simplified(node, args)
        if isinstance(same, fx.Node):
            return same
        if same is not None:
            args = same
        target: Any = aten.squeeze.dims if same is not None else node.target
        if isinstance(target, torch._ops.OpOverload) and target.namespace == NAMESPACE:
            target = self._opaque_calls[target._schema.name.partition("::")[2]]
        copied = self.add_operator(
            Operator(target, module_path(node, self._prefix), scope if scope != Scope() else None),
            args,
            kwargs,
            node.meta.get("val"),
            name=node.name,
        )
        copied.meta[CALLED_AT] = called_at(node)
        return copied

    def _check_sizes(self, node: fx.Node) -> None:
        """Refuses numbers for which the exporter had something else, where sizes come from them."""
        if self._stand_ins and "upsample" in str(node.target):
            found = [item for item in pytree.tree_leaves(node.args) if isinstance(item, float)]
            for expression in map(self._stand_ins.get, found):
                if expression is not None:
                    raise PinnedError(symbol.name for symbol in expression.free_symbols)

    def add_operator(
        self,
        what: Operator,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        value: Any,
        name: str | None = None,
    ) -> fx.Node:
        """Adds an operator at the graph's insertion point."""
        if what.scope is None and not isinstance(what.target, torch.nn.Module):
            node = self.graph.create_node("call_function", what.target, args, kwargs, name)
        else:
            module = what.target if what.scope is None else Scoped(what.target, what.scope)
            attribute = f"_call_{len(self.attributes)}"
            self.attributes[attribute] = module
            node = self.graph.create_node("call_module", attribute, args, kwargs, name)
        node.meta["val"] = value
        node.meta["operator"] = what
        return node

    def _simplified(self, node: fx.Node, args: tuple[Any, ...]) -> fx.Node | tuple[Any, ...] | None:
        """The argument itself if an operator does nothing; other arguments for a `squeeze`.

        With one row a `squeeze` must not remove the dimension of the rows.
        """
        if not args or not isinstance(args[0], fx.Node) or not is_value(args[0]):
            return None
        sizes = self._symbols.shape(args[0].meta["val"])
        if node.target is aten.slice.Tensor:
            given = [*args[1:], *[0, None, None, 1][len(args) - 1 :]]
            dim, start, stop, step = given
            ends = stop is None or (isinstance(stop, int) and stop >= 2**31) or stop == sizes[dim]
            return args[0] if start in (None, 0) and ends and step == 1 else None
        if node.target is aten.squeeze.default:
            return args[0], [dim for dim, length in enumerate(sizes) if length == 1]
        if node.target in (aten.squeeze.dim, aten.squeeze.dims):
            dims = [args[1]] if isinstance(args[1], int) else args[1]
            dims = [dim % len(sizes) for dim in dims] if sizes else []
            return args[0], [dim for dim in dims if sizes[dim] == 1]
        return None

    def _argument(self, argument: Any, known: dict[fx.Node, Any]) -> Any:
        """An argument with the flat graph's nodes in it."""

        def resolve(node: Any) -> Any:
            if isinstance(node, float) and node in self._stand_ins:
                self.stood_in.add(node)
                return self.size(self._stand_ins[node])
            if not isinstance(node, fx.Node):
                return node
            found = known[node]
            if is_variable(found):
                return self.size(found)
            if isinstance(found, sympy.Basic):
                return float(found)
            if isinstance(found, fx.GraphModule):
                return self._submodule(found)
            return found

        return fx.node.map_aggregate(argument, resolve)

    def size(self, expression: sympy.Expr) -> fx.Node:
        """The node that computes a size or number."""
        names = sorted(symbol.name for symbol in expression.free_symbols)
        if not self._names.keys() >= {*names}:
            message = f"a size is `{expression}`, which depends on what the tensors hold"
            raise CaptureError(message)
        text = expression_text(expression)
        if text not in self._sizes:
            numbers: Any = {name: self.numbers[name] for name in names if name != "rows"}
            with self.graph.inserting_after([self.row_share, *self.numbers.values()][-1]):
                node = self.graph.call_function(size, (self.rows, text), numbers)
            node.meta["size"] = expression
            node.meta["hint"] = evaluated(text, self._names)
            self._sizes[text] = node
        return self._sizes[text]

    def _attribute(self, source: fx.GraphModule, target: str, node: fx.Node) -> Any:
        found: Any = self._state.get(target, source)
        if found is source:
            for part in target.split("."):
                found = getattr(found, part)
        if isinstance(found, fx.GraphModule):
            return found
        # A tensor that the model has under several names is one.
        if id(found) not in self._copied:
            name = self._state_names.get(id(found)) or self._constant_name(target)
            attribute = f"_state_{len(self.attributes)}"
            self.attributes[attribute] = found
            copied = self.graph.get_attr(attribute)
            copied.meta.update(val=node.meta["val"], state=name)
            self._copied[id(found)] = copied
        return self._copied[id(found)]

    def _constant_name(self, target: str) -> str:
        """A name for what is no parameter or buffer, unlike that of any."""
        name = unique = target.removeprefix(self._prefix)
        taken = {*self._state_names.values(), *map(state_name, self._copied.values())}
        for number in itertools.count(2):
            if unique not in taken:
                break
            unique = f"{name}~{number}"
        return unique

    def _submodule(self, module: fx.GraphModule) -> fx.Node:
        attribute = f"_graph_{len(self.attributes)}"
        self.attributes[attribute] = module
        return self.graph.get_attr(attribute)


def module_path(node: fx.Node, prefix: str) -> str:
    """Qualified name of the submodule that called an operator of the exported graph."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = str(stack[-1][0]) if stack else ""
    if path.startswith("_empty_nn_module_stack"):
        return ""
    return path.removeprefix(prefix.removesuffix(".")).removeprefix(".")


def drop_unread(graph: fx.Graph) -> None:
    """Removes operators whose results nobody reads and that write to nothing."""
    for node in reversed(list(graph.nodes)):
        if node.op in ("placeholder", "output") or node.users or written_arguments(node):
            continue
        graph.erase_node(node)


def _placeholders(module: fx.GraphModule) -> list[fx.Node]:
    return [node for node in module.graph.nodes if node.op == "placeholder"]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool))
