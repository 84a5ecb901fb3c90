"""Parameters that the replicas of a stage divide: nothing changes but the memory."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import pyrannc
from pyrannc import executor, sharding
from pyrannc.optimizer import check_element_wise
from tests.covering import covering
from tests.gloo.layouts import Layout, deployment, share
from tests.gloo.test_equivalence import EXACT, EXACT_STATE, ROWS, check
from tests.gloo.training import OPTIMIZERS, Setup
from tests.models import case

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from tests.gloo.pool import Pools

pytestmark = [pytest.mark.gloo]

CONFIG = pyrannc.Config(
    partition_num=1, pipeline_num=1, measure=False, profile_cache_dir="off", timeout_s=40
)
LEVELS = ("parameters", "gradients", "optimizer")
ONE_STAGE: list[Layout] = [((0, 1),), ((0, 1, 2, 3),)]
TWO_STAGES: list[Layout] = [((0,), (1, 2, 3)), ((0, 1), (2, 3)), ((0, 1, 2), (3,))]


def setup(layout: Layout, level: str, microbatches: int = 1, **options: Any) -> Setup:
    world = 1 + max(rank for ranks in layout for rank in ranks)
    return Setup(ROWS[world], 0, microbatches, stage_ranks=layout, sharding=level, **options)


@pytest.mark.parametrize(
    ("layout", "level", "microbatches"),
    covering([*TWO_STAGES, *ONE_STAGE], LEVELS, [3, 1]),
    ids=str,
)
def test_a_loss_is_the_same(
    pools: Pools, layout: Layout, level: str, microbatches: int, tmp_path: Path
) -> None:
    check(pools, case("gpt"), setup(layout, level, microbatches), tmp_path)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer(pools: Pools, optimizer: str, level: str, tmp_path: Path) -> None:
    chosen = setup(((0, 1),), level, 2, optimizer=optimizer)
    check(pools, case("fork_join"), chosen, tmp_path)


OTHERS: list[tuple[str, Layout, dict[str, Any]]] = [
    ("gpt", ((0, 1), (1, 2)), {"schedule": "1f1b", "shares": ((3, 1), (1, 2))}),
    ("gpt", ((0, 1),), {"recompute": 5}),
    ("masked_loss", ((0, 1, 2),), {"schedule": "1f1b"}),
    ("shared_embedding", ((0, 1), (0, 1)), {}),  # the embedding is of both stages
    ("small_param", ((0, 1),), {}),  # parameters of one entry
    ("recurrent", ((0, 1),), {}),
    ("dict_in_out", ((0, 1), (2, 3)), {}),
    ("skips", ((0, 1), (2, 3)), {}),
]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("other", OTHERS, ids=str)
def test_other_models_are_the_same(
    pools: Pools, other: tuple[str, Layout, dict[str, Any]], level: str, tmp_path: Path
) -> None:
    name, layout, options = other
    check(pools, case(name), setup(layout, level, 2, **options), tmp_path)


@pytest.mark.parametrize("level", LEVELS)
def test_replicas_without_rows_take_part(pools: Pools, level: str, tmp_path: Path) -> None:
    rows = ((1, 2), (2, 0), (0, 1))
    chosen = Setup(rows, microbatches=2, stage_ranks=((0, 1),), sharding=level)
    check(pools, case("fork_join"), chosen, tmp_path)


# ---- What each rank holds


@dataclass(frozen=True, slots=True)
class Held:
    """Bytes on one rank after a step, but for the last two, which are the most within one."""

    parameters: int
    gradients: int
    optimizer: int
    gathered: int
    unscattered: int


class Chain(nn.Module):
    """Layers of equal size."""

    def __init__(self, num_layers: int = 16, width: int = 8) -> None:
        super().__init__()
        layers = [nn.Linear(width, width, bias=False) for _ in range(num_layers)]
        self.layers = nn.ModuleList(layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x.pow(2).mean()


def nbytes(tensors: Iterable[torch.Tensor | None]) -> int:
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in tensors
        if t is not None and t.untyped_storage().nbytes() > 0
    }
    return sum(storages.values())


def hold(level: str, folder: str) -> Held:
    planned = deployment(Chain, (torch.ones(4, 8),), ((0, 1),), folder, 1, level)
    model = Chain()
    optimizer = torch.optim.Adam(model.parameters())
    wrapped = pyrannc.RaNNCModule(model, optimizer, load_deployment=planned, config=CONFIG)
    gathered, unscattered = [0], [0]
    taking, freeing = sharding._Divided.take_memory, sharding._Divided.free_memory
    adding = executor.Executor._add_scattered
    now = 0

    def take(self: Any) -> None:
        nonlocal now
        taking(self)
        now += self.whole.nbytes
        gathered.append(now)

    def give(self: Any) -> None:
        nonlocal now
        now -= self.whole.nbytes
        freeing(self)

    def add(self: Any, parameters: Any, gradients: dict[str, torch.Tensor], step: Any) -> None:
        unscattered.append(nbytes(gradients.values()))
        adding(self, parameters, gradients, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding._Divided, "take_memory", take)
        patch.setattr(sharding._Divided, "free_memory", give)
        patch.setattr(executor.Executor, "_add_scattered", add)
        wrapped(torch.ones(4, 8)).backward()
        optimizer.step()
    states = [t for state in optimizer.state.values() for t in state.values() if t.numel() > 1]
    held = Held(
        parameters=nbytes(model.parameters()),
        gradients=nbytes(p.grad for p in model.parameters()),
        optimizer=nbytes(states),
        gathered=max(gathered),
        unscattered=max(unscattered),
    )
    wrapped.undeploy()
    return held


def test_memory_is_saved(pools: Pools, tmp_path: Path) -> None:
    all_of_it = 16 * 8 * 8 * 4
    part, unit = all_of_it // 2, all_of_it // 8
    expected = {
        "none": Held(all_of_it, all_of_it, 2 * all_of_it, 0, 0),
        "optimizer": Held(all_of_it, part, 2 * part, 0, 0),
        "gradients": Held(all_of_it, part, 2 * part, 0, unit),
        "parameters": Held(part, part, 2 * part, unit, unit),
    }
    for level, held in expected.items():
        assert pools.run(2, hold, level, str(tmp_path)) == [held] * 2, level


# ---- Changes of values that no optimizer makes


def halve(parameter: nn.Parameter) -> None:
    parameter.data.mul_(0.5)


def replace(parameter: nn.Parameter) -> None:
    parameter.data = parameter.data * 0.75


def turn(parameter: nn.Parameter) -> None:
    with torch.no_grad():
        parameter.neg_()


def change_by_hand(layout: Layout, level: str, folder: str) -> None:
    """Outputs without any step between, and after one, as the bare model's."""
    x = torch.linspace(0, 1, 32, dtype=torch.float64).view(4, 8)
    bare, model = Chain(4).double(), Chain(4).double()
    model.load_state_dict(bare.state_dict())
    mine = torch.optim.SGD(model.parameters(), lr=0.5)
    theirs = torch.optim.SGD(bare.parameters(), lr=0.5)
    file = deployment(lambda: Chain(4).double(), (share(x),), layout, folder, 1, level)
    wrapped = pyrannc.RaNNCModule(model, mine, load_deployment=file, config=CONFIG)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for tensor in state.values():
        torch.distributed.broadcast(tensor, 0)
    bare.load_state_dict(state)
    for change in (halve, replace, turn, halve):
        for parameter in wrapped.parameters():
            change(parameter)
        for parameter in bare.parameters():
            change(parameter)
        with torch.no_grad():
            torch.testing.assert_close(wrapped(share(x)), bare(x), **EXACT)
        replaced = [p for p in wrapped.parameters() if change is replace]
        for owner, optimizer in ((wrapped, mine), (bare, theirs)):
            owner.zero_grad()
            owner(share(x) if owner is wrapped else x).backward()
            for parameter in owner.parameters() if replaced else []:
                replace(parameter)
            optimizer.step()
        with torch.no_grad():
            torch.testing.assert_close(wrapped(share(x)), bare(x), **EXACT)
    first = next(iter(wrapped.parameters(from_global=False)))
    part, first.data = first.data, torch.zeros(3, 3)
    told = r"shape \[3, 3\].*needed this process's part of it, of shape.*\n.*load_state_dict"
    with pytest.raises(pyrannc.RaNNCError, match=told):
        wrapped(share(x))
    first.data = part
    wrapped(share(x))
    wrapped.undeploy()


@pytest.mark.parametrize("layout", [((0, 1),), ((0, 1), (2, 3))], ids=str)
@pytest.mark.parametrize("level", LEVELS)
def test_values_may_be_changed_by_hand(
    pools: Pools, layout: Layout, level: str, tmp_path: Path
) -> None:
    world = 1 + max(rank for ranks in layout for rank in ranks)
    pools.run(world, change_by_hand, layout, level, str(tmp_path))


# ---- What is left when the ranks part


class Scaled(Chain):
    """A chain with a parameter that is smaller than the number of replicas."""

    def __init__(self) -> None:
        super().__init__(4)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.scale.square().sum()


def make_scaled() -> nn.Module:
    torch.manual_seed(0)
    return Scaled().double()


def part(layout: Layout, level: str, fused: bool, folder: str) -> None:
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    planned = deployment(make_scaled, (share(x),), layout, folder, 1, level)
    plain, model = make_scaled(), make_scaled()
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.1, fused=fused) for m in (plain, model)]
    model_keys = model.state_dict().keys()
    wrapped = pyrannc.RaNNCModule(model, optimizers[1], load_deployment=planned, config=CONFIG)

    def step(called: nn.Module, rows: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        called(rows).backward()
        optimizer.step()

    for _ in range(2):
        step(plain, x, optimizers[0])
        step(wrapped, share(x), optimizers[1])
    held = [name for name, _ in wrapped.named_parameters(from_global=False)]
    with pytest.raises(pyrannc.RaNNCError, match=r"this rank's part of .*\n.*own state_dict\(\)"):
        model.state_dict()
    assert wrapped.state_dict().keys() == (model_keys if pyrannc.get_rank() == 0 else set())
    pyrannc.clear()
    expected, found = dict(plain.named_parameters()), dict(model.named_parameters())
    for name in held:
        torch.testing.assert_close(found[name], expected[name], **EXACT)
        torch.testing.assert_close(found[name].grad, expected[name].grad, **EXACT)
        kept = (o.state[p[name]] for o, p in zip(optimizers, (expected, found), strict=True))
        torch.testing.assert_close(*kept, **EXACT)
    if len(layout) == 1:  # all of it is here, and plain
        for _ in range(2):
            step(plain, x, optimizers[0])
            step(model, x, optimizers[1])
        torch.testing.assert_close(model.state_dict(), plain.state_dict(), **EXACT_STATE)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    ("layout", "fused"),
    [
        (((0, 1, 2),), False),
        (((0, 1, 2),), True),
        (((0,), (1, 2)), False),
        (((0, 1), (1, 2)), True),
    ],
    ids=str,
)
def test_undeploy_gives_whole_parameters_back(
    pools: Pools, layout: Layout, level: str, fused: bool, tmp_path: Path
) -> None:
    pools.run(3, part, layout, level, fused, str(tmp_path))


def part_apart() -> None:
    model = make_scaled()
    wrapped = pyrannc.RaNNCModule(model, enable_zero=True, config=CONFIG)
    x = torch.ones(2, 8, dtype=torch.float64)
    wrapped(x)
    if pyrannc.get_rank() == 0:
        with pytest.raises(pyrannc.MismatchError, match=r"rank 1: model.undeploy\(\)"):
            wrapped(x)
    else:
        with pytest.warns(UserWarning, match=r"stay this process's parts.*(?s:.*)rank 0: model\("):
            wrapped.undeploy()


def test_undeploy_on_some_ranks_is_named(pools: Pools) -> None:
    pools.run(2, part_apart)
    pools.drop(2)


# ---- How it is asked for, and who may not


def train_with_zero(path: str) -> tuple[list[str], bool]:
    """Trains with a scheduler, gradients set to zero and parameters changed by hand."""
    torch.manual_seed(0)
    plain, model = Chain(4).double(), Chain(4).double()
    model.load_state_dict(plain.state_dict())
    optimizers = []
    for one in (plain, model):
        groups = [{"params": one.layers[:2].parameters()}, {"params": one.layers[2:].parameters()}]
        optimizers.append(torch.optim.AdamW(groups, lr=0.1))
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(o, 0.5) for o in optimizers]
    wrapped = pyrannc.RaNNCModule(model, optimizers[1], enable_zero=True, config=CONFIG)
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mine = x.chunk(pyrannc.get_world_size())[pyrannc.get_rank()]
    for step in range(4):
        optimizers[0].zero_grad(set_to_none=step == 1)
        optimizers[1].zero_grad(set_to_none=step == 1)
        for _ in range(1 + step % 2):  # gradients accumulate
            plain(x).backward()
            wrapped(mine).backward()
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            scheduler.step()
        with torch.no_grad():
            for parameter in [*plain.parameters(), *wrapped.parameters()]:
                parameter.clamp_(-0.3, 0.3)
        with torch.no_grad():
            torch.testing.assert_close(wrapped.eval()(mine), plain(x), rtol=1e-10, atol=1e-12)
        wrapped.train()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(wrapped.get_param(name), parameter, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(
            wrapped.get_param_grad(name), parameter.grad, rtol=1e-10, atol=1e-12
        )
    wrapped.load_state_dict(Chain(4).double().state_dict())
    levels = wrapped.deployment.stage_sharding
    wrapped.save_deployment(path)
    wrapped.undeploy()
    loaded = pyrannc.RaNNCModule(
        Chain(4).double(), enable_zero=True, load_deployment=path, config=CONFIG
    )
    loaded(mine)
    again = loaded.deployment.stage_sharding == levels
    loaded.undeploy()
    return levels, again


def test_enable_zero(pools: Pools, tmp_path: Path) -> None:
    assert pools.run(2, train_with_zero, str(tmp_path / "plan.json")) == [(["optimizer"], True)] * 2


class Lamb(torch.optim.SGD):
    """A step as long as the parameter, whatever the gradient."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.sub_(parameter.grad * (parameter.norm() / parameter.grad.norm()))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (torch.optim.LBFGS, "all parameters together"),
        (torch.optim.Adafactor, "rows and columns"),
        (lambda p: torch.optim.Muon(list(p)), "whole matrices"),
        (Lamb, "gives another result than on the whole"),
    ],
)
def test_optimizers_that_are_not_element_wise(make: Any, reason: str) -> None:
    model = Chain(2)
    with pytest.raises(pyrannc.RaNNCError, match=reason) as caught:
        pyrannc.RaNNCModule(model, make(model.parameters()), enable_zero=True, config=CONFIG)
    assert "hint: leave out `enable_zero`" in str(caught.value)


def divide_for_another(folder: str) -> None:
    """Sharding is asked for by a setting, then by a loaded deployment."""
    x = torch.ones(2, 8)
    refused = {"match": "`Lamb` cannot train parameters that are divided between replicas"}
    asking = dataclasses.replace(CONFIG, sharding="optimizer")
    model = Chain(2)
    optimizer = Lamb(model.parameters(), lr=0.1)
    with pytest.raises(pyrannc.RaNNCError, **refused):
        pyrannc.RaNNCModule(model, optimizer, config=asking)
    path = deployment(lambda: Chain(2), (x,), ((0, 1),), folder, 1, "optimizer")
    wrapped = pyrannc.RaNNCModule(model, optimizer, load_deployment=path, config=CONFIG)
    with pytest.raises(pyrannc.RaNNCError, **refused) as caught:
        wrapped(x)
    assert "set `sharding` to `none`" in str(caught.value)
    wrapped.undeploy()


def test_an_optimizer_is_looked_at_however_sharding_is_asked_for(
    pools: Pools, tmp_path: Path
) -> None:
    pools.run(2, divide_for_another, str(tmp_path))


@pytest.mark.parametrize("scheduled", [False, True])
def test_a_trial_leaves_the_optimizer_alone(scheduled: bool) -> None:
    model = Chain(2)
    optimizer = torch.optim.Adam(model.parameters(), amsgrad=True)
    if scheduled:
        torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    before = [parameter.clone() for parameter in model.parameters()]
    check_element_wise(optimizer)
    assert not optimizer.state
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))


def plan_in_little_memory(level: str, limit_bytes: int) -> tuple[list[str], float]:
    config = dataclasses.replace(
        CONFIG,
        replica_num=2,
        recompute=False,
        sharding=level,
        mem_limit_gb=limit_bytes / 2**30,
        mem_margin=0,
    )
    torch.manual_seed(0)
    model = Chain(32, 64)
    wrapped = pyrannc.RaNNCModule(model, torch.optim.Adam(model.parameters()), config=config)
    loss = wrapped(torch.ones(1, 64))
    loss.backward()
    levels = wrapped.deployment.stage_sharding
    wrapped.undeploy()
    return levels, loss.item()


@pytest.mark.parametrize(
    ("level", "part"), [("none", 5.3), ("optimizer", 4.3), ("gradients", 3.3), ("parameters", 2.7)]
)
def test_the_planner_shards_where_memory_is_short(pools: Pools, level: str, part: float) -> None:
    """Of 5 times the parameters, one to add up gradients, a level needs 4, 3 or 2.5 times."""
    limit = int(part * 32 * 64 * 64 * 4)
    outcomes = pools.run(2, plan_in_little_memory, "parameters", limit)
    assert [levels for levels, _ in outcomes] == [[level]] * 2
    assert outcomes[0][1] == outcomes[1][1]
