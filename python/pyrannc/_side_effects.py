"""What a forward leaves on its modules, made harmless for capture.

A forward may assign to attributes: a new value for a buffer, a tensor kept for inspection, a
counter. A new value for a buffer belongs to the graph. Everything else is put back as it was, as
the exporter's tensors must not stay on the user's model; what becomes of it after a call, `Left`
says.
"""

from __future__ import annotations

import contextlib
import copy
from collections import OrderedDict, defaultdict
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

import torch
from torch.utils import _pytree as pytree

from .errors import CaptureError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

Place: TypeAlias = tuple[str, str]
"""The path of a module, and the name of one of its attributes."""

_PLAIN = (bool, int, float, str, type(None))
_CONTAINERS = (dict, OrderedDict, defaultdict, list, set)
_OWN = ("_parameters", "_modules", "_buffers")
_MOST_STEPS = 64
"""Whose beginning is remembered while their backwards may still compute something again."""
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def is_plain(value: object) -> bool:
    """Whether this is a number, flag or text, or a tuple of such."""
    if isinstance(value, tuple):
        return all(is_plain(item) for item in value)
    return type(value) in _PLAIN


def dotted(place: Place) -> str:
    """The name that a user knows an attribute by."""
    return ".".join(part for part in place if part)


class AbsentError(CaptureError):
    """Occurs when something that is absent is used.

    Attributes:
        place: what it is.
    """

    def __init__(self, place: Place) -> None:
        self.place = place
        super().__init__(
            f"`{dotted(place)}` is what the model's forward left there, which a model that runs in "
            "parts does not keep",
            hint="have forward return it, or register it as a buffer",
        )


class Absent:
    """Stands for what a forward leaves in an attribute; whatever is done with it is an error.

    But a copy of the model has what was there before.

    Attributes:
        place: the attribute.
        before: what was there before any call.
    """

    def __init__(self, place: Place, before: Any) -> None:
        self.__dict__["place"] = place
        self.__dict__["before"] = before

    def __repr__(self) -> str:
        """What it stands for."""
        return f"<what forward left in `{dotted(self.place)}`>"

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy of what was there before."""
        return copy.deepcopy(self.before, memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """What was there before."""
        return original, (self.before,)

    def __getattr__(self, name: str) -> NoReturn:
        """Refused; raises :class:`AbsentError`."""
        del name
        _use(self)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Refused; raises :class:`AbsentError`."""
        del func, types
        for leaf in pytree.tree_leaves((args, kwargs)):
            if isinstance(leaf, cls):
                _use(leaf)
        return NotImplemented


def _use(absent: Absent, *_: object) -> NoReturn:
    raise AbsentError(absent.place)


_USES = (
    "bool", "int", "float", "index", "complex", "len", "iter", "next", "contains", "getitem",
    "setitem", "call", "eq", "ne", "lt", "le", "gt", "ge", "neg", "pos", "abs", "invert", "add",
    "radd", "iadd", "sub", "rsub", "isub", "mul", "rmul", "imul", "truediv", "rtruediv",
    "itruediv", "floordiv", "rfloordiv", "mod", "rmod", "pow", "rpow", "matmul", "rmatmul", "and",
    "rand", "or", "ror", "xor", "rxor", "lshift", "rshift", "format", "str", "hash", "setattr",
    "delattr",
)  # fmt: skip
for _name in _USES:
    setattr(Absent, f"__{_name}__", _use)


def original(value: Any) -> Any:
    """The value, or what was there before it."""
    return value.before if type(value) is Absent else value


def reveal(model: torch.nn.Module) -> dict[Place, Absent]:
    """Puts back what was there before any call; returns what stood for it."""
    hidden = {
        (path, name): value
        for path, module in model.named_modules()
        for name, value in module.__dict__.items()
        if type(value) is Absent
    }
    for place, value in hidden.items():
        _attributes(model, place)[place[1]] = value.before
    return hidden


@contextlib.contextmanager
def revealed(model: torch.nn.Module) -> Iterator[None]:
    """Has in the body what was there before any call."""
    hidden = reveal(model)
    try:
        yield
    finally:
        for place, value in hidden.items():
            _attributes(model, place)[place[1]] = value


@contextlib.contextmanager
def unchanged(model: torch.nn.Module) -> Iterator[None]:
    """Puts all attributes back as they were before the body."""
    before = Snapshot(model)
    try:
        yield
    finally:
        before.restore()


@contextlib.contextmanager
def replaced(model: torch.nn.Module, values: Mapping[Place, Any]) -> Iterator[None]:
    """Has other values in attributes while the body runs."""
    before = {place: _attributes(model, place).get(place[1], _NOTHING) for place in values}
    try:
        for place, value in values.items():
            _attributes(model, place)[place[1]] = value
        yield
    finally:
        for place, value in before.items():
            if value is _NOTHING:
                _attributes(model, place).pop(place[1], None)
            else:
                _attributes(model, place)[place[1]] = value


_NOTHING = object()


def value_at(model: torch.nn.Module, place: Place) -> Any:
    """An attribute's value; `None` where there is none."""
    return _attributes(model, place).get(place[1])


def _attributes(model: torch.nn.Module, place: Place) -> dict[str, Any]:
    return model.get_submodule(place[0]).__dict__


@dataclass(frozen=True, slots=True)
class Left:
    """What a call leaves in attributes.

    Attributes:
        state: new values of numbers, flags and texts on which the next call depends, too.
        written: new values of others, which change nothing that is computed.
        counted: by how much others grow, which change nothing either.
        absent: attributes that hold what is not kept after a call.
        constants: attributes whose changes are lost.
    """

    state: Mapping[Place, Any] = field(default_factory=dict)
    written: Mapping[Place, Any] = field(default_factory=dict)
    counted: Mapping[Place, Any] = field(default_factory=dict)
    absent: tuple[Place, ...] = ()
    constants: tuple[Place, ...] = ()

    def unfollowed(self) -> Left:
        """The same for a part that no capture tells what becomes of its state."""
        return replace(self, state={}, constants=(*self.constants, *self.state))

    def with_part(self, other: Left) -> Left:
        """What a call leaves in all, where a part of the model leaves something, too."""
        return Left(
            {**self.state, **other.state},
            {**self.written, **other.written},
            {**self.counted, **other.counted},
            self.absent + other.absent,
            self.constants + other.constants,
        )

    def apply(self, model: torch.nn.Module) -> None:
        """Changes the attributes as a call of the bare model does, as far as that is known."""
        for place, value in [*self.state.items(), *self.written.items()]:
            _attributes(model, place)[place[1]] = value
        for place, growth in self.counted.items():
            _attributes(model, place)[place[1]] += growth
        for place in self.absent:
            attributes = _attributes(model, place)
            before = attributes.get(place[1])
            if type(before) is not Absent:
                attributes[place[1]] = Absent(place, before)


@dataclass(frozen=True, slots=True)
class Changes:
    """What one forward changed.

    Attributes:
        values: new values of attributes.
        contents: containers among the attributes whose content it changed.
        hooked: whether it added or removed hooks.
    """

    values: Mapping[Place, Any] = field(default_factory=dict)
    contents: tuple[Place, ...] = ()
    hooked: bool = False

    def within(self, paths: Iterable[str]) -> Changes:
        """Those of some submodules and of what they hold."""
        outer = [path + "." if path else "" for path in paths]

        def inside(place: Place) -> bool:
            return any((place[0] + ".").startswith(path) for path in outer)

        return Changes(
            {place: value for place, value in self.values.items() if inside(place)},
            tuple(place for place in self.contents if inside(place)),
            self.hooked,
        )

    @property
    def places(self) -> list[Place]:
        """Where."""
        return [*self.values, *self.contents]

    @property
    def any(self) -> bool:
        """Whether it changed anything."""
        return bool(self.values or self.contents or self.hooked)


class Snapshot:
    """The attributes of all submodules at one time."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._modules = [
            (name, module, dict(module.__dict__), dict(module._buffers), _contents(module))
            for name, module in model.named_modules()
        ]

    def keep_buffers(self) -> None:
        """Writes what was assigned to buffers into them."""
        for _, module, _, buffers, _ in self._modules:
            for name, buffer in buffers.items():
                current = module._buffers.get(name)
                if buffer is not None and current is not None and current is not buffer:
                    with torch.no_grad():
                        buffer.copy_(current)
                    module._buffers[name] = buffer

    def restore(self) -> Changes:
        """Puts all attributes back; tells what had changed."""
        values: dict[Place, Any] = {}
        contents: list[Place] = []
        hooked = False
        for path, module, attributes, buffers, containers in self._modules:
            for name, value in list(module.__dict__.items()):
                before = attributes.get(name, _NOTHING)
                if value is before:
                    continue
                own = name[0] == "_" and type(module).__module__.startswith("torch.")
                if not own and not (
                    is_plain(value) and type(value) is type(before) and value == before
                ):
                    values[path, name] = value
                if before is _NOTHING:
                    del module.__dict__[name]
                else:
                    module.__dict__[name] = before
            module.__dict__.update(attributes)
            for name, before in containers.items():
                if _put_back(attributes[name], before) and (name in _HOOKS or name[0] != "_"):
                    hooked |= name in _HOOKS
                    contents += [] if name in _HOOKS else [(path, name)]
            module._buffers.clear()
            module._buffers.update(buffers)
        return Changes(values, tuple(contents), hooked)


class Rewinding:
    """Has every microbatch of a step find the attributes with which the step began.

    What a call leaves in them in the end, `Left` says.
    """

    def __init__(self, modules: Sequence[torch.nn.Module]) -> None:
        """For modules that run as they are and change their attributes."""
        self._modules = modules
        self._began: OrderedDict[int, list[Snapshot]] = OrderedDict()

    @contextlib.contextmanager
    def of(self, step: int) -> Iterator[None]:
        """Runs the body with the attributes that a step, by its seed, began with."""
        if not self._modules:
            yield
            return
        now = [Snapshot(module) for module in self._modules]
        for snapshot in self._began.setdefault(step, now):
            snapshot.restore()
        if len(self._began) > _MOST_STEPS:
            self._began.popitem(last=False)
        try:
            yield
        finally:
            for snapshot in now:
                snapshot.restore()


def _contents(module: torch.nn.Module) -> dict[str, Any]:
    """Copies of the containers among a module's attributes."""
    return {
        name: value.copy()
        for name, value in module.__dict__.items()
        if type(value) in _CONTAINERS and name not in _OWN
    }


def _put_back(container: Any, before: Any) -> bool:
    """Gives a container its former content; whether it had another."""
    if isinstance(container, dict):
        items, former = list(container.items()), list(before.items())
    else:
        items, former = list(container), list(before)
    if len(items) == len(former) and all(map(_same, items, former)):
        return False
    container.clear()
    container.update(before) if isinstance(container, (dict, set)) else container.extend(before)
    return True


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return one is other or _equal(one, other)


def _equal(one: Any, other: Any) -> bool:
    return is_plain(one) and type(one) is type(other) and bool(one == other)


def _is_torchs_own(module: torch.nn.Module, name: str) -> bool:
    """Whether an attribute is how one of PyTorch's modules keeps its books."""
    return name[0] == "_" and type(module).__module__.startswith("torch.")


def stand_ins(value: Any) -> Any:
    """The value with zeros for its tensors; `None` if one of these depends on the batch size."""
    leaves, structure = pytree.tree_flatten(value)
    made = []
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor):
            if any(not isinstance(size, int) for size in leaf.shape):
                return None
            zeros = torch.zeros([*leaf.shape], dtype=leaf.dtype, device=leaf.device)
            made.append(zeros)
        else:
            made.append(leaf)
    return pytree.tree_unflatten(made, structure)


def holds_tensors(value: Any) -> bool:
    """Whether there is a tensor in it."""
    return any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(value))
