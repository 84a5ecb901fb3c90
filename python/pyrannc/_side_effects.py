"""What a call does to the places of a model, other than what it computes."""

from __future__ import annotations

import contextlib
from collections import OrderedDict, deque
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeAlias

from ._numbers import PinnedError, check_apart
from ._places import (
    GONE,
    Absent,
    Place,
    dotted,
    get,
    holder_of,
    is_plain,
    leaves,
    put,
    revealed,
    value_at,
    walk,
)  # fmt: skip
from ._sizes import evaluated, expression_text, is_variable, names_in
from ._snapshot import Snapshot
from .errors import ExecutionError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import torch

    from ._sizes import Symbols
    from ._snapshot import Changes

_MOST_STEPS = 64
"""Whose beginning is remembered while their backwards may still compute something again."""

Modules: TypeAlias = "Sequence[tuple[str, torch.nn.Module]]"
"""A submodule and all inside it, by their paths in the model."""


@dataclass(frozen=True, slots=True)
class Added:
    """What a call adds to a list or set."""

    items: tuple[Any, ...]

    def extend(self, found: Any) -> None:
        """Adds it, if there is one."""
        if isinstance(found, (list, deque)):
            found.extend(self.items)
        elif isinstance(found, set):
            found.update(self.items)


@dataclass(frozen=True, slots=True)
class Computed:
    """A value that depends on numbers which the call was given.

    Attributes:
        expression: of these numbers.
    """

    expression: str


@dataclass(frozen=True, slots=True)
class Left:
    """What a call leaves; values may be `Computed`.

    Attributes:
        state: new values of numbers, flags and texts on which the next call depends, too.
        written: new values of others, which change nothing that is computed.
        counted: by how much others grow.
        absent: attributes that hold what is not kept after a call.
        kept: stand-ins for what is left outside of the model, where others may hold the same
            container: new items of lists and sets (`Added`), and what is new elsewhere.
    """

    state: Mapping[Place, Any] = field(default_factory=dict)
    written: Mapping[Place, Any] = field(default_factory=dict)
    counted: Mapping[Place, Any] = field(default_factory=dict)
    absent: tuple[Place, ...] = ()
    kept: Mapping[Place, Any] = field(default_factory=dict)

    def with_part(self, other: Left) -> Left:
        """What a call leaves in all, where a part of the model leaves something, too."""
        return Left(
            {**self.state, **other.state},
            {**self.written, **other.written},
            {**self.counted, **other.counted},
            (*self.absent, *(place for place in other.absent if place not in self.absent)),
            {**self.kept, **other.kept},
        )

    def with_symbols(
        self, values: Mapping[Place, Any], symbols: Symbols, before: Mapping[Place, Any]
    ) -> Left:
        """The same, as far as it depends on numbers that were symbols in a forward.

        Args:
            values: what that forward changed.
            symbols: translates these.
            before: the numbers that were there, or symbols.

        Raises:
            PinnedError: when nobody can follow.
        """
        computed: dict[Place, Computed] = {}
        for place, value in values.items():
            if place[:2] in self.absent:
                continue
            expression = symbols.expression(value)
            inside = [names_in(symbols.expression(leaf)) for leaf in leaves(value)]
            if any(inside) and (place in self.kept or not is_variable(expression)):
                raise PinnedError(set[str]().union(*inside))
            if place in self.counted:
                expression = expression - symbols.expression(before[place])
            if is_variable(expression):
                check_apart(expression)
                computed[place] = Computed(expression_text(expression))

        def new(known: Mapping[Place, Any]) -> dict[Place, Any]:
            return {place: computed.get(place, value) for place, value in known.items()}

        return replace(
            self, state=new(self.state), written=new(self.written), counted=new(self.counted)
        )

    @property
    def followed(self) -> list[Place]:
        """Where the new value is known."""
        return [*self.state, *self.written, *self.counted]

    def apply(self, model: torch.nn.Module, numbers: Mapping[str, float] | None = None) -> None:
        """Changes what the model holds as a call of the bare model does.

        Args:
            model: the model.
            numbers: what the call was given, by the names in expressions.
        """
        for place in self.followed:
            holder = holder_of(model, place)
            if holder is not GONE:
                put(holder, place[-1], self.expected(place, get(holder, place[-1]), numbers))
        for place in self.absent:
            before = value_at(model, place)
            if type(before) is not Absent:
                put(holder_of(model, place), place[-1], Absent(place, before))
        for place, value in self.kept.items():
            holder = holder_of(model, place)
            if holder is not GONE and isinstance(value, Added):
                value.extend(get(holder, place[-1]))
            elif holder is not GONE:
                put(holder, place[-1], value)

    def expected(
        self, place: Place, before: Any, numbers: Mapping[str, float] | None = None
    ) -> Any:
        """What a call makes of what was there."""

        def value(told: Any) -> Any:
            is_computed = isinstance(told, Computed)
            return evaluated(told.expression, numbers or {}) if is_computed else told

        for known in (self.state, self.written):
            if place in known:
                return value(known[place])
        if place in self.counted and isinstance(before, (int, float)):
            return before + value(self.counted[place])
        return before


class Rewinding:
    """Has every microbatch of a step find what modules hold as the step began.

    What a call leaves in the end, `Left` says.
    """

    def __init__(self, parts: Sequence[Modules], left: Left | None = None) -> None:
        """For modules that run as they are.

        Args:
            parts: the modules.
            left: what a call leaves in them.
        """
        self._modules = {path: module for part in parts for path, module in part}
        self._left = left
        self._followed = [] if left is None else left.followed
        self._followed = [place for place in self._followed if place[0] in self._modules]
        self._began: OrderedDict[int, dict[Place, Any]] = OrderedDict()

    @contextlib.contextmanager
    def of(self, step: int, *, check: bool = False) -> Iterator[None]:
        """Runs the body with what the modules held when a step, by its seed, began.

        Args:
            step: the seed.
            check: whether to look if the body leaves what was told.

        Raises:
            ExecutionError: if it does not.
            CaptureError: if it writes into tensors that are no buffers.
        """
        if not self._modules:
            yield
            return
        with revealed(self._modules.values()):
            now = self._plain()
            began = self._began.setdefault(step, now)
            if len(self._began) > _MOST_STEPS:
                self._began.popitem(last=False)
            self._set(began)
            before = Snapshot(self._modules.items())
            try:
                yield
                if check:
                    before.check_tensors()
            finally:
                changes = before.restore()
                self._set(now)
        if check and self._left is not None:
            self._check(began, changes)

    def _plain(self) -> dict[Place, Any]:
        """The numbers, flags and texts that the modules hold."""
        found: dict[Place, Any] = {
            (path, name): value
            for path, module in self._modules.items()
            for name, value in module.__dict__.items()
            if is_plain(value) and name != "training"
        }
        for place in self._followed:
            holder = self._holder(place)
            found[place] = GONE if holder is GONE else get(holder, place[-1])
        return found

    def _set(self, values: Mapping[Place, Any]) -> None:
        for place, value in values.items():
            holder = self._holder(place)
            if holder is not GONE and get(holder, place[-1]) is not value:
                put(holder, place[-1], value)

    def _holder(self, place: Place) -> Any:
        return walk(self._modules[place[0]], place[1:-1])

    def _check(self, began: Mapping[Place, Any], changes: Changes) -> None:
        assert self._left is not None
        changed = changes.values
        for place in {**dict.fromkeys(self._followed), **changes.lasting}:
            if place[:2] in self._left.absent:
                continue
            before = began.get(place, GONE)
            found, told = changed.get(place, before), self._left.expected(place, before)
            if found is not told and not (is_plain(found) and found == told):
                was = f"became {found!r}" if is_plain(found) else "changed"
                raise ExecutionError(
                    f"`{dotted(place)}` {was} in a part of the model that runs as it is, and when "
                    "it was captured nothing told so: a model that runs in parts cannot follow "
                    "what depends on the content of tensors",
                    hint="have forward return it, or register it as a buffer",
                )
