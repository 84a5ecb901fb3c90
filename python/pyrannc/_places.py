"""Where something of a model is kept: in attributes of modules, and in what these hold.

A model may keep numbers in dictionaries, tensors in lists, settings in an object. Each has a place:
the way to it from the model, by names of attributes and keys of containers.
"""

from __future__ import annotations

import contextlib
import copy
import enum
import pickle
import random
from collections import OrderedDict, deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple, NoReturn, TypeAlias

import numpy as np
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from .errors import CaptureError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, MutableMapping

_PLAIN = (bool, int, float, str, type(None))
_MANY = 1000


class Item(NamedTuple):
    """A step of the way into a container: a key of a dictionary, or an index."""

    key: Any


Place: TypeAlias = tuple[Any, ...]
"""The path of a module, the name of one of its attributes, and steps into what it holds.

Outside of the model: a `Root`, `"value"`, and steps into what that stands for.
"""


class Root:
    """Where a way begins that does not begin at a module: a name by which code finds something."""

    __slots__ = ()

    name: str

    @property
    def is_fixed(self) -> bool:
        """Whether code holds what it stands for, and finds nothing else in its place."""
        return False

    @property
    def value(self) -> Any:
        """What it stands for; `GONE` for nothing."""
        raise NotImplementedError

    def put(self, value: Any) -> None:
        """Has it stand for something else; `GONE` for nothing."""
        raise NotImplementedError


class Gone(enum.Enum):
    """Stands for what is not there."""

    GONE = "gone"


GONE: Final = Gone.GONE


_CONTAINERS = (dict, list, set, deque)
_GENERATORS = (random.Random, np.random.Generator, np.random.RandomState, torch.Generator)


def is_container(value: object) -> bool:
    """Whether it has a content that may change: other things, or the state of random numbers."""
    return isinstance(value, (*_CONTAINERS, *_GENERATORS))


@dataclass(frozen=True, slots=True)
class Content:
    """What a container holds, apart from the container.

    Attributes:
        items: a dictionary, a list of what is in a sequence or set, or a generator's state.
    """

    items: dict[Any, Any] | list[Any] | bytes

    @classmethod
    def of(cls, container: Any) -> Content:
        """A container's content."""
        if isinstance(container, _GENERATORS):
            return cls(_state(container))
        return cls(dict(container) if isinstance(container, dict) else list(container))

    def pour(self, container: Any) -> None:
        """Makes it the content of a container of its kind."""
        if isinstance(self.items, bytes):
            _set_state(container, pickle.loads(self.items))
        elif isinstance(container, dict):
            kind = OrderedDict if isinstance(container, OrderedDict) else dict
            kind.clear(container)
            kind.update(container, self.items)
        elif isinstance(container, set):
            container.clear()
            container.update(self.items)
        else:
            container.clear()
            container.extend(self.items)


def _state(generator: Any) -> bytes:
    if isinstance(generator, random.Random):
        return pickle.dumps(generator.getstate())
    if isinstance(generator, np.random.Generator):
        return pickle.dumps(generator.bit_generator.state)
    if isinstance(generator, np.random.RandomState):
        return pickle.dumps(generator.get_state())
    with _disable_current_modes(), torch._C.DisableTorchFunction():
        return pickle.dumps(generator.get_state().numpy().tobytes())


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, random.Random):
        generator.setstate(state)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, np.random.RandomState):
        generator.set_state(state)
    else:
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            generator.set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))


def num_items(value: object) -> int:
    """How many items a content has; 0 for anything else."""
    return len(value.items) if isinstance(value, Content) else 0


def is_plain(value: object) -> bool:
    """Whether this is a number, flag or text, or a tuple of such."""
    if isinstance(value, tuple):
        return all(is_plain(item) for item in value)
    return type(value) in _PLAIN


def dotted(place: Place) -> str:
    """The name that a user knows a place by."""
    path, *steps = place
    text = str(path)
    if isinstance(path, Root):
        text, steps = path.name, steps[1:]
    for step in steps:
        text += f"[{step.key!r}]" if isinstance(step, Item) else f".{step}"
    return text.removeprefix(".")


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
        place: where that is.
        before: what was there before any call; `GONE` if nothing was.
    """

    place: Place
    before: Any

    def __init__(self, place: Place, before: Any) -> None:
        object.__setattr__(self, "place", place)
        object.__setattr__(self, "before", before)

    def __repr__(self) -> str:
        """What it stands for."""
        return f"<what forward left in `{dotted(self.place)}`>"

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy of what was there before, if anything was."""
        return self if self.before is GONE else copy.deepcopy(self.before, memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """What was there before, if anything was."""
        if self.before is GONE:
            return Absent, (self.place, GONE)
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


class UnreturnedError(CaptureError, AttributeError):
    """Occurs when a result is used that a model which runs in parts cannot return."""


class Unreturned(Absent):
    """Stands for a result that may hold tensors unseen; whatever is done with it is an error."""

    def __init__(self, name: str, kind: str) -> None:
        super().__init__((name,), kind)

    def __repr__(self) -> str:
        """What it stands for."""
        return f"<a {self.before}, which is not returned>"

    def __str__(self) -> str:
        """The same, as printing results is no use of them."""
        return repr(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """The same."""
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        """The same."""
        return Unreturned, (*self.place, self.before)


def _use(absent: Absent, *_: object) -> NoReturn:
    if isinstance(absent, Unreturned):
        raise UnreturnedError(
            f"`{dotted(absent.place)}` is a {absent.before}, which a model that runs in parts does "
            "not return, as it may hold tensors unseen",
            hint="have forward return tensors in tuples, lists, dicts or dataclasses",
        )
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


class _Slots(dict[str, Any]):
    """The attributes of an object that has slots for them."""

    def __init__(self, holder: Any) -> None:
        super().__init__()
        for name in (name for kind in type(holder).__mro__ for name in _slots(kind)):
            with contextlib.suppress(AttributeError):
                super().__setitem__(name, object.__getattribute__(holder, name))
        self._holder = holder

    def __setitem__(self, name: str, value: Any) -> None:
        object.__setattr__(self._holder, name, value)

    def pop(self, name: str, default: Any = None) -> Any:
        """Takes an attribute away."""
        if name in self:
            object.__delattr__(self._holder, name)
        return default


def _slots(kind: type) -> tuple[str, ...]:
    names = kind.__dict__.get("__slots__", ())
    return (names,) if isinstance(names, str) else tuple(names)


def has_fields(value: object) -> bool:
    """Whether this is an object that keeps things in attributes."""
    kind = type(value)
    return kind is not Absent and (kind.__dictoffset__ != 0 or any(map(_slots, kind.__mro__)))


def fields(holder: Any) -> MutableMapping[str, Any]:
    """The attributes of an object, without asking the object."""
    if type(holder).__dictoffset__ == 0:
        return _Slots(holder)
    found: dict[str, Any] = object.__getattribute__(holder, "__dict__")
    return found


def get(holder: Any, step: Any) -> Any:
    """What an object or container holds at a step of the way; `GONE` where nothing is."""
    if isinstance(holder, Root):
        return holder.value
    if not isinstance(step, Item):
        return fields(holder).get(step, GONE)
    if isinstance(holder, dict):
        return dict.get(holder, step.key, GONE)
    if not isinstance(holder, (list, tuple)):
        return GONE
    return holder[step.key] if 0 <= step.key < len(holder) else GONE


def put(holder: Any, step: Any, value: Any) -> None:
    """Has an object or container hold something there; `GONE` for nothing."""
    if isinstance(value, Content):
        value.pour(get(holder, step))
        return
    if isinstance(holder, Root):
        holder.put(value)
        return
    target = holder if isinstance(step, Item) else fields(holder)
    key = step.key if isinstance(step, Item) else step
    if value is GONE:
        target.pop(key, None)
    else:
        target[key] = value


def walk(holder: Any, steps: Iterable[Any]) -> Any:
    """What is at the end of a way; `GONE` where it ends before."""
    for step in steps:
        holder = get(holder, step)
        if not isinstance(holder, (*_CONTAINERS, tuple)) and not has_fields(holder):
            return GONE
    return holder


def holder_of(model: torch.nn.Module, place: Place) -> Any:
    """What holds a place's value; `GONE` where the way to it ends before."""
    if isinstance(place[0], Root):
        return walk(place[0], place[1:-1])
    try:
        module = model.get_submodule(place[0])
    except AttributeError:
        return GONE
    return walk(module, place[1:-1])


def value_at(model: torch.nn.Module, place: Place) -> Any:
    """What is there; `GONE` where nothing is."""
    holder = holder_of(model, place)
    return GONE if holder is GONE else get(holder, place[-1])


@contextlib.contextmanager
def replaced(model: torch.nn.Module, values: Mapping[Place, Any]) -> Iterator[None]:
    """Has other values in places while the body runs."""
    held = [(holder_of(model, place), place[-1], value) for place, value in values.items()]
    before = []
    try:
        for holder, step, value in held:
            current = get(holder, step)
            before.append(Content.of(current) if isinstance(value, Content) else current)
            put(holder, step, value)
        yield
    finally:
        for (holder, step, _), value in zip(held, before, strict=False):
            put(holder, step, value)


def later(value: Any, by: float) -> Any:
    """What a value that one call left might be after many more, a number more by `by`."""
    if isinstance(value, Content):
        return Content(later(value.items, by))
    if isinstance(value, list) and value:
        return value + value[-1:] * _MANY
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return value + by
    return value


def leaves(value: Any) -> list[Any]:
    """All that is in a value made of containers."""
    items = value.items if isinstance(value, Content) else value
    if isinstance(items, (deque, set)):
        items = list(items)
    found: list[Any] = pytree.tree_leaves(items, is_leaf=lambda leaf: leaf is None)
    return found


def holds_tensors(value: Any) -> bool:
    """Whether there is a tensor in it."""
    return any(isinstance(leaf, torch.Tensor) for leaf in leaves(value))


def with_leaves(value: Any, change: Any) -> Any:
    """The value with something else for each tensor in it."""
    if isinstance(value, Content):
        return Content(with_leaves(value.items, change))
    return pytree.tree_map(
        lambda leaf: change(leaf) if isinstance(leaf, torch.Tensor) else leaf, value
    )


def reveal(modules: Iterable[torch.nn.Module]) -> list[tuple[Any, Absent]]:
    """Puts back what was there before any call; returns what stood for it, and on which module."""
    hidden = [
        (module, value)
        for module in modules
        for value in module.__dict__.values()
        if type(value) is Absent
    ]
    for module, absent in hidden:
        put(module, absent.place[-1], absent.before)
    return hidden


@contextlib.contextmanager
def revealed(modules: Iterable[torch.nn.Module]) -> Iterator[None]:
    """Has in the body what was there before any call."""
    hidden = reveal(modules)
    try:
        yield
    finally:
        for module, absent in hidden:
            put(module, absent.place[-1], absent)


@contextlib.contextmanager
def revealed_outside(roots: Iterable[Root]) -> Iterator[None]:
    """Has in the body what was there before any call, outside of a model."""
    curtain = _Curtain()
    for root in roots:
        curtain.open(root, "value", root.value)
    try:
        yield
    finally:
        curtain.close()


class _Curtain:
    """Takes what stands for something away from what is outside of a model, and puts it back."""

    def __init__(self) -> None:
        self._places: list[tuple[Any, Any, Any]] = []
        self._seen: set[int] = set()

    def open(self, holder: Any, step: Any, value: Any) -> None:
        """Puts back what was there before, in what is at a step of a way and all in it."""
        if type(value) is Absent:
            self._put(holder, step, value, value.before)
            return
        if id(value) in self._seen or isinstance(value, (torch.nn.Module, torch.Tensor)):
            return
        self._seen.add(id(value))
        if isinstance(value, (list, deque)):
            items = [item for item in value if type(item) is not Absent]
            if len(items) < len(value):
                self._put(holder, step, Content.of(value), Content(items))
        if isinstance(value, dict):
            inside: Iterable[Any] = [(Item(key), item) for key, item in value.items()]
        elif isinstance(value, list):
            inside = [(Item(index), item) for index, item in enumerate(value)]
        else:
            inside = fields(value).items() if has_fields(value) else ()
        for way, item in list(inside):
            if type(item) is Absent or isinstance(item, _CONTAINERS):
                self.open(value, way, item)

    def close(self) -> None:
        """Undoes it."""
        for holder, step, before in reversed(self._places):
            put(holder, step, before)

    def _put(self, holder: Any, step: Any, before: Any, value: Any) -> None:
        self._places.append((holder, step, before))
        put(holder, step, value)
