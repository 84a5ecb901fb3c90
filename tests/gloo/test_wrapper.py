"""The wrapped model as a stand-in for the bare one, and what it says to uses that cannot work."""

from __future__ import annotations

import copy
import logging
import pickle
import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pyrannc
from pyrannc import RaNNCError, RaNNCModule
from tests.gloo.layouts import config, deployment, share

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.gloo.pool import Pools

pytestmark = [pytest.mark.gloo]


class Net(nn.Module):
    """Two linears, a plain attribute, and methods that call parts of it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.last = nn.Linear(6, 4)
        self.scale = 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.first(x))) * self.scale

    def features(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x)

    def generate(self, x: torch.Tensor) -> torch.Tensor:
        return self(self(x))


def make(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net().double()


def batch(rows: int = 8, seed: int = 3) -> torch.Tensor:
    return torch.randn(rows, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def deployed(stages: int) -> tuple[Net, RaNNCModule]:
    model = make()
    wrapped = RaNNCModule(model, config=config(stages))
    wrapped(share(batch())).sum().backward()
    wrapped.zero_grad()
    return model, wrapped


def go_past_the_wrapper() -> None:
    model, wrapped = deployed(2)
    here, there = model.first, model.last
    if pyrannc.get_rank() == 1:
        here, there = there, here
    width = there.in_features
    with torch.no_grad():
        here(batch(2) if here is model.first else torch.ones(2, 6, dtype=torch.float64))
        for call in (
            lambda: wrapped.generate(batch(2)),
            lambda: wrapped.model(batch(2)),
            lambda: there(torch.ones(2, width, dtype=torch.float64)),
            lambda: F.linear(torch.ones(2, width, dtype=torch.float64), there.weight),
            lambda: there.weight.data.sum(),
            lambda: (there.weight + 1).tolist(),
            lambda: torch.zeros(there.bias.shape).copy_(there.bias),
            lambda: there.weight.T,
            lambda: torch.stack([there.bias, there.bias]),
            lambda: copy.deepcopy(model),
        ):
            with pytest.raises(RaNNCError, match="only other ranks hold") as caught:
                call()
            assert "`get_param(name)` and `state_dict()`" in str(caught.value)
        with pytest.raises(RaNNCError, match=r"only other ranks hold.*\n.*own state_dict\(\)"):
            model.state_dict()
    with pytest.raises(RaNNCError, match="gradients are recorded"):
        here(torch.ones(2, here.in_features, dtype=torch.float64))
    assert there.weight.shape == (there.out_features, width)
    assert (there.weight.dtype, there.weight.requires_grad) == (torch.float64, True)
    assert "held by other ranks" in repr(there.weight)
    hash(there.weight)
    wrapped.eval()
    wrapped(share(batch())).sum().backward()  # captured again, with all shapes at hand
    expected = make()(batch())
    torch.testing.assert_close(wrapped(share(batch())), share(expected), rtol=1e-12, atol=1e-12)
    wrapped.undeploy()


def test_what_needs_parameters_of_other_processes_says_so(pools: Pools) -> None:
    pools.run(2, go_past_the_wrapper)


def call_on_replicas() -> None:
    model, wrapped = deployed(1)
    with torch.no_grad():
        torch.testing.assert_close(wrapped.features(batch()), make().features(batch()))
        torch.testing.assert_close(wrapped.generate(batch()), make().generate(batch()))
    with pytest.raises(RaNNCError, match="gradients are recorded"):
        wrapped.features(batch())
    copied = copy.deepcopy(model)
    pickle.loads(pickle.dumps(model))
    copied(batch()).sum().backward()  # a copy is nobody's part
    wrapped.undeploy()
    model(batch()).sum().backward()
    again = RaNNCModule(model, config=config(1))
    again(share(batch()))
    pyrannc.clear()


def test_replicas_may_be_called_by_themselves_without_gradients(pools: Pools) -> None:
    pools.run(2, call_on_replicas)


def call_on_divided(folder: str) -> None:
    path = deployment(make, (share(batch()),), ((0, 1),), folder, 1, "parameters")
    model = make()
    wrapped = RaNNCModule(model, load_deployment=path, config=config(1, 1))
    with torch.no_grad():
        wrapped.features(batch())  # before the first call all of it is here
    wrapped(share(batch())).sum().backward()
    with torch.no_grad():
        for call in (wrapped.features, wrapped.generate, model, model.first):
            with pytest.raises(RaNNCError, match="which replicas divide among") as caught:
                call(batch())
            assert "`first.forward` needs the parameter `first.weight`" in str(caught.value)
            assert "hint: call the RaNNCModule itself, on all ranks" in str(caught.value)
    wrapped.undeploy()
    torch.testing.assert_close(model(batch()), make()(batch()))


def test_replicas_that_divide_parameters_say_so(pools: Pools, tmp_path: Path) -> None:
    pools.run(2, call_on_divided, str(tmp_path))


def set_attributes() -> None:
    model = make()
    wrapped = RaNNCModule(model, config=config(2))
    wrapped.scale = 2.0
    assert model.scale == 2.0
    wrapped.extra = nn.Parameter(torch.ones(1, dtype=torch.float64))  # before the first call
    assert len(list(wrapped.parameters())) == 5
    del wrapped.extra
    wrapped.extra = None
    bare = make()
    for scale in (2.0, 3.0, 2.0):
        wrapped.scale = bare.scale = scale
        wrapped(share(batch()))
        found, expected = wrapped(share(batch())), bare(batch())
        torch.testing.assert_close(found, share(expected), rtol=1e-12, atol=1e-12)
    model.scale = 1.5 + pyrannc.get_rank()
    with pytest.raises(
        pyrannc.MismatchError, match=r"`scale` is 1\.5 on rank 0 and 2\.5 on rank 1"
    ):
        wrapped(share(batch()))
    model.scale = 2.0
    with pytest.raises(RaNNCError, match="`last` cannot be set"):
        wrapped.last = nn.Linear(6, 4)
    kept, model.last = model.last, nn.Linear(6, 4).double()
    with pytest.raises(RaNNCError, match="submodules or parameters of `the model` were replaced"):
        wrapped(share(batch()))
    model.last = kept
    wrapped(share(batch()))
    with pytest.raises(AttributeError):
        _ = wrapped.absent
    assert getattr(wrapped, "module", wrapped) is wrapped
    assert "features" in dir(wrapped)
    assert "Net(" in repr(wrapped)
    assert wrapped.train() is wrapped
    wrapped.undeploy()


def test_attributes_are_those_of_the_model(pools: Pools) -> None:
    pools.run(2, set_attributes)


def test_a_sequence_is_one() -> None:
    layers = nn.Sequential(OrderedDict(a=nn.Linear(4, 4), b=nn.ReLU()))
    wrapped = RaNNCModule(layers, config=config(0))
    assert len(wrapped) == 2
    assert list(wrapped) == list(layers)
    assert wrapped[1] is layers.b
    assert wrapped.b in wrapped
    plain = RaNNCModule(nn.Linear(2, 2), config=config(0))
    assert plain
    with pytest.raises(TypeError, match="has no len"):
        len(plain)
    pyrannc.clear()


def move() -> None:
    model = make().float()
    wrapped = RaNNCModule(model, config=config(2))
    wrapped.double()  # before the first call
    wrapped(share(batch())).sum().backward()
    assert wrapped.to("cpu") is wrapped
    assert wrapped.double() is wrapped
    assert wrapped.cpu() is wrapped
    with pytest.warns(UserWarning, match="the parameters stay on cpu"):
        wrapped.to("meta")
    for convert in (wrapped.half, wrapped.float, lambda: wrapped.to(torch.bfloat16)):
        with pytest.raises(RaNNCError, match="cannot be converted"):
            convert()
    with pytest.raises(RaNNCError, match="would drop the values"):
        wrapped.to_empty(device="cpu")
    torch.testing.assert_close(wrapped.get_param("last.bias"), make().last.bias.float().double())
    wrapped.undeploy()


def test_placed_parameters_stay(pools: Pools) -> None:
    pools.run(2, move)


def refuse() -> None:
    _, wrapped = deployed(2)
    x = share(batch())
    other = RaNNCModule(make(), config=config(1))  # before its first call, too
    for module in (wrapped, other):
        for copied in (copy.deepcopy, pickle.dumps):
            with pytest.raises(RaNNCError, match=r"cannot be (copied|pickled)"):
                copied(module)
        with pytest.raises(RaNNCError, match="wrapped in DistributedDataParallel"):
            nn.parallel.DistributedDataParallel(module)
        with pytest.raises(RaNNCError, match="wrapped in DataParallel"):
            module._replicate_for_data_parallel()
        with pytest.raises(RaNNCError, match="cannot be compiled"):
            module.compile()
        with pytest.raises(RaNNCError, match="cannot be shared"):
            module.share_memory()
        with pytest.raises(RaNNCError, match=r"torch.func"):
            torch.func.vmap(module)(x)
        with pytest.raises(RaNNCError, match="is a RaNNCModule already"):
            RaNNCModule(module)
        with pytest.raises(RaNNCError, match="belong to another RaNNCModule"):
            RaNNCModule(module.model)
    with pytest.raises(RaNNCError, match=r"torch.jit.trace"):
        torch.jit.trace(wrapped, (x,), check_trace=False)
    both = torch.optim.SGD([*make(1).parameters(), *make(2).parameters()])
    with pytest.raises(RaNNCError, match="has 8 parameters that are not the model's"):
        RaNNCModule(make(), both)
    with pytest.raises(RaNNCError, match="is a OptimizedModule"):
        RaNNCModule(torch.compile(make()))
    wrapped(x)
    pyrannc.clear()
    with pytest.raises(RaNNCError, match="was undeployed"):
        wrapped(x)


def test_what_cannot_work_says_what_to_do(pools: Pools) -> None:
    pools.run(2, refuse)


def differentiate() -> None:
    _, wrapped = deployed(2)
    x = share(batch()).requires_grad_()
    loss = wrapped(x).square().sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RaNNCError, match="backward was called twice"):
        loss.backward()
    held = list(wrapped.parameters(from_global=False))
    gradients = [p.grad.clone() for p in held]
    (of_inputs,) = torch.autograd.grad(wrapped(x).square().sum(), x)
    for parameter, gradient in zip(held, gradients, strict=True):
        assert torch.equal(parameter.grad, gradient)  # only those that were asked for
    bare, whole = make(), batch().requires_grad_()
    (expected,) = torch.autograd.grad(bare(whole).square().sum(), whole)
    weight = 1 / pyrannc.get_world_size()  # a loss outside of the model is a mean over rows
    torch.testing.assert_close(of_inputs, share(expected) * weight, rtol=1e-12, atol=1e-12)
    with pytest.raises(RaNNCError, match="differentiated only once"):
        torch.autograd.grad(wrapped(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="not have been used in the graph"):
        torch.autograd.grad(wrapped(x).sum(), held)
    unused = torch.autograd.grad(wrapped(x).sum(), held, allow_unused=True)
    assert unused == (None,) * len(held)
    outcome: list[Any] = []
    thread = threading.Thread(target=lambda: outcome.append(wrapped(x).sum().backward()))
    thread.start()
    thread.join()
    assert outcome == [None]
    wrapped.undeploy()


def test_derivatives_of_other_kinds(pools: Pools) -> None:
    pools.run(2, differentiate)


def compile_it() -> None:
    _, wrapped = deployed(2)
    compiled = torch.compile(wrapped)
    expected = share(make()(batch()))
    torch.testing.assert_close(compiled(share(batch())), expected, rtol=1e-12, atol=1e-12)
    wrapped.undeploy()


@pytest.mark.slow
def test_a_compiled_module_runs_as_it_is(pools: Pools) -> None:
    pools.run(2, compile_it)


def hook_parts() -> None:
    model = make()
    wrapped = RaNNCModule(model, config=config(2))
    handle = model.last.register_full_backward_hook(lambda *_: None)
    with pytest.raises(RaNNCError, match="a backward hook is registered on `last`"):
        wrapped(share(batch()))
    handle.remove()
    handle = model.last.weight.register_hook(lambda g: g.clamp(-1, 1))
    with pytest.raises(RaNNCError, match=r"hook is registered on the parameter `last.weight`"):
        wrapped(share(batch()))
    handle.remove()
    handle = model.last.weight.register_post_accumulate_grad_hook(lambda p: None)
    with pytest.raises(RaNNCError, match=r"hook is registered on the parameter `last.weight`"):
        wrapped(share(batch()))
    handle.remove()
    model.first.register_forward_hook(lambda module, args, output: output * 2)
    expected = make()
    expected.first.register_forward_hook(lambda module, args, output: output * 2)
    for _ in range(2):
        found = wrapped(share(batch()))
        torch.testing.assert_close(found, share(expected(batch())), rtol=1e-12, atol=1e-12)
        # After the first call, too: the model is captured again.
        for one in (model, expected):
            one.last.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    model.first.register_full_backward_hook(lambda *_: None)
    with pytest.raises(RaNNCError, match="a backward hook is registered on `first`"):
        wrapped(share(batch()))
    wrapped.undeploy()


def test_hooks_of_parts_work_or_say_so(pools: Pools) -> None:
    pools.run(2, hook_parts)


def hook_the_module() -> None:
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    wrapped = RaNNCModule(model, optimizer, config=config(2))
    called = []
    wrapped.register_forward_pre_hook(lambda module, args: called.append("before"))
    wrapped.register_forward_hook(lambda module, args, output: called.append("after"))
    wrapped.register_full_backward_hook(lambda module, *gradients: called.append("backward"))
    optimizer.register_step_pre_hook(lambda *_: called.append("step"))
    wrapped(share(batch()).requires_grad_()).sum().backward()
    optimizer.step()
    assert called == ["before", "after", "backward", "step"]
    wrapped.undeploy()


def test_hooks_of_the_wrapped_module_work(pools: Pools) -> None:
    pools.run(2, hook_the_module)


def test_a_captured_hook_is_told(caplog: pytest.LogCaptureFixture) -> None:
    model = make()
    model.first.register_forward_hook(lambda module, args, output: print(output.shape))
    wrapped = RaNNCModule(model, config=config(0))
    with caplog.at_level(logging.WARNING):
        wrapped(batch())
    assert "the forward hook on `first` is captured" in caplog.text
    wrapped.undeploy()


class Generator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 4))

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.layers(z)


class Discriminator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def play(
    wrap: Callable[[nn.Module, torch.optim.Optimizer], nn.Module],
    part: Callable[[torch.Tensor], torch.Tensor],
) -> dict[str, torch.Tensor]:
    """Three rounds of a generator against a discriminator."""
    torch.manual_seed(0)
    bare = {"g": Generator().double(), "d": Discriminator().double()}
    optimizers = {name: torch.optim.SGD(m.parameters(), lr=0.3) for name, m in bare.items()}
    models = {name: wrap(m, optimizers[name]) for name, m in bare.items()}
    generate, judge = models["g"], models["d"]
    for round_ in range(3):
        noise, real = part(batch(8, round_)[:, :3].contiguous()), part(batch(8, 9 + round_))
        fake = generate(noise)
        optimizers["d"].zero_grad()
        loss = F.softplus(-judge(real)).mean() + F.softplus(judge(fake.detach())).mean()
        loss.backward()
        optimizers["d"].step()
        optimizers["g"].zero_grad()
        F.softplus(-judge(fake)).mean().backward()
        optimizers["g"].step()
    if isinstance(generate, RaNNCModule):
        return {
            f"{name}.{key}": model.get_param(key)
            for name, model in models.items()
            for key, _ in model.named_parameters(from_global=True)
        }
    return {f"{n}.{key}": p.detach() for n, m in bare.items() for key, p in m.named_parameters()}


def play_together(stages: int) -> dict[str, torch.Tensor]:
    found = play(lambda m, o: RaNNCModule(m, o, config=config(stages)), share)
    pyrannc.clear()
    return found


@pytest.mark.parametrize(("world", "stages"), [(2, 1), (2, 2), (4, 2)])
def test_two_models_that_feed_each_other(pools: Pools, world: int, stages: int) -> None:
    expected = play(lambda model, _: model, lambda x: x)
    for found in pools.run(world, play_together, stages):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
