"""What of a model's modules, apart from their modes, a capture takes as given.

What the attributes of modules hold is constant in a captured model, and what forward hooks do to
tensors is part of it. So a model whose attributes or hooks have changed since is captured again. Of
objects of the user's only those attributes count that a forward has read. So do globals that the
model's code names. What forward itself changes, where that changes nothing that is computed, does
not count. Parts that were left whole do not count: they run as they are. Submodules and parameters,
however, were placed, and must stay the same objects.
"""

from __future__ import annotations

import enum
import hashlib
import weakref
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from . import _watched
from ._numbers import Number
from ._outer import outer_names
from ._places import GONE, Item, Place, dotted, fields, original, value_at
from ._structure import is_number
from .batch_norm import check_groups
from .errors import RaNNCError
from .guards import is_guard
from .hooks import check_module_hooks

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable, Mapping, Sequence

    from ._side_effects import Left
    from .comm import Communicator

_PLAIN = frozenset((bool, int, float, str, type(None)))
_TORCHS = frozenset(torch.nn.Module().__dict__)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_BY_NAME = (
    enum.Enum, int, float, complex, str, bytes, range, slice, np.generic, torch.dtype, torch.device
)  # fmt: skip
_MOST_BYTES = 1 << 20
_MOST_SHOWN = 80
_READ, _OUTER, _FREE = -1, -2, -3
"""Where what was read of objects, what is outside of the model, and numbers that may have any value
stand among the parts.
"""
_DEPTH = 6
"""How far into containers numbers are looked for that may change."""


class _Identities:
    """Numbers for things that are told apart only by being the same one.

    Processes that do the same give the same numbers.
    """

    def __init__(self) -> None:
        self._known: dict[int, tuple[Any, int]] = {}
        self._next = 0

    def number(self, thing: Any) -> int:
        """The number of a thing."""
        known = self._known.get(id(thing))
        if known is not None and known[0]() is thing:
            return known[1]
        self._next += 1
        reference: Callable[[], Any]
        try:
            reference = weakref.ref(thing)
        except TypeError:  # it stays alive, so that no other one gets its identity
            reference = partial(_itself, thing)
        self._known[id(thing)] = reference, self._next
        return self._next


def _itself(thing: Any) -> Any:
    return thing


class _History:
    """Numbers values by when they were first seen in their place.

    So values that are others on other processes, but stay so, do not tell these apart.
    """

    def __init__(self) -> None:
        self._seen: dict[Any, dict[str, int]] = {}

    def number(self, place: Any, value: Any) -> Any:
        """The number of a value."""
        seen = self._seen.setdefault(place, {})
        return seen.setdefault(repr(value), len(seen))


class _Values(_History):
    """Leaves values as they are."""

    def number(self, place: Any, value: Any) -> Any:
        """The value."""
        del place
        return value


class _Print:
    """Describes values so that equal descriptions mean that a forward finds the same."""

    def __init__(self, identities: _Identities) -> None:
        self._identities = identities
        self._begun: dict[int, Any] = {}

    def of(self, value: Any, place: Place, unless: Container[Place]) -> Any:
        """The description of a value, but for what is in some places."""
        value = original(value)
        if type(value) in _PLAIN:
            return value
        if isinstance(value, tuple):
            return self._items(enumerate(value), place, unless)
        if isinstance(value, np.ndarray) and value.nbytes <= _MOST_BYTES:
            return hashlib.blake2b(
                repr((value.dtype, value.shape)).encode() + value.tobytes()
            ).hexdigest()
        if id(value) in self._begun:
            return self._begun[id(value)]
        self._begun[id(value)] = len(self._begun)
        found = self._look_into(value, place, unless)
        self._begun[id(value)] = found
        return found

    def _look_into(self, value: Any, place: Place, unless: Container[Place]) -> Any:
        if isinstance(value, dict):
            return self._items(value.items(), place, unless)
        if isinstance(value, (list, deque)):
            return self._items(enumerate(value), place, unless)
        if isinstance(value, (set, frozenset)):
            return sorted(map(repr, value))
        if isinstance(value, _BY_NAME):
            return f"{type(value).__qualname__} {value!r}"
        if _watched.is_namespace(value):
            return self._items(fields(value).items(), place, unless)
        if _watched.can_be_watched(value):
            return type(value).__qualname__
        return ("#", self._identities.number(value))

    def _items(self, items: Iterable[Any], place: Place, unless: Container[Place]) -> list[Any]:
        return [
            (repr(key), self.of(value, (*place, Item(key)), unless))
            for key, value in items
            if (*place, Item(key)) not in unless
        ]


class _Part:
    """One module, and which of its attributes count, so that looking again is quick."""

    def __init__(self, path: str, module: torch.nn.Module) -> None:
        self.path = path
        self.module = module
        self._attributes = module.__dict__
        self._torchs = type(module).__module__.startswith("torch.")
        self._children = list(module._modules.values())
        self._parameters = [id(parameter) for parameter in module._parameters.values()]
        self._changed: frozenset[Place] = frozenset()
        self._look()

    def settle(self, changed: frozenset[Place]) -> None:
        """Takes note of places that forwards change and that do not count."""
        self._changed = changed
        self._look()

    def _look(self) -> None:
        self._size = len(self._attributes)
        self._names = [name for name in self._attributes if self._counts(name)]

    def _counts(self, name: str) -> bool:
        if name in _TORCHS or (self._torchs and name[0] == "_"):
            return False
        return (self.path, name) not in self._changed

    def values(self, prints: _Print, history: _History) -> list[Any]:
        """What the attributes hold, and how many hooks there are."""
        attributes = self._attributes
        if len(attributes) != self._size:
            self._look()
        found = []
        for name in self._names:
            value = attributes.get(name)
            if type(value) not in _PLAIN:
                value = prints.of(value, (self.path, name), self._changed)
            if name[0] == "_":
                value = history.number((self.path, name), value)
            found.append(value)
        kinds = [attributes[kind] for kind in _HOOKS]
        if any(kinds):
            counts = [sum(not is_guard(hook) for hook in hooks.values()) for hooks in kinds]
            found += counts if any(counts) else []  # guards alone are as no hooks
        return found

    def named(self, values: list[Any]) -> dict[str, tuple[Any, str]]:
        """By attribute what `values` told, and the value as a text; hooks are one of them."""
        prefix = f"{self.path}." if self.path else ""
        found = {
            prefix + name: (value, _shown(self._attributes.get(name)))
            for name, value in zip(self._names, values, strict=False)
        }
        hooks = values[len(self._names) :]
        return {**found, f"{prefix}hooks": (hooks, f"{sum(hooks)} hooks")} if hooks else found

    def numbers(self) -> dict[Number, float]:
        """The numbers that the attributes hold."""
        found: dict[Place, float] = {}
        for name in self._names:
            _find_numbers(self._attributes.get(name), (self.path, name), found)
        return {
            Number(dotted(place), place=place): value
            for place, value in found.items()
            if place not in self._changed
        }

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
        self._identities = _Identities()
        self._outer = outer_names(model)
        self._history = _History()
        self._read: dict[Place, None] = {}
        self._changed: frozenset[Place] = frozenset()
        self._free: list[Place] = []
        self._last: dict[int, list[Any]] = {}
        self._agreed: dict[str, Any] = {}
        self._captured: dict[int, list[Any]] = {}
        self._digest = 0

    def digest(self, whole: Container[int] = ()) -> int:
        """The number of the form that the model has now.

        Args:
            whole: identities of submodules that run as they are.

        Raises:
            RaNNCError: when submodules or parameters were replaced, or a hook or a process group
                cannot work.
        """
        prints = _Print(self._identities)
        found: dict[int, list[Any]] = {}
        for index, part in enumerate(self._parts):
            part.check()
            if id(part.module) not in whole:
                found[index] = part.values(prints, self._history)
        found[_READ] = [
            self._history.number(
                place, prints.of(value_at(self._model, place), place, self._changed)
            )
            for place in self._read
        ]
        found[_OUTER] = [
            self._history.number(index, prints.of(name.value, (name, "value"), self._changed))
            for index, name in enumerate(self._outer)
            if (name, "value") not in self._changed
        ]
        found[_FREE] = [self._kind(place, prints) for place in self._free]
        if found != self._last:
            check_module_hooks(self._model)
            check_groups(self._model)
            self._last = found
            self._digest = _number(repr(found))
        return self._digest

    def differences(self, comm: Communicator) -> str:
        """What attributes hold on some ranks and not on others, for a message; collective.

        What has not changed since `agreed` does not count.
        """
        mine = self._described()
        news = {name for name, (number, _) in mine.items() if self._agreed.get(name) != number}
        gathered = comm.all_gather_objects((mine, news))
        changed = {name for _, names in gathered for name in names}
        return _differences([one for one, _ in gathered], changed)

    def agreed(self) -> None:
        """Takes note that the model was captured as it is now.

        What other ranks have in other ways changes nothing that is computed.
        """
        self._captured = self._last
        self._agreed = {name: number for name, (number, _) in self._described().items()}

    def _described(self) -> dict[str, tuple[Any, str]]:
        """By name what attributes and globals hold now, to compare and to show."""
        prints, values = _Print(self._identities), _Values()
        found: dict[str, tuple[Any, str]] = {}
        for index in self._last:
            if index >= 0:
                part = self._parts[index]
                found |= part.named(part.values(prints, values))
        for place in self._read:
            value = value_at(self._model, place)
            found[dotted(place)] = prints.of(value, place, self._changed), _shown(value)
        for name in self._outer:
            value = prints.of(name.value, (name, "value"), self._changed)
            found[f"{name.name} (outside of the model)"] = value, _shown(name.value)
        return found

    def _kind(self, place: Place, prints: _Print) -> Any:
        """What of a number counts that may have any value: that it is one."""
        value = value_at(self._model, place)
        if is_number(value):
            return type(value).__name__
        return prints.of(value, place, ())

    def numbers(self, whole: Container[int] = ()) -> dict[Number, float]:
        """All numbers that count, and whose value may change as the model runs.

        Args:
            whole: identities of submodules that run as they are.
        """
        found: dict[Number, float] = {}
        for part in self._parts:
            if id(part.module) not in whole:
                found |= part.numbers()
        for place in self._read:
            value = value_at(self._model, place)
            if is_number(value):
                found[Number(dotted(place), place=place)] = value
        outer: dict[Place, float] = {}
        for name in self._outer:
            if not name.is_fixed:
                _find_numbers(name.value, (name, "value"), outer)
        for place, value in outer.items():
            if place not in self._changed:
                found[Number(dotted(place), place=place)] = value
        return found

    def release(self, numbers: Iterable[Number]) -> None:
        """Has only the kind of some numbers count from now on."""
        self._free = [number.place for number in numbers if number.place is not None]
        self._exclude(self._changed.union(self._free), self._read)

    def settle(self, left: Left, read: Iterable[Place]) -> bool:
        """Takes note of what a form's calls read and leave; whether that is news."""
        return self._exclude(
            self._changed | {*left.written, *left.counted, *left.kept}, {*self._read, *read}
        )

    def _exclude(self, changed: frozenset[Place], read: Iterable[Place]) -> bool:
        """Has some places not count; whether that is news."""
        wanted = sorted({*read} - changed, key=repr)
        if changed == self._changed and wanted == [*self._read]:
            return False
        self._changed = changed
        self._outer = [name for name in self._outer if (name, "value") not in changed]
        self._read = dict.fromkeys(wanted)
        for part in self._parts:
            part.settle(frozenset(place for place in changed if place[0] == part.path))
        self._last = {}
        return True

    def changed(self) -> list[str]:
        """Names of what has another value than at the last capture."""
        changed = [
            name
            for index, now in self._last.items()
            if index in self._captured and index >= 0
            for name in self._parts[index].changed(self._captured[index], now)
        ]
        outer = [name.name for name in self._outer if (name, "value") not in self._changed]
        for index, names in ((_READ, [*map(dotted, self._read)]), (_OUTER, outer)):
            before, now = self._captured.get(index, []), self._last.get(index, [])
            if len(before) == len(now):
                triples = zip(names, before, now, strict=False)
                changed += [name for name, former, value in triples if former != value]
        return changed


def _find_numbers(value: Any, place: Place, found: dict[Place, float]) -> None:
    """Finds the numbers in a value that can be replaced there."""
    if is_number(value):
        found[place] = value
        return
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, dict):
        items = [(Item(key), item) for key, item in value.items()]
    elif isinstance(value, list):
        items = [(Item(index), item) for index, item in enumerate(value)]
    elif _watched.is_namespace(value):
        items = fields(value).items()
    if len(place) < _DEPTH:
        for step, item in items:
            _find_numbers(item, (*place, step), found)


def _shown(value: Any) -> str:
    """A value as a short text for messages."""
    if value is GONE:
        return "not there"
    text = repr(value)
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."


def _differences(
    described: Sequence[Mapping[str, tuple[Any, str]]], wanted: Container[str], most: int = 3
) -> str:
    lines = []
    for name in dict.fromkeys(name for one in described for name in one):
        values = [one.get(name, (None, "not there")) for one in described]
        other = next((r for r, value in enumerate(values) if value[0] != values[0][0]), None)
        if other is not None and name in wanted:
            lines.append(
                f"`{name}` is {values[0][1]} on rank 0 and {values[other][1]} on rank {other}"
            )
    more = f" and {len(lines) - most} more" if len(lines) > most else ""
    return "; ".join(lines[:most]) + more


def _number(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")
