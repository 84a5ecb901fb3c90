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
import logging
import weakref
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from . import _watched
from ._outer import outer_names
from ._places import GONE, Item, Place, dotted, fields, original, value_at
from .batch_norm import check_groups
from .errors import RaNNCError
from .guards import is_guard
from .hooks import check_module_hooks

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable, Mapping, Sequence

    from ._side_effects import Left
    from .comm import Communicator

logger = logging.getLogger(__name__)

_PLAIN = frozenset((bool, int, float, str, type(None)))
_TORCHS = frozenset(torch.nn.Module().__dict__)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_BY_NAME = (
    enum.Enum, int, float, complex, str, bytes, range, slice, np.generic, torch.dtype, torch.device
)  # fmt: skip
_MOST_BYTES = 1 << 20
_MOST_SHOWN = 80
_READ, _OUTER = -1, -2
"""Where what was read of objects, and what is outside of the model, stands among the parts."""


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
        self._last: dict[int, list[Any]] = {}
        self._agreed: dict[str, Any] = {}
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
        ]
        if found != self._last:
            check_module_hooks(self._model)
            check_groups(self._model)
            self._tell(found)
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
        """Takes note that what other ranks have in other ways changes nothing that is computed."""
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

    def settle(self, left: Left, read: Iterable[Place]) -> bool:
        """Takes note of what a form's calls read and leave; whether that is news."""
        changed = self._changed | {*left.written, *left.counted, *left.kept}
        wanted = sorted({*self._read, *read} - changed, key=repr)
        if changed == self._changed and wanted == [*self._read]:
            return False
        self._changed = changed
        self._outer = [name for name in self._outer if (name, "value") not in changed]
        self._read = dict.fromkeys(wanted)
        for part in self._parts:
            part.settle(frozenset(place for place in changed if place[0] == part.path))
        self._last = {}
        return True

    def _tell(self, found: dict[int, list[Any]]) -> None:
        changed = [
            name
            for index, now in found.items()
            if index in self._last and index >= 0
            for name in self._parts[index].changed(self._last[index], now)
        ]
        for index, names in (
            (_READ, map(dotted, self._read)),
            (_OUTER, [n.name for n in self._outer]),
        ):
            before = self._last.get(index, found[index])
            triples = zip(names, before, found[index], strict=False)
            changed += [name for name, former, now in triples if former != now]
        if changed:
            logger.warning(
                "`%s` has changed since the last call; with each new value of an attribute the "
                "model is captured again, so do not keep what changes in every step in one",
                "`, `".join(changed[:3]),
            )


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
