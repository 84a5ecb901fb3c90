"""What of a model's modules, apart from their modes, a capture takes as given.

Numbers, flags and texts among the attributes of modules are constants of a captured model, and
what forward hooks do to tensors is part of it. So a model whose attributes or hooks have changed
since is captured again. Attributes that forward changes and that change nothing do not count;
private ones count where a forward goes on with what another one left in them. Parts that were left
whole do not count: they run as they are. Submodules and parameters, however, were placed, and must
stay the same objects.
"""

from __future__ import annotations

import hashlib
import logging
from typing import TYPE_CHECKING, Any

from ._side_effects import original
from .batch_norm import check_groups
from .errors import RaNNCError
from .guards import is_guard
from .hooks import check_module_hooks

if TYPE_CHECKING:
    from collections.abc import Container

    import torch

    from ._side_effects import Left

logger = logging.getLogger(__name__)

_PLAIN = (bool, int, float, str, type(None))
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class _Part:
    """One module, and which of its attributes are plain, so that looking again is quick."""

    def __init__(self, path: str, module: torch.nn.Module) -> None:
        self.path = path
        self.module = module
        self._attributes = module.__dict__
        self._children = list(module._modules.values())
        self._parameters = [id(parameter) for parameter in module._parameters.values()]
        self._state: set[str] = set()
        self._written: set[str] = set()
        self._look()

    def settle(self, state: set[str], written: set[str]) -> bool:
        """Takes note of what forwards leave in attributes; whether that is news."""
        if state <= self._state and written <= self._written:
            return False
        self._state |= state
        self._written |= written
        self._look()
        return True

    def _look(self) -> None:
        self._size = len(self._attributes)
        self._names = [
            name for name, value in self._attributes.items() if self._counts(name, value)
        ]

    def _counts(self, name: str, value: Any) -> bool:
        if name in self._state:
            return True
        if name in self._written or name[0] == "_" or name == "training":
            return False
        return type(original(value)) in _PLAIN

    def values(self) -> list[Any]:
        """The plain attributes, and how many hooks there are."""
        attributes = self._attributes
        if len(attributes) != self._size:
            self._look()
        found = [original(attributes.get(name)) for name in self._names]
        kinds = [attributes[kind] for kind in _HOOKS]
        if any(kinds):
            counts = [sum(not is_guard(hook) for hook in hooks.values()) for hooks in kinds]
            found += counts if any(counts) else []  # guards alone are as no hooks
        return found

    def changed(self, before: list[Any], now: list[Any]) -> list[str]:
        """Names of attributes with other values."""
        same_names = len(before) == len(now)
        prefix = f"{self.path}." if self.path else ""
        names = [n for n, a, b in zip(self._names, before, now, strict=False) if a != b]
        return [prefix + name for name in names] if same_names else []

    def check(self) -> None:
        """Looks whether submodules and parameters are still the same."""
        children, parameters = self._attributes["_modules"], self._attributes["_parameters"]
        same = self._children == list(children.values()) and self._parameters == [
            id(parameter) for parameter in parameters.values()
        ]
        if not same:
            raise RaNNCError(
                f"submodules or parameters of `{self.path or 'the model'}` were replaced after the "
                "model had been placed",
                hint="change the model before its first call, or wrap it anew",
            )


class Form:
    """The form of one model, told from others by a number that is equal on all ranks."""

    def __init__(self, model: torch.nn.Module) -> None:
        """Takes the model as it is."""
        self._parts = [_Part(path, module) for path, module in model.named_modules()]
        self._model = model
        self._last: dict[int, list[Any]] = {}
        self._digest = 0

    def digest(self, whole: Container[int] = ()) -> int:
        """The number of the form that the model has now.

        Args:
            whole: identities of submodules that run as they are.

        Raises:
            RaNNCError: when submodules or parameters were replaced, or a hook or a process group
                cannot work.
        """
        found: dict[int, list[Any]] = {}
        for index, part in enumerate(self._parts):
            part.check()
            if id(part.module) not in whole:
                found[index] = part.values()
        if found != self._last:
            check_module_hooks(self._model)
            check_groups(self._model)
            self._tell(found)
            self._last = found
            self._digest = _number(repr(found))
        return self._digest

    def settle(self, left: Left) -> bool:
        """Takes note of what a form's calls leave in attributes; whether that is news."""
        news = False
        for part in self._parts:
            state = {name for path, name in left.state if path == part.path}
            written = {n for path, n in [*left.written, *left.counted] if path == part.path}
            news |= part.settle(state, written)
        if news:
            self._last = {}
        return news

    def _tell(self, found: dict[int, list[Any]]) -> None:
        changed = [
            name
            for index, now in found.items()
            if index in self._last
            for name in self._parts[index].changed(self._last[index], now)
        ]
        if changed:
            logger.warning(
                "`%s` has changed since the last call; with each new value of an attribute the "
                "model is captured again, so do not keep what changes in every step in one",
                "`, `".join(changed[:3]),
            )


def _number(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")
