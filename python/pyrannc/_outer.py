"""Numbers, flags and texts outside of a model that its code reads: globals, closures, classes.

What a forward finds there is constant in a captured model, as what it finds in attributes is. The
names are those that occur in the code of the model's classes and of the functions which that code
names in turn; that may be more than a forward reads, but not less where it asks for them by name.
"""

from __future__ import annotations

import functools
import sys
import types
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.modules import module as module_hooks

from . import _watched
from ._places import GONE, Absent, Root, is_container, is_plain, leaves

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_MOST_FUNCTIONS = 2000
_MOST_ITEMS = 1000
_SIZED = (list, dict, set, deque)
_CODE = (types.FunctionType, types.MethodType, functools.partial)
_NOT_LOOKED_INTO = frozenset(sys.stdlib_module_names) - {"__main__"} | {"torch", "numpy", "pyrannc"}


@dataclass(slots=True)
class _Hook:
    """Something that is (a part of) a hook; nobody replaces it."""

    part: Any


@dataclass(frozen=True, eq=False, slots=True)
class Name(Root):
    """A global, a variable of a closure, an attribute of a class, or a part of a hook.

    Attributes:
        name: what the code calls it.
        where: the module's globals, the cell, the class, or the part.
    """

    name: str
    where: Any = field(repr=False)

    def __eq__(self, other: object) -> bool:
        """Whether it is the same name in the same place."""
        return isinstance(other, Name) and self._key == other._key

    def __hash__(self) -> int:
        """That of the name."""
        return hash(self.name)

    @property
    def _key(self) -> tuple[str, int]:
        return self.name, id(self.where.part if isinstance(self.where, _Hook) else self.where)

    @property
    def is_fixed(self) -> bool:
        """Whether it is a part of a hook."""
        return isinstance(self.where, _Hook)

    @property
    def value(self) -> Any:
        """What it stands for; `GONE` for nothing."""
        if isinstance(self.where, _Hook):
            return self.where.part
        if isinstance(self.where, dict):
            return self.where.get(self.name, GONE)
        if isinstance(self.where, type):
            return vars(self.where).get(self.name, GONE)
        try:
            return self.where.cell_contents
        except ValueError:
            return GONE

    def put(self, value: Any) -> None:
        """Has it stand for something else; `GONE` for nothing."""
        if isinstance(self.where, _Hook):
            self.where.part = value
        elif isinstance(self.where, types.CellType):
            if value is GONE:
                del self.where.cell_contents
            else:
                self.where.cell_contents = value
        elif isinstance(self.where, dict):
            if value is GONE:
                self.where.pop(self.name, None)
            else:
                self.where[self.name] = value
        elif value is GONE:
            delattr(self.where, self.name)
        else:
            setattr(self.where, self.name, value)


def outer_names(model: torch.nn.Module) -> list[Name]:
    """The names outside of a model by which its code may find numbers, flags and texts."""
    return [name for name in _names_of(model) if _counts(name.value)]


def outer_roots(model: torch.nn.Module) -> list[Name]:
    """The names outside of a model by which its code or hooks may keep something."""
    return [name for name in _names_of(model) if _may_keep(name)]


def _names_of(model: torch.nn.Module) -> list[Name]:
    kinds = [kind for kind in _classes_of(model) if not _is_foreign(kind)]
    search = _Search(Name(name, kind) for kind in kinds for name in vars(kind) if name[:2] != "__")
    for function in _functions_of(model, kinds):
        search.take(function)
    for hook in _hooks_of(model):
        search.take(hook)
    return search.all_names()


class _Search:
    """Goes through code, what it names, and what that names in turn."""

    def __init__(self, names: Iterable[Name]) -> None:
        self._names = dict.fromkeys(names)
        self._seen: set[int] = set()
        self._waiting: list[types.FunctionType] = []

    def all_names(self) -> list[Name]:
        """The names that all code taken so far may look up."""
        while self._waiting and len(self._seen) < _MOST_FUNCTIONS:
            for name in _names_in(self._waiting.pop()):
                value = name.value
                if isinstance(value, _CODE):
                    self.take(value)
                    continue
                self._names[name] = None
                if isinstance(value, (dict, list, tuple)) and len(value) <= _MOST_ITEMS:
                    for item in leaves(value):  # such as functions by name
                        if isinstance(item, _CODE):
                            self.take(item)
        return list(self._names)

    def take(self, part: Any) -> None:
        """Takes a function, or something that is called and what it consists of."""
        if id(part) in self._seen:
            return
        self._seen.add(id(part))
        if isinstance(part, functools.partial):
            parts = [part.func, *part.args, *part.keywords.values()]
        elif isinstance(part, types.MethodType):
            parts = [part.__self__, part.__func__]
        elif isinstance(part, types.BuiltinMethodType):  # such as `list.append` of one
            parts = [part.__self__]
        elif isinstance(part, types.FunctionType):
            if _is_foreign(part):
                return
            self._waiting.append(part)
            parts = [*(part.__defaults__ or ()), *(part.__kwdefaults__ or {}).values()]
        elif isinstance(part, (torch.nn.Module, types.ModuleType, type)):
            return
        else:
            parts = [getattr(type(part), "__call__", None)]  # noqa: B004 - of the class, not bound
            self._names[Name(type(part).__name__, _Hook(part))] = None
            parts = [call for call in parts if isinstance(call, types.FunctionType)]
        for inner in parts:
            self.take(inner)


def _hooks_of(model: torch.nn.Module) -> Iterator[Any]:
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            yield from hooks.values()
    yield from module_hooks._global_forward_pre_hooks.values()
    yield from module_hooks._global_forward_hooks.values()


def _classes_of(model: torch.nn.Module) -> dict[type, None]:
    return {kind: None for module in model.modules() for kind in type(module).__mro__}


def _functions_of(model: torch.nn.Module, kinds: list[type]) -> Iterator[types.FunctionType]:
    members = [member for kind in kinds for member in vars(kind).values()]
    members += [value for module in model.modules() for value in vars(module).values()]
    for member in (member for member in members if type(member) is not Absent):
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


def _may_keep(name: Name) -> bool:
    """Whether a name stands for something that changes, or for what may hold such things."""
    value = name.value
    if isinstance(value, torch.Tensor) or type(value) is Absent or is_plain(value):
        return True
    if is_container(value):
        library = isinstance(name.where, dict) and _is_library(name.where.get("__name__"))
        return not isinstance(value, _SIZED) or (
            len(value) <= _MOST_ITEMS and (not library or all(map(_is_simple, leaves(value))))
        )
    return _watched.can_be_watched(value) and not _is_library(type(value).__module__)


def _is_simple(value: Any) -> bool:
    return is_plain(value) or isinstance(value, torch.Tensor) or type(value) is Absent


def _is_library(module: str | None) -> bool:
    """Whether a module is installed rather than the user's own."""
    file = getattr(sys.modules.get(module or ""), "__file__", None) or ""
    return "site-packages" in file or "dist-packages" in file
