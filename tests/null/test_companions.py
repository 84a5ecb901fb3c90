"""Replicas that talk while they compute must not wait for each other in a circle."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

import pyrannc
from pyrannc.companions import companions

if TYPE_CHECKING:
    from collections.abc import Sequence


class Act:
    """An action of a program, for the check alone."""

    def __init__(self, kind: str, microbatch: int = 0, peer: int = -1) -> None:
        self.kind, self.microbatch, self.peer, self.stage = kind, microbatch, peer, 0
        self.slot, self.value = self, 0

    def value_slot(self, value: int) -> Act:
        return LATE

    def __eq__(self, other: object) -> bool:
        return self is other or "recv" in (self.kind, getattr(other, "kind", ""))

    def __hash__(self) -> int:
        return id(self)


LATE = Act("slot")


class Acts:
    """A program, for the check alone."""

    def __init__(self, *ranks: Sequence[Act]) -> None:
        self.ranks = ranks

    def forward(self, rank: int) -> Sequence[Act]:
        return self.ranks[rank]

    def backward(self, rank: int) -> Sequence[Act]:
        del rank
        return []


def test_replicas_that_would_wait_for_each_other_are_refused() -> None:
    one, two = Act("forward", 0), Act("forward", 1)
    program: Any = Acts([one, two], [one, two])
    assert companions(program, 2, {0}) == {(0, 0): [0, 1], (0, 1): [0, 1]}
    assert companions(program, 2, set()) == {}
    crossed: Any = Acts([one, two], [two, one])
    with pytest.raises(pyrannc.errors.PlanError, match="would wait for each other"):
        companions(crossed, 2, {0})
    late: Any = Acts([one, Act("send", peer=1)], [Act("recv", peer=0), one])
    with pytest.raises(pyrannc.errors.PlanError, match="would wait for each other"):
        companions(late, 2, {0})
