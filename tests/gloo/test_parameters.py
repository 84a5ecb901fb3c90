"""Tied, frozen, toggled and unused parameters, and groups of them: as on one device."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

import pyrannc
from tests.gloo.layouts import Layout, config, deployment, share

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from tests.gloo.pool import Pools

pytestmark = [pytest.mark.gloo]
EXACT = {"rtol": 1e-10, "atol": 1e-12}
ROWS = (8, 5, 7)


class Parts(nn.Module):
    """One of each kind of parameter, and what decides which of them a call uses."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.first = nn.Linear(4, 4)
        self.middle = nn.Linear(4, 4)
        self.again = nn.Linear(4, 4)
        self.again.weight = self.middle.weight  # tied within what may be one stage
        self.frozen = nn.Parameter(torch.full((4,), 0.5), requires_grad=False)
        self.late = nn.Linear(4, 4)
        self.unused = nn.Linear(3, 3)
        self.detached = nn.Linear(4, 4)
        self.aside = nn.Linear(4, 2)
        self.last = nn.Linear(4, 7, bias=False)
        self.last.weight = self.embedding.weight  # tied across stages
        self.uses_late = False

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        hidden = torch.tanh(self.first(self.embedding(tokens)))
        hidden = torch.tanh(self.again(torch.tanh(self.middle(hidden)))) + self.frozen
        if self.uses_late:
            hidden = hidden + self.late(hidden)
        with torch.no_grad():
            hidden = hidden + self.detached(hidden)
        scores = self.last(torch.tanh(hidden))
        return {"scores": scores, "aside": self.aside(hidden), "loss": scores.pow(2).mean()}


def make() -> Parts:
    torch.manual_seed(0)
    return Parts().double()


def tokens(rows: int, seed: int) -> Tensor:
    return torch.randint(7, (rows, 3), generator=torch.Generator().manual_seed(seed))


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """Weight decay moves whatever has a gradient, even one of zeros."""
    named = dict(model.named_parameters())
    tail = [named.pop(name) for name in list(named) if name.startswith(("again", "late", "unused"))]
    groups = [
        {"params": tail, "lr": 0.02, "weight_decay": 0.5},
        {"params": [named.pop("first.weight")], "betas": (0.5, 0.9)},
        {"params": list(named.values())},
    ]
    return torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1, eps=1e-6)


CHANGES = {
    "as it is": (),
    "toggled": ("freeze first", "train first"),
    "late": ("late", ""),
    "frozen all but one": ("freeze all but last", "train first"),
    "aside": ("aside", ""),
}
"""What happens before the second and the third step."""


def change(model: nn.Module, how: str) -> None:
    named = list(model.named_parameters(remove_duplicate=True))
    if isinstance(model, pyrannc.RaNNCModule):
        named = list(model.named_parameters(from_global=True))
    if how == "late":
        model.uses_late = True
    elif how == "freeze all but last":
        for name, parameter in named:
            parameter.requires_grad_(name == "embedding.weight")
    elif how in ("freeze first", "train first"):
        for name, parameter in named:
            if name.startswith("first"):
                parameter.requires_grad_(how == "train first")


def loss_of(outputs: dict[str, Tensor], how: str) -> Tensor:
    """What is differentiated: the loss alone, or something of the rows outside of it."""
    return outputs["aside"].pow(2).mean() if how == "aside" else outputs["loss"]


def steps(kind: str) -> Iterable[tuple[int, int, str]]:
    return zip(itertools.count(), ROWS, ("", *(CHANGES[kind] or ("", ""))), strict=False)


def train_plainly(kind: str) -> tuple[list[dict[str, Tensor | None]], dict[str, Tensor], Any]:
    model = make()
    optimizer = optimizer_of(model)
    gradients = []
    for step, rows, how in steps(kind):
        change(model, how)
        optimizer.zero_grad()
        loss_of(model(tokens(rows, step)), how).backward()
        named = model.named_parameters()
        gradients.append({n: None if p.grad is None else p.grad.clone() for n, p in named})
        optimizer.step()
    return gradients, model.state_dict(), optimizer.state_dict()


def train(kind: str, layout: Layout, microbatches: int, folder: str) -> Any:
    path = deployment(make, (share(tokens(ROWS[0], 0)),), layout, folder, microbatches)
    model = make()
    optimizer = optimizer_of(model)
    wrapped: Any = pyrannc.RaNNCModule(
        model, optimizer, load_deployment=path, config=config(len(layout), microbatches)
    )
    gradients = []
    for step, rows, how in steps(kind):
        change(wrapped, how)
        optimizer.zero_grad()
        loss_of(wrapped(share(tokens(rows, step))), how).backward()
        names = [name for name, _ in wrapped.named_parameters(from_global=True)]
        gradients.append({name: wrapped.get_param_grad(name) for name in names})
        optimizer.step()
    assert wrapped.deployment.stage_ranks == [list(ranks) for ranks in layout]
    assert model.last.weight is model.embedding.weight
    assert model.again.weight is model.middle.weight
    result = (wrapped.state_dict(), optimizer.state_dict(from_global=True))
    wrapped.undeploy()
    return gradients, result


LAYOUTS: list[tuple[Layout, int]] = [
    (((0,), (1,)), 2),
    (((0,),), 1),
    (((0,),), 3),
    (((0, 1),), 2),
    (((0,), (1,)), 3),
    (((0,), (1,), (2,), (3,)), 2),
    (((0,), (1, 2, 3)), 2),
    (((0, 1, 2), (3,)), 3),
    (((0, 1), (2, 3)), 1),
]


@pytest.mark.parametrize(
    ("layout", "microbatches"),
    LAYOUTS,
    ids=str,
)
@pytest.mark.parametrize("kind", CHANGES)
def test_every_kind_of_parameter(
    pools: Pools, kind: str, layout: Layout, microbatches: int, tmp_path: Path
) -> None:
    gradients, state, optimizer = train_plainly(kind)
    world = 1 + max(rank for ranks in layout for rank in ranks)
    results = pools.run(world, train, kind, layout, microbatches, str(tmp_path))
    for found, _ in results:
        for step, expected in enumerate(gradients):
            present = {name for name, gradient in expected.items() if gradient is not None}
            assert {n for n, g in found[step].items() if g is not None} == present
            for name in present:
                torch.testing.assert_close(found[step][name], expected[name], **EXACT)
    whole, whole_optimizer = results[0][1]
    assert list(whole) == list(state)  # all names, tied ones twice
    torch.testing.assert_close(whole, state, **EXACT)
    assert whole_optimizer["param_groups"] == optimizer["param_groups"]
    assert whole_optimizer["state"].keys() == optimizer["state"].keys()
    torch.testing.assert_close(whole_optimizer["state"], optimizer["state"], **EXACT)


# ---- What nothing uses


class Careless(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(4, 4)
        self.pooler = nn.Linear(4, 4)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return torch.tanh(self.used(x)).sum()


def check_unused(stages: int) -> None:
    x = share(torch.ones(4, 4))
    for give, told in (
        ((x,), "does not use the parameters `pooler.weight`, `pooler.bias`"),
        ((x, x > 0), "`pooler.bias` and the arguments `mask`"),
    ):
        strict = pyrannc.RaNNCModule(Careless(), check_unused_values=True, config=config(stages))
        with pytest.raises(pyrannc.RaNNCError) as caught:
            strict(*give)
        assert told in str(caught.value)
        assert "check_unused_values=True" in str(caught.value)
        strict.undeploy()
    torch.manual_seed(0)
    model = Careless()
    before = model.pooler.weight.detach().clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    lenient: Any = pyrannc.RaNNCModule(model, optimizer, config=config(stages))
    lenient(x, x > 0).backward()
    optimizer.step()
    assert torch.equal(model.pooler.weight, before)
    if (state := lenient.state_dict()) != {}:
        assert torch.equal(state["pooler.weight"], before)
    lenient.undeploy()


@pytest.mark.parametrize("world", [1, 2])
def test_what_nothing_uses_is_an_error_if_asked(pools: Pools, world: int) -> None:
    pools.run(world, check_unused, 1)


# ---- Optimizers


def chain() -> nn.Sequential:
    torch.manual_seed(0)
    layers = (nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))
    return nn.Sequential(*layers).double()


class Returning(nn.Module):
    """A model that returns its loss, so that all processes see the same."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = chain()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).square().mean()


class Together(torch.optim.SGD):
    """Divides all steps by the norm of all gradients."""

    def step(self, closure: Any = None) -> None:
        if closure is not None:
            with torch.enable_grad():
                closure()
        gradients = [p.grad for group in self.param_groups for p in group["params"]]
        norm = torch.nn.utils.get_total_norm(gradients)
        for gradient in gradients:
            gradient.div_(norm)
        super().step()


class Closing(torch.optim.SGD):
    """Needs a closure."""

    def step(self, closure: Any) -> None:
        with torch.enable_grad():
            closure()
        super().step()


TOGETHER = {
    "LBFGS": lambda parameters: torch.optim.LBFGS(parameters, lr=0.3, max_iter=3),
    "Together": lambda parameters: Together(parameters, lr=0.1),
    "Closing": lambda parameters: Closing(parameters, lr=0.1),
}
APART = {
    "Adafactor": lambda parameters: torch.optim.Adafactor(parameters, lr=0.1),
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=0.1),
    "ASGD": lambda parameters: torch.optim.ASGD(parameters, lr=0.1),
    "Rprop": lambda parameters: torch.optim.Rprop(parameters, lr=0.1),
}


def optimize(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = model(x)
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.step(closure)


def optimize_with(names: list[str], stages: int) -> None:
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for name in names:
        bare, model = Returning().double(), Returning().double()
        make_optimizer = {**TOGETHER, **APART}[name]
        optimizer = make_optimizer(model.parameters())
        wrapped: Any = pyrannc.RaNNCModule(model, optimizer, config=config(stages))
        if name in TOGETHER and stages > 1:
            with pytest.raises(pyrannc.RaNNCError, match=f"`{name}` cannot train parameters"):
                wrapped(share(x))
            wrapped.undeploy()
            continue
        optimize(wrapped, optimizer, share(x))
        optimize(bare, make_optimizer(bare.parameters()), x)
        for key, parameter in bare.named_parameters():
            torch.testing.assert_close(wrapped.get_param(key), parameter, **EXACT)
        wrapped.undeploy()


@pytest.mark.parametrize("stages", [1, 2])
def test_optimizers_that_need_all_parameters_together(pools: Pools, stages: int) -> None:
    pools.run(2, optimize_with, [*TOGETHER, *APART], stages)


def add_foreign() -> None:
    x = share(torch.ones(4, 4, dtype=torch.float64))
    own = nn.Parameter(torch.ones(3))
    for when in ("before", "after"):
        model = Returning().double()
        layers = model.layers
        optimizer = torch.optim.SGD(layers[0].parameters(), lr=0.1)
        wrapped: Any = pyrannc.RaNNCModule(model, optimizer, config=config(2))
        if when == "before":
            optimizer.add_param_group({"params": [own]})
            with pytest.raises(pyrannc.RaNNCError, match="1 parameters that are not the model's"):
                wrapped(x)
        else:
            wrapped(x)
            with pytest.raises(pyrannc.RaNNCError, match="1 parameters that are not the model's"):
                optimizer.add_param_group({"params": [own]})
            with pytest.raises(pyrannc.RaNNCError, match="in another parameter group"):
                optimizer.add_param_group({"params": list(layers[0].parameters())})
            alone = list(wrapped.parameters(from_global=False))
            with pytest.raises(pyrannc.MismatchError, match="add different parameters"):
                optimizer.add_param_group({"params": alone[-1:]})
            assert len(optimizer.param_groups) == 1
        wrapped.undeploy()


def test_parameters_that_are_not_the_models_are_refused(pools: Pools) -> None:
    pools.run(2, add_foreign)


def add_groups(stages: int) -> None:
    """Layers that are trained from the second and the third step on."""
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    bare, model = Returning().double(), Returning().double()
    optimizers = [
        torch.optim.Adam(m.layers[0].parameters(), lr=0.1, eps=1e-4) for m in (bare, model)
    ]
    wrapped: Any = pyrannc.RaNNCModule(model, optimizers[1], config=config(stages))
    given = {0: x, 1: share(x)}
    for step in range(3):
        for index, (of, called) in enumerate(((bare, bare), (model, wrapped))):
            if step < 2:  # once before the first call, and once after
                parameters = list(of.layers[2 + 2 * step].parameters())
                optimizers[index].add_param_group({"params": parameters, "lr": 0.02})
            optimizers[index].zero_grad()
            called(given[index]).backward()
            optimizers[index].step()
    whole = optimizers[1].state_dict(from_global=True)
    if pyrannc.get_rank() == 0:
        torch.testing.assert_close(whole, optimizers[0].state_dict(), **EXACT)
    for key, parameter in bare.named_parameters():
        torch.testing.assert_close(wrapped.get_param(key), parameter, **EXACT)
    wrapped.undeploy()


@pytest.mark.parametrize(
    ("world", "stages"),
    [(2, 2), (1, 1), (2, 1), (4, 2), (4, 3)],
)
def test_parameter_groups_are_added_later(pools: Pools, world: int, stages: int) -> None:
    pools.run(world, add_groups, stages)
