"""A stage whose inner values are computed again: fewer bytes saved, the same numbers."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn

from pyrannc.stage import StageModule, build_stage
from tests.null.capturing import Graph, captured_graph

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch.utils.hooks import RemovableHandle

ROWS = 4


class Layer(nn.Module):
    """A linear with all that makes computing again hard: random numbers, views, in-place."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 4 * width)
        self.back = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Adds something to `x`."""
        first, second = torch.relu_(self.linear(x)).chunk(2, dim=1)
        mixed = nn.functional.dropout(first.sigmoid() * second.tanh(), 0.3, self.training)
        return x + self.back(mixed)


class Layers(nn.Module):
    """Layers beside each other, then one on their sum; the last in bfloat16."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.left = Layer(width)
        self.right = Layer(width)
        self.last = Layer(width)

    def forward(self, x: Tensor) -> Tensor:
        """Calls all layers."""
        both = self.left(x) + self.right(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.last(both)


@pytest.fixture(scope="module")
def graph() -> Graph:
    return captured_graph(Layers(16), torch.randn(ROWS, 16))


def stage(graph: Graph, groups: list[list[str]]) -> StageModule:
    """The whole model, its groups together."""
    keys = [node["key"] for node in graph.nodes]
    grouped = {key for group in groups for key in group}
    order = [key for group in groups for key in group]
    order += [key for key in keys if key not in grouped]
    order = order if groups else keys
    return build_stage(graph.captured, order, graph.data["inputs"], graph.data["outputs"], groups)


def of_layer(graph: Graph, name: str) -> list[str]:
    return [node["key"] for node in graph.nodes if node["module"].split(".")[0] == name]


@contextlib.contextmanager
def saved_bytes(stage: StageModule) -> Iterator[list[int]]:
    """How many bytes autograd keeps in the body, parameters left out; each storage once."""
    own = {p.untyped_storage().data_ptr() for p in stage.parameters.values()}
    kept: dict[int, Tensor] = {}
    total = [0]

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and storage.data_ptr() not in kept:
            kept[storage.data_ptr()] = tensor
            total[0] += storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield total


def train(stage: StageModule, x: Tensor) -> tuple[list[Tensor], int]:
    """The result and all gradients, with the same random numbers every time; the bytes saved."""
    torch.manual_seed(5)
    x = x.clone().requires_grad_()
    with saved_bytes(stage) as saved:
        (result,) = stage({stage.inputs[0]: x}, ROWS).values()
    following = torch.rand(3)
    gradients = torch.autograd.grad(result.sum(), [x, *stage.parameters.values()])
    return [result, following, *gradients], saved[0]


def counted(stage: StageModule) -> tuple[list[int], list[RemovableHandle]]:
    """Counts how often operators of groups run."""
    count = [0]

    def add(*_: object) -> None:
        count[0] += 1

    inner = [module for name, module in stage.module.named_modules() if name.endswith(".inner")]
    return count, [module.register_forward_pre_hook(add) for module in inner]


def test_numbers_are_the_same_and_fewer_bytes_are_saved(graph: Graph) -> None:
    x = torch.randn(ROWS, 16)
    keys = [node["key"] for node in graph.nodes]
    expected, all_bytes = train(stage(graph, []), x)
    found, fewer_bytes = train(stage(graph, [of_layer(graph, "left")]), x)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert fewer_bytes < all_bytes
    found, no_bytes = train(stage(graph, [keys]), x)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert no_bytes <= x.nbytes


def test_operators_of_a_group_may_lie_between_others(graph: Graph) -> None:
    def start(name: str) -> list[str]:
        keys = of_layer(graph, name)
        return keys[: next(index for index, key in enumerate(keys) if "dropout" in key)]

    group = start("left") + start("right")
    keys = [node["key"] for node in graph.nodes]
    assert keys[: len(group)] != group
    x = torch.randn(ROWS, 16)
    expected, _ = train(stage(graph, []), x)
    built = stage(graph, [group])
    count, _ = counted(built)
    found, _ = train(built, x)
    # The gradients of `x` from both layers and the sum are added in another order, in float32.
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert count == [2]


def test_nothing_is_computed_again_without_gradients(graph: Graph) -> None:
    built = stage(graph, [of_layer(graph, "left")])
    count, _ = counted(built)
    x = torch.randn(ROWS, 16)
    with torch.no_grad():
        built({built.inputs[0]: x}, ROWS)
    assert count == [1]
    train(built, x)
    assert count == [3]
