"""The promise: training with N processes equals training on one with the concatenated batch."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import pytest
import torch

from tests.covering import covering
from tests.gloo.training import Record, Setup, train_plainly, train_with_rannc
from tests.models import CASES, QUICK_CASES, Case, case

if TYPE_CHECKING:
    from pathlib import Path

    from tests.gloo.pool import Pools

pytestmark = [pytest.mark.gloo]

# The second batch is the last of an epoch: smaller, and of another size on every rank.
ROWS = {
    1: ((8,), (3,)),
    2: ((4, 4), (3, 2)),
    3: ((3, 3, 3), (2, 1, 3)),
    4: ((4, 4, 4, 4), (3, 1, 2, 1)),
}

# Sums over rows are taken in another order; nothing else differs.
EXACT = {"rtol": 1e-10, "atol": 1e-12}
# Adam divides by the gradient's size plus 1e-8: where a gradient is zero but for its rounding
# (1e-17, as before a normalisation), two steps of 0.01 carry that on as 1e-11 or so.
EXACT_STATE = {"rtol": 1e-10, "atol": 1e-10}
# The same for models that compute in float32, where one rounding is 6e-8.
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
    after_adam = EXACT_STATE if chosen.float64_ok else SINGLE
    torch.testing.assert_close(records[0].state, plain.state, **after_adam)
    return records


def possible(chosen: Case, setup: Setup) -> bool:
    """Whether the model can be cut so, and one device would compute the same."""
    replicated = setup.num_stages < setup.world_size
    if chosen.batch_norm and (setup.microbatches > 1 or replicated):
        return False  # statistics of parts: the documented exception
    if not chosen.splittable and setup.microbatches > 1:
        return False
    return setup.num_stages <= MOST_STAGES.get(chosen.name, 4)


# Models of so few operators that they divide into no more stages.
MOST_STAGES = {
    "identity": 1,
    "one_op": 1,
    "tensor_mul": 1,
    "embedding": 1,
    "function": 1,
    "python_op": 3,
    "native_op": 3,
    "dataclass_out": 3,
    "recurrent": 3,
}


BY_HAND = ["gpt", "fork_join", "shared_input", "shared_embedding", "recurrent", "masked_loss"]


@pytest.mark.quick
@pytest.mark.parametrize(
    ("chosen", "setup"),
    [
        *((chosen, Setup(ROWS[2], 2, 2)) for chosen in QUICK_CASES),
        *((case(name), Setup(ROWS[4], 2, 4)) for name in BY_HAND),
    ],
    ids=str,
)
def test_every_model(pools: Pools, chosen: Case, setup: Setup, tmp_path: Path) -> None:
    check(pools, chosen, nearest_possible(chosen, setup), tmp_path)


def nearest_possible(chosen: Case, setup: Setup) -> Setup:
    """The setup itself, or one with as many stages as the model can have, and one microbatch."""
    most = MOST_STAGES.get(chosen.name, 4)
    for num_stages in (setup.num_stages, min(setup.world_size, most)):
        for microbatches in (setup.microbatches, 1):
            candidate = Setup(setup.rows, num_stages, microbatches)
            if possible(chosen, candidate):
                return candidate
    one = ROWS[1]
    return Setup(one, 1, 1)


def in_many_ways() -> list[tuple[Case, Setup]]:
    """Every model in every number of processes and of stages, and in every number of parts."""

    def setup(world_stages: tuple[int, int], microbatches: int) -> Setup:
        world, stages = world_stages
        return Setup(ROWS[world], stages, microbatches)

    ways = covering(
        CASES,
        [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4)],
        [1, 2, 4],
        possible=lambda chosen, *way: possible(chosen, setup(*way)),
    )
    return [(chosen, setup(*way)) for chosen, *way in ways]


@pytest.mark.slow
@pytest.mark.parametrize(("chosen", "setup"), in_many_ways(), ids=str)
def test_every_model_in_many_ways(pools: Pools, chosen: Case, setup: Setup, tmp_path: Path) -> None:
    check(pools, chosen, setup, tmp_path)


UNEQUAL_REPLICAS = [
    ((0,), (1, 2, 3)),
    ((0, 1, 2), (3,)),
    ((0, 1), (2,), (3,)),
    ((0,), (1, 2)),
    ((3,), (0, 2)),
]


@pytest.mark.parametrize(
    ("name", "stage_ranks", "microbatches"),
    covering(BY_HAND, UNEQUAL_REPLICAS, [3, 1]),
    ids=str,
)
def test_deployments_by_hand_with_unequal_replicas(
    pools: Pools,
    name: str,
    stage_ranks: tuple[tuple[int, ...], ...],
    microbatches: int,
    tmp_path: Path,
) -> None:
    world = 1 + max(rank for ranks in stage_ranks for rank in ranks)
    setup = Setup(ROWS[world], microbatches=microbatches, stage_ranks=stage_ranks)
    records = check(pools, case(name), setup, tmp_path)
    assert records[0].stage_ranks == [list(ranks) for ranks in stage_ranks]


@pytest.mark.parametrize("name", ["shared_input", "gpt", "masked_loss"])
def test_uneven_shares(pools: Pools, name: str, tmp_path: Path) -> None:
    shares = ((1, 5, 2), (3, 1))
    setup = Setup(ROWS[3], microbatches=3, stage_ranks=((0, 1, 2), (0, 2)), shares=shares)
    check(pools, case(name), setup, tmp_path)


@pytest.mark.parametrize("schedule", ["fill_drain", "1f1b"])
def test_uneven_shares_of_four_ranks(pools: Pools, schedule: str, tmp_path: Path) -> None:
    shares = ((1, 2, 1), (3, 1))
    ranks = ((0, 1, 2), (1, 3))
    setup = Setup(ROWS[4], microbatches=2, stage_ranks=ranks, shares=shares, schedule=schedule)
    check(pools, case("gpt"), setup, tmp_path)


@pytest.mark.parametrize("schedule", ["fill_drain", "1f1b"])
@pytest.mark.parametrize("name", ["gpt", "loss_out", "masked_loss"])
def test_both_schedules(pools: Pools, name: str, schedule: str, tmp_path: Path) -> None:
    most = 2 if name == "loss_out" else 4
    setup = Setup(ROWS[4], most, 4, schedule=schedule)
    check(pools, case(name), setup, tmp_path)


@pytest.mark.parametrize("name", ["identity", "fork_join", "loss_out", "dict_in_out", "skips"])
def test_gradients_reach_the_inputs(pools: Pools, name: str, tmp_path: Path) -> None:
    setup = Setup(ROWS[2], 1 if name == "identity" else 2, 2, input_gradients=True)
    check(pools, case(name), setup, tmp_path)


@pytest.mark.parametrize("name", ["fork_join", "gpt", "dataclass_out"])
def test_inputs_of_rank_zero_alone(pools: Pools, name: str, tmp_path: Path) -> None:
    setup = Setup(((6, 2), (3, 1)), 2, 2, gather_inputs=False)
    check(pools, case(name), setup, tmp_path)


@pytest.mark.parametrize("name", ["fork_join", "gpt"])
def test_a_rank_may_run_out_of_rows(pools: Pools, name: str, tmp_path: Path) -> None:
    setup = Setup(((3, 2), (2, 0)), 2, 2)
    check(pools, case(name), setup, tmp_path)
