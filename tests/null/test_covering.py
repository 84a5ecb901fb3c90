from __future__ import annotations

import itertools

from tests.covering import covering


def met(ways: list[tuple[int, ...]]) -> set[tuple[tuple[int, int], ...]]:
    return {pair for way in ways for pair in itertools.combinations(enumerate(way), 2)}


def test_every_two_choices_meet_in_few_ways() -> None:
    choices = (range(5), range(4), range(2), range(2))
    everything = list(itertools.product(*choices))
    found = covering(*choices)
    assert met(found) == met(everything)
    assert 20 <= len(found) <= 24 < len(everything)


def test_only_what_is_possible_and_not_tried_elsewhere() -> None:
    choices = (range(3), range(3))
    found = covering(*choices, possible=lambda one, other: one != other, besides=[(0, 1), (2, 0)])
    assert sorted(found) == [(0, 2), (1, 0), (1, 2), (2, 1)]
