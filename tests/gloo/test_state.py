"""The model's and the optimizer's state: as the bare ones have it, from and to any plan."""

from __future__ import annotations

import copy
import pickle
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import pyrannc
from tests.covering import covering
from tests.gloo.layouts import Layout, config, deployment, share

if TYPE_CHECKING:
    from tests.gloo.pool import Pools

pytestmark = [pytest.mark.gloo]

ROWS = 12
STEPS = 3
STEP_SIZE = 0.05


class Tied(nn.Module):
    """An embedding whose weight is also the last layer's, batch norm's counters, and a scale."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.first = nn.Linear(4, 6)
        self.middle = nn.Linear(6, 4)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.frozen = nn.Parameter(torch.full((4,), 0.5), requires_grad=False)
        self.last = nn.Linear(4, 7, bias=False)
        self.last.weight = self.embedding.weight
        self.register_buffer("shift", torch.ones(4))
        self.register_buffer("scratch", torch.ones(4), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.first(self.embedding(tokens)))
        hidden = self.middle(hidden) * self.scale + self.frozen + self.shift
        return self.last(torch.tanh(hidden)).pow(2).mean()


def make(seed: int = 0) -> Tied:
    torch.manual_seed(seed)
    return Tied().double()


def batch(step: int) -> torch.Tensor:
    return torch.randint(7, (ROWS, 3), generator=torch.Generator().manual_seed(step))


def adam(model: nn.Module) -> torch.optim.Optimizer:
    """Two groups, of which a rank may keep nothing, and a frozen parameter among them."""
    late = [p for name, p in model.named_parameters() if name.startswith("middle")]
    early = [p for p in model.parameters() if all(p is not other for other in late)]
    return torch.optim.AdamW(
        [{"params": late, "lr": STEP_SIZE / 2, "weight_decay": 0.1}, {"params": early}],
        lr=STEP_SIZE,
    )


def named_sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(list(model.named_parameters()), lr=STEP_SIZE, momentum=0.9)


OPTIMIZERS = {"adam": adam, "named_sgd": named_sgd}


@dataclass
class Script:
    """A training script: a model, its optimizer and a scheduler."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler

    @classmethod
    def start(cls, optimizer: str, seed: int = 0) -> Script:
        model = make(seed)
        made = OPTIMIZERS[optimizer](model)
        return cls(model, made, torch.optim.lr_scheduler.ExponentialLR(made, 0.9))

    def wrap(self, path: str | None, stages: int = 1, **options: Any) -> pyrannc.RaNNCModule:
        self.model = pyrannc.RaNNCModule(
            self.model, self.optimizer, load_deployment=path, config=config(stages), **options
        )
        return self.model

    def train(self, steps: range) -> list[float]:
        losses = []
        for step in steps:
            tokens = batch(step)
            loss = self.model(
                share(tokens) if isinstance(self.model, pyrannc.RaNNCModule) else tokens
            )
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.scheduler.step()
            losses.append(loss.item())
        return losses

    def state(self) -> dict[str, Any]:
        wrapped = isinstance(self.model, pyrannc.RaNNCModule)
        options = {"from_global": True} if wrapped else {}
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(**options),
            "scheduler": self.scheduler.state_dict(),
        }

    def load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        if isinstance(self.model, pyrannc.RaNNCModule):
            self.optimizer.load_state_dict(state["optimizer"], from_global=True)
        else:
            self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])


def close(found: Any, expected: Any) -> None:
    """Equal up to the order of additions, in everything."""
    assert type(found) is type(expected) or isinstance(found, dict)
    if isinstance(expected, torch.Tensor):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for key in expected:
            close(found[key], expected[key])
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            close(one, other)
    else:
        assert found == expected


def plain(optimizer: str) -> tuple[dict[str, Any], dict[str, Any], list[float]]:
    """The states in the middle and at the end of uninterrupted training, and all losses."""
    script = Script.start(optimizer)
    losses = script.train(range(STEPS))
    middle = copy.deepcopy(script.state())
    losses += script.train(range(STEPS, 2 * STEPS))
    return middle, script.state(), losses


def planned(layout: Layout, folder: str, level: str) -> str:
    return deployment(make, (share(batch(0)),), layout, folder, sharding=level)


def train_and_save(optimizer: str, layout: Layout, level: str, folder: str) -> Any:
    """The first half of training, whose state rank 0 returns."""
    script = Script.start(optimizer, seed=pyrannc.get_rank())  # rank 0's counts
    script.wrap(planned(layout, folder, level), enable_zero=level != "none")
    assert len(script.state()["model"]) == len(make().state_dict())  # before the first call
    losses = script.train(range(STEPS))
    state = script.state()
    with warnings.catch_warnings(record=True):  # where it is not the state of all parameters
        local = script.optimizer.state_dict()
    held = sum(len(group["params"]) for group in local["param_groups"])
    assert held == sum(len(group["params"]) for group in script.optimizer.param_groups)
    if pyrannc.get_rank() == 0:
        torch.save(state, Path(folder) / "state.pt")
    else:
        assert state["model"] == {}
        assert state["optimizer"] == {}
    script.model.undeploy()
    pyrannc.barrier()
    return losses, state if pyrannc.get_rank() == 0 else None


def load_and_train(
    optimizer: str, layout: Layout, level: str, path: str, folder: str, when: str
) -> Any:
    """The second half, from a file; loaded before or after the first call."""
    script = Script.start(optimizer, seed=5)
    wrapped = script.wrap(planned(layout, folder, level), enable_zero=level != "none")
    state = torch.load(path)
    if when == "after":
        script.train(range(7, 8))  # something else, to be overwritten
    if when == "before on rank 0":
        if pyrannc.get_rank() == 0:
            script.load(state)
        script.scheduler.load_state_dict(state["scheduler"])
        for group, saved in zip(
            script.optimizer.param_groups, state["optimizer"]["param_groups"], strict=True
        ):
            group.update(lr=saved["lr"], initial_lr=saved["initial_lr"])
    else:
        script.load(state)
    losses = script.train(range(STEPS, 2 * STEPS))
    result = script.state()
    assert wrapped.model.last.weight is wrapped.model.embedding.weight  # still tied
    wrapped.undeploy()
    return losses, result if pyrannc.get_rank() == 0 else None


ONE, TWO, FOUR = ((0,),), ((0,), (1,)), ((0,), (1,), (2,), (3,))
REPLICAS, UNEQUAL, THREE = ((0, 1),), ((0,), (1, 2, 3)), ((0, 1, 2), (3,))
ALL = ((0, 1, 2, 3),)

FIRST_WAYS = [
    ("adam", TWO, REPLICAS, "after"),
    ("named_sgd", UNEQUAL, TWO, "before"),
    ("adam", REPLICAS, UNEQUAL, "before on rank 0"),
]
MORE_WAYS = [
    (optimizer, first, second, when)
    for optimizer, (first, second), when in covering(
        list(OPTIMIZERS),
        [
            (ONE, TWO), (ONE, FOUR), (TWO, ONE), (FOUR, REPLICAS), (UNEQUAL, THREE), (THREE, ONE),
            (REPLICAS, FOUR), (FOUR, THREE),
        ],
        ["before", "after", "before on rank 0"],
    )
]  # fmt: skip


@pytest.mark.parametrize(
    ("optimizer", "first", "second", "when"),
    [*FIRST_WAYS, *MORE_WAYS],
    ids=str,
)
def test_training_goes_on_under_another_plan(
    pools: Pools, optimizer: str, first: Layout, second: Layout, when: str, tmp_path: Path
) -> None:
    check_resume(pools, optimizer, first, second, when, tmp_path)


@pytest.mark.parametrize(
    ("optimizer", "first", "second", "when", "levels"),
    [
        ("adam", ((0, 1, 2),), ((0,), (1, 2)), "after", ("optimizer", "optimizer")),
        ("adam", ONE, ALL, "before", ("none", "parameters")),
        ("adam", UNEQUAL, THREE, "before", ("optimizer", "optimizer")),
        ("named_sgd", THREE, UNEQUAL, "after", ("optimizer", "gradients")),
        ("adam", UNEQUAL, TWO, "before on rank 0", ("optimizer", "none")),
        ("adam", ONE, ALL, "after", ("none", "optimizer")),
        ("named_sgd", ONE, ALL, "before on rank 0", ("none", "gradients")),
        ("adam", ALL, REPLICAS, "after", ("parameters", "optimizer")),
        ("named_sgd", ALL, REPLICAS, "before", ("gradients", "parameters")),
        ("adam", ALL, TWO, "before on rank 0", ("parameters", "none")),
        ("adam", THREE, ALL, "after", ("parameters", "parameters")),
    ],
    ids=str,
)
def test_training_goes_on_where_replicas_divide_the_state(
    pools: Pools,
    optimizer: str,
    first: Layout,
    second: Layout,
    when: str,
    levels: tuple[str, str],
    tmp_path: Path,
) -> None:
    check_resume(pools, optimizer, first, second, when, tmp_path, levels)


def check_resume(
    pools: Pools,
    optimizer: str,
    first: Layout,
    second: Layout,
    when: str,
    folder: Path,
    levels: tuple[str, str] = ("none", "none"),
) -> None:
    middle, end, losses = plain(optimizer)
    (folder / "first").mkdir()
    (folder / "second").mkdir()
    world = 1 + max(rank for ranks in first for rank in ranks)
    results = pools.run(world, train_and_save, optimizer, first, levels[0], str(folder / "first"))
    for found, _ in results:
        assert found == pytest.approx(losses[:STEPS], rel=1e-10)
    state = results[0][1]
    close(state, middle)
    bare = Script.start(optimizer, seed=3)
    bare.load(copy.deepcopy(state))
    assert bare.train(range(STEPS, 2 * STEPS)) == pytest.approx(losses[STEPS:], rel=1e-10)
    close(bare.state(), end)
    path = str(folder / "first" / "state.pt")
    world = 1 + max(rank for ranks in second for rank in ranks)
    results = pools.run(
        world, load_and_train, optimizer, second, levels[1], path, str(folder / "second"), when
    )
    for found, _ in results:
        assert found == pytest.approx(losses[STEPS:], rel=1e-10)
    close(results[0][1], end)


def keep_the_object() -> None:
    """The optimizer stays what it was for everything that knows it."""
    script = Script.start("adam")
    optimizer, kind = script.optimizer, type(script.optimizer)
    script.wrap(None, 2)
    heard: list[str] = []
    optimizer.register_state_dict_pre_hook(lambda _: heard.append("before"))
    optimizer.register_state_dict_post_hook(lambda _, state: {**state, "extra": len(state)})
    script.train(range(2))
    assert script.optimizer is optimizer
    assert type(optimizer) is kind
    whole = optimizer.state_dict(from_global=True)
    if pyrannc.get_rank() == 0:
        assert heard == ["before"]
        assert whole["extra"] == 2
    assert script.scheduler.get_last_lr() == [g["lr"] for g in optimizer.param_groups]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(2):
            optimizer.state_dict()
    model: Any = script.model
    alone = list(model.parameters(from_global=False))
    assert len(told) == (len(alone) < len(list(model.parameters())))  # once
    for other in (pickle.loads(pickle.dumps(optimizer)), copy.deepcopy(optimizer)):
        assert type(other) is kind
        close(other.state_dict(), {k: v for k, v in optimizer.state_dict().items() if k != "extra"})
        with pytest.raises(TypeError):
            other.state_dict(from_global=True)
    before = [len(group["params"]) for group in optimizer.param_groups]
    optimizer.load_state_dict(optimizer.state_dict())  # this process's own
    assert [len(group["params"]) for group in optimizer.param_groups] == before
    script.model.undeploy()
    with pytest.raises(pyrannc.RaNNCError, match="needs the other processes"):
        optimizer.state_dict(from_global=True)


def test_the_optimizer_stays_the_users(pools: Pools) -> None:
    pools.run(2, keep_the_object)


class Remembering(nn.Module):
    """Has state that is no tensor, renames an old key, and scales what it saves."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.outer = nn.Linear(4, 4)
        self.calls = 0
        self.register_state_dict_post_hook(self._double)
        self.register_load_state_dict_pre_hook(self._rename)

    @staticmethod
    def _double(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
        state[prefix + "doubled"] = state[prefix + "outer.weight"] * 2

    @staticmethod
    def _rename(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        state.pop(prefix + "doubled", None)
        if prefix + "old.bias" in state:
            state[prefix + "outer.bias"] = state.pop(prefix + "old.bias")

    def get_extra_state(self) -> dict[str, int]:
        return {"calls": self.calls}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.calls = state["calls"]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.outer(torch.tanh(self.inner(x)))


def let_the_model_speak() -> None:
    torch.manual_seed(0)
    model = Remembering().double()
    bare = copy.deepcopy(model)
    wrapped = pyrannc.RaNNCModule(model, config=config(2))
    x = torch.randn(4, 4, dtype=torch.float64)
    wrapped(share(x)).sum().backward()
    model.calls = bare.calls = 3
    state = wrapped.state_dict(prefix="net.")
    if pyrannc.get_rank() == 0:
        close(state, bare.state_dict(prefix="net."))
        assert not any(isinstance(value, nn.Parameter) for value in state.values())
    given = {key: value for key, value in bare.state_dict().items() if key != "outer.bias"}
    given = {**given, "old.bias": torch.full((4,), 9.0), "_extra_state": {"calls": 8}}
    wrapped.load_state_dict(given)
    assert torch.equal(wrapped.get_param("outer.bias"), torch.full((4,), 9.0).double())
    assert model.calls == 8
    wrapped.undeploy()


def test_the_model_says_what_its_state_is(pools: Pools) -> None:
    pools.run(2, let_the_model_speak)


def refuse() -> None:
    """Wrong states change nothing, and every rank hears the same."""
    rank = pyrannc.get_rank()
    script = Script.start("adam")
    wrapped = script.wrap(None, 2)
    script.train(range(2))
    good = make(4).state_dict()
    before = {name: wrapped.get_param(name) for name, _ in make().named_parameters()}
    wrong: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({**good, "more": torch.ones(1)}, RuntimeError, "Unexpected key.*more"),
        ({k: v for k, v in good.items() if k != "scale"}, RuntimeError, "Missing key.*scale"),
        ({**good, "first.bias": torch.zeros(9)}, RuntimeError, "size mismatch for first.bias"),
        ({} if rank == 0 else good, pyrannc.RaNNCError, "nothing in it on rank 0"),
    ]
    for state, kind, message in wrong:
        with pytest.raises(kind, match=message):
            wrapped.load_state_dict(state)
    with pytest.raises(pyrannc.RaNNCError, match="assign"):
        wrapped.load_state_dict(good, assign=True)
    result = wrapped.load_state_dict({"scale": before["scale"], "more": 1}, strict=False)
    assert "first.bias" in result.missing_keys
    assert result.unexpected_keys == ["more"]
    for name, value in before.items():
        assert torch.equal(wrapped.get_param(name), value)
    refuse_optimizer_states(script)
    wrapped.undeploy()


def refuse_optimizer_states(script: Script) -> None:
    rank = pyrannc.get_rank()
    other = Script.start("adam", seed=2)
    other.train(range(1))
    good = other.optimizer.state_dict()
    with warnings.catch_warnings(record=True):  # where it is not the state of all parameters
        before = copy.deepcopy(script.optimizer.state_dict())
    fewer = torch.optim.AdamW(list(make().parameters())[:3])
    shaped = copy.deepcopy(good)
    shaped["state"][0]["exp_avg"] = torch.zeros(5, 5)
    wrong = [
        (fewer.state_dict(), r"3 parameters in groups of \[3\], but the optimizer 7"),
        (shaped, r"`exp_avg` of `middle.weight` has shape \[5, 5\]"),
        ({} if rank == 0 else good, "has nothing in it"),
    ]
    for state, message in wrong:
        with pytest.raises(pyrannc.RaNNCError, match=message):
            script.optimizer.load_state_dict(state, from_global=True)
    close(script.optimizer.state_dict(), before)
    script.optimizer.load_state_dict(good, from_global=True)
    taken = script.optimizer.param_groups[0]["params"].pop() if rank == 0 else None
    with pytest.raises(pyrannc.RaNNCError, match=r"groups have \[\d, \d\] parameters"):
        script.optimizer.state_dict(from_global=True)
    if taken is not None:
        script.optimizer.param_groups[0]["params"].append(taken)


def test_wrong_states_change_nothing(pools: Pools) -> None:
    pools.run(2, refuse)


def call_apart() -> None:
    """A call that needs all processes, made by some."""
    script = Script.start("adam")
    wrapped = script.wrap(None, 2)
    script.train(range(1))
    call = wrapped.state_dict if pyrannc.get_rank() == 0 else lambda: wrapped(share(batch(1)))
    with pytest.raises(pyrannc.MismatchError, match=r"(?s)rank 0: model.state_dict.*rank 1: model"):
        call()
    script.train(range(1, 2))  # and all goes on
    wrapped.undeploy()


def test_a_call_on_some_processes_is_named(pools: Pools) -> None:
    pools.run(2, call_apart)


def call_alone() -> str:
    model = make()
    wrapped = pyrannc.RaNNCModule(model, config=config(2, timeout_s=3))
    wrapped(share(batch(0))).backward()
    if pyrannc.get_rank() == 0:
        with pytest.raises(pyrannc.ExecutionError) as caught:
            wrapped.state_dict()
        return str(caught.value)
    return ""


def test_a_call_that_the_others_never_make_ends(pools: Pools) -> None:
    message = pools.run(2, call_alone)[0]
    assert "model.state_dict()" in message
    assert "did not come to this call within 3 s" in message
    pools.drop(2)


def differ() -> None:
    model = make()
    rate = 0.1 if pyrannc.get_rank() == 0 else 0.2
    wrapped = pyrannc.RaNNCModule(
        model, torch.optim.SGD(model.parameters(), lr=rate), config=config(2)
    )
    with pytest.raises(pyrannc.MismatchError, match=r"(?s)lr=0\.1.*lr=0\.2"):
        wrapped(share(batch(0)))
    wrapped.undeploy()


def test_optimizers_that_differ_are_named(pools: Pools) -> None:
    pools.run(2, differ)
