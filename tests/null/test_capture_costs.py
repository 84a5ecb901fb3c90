"""What capture says of memory and operations is what a real run shows."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pyrannc.stage import build_stage
from tests.models import case
from tests.null.capturing import Graph, captured_graph, check_against_bare, check_parts


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def _at(quantity: Any, rows: int) -> int:
    return quantity[0] * rows + quantity[1] if isinstance(quantity, list) else quantity


def _really_saved(graph: Graph, tensors: list[Tensor], rows: int) -> int:
    """Bytes of the storages that autograd keeps, parameters and buffers left out."""
    captured = graph.captured
    keys = [node["key"] for node in graph.nodes]
    stage = build_stage(captured, keys, graph.data["inputs"], graph.data["outputs"])
    state = [*captured.state.values()]
    kept = {tensor.untyped_storage().data_ptr() for tensor in state}
    total = 0
    alive = []

    def pack(tensor: Tensor) -> Tensor:
        nonlocal total
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in kept:
            kept.add(storage.data_ptr())
            alive.append(storage)
            total += storage.nbytes()
        return tensor

    denominators = [count(tensors) for count in captured.denominators]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        stage(dict(zip(stage.inputs, tensors, strict=True)), rows, 1.0, denominators)
    return total


@pytest.mark.parametrize("name", ["gpt", "residual", "skips", "recurrent", "loss_out", "function"])
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning")
def test_saved_bytes_are_those_of_a_real_run(name: str) -> None:
    chosen = case(name)
    model = chosen.make_model()
    args, kwargs = chosen.make_batch(4)
    graph = captured_graph(model, *args, **kwargs)
    for rows in (4, 7):
        args, kwargs = chosen.make_batch(rows)
        tensors = graph.captured.flatten_inputs(args, kwargs)
        predicted = sum(_at(node["saved_bytes"], rows) for node in graph.nodes)
        really = _really_saved(graph, tensors, rows)
        assert predicted == pytest.approx(really, rel=0.02, abs=64)


def test_gradients_flow_where_they_do_in_a_real_run() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.frozen, self.trained = nn.Linear(4, 4), nn.Linear(4, 4)
            self.frozen.requires_grad_(requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.frozen(x).relu()
            trained = self.trained(hidden)
            return trained * trained.detach().sigmoid(), trained.argmax(-1)

    graph = captured_graph(Model(), torch.randn(3, 4))
    flags = {value["name"]: value["requires_grad"] for value in graph.values}
    expected = {"linear": False, "relu": False, "linear_1": True, "detach": False, "mul": True}
    assert {name: flags[name] for name in expected} == expected
    assert [graph.values[v]["requires_grad"] for v in graph.data["outputs"]] == [True, False]


def test_operators_of_one_signature_cost_the_same() -> None:
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)), nn.Linear(8, 2))
    graph = captured_graph(model, torch.randn(3, 8))
    signatures = [node["signature"] for node in graph.nodes]
    # The first has an input that needs no gradient, the last another size.
    assert [signatures.count(signature) for signature in signatures] == [1, 3, 3, 3, 1]


def test_nothing_outlives_its_last_use() -> None:
    seen: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    class Watching(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
        ) -> Any:
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                seen.append(weakref.ref(result))
            alive.append(sum(reference() is not None for reference in seen))
            return result

    model = nn.Sequential(*(nn.Sigmoid() for _ in range(10)))
    graph = captured_graph(model, torch.randn(3, 8))
    (stage,) = graph.cut(1)
    x = torch.randn(3, 8)
    with torch.no_grad(), Watching():
        stage({stage.inputs[0]: x}, 3)
    assert max(alive) <= 2
    assert len(seen) >= 10


def test_operators_can_move_to_another_device() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.ones(x.size(0), 3, device=x.device) * torch.tensor([1.0, 2.0, 3.0])

    x = torch.randn(2, 3)
    graph = captured_graph(Model(), x)
    graph.captured.move_to(torch.device("meta"))
    (stage,) = graph.cut(1)
    (result,) = stage({stage.inputs[0]: x.to("meta")}, 2).values()
    assert result.device.type == "meta"
    assert all(tensor.is_meta for tensor in stage.buffers.values())


def test_experts_are_whole_so_that_the_batch_can_be_split() -> None:
    class Experts(nn.Module):
        """Sorts tokens by expert, lets each expert do its own, and puts them back."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(2, 4, 4).double())

        def forward(self, tokens: Tensor, chosen: Tensor) -> Tensor:
            order = chosen.argsort(stable=True)
            mixed = torch.einsum("td,tde->te", tokens[order], self.weight[chosen[order]])
            return torch.zeros_like(tokens).index_copy(0, order, mixed)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.experts = nn.Linear(4, 12).double(), Experts()
            self.after = nn.Linear(4, 8).double()

        def forward(self, x: Tensor) -> Tensor:
            tokens = self.before(x).view(-1, 4)
            chosen = (tokens.detach().sum(-1) > 0).long()
            return self.after(self.experts(tokens, chosen).view(-1, 3, 4))

    torch.manual_seed(0)
    model, x = Model(), torch.randn(6, 4).double()
    graph = captured_graph(model, x)
    assert graph.splittable, graph.reason
    assert [n["module"] for n in graph.nodes if n["op"].startswith("opaque")] == ["experts"]
    check_against_bare(model, graph, (x,), {})
    check_parts(model, graph, [x], [1, 3], 1e-12)
