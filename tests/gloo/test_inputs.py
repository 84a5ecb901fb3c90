"""What a call is given: nothing of it is dropped, and no process's part of it serves another."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from pyrannc import MismatchError, RaNNCError, RaNNCModule, get_rank
from tests.gloo.layouts import config

if TYPE_CHECKING:
    from tests.gloo.pool import Pools

pytestmark = [pytest.mark.gloo]


class Scaled(nn.Module):
    """Has an argument without rows."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 5)

    def forward(self, x: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        scale = batch["scale"]
        hidden = self.first(x)
        return self.second(hidden @ scale if scale.dim() == 2 else hidden * scale)


class Graph(nn.Module):
    """Sums over the edges of a graph; `edges` is (2, number of edges)."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 4)

    def forward(self, x: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
        hidden = self.layer(x)
        return hidden + torch.zeros_like(hidden).index_add(0, edges[1], hidden[edges[0]])


def wrap(module: nn.Module, stages: int = 1, **arguments: Any) -> RaNNCModule:
    torch.manual_seed(0)
    for parameter in module.double().parameters():
        nn.init.normal_(parameter)
    return RaNNCModule(module, config=config(stages), **arguments)


def differ_without_rows(stages: int) -> None:
    rank = get_rank()
    x = torch.ones(5, 4, dtype=torch.double)
    for scale in (torch.ones(5).bfloat16(), torch.ones(5, 5, dtype=torch.double)):
        module = wrap(Scaled(), stages)
        for rows in (5, 3):
            module(x[:rows], {"scale": scale})
        with pytest.raises(MismatchError, match=r"different values of `batch\.scale`") as caught:
            module(x, {"scale": scale + rank})
        assert "first dimension" in str(caught.value)
        assert "rank 1: `batch.scale` is" in str(caught.value)
        module(x, {"scale": scale})  # and all is as it was
        module.undeploy()
    module = wrap(Scaled(), stages)
    with pytest.raises(MismatchError, match=r"`batch\.scale`"):  # its size is the batch's
        module(x, {"scale": torch.ones(5, 5, dtype=torch.double) + rank})
    module.undeploy()
    edges = torch.tensor([[0, 1, 2], [1, 2, rank]])
    module = wrap(Graph(), stages)
    with pytest.raises(MismatchError, match="different values of `edges`"):
        module(torch.ones(6, 5, dtype=torch.double), edges)
    module.undeploy()


@pytest.mark.parametrize("stages", [1, 2])
def test_what_has_no_rows_is_the_same_everywhere(pools: Pools, stages: int) -> None:
    pools.run(2, differ_without_rows, stages, seconds=55)


class Changing(nn.Module):
    """Changes what it is given: a tensor, a tensor without rows, a dictionary and a list."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, batch: dict[str, Any], seen: list[Any]) -> torch.Tensor:
        x, target = batch["x"], batch.pop("target")
        x[:, 0].sub_(0.5)
        batch["times"].add_(1)
        hidden = torch.tanh(self.first(x)) * batch["times"]
        batch["hidden"] = hidden.detach()
        seen.append({"x": x, "mean": hidden.detach() * 2})
        return self.second(hidden) - target


def change_arguments(stages: int) -> None:
    module = wrap(Changing(), stages)
    bare = copy.deepcopy(module.model)

    def arguments() -> tuple[dict[str, Any], list[Any]]:
        torch.manual_seed(get_rank())
        x, times = torch.randn(6, 4, dtype=torch.double), torch.zeros(4, dtype=torch.double)
        return {"x": x, "target": x + 1, "times": times, "name": "kept"}, [x * 2]

    for _ in range(2):
        expected, given = arguments(), arguments()
        wanted = bare(*expected).detach()
        found = module(*given).detach()
        assert list(given[0]) == ["x", "times", "name", "hidden"]
        assert given[1][1]["x"] is given[0]["x"]
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(given[1], expected[1], rtol=1e-10, atol=1e-10)
        del expected[0]["name"], given[0]["name"]
        torch.testing.assert_close(given[0], expected[0], rtol=1e-10, atol=1e-10)
    module.undeploy()


@pytest.mark.parametrize(("processes", "stages"), [(1, 1), (2, 2)])
def test_what_is_changed_in_arguments_is_changed(pools: Pools, processes: int, stages: int) -> None:
    pools.run(processes, change_arguments, stages)


class InPlace(nn.Module):
    """Changes its first argument in a way that cannot be followed."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.layer, self.way = nn.Linear(4, 4), way

    def forward(self, x: torch.Tensor, other: list[torch.Tensor]) -> torch.Tensor:
        if self.way == "unseen" and float(x.detach().sum()) > 1e9:
            return x
        if self.way == "list" and float(x.detach().sum()) < 1e9:
            other.append(x)
        elif self.way == "differentiable":
            x.copy_(self.layer(x))
        else:
            x.mul_(2)
        return self.layer(x) + other[0]


@pytest.mark.parametrize("way", ["unseen", "list", "differentiable", "shared", "gradient"])
def test_changes_that_cannot_be_followed_are_refused(way: str) -> None:
    module = wrap(InPlace(way))
    x = torch.ones(4, 4, dtype=torch.double)
    other = [x if way == "shared" else torch.ones(4, 4, dtype=torch.double)]
    if way == "gradient":
        x = x.requires_grad_() * 2
    with pytest.raises(RaNNCError, match=r"changes (its|an) argument|changes a list") as caught:
        module(x, other)
    assert caught.value.hint
    module.undeploy()


def leave_to_rank_zero() -> None:
    module = wrap(Scaled(), gather_inputs=False)
    x, scale = torch.ones(4, 4, dtype=torch.double), torch.ones(5, dtype=torch.double)
    with torch.no_grad():
        expected = module.model(x, {"scale": scale})
    given = {"scale": scale + get_rank()}
    torch.testing.assert_close(module(x, given), expected, rtol=1e-10, atol=1e-10)
    module.undeploy()


def test_only_rank_zero_counts_where_nothing_is_gathered(pools: Pools) -> None:
    pools.run(2, leave_to_rank_zero)
