"""A few of all combinations of several choices, in which every two choices still meet."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

Way = tuple[Any, ...]


def covering(
    *choices: Sequence[Any],
    possible: Callable[..., bool] = lambda *_: True,
    besides: Iterable[Way] = (),
) -> list[Way]:
    """Ways that together have each choice with each choice of another kind.

    Most faults need no more than two settings to meet, and all combinations take hours.

    Args:
        choices: what there is to choose of each kind.
        possible: whether a combination can be.
        besides: combinations that are tried elsewhere.
    """
    pairs = {
        numbers: set(itertools.combinations(enumerate(numbers), 2))
        for numbers in itertools.product(*(range(len(kind)) for kind in choices))
        if possible(*_way(choices, numbers))
    }
    missing = set().union(*pairs.values())
    for way in besides:
        numbers = tuple(kind.index(chosen) for kind, chosen in zip(choices, way, strict=True))
        missing -= pairs[numbers]
    found = []
    while missing:
        best = max(pairs, key=lambda numbers: len(pairs[numbers] & missing))
        missing -= pairs[best]
        found.append(_way(choices, best))
    return found


def _way(choices: Sequence[Sequence[Any]], numbers: Sequence[int]) -> Way:
    return tuple(kind[number] for kind, number in zip(choices, numbers, strict=True))
