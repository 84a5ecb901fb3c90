"""Tries out an unknown operator on random numbers, whole and in parts.

An operator is row-wise when its result for some rows is that part of its result for all rows. For
operators without a rule this is tested once on random tensors of the true sizes with four rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from . import _host_random
from ._flat import positional, state_name, written_arguments
from ._layout import NONE, Layout, MixesRows, Split, placed
from ._side_effects import Rewinding
from ._sizes import at
from .errors import ExecutionError

if TYPE_CHECKING:
    from ._opaque import Opaque
    from ._rows import Call

_ROWS = 4
_PARTS = ((0, 1), (1, 4))
_MAX_SINGLE_ROWS = 8
_MAX_ENTRIES = 1 << 24


Runner = Callable[[dict[fx.Node, torch.Tensor]], list[torch.Tensor]]


def probed(call: Call) -> list[Layout]:
    """The layouts of an unknown operator's results, as a trial shows them.

    Raises:
        MixesRows: when it is not row-wise, or cannot be tried.
    """
    if call.numbers_of_rows:
        raise MixesRows("is not known to treat rows one by one")
    generator = torch.Generator().manual_seed(0)

    def run(values: dict[fx.Node, torch.Tensor]) -> list[torch.Tensor]:
        return _run(call, values)

    try:
        whole = {tensor: _random(call, tensor, generator) for tensor in call.tensors}
        return tried(call, whole, run, _PARTS)
    except MixesRows:
        raise
    except Exception as failure:
        raise MixesRows("is not known to treat rows one by one") from failure


def probed_opaque(call: Call, target: Opaque) -> list[Layout]:
    """The layouts of a whole submodule's results, tried out on what it was given in a real run.

    Raises:
        MixesRows: when it is not row-wise, or parts of the batch would leave something else in
            buffers than the whole does.
    """
    seen = target.runs[0]
    written = written_arguments(call.node)
    _check_steady(call, target, written)
    nodes = list(positional(call.node)[0])
    whole = dict(zip(nodes, seen.inputs, strict=True))
    singles = [(row, row + 1) for row in range(min(seen.rows, _MAX_SINGLE_ROWS))]
    parts = (*singles, (0, seen.rows // 2), (seen.rows // 2, seen.rows))
    rewinding = Rewinding([target.site.modules])

    def run(values: dict[fx.Node, torch.Tensor]) -> list[torch.Tensor]:
        given = [values[node].detach().clone() for node in nodes]
        # As microbatches do, each run starts from the buffers and attributes as they are.
        state = [
            tensor if isinstance(tensor, torch.nn.Parameter) else tensor.detach().clone()
            for tensor in target.site.state
        ]
        rewound = rewinding.of(0)
        with torch.random.fork_rng(), _host_random.kept(), torch.enable_grad(), rewound:
            torch.manual_seed(0)
            _host_random.seed(0)
            results = target(given, state)
        left = [[*given, *state][position].detach() for position in target.written]
        return [*(results[positional(output)[1]].detach() for output in call.outputs), *left]

    try:
        with target.site.undisturbed():
            return tried(call, whole, run, parts, written)
    except MixesRows:
        raise
    except ExecutionError as failure:
        raise MixesRows("writes to buffers for some of the rows only") from failure
    except Exception as failure:
        raise MixesRows("cannot be run on parts of the batch") from failure


def _check_steady(call: Call, target: Opaque, written: list[fx.Node]) -> None:
    """Refuses parts that keep something of the rows where all rows find it.

    That parts of one batch leave what the whole leaves is not enough: with other rows they might
    not.
    """
    for position, node in zip(target.written, written, strict=True):
        if call.layout(node) is NONE and position not in target.steady:
            where = f"the buffer `{state_name(node)}`" if node.op == "get_attr" else "a tensor"
            raise MixesRows(f"writes what depends on the rows to {where}")


def tried(
    call: Call,
    whole: dict[fx.Node, torch.Tensor],
    run: Runner,
    parts: tuple[tuple[int, int], ...],
    written: Sequence[fx.Node] = (),
) -> list[Layout]:
    """The layouts with which the results for parts of the rows are parts of the results.

    Args:
        call: the operator.
        whole: the tensors it reads, for a batch.
        run: runs it.
        parts: ranges of rows to run by themselves.
        written: tensors that it writes to, which `run` gives after the results.

    Raises:
        MixesRows: when there are no such layouts.
    """
    expected = run(whole)
    given = [
        {tensor: _rows_of(value, call.layout(tensor), part) for tensor, value in whole.items()}
        for part in parts
    ]
    results = [run(values) for values in given]
    left = [call.layout(tensor) for tensor in written]
    for layouts in _candidates(call):
        if all(
            _close(result, _rows_of(full, layout, part))
            for part, found in zip(parts, results, strict=True)
            for result, full, layout in zip(found, expected, [*layouts, *left], strict=True)
        ):
            return list(layouts)
    raise MixesRows("does not treat rows one by one")


def _candidates(call: Call) -> list[tuple[Split, ...]]:
    """Where rows may lie in the results, judged by the sizes."""
    sources = [call.layout(tensor) for tensor in call.tensors]
    found: dict[tuple[Split, ...], None] = {}
    for source in sources:
        if not isinstance(source, Split):
            continue
        for like in (source, Split(0, 1, source.factor), Split(0)):
            try:
                found[tuple(placed(call.shape(output), like) for output in call.outputs)] = None
            except MixesRows:
                continue
    if not found:
        raise MixesRows("is not known to treat rows one by one")
    return list(found)


def _close(result: torch.Tensor, expected: torch.Tensor) -> bool:
    if result.shape != expected.shape:
        return False
    tolerance = 1e-6 if result.dtype == torch.float64 else 1e-4
    return torch.allclose(result, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


def _random(call: Call, tensor: fx.Node, generator: torch.Generator) -> torch.Tensor:
    shape = [at(length, _ROWS) for length in call.shape(tensor)]
    dtype = tensor.meta["val"].dtype
    size = torch.Size(shape)
    if size.numel() > _MAX_ENTRIES:
        raise MixesRows("is not known to treat rows one by one")
    if dtype.is_floating_point or dtype.is_complex:
        return torch.rand(shape, dtype=torch.float32, generator=generator).to(dtype)
    return torch.randint(0, 2, shape, generator=generator).to(dtype)


def _rows_of(value: torch.Tensor, layout: Layout, part: tuple[int, int]) -> torch.Tensor:
    if layout is NONE or not isinstance(layout, Split):
        return value
    unfolded = value.unflatten(layout.dim, (layout.outer, -1, layout.inner))
    rows: torch.Tensor = unfolded.narrow(layout.dim + 1, part[0], part[1] - part[0])
    return rows.flatten(layout.dim, layout.dim + 2)


def _run(call: Call, values: dict[fx.Node, torch.Tensor]) -> list[torch.Tensor]:
    def resolve(node: fx.Node) -> Any:
        return node.meta["hint"] if "size" in node.meta else values[node].clone()

    args, kwargs = fx.map_arg((call.node.args, dict(call.node.kwargs)), resolve)
    if "device" in kwargs:
        kwargs["device"] = "cpu"
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        result = call.operator.target(*args, **kwargs)
    if isinstance(result, torch.Tensor):
        return [result]
    return [result[output.args[1]] for output in call.outputs]
