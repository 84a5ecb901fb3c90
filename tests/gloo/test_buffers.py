"""Buffers after a step are those of one device, on every replica of their stage."""

from __future__ import annotations

import copy
import functools
import itertools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import pyrannc
from tests.gloo.layouts import config
from tests.gloo.pool import Failure

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.gloo.pool import Pools

pytestmark = [pytest.mark.gloo]
EXACT = {"rtol": 1e-10, "atol": 1e-12}
Ranks = tuple[tuple[int, ...], ...]


class First(nn.Module):
    """Starts with a batch norm: its input is the same, however the batch is divided."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3, momentum=0.3)
        self.instance = nn.InstanceNorm2d(3, track_running_stats=True)
        self.body = nn.Conv2d(3, 4, 3)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        seen = self.norm(x).square() + self.norm(x * 2) + self.instance(x)
        return self.head(torch.relu(self.body(seen)).mean((2, 3)))


class Counting(nn.Module):
    """Counts its calls, reads the count before and after, and keeps what is not saved."""

    calls: Tensor
    heat: Tensor
    flag: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.middle = nn.Linear(4, 4)
        self.last = nn.Linear(4, 2)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("heat", torch.ones(3), persistent=False)
        self.register_buffer("flag", torch.tensor([False, True]))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x)) * (self.calls + 1)
        if self.training:
            self.calls += 1
            self.flag.logical_not_()
        x = torch.tanh(self.middle(x * self.calls)) * self.heat[0].clone()
        if self.training:
            self.heat.mul_(0.5)
        return self.last(x) * self.heat.sum()


class Deciding(nn.Module):
    """Decides row by row with Python's `if`, so it runs as it is; counts in two ways, and reads."""

    calls: Tensor
    last: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("last", torch.zeros(2, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls.add_(1)
            self.last[0] = 2 * self.last[0] + 1
        rows = [row * 2 if float(row.detach().sum()) > 0 else row for row in torch.unbind(x)]
        return torch.stack(rows) * (1 + 0.1 * self.calls) + 0.01 * self.last[0]


class Whole(nn.Module):
    """Has parts that are not looked into and count, at either end."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.early = nn.Linear(4, 4), Deciding()
        self.middle = nn.Sequential(nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
        self.late, self.last = Deciding(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.middle(self.early(torch.tanh(self.first(x))))
        return self.last(torch.tanh(self.late(torch.tanh(x))))


class Cumulative(nn.Module):
    """Batch norms whose running statistics are means over all batches."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(4, 4), nn.BatchNorm1d(4, momentum=None), nn.Tanh(), nn.Linear(4, 4),
            nn.BatchNorm1d(4, momentum=None), nn.Tanh(), nn.Linear(4, 2),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Synchronized(nn.Module):
    """Batch norms in two places, over the rows of all replicas if `sync`."""

    def __init__(self, *, sync: bool = True) -> None:
        super().__init__()
        norm = nn.SyncBatchNorm if sync else nn.BatchNorm1d
        self.layers = nn.Sequential(
            nn.Linear(4, 6), norm(6), nn.Tanh(), nn.Linear(6, 6), norm(6, affine=False), nn.Tanh(),
            nn.Linear(6, 3),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def pictures(rows: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 3, 6, 6, generator=generator, dtype=torch.float64) * 3 + 1


def vectors(rows: int, seed: int) -> Tensor:
    return torch.randn(rows, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make(module: Any, **kwargs: Any) -> nn.Module:
    torch.manual_seed(0)
    return module(**kwargs).double()


def wrap(
    model: nn.Module,
    ranks: Ranks,
    microbatches: int,
    folder: str,
    batch: Tensor,
    *,
    recompute: bool = False,
    sharding: str = "none",
    optimizer: torch.optim.Optimizer | None = None,
) -> Any:
    """The model with these replicas of each stage, which may compute again and divide state."""
    path, settings = Path(folder) / "deployment.json", config(len(ranks), microbatches)
    planned = pyrannc.RaNNCModule(copy.deepcopy(model), config=settings)
    planned(batch)
    planned.save_deployment(path)
    planned.undeploy()
    if pyrannc.get_rank() == 0:
        plan = json.loads(path.read_text())
        plan.pop("estimates", None)
        for stage, own in zip(plan["stages"], ranks, strict=True):
            stage["ranks"] = list(own)
            stage["recompute"] = [stage["nodes"]] if recompute else []
            stage["sharding"] = sharding if len(own) > 1 else "none"
        path.write_text(json.dumps(plan))
    pyrannc.barrier()
    return pyrannc.RaNNCModule(model, optimizer, load_deployment=path, config=settings)


def same_gradients(wrapped: Any, bare: nn.Module) -> None:
    for name, parameter in bare.named_parameters():
        gradient = wrapped.get_param_grad(name)
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-10, atol=1e-11, msg=name)


def buffers_of_steps(
    name: str,
    ranks: Ranks,
    rows: Sequence[Sequence[int]],
    microbatches: int,
    folder: str,
    *,
    recompute: bool = False,
    sharding: str = "none",
) -> dict[str, Tensor]:
    """Trains and evaluates; compares all buffers with those of the bare model on one device."""
    module, batch = {
        "first": (First, pictures),
        "counting": (Counting, vectors),
        "whole": (Whole, vectors),
        "cumulative": (Cumulative, vectors),
    }[name]
    bare, model, rank = make(module), make(module), pyrannc.get_rank()
    first = batch(max(rows[0][rank], 1), 0)
    wrapped = wrap(
        model, ranks, microbatches, folder, first, recompute=recompute, sharding=sharding
    )
    for step, shares in enumerate(rows):
        whole = batch(sum(shares), step)
        start = sum(shares[:rank])
        local = whole[start : start + shares[rank]]
        expected, given = bare(whole), wrapped(local)
        expected.square().mean().backward()
        given.square().mean().backward()
        if name in ("counting", "whole"):  # the others normalise over parts of the batch
            torch.testing.assert_close(given, expected[start : start + len(local)], **EXACT)
            same_gradients(wrapped, bare)
        if name == "counting":
            model.heat.add_(1)  # the user's own changes count
            bare.heat.add_(1)
        with torch.no_grad():
            bare(whole), wrapped(local)  # training mode, without gradients
        held = dict(model.named_buffers())  # on all ranks, whichever stage uses them
        for key, buffer in held.items():
            torch.testing.assert_close(buffer, bare.get_buffer(key), **EXACT, msg=key)
    state = wrapped.state_dict()
    if rank == 0:
        for key, value in bare.state_dict().items():
            if key in dict(bare.named_buffers()):
                torch.testing.assert_close(state[key], value, **EXACT)
    wrapped.undeploy()
    return {key: buffer.clone() for key, buffer in held.items()}


WAYS = [
    (((0,),), ((8,), (3,)), 1),
    (((0,),), ((8,), (3,)), 4),
    (((0, 1),), ((4, 4), (1, 0)), 2),
    (((0,), (1,)), ((4, 4), (2, 1)), 2),
]
MORE_WAYS = [
    (((0,), (1, 2, 3)), ((4, 4, 4, 4), (3, 1, 2, 1)), 2),
    (((0, 1, 2), (3,)), ((4, 4, 4, 4), (1, 0, 0, 0)), 4),
    (((0, 1, 2, 3),), ((4, 4, 4, 4), (3, 0, 2, 1)), 1),
    (((0, 1), (2,), (3,)), ((4, 4, 4, 4), (3, 1, 2, 1)), 4),
]
TWO_BY_TWO: Any = (((0, 1), (2, 3)), ((4, 4, 4, 4), (3, 0, 2, 1)), 2)


def check_buffers(pools: Pools, name: str, way: Any, folder: Any, **options: Any) -> None:
    ranks, rows, microbatches = way
    train = functools.partial(buffers_of_steps, **options)
    held = pools.run(len(rows[0]), train, name, ranks, rows, microbatches, str(folder))
    assert any(held)
    for one, other in itertools.combinations(held, 2):
        for key in one.keys() & other.keys():
            assert torch.equal(one[key], other[key])  # all replicas have the same


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("name", ["first", "counting"])
def test_buffers_are_those_of_one_device(pools: Pools, name: str, way: Any, tmp_path: Any) -> None:
    check_buffers(pools, name, way, tmp_path)


@pytest.mark.parametrize(
    "way",
    [
        *WAYS[2:],
        WAYS[1],
        *MORE_WAYS[:2],
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["first", "counting"])
def test_computing_again_changes_no_buffer(
    pools: Pools, name: str, way: Any, tmp_path: Any
) -> None:
    check_buffers(pools, name, way, tmp_path, recompute=True)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("whole", WAYS[3]),
        *(("whole", way) for way in (WAYS[1], TWO_BY_TWO, *MORE_WAYS[:3])),
        ("cumulative", (((0,), (1,)), ((4, 4), (2, 1), (1, 3)), 1)),
    ],
)
def test_buffers_of_parts_that_run_as_they_are(
    pools: Pools, name: str, way: Any, recompute: bool, tmp_path: Any
) -> None:
    check_buffers(pools, name, way, tmp_path, recompute=recompute)


@pytest.mark.parametrize("level", ["optimizer", "gradients", "parameters"])
@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("first", WAYS[2]),
        ("first", TWO_BY_TWO),
        ("first", MORE_WAYS[1]),
        ("whole", TWO_BY_TWO),
    ],
    ids=str,
)
def test_replicas_that_divide_their_state_compute_again(
    pools: Pools, name: str, way: Any, level: str, tmp_path: Any
) -> None:
    check_buffers(pools, name, way, tmp_path, recompute=True, sharding=level)


@pytest.mark.slow
@pytest.mark.parametrize("way", MORE_WAYS, ids=str)
@pytest.mark.parametrize("name", ["first", "counting"])
def test_buffers_are_those_of_one_device_in_more_ways(
    pools: Pools, name: str, way: Any, tmp_path: Any
) -> None:
    if name == "counting" and len(way[0]) > 2:
        return  # each buffer with all that touches it lies in one stage: there are but two
    check_buffers(pools, name, way, tmp_path)


def synchronized(ranks: Ranks, rows: Sequence[int], folder: str, **options: Any) -> None:
    bare, model, rank = make(Synchronized, sync=False), make(Synchronized), pyrannc.get_rank()
    optimizers = [torch.optim.SGD(m.parameters(), 0.1, momentum=0.5) for m in (bare, model)]
    whole = vectors(sum(rows), 1)
    start = sum(rows[:rank])
    local = whole[start : start + rows[rank]]
    wrapped = wrap(model, ranks, 1, folder, vectors(4, 1), optimizer=optimizers[1], **options)
    wrapped.eval()(vectors(1, 1))  # the first call is one with rows
    wrapped.train()
    for _ in range(2):
        expected, given = bare(whole), wrapped(local)
        torch.testing.assert_close(given, expected[start : start + len(local)], **EXACT)
        weights = torch.arange(1.0, 4.0, dtype=torch.float64)
        (expected.square() * weights).mean().backward()
        (given.square() * weights).mean().backward()
        same_gradients(wrapped, bare)
        for optimizer in optimizers:
            optimizer.step()
    state = wrapped.state_dict()
    for name, value in bare.state_dict().items() if rank == 0 else ():
        torch.testing.assert_close(state[name], value, **EXACT)
    bare.eval()
    wrapped.eval()
    torch.testing.assert_close(wrapped(local), bare(whole)[start : start + len(local)], **EXACT)
    wrapped.undeploy()


SYNC_WAYS: list[tuple[Ranks, tuple[int, ...]]] = [
    (((0,),), (6,)),
    (((0, 1),), (4, 3)),
    (((0, 1),), (5, 0)),
]
MORE_SYNC_WAYS: list[tuple[Ranks, tuple[int, ...]]] = [
    (((0, 1, 2), (3,)), (2, 3, 1, 4)),
    (((0, 1), (2, 3)), (2, 3, 0, 4)),
    (((0,), (1, 2, 3)), (1, 1, 0, 0)),
]


@pytest.mark.parametrize(("ranks", "rows"), SYNC_WAYS, ids=str)
def test_synchronised_norms_see_all_replicas(
    pools: Pools, ranks: Ranks, rows: tuple[int, ...], tmp_path: Any
) -> None:
    pools.run(len(rows), synchronized, ranks, rows, str(tmp_path))


def test_synchronised_norms_compute_again_together(pools: Pools, tmp_path: Any) -> None:
    train = functools.partial(synchronized, recompute=True)
    pools.run(2, train, ((0, 1),), (4, 3), str(tmp_path))


@pytest.mark.parametrize("level", ["optimizer", "gradients", "parameters"])
@pytest.mark.parametrize(
    ("ranks", "rows"),
    [
        (((0, 1),), (4, 3)),
        *MORE_SYNC_WAYS[:2],
    ],
    ids=str,
)
def test_synchronised_norms_whose_state_is_divided(
    pools: Pools, ranks: Ranks, rows: tuple[int, ...], level: str, tmp_path: Any
) -> None:
    """All that is one device's: the rows of all replicas, computed again, and each step."""
    train = functools.partial(synchronized, recompute=True, sharding=level)
    pools.run(len(rows), train, ranks, rows, str(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "rows"), MORE_SYNC_WAYS, ids=str)
def test_synchronised_norms_see_all_replicas_in_more_ways(
    pools: Pools, ranks: Ranks, rows: tuple[int, ...], tmp_path: Any
) -> None:
    pools.run(len(rows), synchronized, ranks, rows, str(tmp_path))


def synchronized_over(ranks: list[int]) -> None:
    """Calls a model whose batch norm has a group of its own."""
    pyrannc.barrier()  # connects the processes
    group = dist.new_group(ranks)
    model = nn.Sequential(nn.Linear(4, 4), nn.SyncBatchNorm(4, process_group=group)).double()
    wrapped = pyrannc.RaNNCModule(model, config=config(1, 1))
    wrapped(vectors(2, 1))
    wrapped.undeploy()


def test_norms_are_synchronised_over_all_or_refused(pools: Pools) -> None:
    pools.run(2, synchronized_over, [0, 1])
    failures = pools.outcomes(2, synchronized_over, [0])
    for failure, found in zip(failures, ("ranks [0]", "ranks without this one"), strict=True):
        assert failure.kind == "RaNNCError"
        assert f"batch norm `1` has a `process_group` of {found}, but" in failure.message
        assert "hint: leave `process_group` out" in failure.message


class Scored(nn.Module):
    """Returns its loss, so that backward runs among the forwards."""

    def __init__(self, inner: type[nn.Module] = Synchronized) -> None:
        super().__init__()
        self.inner = inner()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).square().mean()


def pipelined_and_synchronized(ranks: Ranks, rows: Sequence[int], folder: str) -> list[Tensor]:
    rank = pyrannc.get_rank()
    wrapped = wrap(make(Scored), ranks, 4, folder, vectors(4, 1))
    losses = []
    for step in range(2):
        loss = wrapped(vectors(rows[rank], 10 * step + rank))
        loss.backward()
        losses.append(loss.detach())
    wrapped.undeploy()
    return losses


def test_microbatches_of_synchronised_replicas_never_hang(pools: Pools, tmp_path: Any) -> None:
    ways = [(((0, 1),), (4, 1)), (((0, 1),), (3, 6))]
    for ranks, rows in ways:
        losses = pools.run(2, pipelined_and_synchronized, ranks, rows, str(tmp_path))
        assert losses[0] == losses[1]


@pytest.mark.slow
def test_microbatches_of_synchronised_stages_never_hang(pools: Pools, tmp_path: Any) -> None:
    for ranks in [((0, 1), (2, 3)), ((0, 1, 2), (3,)), ((0,), (1, 2, 3))]:
        for rows in ((4, 4, 4, 4), (3, 2, 5, 1)):
            losses = pools.run(4, pipelined_and_synchronized, ranks, rows, str(tmp_path))
            assert all(own == losses[0] for own in losses)


def test_synchronised_replicas_that_would_hang_are_refused(pools: Pools, tmp_path: Any) -> None:
    """Rank 0 is in both stages, and most rows are another's."""
    ranks, rows = ((0, 2), (0, 1)), (2, 6, 2)
    for outcome in pools.outcomes(3, pipelined_and_synchronized, ranks, rows, str(tmp_path)):
        assert isinstance(outcome, Failure)
        assert outcome.kind == "PlanError"
        assert "a stage with synchronised batch norm would wait for each" in outcome.message
        assert "hint: set `pipeline_num=1`, or use `nn.BatchNorm`" in outcome.message


class Mixed(nn.Module):
    """Batch norms inside and outside of a region that computes in 16 bits."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh())
        self.last = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            x = self.first(x.float())
        return self.last(x.float())


def trained(
    inner: type[nn.Module],
    ranks: Ranks,
    rows: Sequence[int],
    folder: str,
    *,
    recompute: bool = False,
) -> Any:
    """Losses and gradients of two steps and the state after them, of rank 0."""
    batch, rank = pictures if inner is First else vectors, pyrannc.get_rank()
    model = make(Scored, inner=inner)
    if inner is Mixed:
        model.float()
    wrapped = wrap(model, ranks, 4, folder, batch(4, 1), recompute=recompute)
    losses = []
    for step in range(2):
        loss = wrapped(batch(rows[rank], 10 * step + rank))
        loss.backward()
        losses.append(loss.detach())
    names = [name for name, _ in wrapped.named_parameters(from_global=True)]
    gradients = {name: wrapped.get_param_grad(name) for name in names}
    state = wrapped.state_dict()
    wrapped.undeploy()
    return losses, gradients, state


TRAINED: list[tuple[type[nn.Module], Ranks, tuple[int, ...]]] = [
    (First, ((0,), (1,)), (4, 4)),
    (Counting, ((0,), (1,)), (4, 4)),
    (Mixed, ((0,), (1,)), (4, 4)),
    (Mixed, ((0,),), (8,)),
    (Synchronized, ((0, 1),), (4, 1)),  # some microbatches have rows on one rank only
]
MORE_TRAINED: list[tuple[type[nn.Module], Ranks, tuple[int, ...]]] = [
    (First, ((0,), (1, 2, 3)), (4, 3, 2, 4)),
    (First, ((0, 1), (2,), (3,)), (4, 3, 1, 4)),
    (Mixed, ((0, 1), (2, 3)), (4, 3, 2, 4)),
    (Counting, ((0,), (1, 2, 3)), (4, 4, 4, 4)),
    (Synchronized, ((0, 1, 2, 3),), (1, 2, 3, 1)),
]


@pytest.mark.parametrize(
    ("inner", "ranks", "rows"),
    [*TRAINED, *MORE_TRAINED],
)
def test_computing_again_among_forwards_is_the_same(
    inner: type[nn.Module], ranks: Ranks, rows: tuple[int, ...], pools: Pools, tmp_path: Any
) -> None:
    """The same operators on the same numbers, bit by bit."""
    kept, again = (
        pools.run(
            len(rows),
            functools.partial(trained, recompute=recompute),
            inner,
            ranks,
            rows,
            str(tmp_path),
        )
        for recompute in (False, True)
    )
    torch.testing.assert_close(again, kept, rtol=0, atol=0)


def replace_a_buffer() -> None:
    model, bare = make(Counting), make(Counting)
    wrapped = pyrannc.RaNNCModule(model, config=config(1, 2))
    for one in (wrapped, bare):
        one(vectors(4, 1))
    for one in (model, bare):
        one.heat = torch.full((3,), 4.0, dtype=torch.float64)
    torch.testing.assert_close(wrapped(vectors(4, 1)), bare(vectors(4, 1)), **EXACT)
    torch.testing.assert_close(model.heat, bare.heat)
    model.heat = torch.ones(5, dtype=torch.float64)
    with pytest.raises(pyrannc.RaNNCError, match=r"`heat` .* \[5\] .* \[3\]"):
        wrapped(vectors(4, 1))
    wrapped.undeploy()


def test_a_buffer_may_be_assigned_to(pools: Pools) -> None:
    pools.run(1, replace_a_buffer)
