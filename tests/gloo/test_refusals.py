"""What a wrapped model cannot do is found at the call, with a message that says what to do."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

import pyrannc
from pyrannc import RaNNCError, RaNNCModule
from tests.gloo.layouts import config, share
from tests.gloo.test_wrapper import Net, batch, make

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.gloo.pool import Pools

pytestmark = [pytest.mark.gloo]


@pytest.fixture(params=[False, True], ids=["before", "after"])
def wrapped(request: pytest.FixtureRequest) -> Iterator[Any]:
    """A wrapped model on one process, before or after its first call."""
    module = RaNNCModule(make(), config=config(1))
    if request.param:
        module(batch()).sum().backward()
    yield module
    module.undeploy()


def refused(call: Callable[[], object], found: str, remedy: str) -> None:
    with pytest.raises(RaNNCError, match=found) as caught:
        call()
    assert remedy in str(caught.value)


@pytest.mark.filterwarnings("ignore:.torch.jit.* is deprecated")
def test_what_would_look_into_it(wrapped: Any) -> None:
    x, bare = batch(), "give it the bare model"
    refused(lambda: torch.jit.script(wrapped), "`torch.jit.script` cannot look into", bare)
    refused(lambda: torch.jit.trace(wrapped, (x,)), "`torch.jit.trace` cannot look into", bare)
    refused(lambda: torch.fx.symbolic_trace(wrapped), "`torch.fx` cannot look into", bare)
    holding = nn.Sequential(wrapped)
    refused(lambda: torch.fx.symbolic_trace(holding), "`torch.fx` cannot look into", bare)
    refused(lambda: torch.export.export(wrapped, (x,)), "`torch.export` cannot look into", bare)
    refused(lambda: torch.func.vmap(wrapped)(x), "`torch.func` cannot look into", bare)
    with pytest.raises(Exception, match="to export a model, take the bare one"):
        torch.export.export(wrapped, (x,), strict=True)
    zeros = {name: torch.zeros_like(p) for name, p in wrapped.named_parameters()}
    with pytest.raises(RaNNCError, match=r"cannot look into|were replaced"):
        torch.func.functional_call(wrapped, zeros, (x,))
    wrapped(x)  # and all is as it was


def test_what_would_copy_it(wrapped: Any) -> None:
    refused(lambda: torch.save(wrapped, io.BytesIO()), "cannot be pickled", "state_dict()")
    refused(wrapped.to_empty, "would drop the values", "before wrapping it")
    refused(wrapped.share_memory, "cannot be shared", "state_dict()")


def wrap_in_others() -> None:
    for called in (False, True):
        module = RaNNCModule(make(), config=config(1))
        if called:
            module(share(batch())).sum().backward()
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        outer = nn.Sequential(module)
        for target in (module, outer):
            refused(
                lambda t=target, m=mesh: fully_shard(t, mesh=m), "wrapped in FSDP", "leave FSDP out"
            )
            refused(
                lambda t=target: FullyShardedDataParallel(t, device_id=torch.device("cpu")),
                "wrapped in FSDP",
                "leave FSDP out",
            )
        refused(
            lambda m=module: nn.parallel.DistributedDataParallel(m),
            "wrapped in DistributedDataParallel",
            "leave DistributedDataParallel out",
        )
        module(share(batch()))
        module.undeploy()


def test_what_would_distribute_it_again(pools: Pools) -> None:
    pools.run(2, wrap_in_others)


def test_arguments_that_are_something_else() -> None:
    model: Any = make()
    refused(lambda: RaNNCModule(lambda x: x), "is a function, needed a torch.nn.Module", "")  # type: ignore[arg-type]
    refused(lambda: RaNNCModule(model, 0.1), "is a float, needed a torch.optim.Optimizer", "")  # type: ignore[arg-type]
    refused(lambda: RaNNCModule(model, loss_reduction="max"), "`loss_reduction` is 'max'", "")
    refused(lambda: RaNNCModule(torch.compile(model)), "is a OptimizedModule", "the bare model")  # type: ignore[arg-type]


def test_changes_of_a_placed_model(wrapped: Any) -> None:
    changes: list[Callable[[], object]] = [
        lambda: setattr(wrapped, "more", nn.Parameter(torch.ones(2))),
        lambda: wrapped.register_parameter("more", nn.Parameter(torch.ones(2))),
        lambda: wrapped.add_module("more", nn.Linear(1, 1)),
        lambda: wrapped.register_buffer("more", torch.ones(2)),
    ]
    for change in changes:
        if wrapped._runtime.deployed:
            refused(change, "`more` cannot be set", "change the model before its first call")
        else:
            change()
            assert hasattr(wrapped.model, "more")
            del wrapped.more
    wrapped(batch())


def test_what_needs_a_plan() -> None:
    module = RaNNCModule(make(), config=config(1))
    for call in (
        lambda: module.deployment,
        lambda: module.save_deployment("nowhere"),
        module.calc_grad_norm,
        lambda: module.clip_grad_norm(1.0),
    ):
        refused(call, "needs a plan", "call the model once before")
    module.undeploy()


def test_names_and_numbers_that_are_none(wrapped: Any) -> None:
    for call in (wrapped.get_param, wrapped.get_param_grad):
        refused(lambda c=call: c("middle"), "has no parameter `middle`", "named_parameters()")
    wrapped(batch()).sum().backward()
    for order in (0, -1, float("nan")):
        refused(lambda o=order: wrapped.calc_grad_norm(o), "needed a positive number", "is 2")
    foreign = [nn.Parameter(torch.ones(1))]
    refused(
        lambda: wrapped.clip_grad_norm(1.0, parameters=foreign),
        "1 of the 1 given parameters are not the model's",
        "of the model that was wrapped",
    )
    state: Any = [make().state_dict()]
    refused(lambda: wrapped.load_state_dict(state), "is a list on rank 0, needed a dictionary", "")
    refused(lambda: wrapped.load_state_dict({}), "has nothing in it on rank 0", "gives the state")
    refused(
        lambda: wrapped.load_state_dict(make().state_dict(), assign=True), "already placed", "leave"
    )
    refused(wrapped.allreduce_grads, "found nothing to do", "no_sync()")


class Counting(nn.Module):
    """Has a buffer, and gives back how many rows there are if asked."""

    def __init__(self, tell: str = "") -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4).double()
        self.register_buffer("scale", torch.ones(4, dtype=torch.float64))
        self.tell = tell

    def forward(self, x: torch.Tensor | None = None, given: Any = None) -> Any:
        result = self.linear(torch.ones(2, 4).double() if x is None else x) * self.scale
        return (result, result.shape[0] * 2) if self.tell == "rows" else result


class Hidden:
    """May hold tensors."""

    def __init__(self) -> None:
        self.tensor = torch.ones(2)


@pytest.mark.parametrize(
    ("args", "found", "remedy"),
    [
        ((), "called without any tensor", ""),
        ((torch.zeros(0, 4).double(),), "no rows on any rank", ""),
        ((batch(), Hidden()), "which may hold tensors unseen", "tuples, lists, dicts"),
    ],
)
def test_batches_that_are_none(args: tuple[Any, ...], found: str, remedy: str) -> None:
    module = RaNNCModule(Counting(), config=config(1))
    refused(lambda: module(*args), found, remedy)
    module.undeploy()


def start_without_rows() -> None:
    module: Any = RaNNCModule(make(), config=config(2))
    empty_on_one = batch(4 if pyrannc.get_rank() == 0 else 0)
    for scale in (1.0, 2.0):  # the model's first form, and another
        module.scale = scale
        refused(lambda: module(empty_on_one), "the batch is empty, and a model is captured", "row")
        module(batch(4)).sum().backward()
        module(empty_on_one).sum().backward()
    module.undeploy()


def test_each_form_of_a_model_starts_with_rows(pools: Pools) -> None:
    pools.run(2, start_without_rows)


def test_results_and_buffers_that_cannot_be() -> None:
    module: Any = RaNNCModule(Counting("rows"), config=config(1))
    refused(lambda: module(batch()), "number computed from the batch size", "return tensors only")
    module.undeploy()
    module = RaNNCModule(Counting(), config=config(1))
    module(batch())
    module.model.scale = torch.ones(5, dtype=torch.float64)
    refused(lambda: module(batch()), r"`scale` has shape \[5\] now", "wrap the model after")
    module.undeploy()
    refused(lambda: module(batch()), "was undeployed", "wrap a model anew")


class Turning(Net):
    """Uses its layers by turns: one form of it needs on one rank what another has elsewhere."""

    turned = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.turned:
            return super().forward(x)
        mixed: torch.Tensor = torch.tanh(self.last.weight @ self.first.weight @ x.T).T
        return mixed @ (self.last.weight @ self.first.weight)


def turn() -> None:
    torch.manual_seed(0)
    module: Any = RaNNCModule(Turning().double(), config=config(2))
    x = share(batch())
    module(x).sum().backward()
    module.turned = True
    with pytest.raises(
        pyrannc.PlanError, match=r"called so, the model needs `.*` on rank"
    ) as caught:
        module(x)
    assert "make its first call in this form, or set `partition_num=1`" in str(caught.value)
    module.turned = False
    module(x).sum().backward()
    module.undeploy()


def test_a_form_that_the_plan_cannot_run(pools: Pools) -> None:
    pools.run(2, turn)


def build_differently() -> None:
    rank = pyrannc.get_rank()
    module: Any = RaNNCModule(nn.Linear(4, 3 + rank), config=config(1))
    with pytest.raises(pyrannc.MismatchError, match="given different models"):
        module(torch.ones(2, 4))
    module.undeploy()
    module = RaNNCModule(make(), config=config(1))
    with pytest.raises(pyrannc.MismatchError, match=r"(?s)different inputs.*rank 0.*rank 1"):
        module(torch.ones(2, 4, 1 + rank).double())
    module(share(batch())).sum().backward()
    with module.no_sync():
        module(share(batch())).sum().backward()
    refused(module.calc_grad_norm, "needs the gradients of all processes", "allreduce_grads()")
    module.undeploy()


def test_processes_that_differ(pools: Pools) -> None:
    pools.run(2, build_differently)


def ask_for_norms() -> None:
    modules = [RaNNCModule(make(seed), config=config(2)) for seed in (0, 1)]
    for module in modules:
        module(share(batch())).sum().backward()
    clip: Any = torch.nn.utils.clip_grad_norm_
    some = list(modules[0].parameters())[:1]
    refused(
        lambda: clip(some, 1.0), "some of the model's gradients only", "clip_grad_norm(max_norm"
    )
    both = [p for module in modules for p in module.parameters()]
    refused(lambda: clip(both, 1.0), "gradients of several models", "of each model")
    for module in modules:
        module.zero_grad()
    refused(lambda: clip(both, 1.0), "several models have none", "of each model")
    pyrannc.clear()


def test_norms_of_something_else(pools: Pools) -> None:
    pools.run(2, ask_for_norms)


def feed_from_two() -> None:
    """One model's input made by two whose rows lie differently on the processes."""
    rank = pyrannc.get_rank()
    modules: list[Any] = [RaNNCModule(make(seed), config=config(1)) for seed in range(3)]
    first, second, last = modules
    made = first(batch(3 + rank))[:2] + second(batch(4))[:2]
    with pytest.raises(RaNNCError, match="computed from outputs of several wrapped") as caught:
        last(made).mean().backward()
    assert "equally many rows" in str(caught.value)
    pyrannc.clear()


def test_inputs_of_several_models(pools: Pools) -> None:
    pools.run(2, feed_from_two)


# ---- As a part of another module


class Holding(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.head = nn.Linear(4, 2).double()


def hold() -> None:
    module = RaNNCModule(make(), config=config(2))
    outer, plain = Holding(module), Holding(make(3))
    assert list(outer.state_dict()) == list(plain.state_dict())
    outer.load_state_dict(plain.state_dict())  # before the first call
    module(share(batch())).sum().backward()
    assert torch.equal(module.get_param("last.weight"), plain.inner.last.weight)
    state = outer.state_dict()  # of all on rank 0, elsewhere of what is not the RaNNCModule's
    names = list(plain.state_dict())
    assert list(state) == (names if pyrannc.get_rank() == 0 else names[-2:])
    if pyrannc.get_rank() == 0:
        torch.testing.assert_close(state, plain.state_dict())
    refused(
        lambda: outer.load_state_dict(plain.state_dict()),
        "with that of the RaNNCModule `inner` in it",
        "its own load_state_dict()",
    )
    module.undeploy()


def test_a_module_that_holds_a_wrapped_one(pools: Pools) -> None:
    pools.run(2, hold)


# ---- After undeploy


def go_on_alone(stages: int) -> None:
    bare, model = make(), make()
    optimizers = [torch.optim.Adam(m.parameters(), lr=0.1, eps=1e-4) for m in (bare, model)]
    module = RaNNCModule(model, optimizers[1], config=config(stages))

    def step(called: nn.Module, x: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        called(x).square().mean().backward()
        optimizer.step()

    for seed in range(2):
        step(bare, batch(8, seed), optimizers[0])
        step(module, share(batch(8, seed)), optimizers[1])
    module.undeploy()
    if stages > 1:
        refused(lambda: model(batch()), "only other ranks hold|gradients are recorded", "")
        refused(model.state_dict, "only other ranks hold", "state_dict()")
        whole: Any = optimizers[1].state_dict
        refused(lambda: whole(from_global=True), "which `undeploy` has left", "before `undeploy`")
        return
    close = {"rtol": 1e-10, "atol": 1e-12}
    torch.testing.assert_close(model.state_dict(), bare.state_dict(), **close)
    torch.testing.assert_close(optimizers[1].state_dict(), optimizers[0].state_dict(), **close)
    for seed in range(2, 4):
        step(bare, batch(8, seed), optimizers[0])
        step(model, batch(8, seed), optimizers[1])
        for added, to in zip((bare, model), optimizers, strict=True):
            added.extra = nn.Parameter(torch.ones(1))
            to.add_param_group({"params": [added.extra]})  # as to any plain optimizer
    torch.testing.assert_close(model.state_dict(), bare.state_dict(), **close)


@pytest.mark.parametrize(("world", "stages"), [(1, 1), (2, 1), (2, 2)])
def test_training_goes_on_without_the_others(pools: Pools, world: int, stages: int) -> None:
    pools.run(world, go_on_alone, stages)
