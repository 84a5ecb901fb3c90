"""The user's model as the exporter runs it: tensors in, tensors out, and nothing left behind."""

from __future__ import annotations

import contextlib
import logging
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TextIO, cast

import torch
from torch.nn.modules import module as module_hooks

from ._arguments import ArgumentChanges, Arguments, written_with_gradient
from ._culprit import itself
from ._outer import outer_roots
from ._places import Unreturned
from ._snapshot import Changes, Snapshot
from ._structure import Structure, flatten

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ._numbers import Symbolic
    from ._places import Place

_log = logging.getLogger("pyrannc")


class FlatModel(torch.nn.Module):
    """A model that takes and gives flat lists of tensors.

    Behind what the model returns it gives what is left in the arguments.

    Attributes:
        results: the structure of what the model returned last.
    """

    def __init__(self, model: torch.nn.Module, arguments: Structure) -> None:
        super().__init__()
        self.model = model
        self._arguments = arguments
        self._outside = outer_roots(model)
        # In an object of its own: the exporter puts plain attributes back as they were.
        self._noted = _Noted()

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Calls the model."""
        symbolic = self._noted.symbolic
        if symbolic is None:
            return self._call(self._arguments, tensors)
        with symbolic.placed(self.model, self._arguments, tensors) as arguments:
            return self._call(arguments, tensors)

    @contextlib.contextmanager
    def with_symbols(self, symbolic: Symbolic) -> Iterator[None]:
        """Has forwards find symbols in the places of some numbers."""
        self._noted.symbolic = symbolic
        try:
            yield
        finally:
            self._noted.symbolic = None

    def _call(
        self, arguments: Structure, tensors: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, ...]:
        args, kwargs = arguments.build(tensors)
        passed = Arguments(args, kwargs)
        before = Snapshot(self.model.named_modules(), self._outside)
        try:
            with contextlib.redirect_stdout(cast("TextIO", _Heard(sys.stdout, self._noted))):
                given = self.model(*args, **kwargs)
            results, _, structure = flatten(given, unknown=_unreturned, root="result")
            further, self._noted.arguments = passed.further(_unreturned)
            left = passed.as_left([*results, *further])
            before.check_tensors()
            before.keep_buffers()
        except RuntimeError as failure:
            if any(tensor.requires_grad for tensor in tensors) and "leaf Variable" in str(failure):
                raise written_with_gradient() from failure
            raise
        finally:
            self._noted.changes = before.restore()
            self._noted.read |= before.read
        self._noted.results = structure
        return tuple(left)

    @contextlib.contextmanager
    def without_hooks(self) -> Iterator[None]:
        """Has hooks of all modules not be called for this module, and for those of the exporter."""
        own = set(self.model.modules())
        tables = (module_hooks._global_forward_pre_hooks, module_hooks._global_forward_hooks)
        before = [dict(table) for table in tables]
        for table in tables:
            table.update({number: _only_for(own, hook) for number, hook in table.items()})
        try:
            yield
        finally:
            for table, hooks in zip(tables, before, strict=True):
                table.update(hooks)

    @property
    def changes(self) -> Changes:
        """What the last forward changed in attributes of modules."""
        return self._noted.changes

    @property
    def arguments(self) -> ArgumentChanges:
        """What the last forward changed in its arguments."""
        return self._noted.arguments

    def tell(self) -> None:
        """Warns of what a captured model does not do."""
        if self._noted.printed:
            _log.warning(
                "forward prints: a captured model does so only while it is captured, not in every "
                "call; have forward return what is to be seen"
            )

    @property
    def read(self) -> frozenset[Place]:
        """Places in the user's objects that forwards have read."""
        return frozenset(self._noted.read)

    @property
    def results(self) -> Structure:
        """The structure of what the model returned last."""
        assert self._noted.results is not None
        return self._noted.results


def _only_for(modules: set[torch.nn.Module], hook: Callable[..., Any]) -> Callable[..., Any]:
    return lambda module, *args: hook(module, *args) if itself(module) in modules else None


def _unreturned(path: str, result: Any) -> Unreturned:
    """Stands for a result that is no tensor."""
    return Unreturned(f"result.{path}" if path else "result", type(result).__name__)


@dataclass(slots=True)
class _Noted:
    """What a forward left behind."""

    results: Structure | None = None
    changes: Changes = field(default_factory=Changes)
    arguments: ArgumentChanges = field(default_factory=ArgumentChanges)
    read: set[Place] = field(default_factory=set)
    printed: bool = False
    symbolic: Symbolic | None = None


class _Heard:
    """Standard output that notes whether a model prints while it is exported."""

    def __init__(self, output: Any, noted: _Noted) -> None:
        self._output = output
        self._noted = noted

    def __getattr__(self, name: str) -> Any:
        return getattr(self._output, name)

    def write(self, text: str) -> int:
        """Passes it on."""
        self._noted.printed |= torch.compiler.is_exporting()
        return int(self._output.write(text))
