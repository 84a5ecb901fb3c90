"""Captures a model: its forward becomes a graph of operators, and the graph becomes JSON.

The road: take the arguments apart (`_structure`), export the program (`_export`), flatten it
(`_flat`), find how each value depends on the rows of the batch (`_rows`), rewrite reductions over
the batch into sums (`_losses`), run it without data to see what autograd keeps (`_measure`), and
write the graph file (`_graph_file`).
"""

from __future__ import annotations

import gc
import hashlib
import inspect
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from ._arguments import check_apart
from ._devices import move_operators
from ._export import Program, export, row_dims_by_size
from ._flat import Flattener, attribute, is_value, operator_of, outputs_of, state_name
from ._graph_file import GraphFile
from ._layout import NONE, WHOLE, Layout, Split
from ._lazy import compiled_when_called
from ._losses import Denominator, Rewriter
from ._measure import OneBatchSizeError, measure, memory
from ._opaque import Opaque
from ._order import put_in_order
from ._outer import outer_roots
from ._places import revealed, revealed_outside
from ._promoted import promoted
from ._rows import RowAnalysis, analyse, is_random
from ._side_effects import Left
from ._sizes import ROWS, evaluated, number_name
from ._stated import state
from ._structure import Structure, flatten
from .errors import CaptureError
from .streams import draws, share

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

    from torch import fx

    from ._arguments import ArgumentChanges
    from ._numbers import Number
    from ._obstacles import Obstacle
    from ._places import Place
    from ._strides import Order
    from ._structure import Path


_EXPORTED_NAME = "model."


@dataclass(frozen=True)
class Captured:
    """A captured model.

    Attributes:
        graph_json: the graph, in the form `rannc.graph/1`.
        module: the flat graph, with the user's own parameters and buffers.
        node_by_key: operators by their keys in the graph.
        value_names: names of the values, by id.
        value_nodes: the values as nodes of `module`, by id.
        orders: how the values lie in memory, by id.
        state: parameters, buffers and constants by qualified name.
        denominators: what each process computes from its inputs before a step; the sums over
            all processes are the stages' denominators.
        static_rows: the only number of rows the capture is valid for; `None` for any.
        batch_inputs: positions of the tensors, among the graph's inputs, that hold rows, and in
            which dimension.
        left: what a call leaves in attributes of modules.
        read: places in the user's objects that its forward has read.
        obstacles: what stopped the exporter in the parts that are called as they are.
        mixing_module: the submodule that keeps the batch from being split, if it is known.
        numbers: the numbers that it is given, in the order of their names in expressions, and
            what they were.
        guards: expressions of the numbers that are true where it is valid.
    """

    graph_json: str
    module: fx.GraphModule
    node_by_key: dict[str, fx.Node]
    value_names: list[str]
    value_nodes: list[fx.Node]
    orders: list[Order]
    state: dict[str, torch.Tensor]
    denominators: list[Denominator]
    static_rows: int | None
    batch_inputs: dict[int, int]
    left: Left
    read: frozenset[Place]
    obstacles: list[Obstacle]
    mixing_module: str | None
    numbers: Mapping[Number, float]
    guards: tuple[str, ...]
    _arguments: Structure = field(repr=False)
    _description: str = field(repr=False)
    _results: Structure = field(repr=False)
    _changes: ArgumentChanges = field(repr=False)
    _constants: frozenset[str] = field(repr=False)

    def flatten_inputs(
        self, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
    ) -> list[torch.Tensor]:
        """The tensors of a call, in the order of the graph's inputs.

        Raises:
            CaptureError: when the call has another form than the captured one.
        """
        tensors, _, structure = flatten((args, kwargs or {}))
        description = _describe(tensors, structure, self.numbers)
        if description != self._description:
            message = f"the model is called with {description}, but was captured with "
            raise CaptureError(message + self._description)
        return tensors

    def unflatten_outputs(self, tensors: list[torch.Tensor]) -> Any:
        """What the model returns, made of the graph's outputs."""
        return self._results.build(tensors)

    def change_arguments(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[torch.Tensor]
    ) -> None:
        """Leaves in the caller's arguments what the model does, with the graph's outputs."""
        if self._changes.written or self._changes.contents:
            given, _, _ = flatten((args, kwargs))
            further = tensors[len(self._results.paths()) :]
            self._changes.apply(args, kwargs, given, further)

    @property
    def output_names(self) -> list[str]:
        """The paths in what the model returns of those of the graph's outputs which it returns."""
        return self._results.paths()

    def move_to(self, device: torch.device) -> None:
        """Has stages that are built from now on, and the denominators, run on `device`.

        Parameters and buffers are the user's, and must be moved as such.
        """
        owned = [name for name in self.state if name in self._constants]
        for module in [self.module, *(count.module for count in self.denominators)]:
            move_operators(module, device, owned)
        moved = _state(self.module)
        self.state.update({name: moved[name] for name in owned})

    @property
    def runs_submodules(self) -> bool:
        """Whether parts could not be captured and are called as they are; capture runs those."""
        found = (operator_of(node) for node in self.node_by_key.values())
        return any(isinstance(one.target, Opaque) for one in found if one is not None)

    def constants(self) -> dict[str, str]:
        """Digests of the tensors that capture found in the model's code and attributes, by name."""
        found = {name: tensor for name, tensor in self.state.items() if name in self._constants}
        return {
            name: hashlib.blake2b(_bytes_of(tensor), digest_size=8).hexdigest()
            for name, tensor in found.items()
            if not tensor.is_meta
        }

    @cached_property
    def draws(self) -> bool:
        """Whether it draws random numbers."""
        return draws(self.node_by_key.values())

    def whole_modules(self) -> set[int]:
        """Identities of the submodules that could not be captured, and of those inside."""
        found = (operator_of(node) for node in self.node_by_key.values())
        opaque = [one.target for one in found if one is not None]
        sites = [target.site.module for target in opaque if isinstance(target, Opaque)]
        return {id(part) for site in sites if site is not None for part in site.modules()}

    def serves(self, numbers: Mapping[Number, float]) -> bool:
        """Whether it is valid for these values of its numbers."""
        if not numbers.keys() >= self.numbers.keys():
            return False
        names = self.named_numbers(numbers)
        return all(evaluated(guard, names) for guard in self.guards)

    def named_numbers(self, numbers: Mapping[Number, float]) -> dict[str, float]:
        """The values of its numbers, by their names in expressions."""
        return {number_name(i): numbers[number] for i, number in enumerate(self.numbers)}

    @cached_property
    def used_numbers(self) -> set[Number]:
        """Those of its numbers that it computes or decides with."""
        nodes = {node.name: node for node in self.module.graph.nodes if node.op == "placeholder"}
        counts = [str(count.module.code) for count in self.denominators]
        return {
            number
            for name, number in zip(self.named_numbers(self.numbers), self.numbers, strict=True)
            if any(name in text for text in (*self.guards, *counts))
            or (name in nodes and nodes[name].users)
        }

    def num_rows(self, tensors: list[torch.Tensor]) -> int:
        """How many rows the tensors of a call hold."""
        if not self.batch_inputs:
            return self.static_rows or 1
        position, dim = next(iter(self.batch_inputs.items()))
        return int(tensors[position].shape[dim])


def capture(
    model: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
    *,
    batch_rows_hint: int | None = None,
    batch_dim: int = 0,
    output_reduction: Mapping[str, str] | str | None = None,
    numbers: Mapping[Number, float] | None = None,
    deciding: Collection[Number] = (),
) -> Captured:
    """Captures a model's forward for arguments like these.

    Args:
        model: the model, in the mode (training or evaluation) to capture.
        args: positional arguments of one call.
        kwargs: keyword arguments of the call.
        batch_rows_hint: the batch size, where the arguments leave it in doubt.
        batch_dim: the dimension of the first tensor in which rows are looked for.
        output_reduction: for results that reduce over rows otherwise than the analysis can tell,
            by their paths or for all: `mean` or `sum` of what parts of the batch give.
        numbers: the values of numbers that should be inputs of the graph where that is right.
        deciding: those of them of which it is known not to be right.

    Raises:
        CaptureError: when the arguments or results have a form that cannot be taken apart.
    """
    tensors, paths, structure = flatten((tuple(args), kwargs or {}))
    names = argument_names(model, paths)
    rows = batch_rows_hint or batch_size(tensors, batch_dim)
    if rows == 0:
        message = "the batch is empty, and a model is captured with its first"
        raise CaptureError(message, "pass at least one row the first time")
    row_dims = row_dims_by_size(tensors, rows)
    for position, tensor in enumerate(tensors):
        if batch_dim and tensor.dim() > batch_dim and tensor.shape[batch_dim] == rows:
            row_dims[position] = batch_dim
    call = _Call(model, tensors, names, structure, rows, row_dims, numbers or {}, deciding)
    with _uncollected(), revealed(model.modules()), revealed_outside(outer_roots(model)):
        return _with_batch_found(call, output_reduction)


def _with_batch_found(call: _Call, output_reduction: Mapping[str, str] | str | None) -> Captured:
    """The captured model; with rows in other dimensions where the first is so long by chance."""
    others = _other_dims(call)
    failure: Exception | None = None
    try:
        captured = _splittable(call, output_reduction)
        if captured.static_rows is None or others == call.row_dims:
            return captured
    except CaptureError:
        raise
    except Exception as found:  # whatever the user's forward raises
        if others == call.row_dims:
            raise
        failure = found
    with suppress(Exception):
        other = _splittable(replace(call, row_dims=others), output_reduction)
        if other.static_rows is None and others.keys() <= other.batch_inputs.keys():
            return other
    if failure is not None:
        raise failure
    return captured


def _other_dims(call: _Call) -> dict[int, int]:
    """Where rows may lie if not in the first dimensions of all tensors but the first one."""
    first = next(iter(call.row_dims), None)
    found = dict(call.row_dims)
    for position in call.row_dims.keys() - {first}:
        shape = call.tensors[position].shape
        later = [dim for dim, length in enumerate(shape) if dim > 0 and length == call.rows]
        found[position] = (later or [call.row_dims[position]])[0]
    return found


@contextmanager
def _uncollected() -> Iterator[None]:
    """Has the garbage collector not look through all nodes again and again while they are made."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _splittable(call: _Call, output_reduction: Mapping[str, str] | str | None) -> Captured:
    """The captured model, with what mixes rows as a whole or as stated if that lets it be split."""
    model = call.model
    captured, mixing = _captured(call)
    if mixing and _are_small(model, mixing):
        # Tokens sent to experts are mixed and put back in order: as a whole that is row-wise.
        other, still_mixing = _captured(call, opaque=mixing)
        if not still_mixing and other.static_rows is None:
            return other
    if mixing and output_reduction is not None:
        small = tuple(path for path in mixing if _are_small(model, (path,)))
        for opaque in dict.fromkeys([small, ()]):
            other, still_mixing = _captured(call, opaque=opaque, stated=output_reduction)
            if not still_mixing and other.static_rows is None:
                return other
    return captured


@dataclass(frozen=True, slots=True)
class _Call:
    """A model and how it is called."""

    model: torch.nn.Module
    tensors: list[torch.Tensor]
    names: list[str]
    structure: Structure
    rows: int
    row_dims: dict[int, int]
    numbers: Mapping[Number, float]
    deciding: Collection[Number]


def _captured(
    call: _Call,
    static_reason: str | None = None,
    opaque: tuple[str, ...] = (),
    stated: Mapping[str, str] | str | None = None,
) -> tuple[Captured, tuple[str, ...]]:
    """The captured model, and the submodules that keep it from being split."""
    model, tensors, structure, rows = call.model, call.tensors, call.structure, call.rows
    program = export(model, tensors, structure, rows, static_reason, opaque, call.row_dims)
    for position in program.arguments.written:
        check_apart(tensors, call.names, position)
    with compiled_when_called():
        names = _state_names(model)
        program, flat = promoted(
            program,
            lambda found: Flattener(found, _EXPORTED_NAME, names),
            call.numbers,
            call.deciding,
        )
        module = flat.module(type(model).__name__)
    put_in_order(
        module,
        flat.inputs,
        {name for name, _ in [*model.named_parameters(), *model.named_buffers()]},
        lambda: memory(module, flat.inputs, tensors, program.symbols, program.rows),
        keeps=program.left != Left(),
    )
    layouts = _input_layouts(flat, program)
    analysis = _analysis(flat, module, layouts, program)
    if stated is not None and program.dynamic:
        paths = enumerate(program.results.paths())
        known = {i: stated if isinstance(stated, str) else stated.get(p) for i, p in paths}
        reductions = {i: reduction for i, reduction in known.items() if reduction is not None}
        while analysis.culprits and state(module, analysis, program.symbols, reductions):
            analysis = _analysis(flat, module, layouts, program)
    rewriter = Rewriter(module, flat.inputs, analysis.layouts)
    rewriter.apply(analysis.rewrites)
    module.graph.lint()
    with compiled_when_called():
        module.recompile()
    sizes = (program.rows, program.rows if program.static_reason else 2 * program.rows)
    try:
        facts = measure(module, flat.inputs, tensors, program.symbols, sizes)
    except OneBatchSizeError as failure:
        reason = analysis.reason or str(failure)
        return _captured(call, reason)
    file = GraphFile(model, module, flat.inputs, call.names, analysis, facts, program)
    with compiled_when_called():
        share(module, _drawn_for_all_rows(file.node_by_key, analysis))
    captured = Captured(
        graph_json=file.json(rows),
        module=module,
        node_by_key=file.node_by_key,
        value_names=[value["name"] for value in file.values],
        value_nodes=file.value_nodes,
        orders=file.orders,
        state=_state(module),
        denominators=rewriter.denominators,
        static_rows=rows if program.static_reason is not None else None,
        batch_inputs=program.batch_inputs,
        left=program.left,
        read=program.read,
        obstacles=program.obstacles,
        mixing_module=analysis.mixing_module,
        numbers=program.numbers,
        guards=program.guards,
        _arguments=structure,
        _description=_describe(tensors, structure, program.numbers),
        _results=program.results,
        _changes=program.arguments,
        _constants=frozenset(v["name"] for v in file.values if v["kind"] == "constant"),
    )
    return captured, tuple(sorted(analysis.mixing)) if program.dynamic else ()


def _drawn_for_all_rows(
    node_by_key: dict[str, fx.Node], analysis: RowAnalysis
) -> dict[str, fx.Node]:
    """Operators, by key, that draw what no rows depend on."""
    return {
        key: node
        for key, node in node_by_key.items()
        if is_random(node)
        and all(analysis.layouts.get(output) is NONE for output in outputs_of(node))
    }


def _analysis(
    flat: Flattener, module: fx.GraphModule, layouts: dict[fx.Node, Layout], program: Program
) -> RowAnalysis:
    if program.dynamic:
        analysis = analyse(module, layouts, program.symbols)
        if program.static_reason is None or analysis.reason is not None:
            return analysis
    return _static_analysis(flat, layouts, program)


def _are_small(model: torch.nn.Module, paths: tuple[str, ...]) -> bool:
    """Whether submodules are real, and each a small enough part to be left whole."""
    if any(parameter.is_meta for parameter in model.parameters()):
        return False
    total = sum(parameter.numel() for parameter in model.parameters())
    return all(
        path and 2 * sum(p.numel() for p in model.get_submodule(path).parameters()) <= total
        for path in paths
    )


def batch_size(tensors: list[torch.Tensor], dim: int = 0) -> int:
    """The first (or another) dimension of the first tensor that has one."""
    for tensor in tensors:
        if tensor.dim() > dim:
            return int(tensor.shape[dim])
    if not tensors:
        raise CaptureError("the model is called without any tensor")
    return 1


def input_signature(
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
    numbers: Collection[Path] = (),
) -> str:
    """A text that is equal for calls which one capture serves.

    Of the arguments in some places, which are numbers, only the types count.

    It holds the structure of the arguments, types, sizes but for the batch's, which tensors require
    gradients, all plain values, and the state of autocast.
    """
    tensors, _, structure = flatten((tuple(args), kwargs or {}))
    rows = batch_size(tensors) if tensors else 0
    regions = [
        f"{device}:{torch.get_autocast_dtype(device)}"
        for device in ("cpu", "cuda")
        if torch.is_autocast_enabled(device)
    ]

    def leaf(index: int) -> str:
        tensor = tensors[index]
        sizes = [str(length) for length in tensor.shape]
        if sizes and tensor.shape[0] == rows:
            sizes[0] = "rows"
        gradient = " with gradient" if tensor.requires_grad else ""
        return f"{tensor.dtype}[{','.join(sizes)}]@{tensor.device.type}{gradient}"

    return "; ".join([structure.describe(leaf, numbers), *regions])


def argument_names(model: torch.nn.Module, paths: Sequence[str]) -> list[str]:
    """Names of arguments: that of the parameter, then the path inside it."""
    try:
        parameters = list(inspect.signature(model.forward).parameters.values())
    except (TypeError, ValueError):
        parameters = []
    by_position = [
        parameter.name
        for parameter in parameters
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    names = []
    for path in paths:
        group, _, rest = path.partition(".")
        first, dot, inside = rest.partition(".")
        if group == "0" and int(first) < len(by_position):
            first = by_position[int(first)]
        elif group == "0":
            first = f"argument_{first}"
        names.append(f"{first}{dot}{inside}")
    return names


def _bytes_of(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def _describe(tensors: list[torch.Tensor], structure: Structure, numbers: Iterable[Number]) -> str:
    def leaf(index: int) -> str:
        return f"{tensors[index].dtype}[{tensors[index].dim()}d]"

    return structure.describe(leaf, [n.argument for n in numbers if n.argument is not None])


def _input_layouts(flat: Flattener, program: Program) -> dict[fx.Node, Layout]:
    return {
        node: Split(program.batch_inputs[index]) if index in program.batch_inputs else NONE
        for index, node in enumerate(flat.inputs)
    }


def _static_analysis(
    flat: Flattener, layouts: dict[fx.Node, Layout], program: Program
) -> RowAnalysis:
    """Says that the whole batch is needed at once; rows are told by sizes, where they show."""
    analysis = RowAnalysis(dict(layouts), reason=program.static_reason)
    dependent = {node for node, layout in layouts.items() if layout is not NONE}
    for node in flat.graph.nodes:
        if dependent.intersection(node.all_input_nodes):
            dependent.add(node)
        if not is_value(node) or node in layouts or node.op == "get_attr":
            continue
        shape = program.symbols.shape(node.meta["val"])
        holds_rows = len(shape) > 0 and shape[0] in (ROWS, program.rows)
        batch = Split(0) if holds_rows else WHOLE
        analysis.layouts[node] = batch if node in dependent else NONE
    return analysis


def _state_names(model: torch.nn.Module) -> dict[int, str]:
    """The first name of each parameter and buffer, by its identity."""
    names: dict[int, str] = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        names.setdefault(id(tensor), name)
    return names


def _state(module: fx.GraphModule) -> dict[str, torch.Tensor]:
    return {
        state_name(node): attribute(module, node)
        for node in module.graph.nodes
        if node.op == "get_attr" and is_value(node)
    }
