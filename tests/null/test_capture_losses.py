"""Losses of parts of the batch add up to the loss of the whole, and so do their gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyrannc.capture import capture
from tests.null.capturing import Graph, captured_graph, check_against_bare, check_parts

if TYPE_CHECKING:
    from collections.abc import Callable


class Regression(nn.Module):
    """A model that ends in a function of its result and a target of the same shape."""

    def __init__(self, loss: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 4).double()
        self.loss = loss

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return self.loss(self.layer(x), y)


class Classification(Regression):
    """A model that ends in a function of its scores and class numbers."""

    def __init__(self, loss: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__(loss)
        self.register_buffer("weight", torch.tensor([1.0, 2.0, 0.5, 3.0]).double())

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return self.loss(self.layer(x), y, self.weight)


ELEMENTWISE: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "mse": F.mse_loss,
    "mse sum": lambda p, y: F.mse_loss(p, y, reduction="sum"),
    "mse none": lambda p, y: F.mse_loss(p, y, reduction="none").mean(),
    "l1": F.l1_loss,
    "smooth l1": F.smooth_l1_loss,
    "huber": F.huber_loss,
    "bce": lambda p, y: F.binary_cross_entropy(p.sigmoid(), y.sigmoid()),
    "bce with logits": lambda p, y: F.binary_cross_entropy_with_logits(p, y.sigmoid()),
    "kl batchmean": lambda p, y: F.kl_div(p.log_softmax(-1), y.softmax(-1), reduction="batchmean"),
    "kl mean": lambda p, y: F.kl_div(p.log_softmax(-1), y.softmax(-1), reduction="mean"),
    "soft margin": lambda p, y: F.soft_margin_loss(p, y.sign()),
    "cosine": lambda p, y: F.cosine_embedding_loss(p, y, y[:, 0].sign()),
    "triplet": lambda p, y: F.triplet_margin_loss(p, y, y.flip(-1)),
    "margin ranking": lambda p, y: F.margin_ranking_loss(p, y, y.sign()),
    "poisson": F.poisson_nll_loss,
    "probabilities": lambda p, y: F.cross_entropy(p, y.softmax(-1)),
    "by hand": lambda p, y: (p - y).pow(2).sum() / p.size(0),
    "by hand per element": lambda p, y: (p - y).pow(2).sum() / (p.size(0) * p.size(1)),
    "inverse number": lambda p, y: (p - y).pow(2).sum() * (1.0 / p.size(0)),
    "division first": lambda p, y: ((p - y).pow(2) / p.size(0)).sum(),
    "row means": lambda p, y: (p - y).abs().mean(-1).mean(),
    "two losses": lambda p, y: F.mse_loss(p, y) + 0.5 * F.l1_loss(p, y),
    "added number": lambda p, y: 3 - 2 * (F.mse_loss(p, y) + 1.5),
    "stacked": lambda p, y: torch.stack([F.mse_loss(p, y), F.l1_loss(p, y)]).sum(),
    "column sums": lambda p, y: (p - y).sum(0),
    "column means": lambda p, y: (p - y).mean(0, keepdim=True).squeeze(0) * 2,
    "with rows": lambda p, y: (F.mse_loss(p, y), p * 2),
    "masked mean": lambda p, y: ((p - y).abs() * (y > 0)).sum() / (y > 0).sum(),
    "clamped count": lambda p, y: ((p - y) * (y > 0)).sum() / (y > 0).sum().clamp(min=1),
    "rows by a count": lambda p, y: (p * (y > 0)) / (y > 0).sum(),
    "count of correct": lambda p, y: (p.argmax(-1) == y.argmax(-1)).float().mean(),
}
CLASSES: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {
    "plain": lambda p, y, w: F.cross_entropy(p, y.clamp(min=0)),
    "ignore": lambda p, y, w: F.cross_entropy(p, y, ignore_index=-1),
    "weights": lambda p, y, w: F.cross_entropy(p, y.clamp(min=0), weight=w),
    "weights and ignore": lambda p, y, w: F.cross_entropy(p, y, weight=w, ignore_index=-1),
    "smoothing": lambda p, y, w: F.cross_entropy(p, y.clamp(min=0), label_smoothing=0.1),
    "smoothing and ignore": lambda p, y, w: F.cross_entropy(
        p, y, label_smoothing=0.1, ignore_index=-1
    ),
    "smoothing and weights": lambda p, y, w: F.cross_entropy(
        p, y.clamp(min=0), weight=w, label_smoothing=0.1
    ),
    "all": lambda p, y, w: F.cross_entropy(p, y, weight=w, label_smoothing=0.1, ignore_index=-1),
    "nll": lambda p, y, w: F.nll_loss(p.log_softmax(-1), y, ignore_index=-1),
    "sum": lambda p, y, w: F.cross_entropy(p, y, reduction="sum", ignore_index=-1),
    "none": lambda p, y, w: F.cross_entropy(p, y, reduction="none", ignore_index=-1),
    "per place": lambda p, y, w: F.cross_entropy(
        p.unsqueeze(-1).expand(-1, -1, 2), torch.stack([y, y], 1), ignore_index=-1
    ),
    "two": lambda p, y, w: F.cross_entropy(p, y, ignore_index=-1) + F.nll_loss(p, y.clamp(min=0)),
    "multi margin": lambda p, y, w: F.multi_margin_loss(p, y.clamp(min=0)),
    "half": lambda p, y, w: F.cross_entropy(p.bfloat16(), y, ignore_index=-1).double(),
}
UNSPLITTABLE: dict[str, tuple[Callable[[Tensor, Tensor], Any], str]] = {
    "root of a mean": (lambda p, y: F.mse_loss(p, y).sqrt(), "aten.sqrt"),
    "product of means": (lambda p, y: F.mse_loss(p, y) * F.l1_loss(p, y), "aten.mul"),
    "rows less their mean": (lambda p, y: p - p.mean(0), "aten.sub"),
    "largest row": (lambda p, y: p.max(), "aten.max"),
    "number of rows": (lambda p, y: p + p.size(0), "aten.add"),
    "norm": (lambda p, y: p.norm(), "aten.linalg_vector_norm"),
    "quotient": (lambda p, y: p.sum() / p.abs().sum(), "aten.div"),
    "rounded mean": (lambda p, y: (p.mean() * 10).long(), "aten.to"),
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def _check(model: nn.Module, graph: Graph, inputs: tuple[Tensor, ...], tolerance: float) -> None:
    check_against_bare(model, graph, inputs, {}, exact=False)
    check_parts(model, graph, list(inputs), [1, 5], tolerance)


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_losses_of_parts_add_up(name: str) -> None:
    model = Regression(ELEMENTWISE[name])
    inputs = (torch.randn(7, 3).double(), torch.randn(7, 4).double())
    _check(model, captured_graph(model, *inputs), inputs, 1e-6 if "correct" in name else 1e-12)


@pytest.mark.parametrize("name", CLASSES)
def test_classification_losses_of_parts_add_up(name: str) -> None:
    model = Classification(CLASSES[name])
    inputs = (torch.randn(7, 3).double(), torch.tensor([0, 3, -1, 2, -1, 1, 1]))
    graph = captured_graph(model, *inputs)
    if name == "half":
        check_against_bare(model, graph, inputs, {}, exact=False)
        return
    _check(model, graph, inputs, 1e-12)


@pytest.mark.parametrize("name", UNSPLITTABLE)
def test_what_is_no_sum_cannot_be_split(name: str) -> None:
    loss, culprit = UNSPLITTABLE[name]
    model = Regression(loss)
    inputs = (torch.randn(7, 3).double(), torch.randn(7, 4).double())
    graph = captured_graph(model, *inputs)
    assert not graph.splittable
    assert culprit in graph.reason
    check_against_bare(model, graph, inputs, {})


def test_targets_that_the_model_computes_cannot_be_counted_before() -> None:
    model = Classification(lambda p, y, w: F.cross_entropy(p, p.argmax(-1)))
    graph = captured_graph(model, torch.randn(7, 3).double(), torch.zeros(7, dtype=torch.long))
    assert not graph.splittable
    assert "targets that the model computes" in graph.reason


def test_a_part_without_any_target_adds_nothing() -> None:
    model = Classification(lambda p, y, w: F.cross_entropy(p, y, ignore_index=-1))
    inputs = (torch.randn(6, 3).double(), torch.tensor([-1, -1, -1, 2, 0, 1]))
    check_parts(model, captured_graph(model, *inputs), list(inputs), [3], 1e-12)


def test_a_penalty_on_parameters_counts_once() -> None:
    class Penalised(Regression):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return super().forward(x, y) + 0.1 * self.layer.weight.pow(2).sum()

    model = Penalised(F.mse_loss)
    inputs = (torch.randn(7, 3).double(), torch.randn(7, 4).double())
    _check(model, captured_graph(model, *inputs), inputs, 1e-12)


def test_losses_may_take_keywords_and_inputs_may_require_gradients() -> None:
    model = Regression(F.mse_loss)
    x, y = torch.randn(5, 3).double().requires_grad_(), torch.randn(5, 4).double()
    graph = Graph.of(capture(model, (), {"y": y, "x": x}))
    assert [graph.values[value]["name"] for value in graph.data["inputs"]] == ["y", "x"]
    assert [graph.values[v]["requires_grad"] for v in graph.data["inputs"]] == [False, True]
    check_against_bare(model, graph, (), {"y": y, "x": x})


def test_counts_never_need_parameters() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 4)
            self.weight = nn.Parameter(torch.ones(4), requires_grad=False)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(self.layer(x), y, weight=self.weight)

    # A process that counts its targets may not hold the parameter.
    graph = captured_graph(Model(), torch.randn(7, 3), torch.zeros(7, dtype=torch.long))
    assert not graph.splittable
