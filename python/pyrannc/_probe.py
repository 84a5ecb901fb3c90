"""Tries out an unknown operator on random numbers, whole and in parts.

An operator is row-wise when its result for some rows is that part of its result for all rows. For
operators without a rule this is tested once on random tensors of the true sizes with four rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ._layout import NONE, Layout, MixesRows, Split, placed
from ._sizes import at

if TYPE_CHECKING:
    from ._rows import Call

_ROWS = 4
_PARTS = ((0, 1), (1, 4))
_MAX_ENTRIES = 1 << 24


def probed(call: Call) -> list[Layout]:
    """The layouts of an unknown operator's results, as a trial shows them.

    Raises:
        MixesRows: when it is not row-wise, or cannot be tried.
    """
    sources = [tensor for tensor in call.tensors if isinstance(call.layout(tensor), Split)]
    candidates: dict[tuple[Split, ...], None] = {}
    for tensor in sources:
        source = call.layout(tensor)
        assert isinstance(source, Split)
        for like in (source, Split(0, 1, source.factor), Split(0)):
            try:
                candidates[tuple(placed(call.shape(o), like) for o in call.outputs)] = None
            except MixesRows:
                continue
    if not candidates or call.numbers_of_rows:
        raise MixesRows("is not known to treat rows one by one")
    try:
        return list(_tried(call, list(candidates)))
    except MixesRows:
        raise
    except Exception as failure:
        raise MixesRows("is not known to treat rows one by one") from failure


def _tried(call: Call, candidates: list[tuple[Split, ...]]) -> tuple[Split, ...]:
    generator = torch.Generator().manual_seed(0)
    whole = {tensor: _random(call, tensor, generator) for tensor in call.tensors}
    expected = _run(call, whole)
    for layouts in candidates:
        if all(_agrees(call, whole, expected, layouts, part) for part in _PARTS):
            return layouts
    raise MixesRows("does not treat rows one by one")


def _agrees(
    call: Call,
    whole: dict[fx.Node, torch.Tensor],
    expected: list[torch.Tensor],
    layouts: tuple[Split, ...],
    part: tuple[int, int],
) -> bool:
    given = {tensor: _rows_of(value, call.layout(tensor), part) for tensor, value in whole.items()}
    results = _run(call, given)
    return all(
        torch.allclose(result, _rows_of(full, layout, part), rtol=1e-4, atol=1e-5, equal_nan=True)
        for result, full, layout in zip(results, expected, layouts, strict=True)
    )


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
    rows = unfolded.narrow(layout.dim + 1, part[0], part[1] - part[0])
    return rows.flatten(layout.dim, layout.dim + 2)


def _run(call: Call, values: dict[fx.Node, torch.Tensor]) -> list[torch.Tensor]:
    def resolve(node: fx.Node) -> Any:
        return values[node].clone()

    args, kwargs = fx.map_arg((call.node.args, dict(call.node.kwargs)), resolve)
    if "device" in kwargs:
        kwargs["device"] = "cpu"
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        result = call.operator.target(*args, **kwargs)
    if isinstance(result, torch.Tensor):
        return [result]
    return [result[output.args[1]] for output in call.outputs]
