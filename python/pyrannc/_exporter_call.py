"""One call of `torch.export`, without what it leaves on the model and says to the user."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.export import Dim
from torch.export.graph_signature import InputKind, OutputKind

from ._autocast import no_autocast
from ._lazy import compiled_when_called
from ._transforms import transforms_seen

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ._flat_model import FlatModel

_STATE = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)


def exported(
    flat: FlatModel, tensors: list[torch.Tensor], candidates: dict[int, int]
) -> tuple[fx.GraphModule, dict[str, Any]]:
    """The program, and the state that it reads.

    Args:
        flat: the model.
        tensors: its arguments.
        candidates: by position, the dimension of each tensor that may hold rows.
    """
    shapes = tuple(
        {candidates[i]: Dim.AUTO} if i in candidates else None for i in range(len(tensors))
    )
    with (
        _quiet(),
        flat.without_hooks(),
        _same_attributes(flat),
        torch.enable_grad(),
        no_autocast(),
        _regions_in_line(),
        compiled_when_called(),
        _without_places(),
        transforms_seen(),
    ):
        program = torch.export.export(
            flat, tuple(tensors), strict=False, dynamic_shapes={"tensors": shapes}
        )
        return _unlifted(program)


@contextlib.contextmanager
def _same_attributes(model: torch.nn.Module) -> Iterator[None]:
    """Has modules hold the same objects after the body: the exporter leaves copies."""
    before = [(module, dict(module.__dict__)) for module in model.modules()]
    try:
        yield
    finally:
        for module, attributes in before:
            module.__dict__.update(attributes)


def _unlifted(program: torch.export.ExportedProgram) -> tuple[fx.GraphModule, dict[str, Any]]:
    """The program's graph with parameters and buffers as attributes, and these by their names.

    `ExportedProgram.module` would copy the graph several times to make it callable.
    """
    signature = program.graph_signature
    kinds: set[Any] = {spec.kind for spec in signature.input_specs}
    kinds |= {spec.kind for spec in signature.output_specs}
    if kinds - {*_STATE, InputKind.USER_INPUT, OutputKind.USER_OUTPUT}:
        return program.module(), {}
    state: dict[str, Any] = {}
    graph = program.graph_module.graph
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    for node, spec in zip(placeholders, signature.input_specs, strict=True):
        if spec.kind is InputKind.USER_INPUT:
            continue
        target = str(spec.target)
        found = program.constants if target in program.constants else program.state_dict
        state[target] = found[target]
        with graph.inserting_before(node):
            attribute = graph.create_node("get_attr", target)
        attribute.meta = node.meta
        node.replace_all_uses_with(attribute)
        graph.erase_node(node)
    return program.graph_module, state


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the exporter's remarks about its own work from the user."""
    disabled = logging.root.manager.disable
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(disabled)


@contextlib.contextmanager
def _regions_in_line() -> Iterator[None]:
    """Has `no_grad` and `autocast` regions shown by where they begin and end.

    The exporter's passes that make nested graphs of them lose a `no_grad` inside an `autocast`.
    Without these passes (which other versions of torch may have elsewhere) all works alike but for
    that.
    """
    with contextlib.ExitStack() as stack:
        for name in ("replace_set_grad_with_hop_pass", "replace_autocast_with_hop_pass"):
            try:
                module = importlib.import_module(f"torch._export.passes.{name}")
                original = getattr(module, name)
            except (ImportError, AttributeError):
                continue
            setattr(module, name, lambda program, signature: (program, signature))
            stack.callback(setattr, module, name, original)
        yield


@contextlib.contextmanager
def _without_places() -> Iterator[None]:
    """Keeps the exporter from noting where in the source each operator was called."""
    before = fx.config.do_not_emit_stack_traces
    fx.config.do_not_emit_stack_traces = True
    try:
        yield
    finally:
        fx.config.do_not_emit_stack_traces = before
