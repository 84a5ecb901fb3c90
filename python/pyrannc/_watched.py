"""Objects of the user's that tell what is done with their attributes.

A model may hold an object that holds half the program: a trainer, a data set. What of it a forward
reads or changes is known without looking through all of it: while somebody listens, the object is
of a class of the same name that says which attribute is asked for.
"""

from __future__ import annotations

import enum
import functools
import sys
import types
from typing import Any, Protocol

import torch

from ._places import has_fields

_HEAP_TYPE = 1 << 9
"""Of classes that Python code defines, whose instances may be given another one (`tp_flags`)."""

_CLASS = object.__dict__["__class__"]
_listeners: list[Listener] = []
_held: dict[int, list[Any]] = {}
_unwatchable: set[type] = set()


class Listener(Protocol):
    """Hears of objects that are watched."""

    def touched(self, watched: Any, name: str | None) -> None:
        """An attribute is going to be read; with `None`, attributes are going to be changed."""


def can_be_watched(value: object) -> bool:
    """Whether its class is one of the user's whose instances keep what they have in attributes."""
    kind = type(value)
    return (
        bool(kind.__flags__ & _HEAP_TYPE)
        and kind not in _unwatchable
        and has_fields(value)
        and not isinstance(value, _NOT_WATCHED)
        and kind.__module__.partition(".")[0] not in _OTHERS
    )


_NOT_WATCHED = (
    type, types.ModuleType, torch.nn.Module, torch.Tensor,
    enum.Enum, int, float, complex, str, bytes,
)  # fmt: skip
_OTHERS = frozenset(sys.stdlib_module_names) - {"__main__", "argparse", "dataclasses", "types"} | {
    "torch",
    "numpy",
    "pyrannc",
}


def watch(value: Any) -> bool:
    """Has an object tell from now on; `unwatch` as often. Whether it can."""
    held = _held.get(id(value))
    if held is not None:
        held[1] += 1
        return True
    kind: Any = type(value)
    try:
        _CLASS.__set__(value, _watched(kind))
    except Exception:
        _unwatchable.add(kind)
        return False
    _held[id(value)] = [value, 1, kind]
    return True


def unwatch(value: Any) -> None:
    """Has it be as it was, if nobody else watches it."""
    held = _held[id(value)]
    held[1] -= 1
    if held[1] == 0:
        del _held[id(value)]
        _CLASS.__set__(value, held[2])


def listen(listener: Listener) -> None:
    """Has a listener hear of all that are watched."""
    _listeners.append(listener)


def ignore(listener: Listener) -> None:
    """Has it hear no more."""
    _listeners.remove(listener)


def _tell(watched: Any, name: str | None) -> None:
    for listener in tuple(_listeners):
        listener.touched(watched, name)


class _Unregistered:
    """Keeps a base class from hearing that it has another subclass."""

    __slots__ = ()

    def __init_subclass__(cls) -> None:
        """Tells nobody."""


@functools.cache
def _watched(kind: Any) -> type:
    """A class like another one, whose instances tell."""

    def __getattribute__(self: Any, name: str) -> Any:
        _tell(self, name)
        return kind.__getattribute__(self, name)

    def __setattr__(self: Any, name: str, value: Any) -> None:
        _tell(self, None)
        kind.__setattr__(self, name, value)

    def __delattr__(self: Any, name: str) -> None:
        _tell(self, None)
        kind.__delattr__(self, name)

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        held = type(self)
        _CLASS.__set__(self, kind)
        try:
            return self.__reduce_ex__(protocol)
        finally:
            _CLASS.__set__(self, held)

    members = {
        "__slots__": (),
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
        "__class__": property(lambda _: kind),
        "__getattribute__": __getattribute__,
        "__setattr__": __setattr__,
        "__delattr__": __delattr__,
        "__reduce_ex__": __reduce_ex__,
    }

    def mro(cls: type) -> list[type]:
        return [cls, _Unregistered, *kind.__mro__]

    quiet = type(type(kind).__name__, (type(kind),), {"mro": mro})
    made: type = quiet(kind.__name__, (kind,), members)
    return made


def is_namespace(value: object) -> bool:
    """Whether it keeps things in attributes and nothing else, but cannot be watched."""
    return isinstance(value, types.SimpleNamespace) or type(value) in _unwatchable
