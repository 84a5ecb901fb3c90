"""Loops over all parameters, of which other processes hold some: as on one device, or an error."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

import pyrannc
from tests.gloo.layouts import config, share

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.gloo.pool import Pools

pytestmark = [pytest.mark.gloo]
RATE = 0.1


def make() -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    return nn.Sequential(*layers).double()


def batch() -> Tensor:
    return torch.randn(8, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def loss_of(model: nn.Module) -> Tensor:
    x = batch()
    loss: Tensor = model(share(x) if isinstance(model, pyrannc.RaNNCModule) else x).pow(2).mean()
    return loss


# ---- What is right


def descend(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.sub_(RATE * parameter.grad)
    for parameter in model.parameters():
        assert parameter.grad is not None
        parameter.data -= RATE * parameter.grad.data
        parameter.data.clamp_(-0.3, 0.3)
        parameter.data = parameter.data * 0.9


def descend_with_momentum(model: nn.Module) -> None:
    momenta = [torch.zeros_like(parameter) for parameter in model.parameters()]
    for _ in range(2):
        model.zero_grad()
        loss_of(model).backward()
        for momentum, parameter in zip(momenta, model.parameters(), strict=True):
            parameter.data.add_(momentum.mul_(0.9).add_(parameter.grad), alpha=-RATE)


def average(model: nn.Module) -> None:
    averages = [parameter.detach().clone() for parameter in model.parameters()]
    descend(model)
    for mean, parameter in zip(averages, model.parameters(), strict=True):
        parameter.data.copy_(mean.mul_(0.5).add_(parameter.data, alpha=0.5))


def clip(model: nn.Module) -> None:
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    torch.nn.utils.clip_grad_value_(model.parameters(), 0.01)
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(0.5)
    descend(model)


def clear_by_hand(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.zero_()
    loss_of(model).backward()
    descend(model)
    model.zero_grad()
    assert all(parameter.grad is None for parameter in model.parameters())


def optimize(model: nn.Module) -> None:
    """With an optimizer that the wrapper does not know."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, eps=1e-4)
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(model).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
    if isinstance(model, pyrannc.RaNNCModule):
        whole: Callable[..., Any] = optimizer.state_dict
        state = whole(from_global=True).get("state", ())
        assert len(state) == (6 if pyrannc.get_rank() == 0 else 0)


def regularize(model: nn.Module) -> None:
    """With the gradient of a penalty on what each process holds."""
    alone = {"from_global": False} if isinstance(model, pyrannc.RaNNCModule) else {}
    penalty = sum(parameter.pow(2).sum() for parameter in model.parameters(**alone))
    (loss_of(model) + RATE * penalty).backward()
    descend(model)


LOOPS = (
    descend, descend_with_momentum, average, clip, clear_by_hand, optimize, regularize,
)  # fmt: skip


def run_loops(stages: int) -> None:
    for loop in LOOPS:
        bare, model = make(), make()
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
        wrapped: Any = pyrannc.RaNNCModule(model, optimizer, config=config(stages))
        for one in (bare, wrapped):
            loss_of(one).backward()
            loop(one)
        optimizer.zero_grad()
        assert all(parameter.grad is None for parameter in wrapped.parameters())
        for name, parameter in bare.named_parameters():
            found = wrapped.get_param(name)
            torch.testing.assert_close(found, parameter.detach(), rtol=1e-10, atol=1e-12)
        wrapped.undeploy()


@pytest.mark.parametrize("stages", [1, 2])
def test_loops_over_parameters(pools: Pools, stages: int) -> None:
    pools.run(2, run_loops, stages)


# ---- What needs values


def averaged(wrapped: Any, copied: nn.Module) -> None:
    model = torch.optim.swa_utils.AveragedModel(copied)
    model.update_parameters(wrapped)


READINGS: tuple[Callable[[Any, nn.Module], Any], ...] = (
    lambda model, copied: [
        own.data.copy_(p.data)
        for own, p in zip(copied.parameters(), model.parameters(), strict=True)
    ],
    lambda model, copied: [
        own.detach().lerp_(p.detach(), 0.1)
        for own, p in zip(copied.parameters(), model.parameters(), strict=True)
    ],
    averaged,
    lambda model, _: sum(p.pow(2).sum() for p in model.parameters()),
    lambda model, _: sum(p.abs().sum().item() for p in model.parameters()),
    lambda model, _: torch.nn.utils.parameters_to_vector(model.parameters()),
    lambda model, _: [p.detach().cpu().numpy() for p in model.parameters()],
    lambda model, _: [p.flatten()[0] for p in model.parameters()],
    lambda model, _: any(p.isnan().any() for p in model.parameters()),
    lambda model, _: [f"{p.mean():.3f}" for p in model.parameters()],
    lambda model, _: copy.deepcopy([p.data for p in model.parameters()]),
    lambda model, _: [p.tolist() for p in model.parameters()],
)  # fmt: skip
NORMS: tuple[Callable[[Any], Any], ...] = (
    lambda model: torch.stack([p.grad.norm() for p in model.parameters()]).norm(),
    lambda model: sum(p.grad.pow(2).sum() for p in model.parameters() if p.grad is not None),
    lambda model: torch.cat([p.grad.flatten() for p in model.parameters()]).norm(),
    lambda model: torch._foreach_norm([p.grad for p in model.parameters()]),
    lambda model: max(p.grad.abs().max().item() for p in model.parameters()),
)


def read() -> None:
    bare, model = make(), make()
    copied = copy.deepcopy(model)
    wrapped: Any = pyrannc.RaNNCModule(model, config=config(2))
    loss_of(wrapped).backward()
    for reading in READINGS:
        with pytest.raises(pyrannc.RaNNCError, match=r"which only other ranks hold\n.*get_param"):
            reading(wrapped, copied)
    for norm in NORMS:
        with pytest.raises(pyrannc.RaNNCError, match=r"the gradient of .*\n.*calc_grad_norm\(\)"):
            norm(wrapped)
    every = list(wrapped.parameters())
    assert [p.shape for p in every] == [p.shape for p in bare.parameters()]
    assert sum(p.numel() for p in every) == sum(p.numel() for p in bare.parameters())
    assert all(p.grad is not None and p.grad.shape == p.shape for p in every)
    alone = list(wrapped.parameters(from_global=False))
    assert 0 < len(alone) < len(every)
    for own, (name, _) in zip(copied.parameters(), wrapped.named_parameters(), strict=True):
        own.data.copy_(wrapped.get_param(name))  # as the message says
    wrapped.undeploy()


def test_what_needs_values_is_refused(pools: Pools) -> None:
    pools.run(2, read)
