"""What the capture tests share: stages cut by hand, and the bare model to compare with."""

from __future__ import annotations

import copy
import itertools
import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyrannc import _core
from pyrannc._structure import flatten
from pyrannc.capture import Captured, capture
from pyrannc.stage import StageModule, build_stage


@dataclass(frozen=True)
class Graph:
    """The captured graph's JSON, with what tests ask of it."""

    captured: Captured
    data: dict[str, Any]

    @classmethod
    def of(cls, captured: Captured) -> Graph:
        # The core checks what makes a graph valid.
        _core.Graph.from_json(captured.graph_json)
        return cls(captured, json.loads(captured.graph_json))

    @property
    def values(self) -> list[dict[str, Any]]:
        return self.data["values"]

    @property
    def nodes(self) -> list[dict[str, Any]]:
        return self.data["nodes"]

    @property
    def splittable(self) -> bool:
        return self.data["batch"]["splittable"]

    @property
    def reason(self) -> str:
        return self.data["batch"].get("reason", "")

    def rows_of(self, name: str) -> Any:
        """The `rows` of the value with this name."""
        return next(value["rows"] for value in self.values if value["name"] == name)

    @property
    def output_rows(self) -> list[Any]:
        return [self.values[value]["rows"] for value in self.data["outputs"]]

    def batch_keys(self) -> list[str]:
        """Operators that depend on the model's inputs, in order."""
        dependent = set(self.data["inputs"])
        keys = []
        for node in self.nodes:
            if dependent.intersection(node["inputs"]):
                dependent.update(node["outputs"])
                keys.append(node["key"])
        return keys

    def with_constants(self, keys: set[str], wanted: list[int] = ()) -> set[str]:  # type: ignore[assignment]
        """The keys, and those of operators without inputs that they or `wanted` need."""
        batch = set(self.batch_keys())
        producers = {output: node for node in self.nodes for output in node["outputs"]}
        found = set(keys)
        stack = [value for node in self.nodes if node["key"] in keys for value in node["inputs"]]
        stack += wanted
        while stack:
            node = producers.get(stack.pop())
            if node is not None and node["key"] not in batch | found:
                found.add(node["key"])
                stack += node["inputs"]
        return found

    def cut(self, num_stages: int) -> list[StageModule]:
        """Stages of consecutive operators."""
        keys = self.batch_keys()
        size = max(1, -(-len(keys) // num_stages))
        groups = [set(keys[i : i + size]) for i in range(0, len(keys), size)] or [set()]
        groups[0] |= {node["key"] for node in self.nodes if node.get("mutates")} - set(keys)
        groups = [self.with_constants(group) for group in groups]
        groups[-1] = self.with_constants(groups[-1], self.data["outputs"])
        return [self._stage(group, groups[i + 1 :]) for i, group in enumerate(groups)]

    def _stage(self, keys: set[str], later: list[set[str]]) -> StageModule:
        state = {
            index
            for index, value in enumerate(self.values)
            if value["kind"] in ("parameter", "buffer", "constant")
        }
        made = {output for node in self.nodes if node["key"] in keys for output in node["outputs"]}
        read = {value for node in self.nodes if node["key"] in keys for value in node["inputs"]}
        needed = set(self.data["outputs"])
        for group in later:
            needed.update(v for node in self.nodes if node["key"] in group for v in node["inputs"])
        return build_stage(
            self.captured,
            [node["key"] for node in self.nodes if node["key"] in keys],
            sorted(read - state - made),
            sorted(made & needed),
        )

    def run(
        self,
        stages: list[StageModule],
        tensors: list[Tensor],
        rows: int,
        row_share: float = 1.0,
        denominators: list[Tensor] = (),  # type: ignore[assignment]
    ) -> list[Tensor]:
        """The outputs of stages that run one after the other."""
        known = dict(zip(self.data["inputs"], tensors, strict=True))
        for stage in stages:
            given = {value: known[value] for value in stage.inputs}
            known |= stage(given, rows, row_share, denominators)
        return [
            known[value] if value in known else self.captured.state[self.values[value]["name"]]
            for value in self.data["outputs"]
        ]


def captured_graph(model: nn.Module, *args: Any, **kwargs: Any) -> Graph:
    """The graph of a model called like this."""
    return Graph.of(capture(model, args, kwargs))


def check_against_bare(
    model: nn.Module,
    graph: Graph,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    num_stages: int = 3,
    exact: bool = True,
    bare: nn.Module | None = None,
) -> None:
    """Stages give what the bare model gives: results, gradients and buffers."""
    if bare is None:
        bare = copy.deepcopy(model)
    bare.load_state_dict(model.state_dict())
    bare.zero_grad()
    model.zero_grad()
    mine = graph.captured.flatten_inputs(args, kwargs)
    tensors = [tensor.detach().clone().requires_grad_(tensor.requires_grad) for tensor in mine]
    denominators = [count(tensors) for count in graph.captured.denominators]
    rows = graph.captured.num_rows(tensors)
    outputs = graph.run(graph.cut(num_stages), tensors, rows, 1.0, denominators)
    expected, _, _ = flatten(bare(*args, **kwargs), unknown=lambda *_: None)
    assert len(outputs) == len(expected)
    _backward(outputs)
    _backward(expected)
    pairs = list(zip(outputs, expected, strict=True))
    pairs += zip(model.buffers(), bare.buffers(), strict=True)
    for found, wanted in zip(
        [*model.parameters(), *tensors], [*bare.parameters(), *mine], strict=True
    ):
        assert (found.grad is None) == (wanted.grad is None)
        if found.grad is not None:
            pairs.append((found.grad, wanted.grad))
    for found, wanted in pairs:
        tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-9, "atol": 1e-12}
        torch.testing.assert_close(found, wanted, **tolerance)


def check_parts(
    model: nn.Module, graph: Graph, tensors: list[Tensor], cuts: list[int], tolerance: float
) -> None:
    """Every value of the whole batch is made of its values for parts, as its `rows` say.

    Gradients of the parts add up to those of the whole.
    """
    assert graph.splittable, graph.reason
    made = [value for node in graph.nodes for value in node["outputs"]]
    keys = [node["key"] for node in graph.nodes]
    stage = build_stage(graph.captured, keys, graph.data["inputs"], made)
    total = graph.captured.num_rows(tensors)
    denominators = [count(tensors) for count in graph.captured.denominators]

    def run(start: int, stop: int) -> dict[int, Tensor]:
        part = [
            tensor[start:stop] if index in graph.captured.batch_inputs else tensor
            for index, tensor in enumerate(tensors)
        ]
        given = dict(zip(graph.data["inputs"], part, strict=True))
        rows = stop - start
        found = stage(given, rows, rows / total, denominators)
        known = {**given, **found}
        _backward([known[value] for value in graph.data["outputs"] if value in known], start, graph)
        return found

    model.zero_grad()
    whole = run(0, total)
    gradients = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    edges = [0, *cuts, total]
    parts = [run(start, stop) for start, stop in itertools.pairwise(edges)]
    close = {"rtol": tolerance, "atol": tolerance}
    # What does not depend on the batch's values is made anew for each part.
    batch_keys = set(graph.batch_keys())
    batch = {v for node in graph.nodes if node["key"] in batch_keys for v in node["outputs"]}
    for value in sorted(batch):
        joined = _joined(graph.values[value], [part[value] for part in parts])
        name = graph.values[value]["name"]
        torch.testing.assert_close(
            joined, whole[value], **close, msg=lambda text, name=name: f"{name}: {text}"
        )
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        if gradient is not None:
            torch.testing.assert_close(parameter.grad, gradient, **close)


def _joined(value: dict[str, Any], parts: list[Tensor]) -> Tensor:
    rows = value["rows"]
    if rows == "none":
        return parts[0]
    if rows == "sum":
        return torch.stack(parts).sum(0)
    split = rows["split"]
    dim, outer, inner = split["dim"], split["outer"], split["inner"]
    unfolded = [part.unflatten(dim, (outer, -1, inner)) for part in parts]
    return torch.cat(unfolded, dim + 1).flatten(dim, dim + 2)


def _backward(outputs: list[Tensor], start: int = 0, graph: Graph | None = None) -> None:
    """Backward with seeds that differ between rows."""
    total: Any = 0
    for index, output in enumerate(outputs):
        if not output.requires_grad:
            continue
        weight: Any = 1.0
        rows = graph.output_rows[index] if graph is not None else "none"
        if output.dim() > 0 and isinstance(rows, dict) and rows["split"]["outer"] == 1:
            dim, inner = rows["split"]["dim"], rows["split"]["inner"]
            entries = torch.arange(output.shape[dim]) // inner + start
            shape = [1] * output.dim()
            shape[dim] = -1
            weight = entries.to(output.real.dtype).view(shape) * 0.1 + 1
        total = total + (output * weight).sum().real.double()
    if isinstance(total, Tensor):
        total.backward()
