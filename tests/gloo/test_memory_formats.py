"""Tensors lie in memory as in the bare model, also behind a cut: a `view` may depend on it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

from tests.gloo.comparing import Compared, compare

if TYPE_CHECKING:
    from tests.gloo.pool import Pools

pytestmark = [pytest.mark.gloo]

LAST = torch.channels_last


class Doubled(torch.autograd.Function):
    """Counts on how the gradient that it is given lies in memory."""

    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        last = gradient.permute(0, 2, 3, 1)
        return 2 * last.view(-1).view(last.shape).permute(0, 3, 1, 2)


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(n, 4, 3, padding=1) for n in (3, 4))
        self.last = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first = torch.relu(self.first(x))
        x = first + torch.relu(self.second(torch.relu(first)))
        return self.last(x.permute(0, 2, 3, 1).view(-1, 16, 4)), x


class Gradients(Images):
    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(Doubled.apply(torch.relu(self.first(x))))
        x = torch.relu(self.second(x))
        return self.last(x.permute(0, 2, 3, 1).view(-1, 16, 4))


class Volumes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv3d(3, 4, 3, padding=1), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).contiguous(memory_format=torch.channels_last_3d)
        x = torch.relu(torch.tanh(torch.relu(x)))
        return self.last(x.permute(0, 2, 3, 4, 1).view(x.shape[0], -1, 4))


class Turned(nn.Module):
    """Transposed, expanded and seen with rows in the second dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        heads = self.first(x).view(x.shape[0], -1, 2, 2).transpose(1, 2)
        wide = self.second(x).mean(2, keepdim=True).expand(-1, -1, 4)
        turned = torch.tanh(self.second(x.transpose(0, 1).contiguous()))
        heads = torch.tanh(torch.relu(heads)).transpose(1, 2).view(x.shape)
        wide = (wide * torch.tanh(self.third(heads))).view(-1, 4).view(x.shape)
        turned = self.third(turned).view(-1, 4).view(turned.shape).transpose(0, 1)
        return self.third(heads + wide + turned)


class Lying(nn.Module):
    """Counts on how its input lies in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        turned = torch.tanh(self.first(x.transpose(1, 2).view(x.shape[0], -1, 4)))
        return self.second(torch.tanh(self.second(turned)))


CASES = {
    "images": Compared(
        lambda: Images().to(memory_format=LAST),
        lambda: (torch.randn(8, 3, 4, 4).to(memory_format=LAST),),
    ),
    "images by their weights": Compared(
        lambda: Images().to(memory_format=LAST), lambda: (torch.randn(8, 3, 4, 4),)
    ),
    "gradients": Compared(
        lambda: Gradients().to(memory_format=LAST),
        lambda: (torch.randn(8, 3, 4, 4).to(memory_format=LAST),),
    ),
    "volumes": Compared(Volumes, lambda: (torch.randn(8, 3, 2, 2, 2),)),
    "turned": Compared(Turned, lambda: (torch.randn(8, 5, 4),)),
    "lying": Compared(Lying, lambda: (torch.randn(8, 5, 4).transpose(1, 2),)),
}


@pytest.mark.parametrize("name", CASES)
def test_across_a_cut(pools: Pools, name: str) -> None:
    pools.run(2, compare, __name__, name, 2)


def test_on_replicas(pools: Pools) -> None:
    pools.run(2, compare, __name__, "images", 0)
