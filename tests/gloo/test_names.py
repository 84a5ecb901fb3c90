"""A parameter, buffer, module or argument may have any name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from tests.gloo.comparing import Compared, compare

if TYPE_CHECKING:
    from tests.gloo.pool import Pools

pytestmark = [pytest.mark.gloo]

WORDS = (
    "local", "global", "in", "1st", "self", "größe", "日本", "a b", "a/b", "a#0", "a@1", "w~2", "w",
    "'", "\\", "\n", "{}", "%s", "x" * 300, "model", "0",
)  # fmt: skip
TAKEN = (
    "code", "graph", "_code", "meta", "recompile", "_call_0", "_state_0", "_graph_0", "_shared_1",
    "recompute_0", "rows", "row_share", "denominator_0", "lifted_tensor_0", "add_1", "T",
)  # fmt: skip
ARGUMENTS = (
    "self_", "input", "rows", "row_share", "args", "code", "in", "lambda", "a.b", "1st", "", "0",
)  # fmt: skip


class Modules(nn.Module):
    """Submodules with words of Python's for names, and with what is no name in Python."""

    def __init__(self) -> None:
        super().__init__()
        self.all = nn.ModuleDict({name: nn.Linear(4, 4) for name in WORDS})

    def forward(self, x: torch.Tensor) -> Any:
        for number, layer in enumerate(self.all.values()):
            x = x + torch.tanh(layer(x)) / (number + 1)
        return {"in": x, "code": x * 2, "": x[:, 0]}


class Tensors(nn.Module):
    """Parameters and buffers with names that the captured graph and its module have, too."""

    def __init__(self) -> None:
        super().__init__()
        for name in TAKEN[::2]:
            self.register_parameter(name, nn.Parameter(torch.randn(4)))
        for name in TAKEN[1::2]:
            self.register_buffer(name, torch.randn(4))
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        for parameter in list(self._parameters.values()):
            x = torch.tanh(self.layer(x) * parameter)
        for buffer in list(self._buffers.values()):
            x = x + buffer.clone() * 0.1
            with torch.no_grad():
                buffer.mul_(0.5)
        x = x * torch.tensor([1.0, 2.0, 3.0, 4.0])
        losses = [nn.functional.cross_entropy(x, target, ignore_index=i) for i in range(2)]
        return losses[0] + losses[1]


class Undecided(nn.Module):
    """Cannot be captured."""

    def __init__(self) -> None:
        super().__init__()
        self.code = nn.Parameter(torch.randn(4))
        self.register_buffer("graph", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.graph += 1
        return x if float(self.code.detach().sum()) > 1e9 else x * self.code


class Arguments(nn.Module):
    """Takes what it is given by any name, into parts that are called as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.add_module("global", Undecided())
        self.graph = self.layer

    def forward(self, self_: torch.Tensor, **others: torch.Tensor) -> torch.Tensor:
        for other in others.values():
            self_ = torch.tanh(self.graph(self_)) + other
        return self.graph(getattr(self, "global")(self_))


CASES = {
    "modules": Compared(Modules, lambda: (torch.randn(8, 4),)),
    "tensors": Compared(Tensors, lambda: (torch.randn(8, 4), torch.randint(4, (8,)))),
    "arguments": Compared(Arguments, lambda: {name: torch.randn(8, 4) for name in ARGUMENTS}),
}


@pytest.mark.parametrize("name", CASES)
def test_any_name(pools: Pools, name: str) -> None:
    pools.run(2, compare, __name__, name, 2)
