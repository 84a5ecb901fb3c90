"""Numbers that change from call to call, and what they cost.

The first capture takes every number that a model is given or finds for a constant. A number that is
another one when the model is captured again becomes an input of the graph from then on, where that
is right (`_promoted`); others keep costing a capture for each value, and the user is told.
"""

from __future__ import annotations

import logging
from collections import Counter
from typing import TYPE_CHECKING, Any

from ._numbers import Number, pinned
from ._places import value_at
from ._structure import is_number
from .errors import MismatchError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import torch

    from ._structure import Path
    from .capture import Captured
    from .comm import Communicator

logger = logging.getLogger(__name__)

_MANY_CAUSES = 4
"""So many captures again by what a number decides, though not its value alone, are worth a word."""


class Changing:
    """The numbers that were seen to change."""

    def __init__(self) -> None:
        """Starts without any."""
        self.numbers: dict[Number, None] = {}
        self.deciding: set[Number] = set()
        self._used: set[Number] = set()
        self._before: dict[Number, float] = {}
        self._captures: Counter[str] = Counter()
        self._causes: dict[str, Number | None] = {}

    @property
    def arguments(self) -> list[Path]:
        """Those among the arguments."""
        return [number.argument for number in self.numbers if number.argument is not None]

    def values(self, model: torch.nn.Module, constants: Mapping[Path, Any]) -> dict[Number, float]:
        """What those are now which are numbers now.

        Args:
            model: the model.
            constants: the arguments that are no tensors.
        """
        found = {}
        for number in self.numbers:
            if number.argument is not None:
                value = constants.get(number.argument)
            else:
                value = value_at(model, number.place or ())
            if is_number(value):
                found[number] = value
        return found

    def compared(self, values: Mapping[Number, float]) -> dict[str, str]:
        """Those which must be equal on all ranks, as all captures use them: as text, by name."""
        return {number.name: repr(v) for number, v in values.items() if number in self._used}

    def notice(
        self, comm: Communicator, now: Mapping[Number, float], others: Iterable[str]
    ) -> bool:
        """Takes note of why the model is captured again; collective.

        Args:
            comm: the connections to the other ranks.
            now: all numbers that count.
            others: what else has changed.

        Returns:
            Whether more numbers are seen to change.
        """
        changed = [n for n, v in now.items() if repr(self._before.get(n, v)) != repr(v)]
        names = [number.name for number in changed]
        self._causes = {number.name: number for number in changed}
        for other in others:
            if not any(name.startswith(other) for name in names):
                self._causes[other] = None
        own = [number.name for number in changed if number not in self.numbers]
        new = dict.fromkeys(name for names in comm.all_gather_objects(own) for name in names)
        by_name = {number.name: number for number in now}
        self.numbers.update(dict.fromkeys(by_name[name] for name in new if name in by_name))
        return bool(new)

    def account(self, comm: Communicator, captured: Captured, now: Mapping[Number, float]) -> None:
        """Takes note of a capture; rank 0 warns if it is one of many for the same reason."""
        self._before.update(now)
        fixed = {n for i, n in enumerate(captured.numbers) if pinned(captured.guards, i)}
        self._used |= captured.used_numbers
        for name, number in self._causes.items():
            self._captures[name] += 1
            decides = number is None or number in fixed
            if number is not None and decides and self._captures[name] > 1:
                self.deciding.add(number)
            often = self._captures[name] == (2 if decides else _MANY_CAUSES)
            if often and comm.rank == 0:
                logger.warning("%s", _advice(name, number))
        self._causes = {}


def numbers_in(constants: Mapping[Path, Any], names: Iterable[str]) -> dict[Number, float]:
    """The numbers among the arguments.

    Args:
        constants: the arguments that are no tensors.
        names: what the user calls them, in the same order.
    """
    return {
        Number(name, argument=path): value
        for name, (path, value) in zip(names, constants.items(), strict=True)
        if is_number(value)
    }


def refuse_other_numbers(comm: Communicator, numbers: Mapping[str, str]) -> None:
    """Looks whether numbers are the same on all ranks; collective.

    Args:
        comm: the connections to the other ranks.
        numbers: as text, by name.

    Raises:
        MismatchError: when they are not.
    """
    told = comm.all_gather_objects(dict(numbers))
    for name, value in told[0].items():
        values = [other.get(name, "missing") for other in told]
        differing = next((rank for rank, other in enumerate(values) if other != value), None)
        if differing is not None:
            raise MismatchError(
                "the ranks were called with different numbers, or given different models: "
                f"`{name}` is {value} on rank 0 and {values[differing]} on rank {differing}",
                hint="call the model with the same numbers on all ranks, and change those that it "
                "holds on all ranks together",
            )


def _advice(name: str, number: Number | None) -> str:
    if number is not None and number.argument is not None:
        return (
            f"`{name}` is a number that decides what the model computes, so that the model is "
            "captured again for each value of it, which takes far longer than a step; pass it as a "
            "tensor (`torch.tensor(...)`) if it changes often"
        )
    return (
        f"`{name}` has changed again, and decides what the model computes: the model is captured "
        "again for each value of it, which takes far longer than a step; keep what changes often "
        "in a buffer, or pass it as a tensor"
    )
