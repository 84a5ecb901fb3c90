"""A captured graph is the same whatever order the model's code ran in."""

from __future__ import annotations

import json
from contextvars import ContextVar
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyrannc.capture import capture

NAMES = ("full", "sliding", "chunked", "dilated")
ORDER: ContextVar[tuple[str, ...]] = ContextVar("ORDER", default=NAMES)
"""What a process's hash seed makes of `set(NAMES)`."""


def _linears() -> nn.ModuleDict:
    return nn.ModuleDict({name: nn.Linear(4, 4) for name in NAMES})


class Submodules(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = _linears()

    def forward(self, x: Tensor) -> Tensor:
        table = {name: self.layers[name](x) for name in ORDER.get()}
        return torch.stack([table[name] for name in NAMES]).sum(0)


class Functions(nn.Module):
    """Several operators for each name, all in one module: in order of what they read."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterDict({name: nn.Parameter(torch.randn(4, 4)) for name in NAMES})

    def forward(self, x: Tensor) -> Tensor:
        table = {}
        for name in ORDER.get():
            hidden = F.relu(F.linear(x, self.weights[name]))
            table[name] = F.linear(hidden, self.weights[name]) * len(name)
        return torch.stack([table[name] for name in NAMES]).sum(0)


class Masks(Submodules):
    """Constants, which the exporter numbers."""

    def forward(self, x: Tensor) -> Tensor:
        masks = {name: torch.tensor([1.0, 0.0, 1.0, len(name)]) for name in ORDER.get()}
        for name in NAMES * 2:
            x = self.layers[name](x) * masks[name]
        return x


class Attributes(Submodules):
    """Tensors that are no parameters and no buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.scales = {name: torch.randn(4) for name in NAMES}

    def forward(self, x: Tensor) -> Tensor:
        table = {name: self.layers[name](x) * self.scales[name] for name in ORDER.get()}
        return torch.stack([table[name] for name in NAMES]).sum(0)


class Dropouts(Submodules):
    """Operators that only differ in what becomes of their results."""

    def forward(self, x: Tensor) -> Tensor:
        table = {name: F.dropout(x) for name in ORDER.get()}
        return torch.stack([self.layers[name](table[name]) for name in NAMES]).sum(0)


class Norms(Submodules):
    """Operators that write, each to memory of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleDict({name: nn.BatchNorm1d(4) for name in NAMES})

    def forward(self, x: Tensor) -> Tensor:
        table = {name: F.relu_(self.norms[name](self.layers[name](x))) for name in ORDER.get()}
        return torch.stack([table[name] for name in NAMES]).sum(0)


class Losses(Submodules):
    """Losses over counted targets, whose denominators all processes add up."""

    def forward(self, x: Tensor) -> Tensor:
        target = x.argmax(1)
        table = {
            name: F.cross_entropy(self.layers[name](x), target, ignore_index=NAMES.index(name))
            for name in ORDER.get()
        }
        return torch.stack([table[name] for name in NAMES]).sum()


MODELS = (Submodules, Functions, Masks, Attributes, Dropouts, Norms, Losses)


def captured(model: nn.Module, order: tuple[str, ...]) -> Any:
    token = ORDER.set(order)
    try:
        return json.loads(capture(model, (torch.ones(6, 4),)).graph_json)
    finally:
        ORDER.reset(token)


@pytest.mark.parametrize("kind", MODELS)
def test_the_order_of_a_set_does_not_show(kind: type[nn.Module]) -> None:
    model = kind()
    first = captured(model, NAMES)
    assert captured(model, NAMES[::-1]) == first
    assert captured(model, (NAMES[2], NAMES[0], NAMES[3], NAMES[1])) == first


class Recurrent(nn.Module):
    """Loops of which each goes on with what the last one has made, and what is called once."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.outer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        first, states = x[:, 0], []
        for step in range(12):
            first = torch.tanh(self.inner(x[:, step]) + F.linear(first, self.inner.weight))
            states.append(first)
        second = torch.zeros_like(first)
        for state in states:
            second = self.outer(state) + second.sin()
        early = self.inner.bias.cos()
        return torch.cat([-second[:, 2:], second[:, :2]], 1) * early


def test_a_program_without_sets_keeps_its_order() -> None:
    graph = json.loads(capture(Recurrent(), (torch.randn(3, 12, 4),)).graph_json)
    operators = [node["op"].split(".")[1] for node in graph["nodes"]]
    step = ["select", "linear", "linear", "add", "tanh"]
    loops = ["select", *step * 12, "zeros_like", *["linear", "sin", "add"] * 12]
    assert operators == [*loops, "cos", "slice", "neg", "slice", "cat", "mul"]


class Accumulated(Submodules):
    """Writes to one tensor in the order of the set, which counts."""

    def forward(self, x: Tensor) -> Tensor:
        total = x.clone()
        for name in ORDER.get():
            total.mul_(self.layers[name](x))
        return total


def test_writes_keep_their_order() -> None:
    model = Accumulated()
    assert captured(model, NAMES) != captured(model, NAMES[::-1])
