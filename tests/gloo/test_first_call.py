"""What the first call of a model changes for good belongs to the model."""

from __future__ import annotations

import copy
import logging
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import pyrannc
from tests.gloo.layouts import config, share
from tests.gloo.test_equivalence import EXACT

if TYPE_CHECKING:
    from tests.gloo.pool import Pools

pytestmark = [pytest.mark.gloo, pytest.mark.timeout(240)]


class Settling(nn.Module):
    """Looks at how long its first input is."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)
        self.kind, self.calls = "long", 0

    def settle(self, x: torch.Tensor) -> None:
        """Is to be overridden."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.settle(x)
        return self.last(self.between(self.first(x)))

    def between(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Swapping(Settling):
    def settle(self, x: torch.Tensor) -> None:
        if self.kind == "long" and x.shape[1] < 16:
            short = nn.Linear(4, 4)
            short.weight, short.bias = self.first.weight, self.first.bias
            self.first, self.kind = short, "short"


class Masking(Settling):
    def between(self, x: torch.Tensor) -> torch.Tensor:
        if not hasattr(self, "mask"):
            self.register_buffer("mask", torch.ones(x.shape[1], x.shape[1]).tril())
        return self.mask.to(x) @ x


class Growing(Settling):
    def settle(self, x: torch.Tensor) -> None:
        if not hasattr(self, "extra"):
            self.extra = nn.Linear(4, 4).to(x)

    def between(self, x: torch.Tensor) -> torch.Tensor:
        return self.extra(x)


class Tying(Settling):
    def __init__(self) -> None:
        super().__init__()
        self.middle = nn.Linear(4, 4)

    def settle(self, x: torch.Tensor) -> None:
        if self.middle.weight is not self.first.weight:
            self.middle.weight = self.first.weight

    def between(self, x: torch.Tensor) -> torch.Tensor:
        return self.middle(x)


class Lazy(Settling):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.LazyLinear(4)


class Remembering(Settling):
    def settle(self, x: torch.Tensor) -> None:
        if not hasattr(self, "mean"):
            self.register_buffer("mean", x.mean((0, 1)))


class Replacing(Settling):
    def settle(self, x: torch.Tensor) -> None:
        self.first.weight = nn.Parameter(self.first.weight * 0.9)


class Counting(Settling):
    def settle(self, x: torch.Tensor) -> None:
        if not hasattr(self, "count"):
            self.register_buffer("count", torch.zeros(()))
        self.count += 1


def trained(made: list[type[Settling]], stages: int) -> None:
    for kind in made:
        torch.manual_seed(0)
        bare = kind().double()
        model = copy.deepcopy(bare)
        optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in (bare, model)]
        wrapped: Any = pyrannc.RaNNCModule(model, optimizers[1], config=config(stages))
        for step in range(2):
            x = torch.randn(8, 5, 4, generator=torch.Generator().manual_seed(step)).double()
            torch.manual_seed(5)
            expected = bare(x)
            torch.manual_seed(5 + pyrannc.get_rank())  # rank 0's values count
            given = wrapped(share(x))
            torch.testing.assert_close(given, share(expected), **EXACT)
            for result, optimizer in zip((expected, given), optimizers, strict=True):
                result.square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
            state = wrapped.state_dict()
            if pyrannc.get_rank() == 0:
                torch.testing.assert_close(state, bare.state_dict(), **EXACT)
        assert (wrapped.calls, wrapped.kind) == (bare.calls, bare.kind)
        wrapped.undeploy()


@pytest.mark.parametrize(
    ("kinds", "world"),
    [([Swapping, Lazy], 1), ([Swapping, Masking, Growing, Tying, Lazy], 2)],
    ids=["one", "two"],
)
def test_what_the_first_call_changes_is_kept(
    pools: Pools, kinds: list[type[Settling]], world: int
) -> None:
    pools.run(world, trained, kinds, world, seconds=200)


def refused() -> None:
    for kind, message in (
        (Remembering, "first call makes `mean`, and something else on each process"),
        (Replacing, "makes or replaces the parameter `first.weight`"),
        (Counting, "makes the buffer `count`"),
    ):
        wrapped: Any = pyrannc.RaNNCModule(kind(), config=config(2))
        before = wrapped.state_dict()
        x = torch.randn(8, 5, 4, generator=torch.Generator().manual_seed(0))
        with pytest.raises(pyrannc.RaNNCError, match=message):
            wrapped(share(x))
        if kind is not Remembering:
            assert wrapped.state_dict().keys() == before.keys()
        wrapped.undeploy()


def test_what_calls_change_again_is_refused(pools: Pools) -> None:
    pools.run(2, refused, seconds=100)


def test_parameters_of_the_first_call_are_not_trained(caplog: pytest.LogCaptureFixture) -> None:
    model = Growing()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    wrapped: Any = pyrannc.RaNNCModule(model, optimizer, config=config(1))
    with caplog.at_level(logging.WARNING):
        wrapped(torch.randn(4, 5, 4))
    assert "made the parameters `extra.weight`, `extra.bias`, which the optimizer" in caplog.text
    wrapped.undeploy()
