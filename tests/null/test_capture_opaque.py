"""What cannot be captured is called as it is, as one operator."""

from __future__ import annotations

import inspect
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pyrannc import _export
from pyrannc._opaque import Opaque
from pyrannc._remarks import uncaptured
from pyrannc.capture import capture
from pyrannc.errors import CaptureError, ExecutionError
from tests.null.capturing import Graph, captured_graph, check_against_bare, check_parts

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


class TripledGradient(torch.autograd.Function):
    """A rectifier with a backward that is not its derivative."""

    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        context.save_for_backward(x)
        return x.clamp(min=0)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        (x,) = context.saved_tensors
        return gradient * (x > 0) * 3.0


class WithFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = TripledGradient.apply(self.first(x))
        return TripledGradient.apply(self.second(x)) + x


class Deciding(nn.Module):
    """Chooses row by row with Python's `if`."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        rows = [row * 2 if float(row.detach().sum()) > 0 else row for row in self.layer(x)]
        return torch.stack(rows)


class Around(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.before, self.inner, self.after = nn.Linear(8, 8), inner, nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.inner(self.before(x)))


class DecidingByBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        return x * 2 if x.sum() > 0 else x * 3


class Selecting(nn.Module):
    """Makes a tensor whose size depends on what it is given."""

    def forward(self, x: Tensor) -> Tensor:
        return x[x[:, 0] > 0].sum()


class Containers(nn.Module):
    """Takes and gives containers, with another result for each call."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, batch: dict[str, Tensor], *, factor: float) -> dict[str, Any]:
        x = self.layer(batch["x"])
        if float(x.detach().abs().sum()) < 0:
            raise AssertionError
        return {"y": (x * factor, None), "factor": factor}


class UsingContainers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Containers()

    def forward(self, x: Tensor) -> Tensor:
        first = self.inner({"x": x}, factor=2.0)["y"][0]
        return self.inner({"x": first}, factor=0.5)["y"][0]


def _opaque(graph: Graph) -> list[dict[str, Any]]:
    return [node for node in graph.nodes if node["op"].startswith("opaque.")]


def test_a_custom_backward_is_kept() -> None:
    torch.manual_seed(0)
    model, x = WithFunction().double(), torch.randn(6, 8).double()
    graph = captured_graph(model, x)
    assert [node["op"] for node in _opaque(graph)] == ["opaque.TripledGradient"] * 2
    check_against_bare(model, graph, (x,), {})
    check_parts(model, graph, [x], [2], 1e-12)


def test_control_flow_stays_in_its_module() -> None:
    torch.manual_seed(0)
    model, x = Around(Deciding()).double(), torch.randn(6, 8).double()
    graph = captured_graph(model, x)
    (node,) = _opaque(graph)
    assert node["module"] == "inner"
    names = [graph.values[value]["name"] for value in node["inputs"]]
    assert names[1:] == ["inner.layer.weight", "inner.layer.bias", "inner.calls"]
    assert [graph.values[value]["name"] for value in node["mutates"]] == ["inner.calls"]
    assert model.inner.calls == 0
    assert node["flops"] == [2 * 8 * 8, 0]
    for rows in (6, 3, 1):
        check_against_bare(model, graph, (x[:rows],), {})
    check_parts(model, graph, [x], [2], 1e-12)


class Numbering(Deciding):
    """Gives each row the number of the call."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.calls


def test_a_part_may_read_what_it_counts() -> None:
    """Every part of the batch finds the count that the step began with."""
    model, x = Around(Numbering()).double(), torch.randn(6, 8).double()
    graph = captured_graph(model, x)
    assert graph.splittable, graph.reason
    assert model.inner.calls == 0
    check_against_bare(model, graph, (x,), {})


def test_a_decision_over_the_batch_forbids_parts() -> None:
    torch.manual_seed(0)
    model, x = Around(DecidingByBatch()).double(), torch.randn(6, 8).double()
    graph = captured_graph(model, x)
    assert not graph.splittable
    assert "`opaque.DecidingByBatch` in `inner`" in graph.reason
    check_against_bare(model, graph, (x,), {})


def test_the_whole_model_may_be_one_operator() -> None:
    torch.manual_seed(0)
    model, x = Deciding().double(), torch.randn(5, 8).double()
    graph = captured_graph(model, x)
    assert len(graph.nodes) == 1
    check_against_bare(model, graph, (x,), {})


def test_sizes_that_depend_on_values_make_a_module_opaque() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), Selecting()).double()
    x = torch.randn(6, 8).double()
    graph = captured_graph(model, x)
    assert len(_opaque(graph)) == 1
    assert not graph.splittable
    check_against_bare(model, graph, (x,), {})


def test_opaque_modules_take_and_give_containers() -> None:
    torch.manual_seed(0)
    model, x = UsingContainers().double(), torch.randn(6, 8).double()
    graph = captured_graph(model, x)
    assert len(_opaque(graph)) == 2
    check_against_bare(model, graph, (x,), {})
    check_parts(model, graph, [x], [2], 1e-12)


def test_gradients_stop_where_the_opaque_part_stops_them() -> None:
    class Stopping(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = x * 2 if float(x.detach().sum()) > -1e9 else x
            return y, y.detach()

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.inner = nn.Linear(8, 8), Stopping()

        def forward(self, x: Tensor) -> Tensor:
            y, stopped = self.inner(self.layer(x))
            return y * stopped

    torch.manual_seed(0)
    model, x = Model().double(), torch.randn(6, 8).double()
    graph = captured_graph(model, x)
    (node,) = _opaque(graph)
    assert [graph.values[v]["requires_grad"] for v in node["outputs"]] == [True, False]
    check_against_bare(model, graph, (x,), {})


def test_without_real_parameters_there_is_an_error() -> None:
    with torch.device("meta"):
        model, x = Around(Deciding()), torch.randn(6, 8)
    with pytest.raises(CaptureError, match="real parameters"):
        capture(model, (x,))


def test_an_error_of_the_model_itself_is_passed_on() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        capture(nn.Linear(3, 2), (torch.randn(4, 5),))


def test_capture_leaves_random_numbers_and_buffers_alone() -> None:
    model = Around(nn.Sequential(Deciding(), nn.BatchNorm1d(8), nn.Dropout(0.5)))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    capture(model, (torch.ones(6, 8),))
    torch.testing.assert_close(torch.rand(3), expected)
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(buffer, before[name])


class Writing(Deciding):
    """Keeps something of what it saw, in one of several ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.register_buffer("low", torch.zeros(1))
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("histogram", torch.zeros(4, dtype=torch.long), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        result = super().forward(x)
        with torch.no_grad():
            if self.way == "assigned":
                self.low = torch.minimum(self.low, x.min())
            elif self.way == "unchanged":
                self.low = torch.minimum(self.low, x.abs().min())
            elif self.way == "average":
                self.mean.mul_(0.9).add_(x.mean(0), alpha=0.1)
            elif self.way == "histogram":
                self.histogram += torch.histc(x, 4).long()
            elif self.way == "rows":
                self.calls.add_(x.shape[0])
            elif self.way == "decided":
                self.calls.add_(1)
        return result


@pytest.mark.parametrize(
    "way", ["assigned", "unchanged", "average", "histogram", "rows", "decided"]
)
def test_what_a_part_keeps_of_its_rows_keeps_them_together(way: str) -> None:
    torch.manual_seed(0)
    model, x = Around(Writing(way)), torch.randn(6, 8)
    captured = capture(model, (x,))
    graph = json.loads(captured.graph_json)
    assert not graph["batch"]["splittable"]
    assert "writes what depends on the rows to the buffer `inner." in graph["batch"]["reason"]


def test_a_shared_buffer_is_not_assigned_to() -> None:
    model = Around(nn.Sequential(Writing("assigned"), Writing("none")))
    model.inner[1].low = model.inner[0].low
    with pytest.raises(CaptureError, match=r"assigns to `inner.0.low`, a buffer that has other"):
        capture(model, (torch.randn(6, 8),))


def test_a_part_that_writes_to_other_buffers_later_is_refused() -> None:
    class Rare(Deciding):
        def forward(self, x: Tensor) -> Tensor:
            if x.max() > 100:
                self.calls.add_(1)
            return x * 2

    captured = capture(Around(Rare()), (torch.randn(6, 8),))
    (part,) = [m for m in captured.module.modules() if isinstance(m, Opaque)]
    with pytest.raises(ExecutionError, match=r"wrote to the buffer `inner.calls`.*\n.*where"):
        part([torch.full((6, 8), 200.0)], part.site.state)


def test_all_parts_of_a_kind_are_found_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    exports = []
    original = _export.exported
    monkeypatch.setattr(_export, "exported", lambda *a: [exports.append(1), original(*a)][1])
    model = nn.Sequential(*(Around(Deciding()) for _ in range(6)))
    captured = capture(model, (torch.randn(6, 8),))
    assert len(captured.obstacles) == 6
    assert len(exports) <= 4
    text = uncaptured(captured, model)
    assert "6 parts of the model cannot be captured" in text
    assert "33 % of the parameters and 33 % of the arithmetic" in text
    line = inspect.getsourcelines(Deciding.forward)[1] + 2
    assert "`0.inner` (Deciding) and 5 more of its kind: Python decides by what a" in text
    assert f"{__file__}:{line}" in text
    assert "hint: use `torch.where`" in text


def test_only_those_of_a_kind_that_stop_the_exporter_stay_whole() -> None:
    class Sometimes(nn.Module):
        def __init__(self, decides: bool) -> None:
            super().__init__()
            self.decides, self.layer = decides, nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) * 2 if self.decides and x.sum() > 1e9 else self.layer(x)

    model = nn.Sequential(*(Sometimes(decides) for decides in (False, True, False, True)))
    graph = captured_graph(model, torch.randn(6, 8))
    assert [node["module"] for node in _opaque(graph)] == ["1", "3"]
