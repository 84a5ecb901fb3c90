"""Parameters that the replicas of a stage divide: nothing changes but the memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.gloo.test_equivalence import ROWS, check
from tests.gloo.training import OPTIMIZERS, Setup
from tests.models import case

if TYPE_CHECKING:
    from pathlib import Path

    from tests.gloo.pool import Pools

pytestmark = [pytest.mark.gloo]

LEVELS = ("optimizer",)
Layout = tuple[tuple[int, ...], ...]
ONE_STAGE: list[Layout] = [((0, 1),), ((0, 1, 2, 3),)]
TWO_STAGES: list[Layout] = [((0, 1), (2, 3)), ((0,), (1, 2, 3)), ((0, 1, 2), (3,))]


def setup(layout: Layout, level: str, microbatches: int = 1, **options: Any) -> Setup:
    world = 1 + max(rank for ranks in layout for rank in ranks)
    return Setup(ROWS[world], 0, microbatches, stage_ranks=layout, sharding=level, **options)


def ways() -> list[Any]:
    """Layouts, levels and microbatches; only some are quick."""
    quick = {(((0, 1),), 1), (((0,), (1, 2, 3)), 3)}
    return [
        pytest.param(
            layout, level, microbatches, marks=[] if (layout, microbatches) in quick else slow
        )
        for layout in (*ONE_STAGE, *TWO_STAGES)
        for level in LEVELS
        for microbatches in (1, 3)
        for slow in [[pytest.mark.slow]]
    ]


@pytest.mark.parametrize(("layout", "level", "microbatches"), ways(), ids=str)
def test_a_loss_is_the_same(
    pools: Pools, layout: Layout, level: str, microbatches: int, tmp_path: Path
) -> None:
    check(pools, case("gpt"), setup(layout, level, microbatches), tmp_path)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer(pools: Pools, optimizer: str, level: str, tmp_path: Path) -> None:
    chosen = setup(((0, 1),), level, 2, optimizer=optimizer)
    check(pools, case("fork_join"), chosen, tmp_path)
