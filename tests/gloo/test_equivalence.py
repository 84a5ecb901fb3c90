"""The promise: training with N processes equals training on one with the concatenated batch."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import pytest
import torch

from tests.gloo.training import Record, Setup, train_plainly, train_with_rannc
from tests.models import CASES, QUICK_CASES, Case, case

if TYPE_CHECKING:
    from pathlib import Path

    from tests.gloo.pool import Pools

pytestmark = [pytest.mark.gloo]

# The second batch is the last of an epoch: smaller, and of another size on every rank.
ROWS = {1: ((8,), (3,)), 2: ((4, 4), (3, 2)), 3: ((3, 3, 3), (2, 1, 3)), 4: ((4, 4, 4, 4), (3, 1, 2, 1))}

# Sums over rows are taken in another order; nothing else differs.
EXACT = {"rtol": 1e-10, "atol": 1e-12}
# The same for models that compute in float32, where one rounding is 6e-8 and Adam divides by it.
SINGLE = {"rtol": 1e-4, "atol": 1e-5}

reference = functools.cache(train_plainly)


def check(pools: Pools, chosen: Case, setup: Setup, folder: Path) -> list[Record]:
    """Trains with RaNNC and compares everything with plain PyTorch."""
    records: list[Record] = pools.run(
        setup.world_size, train_with_rannc, chosen.name, setup, str(folder)
    )
    plain = reference(chosen.name, setup)
    tolerance = EXACT if chosen.float64_ok else SINGLE
    same = functools.partial(torch.testing.assert_close, **tolerance)
    for step, rows in enumerate(setup.rows):
        total = sum(rows) if setup.gather_inputs else rows[0]
        for rank, record in enumerate(records):
            start = sum(rows[:rank]) if setup.gather_inputs else 0
            stop = start + rows[rank] if setup.gather_inputs else total
            for ours, theirs in zip(record.outputs[step], plain.outputs[step], strict=True):
                by_rows = theirs.dim() > 0 and theirs.shape[0] == total
                same(ours, theirs[start:stop] if by_rows else theirs)
            same(record.gradients[step], plain.gradients[step])
            if setup.input_gradients and (setup.gather_inputs or rank == 0):
                pairs = zip(record.input_gradients[step], plain.input_gradients[step], strict=True)
                for ours, theirs in pairs:
                    assert (ours is None) == (theirs is None)
                    if ours is not None:
                        same(ours, theirs[start:stop])
    same(records[0].state, plain.state)
    return records


def possible(chosen: Case, setup: Setup) -> bool:
    """Whether the model can be cut so, and one device would compute the same."""
    replicated = setup.num_stages < setup.world_size
    if chosen.batch_norm and (setup.microbatches > 1 or replicated):
        return False  # statistics of parts: the documented exception
    if not chosen.splittable and setup.microbatches > 1:
        return False
    return setup.num_stages <= MOST_STAGES.get(chosen.name, 4)


MOST_STAGES = {"identity": 1, "one_op": 1, "tensor_mul": 1, "embedding": 1, "function": 1}


def setups(worlds: tuple[int, ...]) -> list[Setup]:
    return [
        Setup(ROWS[world], num_stages, microbatches)
        for world in worlds
        for num_stages in (1, 2, 4)
        if num_stages <= world
        for microbatches in (1, 2, 4)
    ]


QUICK_SETUPS = [Setup(ROWS[2], 2, 2), Setup(ROWS[4], 2, 4)]


@pytest.mark.parametrize("setup", QUICK_SETUPS, ids=str)
@pytest.mark.parametrize("chosen", QUICK_CASES, ids=str)
def test_quick(pools: Pools, chosen: Case, setup: Setup, tmp_path: Path) -> None:
    if not possible(chosen, setup):
        setup = Setup(setup.rows, min(setup.world_size, MOST_STAGES.get(chosen.name, 4)), 1)
        if not possible(chosen, setup):
            setup = Setup(setup.rows, MOST_STAGES.get(chosen.name, 4), 1)
    check(pools, chosen, setup, tmp_path)
