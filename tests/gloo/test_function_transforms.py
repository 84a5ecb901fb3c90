"""Models that use `torch.func` in their forward: vmap, derivatives, functional calls."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, grad_and_value, hessian, jacrev, jvp, vjp, vmap

from tests.gloo.comparing import Compared, compare

if TYPE_CHECKING:
    from tests.gloo.pool import Pools

pytestmark = [pytest.mark.gloo]


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def energy(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x))).sum()


class ByRow(Layers):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(vmap(self.first)(x))


class Ways(Layers):
    """Other dimensions, several arguments, one inside of another, random numbers, no gradient."""

    def forward(self, x: Tensor) -> Tensor:
        apart = x.unsqueeze(1).expand(-1, 3, -1)
        wide = vmap(lambda v, w: self.first(v) * w.sum(), in_dims=(1, None), out_dims=1)
        products = vmap(vmap(lambda v, w: v * w))(self.first(x), x)
        over_weights = vmap(lambda w: x @ w)(torch.stack([self.first.weight, self.second.weight]))
        dropped = vmap(lambda v: nn.functional.dropout(v, 0.0), randomness="different")(products)

        def constant(row: Tensor) -> Tensor:
            with torch.no_grad():
                return self.second(row)

        summed = wide(apart, self.second.weight).sum(1) + over_weights.sum(0)
        return self.second(summed + dropped) + vmap(constant)(x)


class Forces(Layers):
    """Derivatives of the layers, differentiated once more in training."""

    def forward(self, x: Tensor) -> Tensor:
        gradient, value = vmap(grad_and_value(self.energy))(x)
        whole = grad(lambda batch: self.energy(batch) * 0.5)(x)
        jacobian = vmap(jacrev(lambda v: self.second(torch.tanh(self.first(v)))))(x)
        out, back = vjp(self.first, x)
        return gradient * value.unsqueeze(1) + whole + jacobian.sum(1) + back(torch.tanh(out))[0]


class Curvatures(Layers):
    """Derivatives for which the batch stays whole."""

    def forward(self, x: Tensor) -> Tensor:
        tangent = jvp(lambda v: self.second(torch.tanh(self.first(v))), (x,), (x,))[1]
        return vmap(hessian(self.energy))(x).sum(1) + tangent


class Ensemble(nn.Module):
    """Runs equal layers at once, as functions of their stacked parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.last = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        weights = torch.stack([part.weight for part in self.parts])
        biases = torch.stack([part.bias for part in self.parts])

        def run(weight: Tensor, bias: Tensor) -> Tensor:
            return functional_call(self.parts[0], {"weight": weight, "bias": bias}, (x,))

        return self.last(vmap(run)(weights, biases).mean(0))


CASES = {
    model.__name__: Compared(model, lambda: (torch.randn(8, 4),))
    for model in (ByRow, Ways, Forces, Curvatures, Ensemble)
}


@pytest.mark.parametrize("name", ["ByRow", "Ways", "Forces", "Ensemble"])
def test_in_parts(pools: Pools, name: str) -> None:
    pools.run(2, compare, __name__, name, 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ByRow", "Curvatures"])
def test_as_it_is_planned(pools: Pools, name: str) -> None:
    pools.run(2, compare, __name__, name, 0)
