"""Processes whose sets have other orders train the same model."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn

import pyrannc
from pyrannc import RaNNCModule
from tests.gloo.layouts import config, share
from tests.null.test_order import MODELS, NAMES, ORDER, Dropouts, Losses, Norms, Submodules

if TYPE_CHECKING:
    from tests.gloo.pool import Pools

pytestmark = [pytest.mark.gloo]


def _order() -> tuple[str, ...]:
    return NAMES[::-1] if pyrannc.get_rank() else NAMES


def train_in_other_orders(kind: type[nn.Module], stages: int) -> None:
    torch.manual_seed(0)
    model = kind().double()
    bare, x = copy.deepcopy(model), torch.randn(8, 4).double()
    loss = bare(x) if kind is Losses else bare(x).square().mean()
    loss.backward()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    wrapped = RaNNCModule(model, optimizer, config=config(stages))
    token = ORDER.set(_order())
    outputs = wrapped(share(x))
    ORDER.reset(token)
    (outputs if kind is Losses else outputs.square().mean()).backward()
    for name, parameter in bare.named_parameters():
        gradient = wrapped.get_param_grad(name)
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-10, atol=1e-12)
    wrapped.undeploy()


@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize("kind", [m for m in MODELS if m not in (Dropouts, Norms)])
def test_training(pools: Pools, kind: type[nn.Module], stages: int) -> None:
    pools.run(2, train_in_other_orders, kind, stages)


class Concatenated(Submodules):
    """Computes something else in each order."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.layers[name](x) for name in ORDER.get()], 1)


def refuse() -> None:
    wrapped = RaNNCModule(Concatenated(), config=config(1))
    token = ORDER.set(_order())
    try:
        with pytest.raises(pyrannc.MismatchError, match=r"`layers.full/aten.linear") as caught:
            wrapped(torch.randn(4, 4))
    finally:
        ORDER.reset(token)
    assert "rank 0 has `/aten.cat.default#0` of" in str(caught.value)
    assert "go through `sorted(...)`" in str(caught.value)
    wrapped.undeploy()


def test_an_order_that_counts_is_refused(pools: Pools) -> None:
    pools.run(2, refuse)
