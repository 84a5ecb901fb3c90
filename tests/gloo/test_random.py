"""Random numbers: the same for the same seed, others for each part of the batch, no others gone."""

from __future__ import annotations

import functools
import logging
import math
import random
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pyrannc
from tests.gloo.layouts import Layout, config, deployment
from tests.gloo.test_equivalence import EXACT
from tests.gloo.training import Setup, train_with_rannc

if TYPE_CHECKING:
    from pathlib import Path

    from tests.gloo.pool import Pools

pytestmark = [pytest.mark.gloo]

WIDTH = 64


class Masks(nn.Module):
    """What its two dropouts leave of a batch of ones."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.ones(WIDTH))
        self.last = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        first = F.dropout(x * self.first, 0.5, self.training)
        return first, F.dropout((first * 0 + 1) * self.last, 0.5, self.training)


def all_masks(stages: int, seed: int, seed_of_others: int, steps: int = 2) -> list[torch.Tensor]:
    """For each step and dropout the mask of the global batch."""
    wrapped = pyrannc.RaNNCModule(Masks(), gather_inputs=False, config=config(stages))
    torch.manual_seed(seed if pyrannc.get_rank() == 0 else seed_of_others)
    masks = [mask.detach() for _ in range(steps) for mask in wrapped(torch.ones(4, WIDTH))]
    wrapped.undeploy()
    return masks


@pytest.mark.parametrize("stages", [1, 2])
def test_every_row_draws_its_own_numbers(pools: Pools, stages: int) -> None:
    masks = pools.run(2, all_masks, stages, 5, 5)[0]
    rows = torch.cat(masks)
    assert len(rows) == 2 * 2 * 4  # steps, dropouts, rows: on two replicas or stages
    assert len(rows.unique(dim=0)) == len(rows)


def test_the_seed_of_the_first_process_decides(pools: Pools) -> None:
    alike = pools.run(2, all_masks, 1, 5, 5)
    apart = pools.run(2, all_masks, 1, 5, 9)
    other = pools.run(2, all_masks, 1, 6, 5)
    for ours, theirs, others in zip(alike[0], apart[1], other[0], strict=True):
        assert torch.equal(ours, theirs)
        assert not torch.equal(ours, others)


@pytest.mark.parametrize("schedule", ["fill_drain", "1f1b"])
def test_the_same_seed_gives_the_same_run(pools: Pools, schedule: str, tmp_path: Path) -> None:
    setup = Setup(((3, 2),) * 3, 2, 2, seed=3, schedule=schedule)
    once, again = (
        pools.run(2, train_with_rannc, "dropout_gpt", setup, str(tmp_path)) for _ in range(2)
    )
    for ours, theirs in zip(once, again, strict=True):
        for name in ("outputs", "gradients", "state"):
            found, expected = getattr(ours, name), getattr(theirs, name)
            torch.testing.assert_close(found, expected, rtol=0, atol=0)


class Plain(nn.Module):
    """Draws while it trains."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.last = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(F.dropout(self.linear(x), 0.5, self.training))


def drawn_around(cache: str) -> list[Any]:
    """What a user's own draws give around the first calls, with and without a cached profile."""
    items = {"measure": True, "profile_cache_dir": cache}
    wrapped = pyrannc.RaNNCModule(Plain(), config=config(2, **items))
    torch.manual_seed(2)
    random.seed(2)
    np.random.seed(2)
    wrapped.eval()
    with torch.no_grad():
        wrapped(torch.ones(4, 4))
    evaluated = [torch.rand(3).tolist(), random.random(), np.random.rand()]
    wrapped.train()
    masked = wrapped(torch.ones(4, 4)) == 0
    trained = [masked.tolist(), torch.rand(3).tolist(), random.random(), np.random.rand()]
    wrapped.undeploy()
    return [evaluated, trained]


def test_planning_leaves_the_generators_alone(pools: Pools, tmp_path: Path) -> None:
    first = pools.run(2, drawn_around, str(tmp_path))
    assert list(tmp_path.iterdir())
    assert pools.run(2, drawn_around, str(tmp_path)) == first
    torch.manual_seed(2)
    random.seed(2)
    np.random.seed(2)
    bare = [torch.rand(3).tolist(), random.random(), np.random.rand()]
    assert first[0][0] == bare  # evaluation draws nothing


def resumed() -> None:
    wrapped = pyrannc.RaNNCModule(Plain(), config=config(2))
    x = torch.ones(4, 4)
    torch.manual_seed(1)
    wrapped(x)
    state = torch.get_rng_state()
    expected = [wrapped(x).detach() for _ in range(2)]
    assert not torch.equal(*expected)
    torch.manual_seed(8)
    wrapped(x)
    torch.set_rng_state(state)
    for output in expected:
        assert torch.equal(wrapped(x), output)
    wrapped.undeploy()


def test_a_saved_generator_goes_on_as_it_would_have(pools: Pools) -> None:
    pools.run(2, resumed)


class Noise(nn.Module):
    """Adds noise to all rows, in the first layer and again in the last, and drops weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.last = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        noise = torch.randn(4)
        weight = F.dropout(self.last.weight, 0.5, self.training)
        hidden = torch.tanh(self.first(x * 0) * 0 + noise)
        return hidden, F.linear(hidden, weight) * 0 + noise + weight.sum()


def noisy(stages: int) -> list[torch.Tensor]:
    torch.manual_seed(0)
    wrapped = pyrannc.RaNNCModule(Noise(), gather_inputs=False, config=config(stages))
    outputs = [tensor for _ in range(2) for tensor in wrapped(torch.ones(4, 4))]
    sum(tensor.sum() for tensor in outputs).backward()
    wrapped.undeploy()
    return [tensor.detach() for tensor in outputs]


@pytest.mark.parametrize("stages", [1, 2])
def test_what_is_drawn_for_all_rows_is_one_for_all_parts(pools: Pools, stages: int) -> None:
    first, last, other, _ = pools.run(2, noisy, stages)[0]
    for tensor in (first, last, other):
        torch.testing.assert_close(tensor, tensor[:1].expand(4, 4))
    differences = torch.atanh(first) - last  # the same noise in both, so what is left is a number
    torch.testing.assert_close(differences, differences[0, :1].expand(4, 4), rtol=1e-4, atol=1e-4)
    assert not torch.equal(first, other)


class Lottery(nn.Module):
    """Draws from Python and NumPy, which no graph shows, and decides by it what it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.spare = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = random.uniform(1, 2) + float(np.random.randint(2, 1000))
        return x * scale * (self.weight if random.random() < 0.5 else -self.spare)


class Drawing(nn.Module):
    """A lottery between two layers; with ones for input it gives what was drawn."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.ones(4))
        self.lottery = Lottery()
        self.last = nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lottery(torch.tanh(x * self.first) / math.tanh(1)) * self.last


def drawn(stages: int, seed: int, layout: Layout | None, folder: str) -> list[torch.Tensor]:
    """The outputs of four steps for all rows; checks the gradients against them."""
    torch.manual_seed(seed)
    random.seed(seed if pyrannc.get_rank() else 77)
    before = random.getstate(), np.random.get_state()[1].tolist()
    model, x = Drawing().double(), torch.ones(8, 4, dtype=torch.float64)
    planned = {"config": config(stages)}
    if layout is not None:
        file = deployment(lambda: Drawing().double(), (x,), layout, folder)
        planned = {"config": config(stages), "load_deployment": file}
    wrapped = pyrannc.RaNNCModule(model, gather_inputs=False, **planned)
    outputs = []
    for _ in range(4):
        wrapped.zero_grad()
        output = wrapped(x)
        output.sum().backward()
        outputs.append(output.detach())
        scales = output.detach()[:, 0] * 4  # four columns of ones
        taken = scales > 0
        expected = {
            "last": (scales / 4).sum().expand(4),
            "lottery.weight": scales[taken].sum(),
            "lottery.spare": scales[~taken].sum(),
        }
        for name, gradient in expected.items():
            found = wrapped.get_param_grad(name)  # none, if no microbatch has used it
            torch.testing.assert_close(gradient * 0 if found is None else found, gradient, **EXACT)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before
    wrapped.undeploy()
    return outputs


@pytest.mark.parametrize(
    ("world", "layout"), [(1, ((0,),)), (2, ((0,), (1,))), (2, ((0, 1),)), (4, ((0,), (1, 2, 3)))]
)
def test_draws_from_python_and_numpy_go_on(
    pools: Pools, world: int, layout: Layout, tmp_path: Path
) -> None:
    run = functools.partial(drawn, len(layout), layout=layout, folder=str(tmp_path))
    outputs, again, other = (pools.run(world, run, seed)[0] for seed in (1, 1, 2))
    for ours, theirs, others in zip(outputs, again, other, strict=True):
        assert torch.equal(ours, theirs)
        assert not torch.equal(ours, others)
    rows = torch.cat(outputs)
    assert torch.equal(rows, rows[:, :1].expand_as(rows))
    parts = 2 * max(len(ranks) for ranks in layout)
    assert len(rows[:, 0].unique()) >= 4 * parts  # each step, microbatch and replica by itself


class Gambling(Drawing):
    """A model that draws in its own forward."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * random.uniform(1, 2)


def gamble() -> None:
    wrapped = pyrannc.RaNNCModule(Gambling(), config=config(1, 1))
    first, second = (wrapped(torch.ones(4, 4)) for _ in range(2))
    assert not torch.equal(first, second)
    wrapped.undeploy()


def test_a_part_that_draws_stays_whole(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        gamble()
    told = [record.message for record in caplog.records if "draws from Python's" in record.message]
    assert len(told) == 1
    assert told[0].startswith("a part of the model cannot be captured")
    assert "`Gambling`: draws from Python's `random`" in told[0]
