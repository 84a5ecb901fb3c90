"""Runs the flat graph without data, to see what autograd keeps of it.

The graph runs under `FakeTensorMode` with gradients on, at two batch sizes: tensors have shapes and
types but no memory. That tells, for every operator, which results require gradients, which storages
its backward keeps, which arguments its results share memory with, and how many floating-point
operations it takes, each as a line over the number of rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch._subclasses import FakeTensorMode

from ._flat import (
    Scope,
    Scoped,
    attribute,
    is_value,
    operator_of,
    outputs_of,
    tensors_read,
    written_arguments,
)
from ._opaque import FlopCounter, Opaque, SavedStorages
from ._replay import Described, Replay, Storage, UnclearError, describe, fresh
from ._sizes import Affine, Symbols, at, fit
from ._strides import order_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ._strides import Order


@dataclass(slots=True)
class TensorFacts:
    """What is known of a value after a run."""

    dtype: str
    requires_grad: bool
    contiguous: bool
    order: Order


@dataclass(slots=True)
class OperatorFacts:
    """What is known of an operator after the runs."""

    flops: Affine
    saved_bytes: Affine
    writes: list[fx.Node]
    aliases: list[fx.Node]


@dataclass(slots=True)
class _Run:
    """One run of the graph."""

    tensors: dict[fx.Node, TensorFacts] = field(default_factory=dict)
    flops: dict[fx.Node, int] = field(default_factory=dict)
    saved_bytes: dict[fx.Node, int] = field(default_factory=dict)
    aliases: dict[fx.Node, list[fx.Node]] = field(default_factory=dict)
    writes: dict[fx.Node, list[fx.Node]] = field(default_factory=dict)


@dataclass(slots=True)
class Measurements:
    """What the runs tell of each value and operator."""

    tensors: dict[fx.Node, TensorFacts]
    operators: dict[fx.Node, OperatorFacts]


class OneBatchSizeError(Exception):
    """Occurs when a graph runs for one batch size but not for another."""


def measure(
    module: fx.GraphModule,
    inputs: list[fx.Node],
    examples: list[torch.Tensor],
    symbols: Symbols,
    rows: tuple[int, int],
) -> Measurements:
    """Runs `module` at two batch sizes, equal ones if only one is possible.

    Args:
        module: the flat graph.
        inputs: its placeholders for the model's tensors.
        examples: a tensor for each of them: its type, device and `requires_grad` count.
        symbols: translates symbolic sizes.
        rows: the batch sizes.

    Raises:
        OneBatchSizeError: when it runs for the first batch size only.
    """
    replay = Replay()

    def run(number: int) -> _Run:
        return _replayed_or_run(module, inputs, examples, symbols, number, replay)

    first = run(rows[0])
    try:
        second = first if rows[0] == rows[1] else run(rows[1])
    except Exception as failure:
        message = f"it fails for {rows[1]} rows though not for {rows[0]}"
        raise OneBatchSizeError(message) from failure

    def line(node: fx.Node, one: dict[fx.Node, int], other: dict[fx.Node, int]) -> Affine:
        return one[node] if rows[0] == rows[1] else fit(one[node], other[node], rows)

    for node, aliases in first.aliases.items():
        node.meta["aliases"], node.meta["writes"] = aliases, first.writes[node]
    operators = {
        node: OperatorFacts(
            flops=line(node, first.flops, second.flops),
            saved_bytes=line(node, first.saved_bytes, second.saved_bytes),
            writes=first.writes[node],
            aliases=first.aliases[node],
        )
        for node in first.flops
    }
    for node, known in operators.items():
        call = node.meta["operator"].target
        if isinstance(call, Opaque):
            known.flops, known.saved_bytes = call.flops, call.saved_bytes
    return Measurements(first.tensors, operators)


def memory(
    module: fx.GraphModule,
    inputs: list[fx.Node],
    examples: list[torch.Tensor],
    symbols: Symbols,
    rows: int,
) -> dict[fx.Node, tuple[list[fx.Node], list[fx.Node]]]:
    """For each operator the arguments that its results share memory with, and those it writes to.

    The arguments are those of :func:`measure`.
    """
    run = _replayed_or_run(module, inputs, examples, symbols, rows, Replay())
    return {node: (aliases, run.writes[node]) for node, aliases in run.aliases.items()}


def _replayed_or_run(
    module: fx.GraphModule,
    inputs: list[fx.Node],
    examples: list[torch.Tensor],
    symbols: Symbols,
    rows: int,
    replay: Replay,
) -> _Run:
    try:
        return _replayed(module, inputs, examples, symbols, rows, replay)
    except UnclearError:
        return _run(module, inputs, examples, symbols, rows)


def _replayed(
    module: fx.GraphModule,
    inputs: list[fx.Node],
    examples: list[torch.Tensor],
    symbols: Symbols,
    rows: int,
    replay: Replay,
) -> _Run:
    """What `_run` finds, with each distinct operator run once.

    Raises:
        UnclearError: when an operator does what only a run of the whole graph can tell.
    """
    run = _Run()
    known: dict[fx.Node, Any] = {}
    storages: dict[int, Storage] = {}
    for node, example in zip(inputs, examples, strict=True):
        known[node] = fresh([at(n, rows) for n in symbols.shape(node.meta["val"])], example)
    for node in module.graph.nodes:
        if node.op == "get_attr" and is_value(node):
            known[node] = describe(attribute(module, node), storages)
    for storage in storages.values():
        storage.saved = True
    for node in module.graph.nodes:
        if node in known or node.op == "output":
            continue
        what = operator_of(node)
        if what is None:
            found = _auxiliary(module, node, known, rows)
            is_tensor = isinstance(found, torch.Tensor)
            known[node] = fresh(list(found.shape), found) if is_tensor else found
            continue
        done = replay.call(module, node, known, what)
        known[node] = done.result
        run.flops[node], run.saved_bytes[node] = done.flops, done.saved_bytes
        run.aliases[node], run.writes[node] = done.aliases, done.writes
        for output in outputs_of(node):
            known[output] = done.result if output is node else done.result[output.args[1]]
    for node, value in known.items():
        if isinstance(value, Described):
            order = order_of(value.size, value.stride)
            dtype = str(value.dtype).removeprefix("torch.")
            run.tensors[node] = TensorFacts(dtype, value.requires_grad, value.contiguous, order)
    return run


def _run(
    module: fx.GraphModule,
    inputs: list[fx.Node],
    examples: list[torch.Tensor],
    symbols: Symbols,
    rows: int,
) -> _Run:
    run = _Run()
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    known: dict[fx.Node, Any] = {}
    for node, example in zip(inputs, examples, strict=True):
        shape = [at(length, rows) for length in symbols.shape(node.meta["val"])]
        with mode:
            order = order_of(example.shape, example.stride())
            fake = torch.empty_permuted(shape, order, dtype=example.dtype, device=example.device)
        known[node] = fake.requires_grad_(example.requires_grad)
    state = [node for node in module.graph.nodes if node.op == "get_attr" and is_value(node)]
    for node in state:
        known[node] = mode.from_tensor(attribute(module, node))
    saved = SavedStorages([known[node] for node in state])
    flops = FlopCounter()
    hooks = torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor)
    with mode, flops, hooks, torch.enable_grad():
        for node in module.graph.nodes:
            if node in known or node.op == "output":
                continue
            before = (flops.total, saved.total)
            if operator_of(node) is None:
                known[node] = _auxiliary(module, node, known, rows)
                continue
            _operator(module, node, known, run)
            run.flops[node] = flops.total - before[0]
            run.saved_bytes[node] = saved.total - before[1]
    for node, value in known.items():
        if isinstance(value, torch.Tensor):
            run.tensors[node] = _facts(value)
    return run


def _auxiliary(module: fx.GraphModule, node: fx.Node, known: dict[fx.Node, Any], rows: int) -> Any:
    """A placeholder that is no tensor, a size, a nested graph or an item of a result."""
    if node.op == "placeholder":
        if "example" in node.meta:
            example = node.meta["example"]
            return torch.empty(example.shape, dtype=example.dtype, device=example.device)
        return rows if node.name == "rows" else node.meta.get("hint", 1.0)
    if node.op == "get_attr":
        return attribute(module, node)
    function: Any = node.target
    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), known.__getitem__)
    return function(*args, **kwargs)


def _operator(module: fx.GraphModule, node: fx.Node, known: dict[fx.Node, Any], run: _Run) -> None:
    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), known.__getitem__)
    read = tensors_read(node)
    versions = {argument: known[argument]._version for argument in read}
    target: Any = node.target
    if node.op == "call_module":
        target = attribute(module, node)
    what = operator_of(node)
    if what is not None and isinstance(what.target, Opaque):
        target = Scoped(what.target.without_data, what.scope or Scope())
    result = target(*args, **kwargs)
    known[node] = result
    storages = {tensor.untyped_storage()._cdata for tensor in _tensors(result)}
    run.aliases[node] = [
        argument for argument in read if known[argument].untyped_storage()._cdata in storages
    ]
    written = set(written_arguments(node))
    run.writes[node] = [
        argument
        for argument in read
        if argument in written or known[argument]._version != versions[argument]
    ]
    for output in outputs_of(node):
        known[output] = result if output is node else result[output.args[1]]


def _facts(value: torch.Tensor) -> TensorFacts:
    return TensorFacts(
        str(value.dtype).removeprefix("torch."),
        value.requires_grad,
        value.is_contiguous(),
        order_of(value.shape, value.stride()),
    )


def _tensors(result: Any) -> Iterator[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        yield result
    elif isinstance(result, (tuple, list)):
        for item in result:
            yield from _tensors(item)
