"""The norm of all gradients and clipping by it: as PyTorch's on one device."""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_, get_total_norm

import pyrannc
from tests.covering import covering
from tests.gloo.test_equivalence import EXACT, ROWS
from tests.gloo.training import Setup, global_batch, local_batch, make_optimizer, wrap
from tests.models import case

if TYPE_CHECKING:
    from pathlib import Path

    from tests.gloo.pool import Pools

pytestmark = [pytest.mark.gloo]

Layout = tuple[tuple[int, ...], ...]
NORM_TYPES = (2.0, 1.0, math.inf, 3)
MAX_NORM = 1e-3


@dataclass
class Clipped:
    """The norm of each type, and the gradients after clipping by it; then the state."""

    norms: list[float] = field(default_factory=list)
    gradients: list[dict[str, torch.Tensor | None]] = field(default_factory=list)
    state: dict[str, torch.Tensor] = field(default_factory=dict)


def freeze(model: nn.Module, *, frozen: bool) -> None:
    """Has every third parameter not be trained."""
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(not (frozen and index % 3 == 1))


def clip_plainly(name: str, rows: tuple[int, ...], *, frozen: bool) -> Clipped:
    chosen, setup = case(name), Setup((rows,))
    model = chosen.make_model()
    freeze(model, frozen=frozen)
    optimizer = make_optimizer(chosen, model, setup)
    assert optimizer is not None
    clipped = Clipped()
    for norm_type in NORM_TYPES:
        optimizer.zero_grad()
        args, kwargs = global_batch(chosen, sum(rows), 0, setup)
        chosen.make_loss(model(*args, **kwargs)).backward()
        clipped.norms.append(clip_grad_norm_(model.parameters(), MAX_NORM, norm_type).item())
        gradients = {key: None if p.grad is None else p.grad for key, p in model.named_parameters()}
        clipped.gradients.append(gradients)
        optimizer.step()
    clipped.state = dict(model.state_dict())
    return clipped


def clip_with_rannc(name: str, setup: Setup, *, frozen: bool, way: str, folder: str) -> Clipped:
    chosen = case(name)
    wrapped, optimizer = wrap(
        chosen, setup, folder, prepare=functools.partial(freeze, frozen=frozen)
    )
    assert optimizer is not None
    clipped = Clipped()
    for norm_type in NORM_TYPES:
        optimizer.zero_grad()
        args, kwargs = local_batch(chosen, setup, 0, setup.rows[0])
        chosen.make_loss(wrapped(*args, **kwargs)).backward()
        first = wrapped.calc_grad_norm(norm_type)
        if way == "model":
            norm = wrapped.clip_grad_norm(MAX_NORM, norm_type)
        elif way == "torch":
            norm = clip_grad_norm_(wrapped.parameters(), MAX_NORM, norm_type)
        else:  # as Lightning does
            held = [p for group in optimizer.param_groups for p in group["params"]]
            norm = clip_grad_norm_(held, MAX_NORM, norm_type)
        # Where each process has all gradients PyTorch adds up their norms itself, in its own order.
        torch.testing.assert_close(first, norm, rtol=1e-14, atol=0)
        assert torch.isclose(wrapped.calc_grad_norm(norm_type), torch.tensor(MAX_NORM).double())
        clipped.norms.append(norm.item())
        names = [key for key, _ in wrapped.named_parameters(from_global=True)]
        clipped.gradients.append({key: wrapped.get_param_grad(key) for key in names})
        optimizer.step()
    clipped.state = dict(wrapped.state_dict())
    wrapped.undeploy()
    return clipped


reference = functools.cache(clip_plainly)


def check(
    pools: Pools, name: str, setup: Setup, folder: Path, *, frozen: bool, way: str = "model"
) -> None:
    plain = reference(name, setup.rows[0], frozen=frozen)
    work = functools.partial(
        clip_with_rannc, name, setup, frozen=frozen, way=way, folder=str(folder)
    )
    records: list[Clipped] = pools.run(setup.world_size, work)
    # A norm has no zeros to compare, so its relative error counts alone.
    for record in records:
        assert record.norms == records[0].norms
        torch.testing.assert_close(record.norms, plain.norms, rtol=1e-10, atol=0)
        for ours, theirs in zip(record.gradients, plain.gradients, strict=True):
            torch.testing.assert_close(ours, theirs, **EXACT)
    # Adam makes steps of one size, whatever the gradients': rounding of 1e-10 in these is 1e-12.
    torch.testing.assert_close(records[0].state, plain.state, rtol=1e-9, atol=1e-9)


QUICK = [
    ("shared_embedding", ((0,), (1, 2, 3)), "none", False, "model"),
    ("gpt", ((0, 1), (1,)), "none", True, "torch"),
    ("gpt", ((0, 1),), "optimizer", True, "optimizer"),
]


@pytest.mark.parametrize(("name", "stage_ranks", "sharding", "frozen", "way"), QUICK, ids=str)
def test_clipping(
    pools: Pools,
    name: str,
    stage_ranks: Layout,
    sharding: str,
    frozen: bool,
    way: str,
    tmp_path: Path,
) -> None:
    world = 1 + max(rank for ranks in stage_ranks for rank in ranks)
    setup = Setup(ROWS[world], microbatches=2, stage_ranks=stage_ranks, sharding=sharding)
    check(pools, name, setup, tmp_path, frozen=frozen, way=way)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "stage_ranks", "sharding", "microbatches", "schedule", "way"),
    covering(
        ["gpt", "shared_embedding"],
        [((0,),), ((0, 1),), ((0,), (1,)), ((0, 1), (2, 3)), ((0, 1, 2, 3),), ((0,), (1, 2, 3))],
        ["none", "optimizer"],
        [1, 3],
        ["fill_drain", "1f1b"],
        ["model", "torch", "optimizer"],
        # 1F1B needs a model that returns its loss.
        possible=lambda name, _, __, ___, schedule, ____: schedule != "1f1b" or name == "gpt",
    ),
    ids=str,
)
def test_clipping_in_many_ways(
    pools: Pools,
    name: str,
    stage_ranks: Layout,
    sharding: str,
    microbatches: int,
    schedule: str,
    way: str,
    tmp_path: Path,
) -> None:
    world = 1 + max(rank for ranks in stage_ranks for rank in ranks)
    setup = Setup(ROWS[world], 0, microbatches, stage_ranks=stage_ranks, sharding=sharding)
    setup = dataclasses.replace(setup, schedule=schedule)
    check(pools, name, setup, tmp_path, frozen=True, way=way)


class Two(nn.Module):
    """Two linears, each a stage of its own, the first frozen if wanted."""

    def __init__(self, *, frozen: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6).requires_grad_(not frozen)
        self.last = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.first(x)))


def deployed(
    *, frozen: bool = False, stages: int = 2
) -> tuple[pyrannc.RaNNCModule, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Two(frozen=frozen).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    config = pyrannc.Config(
        partition_num=stages, measure=False, profile_cache_dir="off", timeout_s=25
    )
    wrapped = pyrannc.RaNNCModule(model, optimizer, config=config)
    wrapped(torch.ones(2, 4, dtype=torch.float64)).sum().backward()
    return wrapped, optimizer


def use_torch_functions() -> None:
    """All of the model through PyTorch's functions; parts of it, and other models, beside it."""
    wrapped, optimizer = deployed()
    norm = wrapped.calc_grad_norm()
    local = list(wrapped.parameters(from_global=False))
    gradients = [p.grad for p in local if p.grad is not None]
    assert torch.nn.utils.get_total_norm(gradients) == norm
    assert get_total_norm(gradients) == norm  # imported before any model was wrapped
    other = nn.Parameter(torch.ones(4))
    other.grad = torch.full((4,), 2.0)
    assert clip_grad_norm_([other], 100.0) == 4.0
    with pytest.raises(pyrannc.RaNNCError, match=r"several models together\n.*of each model"):
        clip_grad_norm_([*local, other], 1.0)
    with pytest.raises(pyrannc.RaNNCError, match=r"some of the model's.*\n.*parameters=\.\.\."):
        clip_grad_norm_(local[0], 1.0)
    first = list(wrapped.model.first.parameters())
    part = wrapped.clip_grad_norm_(1e9, parameters=first)
    held = {*first} & {*local}
    squares = sum(float(g.square().sum()) for p in held if (g := p.grad) is not None)
    others = wrapped._runtime.comm.all_gather_objects(squares)
    assert math.isclose(part.item(), math.sqrt(sum(others)), rel_tol=1e-12)
    with pytest.raises(pyrannc.RaNNCError, match=r"1 of the 1 given parameters are not"):
        wrapped.clip_grad_norm(1.0, parameters=[other])
    optimizer.zero_grad()
    assert wrapped.clip_grad_norm(1.0) == 0.0
    assert clip_grad_norm_(wrapped.parameters(), 1.0) == 0.0
    wrapped.undeploy()


def test_torch_functions_ask_the_other_ranks(pools: Pools) -> None:
    pools.run(2, use_torch_functions)


def nothing_to_train() -> list[float]:
    """One rank has no gradient; with one stage, every rank has all."""
    wrapped, _ = deployed(frozen=True)
    norms = [clip_grad_norm_(wrapped.parameters(), 1.0).item(), wrapped.calc_grad_norm(1).item()]
    wrapped.undeploy()
    wrapped, _ = deployed(stages=1)
    one = next(wrapped.parameters())
    assert one.grad is not None
    assert clip_grad_norm_(one, 1e9) == one.grad.norm()  # nobody needs to be asked
    wrapped.undeploy()
    return norms


def test_a_rank_may_have_nothing_to_train(pools: Pools) -> None:
    first, second = pools.run(2, nothing_to_train)
    assert first == second
    assert all(norm > 0 for norm in first)


def refused() -> None:
    torch.manual_seed(0)
    early = pyrannc.RaNNCModule(Two())
    for call in (early.calc_grad_norm, functools.partial(early.clip_grad_norm, 1.0)):
        with pytest.raises(pyrannc.RaNNCError, match=r"needs a plan.*\n.*call the model once"):
            call()
    wrapped, optimizer = deployed()
    for wrong in (0, -1, math.nan):
        with pytest.raises(pyrannc.RaNNCError, match=r"`norm_type` is.*needed a positive"):
            wrapped.calc_grad_norm(wrong)
    with wrapped.no_sync():
        wrapped(torch.ones(2, 4, dtype=torch.float64)).sum().backward()
    wrapped.allreduce_grads()
    local = next(p for p in wrapped.parameters(from_global=False) if p.grad is not None)
    if pyrannc.get_rank() == 1:
        assert local.grad is not None
        local.grad.view(-1)[0] = math.inf
    assert wrapped.calc_grad_norm().isinf()
    for call in (wrapped.clip_grad_norm, functools.partial(clip_grad_norm_, wrapped.parameters())):
        with pytest.raises(RuntimeError, match=r"total norm of order 2\.0 of the gradients is inf"):
            call(1.0, error_if_nonfinite=True)
    optimizer.zero_grad()
    wrapped.undeploy()
    early.undeploy()


def test_what_cannot_be_is_refused(pools: Pools) -> None:
    pools.run(2, refused)


def refused_while_delayed() -> None:
    wrapped, _ = deployed(stages=1)
    with wrapped.no_sync():
        wrapped(torch.ones(2, 4, dtype=torch.float64)).sum().backward()
    for call in (wrapped.calc_grad_norm, functools.partial(wrapped.clip_grad_norm, 1.0)):
        with pytest.raises(pyrannc.RaNNCError, match=r"not been added up yet\n.*allreduce_grads"):
            call()
    with pytest.raises(pyrannc.RaNNCError, match=r"not been added up yet\n.*allreduce_grads"):
        clip_grad_norm_(wrapped.parameters(), 1.0)
    wrapped.undeploy()


def test_gradients_must_be_added_up_before(pools: Pools) -> None:
    pools.run(2, refused_while_delayed)


def clip_on_some_ranks() -> None:
    """The others go on with what comes next, which all of them are told."""
    wrapped, _ = deployed()
    x = torch.ones(2, 4, dtype=torch.float64)
    clips = {
        "of order 2, of 4 parameters": lambda: clip_grad_norm_(wrapped.parameters(), 1.0),
        "of order inf, of 4": lambda: wrapped.clip_grad_norm(1.0, math.inf),
        "of order 1, of 4": lambda: wrapped.calc_grad_norm(1),
    }
    for named, clip in clips.items():
        call = clip if pyrannc.get_rank() == 0 else functools.partial(wrapped, x)
        told = rf"(?s)rank 0: clip_grad_norm or calc_grad_norm, {named}.*rank 1: model\("
        with pytest.raises(pyrannc.MismatchError, match=told):
            call()
    wrapped.undeploy()


def test_clipping_on_some_ranks_is_named(pools: Pools) -> None:
    pools.run(2, clip_on_some_ranks)
