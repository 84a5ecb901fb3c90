"""States that an unchanged script keeps on every process and puts back at any later time."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

import pyrannc
from tests.gloo.layouts import config, share

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.gloo.pool import Pools

pytestmark = [pytest.mark.gloo]


def make() -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    return nn.Sequential(*layers).double()


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(list(model.named_parameters()), 0.1, momentum=0.9)


def adam(model: nn.Module) -> torch.optim.Optimizer:
    parameters = list(model.parameters())
    groups = [{"params": parameters[:3], "lr": 0.02}, {"params": parameters[3:]}]
    return torch.optim.Adam(groups, lr=0.01, eps=1e-4)


OPTIMIZERS = {"sgd": sgd, "adam": adam}


class Script:
    """What trains, wrapped or bare."""

    def __init__(self, optimizer: str, options: dict[str, Any] | None) -> None:
        self.optimizer_name, self.options = optimizer, options
        self.model: Any = make()
        self.optimizer: Any = OPTIMIZERS[optimizer](self.model)
        self.scheduler = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.9)
        if options is not None:
            self.model = pyrannc.RaNNCModule(self.model, self.optimizer, **options)

    def another(self) -> Script:
        return Script(self.optimizer_name, self.options)

    def train(self, steps: int) -> None:
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        for _ in range(steps):
            self.optimizer.zero_grad()
            self.model(x if self.options is None else share(x)).pow(2).mean().backward()
            self.optimizer.step()
            self.scheduler.step()

    def keep(self, *, whole: bool = False) -> Any:
        everything = {"from_global": True} if whole and self.options is not None else {}
        state = self.optimizer.state_dict(**everything)
        return copy.deepcopy((self.model.state_dict(), state, self.scheduler.state_dict()))

    def put_back(self, kept: Any) -> None:
        for part, state in zip((self.model, self.optimizer, self.scheduler), kept, strict=True):
            part.load_state_dict(state)

    def end(self) -> None:
        if self.options is not None:
            self.model.undeploy()


def from_before_the_first_call(script: Script) -> None:
    kept = script.keep()
    script.train(2)
    script.put_back(kept)


def of_a_bare_optimizer(script: Script) -> None:
    other = Script(script.optimizer_name, None)
    other.train(2)
    script.train(1)
    script.put_back(other.keep())


def the_best(script: Script) -> None:
    script.train(2)
    kept = script.keep()
    script.train(2)
    script.put_back(kept)


def the_whole(script: Script) -> None:
    script.train(2)
    kept = script.keep(whole=True)
    script.train(2)
    script.put_back(kept)


def of_another_wrapper(script: Script) -> None:
    other = script.another()
    other.train(2)
    kept = other.keep(whole=True)
    other.end()
    script.put_back(kept)


WAYS: tuple[Callable[[Script], None], ...] = (
    from_before_the_first_call, of_a_bare_optimizer, the_best, the_whole, of_another_wrapper,
)  # fmt: skip


def put_back(optimizers: list[str], options: dict[str, Any]) -> None:
    for name in optimizers:
        for way in WAYS:
            bare, wrapped = Script(name, None), Script(name, options)
            for script in (bare, wrapped):
                way(script)
                script.train(2)
            for key, expected in bare.model.named_parameters():
                found = wrapped.model.get_param(key)
                torch.testing.assert_close(found, expected.detach(), rtol=1e-10, atol=1e-12)
            wrapped.end()


@pytest.mark.parametrize(
    ("optimizers", "stages", "zero"),
    [
        (["adam"], 2, False),
        pytest.param(["sgd"], 2, False, marks=pytest.mark.slow),
        pytest.param(["sgd", "adam"], 1, True, marks=pytest.mark.slow),
    ],
)
def test_states_are_put_back(
    pools: Pools, optimizers: list[str], stages: int, *, zero: bool
) -> None:
    pools.run(2, put_back, optimizers, {"config": config(stages), "enable_zero": zero})


def ask_alone() -> None:
    """Rank 0 asks for the state between forward and backward."""
    x = share(torch.ones(4, 4, dtype=torch.float64))
    wrapped: Any = pyrannc.RaNNCModule(make(), config=config(2))
    loss: Tensor = wrapped(x).pow(2).mean()
    told = r"(?s)rank 0: model\.state_dict\(\)\n  rank 1: loss\.backward\(\)\nhint: make each"
    with pytest.raises(pyrannc.ExecutionError, match=told):
        (wrapped.state_dict if pyrannc.get_rank() == 0 else loss.backward)()


def test_a_call_beside_the_backward_is_named(pools: Pools) -> None:
    pools.run(2, ask_alone)
    pools.drop(2)
