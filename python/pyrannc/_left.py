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
        for place in objects:
            if holds_tensors(values[place]):
                self._refuse_carried(place)
        caching = {path for path, _ in objects}
        read = [place for place in self._read if is_plain(values[place])]
        lost = [place for place in read if place[0] in caching]
        told = lost + [place for place in objects if not holds_tensors(values[place])]
        state, written, counted = {}, {p: values[p] for p in unread if is_plain(values[p])}, {}
        for place in read:
            if place in lost:
                continue
            idle, growth = self._is_idle(place)
            if idle and growth is None:
                written[place] = values[place]
            elif idle:
                counted[place] = growth
            else:
                state[place] = values[place]
        absent = tuple(place for place in values if not is_plain(values[place]))
        return Left(state, written, counted, absent, (*told, *self.changes.contents))

    def _unread(self, places: Iterable[Place]) -> list[Place]:
        """What no forward reads before it writes it."""
        hidden = list(places)
        while hidden:
            try:
                with replaced(self.model, {place: Absent(place, None) for place in hidden}):
                    self.again()
            except Exception as failure:
                used = _used(failure)
                found = [place for place in hidden if place == used] or hidden
                self._read += found
                hidden = [place for place in hidden if place not in found]
            else:
                break
        return hidden

    def _is_idle(self, place: Place) -> tuple[bool, Any]:
        """Whether what is computed does not depend on an attribute, and by how much it grows.

        An attribute that keeps its new value does not grow.
        """
        before, after = value_at(self.model, place), self.changes.values[place]
        self._usual = self._usual or self.again()[1]
        changes, text = self._with({place: after})
        if text != self._usual:
            return False, None
        if place not in changes.values:
            return True, None
        if not (_is_number(before) and _is_number(after) and _is_number(changes.values[place])):
            return False, None
        growth, far = after - before, after + _FAR
        later, text = self._with({place: far})
        steady = all(
            changed.values.get(place) == value + growth
            for changed, value in ((changes, after), (later, far))
        )
        return steady and text == self._usual, growth

    def _with(self, values: Mapping[Place, Any]) -> Outcome:
        """What comes of other values; nothing that is ever usual if the forward fails."""
        try:
            with replaced(self.model, values):
                return self.again()
        except Exception as failure:
            return self.changes, f"fails: {failure}"

    def _refuse_carried(self, place: Place) -> None:
        """Tells what is made once and for all from what goes on from call to call."""
        value = stand_ins(self.changes.values[place])
        if value is not None and place not in self._with({place: value})[0].values:
            return
        message = (
            f"the model's forward goes on with what an earlier call left in `{dotted(place)}`, "
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
