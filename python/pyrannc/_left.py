"""Finds out what the attributes that a forward changes are to the next one.

A captured model does not run the user's code again, so what its forward would do to attributes is
done for it: it depends on whether the next forward reads them, and on whether that changes what
it computes. Both are tried out by exporting again with something else in their places.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from ._side_effects import (
    Absent,
    AbsentError,
    Changes,
    Left,
    Place,
    dotted,
    holds_tensors,
    is_plain,
    replaced,
    stand_ins,
    value_at,
)  # fmt: skip
from .errors import CaptureError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    import torch

Outcome: TypeAlias = tuple[Changes, str]
"""What a forward changed, and a text that tells what it computes."""

_FAR = 1_000_003
"""How much a counter is put forward to see whether something happens when it has become large."""


@dataclass(slots=True)
class Settling:
    """Tries out what is read.

    Attributes:
        model: the user's.
        changes: what a forward of it changed.
        again: exports it once more.
    """

    model: torch.nn.Module
    changes: Changes
    again: Callable[[], Outcome]
    _read: list[Place] = field(default_factory=list)
    _usual: str = ""

    def left(self) -> Left:
        """What a call leaves.

        Raises:
            CaptureError: when it leaves tensors that the next call goes on with.
        """
        values = self.changes.values
        if self.changes.hooked:  # private notes that hooks are there, which are put back, too
            values = {place: value for place, value in values.items() if place[1][0] != "_"}
        unread = self._unread(values)
        objects = [place for place in self._read if not is_plain(values[place])]
        carried = [place for place in objects if holds_tensors(values[place])]
        for places in self._alike(carried):
            self._refuse_carried(places)
        caching = {path for path, _ in objects}
        read = [place for place in self._read if is_plain(values[place])]
        lost = [place for place in read if place[0] in caching]
        told = lost + [place for place in objects if place not in carried]
        state: dict[Place, Any] = {}
        written = {place: values[place] for place in unread if is_plain(values[place])}
        counted: dict[Place, Any] = {}
        for places in self._alike(place for place in read if place not in lost):
            growth = self._growth(places)
            if growth is None:
                state |= {place: values[place] for place in places}
            else:
                written |= {place: values[place] for place in places if place not in growth}
                counted |= growth
        absent = tuple(place for place in values if not is_plain(values[place]))
        return Left(state, written, counted, absent, (*told, *self.changes.contents))

    def _alike(self, places: Iterable[Place]) -> list[list[Place]]:
        """The same attributes of modules of one class together: there may be many layers."""
        found: dict[tuple[type, str], list[Place]] = {}
        for place in places:
            found.setdefault(self._kind(place), []).append(place)
        return list(found.values())

    def _kind(self, place: Place) -> tuple[type, str]:
        return type(self.model.get_submodule(place[0])), place[1]

    def _unread(self, places: Iterable[Place]) -> list[Place]:
        """What no forward reads before it writes it."""
        hidden = list(places)
        while hidden:
            try:
                with replaced(self.model, {place: Absent(place, None) for place in hidden}):
                    self.again()
            except Exception as failure:
                used = _used(failure)
                kind = self._kind(used) if used in hidden else None
                found = [place for place in hidden if kind in (None, self._kind(place))]
                self._read += found
                hidden = [place for place in hidden if place not in found]
            else:
                break
        return hidden

    def _growth(self, places: list[Place]) -> dict[Place, Any] | None:
        """By how much attributes on which nothing depends grow; `None` if something does.

        Those that keep their new value do not grow.
        """
        before = {place: value_at(self.model, place) for place in places}
        after = {place: self.changes.values[place] for place in places}
        self._usual = self._usual or self.again()[1]
        changes, text = self._with(after)
        growing = [place for place in places if place in changes.values]
        if text != self._usual:
            return None
        if not growing:
            return {}
        numbers = [of[place] for place in growing for of in (before, after, changes.values)]
        if not all(map(_is_number, numbers)):
            return None
        growth = {place: after[place] - before[place] for place in growing}
        far = {place: after[place] + _FAR for place in growing}
        later, text = self._with(far)
        steady = all(
            changed.values.get(place) == value[place] + growth[place]
            for place in growing
            for changed, value in ((changes, after), (later, far))
        )
        return growth if steady and text == self._usual else None

    def _with(self, values: Mapping[Place, Any]) -> Outcome:
        """What comes of other values; nothing that is ever usual if the forward fails."""
        try:
            with replaced(self.model, values):
                return self.again()
        except Exception as failure:
            return self.changes, f"fails: {failure}"

    def _refuse_carried(self, places: list[Place]) -> None:
        """Tells what is made once and for all from what goes on from call to call."""
        made = {place: stand_ins(self.changes.values[place]) for place in places}
        if all(value is not None for value in made.values()):
            again = self._with(made)[0].values
            places = [place for place in places if place in again]
        if not places:
            return
        message = (
            f"the model's forward goes on with what an earlier call left in `{dotted(places[0])}`, "
            "which a model that runs in parts does not keep"
        )
        raise CaptureError(
            message,
            hint="have forward take it as an argument and return it, or register it as a buffer",
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _used(failure: BaseException | None) -> Place | None:
    while failure is not None:
        if isinstance(failure, AbsentError):
            return failure.place
        failure = failure.__cause__ or failure.__context__
    return None
