"""Exports a model's forward as a program over a list of tensors."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import sympy
import torch
from torch import fx
from torch.export import Dim

from ._sizes import ROWS, Symbols, expression_text, size
from ._structure import Structure, flatten
from .errors import CaptureError


@dataclass(frozen=True, slots=True)
class Program:
    """An exported model.

    Attributes:
        module: the program; its submodule `model` holds the model's state.
        symbols: translates its sizes.
        rows: the number of rows it was exported with.
        batch_inputs: positions of the tensors that hold rows.
        results: the structure of what the model returns.
        static_reason: why the program is valid only for this number of rows, if it is.
    """

    module: fx.GraphModule
    symbols: Symbols
    rows: int
    batch_inputs: set[int]
    results: Structure
    static_reason: str | None


class FlatModel(torch.nn.Module):
    """A model that takes and gives flat lists of tensors.

    Attributes:
        results: the structure of what the model returned last.
    """

    def __init__(self, model: torch.nn.Module, arguments: Structure) -> None:
        super().__init__()
        self.model = model
        self._arguments = arguments
        # In an object of its own: the exporter puts plain attributes back as they were.
        self._noted = _Noted()

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Calls the model."""
        args, kwargs = self._arguments.build(tensors)
        results, _, structure = flatten(
            self.model(*args, **kwargs), drop_unknown=True, root="result"
        )
        self._noted.results = structure
        return tuple(results)

    @property
    def results(self) -> Structure:
        """The structure of what the model returned last."""
        assert self._noted.results is not None
        return self._noted.results


class _Noted:
    """What a forward left behind."""

    results: Structure | None = None


def export(
    model: torch.nn.Module, tensors: list[torch.Tensor], arguments: Structure, rows: int
) -> Program:
    """Exports a model for tensors like these.

    Args:
        model: the model.
        tensors: the tensors among its arguments.
        arguments: the structure of its arguments.
        rows: the batch size; tensors with this first dimension hold rows, unless the model takes
            them otherwise.
    """
    flat = FlatModel(model, arguments)
    candidates = {i for i, t in enumerate(tensors) if t.dim() > 0 and t.shape[0] == rows}
    # Sizes 0 and 1 are taken as constants by the exporter.
    exported_rows = max(rows, 2)
    copies = [
        _copy(tensor, exported_rows if index in candidates else None)
        for index, tensor in enumerate(tensors)
    ]
    module = _exported(flat, copies, candidates)
    symbols = _batch_symbols(module)
    if symbols:
        reason = _restriction(module, set(symbols.values()))
        table = Symbols(list(symbols.values()))
        return Program(module, table, exported_rows, set(symbols), flat.results, reason)
    if exported_rows != rows:
        module = _exported(flat, [_copy(tensor, None) for tensor in tensors], candidates)
    reason = "the model is written for one batch size"
    return Program(module, Symbols([]), rows, candidates, flat.results, reason)


def _copy(tensor: torch.Tensor, rows: int | None) -> torch.Tensor:
    """A tensor of its own, with at least two rows.

    The exporter takes one tensor given twice for one argument.
    """
    copied = tensor.detach().clone()
    if rows is not None and copied.shape[0] != rows:
        copied = copied.repeat(rows, *(1 for _ in copied.shape[1:]))
    return copied.requires_grad_(tensor.requires_grad)


def _exported(flat: FlatModel, tensors: list[torch.Tensor], candidates: set[int]) -> fx.GraphModule:
    shapes = tuple({0: Dim.AUTO} if i in candidates else None for i in range(len(tensors)))
    with _quiet(), torch.enable_grad(), _no_autocast():
        program = torch.export.export(
            flat, tuple(tensors), strict=False, dynamic_shapes={"tensors": shapes}
        )
        return program.module()


def _batch_symbols(module: fx.GraphModule) -> dict[int, sympy.Symbol]:
    """The symbols of the first dimensions, by the position of the tensor."""
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    found = {}
    for index, node in enumerate(placeholders):
        shape = node.meta["val"].shape
        if len(shape) and isinstance(shape[0], torch.SymInt):
            found[index] = shape[0].node.expr
    return found


def _restriction(module: fx.GraphModule, symbols: set[sympy.Symbol]) -> str | None:
    """Why the program serves only some batch sizes: the model decided something by the size."""
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    environment = placeholders[0].meta["val"].fake_mode.shape_env
    for guard in environment.guards:
        expression = guard.expr.xreplace(dict.fromkeys(guard.expr.free_symbols, ROWS))
        if not guard.expr.free_symbols & symbols or expression in (True, sympy.true):
            continue
        text = expression_text(expression)
        if not all(size(rows, text) for rows in range(2, 130)):
            return f"the model decides by the batch size: `{text}`"
    return None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the exporter's remarks about its own work from the user."""
    logger = logging.getLogger("torch.export")
    level = logger.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)


@contextlib.contextmanager
def _no_autocast() -> Iterator[None]:
    """Autocast around the model is applied when its operators run, not when they are captured."""
    with contextlib.ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


__all__ = ["CaptureError", "FlatModel", "Program", "export"]
