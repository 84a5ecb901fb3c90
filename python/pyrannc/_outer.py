"""Numbers, flags and texts outside of a model that its code reads: globals, closures, classes.

What a forward finds there is constant in a captured model, as what it finds in attributes is. The
names are those that occur in the code of the model's classes and of the functions which that code
names in turn; that may be more than a forward reads, but not less where it asks for them by name.
"""

from __future__ import annotations

import sys
import types
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ._places import GONE, Content, is_plain

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

_MOST_FUNCTIONS = 2000
_MOST_ITEMS = 1000
_NOT_LOOKED_INTO = frozenset(sys.stdlib_module_names) - {"__main__"} | {"torch", "numpy", "pyrannc"}


@dataclass(frozen=True, eq=False, slots=True)
class Name:
    """A global, a variable of a closure, or an attribute of a class.

    Attributes:
        name: what the code calls it.
        where: the module's globals, the cell, or the class.
    """

    name: str
    where: Any

    @property
    def value(self) -> Any:
        """What it stands for; `GONE` for nothing."""
        if isinstance(self.where, dict):
            return self.where.get(self.name, GONE)
        if isinstance(self.where, type):
            return vars(self.where).get(self.name, GONE)
        try:
            return self.where.cell_contents
        except ValueError:
            return GONE

    def now(self) -> Any:
        """What that is, or what it contains."""
        value = self.value
        return Content.of(value) if isinstance(value, (list, dict, set)) else value

    def restore(self, value: Any) -> None:
        """Has it be what `now` told."""
        if isinstance(value, Content):
            value.pour(self.value)
        elif isinstance(self.where, dict):
            self.where[self.name] = value
        elif isinstance(self.where, type):
            setattr(self.where, self.name, value)
        else:
            self.where.cell_contents = value


def outer_names(model: torch.nn.Module) -> list[Name]:
    """The names outside of a model by which its code may find numbers, flags and texts."""
    kinds = [kind for kind in _classes_of(model) if not _is_foreign(kind)]
    of_classes = [Name(name, kind) for kind in kinds for name in vars(kind) if name[:2] != "__"]
    waiting = list(_functions_of(model, kinds))
    seen = {id(function) for function in waiting}
    found = {(id(name.where), name.name): name for name in of_classes if _counts(name.value)}
    while waiting and len(seen) < _MOST_FUNCTIONS:
        for name in _names_in(waiting.pop()):
            value = name.value
            if isinstance(value, types.FunctionType):
                if id(value) not in seen and not _is_foreign(value):
                    seen.add(id(value))
                    waiting.append(value)
            elif _counts(value):
                found[id(name.where), name.name] = name
    return list(found.values())


def _classes_of(model: torch.nn.Module) -> dict[type, None]:
    return {kind: None for module in model.modules() for kind in type(module).__mro__}


def _functions_of(model: torch.nn.Module, kinds: list[type]) -> Iterator[types.FunctionType]:
    members = [member for kind in kinds for member in vars(kind).values()]
    members += [value for module in model.modules() for value in vars(module).values()]
    for member in members:
        function = getattr(member, "fget", None) or getattr(member, "__func__", member)
        function = getattr(function, "__wrapped__", function)
        if isinstance(function, types.FunctionType) and not _is_foreign(function):
            yield function


def _is_foreign(code: Any) -> bool:
    home = code.__name__ if isinstance(code, types.ModuleType) else code.__module__
    return str(home).partition(".")[0] in _NOT_LOOKED_INTO


def _names_in(function: types.FunctionType) -> Iterator[Name]:
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=False):
        yield Name(name, cell)
    codes = [function.__code__]
    while codes:
        code = codes.pop()
        codes += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
        for text in code.co_names:
            if text in function.__globals__ and text[:2] != "__":
                yield Name(text, function.__globals__)
                module = function.__globals__[text]
                if isinstance(module, types.ModuleType) and not _is_foreign(module):
                    inside = vars(module)
                    yield from (Name(name, inside) for name in code.co_names if name in inside)


def _counts(value: Any) -> bool:
    if isinstance(value, (list, set, dict)):
        items = [*value, *value.values()] if isinstance(value, dict) else value
        return len(value) <= _MOST_ITEMS and all(map(is_plain, items))
    return is_plain(value)
