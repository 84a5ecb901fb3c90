"""What users call besides the model itself."""

from __future__ import annotations

import io
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pyrannc
from tests.gloo.layouts import config, share

if TYPE_CHECKING:
    from tests.gloo.pool import Pools

pytestmark = [pytest.mark.gloo]


class Two(nn.Module):
    """Two linears with dropout between, a frozen scale, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.last = nn.Linear(6, 4)
        self.scale = nn.Parameter(torch.full((4,), 2.0), requires_grad=False)
        self.register_buffer("shift", torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = F.dropout(torch.tanh(self.first(x)), 0.5, self.training)
        return self.last(hidden) * self.scale + self.shift


def make(seed: int = 0) -> Two:
    torch.manual_seed(seed)
    return Two().double()


def batch(rows: int = 8) -> torch.Tensor:
    return torch.randn(rows, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def use_parameters() -> None:
    model = make(pyrannc.get_rank())  # different values: those of rank 0 count
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    wrapped = pyrannc.RaNNCModule(model, optimizer, config=config(2))
    assert isinstance(wrapped, nn.Module)
    assert len(list(wrapped.parameters())) == 5
    with pytest.raises(pyrannc.RaNNCError, match="needs a plan"):
        _ = wrapped.deployment
    wrapped(share(batch())).sum().backward()
    everywhere = dict(wrapped.named_parameters())
    local = dict(wrapped.named_parameters(from_global=False))
    assert list(everywhere) == [name for name, _ in model.named_parameters()]
    own = {0: {"first.weight", "first.bias"}, 1: {"last.weight", "last.bias", "scale"}}
    assert set(local) == own[pyrannc.get_rank()]
    assert [p.shape for p in everywhere.values()] == [p.shape for p in make().parameters()]
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in local.values()}
    for name, parameter in everywhere.items():
        if name not in local:
            assert parameter.untyped_storage().nbytes() == 8  # one element: the rest is freed
            assert (parameter.grad is None) == (name == "scale")
    expected = dict(make(0).named_parameters())
    for name in everywhere:
        assert torch.equal(wrapped.get_param(name), expected[name])
        assert (wrapped.get_param_grad(name) is None) == (name == "scale")
    wrapped.zero_grad()
    assert all(p.grad is None for p in wrapped.parameters())
    optimizer.step()
    scheduler.step()
    assert scheduler.get_last_lr() == [0.05]
    with pytest.raises(pyrannc.RaNNCError, match="no parameter `middle`"):
        wrapped.get_param("middle")
    with pytest.raises(pyrannc.RaNNCError, match="cannot be converted"):
        wrapped.half()
    assert wrapped.shift is model.shift
    wrapped.undeploy()


def test_each_process_keeps_its_own_parameters(pools: Pools) -> None:
    pools.run(2, use_parameters)


def round_trip(folder: str) -> dict[str, Any]:
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    wrapped = pyrannc.RaNNCModule(model, optimizer, config=config(2))
    assert len(wrapped.state_dict()) == 6  # the bare model's, before the first call
    wrapped(share(batch())).sum().backward()
    optimizer.step()
    state = wrapped.state_dict()
    if pyrannc.get_rank() == 0:
        torch.save(state, Path(folder) / "state.pt")
        make().load_state_dict(state)  # a bare model takes it
    assert bool(state) == (pyrannc.get_rank() == 0)
    pyrannc.barrier()
    saved = torch.load(Path(folder) / "state.pt")
    other = pyrannc.RaNNCModule(make(5), config=config(1))
    with torch.inference_mode():
        other(share(batch()))
    other(share(batch())).sum().backward()
    other.load_state_dict(saved)
    for name in saved:
        if name != "shift":
            assert torch.equal(other.get_param(name), saved[name])
    with pytest.raises(RuntimeError, match=r'Missing key.*"first.weight"'):
        other.load_state_dict({k: v for k, v in saved.items() if k != "first.weight"})
    with pytest.raises(RuntimeError, match=r"size mismatch for last\.bias"):
        other.load_state_dict({**saved, "last.bias": torch.zeros(9)})
    wrapped.undeploy()
    other.undeploy()
    return dict(saved)


def test_state_dicts_go_round(pools: Pools, tmp_path: Path) -> None:
    saved = pools.run(2, round_trip, str(tmp_path))[0]
    assert list(saved) == list(make().state_dict())


def switch_modes() -> None:
    model = make()
    wrapped = pyrannc.RaNNCModule(model, config=config(2))
    bare = make()
    wrapped(share(batch())).sum().backward()
    plan = wrapped.deployment
    wrapped.eval()
    bare.eval()
    for rows in (8, 6, 2):
        with torch.inference_mode() if rows == 6 else torch.no_grad():
            output = wrapped(share(batch(rows)))
        assert not output.requires_grad
        torch.testing.assert_close(output, share(bare(batch(rows))), rtol=1e-12, atol=1e-12)
    wrapped.train()
    first, second = wrapped(share(batch())), wrapped(share(batch()))
    assert not torch.equal(first, second)  # dropout again
    assert wrapped.deployment is plan
    (first.sum() + second.sum()).backward()
    with pytest.raises(pyrannc.RaNNCError, match="backward was called twice"):
        first.sum().backward()
    wrapped.undeploy()


def test_modes_and_batches_come_and_go_without_planning(pools: Pools) -> None:
    pools.run(2, switch_modes)


def pass_gradients(reduction: str) -> None:
    bare, model = make().eval(), make().eval()
    wrapped = pyrannc.RaNNCModule(model, config=config(2), loss_reduction=reduction)
    x = batch(6)
    gradient = torch.randn(6, 4, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    rows = slice(0, 4) if pyrannc.get_rank() == 0 else slice(4, 6)
    wrapped(x[rows]).backward(gradient[rows])
    shares = torch.tensor([4 / 6] * 4 + [2 / 6] * 2, dtype=torch.float64)[:, None]
    bare(x).backward(gradient * shares if reduction == "mean" else gradient)
    for name, parameter in bare.named_parameters():
        torch.testing.assert_close(
            wrapped.get_param_grad(name), parameter.grad, rtol=1e-12, atol=1e-12
        )
    wrapped.undeploy()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradients_of_outputs(pools: Pools, reduction: str) -> None:
    pools.run(2, pass_gradients, reduction)


OPTIMIZERS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.1, "momentum": 0.9},
    "AdamW": {"lr": 0.1},
    "Adagrad": {"lr": 0.1},
    "RMSprop": {"lr": 0.1},
    "NAdam": {"lr": 0.1},
    "Adadelta": {},
}


def optimize(name: str) -> None:
    def groups(model: Two) -> list[dict[str, Any]]:
        return [
            {"params": [model.first.weight, model.last.weight], "weight_decay": 0.1},
            {"params": [model.first.bias, model.last.bias], "weight_decay": 0.0},
        ]

    bare, model = make().eval(), make().eval()
    kind, options = getattr(torch.optim, name), OPTIMIZERS[name]
    theirs, ours = kind(groups(bare), **options), kind(groups(model), **options)
    wrapped = pyrannc.RaNNCModule(model, ours, config=config(2))
    for _ in range(3):
        for module, optimizer, x in ((bare, theirs, batch()), (wrapped, ours, share(batch()))):
            optimizer.zero_grad()
            module(x).pow(2).mean().backward()
            optimizer.step()
    for key, parameter in bare.named_parameters():
        torch.testing.assert_close(wrapped.get_param(key), parameter.data, rtol=1e-9, atol=1e-11)
    wrapped.undeploy()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer(pools: Pools, name: str) -> None:
    pools.run(2, optimize, name)


def save_and_show(path: str) -> str:
    wrapped = pyrannc.RaNNCModule(make(), config=config(2))
    wrapped(share(batch()))
    wrapped.save_deployment(path)
    with pytest.raises(pyrannc.DeploymentError, match="cannot write"):
        wrapped.save_deployment("/nowhere/deployment.json")
    printed = io.StringIO()
    with redirect_stdout(printed):
        pyrannc.show_deployment(path, 16)
    again = pyrannc.RaNNCModule(make(), load_deployment=path, config=config(0))
    again(share(batch()))
    assert str(again.deployment) == str(wrapped.deployment)
    pyrannc.clear()
    return printed.getvalue()


def test_deployments_are_saved_shown_and_loaded(pools: Pools, tmp_path: Path) -> None:
    shown = pools.run(2, save_and_show, str(tmp_path / "deployment.json"))[0]
    assert "2 stages on 2 processes, 2 microbatches" in shown
    assert "with 16 rows: microbatches of up to 8" in shown


def one_process() -> None:
    wrapped = pyrannc.RaNNCModule(make().eval(), config=config(0))
    torch.testing.assert_close(wrapped(batch()), make().eval()(batch()), rtol=1e-12, atol=1e-12)
    assert (pyrannc.get_rank(), pyrannc.get_world_size()) == (0, 1)
    pyrannc.barrier()
    assert len(wrapped.state_dict()) == 6


def test_one_process_needs_no_others() -> None:
    one_process()
    assert not torch.distributed.is_initialized()


@dataclass
class Question:
    """An argument that holds its tensors in a dataclass."""

    x: torch.Tensor
    extra: list[torch.Tensor]
    name: str = "plain"


class Answering(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = make().eval()

    def forward(self, question: Question, *, factor: float = 1.0) -> dict[str, Any]:
        y = self.inner(question.x) + factor * question.extra[0]
        return {"answer": (y, [y.sum(-1), None]), "name": question.name}


def ask() -> None:
    x = batch(6)
    rows = slice(0, 4) if pyrannc.get_rank() == 0 else slice(4, 6)
    wrapped = pyrannc.RaNNCModule(Answering(), config=config(2))
    ours = wrapped(Question(x[rows], [x[rows] * 2]), factor=0.5)
    theirs = Answering()(Question(x, [x * 2]), factor=0.5)
    assert ours["name"] == "plain"
    assert ours["answer"][1][1] is None
    for found, wanted in (
        (ours["answer"][0], theirs["answer"][0]),
        (ours["answer"][1][0], theirs["answer"][1][0]),
    ):
        torch.testing.assert_close(found, wanted[rows], rtol=1e-12, atol=1e-12)
    wrapped.undeploy()


def test_arguments_and_results_may_be_nested(pools: Pools) -> None:
    pools.run(2, ask)


class Stubborn(nn.Module):
    """A submodule that capture cannot look into, between two that it can."""

    class Middle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.abs().max().item() > 1e6:
                return x
            return torch.tanh(self.linear(x))

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.middle = Stubborn.Middle()
        self.last = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.middle(self.first(x)))


def evaluate_stubborn() -> None:
    torch.manual_seed(0)
    bare = Stubborn().double().eval()
    torch.manual_seed(0)
    wrapped = pyrannc.RaNNCModule(Stubborn().double(), config=config(2))
    wrapped(share(batch())).sum().backward()
    wrapped.eval()
    ours, theirs = wrapped(share(batch())), bare(batch())
    torch.testing.assert_close(ours, share(theirs), rtol=1e-12, atol=1e-12)
    wrapped.undeploy()


def test_opaque_parts_are_evaluated_too(pools: Pools) -> None:
    pools.run(2, evaluate_stubborn)
