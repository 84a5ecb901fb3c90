"""Lower precision: the same casts as on one device, and one loss scale on all ranks."""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import pyrannc
from tests.covering import covering
from tests.gloo.layouts import Layout, config, deployment, share
from tests.gloo.test_equivalence import ROWS
from tests.gloo.training import Setup, global_batch, local_batch, wrap
from tests.models import case

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.gloo.pool import Pools

pytestmark = [pytest.mark.gloo]

Gradients = dict[str, torch.Tensor | None]

KINDS = ("autocast", "parameters")
# The same operators on the same numbers: only sums over rows may differ in their order.
ONE_PART = 1e-6
ROUNDING = 2**-9  # of bfloat16


def lower(kind: str, model: nn.Module) -> None:
    """Gives the parameters their type; `exact` are those in bfloat16, computed with in float64."""
    if kind in ("parameters", "exact"):
        model.to(torch.bfloat16)
    model.to({"parameters": torch.bfloat16, "exact": torch.float64}.get(kind, torch.float32))


def around(kind: str) -> Any:
    enabled = kind == "autocast"
    return torch.autocast("cpu", torch.bfloat16) if enabled else contextlib.nullcontext()


def one_plain_step(name: str, rows: tuple[int, ...], kind: str) -> tuple[float, Gradients]:
    chosen = case(name)
    model = chosen.make_model()
    lower(kind, model)
    args, kwargs = global_batch(chosen, sum(rows), 0, Setup((rows,)))
    with around(kind):
        loss = model(*args, **kwargs)
    loss.backward()
    return loss.item(), {key: p.grad for key, p in model.named_parameters()}


def one_step(name: str, setup: Setup, kind: str, folder: str) -> tuple[float, Gradients]:
    chosen = case(name)
    with around(kind):
        wrapped, _ = wrap(chosen, setup, folder, prepare=functools.partial(lower, kind))
    args, kwargs = local_batch(chosen, setup, 0, setup.rows[0])
    with around(kind):
        loss = wrapped(*args, **kwargs)
    loss.backward()
    types = {p.dtype for p in wrapped.parameters()}
    assert types <= {torch.bfloat16 if kind == "parameters" else torch.float32}
    names = [key for key, _ in wrapped.named_parameters(from_global=True)]
    gradients = {key: wrapped.get_param_grad(key) for key in names}
    wrapped.undeploy()
    return loss.item(), gradients


def check_casts(pools: Pools, setup: Setup, folder: Path) -> None:
    """Under autocast every operator has the types that it has on one device."""
    loss, gradients = one_plain_step("gpt", setup.rows[0], "autocast")
    for ours, found in pools.run(setup.world_size, one_step, "gpt", setup, "autocast", str(folder)):
        assert ours == pytest.approx(loss, rel=ONE_PART)
        for name, theirs in gradients.items():
            assert distance(found[name], theirs) <= ONE_PART * size(theirs), name


def check_precision(pools: Pools, setup: Setup, kind: str, folder: Path) -> None:
    """Gradients are about as far from those of exact computation as on one device.

    They are rounded at other places, so not to the same numbers; and where on one device rounding
    happens to cancel, an addition of parts still rounds.
    """
    loss, gradients = one_plain_step("gpt", setup.rows[0], kind)
    # Sums over microbatches and over replicas are rounded at each addition.
    additions = setup.microbatches + setup.world_size - 1
    exact_loss, exact = one_plain_step("gpt", setup.rows[0], EXACT[kind])
    for ours, found in pools.run(setup.world_size, one_step, "gpt", setup, kind, str(folder)):
        assert loss != exact_loss  # the precision shows
        assert ours == pytest.approx(exact_loss, rel=2 * ROUNDING)
        for name, theirs in gradients.items():
            error, allowed = distance(found[name], exact[name]), distance(theirs, exact[name])
            assert error <= 2 * allowed + additions * ROUNDING * size(exact[name]), name


EXACT = {"autocast": "none", "parameters": "exact"}


def distance(first: torch.Tensor | None, second: torch.Tensor | None) -> float:
    assert first is not None
    assert second is not None
    return float((first.double() - second.double()).norm())


def size(tensor: torch.Tensor | None) -> float:
    assert tensor is not None
    return float(tensor.double().norm())


@pytest.mark.parametrize("schedule", ["1f1b", "fill_drain"])
def test_one_part_is_cast_as_on_one_device(pools: Pools, schedule: str, tmp_path: Path) -> None:
    setup = Setup(ROWS[2], 0, 1, stage_ranks=((0,), (1,)), schedule=schedule, recompute=5)
    check_casts(pools, setup, tmp_path)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("stage_ranks", "microbatches", "schedule"),
    [
        (((0,), (1, 2, 3)), 3, "1f1b"),
        (((0,), (1,)), 4, "fill_drain"),
        (((0,), (1,)), 4, "1f1b"),
        (((0,),), 4, "1f1b"),
        (((0, 1),), 1, "fill_drain"),
        (((0, 1), (2, 3)), 2, "1f1b"),
        (((0, 1, 2), (3,)), 2, "fill_drain"),
    ],
    ids=str,
)
def test_gradients_are_as_precise(
    pools: Pools,
    stage_ranks: Layout,
    microbatches: int,
    schedule: str,
    kind: str,
    tmp_path: Path,
) -> None:
    world = 1 + max(rank for ranks in stage_ranks for rank in ranks)
    setup = Setup(ROWS[world], 0, microbatches, stage_ranks=stage_ranks, schedule=schedule)
    check_precision(pools, setup, kind, tmp_path)


class Islands(nn.Module):
    """A part in bfloat16 and a part in the parameters' own type, whatever is around it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 16)
        self.middle = nn.Linear(16, 16)
        self.last = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            hidden = torch.tanh(self.first(x))
        with torch.autocast("cpu", enabled=False):
            hidden = torch.tanh(self.middle(hidden.float()))
        return self.last(hidden).float().square().mean()


def make(model: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return model()


def islands(schedule: str, kind: str) -> None:
    """Regions inside the model keep their types, forward and backward."""
    x = torch.randn(4, 4, generator=torch.Generator().manual_seed(1))
    plain = make(Islands)
    with around(kind):
        theirs = plain(x)
    theirs.backward()
    wrapped = pyrannc.RaNNCModule(make(Islands), config=config(2, 1, schedule=schedule))
    with around(kind):
        ours = wrapped(share(x))
    ours.backward()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(
            wrapped.get_param_grad(name), parameter.grad, rtol=1e-5, atol=1e-7
        )
    wrapped.undeploy()


@pytest.mark.parametrize(
    ("schedule", "kind"),
    [
        ("1f1b", "autocast"),
        ("1f1b", "none"),
        ("fill_drain", "autocast"),
        ("fill_drain", "none"),
    ],
)
def test_regions_inside_the_model(pools: Pools, schedule: str, kind: str) -> None:
    pools.run(2, islands, schedule, kind)


class Half(nn.Module):
    """Two linears, of which the first gets large inputs: its gradient overflows before the others.

    The loss is so small that gradients vanish in float16 unless it is scaled.
    """

    def __init__(self, *, frozen: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8, bias=False)
        self.last = nn.Linear(8, 4)
        with torch.no_grad():
            self.first.weight.mul_(1e-5).requires_grad_(not frozen)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.first(x))
        return (self.last(hidden).float() + 1).square().mean() * 2e-5


# With this scale the gradients of inputs of 100 fit float16 (65504), those of 6e4 do not.
FIRST_SCALE = 2.0**24
SIZES = (100.0, 100.0, 6e4, 100.0, 100.0)
SCALES = [2.0**24, 2.0**25, 2.0**24, 2.0**24, 2.0**25]
# Rounding of float16 is 2**-11 for each part of the batch, of a few operators.
HALF = 2**-8

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=1e-3),
    "fused": lambda parameters: torch.optim.AdamW(parameters, lr=1e-6, fused=True),
}


@dataclass(frozen=True)
class Way:
    """How to train with a scaler."""

    stages: int = 2
    microbatches: int = 2
    schedule: str = "1f1b"
    optimizer: str = "sgd"
    frozen: bool = False
    clipped: str = "no"
    accumulated: bool = False
    sharding: str = "none"

    def __str__(self) -> str:
        flags = [name for name in ("frozen", "accumulated") if getattr(self, name)]
        flags += [f"clipped-by-{self.clipped}"] * (self.clipped != "no")
        flags += [self.sharding] * (self.sharding != "none")
        return "-".join(
            [f"s{self.stages}m{self.microbatches}", self.schedule, self.optimizer, *flags]
        )

    def layout(self, world: int) -> Layout:
        """The ranks in stages of about equally many."""
        parts = torch.arange(world).tensor_split(self.stages)
        return tuple(tuple(part.tolist()) for part in parts)


@dataclass
class Scaled:
    """By step, the scale after it and the gradients of it, without those that overflow."""

    scales: list[float] = field(default_factory=list)
    gradients: list[Gradients] = field(default_factory=list)
    state: dict[str, torch.Tensor] = field(default_factory=dict)


def half_batch(step: int) -> torch.Tensor:
    x = torch.rand(8, 4, generator=torch.Generator().manual_seed(step)) / 2 + 0.5
    return x * SIZES[step]


def train_scaled(model: nn.Module, optimizer: torch.optim.Optimizer, way: Way) -> Scaled:
    """The loop that users write, for the bare and the wrapped model alike."""
    scaler = torch.amp.GradScaler("cpu", init_scale=FIRST_SCALE, growth_interval=2)
    wrapped = isinstance(model, pyrannc.RaNNCModule)
    scaled = Scaled()
    for step in range(len(SIZES)):
        optimizer.zero_grad()
        x = share(half_batch(step)) if wrapped else half_batch(step)
        for part in range(2 if way.accumulated else 1):
            delayed = model.no_sync() if wrapped and way.accumulated and part == 0 else None
            with delayed or contextlib.nullcontext():
                with torch.autocast("cpu", torch.float16):
                    loss = model(x)
                scaler.scale(loss).backward()
        if way.clipped != "no":
            scaler.unscale_(optimizer)
            if wrapped and way.clipped == "model":
                model.clip_grad_norm(1e-6)
            else:
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-6)
        scaler.step(optimizer)
        before = scaler.get_scale()
        scaler.update()
        scaled.scales.append(scaler.get_scale())
        if scaler.get_scale() >= before:
            scaled.gradients.append(all_gradients(model))
    return scaled


def all_gradients(model: nn.Module) -> Gradients:
    if isinstance(model, pyrannc.RaNNCModule):
        names = [key for key, _ in model.named_parameters(from_global=True)]
        return {key: model.get_param_grad(key) for key in names}
    named = model.named_parameters()
    return {key: None if p.grad is None else p.grad.clone() for key, p in named}


def scaled_plainly(way: Way) -> Scaled:
    model = make(functools.partial(Half, frozen=way.frozen))
    scaled = train_scaled(model, OPTIMIZERS[way.optimizer](model.parameters()), way)
    scaled.state = dict(model.state_dict())
    return scaled


def scaled_with_rannc(way: Way, folder: str) -> Scaled:
    make_model = functools.partial(make, functools.partial(Half, frozen=way.frozen))
    model = make_model()
    optimizer = OPTIMIZERS[way.optimizer](model.parameters())
    settings = config(way.stages, way.microbatches, schedule=way.schedule)
    planned = None
    if way.sharding in ("gradients", "parameters"):
        layout = way.layout(pyrannc.get_world_size())
        with torch.autocast("cpu", torch.float16):
            batch = share(half_batch(0))
            planned = deployment(
                make_model, (batch,), layout, folder, way.microbatches, way.sharding
            )
    wrapped = pyrannc.RaNNCModule(
        model,
        optimizer,
        load_deployment=planned,
        enable_zero=way.sharding == "optimizer",
        config=settings,
    )
    scaled = train_scaled(wrapped, optimizer, way)
    scaled.state = dict(wrapped.state_dict())
    wrapped.undeploy()
    return scaled


def check_scaled(pools: Pools, world: int, way: Way, folder: Path) -> None:
    plain = scaled_plainly(way)
    assert way.frozen or plain.scales == SCALES
    records: list[Scaled] = pools.run(world, scaled_with_rannc, way, str(folder))
    for record in records:
        assert record.scales == plain.scales
        for ours, theirs in zip(record.gradients, plain.gradients, strict=True):
            for name, gradient in theirs.items():
                found = ours[name]
                assert (gradient is None) == (found is None)
                if gradient is not None and found is not None:
                    assert gradient.abs().max() > 0
                    assert (found - gradient).norm() <= HALF * gradient.norm(), name
    for name, tensor in plain.state.items():
        assert (records[0].state[name] - tensor).norm() <= HALF * tensor.norm(), name


FIRST_WAYS = [
    (2, Way()),
    (2, Way(schedule="fill_drain", clipped="torch")),
    (3, Way(frozen=True, clipped="torch")),
    (2, Way(accumulated=True, stages=1)),
    (2, Way(stages=1, sharding="optimizer", optimizer="fused")),
    (4, Way(sharding="parameters", clipped="torch")),
]
SCHEDULES = ["fill_drain", "1f1b"]
MORE_WAYS = [
    *(
        (world, Way(stages, microbatches, schedule, optimizer, clipped=clipped))
        for world, stages, microbatches, schedule, (optimizer, clipped) in covering(
            [1, 2, 3, 4],
            [1, 2],
            [1, 2],
            SCHEDULES,
            [("sgd", "torch"), ("fused", "no")],
            possible=lambda world, stages, *_: stages <= world,
        )
    ),
    *(
        (world, Way(world // 2, 2, schedule, optimizer, clipped=clipped, sharding=sharding))
        for world, sharding, schedule, (optimizer, clipped) in covering(
            [2, 4],
            ["optimizer", "gradients", "parameters"],
            SCHEDULES,
            [("fused", "no"), ("sgd", "torch"), ("sgd", "model")],
        )
    ),
    (3, Way(frozen=True, optimizer="fused")),  # a rank's optimizer has nothing to train
]


@pytest.mark.parametrize(
    ("world", "way"),
    [*FIRST_WAYS, *(way for way in MORE_WAYS if way not in FIRST_WAYS)],
    ids=str,
)
def test_one_scale_on_all_ranks(pools: Pools, world: int, way: Way, tmp_path: Path) -> None:
    check_scaled(pools, world, way, tmp_path)


def unscale_too_early() -> None:
    model = make(Half)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    wrapped = pyrannc.RaNNCModule(model, optimizer, config=config(1, 1, schedule="auto"))
    scaler = torch.amp.GradScaler("cpu", init_scale=FIRST_SCALE)
    with wrapped.no_sync(), torch.autocast("cpu", torch.float16):
        loss = wrapped(share(half_batch(0)))
    scaler.scale(loss).backward()
    for call in (scaler.unscale_, scaler.step):
        with pytest.raises(pyrannc.RaNNCError, match=r"not been added up yet\n.*allreduce_grads"):
            call(optimizer)
    wrapped.allreduce_grads()
    scaler.step(optimizer)
    scaler.update()
    wrapped.undeploy()


def test_a_scaler_needs_all_gradients(pools: Pools) -> None:
    pools.run(2, unscale_too_early)


def unscale_on_some_ranks() -> None:
    model = make(Half)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    wrapped = pyrannc.RaNNCModule(model, optimizer, config=config(1, 1, schedule="auto"))
    scaler = torch.amp.GradScaler("cpu", init_scale=FIRST_SCALE)
    with torch.autocast("cpu", torch.float16):
        scaler.scale(wrapped(share(half_batch(0)))).backward()
    told = r"(?s)rank 0: scaler\.unscale_\(optimizer\).*rank 1: clip_grad_norm"
    first = pyrannc.get_rank() == 0
    call: Any = functools.partial(scaler.unscale_, optimizer)
    call = call if first else functools.partial(wrapped.clip_grad_norm, 1.0)
    with pytest.raises(pyrannc.MismatchError, match=told):
        call()
    wrapped.undeploy()


def test_a_scaler_on_some_ranks_is_named(pools: Pools) -> None:
    pools.run(2, unscale_on_some_ranks)
