"""Where the batch lies in what a call is given, and how those of several processes go together."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from pyrannc import CaptureError, RaNNCModule, get_rank, get_world_size
from tests.gloo.layouts import config, share

if TYPE_CHECKING:
    from tests.gloo.pool import Pools

pytestmark = [pytest.mark.gloo, pytest.mark.timeout(120)]

Tensors = list[torch.Tensor]


class Recurrent(nn.Module):
    """An LSTM that is given its state, which has the batch in dimension 1."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)
        self.lstm = nn.LSTM(4, 4, 2, batch_first=True)

    def forward(self, x: torch.Tensor, state: tuple[torch.Tensor, torch.Tensor]) -> Any:
        hidden, state = self.lstm(self.first(x), state)
        return self.last(hidden), state


class Written(nn.Module):
    """Has the batch size written into it."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows, self.layer = rows, nn.Linear(4, 4)
        self.gru = nn.GRU(4, 4, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state = torch.zeros(1, self.rows, 4, dtype=x.dtype)
        result: torch.Tensor = self.gru(self.layer(x), state)[0]
        return result


class TimeMajor(nn.Module):
    """A loop over the first dimension, or an LSTM along it."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.cell: nn.Module = nn.LSTM(4, 4) if way == "lstm" else nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.way == "lstm":
            loss: torch.Tensor = self.cell(x)[0].pow(2).mean()
            return loss
        state = x[0]
        for step in range(x.shape[0]):
            state = torch.tanh(self.cell(state) + x[step])
        return state


class Listed(nn.Module):
    """Takes a list."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.layer = way, nn.Linear(4, 4)

    def forward(self, items: Tensors, target: torch.Tensor | None = None) -> torch.Tensor:
        if self.way == "samples":
            return torch.stack([self.layer(item).mean(0) for item in items])
        if self.way == "pair":
            one, other = items
            return (self.layer(one) - self.layer(other)).pow(2).mean()
        assert target is not None
        losses = [(self.layer(item) - target).pow(2).mean() for item in items]
        return torch.stack(losses).sum()


def wrap(module: nn.Module, stages: int = 1) -> tuple[RaNNCModule, nn.Module]:
    torch.manual_seed(0)
    for parameter in module.double().parameters():
        nn.init.normal_(parameter)
    microbatches = 1 if isinstance(module, Written) else 2
    return RaNNCModule(module, config=config(stages, microbatches)), copy.deepcopy(module)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.double)


def close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def carry_a_state(rows: int) -> None:
    module, bare = wrap(Recurrent(), 2)
    world, rank = get_world_size(), get_rank()
    whole = (normal(2, rows, 4), normal(2, rows, 4))
    local = tuple(part.tensor_split(world, 1)[rank] for part in whole)
    for _ in range(2):
        x = normal(rows, 3, 4)
        expected, whole = bare(x, whole)
        found, local = module(share(x), local)
        close(found, share(expected))
        close(local, tuple(part.tensor_split(world, 1)[rank] for part in whole))
        expected.pow(2).mean().backward()
        found.pow(2).mean().backward()
        close(module.get_param_grad("first.weight"), bare.first.weight.grad)
        whole, local = (tuple(part.detach() for part in state) for state in (whole, local))
    module.undeploy()


@pytest.mark.parametrize("rows", [4, pytest.param(8, marks=pytest.mark.slow)])
def test_a_state_with_the_batch_in_dimension_one(pools: Pools, rows: int) -> None:
    pools.run(2, carry_a_state, rows, seconds=100)


def write_the_batch_size() -> None:
    x = normal(8, 3, 4)
    module, bare = wrap(Written(8))
    close(module(share(x)), share(bare(x)))
    module.undeploy()
    module, _ = wrap(Written(4))
    with pytest.raises(CaptureError, match="`gru` runs with the 4 rows of one process") as caught:
        module(share(x))
    assert "x.shape[0]" in str(caught.value)
    module.undeploy()


def test_a_batch_size_written_into_the_model(pools: Pools) -> None:
    pools.run(2, write_the_batch_size, seconds=100)


def batch_second(way: str) -> None:
    module, _ = wrap(TimeMajor(way))
    with pytest.raises(CaptureError, match="the batch seems to be there") as caught:
        module(normal(3, 2, 4))
    assert "batch_first=True" in str(caught.value)
    module.undeploy()


@pytest.mark.parametrize("way", ["lstm", pytest.param("loop", marks=pytest.mark.slow)])
def test_the_batch_in_dimension_one_of_everything(pools: Pools, way: str) -> None:
    pools.run(2, batch_second, way, seconds=100)


def give_lists(ways: list[str]) -> None:
    for way in ways:
        module, bare = wrap(Listed(way))
        items, target = [normal(6, 4), normal(6, 4)], normal(6, 4)
        targets = [target] if way == "layers" else []
        given = [share(item) for item in items]
        if way == "samples":
            with pytest.raises(CaptureError, match="`items` is a list that may have any length"):
                module(given)
        else:
            found = module(given, *(share(target) for target in targets))
            close(found, bare(items, *targets))
        module.undeploy()


def test_lists_of_samples_and_lists_of_batches(pools: Pools) -> None:
    pools.run(2, give_lists, ["samples", "layers"], seconds=100)


@pytest.mark.slow
def test_a_list_of_a_pair(pools: Pools) -> None:
    pools.run(2, give_lists, ["pair"], seconds=100)
