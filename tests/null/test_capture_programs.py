"""Models whose forwards do more than call operators."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pyrannc.capture import capture
from pyrannc.errors import CaptureError
from tests.null.capturing import Graph, captured_graph, check_against_bare, check_parts

if TYPE_CHECKING:
    from collections.abc import Callable


class Program(nn.Module):
    """Two layers around a function of the model and their result."""

    def __init__(self, function: Callable[[Program, Tensor], Any]) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 4)
        self.register_buffer("steps", torch.zeros(()))
        self.kept: Tensor | None = None
        self.count = 0
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self, self.first(x))


def _assigned_buffer(model: Program, x: Tensor) -> Tensor:
    model.steps = model.steps + 1
    return model.second(x) / model.steps


def _written_buffer(model: Program, x: Tensor) -> Tensor:
    model.steps.add_(1)
    return model.second(x) / model.steps


def _kept_tensor(model: Program, x: Tensor) -> Tensor:
    model.kept = x.relu()
    return model.second(model.kept)


def _masked_assignment(model: Program, x: Tensor) -> Tensor:
    x = model.second(x)
    x[x > 0.1] = 0.5
    return x


def _view_assignment(model: Program, x: Tensor) -> Tensor:
    x = model.second(x)
    x[:, 1:3].mul_(2)
    x[:, 0] += 1
    return x * x


def _gradient(model: Program, x: Tensor) -> Tensor:
    point = x.detach().requires_grad_()
    (slope,) = torch.autograd.grad(model.second(point).tanh().sum(), point, create_graph=True)
    return slope * x


def _functional(model: Program, x: Tensor) -> Tensor:
    doubled = {"weight": model.second.weight * 2, "bias": model.second.bias}
    return torch.func.functional_call(model.second, doubled, (x,))


def _distribution(model: Program, x: Tensor) -> Tensor:
    posterior = torch.distributions.Normal(x, model.second(x).exp())
    prior = torch.distributions.Normal(0.0, 1.0)
    return torch.distributions.kl_divergence(posterior, prior).sum(-1).mean()


PROGRAMS: dict[str, Callable[[Program, Tensor], Any]] = {
    "assigned buffer": _assigned_buffer,
    "written buffer": _written_buffer,
    "kept tensor": _kept_tensor,
    "masked assignment": _masked_assignment,
    "view assignment": _view_assignment,
    "gradient inside": _gradient,
    "functional call": _functional,
    "distribution": _distribution,
    "checkpoint": lambda model, x: checkpoint(model.second, x, use_reentrant=False),
    "reentrant checkpoint": lambda model, x: checkpoint(model.second, x, use_reentrant=True),
    "shared layer": lambda model, x: model.second(model.second(x)),
    "numpy": lambda model, x: x * float(model.second.weight.detach().numpy().sum()),
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_are_captured(name: str) -> None:
    if name in ("masked assignment", "distribution") and sys.version_info < (3, 11):
        pytest.skip("on Python 3.10 torch exports it in a form whose batch is not split")
    model, bare = Program(PROGRAMS[name]).double(), Program(PROGRAMS[name]).double()
    x = torch.randn(6, 3).double()
    graph = captured_graph(model, x)
    assert model.kept is None
    # The planner keeps together what touches a tensor that is written to; these tests do not.
    whole = name in ("assigned buffer", "written buffer", "view assignment")
    check_against_bare(model, graph, (x,), {}, bare=bare, num_stages=1 if whole else 3)
    if "buffer" not in name:
        check_parts(model, graph, [x], [1, 3], 1e-12)


@pytest.mark.parametrize("name", ["weight_norm", "spectral_norm", "orthogonal"])
def test_parametrized_weights(name: str) -> None:
    norm = getattr(nn.utils.parametrizations, name)
    model = nn.Sequential(norm(nn.Linear(3, 4)), nn.ReLU(), nn.Linear(4, 2)).double()
    x = torch.randn(5, 3).double()
    graph = captured_graph(model, x)
    assert graph.splittable
    bare = nn.Sequential(norm(nn.Linear(3, 4)), nn.ReLU(), nn.Linear(4, 2)).double()
    check_against_bare(model, graph, (x,), {}, exact=False, bare=bare)


def test_hooks_are_captured() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU()).double()
    model[0].register_forward_hook(lambda module, args, result: result * 2)
    x = torch.randn(5, 3).double()
    check_against_bare(model, captured_graph(model, x), (x,), {})


def test_the_users_input_may_be_written_to() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.add_(1) * 2

    x = torch.randn(5, 3)
    graph = captured_graph(Model(), x)
    (stage,) = graph.cut(1)
    before = x.clone()
    (result,) = stage({stage.inputs[0]: x}, 5).values()
    torch.testing.assert_close(x, before)
    torch.testing.assert_close(result, (before + 1) * 2)


def test_counters_are_told_of(caplog: pytest.LogCaptureFixture) -> None:
    def counting(model: Program, x: Tensor) -> Tensor:
        model.count += 1
        return model.second(x)

    model = Program(counting)
    with caplog.at_level(logging.WARNING, "pyrannc"):
        capture(model, (torch.randn(4, 3),))
    assert "`count` changes in forward" in caplog.text
    assert model.count == 0


class Sorting(nn.Module):
    """Mixes rows and puts them back in order, and counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        order = x.detach().sum(-1).argsort()
        return torch.zeros_like(x).index_copy(0, order, x[order] * 2)


def test_counters_are_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    """However often capture is tried, and not those of parts that run as they are."""

    def balanced(model: Program, x: Tensor) -> Tensor:
        model.count += 1
        chosen = model.second(model.sorting(x)).softmax(-1).mean(0)
        return chosen @ chosen.roll(1)

    model = Program(balanced)
    model.sorting = Sorting()
    with caplog.at_level(logging.WARNING, "pyrannc"):
        captured = capture(model, (torch.randn(4, 3),), output_reduction="mean")
    assert captured.static_rows is None
    assert captured.runs_submodules
    told = [text for text in caplog.messages if "changes in forward" in text]
    assert told == ["`count` changes in forward; captured, it is a constant"]


def test_statistics_of_the_batch_in_buffers_forbid_parts() -> None:
    def averaging(model: Program, x: Tensor) -> Tensor:
        model.steps.mul_(0.9).add_(x.detach().mean() * 0.1)
        return model.second(x)

    model, bare = Program(averaging).double(), Program(averaging).double()
    x = torch.randn(6, 3).double()
    graph = captured_graph(model, x)
    assert "stores something of the batch" in graph.reason
    check_against_bare(model, graph, (x,), {}, bare=bare)


def test_packed_sequences_are_left_whole() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.LSTM(3, 4, batch_first=True)

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            packed = nn.utils.rnn.pack_padded_sequence(
                x, lengths, batch_first=True, enforce_sorted=False
            )
            output, _ = nn.utils.rnn.pad_packed_sequence(
                self.layer(packed)[0], batch_first=True, total_length=x.size(1)
            )
            return output

    model = Model().double()
    args = (torch.randn(4, 5, 3).double(), torch.tensor([5, 2, 3, 1]))
    graph = captured_graph(model, *args)
    assert [node["op"] for node in graph.nodes] == ["opaque.Model"]
    check_against_bare(model, graph, args, {}, exact=False)


def test_sizes_cannot_be_returned() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, int]:
            return x * 2, x.size(0)

    with pytest.raises(CaptureError, match="`result 1` is a number computed from the batch size"):
        capture(Model(), (torch.randn(4, 3),))


def test_a_model_without_tensors_is_refused() -> None:
    class Model(nn.Module):
        def forward(self, size: int) -> Tensor:
            return torch.zeros(size)

    with pytest.raises(CaptureError, match="without any tensor"):
        capture(Model(), (3,))


def test_a_ratio_of_means_counts_before_the_step() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return (F.relu(self.layer(x)) * mask).mean() / mask.mean()

    model = Model().double()
    x, mask = torch.randn(7, 3).double(), (torch.rand(7, 1) > 0.5).double()
    graph = Graph.of(capture(model, (x, mask)))
    assert len(graph.captured.denominators) == 1
    check_against_bare(model, graph, (x, mask), {}, exact=False)
    check_parts(model, graph, [x, mask], [2, 3], 1e-12)
