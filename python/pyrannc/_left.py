"""Finds out what the places that a forward changes are to the next one.

A captured model does not run the user's code again, so what its forward would do to attributes and
what they hold is done for it: it depends on whether the next forward reads them, and on whether
that changes what it computes. Both are tried out with something else in their places.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from ._places import (
    GONE,
    Absent,
    AbsentError,
    Content,
    Item,
    Place,
    Root,
    dotted,
    holds_tensors,
    is_plain,
    later,
    leaves,
    replaced,
    value_at,
    with_leaves,
)  # fmt: skip
from ._side_effects import Added, Left
from ._snapshot import begins_with, same
from .errors import CaptureError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from ._snapshot import Changes

Outcome: TypeAlias = "tuple[Changes, object]"
"""What a forward changed, and something that is equal where it computes the same."""

_FAR = 1_000_003
"""How much a counter is put forward to see whether something happens when it has become large."""


class Results:
    """What a real forward gave; equal where the numbers are, but for rounding."""

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        """Takes the tensors."""
        self._tensors = [tensor.detach() for tensor in tensors]

    def __eq__(self, other: object) -> bool:
        """Whether another forward gave the same."""
        if not isinstance(other, Results):
            return NotImplemented
        return len(self._tensors) == len(other._tensors) and all(
            one.shape == two.shape
            and one.dtype == two.dtype
            and torch.allclose(one, two, rtol=1e-5, atol=1e-7, equal_nan=True)
            for one, two in zip(self._tensors, other._tensors, strict=True)
        )

    __hash__ = None  # type: ignore[assignment]


@dataclass(slots=True)
class Settling:
    """Tries out what is read.

    Attributes:
        model: the user's.
        changes: what a forward of it changed.
        again: runs it once more, as a program or for real.
        real: runs it for real; `None` if it cannot.
        is_captured: whether the forward is not going to run again; otherwise it runs as it is.
    """

    model: torch.nn.Module
    changes: Changes
    again: Callable[[], Outcome]
    real: Callable[[], Outcome] | None
    is_captured: bool
    _usual: object = None
    _values: Mapping[Place, Any] = field(default_factory=dict)
    _absent: dict[Place, None] = field(default_factory=dict)
    _kept: dict[Place, Any] = field(default_factory=dict)

    def left(self) -> Left:
        """What a call leaves.

        Raises:
            CaptureError: when it leaves what the next call goes on with and nobody can follow.
        """
        values = self.changes.lasting
        self._values = {**values, **self.changes.iterators}
        read = self._read(self._values)
        values = {**values, **{place: self._values[place] for place in read}}
        objects = [place for place in read if not is_plain(values[place])]
        numbers = [place for place in read if is_plain(values[place])]
        for places in self._alike(objects):
            paths = {path for path, *_ in places}
            with_them = [place for place in numbers if place[0] in paths]
            kept = self._settle_objects(places, with_them)
            numbers = [place for place in numbers if place not in kept]
        state: dict[Place, Any] = {}
        written = {p: v for p, v in values.items() if p not in read and is_plain(v)}
        if not self.is_captured:  # what it depends on, nobody knows
            self._leave(written)
            written = {}
        counted: dict[Place, Any] = {}
        for places in self._alike(numbers):
            growth = self._growth(places)
            if growth is not None:
                written |= {place: values[place] for place in places if place not in growth}
                counted |= growth
            elif self.is_captured:
                state |= {place: values[place] for place in places}
            else:
                self._settle_objects(places, [])
        decided = {place for place in read if isinstance(place[0], Root)}
        self._leave(p for p in values if not is_plain(values[p]) and p not in decided)
        for place in state:
            if place[:2] in self._absent:
                self._refuse(place)
        return Left(
            state,
            {place: value for place, value in written.items() if place[:2] not in self._absent},
            {place: value for place, value in counted.items() if place[:2] not in self._absent},
            tuple(self._absent),
            self._kept,
        )

    def _leave(self, places: Iterable[Place]) -> None:
        """Takes note that what is there is not to be had after a call."""
        for place in places:
            if isinstance(place[0], Root):
                self._kept |= self._stand_ins(place)
            else:
                self._absent[place[:2]] = None

    def _alike(self, places: Iterable[Place]) -> list[list[Place]]:
        """The same places of modules of one class together: there may be many layers."""
        found: dict[Place, list[Place]] = {}
        for place in places:
            found.setdefault(self._kind(place), []).append(place)
        return list(found.values())

    def _kind(self, place: Place) -> Place:
        if isinstance(place[0], Root):
            return place
        return type(self.model.get_submodule(place[0])), *place[1:]

    def _read(self, places: Iterable[Place]) -> list[Place]:
        """What a forward reads before it writes it."""
        hidden = list(places)
        read = [
            place
            for place in hidden
            if isinstance(place[0], Root) and len(place) == 2 and place[0].is_fixed
        ]
        hidden = [place for place in hidden if place not in read]
        while hidden:
            try:
                with replaced(self.model, _absent(self.model, hidden)):
                    self.again()
            except Exception as failure:
                used = _used(failure)
                kind = self._kind(used) if used in hidden else None
                found = [place for place in hidden if kind in (None, self._kind(place))]
                read += found
                hidden = [place for place in hidden if place not in found]
            else:
                break
        found = [place for place in hidden if self._values[place] is GONE]
        for places in self._alike(hidden) if not self._with(_absent(self.model, hidden))[1] else []:
            found += [] if self._with(_absent(self.model, places))[1] else places
        return read + found

    def _growth(self, places: list[Place]) -> dict[Place, Any] | None:
        """By how much numbers on which nothing depends grow; `None` if something does.

        Those that keep their new value do not grow. A forward that runs as it is may depend on
        them.
        """
        before = {place: value_at(self.model, place) for place in places}
        after = {place: self._values[place] for place in places}
        changes, same = self._with(after)
        growing = [place for place in places if place in changes.values]
        if self.is_captured and not same:
            return None
        if not growing:
            return {}
        numbers = [of[place] for place in growing for of in (before, after, changes.values)]
        if not all(map(_is_number, numbers)):
            return None
        growth = {place: after[place] - before[place] for place in growing}
        far = {place: after[place] + _FAR for place in growing}
        later_changes, same = self._with(far)
        steady = all(
            changed.values.get(place) == value[place] + growth[place]
            for place in growing
            for changed, value in ((changes, after), (later_changes, far))
        )
        return growth if steady and (same or not self.is_captured) else None

    def _settle_objects(self, places: list[Place], numbers: list[Place]) -> list[Place]:
        """Has places be absent after a call if the next one does not go on with what is there.

        Args:
            places: the places.
            numbers: numbers beside them.

        Returns:
            Those of the numbers that are absent, too, as they tell of something made once.

        Raises:
            CaptureError: when it does.
        """
        values = self._values
        after = {place: self._stand_in(place) for place in places}
        beyond = {place: later(value, _FAR) for place, value in after.items()}
        if self._with(after)[1] and self._with(beyond)[1] and self._is_idle(after):
            for place in places:
                once = isinstance(place[0], Root) and not self._grows(place, after, beyond)
                if not once or all(map(is_plain, leaves(values[place]))):
                    self._leave([place])
            return []
        changes = self._with(after | {place: values[place] for place in numbers})[0]
        made = [place for place in places if not changes.touch(place)]
        if len(made) < len(places):
            self._refuse(next(place for place in places if place not in made))
        companions = [place for place in numbers if not changes.touch(place)]
        if not self._is_same_later([*places, *companions]):
            self._refuse(places[0])
        # Outside, what is made once stays unmade: that it is made does not matter.
        self._leave(p for p in (*places, *companions) if not isinstance(p[0], Root))
        return companions

    def _grows(self, place: Place, *states: Mapping[Place, Any]) -> bool:
        """Whether a call always adds as much outside of the model; not if it adds only once.

        Args:
            place: where.
            states: what may be there.

        Raises:
            CaptureError: if it does something else there.
        """
        first, before = self._values[place], value_at(self.model, place)
        for state in states:
            changes = self._with(state)[0]
            if not changes.touch(place):
                return False
            now, was = changes.values.get(place), state[place]
            if isinstance(before, list) and now is None:
                self._refuse(place)
            if isinstance(now, Content) and isinstance(was, Content):
                appended = isinstance(before, deque) or begins_with(now, was)
                added = len(_new_items(first, Content.of(before)))
                if len(_new_items(now, was)) != added or not appended:
                    self._refuse(place)
        return True

    def _stand_in(self, place: Place) -> Any:
        """What is left there, with zeros for the exporter's tensors.

        If one of these depends on the batch size, with something whose use is an error.
        """
        if not self.is_captured:
            return self._values[place]

        def change(tensor: torch.Tensor) -> Any:
            if any(not isinstance(size, int) for size in tensor.shape):
                return Absent(place, None)
            return torch.zeros([*tensor.shape], dtype=tensor.dtype, device=tensor.device)

        return with_leaves(self._values[place], change)

    def _stand_ins(self, place: Place) -> dict[Place, Any]:
        """What to put outside of the model for what a call leaves there: the use is an error."""
        before, after = value_at(self.model, place), self._values[place]
        if not isinstance(after, Content) or isinstance(after.items, bytes):
            return {place: _stand_in(place, before, after)}
        old = Content.of(before)
        if isinstance(old.items, dict) and isinstance(after.items, dict):
            places = [(*place, Item(key)) for key in {**old.items, **after.items}]
            dicts = (old.items, after.items)
            pairs = {p: [content.get(p[-1].key, GONE) for content in dicts] for p in places}
            return {p: _stand_in(p, *pair) for p, pair in pairs.items() if not same(*pair)}
        if isinstance(before, list) and not begins_with(after, old):
            self._refuse(place)
        added = _new_items(after, old)
        items = (_stand_in((*place, Item(i)), GONE, value) for i, value in added.items())
        return {place: Added(tuple(items))}

    def _is_idle(self, after: Mapping[Place, Any]) -> bool:
        """Whether a real forward does the same with zeros in place of tensors."""
        if self.is_captured or not any(map(holds_tensors, after.values())):
            return True
        zeros = {place: with_leaves(value, torch.zeros_like) for place, value in after.items()}
        return self._with(zeros)[1]

    def _is_same_later(self, places: list[Place]) -> bool:
        """Whether a call that finds things made gives the same as the one that makes them."""
        if self.real is None:
            return True
        changes, first = self.real()
        made = {place: value for place, value in changes.values.items() if place in places}
        try:
            with replaced(self.model, made):
                return bool(self.real()[1] == first)
        except Exception:
            return False

    def _with(self, values: Mapping[Place, Any]) -> tuple[Changes, bool]:
        """What changes with other values, and whether the same is computed; not if it fails."""
        if self._usual is None:
            self._usual = self.again()[1]
        try:
            with replaced(self.model, values):
                changes, outcome = self.again()
        except Exception:
            return self.changes, False
        return changes, bool(outcome == self._usual)

    def _refuse(self, place: Place) -> None:
        raise CaptureError(
            f"the model's forward goes on with what an earlier call left in `{dotted(place)}`, "
            "which a model that runs in parts does not keep",
            hint="have forward take it as an argument and return it, or register it as a buffer",
        )


def _absent(model: torch.nn.Module, places: Iterable[Place]) -> dict[Place, Any]:
    return {place: Absent(place, value_at(model, place)) for place in places}


def _stand_in(place: Place, before: Any, value: Any) -> Any:
    return value if value is GONE or is_plain(value) else Absent(place, before)


def _new_items(content: Any, before: Any) -> dict[int, Any]:
    """What is in a list or set and was not before, by its position."""
    return {i: v for i, v in enumerate(content.items) if not any(v is one for one in before.items)}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _used(failure: BaseException | None) -> Place | None:
    while failure is not None:
        if isinstance(failure, AbsentError):
            return failure.place
        failure = failure.__cause__ or failure.__context__
    return None
