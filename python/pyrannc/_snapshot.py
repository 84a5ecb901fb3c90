"""All that the places of a model hold at one time, to put it back.

A forward may assign to attributes and change what they hold: a new value for a buffer, a tensor
kept for inspection, a counter, a list that grows. A new value for a buffer belongs to the graph.
Everything else is put back as it was, as the exporter's tensors must not stay on the user's model.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import IOBase
from typing import TYPE_CHECKING, Any

import torch

from . import _watched
from ._places import (
    GONE,
    Absent,
    Content,
    Item,
    Place,
    Root,
    dotted,
    fields,
    is_container,
    is_plain,
)  # fmt: skip
from .errors import CaptureError

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Mapping

_LEAVES = frozenset({
    bool, int, float, complex, str, bytes, type(None), torch.Tensor, torch.nn.Parameter,
    torch.dtype, torch.device, torch.Size, Absent, type, type(len), type(lambda: 0),
})  # fmt: skip
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_PARTS = {"_parameters": "parameter", "_modules": "submodule"}
_TORCHS = frozenset(torch.nn.Module().__dict__) - {"training"}


class UnsettledError(CaptureError):
    """Occurs when a forward makes or replaces parts of the model."""


@dataclass(frozen=True, slots=True)
class Changes:
    """What one forward changed.

    Attributes:
        values: new values, by place.
        hooked: whether it added or removed hooks.
        iterators: those which it may have advanced.
    """

    values: dict[Place, Any] = field(default_factory=dict)
    hooked: bool = False
    iterators: Mapping[Place, Any] = field(default_factory=dict)

    @property
    def any(self) -> bool:
        """Whether it may have changed anything."""
        return bool(self.values or self.hooked or self.iterators)

    @property
    def lasting(self) -> Mapping[Place, Any]:
        """New values without private notes that hooks are there, which are put back like these."""
        if not self.hooked:
            return self.values
        return {place: value for place, value in self.values.items() if str(place[-1])[0] != "_"}

    @property
    def outside(self) -> dict[Place, Any]:
        """New values outside of the model."""
        return {place: new for place, new in self.values.items() if isinstance(place[0], Root)}

    def within(self, paths: Iterable[str]) -> Changes:
        """Those of some submodules and of what they hold."""
        outer = [path + "." if path else "" for path in paths]

        def inside(values: Mapping[Place, Any]) -> dict[Place, Any]:
            return {
                place: value
                for place, value in values.items()
                if isinstance(place[0], str)
                and any((place[0] + ".").startswith(path) for path in outer)
            }

        return Changes(inside(self.values), self.hooked, inside(self.iterators))

    def touch(self, place: Place) -> bool:
        """Whether it changed what is there, something in it, or what that is in."""
        return any(changed[: len(place)] == place[: len(changed)] for changed in self.values)


class Snapshot:
    """What some modules hold, and what that holds in turn.

    Objects of the user's are looked at when something asks them, until `restore` is called.

    Attributes:
        read: places in such objects that were read.
    """

    def __init__(
        self, modules: Iterable[tuple[str, torch.nn.Module]], outside: Iterable[Root] = ()
    ) -> None:
        """Takes the modules as they are, by their paths, and what is outside of the model."""
        self.read: set[Place] = set()
        self._buffers: list[_Buffers] = []
        self._parts: list[_Parts] = []
        self._held: list[_Held] = []
        self._tensors: list[tuple[Place, torch.Tensor, int]] = []
        self._iterators: dict[Place, Any] = {}
        self._watched: dict[int, tuple[Any, Place]] = {}
        self._untouched: set[int] = set()
        modules = list(modules)
        self._seen = {id(module) for _, module in modules}
        for path, module in modules:
            self._hold_module(path, module)
        for root in outside:
            self._held.append(_Outside(root))
            self._visit((root, "value"), root.value)
        _watched.listen(self)

    def touched(self, watched: Any, name: str | None) -> None:
        """Takes note of what an object holds before something is done with it."""
        key = id(watched)
        if key not in self._watched:
            return
        place = self._watched[key][1]
        if key in self._untouched:
            self._untouched.remove(key)
            self._hold_object(place, watched)
        own = fields(watched)
        if name == "__dict__":
            self.read.update((*place, other) for other in own)
        elif name in own:
            self.read.add((*place, name))

    def _hold_module(self, path: str, module: torch.nn.Module) -> None:
        self._buffers.append(_Buffers(path, module))
        self._parts.append(_Parts(path, module))
        torchs = type(module).__module__.startswith("torch.")
        quiet = {n for n in module.__dict__ if n in _TORCHS or (torchs and n[0] == "_")}
        self._held.append(_Fields((path,), module, quiet))
        for name, value in module.__dict__.items():
            if name in quiet:
                if isinstance(value, (dict, list, set)) and name not in (*_PARTS, "_buffers"):
                    self._held.append(_Books((path, name), value))
            else:
                self._visit((path, name), value)

    def _hold_object(self, place: Place, holder: Any) -> None:
        self._held.append(_Fields(place, holder, frozenset()))
        for name, value in list(fields(holder).items()):
            self._visit((*place, name), value)

    def _visit(self, place: Place, value: Any) -> None:
        if type(value) is torch.Tensor and not value.is_inference():
            self._tensors.append((place, value, value._version))
        if type(value) in _LEAVES:
            return
        if isinstance(value, tuple):
            self._visit_items(place, enumerate(value))
            return
        if id(value) in self._seen:
            return
        self._seen.add(id(value))
        if is_container(value):
            self._held.append(_Container(place, value))
            if isinstance(value, dict):
                self._visit_items(place, value.items())
            elif isinstance(value, list):
                self._visit_items(place, enumerate(value))
        elif _watched.can_be_watched(value) and _watched.watch(value):
            self._watched[id(value)] = value, place
            self._untouched.add(id(value))
        elif _watched.is_namespace(value):
            self._hold_object(place, value)
        elif isinstance(value, Iterator) and not isinstance(value, IOBase):
            self._iterators[place] = value

    def _visit_items(self, place: Place, items: Iterable[tuple[Any, Any]]) -> None:
        for key, value in items:
            self._visit((*place, Item(key)), value)

    def check_tensors(self) -> None:
        """Looks whether tensors that are no buffers were written to.

        Raises:
            CaptureError: if so.
        """
        for place, tensor, version in self._tensors:
            if tensor._version != version:
                raise written_to(dotted(place))

    def keep_buffers(self) -> None:
        """Writes what was assigned to buffers into them.

        Raises:
            CaptureError: when a forward made or replaced parts of the model that are to be placed.
        """
        for parts in self._parts:
            parts.check()
        shared = Counter(place for buffers in self._buffers for place in buffers.identities())
        for buffers in self._buffers:
            buffers.keep({identity for identity, places in shared.items() if places > 1})

    def restore(self) -> Changes:
        """Puts everything back; tells what had changed."""
        self._end()
        values: dict[Place, Any] = {}
        hooked = False
        for held in [*self._parts, *self._buffers, *self._held]:
            for place, value in held.restore().items():
                if place[-1] in _HOOKS:
                    hooked = True
                elif not any(place[:length] in values for length in range(2, len(place))):
                    values[place] = value
        return Changes(values, hooked, self._iterators)

    def _end(self) -> None:
        _watched.ignore(self)
        for value, _ in self._watched.values():
            _watched.unwatch(value)
        self._watched.clear()


class _Fields:
    """The attributes of a module or object."""

    def __init__(self, place: Place, holder: Any, quiet: Iterable[str]) -> None:
        self._place = place
        self._holder = holder
        self._quiet = quiet
        self._before = dict(fields(holder))

    def restore(self) -> dict[Place, Any]:
        """Puts them back; tells what other values they had."""
        now, before = fields(self._holder), self._before
        found: dict[Place, Any] = {}
        for name in {**before, **now}:
            value, former = now.get(name, GONE), before.get(name, GONE)
            if value is former:
                continue
            if name not in self._quiet and not _equal(value, former):
                found[(*self._place, name)] = value
            if former is GONE:
                now.pop(name, None)
            else:
                now[name] = former
        return found


class _Outside:
    """What a name outside of the model stands for."""

    def __init__(self, root: Root) -> None:
        self._root = root
        self._before = root.value

    def restore(self) -> dict[Place, Any]:
        """Has it stand for that again; tells what else it stood for."""
        value, former = self._root.value, self._before
        if value is former:
            return {}
        self._root.put(former)
        return {} if _equal(value, former) else {(self._root, "value"): value}


class _Container:
    """The content of a container."""

    def __init__(self, place: Place, container: Any) -> None:
        self._place = place
        self._container = container
        self._before = Content.of(container)

    def restore(self) -> dict[Place, Any]:
        """Puts it back; tells what other content it had.

        That is item by item where there are as many in a list, or the same keys in a dictionary.
        """
        now = Content.of(self._container)
        if _alike(now.items, self._before.items):
            return {}
        self._before.pour(self._container)
        place, items, before = self._place, now.items, self._before.items
        if isinstance(items, dict) and isinstance(before, dict) and [*items] == [*before]:
            pairs: Iterable[Any] = [(key, items[key], before[key]) for key in items]
        elif isinstance(self._container, list) and len(items) == len(before):
            pairs = zip(range(len(items)), items, before, strict=True)
        else:
            return {place: now}
        return {(*place, Item(key)): new for key, new, old in pairs if not same(new, old)}


class _Books(_Container):
    """How one of PyTorch's modules keeps its books; only of hooks it tells."""

    def restore(self) -> dict[Place, Any]:
        """Puts it back; tells of hooks."""
        found = super().restore()
        return {self._place: None} if found and self._place[-1] in _HOOKS else {}


class _Buffers:
    """The buffers of a module."""

    def __init__(self, path: str, module: torch.nn.Module) -> None:
        self._path = path
        self._module = module
        self._before = dict(module._buffers)
        self._shapes = {n: b.shape for n, b in self._before.items() if b is not None}

    def identities(self) -> list[int]:
        """Identities of the buffers that there were."""
        return [id(buffer) for buffer in self._before.values() if buffer is not None]

    def keep(self, shared: Container[int]) -> None:
        """Writes what was assigned to them into them, unless others have them, too."""
        buffers = self._module._buffers
        for name, before in self._before.items():
            now = buffers.get(name)
            if before is None or (now is before and now.shape == self._shapes[name]):
                continue
            if now is None or now.shape != self._shapes[name]:
                shape = "nothing" if now is None else f"a tensor of shape {[*now.shape]}"
                raise CaptureError(
                    f"forward leaves {shape} in the buffer `{dotted((self._path, name))}`, which "
                    f"has the shape {[*self._shapes[name]]}",
                    hint="register it with the shape that it needs, and use parts of it",
                )
            if id(before) in shared:
                raise CaptureError(
                    f"forward assigns to `{dotted((self._path, name))}`, a buffer that has other "
                    "names, too, which would go on with the former one",
                    hint="write into it, with `copy_` for instance",
                )
            with torch.no_grad():
                before.copy_(now)
            buffers[name] = before
        for name, now in buffers.items():
            persistent = name not in self._module._non_persistent_buffers_set
            if now is not None and persistent and self._before.get(name) is None:
                raise UnsettledError(
                    f"forward makes the buffer `{dotted((self._path, name))}`, which state "
                    "dictionaries would have from then on",
                    hint="register it in __init__, or with persistent=False",
                )

    def restore(self) -> dict[Place, Any]:
        """Puts them back; tells which were made."""
        now = dict(self._module._buffers)
        self._module._buffers.clear()
        self._module._buffers.update(self._before)
        return {
            (self._path, name): value
            for name, value in now.items()
            if value is not None and self._before.get(name) is None
        }


class _Parts:
    """The parameters and submodules of a module, which a forward must leave alone."""

    def __init__(self, path: str, module: torch.nn.Module) -> None:
        self._path = path
        self._held = [(name, module.__dict__[name], dict(module.__dict__[name])) for name in _PARTS]

    def check(self) -> None:
        """Refuses changes."""
        for kind, now, before in self._held:
            for name in {**before, **now}:
                if now.get(name) is not before.get(name):
                    raise UnsettledError(
                        f"forward makes or replaces the {_PARTS[kind]} "
                        f"`{dotted((self._path, name))}`, which is to have its place before, and "
                        "not in the model's first call alone",
                        hint="create it in __init__; where forward changes the model for another "
                        "kind of input, let that be the model's first",
                    )

    def restore(self) -> dict[Place, Any]:
        """Puts them back."""
        for _, now, before in self._held:
            if not _alike(now, before):
                now.clear()
                now.update(before)
        return {}


_Held = _Fields | _Outside | _Container | _Buffers | _Parts


def written_to(name: str) -> CaptureError:
    """The error for a forward that writes into a tensor of the model's that is no buffer."""
    return CaptureError(
        f"forward writes into the tensor `{name}`, which is no buffer: a model that runs in parts "
        "does not know where to keep it",
        hint="register it as a buffer, with persistent=False if state dictionaries should not "
        "have it",
    )


@contextlib.contextmanager
def unchanged(model: torch.nn.Module) -> Iterator[None]:
    """Puts everything back as it was before the body."""
    before = Snapshot(model.named_modules())
    try:
        yield
    finally:
        before.restore()


def _alike(one: Any, other: Any) -> bool:
    """Whether two contents are the same, in the same order."""
    if isinstance(one, bytes):
        return bool(one == other)
    if len(one) != len(other):
        return False
    if isinstance(one, dict):
        one, other = list(one.items()), list(other.items())
    return all(map(same, one, other))


def same(one: Any, other: Any) -> bool:
    """Whether this is the same value, or the same content in the same order."""
    if isinstance(one, Content) and isinstance(other, Content):
        return _alike(one.items, other.items)
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one is other or _equal(one, other)


def begins_with(content: Content, first: Content) -> bool:
    """Whether a list begins with what another one holds."""
    return len(content.items) >= len(first.items) and all(map(same, first.items, content.items))


def _equal(one: Any, other: Any) -> bool:
    return is_plain(one) and type(one) is type(other) and bool(one == other)
