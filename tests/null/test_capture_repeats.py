"""Operators that are looked at once: the graph is the same as when each of them runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyrannc import _export, _measure, _repeats
from pyrannc._replay import UnclearError
from pyrannc.capture import capture

if TYPE_CHECKING:
    from collections.abc import Callable


class Repeated(nn.Module):
    """Several equal layers, each a linear and something else."""

    def __init__(self, then: Callable[[Tensor], Tensor], times: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(times))
        self.then = [then] * times

    def forward(self, x: Tensor) -> Tensor:
        for layer, then in zip(self.layers, self.then, strict=True):
            x = then(layer(x))
        return x


def attention(x: Tensor) -> Tensor:
    query, key, value = x.view(-1, 2, 3).unbind(1)[0].repeat(1, 3).chunk(3, 1)
    mixed = F.scaled_dot_product_attention(query[:, None], key[:, None], value[:, None])
    return mixed.flatten(1).repeat(1, 2)


def written_in_place(x: Tensor) -> Tensor:
    return x.relu_().mul_(2).add_(x)


def written_through_a_view(x: Tensor) -> Tensor:
    made = torch.zeros_like(x)
    made[:, 1:3] = x[:, 1:3]
    made.t()[4] += 1
    return made + x


def view_written_to(x: Tensor) -> Tensor:
    view = x.view(-1, 3, 2)
    view.add_(1)
    return x * view.flatten(1)


def without_gradients(x: Tensor) -> Tensor:
    with torch.no_grad():
        scale = x.abs().max(1, keepdim=True).values
    return x / scale + x.detach()


def under_autocast(x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = x @ torch.ones(6, 6)
    return y.float() + x


def several_results(x: Tensor) -> Tensor:
    values, indices = x.sort(1)
    first, second = values.split(3, 1)
    return torch.cat([second, first], 1) + torch.var_mean(x, 1, keepdim=True)[1] + indices


def the_same(x: Tensor) -> Tensor:
    return x.contiguous().to(torch.float32).reshape(x.shape).expand(x.shape)


def normalised(x: Tensor) -> Tensor:
    mean, variance = torch.zeros(6), torch.ones(6)
    return F.batch_norm(F.layer_norm(x, (6,)), mean, variance, training=True)


def by_numbers(x: Tensor) -> Tensor:
    return (x * 1 + x * 1.0 + x * True).clamp(min=0) + (x > 0).sum() / 7


ALL = [
    attention,
    written_in_place,
    written_through_a_view,
    view_written_to,
    without_gradients,
    under_autocast,
    several_results,
    the_same,
    normalised,
    by_numbers,
]


def run_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    def unclear(*arguments: object) -> None:
        raise UnclearError

    monkeypatch.setattr(_repeats, "_key", lambda *arguments: None)
    monkeypatch.setattr(_measure, "_replayed", unclear)


@pytest.mark.parametrize("then", ALL)
def test_the_graph_is_as_if_all_had_run(
    then: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = Repeated(then), torch.randn(4, 6)
    found = capture(model, (x,)).graph_json
    run_everything(monkeypatch)
    assert found == capture(model, (x,)).graph_json


def test_repeats_are_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[object] = []
    original = _repeats._Tracer._description

    def counted(self: _repeats._Tracer, *arguments: Any) -> object:
        ran.append(arguments)
        return original(self, *arguments)

    monkeypatch.setattr(_repeats._Tracer, "_description", counted)
    counts = []
    for times in (2, 12):
        ran.clear()
        capture(Repeated(attention, times), (torch.randn(4, 6),))
        counts.append(len(ran))
    assert counts[0] == counts[1] > 5


def test_a_derivative_inside_the_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    class Model(Repeated):
        def forward(self, x: Tensor) -> Tensor:
            x = x.requires_grad_()
            (slope,) = torch.autograd.grad(super().forward(x).sum(), x, create_graph=True)
            return slope

    tries = []
    original = _export.exported

    def counted(*arguments: object) -> object:
        tries.append(arguments)
        return original(*arguments)

    monkeypatch.setattr(_export, "exported", counted)
    model, x = Model(torch.tanh), torch.randn(4, 6)
    found = capture(model, (x,)).graph_json
    # As exporting did not work with made results, it was tried without.
    assert len(tries) >= 3
    run_everything(monkeypatch)
    assert found == capture(model, (x,)).graph_json
